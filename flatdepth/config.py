"""Every knob of a training run. Frozen dataclasses; the text under a field is its documentation.

``flatdepth train --help`` prints it, ``--print_config`` prints a complete config file.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from flatdepth.errors import UserError, expect_within
from flatdepth.types import METRICS, REGIONS

LEAST_SIDE, MOST_SIDE = 8, 4116
"""Smallest and largest side of a network's input, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What a configuration has to know of a network without loading it.

    Attributes:
        encoders: its sizes, the keys of ``sizes`` of its class.
        kinds: what it can predict.
        multiple: of which both sides of its input are multiples, in pixels.
        adapters: whether its encoder takes low-rank adapters.
        fixed: the sizes that can only predict.
        losses: names of its ``own_loss``, which take the place of those in ``LOSSES``.
        canonical_focal_px: the focal length in pixels at which its published metric weights give
            metres; None where these do not depend on it.
    """

    encoders: list[str]
    kinds: tuple[str, ...]
    multiple: int
    adapters: bool = False
    fixed: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    canonical_focal_px: float | None = None


NETWORKS: dict[str, NetworkFacts] = {
    "depth_anything_v2": NetworkFacts(
        encoders=["vitt", "vits", "vitb", "vitl", "vitg"],
        kinds=("metric", "relative"),
        multiple=14,
        adapters=True,
    ),
    "depth_anything_3": NetworkFacts(
        encoders=["vitt", "vits", "vitb", "vitl"],
        kinds=("metric", "affine"),
        multiple=14,
        adapters=True,
        canonical_focal_px=300.0,
    ),
    "efficientnet": NetworkFacts(encoders=["lite0"], kinds=("metric", "relative"), multiple=14),
    "midas_v21": NetworkFacts(
        encoders=["tiny", "lite3", "resnext101"], kinds=("relative", "metric"), multiple=32
    ),
    "resnet50": NetworkFacts(
        encoders=["tiny", "resnet50"], kinds=("metric", "relative"), multiple=32
    ),
    "dpt": NetworkFacts(
        encoders=[
            *("dpt_large", "dpt_hybrid", "beit_large_512", "beit_large_384", "beit_base_384"),
            *("swin2_large_384", "swin2_base_384", "swin2_tiny_256"),
            *("tiny", "tiny_swin2", "tiny_vit", "tiny_hybrid"),
        ],
        kinds=("relative", "metric"),
        multiple=32,
    ),
    "zoedepth": NetworkFacts(
        encoders=[
            *("beit_large_384", "beit_large_384_k", "beit_large_384_nk"),
            *("tiny", "tiny_k", "tiny_nk"),
        ],
        kinds=("metric",),
        multiple=32,
        fixed=("beit_large_384_nk", "tiny_nk"),
    ),
    "marigold": NetworkFacts(
        encoders=["sd2", "tiny"],
        kinds=("affine",),
        multiple=8,
        adapters=True,
        losses=("diffusion",),
    ),
    "depth_anything_v2_port": NetworkFacts(
        encoders=["vitt", "vits", "vitb", "vitl"], kinds=("metric", "relative"), multiple=14
    ),
}
"""The networks of ``models.networks.CLASSES``, by their names."""

LOSSES: dict[str, Literal["metres", "shape"]] = {
    "silog": "metres",
    "l1_log": "metres",
    "l2_log": "metres",
    "affine": "shape",
    "ranking": "shape",
}
"""Names of ``training.losses.LOSSES``, and whether they compare metres, which only a metric model
predicts, or the shape of inverse depth (or depth) whatever its scale and shift."""


def homes_of(loss: str) -> list[str]:
    """The networks whose own a loss is; none for those that compare any network's prediction."""
    return [name for name, facts in NETWORKS.items() if loss in facts.losses]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


Bounds = tuple[float, float]
"""The lowest and the highest number that a field may have."""

SHARE: Bounds = (0, 1)
COUNT: Bounds = (1, 10**9)
"""Of steps, mostly: more than a run of centuries takes."""
SEED: Bounds = (0, 2**63 - 1)
WEIGHT: Bounds = (0, 1e6)
MAX_DEPTH_M: Bounds = (1e-2, 1e5)
CANONICAL_FOCAL_PX: Bounds = (1, 1e6)
MICRO_BATCH: Bounds = (1, 1024)


def _check(group: str, config: object, **bounds: Bounds) -> None:
    """Refuse fields of a group that are not within (lowest, highest); of a pair both numbers."""
    for name, (low, high) in bounds.items():
        key, value = f"{group}{name}", getattr(config, name)
        if not isinstance(value, tuple):
            expect_within(key, value, low, high)
            continue
        _require(
            low <= value[0] <= value[1] <= high,
            f"{key}: expected two numbers in [{low:g}, {high:g}], the smaller first, got {value}",
        )


def nearest_multiple(size: float, multiple: int) -> int:
    """The positive multiple that is nearest to a side, in pixels."""
    return max(1, round(size / multiple)) * multiple


def expect_multiple(key: str, size: int, multiple: int) -> None:
    """Refuse a side of a network's input that it cannot take.

    Raises:
        UserError: ``size`` is no positive multiple.
    """
    _require(
        size > 0 and size % multiple == 0,
        f"{key}: expected a positive multiple of {multiple}, got {size}; the nearest is "
        f"{nearest_multiple(size, multiple)}",
    )


def expect_canonical_focal(network: str, kind: str, focal_px: float) -> None:
    """Refuse a canonical focal length in pixels that a network cannot be given.

    Raises:
        UserError: it is none, the kind is not metric, or the network has its own.
    """
    key = "model.canonical_focal_px"
    expect_within(key, focal_px, *CANONICAL_FOCAL_PX)
    _require(
        kind == "metric",
        f"{key}: expected none, because only metres depend on the focal length and the kind is "
        f"{kind}; leave it out or set model.kind to metric",
    )
    own_px = NETWORKS[network].canonical_focal_px
    _require(
        own_px is None, f"{key}: {network} has its own, {own_px}, got {focal_px}; leave it out"
    )


def _require_name(key: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    _require(name in names, f"{key}: expected one of {str(names)[1:-1]}, got '{name}'")


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One shard set of the training mixture."""

    path: str
    """Directory or URL of a shard set (with its index.json), as written by flatdepth pack. With
    `data.loader` webdataset also tars without an index as WebDataset opens them: a list in braces
    (`https://HOST/rooms-{000000..000003}.tar`) or a command (`pipe:aws s3 cp s3://... -`)."""
    weight: float = 1.0
    """Relative share of the samples that come from this set."""
    val_scenes: list[str] = field(default_factory=list)
    """Scenes of this set to validate on, by name. If any set names some, they are all that is held
    out: official parts (but `test`) and `data.val_share` do not count then."""
    shuffle_block: int = 1
    """Samples side by side that are drawn at about the same time; 1: any order is as likely as any
    other. For sets that are read over a network and are larger than every cache: 64, say."""
    shuffle_window: int = 64
    """Of how many such blocks the samples are mixed."""

    def __post_init__(self) -> None:
        _check(
            "data.train.",
            self,
            weight=WEIGHT,
            shuffle_block=(1, 10**6),
            shuffle_window=(1, 10**6),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which frames are trained and validated on, and how they are cut."""

    train: list[SetConfig] = field(default_factory=list)
    """Shard sets to train on, mixed by weight."""
    loader: Literal["indexed", "webdataset"] = "indexed"
    """indexed: every sample is a range read, in an exact order, and a run that goes on is the run
    that was not stopped. webdataset: tars are read from end to end, for stores without range
    requests and for pipes. A run that goes on then begins the stream anew, in an order that follows
    from the seed and the step: reproducible, but not what the uninterrupted run would have seen;
    and its samples depend on the number of devices."""
    resampled: bool = False
    """With `loader` webdataset: shards are drawn with replacement instead of gone through."""
    val: list[str] = field(default_factory=list)
    """Shard sets to validate on, their official validation part if they have one, and never `test`;
    empty: scenes held out of the training sets, which then need an index."""
    art: list[str] = field(default_factory=list)
    """Shard sets of pictures to hang; empty: no art is pasted."""
    val_share: float = 0.2
    """Share of each training set's scenes held out for validation where `val` is empty and the
    set has no official validation part."""
    split_seed: int = 0
    """Selects the held-out scenes."""
    height: int = 518
    """Rows of the network's input, in pixels; a multiple of 14 for Depth Anything, of 32 for MiDaS,
    DPT, ZoeDepth and ResNet, of 8 for Marigold."""
    width: int = 518
    """Columns of the network's input, in pixels; a multiple of the same."""
    crop: tuple[float, float] = (0.7, 1.0)
    """Range of the training crop's side, as a share of the largest crop with the input's aspect."""
    flip: float = 0.5
    """Probability of a left-right flip in training."""
    min_depth_m: float = 0.1
    """Nearer pixels are not valid, in metres."""
    threads: int = 4
    """Threads that read, decode and plan. One plans at a time, so that a training process gets at
    most some 120 pasted images/s, however many there are."""
    processes: int = 0
    """Processes that read, decode and plan instead of threads, each on a core and with 0.4 GB; for
    GPUs that are faster than that."""
    prefetch: int = 4
    """Micro-batches prepared ahead."""
    cache_gb: float = 0.0
    """Samples of remote sets that are kept in $FLATDEPTH_CACHE (or ~/.cache/flatdepth), in GB of
    10^9 bytes, of all runs together; 0: none. Worth it where a set is read more than once."""
    read_timeout_s: float = 30.0
    """Seconds without an answer after which a request to a server is given up and sent again."""
    outage_minutes: float = 30.0
    """How long a run waits for a server that has answered before; then it stops with an error."""

    def __post_init__(self) -> None:
        _check(
            "data.",
            self,
            height=(LEAST_SIDE, MOST_SIDE),
            width=(LEAST_SIDE, MOST_SIDE),
            val_share=SHARE,
            flip=SHARE,
            crop=(0.1, 1.0),
            min_depth_m=(1e-3, 1e4),
            threads=(1, 256),
            processes=(0, 256),
            prefetch=(1, 1024),
            cache_gb=(0, 1e6),
            read_timeout_s=(1, 3600),
            outage_minutes=(0, 10080),
            split_seed=SEED,
        )
        _require(
            not self.resampled or self.loader == "webdataset",
            "data.resampled: the indexed loader goes through every set sample by sample; set "
            "data.loader to webdataset, or leave data.resampled out",
        )
        _require(
            self.loader == "indexed" or all(entry.shuffle_block == 1 for entry in self.train),
            "data.train: with data.loader webdataset tars are read from end to end; leave "
            "shuffle_block out, or set data.loader to indexed",
        )
        _require(
            not self.train or any(entry.weight > 0 for entry in self.train),
            "data.train: give at least one set a weight above 0",
        )


@dataclass(frozen=True, kw_only=True)
class PasteStage:
    """Settings that the paste stage takes over from an optimiser step on; null keeps the last."""

    step: int
    """First optimiser step of the stage, counted from 0."""
    share: float | None = None
    """As `paste.share`."""
    max_pastes: int | None = None
    """As `paste.max_pastes`."""
    area: tuple[float, float] | None = None
    """As `paste.area`."""
    max_area: float | None = None
    """As `paste.max_area`."""

    def __post_init__(self) -> None:
        _check("paste.stages.", self, step=(0, COUNT[1]))


@dataclass(frozen=True, kw_only=True)
class ContentShares:
    """Relative shares of what is pasted."""

    mirror: float = 1.0
    """Mirrors: a portion of one half of the image, flipped, on the other half."""
    art: float = 1.0
    """Pictures of the art sets; none if there is no art set."""
    mural: float = 0.3
    """Wall paintings: another frame of the same set, on the bare wall or in a frame."""
    screen: float = 0.3
    """Screens that show another frame, with a bezel and a glow."""
    opening: float = 0.2
    """Decoys: framed openings that show another frame with its true depth, behind the plane."""
    empty: float = 0.2
    """Decoys: empty frames over the untouched scene."""


@dataclass(frozen=True, kw_only=True)
class LayoutShares:
    """Relative shares of how pastes are placed."""

    hung: float = 0.8
    """On a wall found in the depth; where no place is good the paste stands instead."""
    standing: float = 0.2
    """A tilted board in front of everything it covers. 0: nothing stands, and what finds no wall is
    left out."""
    legacy: float = 0.0
    """A rotated rectangle of the image with the depth gradient of the earlier recipe, which is no
    plane; only for comparison."""


@dataclass(frozen=True, kw_only=True)
class ShapeShares:
    """Relative shares of outlines. Screens are rectangles or rounded, murals rectangles."""

    rectangle: float = 1.0
    """Right-angled."""
    rounded: float = 0.12
    """With rounded corners."""
    ellipse: float = 0.12
    """Ellipses and circles."""
    arch: float = 0.08
    """Round at the top."""
    polygon: float = 0.06
    """Hexagons, octagons and diamonds."""


PASTE_BOUNDS: dict[str, Bounds] = {
    "share": SHARE,
    "max_pastes": (1, 32),
    "area": (1e-4, 1.0),
    "max_area": (1e-4, 1.0),
    "max_tilt_deg": (0, 80),
    "framed": SHARE,
    "frame_width": (0.0, 0.4),
    "mat": SHARE,
    "stylised": SHARE,
    "glass": SHARE,
    "worn": SHARE,
    "shadow": SHARE,
    "match_light": SHARE,
    "match_sensor": SHARE,
    "thickness_m": (0.0, 1.0),
    "plane_tolerance": (1e-6, 0.2),
    "depth_noise": SHARE,
    "mirror_portion": (0.05, 1.0),
}
"""Of the numbers of ``PasteConfig``; the shares of its groups have ``WEIGHT``."""


@dataclass(frozen=True, kw_only=True)
class PasteConfig:
    """Flat things that show a scene, and decoys, pasted into the batch."""

    share: float = 0.8
    """Share of the training images that get pastes; the others stay clean."""
    max_pastes: int = 2
    """Most pastes in one image; the number is uniform in 1..max_pastes."""
    area: tuple[float, float] = (0.03, 0.3)
    """Range of one paste's area with its frame, as a share of the image (log-uniform)."""
    max_area: float = 0.45
    """Largest area of all pastes of an image together, as a share of the image."""
    stages: list[PasteStage] = field(default_factory=list)
    """A curriculum: from each stage's step on its settings hold. Steps ascend."""
    content: ContentShares = field(default_factory=ContentShares)
    """What is pasted."""
    layout: LayoutShares = field(default_factory=LayoutShares)
    """How it is placed."""
    shape: ShapeShares = field(default_factory=ShapeShares)
    """Outlines."""
    max_tilt_deg: float = 70.0
    """Largest angle between a standing paste and the view direction's normal plane, in degrees."""
    framed: float = 0.8
    """Probability of a frame around a mirror or picture."""
    frame_width: tuple[float, float] = (0.02, 0.1)
    """Range of the frame's width, as a share of the shorter side inside it."""
    mat: float = 0.25
    """Probability of a mat (passe-partout) around a framed rectangular picture."""
    stylised: float = 0.15
    """Probability that a picture or mural is posterised, smoothed or turned into a sketch."""
    glass: float = 0.3
    """Probability of a soft highlight on a mirror, screen or picture."""
    worn: float = 0.4
    """Probability that a mirror is a little blurred or dusty."""
    shadow: float = 0.5
    """Largest darkening of the wall beside a hung paste by its shadow; 0: none. Lit screens
    brighten the wall a little all the same."""
    match_light: float = 1.0
    """How far brightness, colour cast and falloff follow the wall's, from 0 (not) to 1."""
    match_sensor: float = 1.0
    """How far sharpness and noise follow the photograph's, from 0 (not) to 1."""
    thickness_m: tuple[float, float] = (0.01, 0.05)
    """Range of the distance between a hung paste's surface and its wall, in metres; 2 % of the
    depth at most."""
    plane_tolerance: float = 0.02
    """Largest relative depth residual of a point that belongs to a wall; what is nearer than the
    paste by twice as much stays in front of it."""
    depth_test: bool = True
    """Whether things in front of a hung paste's wall hide it; false only for comparison."""
    depth_noise: float = 0.003
    """What 1/depth may deviate by besides, in 1/m: a Kinect's disparity step is about 0.003, which
    is 2 % at 7 m."""
    mirror_portion: tuple[float, float] = (0.4, 0.9)
    """Range of the mirrored portion's side, as a share of the largest that fits in half of it."""
    mirror_target: Literal["surface", "ignore", "virtual"] = "surface"
    """Truth on mirrors: the plane of their surface; none (not valid); or virtual, the depth of the
    scene that they show, scaled to begin behind that plane. On mirrors that are labelled in a frame
    the last two are none."""

    def at(self, step: int) -> "PasteConfig":
        """The settings that hold at an optimiser step."""
        config = self
        for stage in self.stages:
            if stage.step <= step:
                changes = {
                    name: getattr(stage, name)
                    for name in ("share", "max_pastes", "area", "max_area")
                    if getattr(stage, name) is not None
                }
                config = replace(config, stages=[], **changes)
        return config

    def __post_init__(self) -> None:
        _check("paste.", self, **PASTE_BOUNDS)
        expect_within("paste.max_area", self.max_area, self.area[0], PASTE_BOUNDS["max_area"][1])
        for group in ("content", "layout", "shape"):
            shares = asdict(getattr(self, group))
            _check(f"paste.{group}.", getattr(self, group), **dict.fromkeys(shares, WEIGHT))
            _require(
                sum(shares.values()) > 0,
                f"paste.{group}: expected shares that are not all 0, got {shares}",
            )
        steps = [stage.step for stage in self.stages]
        _require(steps == sorted(steps), f"paste.stages: expected ascending steps, got {steps}")
        for stage in self.stages:
            self.at(stage.step)


@dataclass(frozen=True, kw_only=True)
class PhotometricConfig:
    """Light, lens, sensor and JPEG over the whole training image, after pasting."""

    share: float = 0.8
    """Share of the training images that are changed."""
    brightness: float = 0.2
    """Largest relative change of brightness."""
    contrast: float = 0.2
    """Largest relative change of contrast."""
    saturation: float = 0.2
    """Largest relative change of saturation."""
    hue: float = 10.0
    """Largest turn of the hue, in degrees."""
    gamma: float = 0.2
    """Largest change of log gamma."""
    blur_share: float = 0.3
    """Share of the changed images that are blurred."""
    blur: float = 1.0
    """Largest standard deviation of the Gaussian blur, in pixels of the network's input."""
    noise_share: float = 0.5
    """Share of the changed images that get noise."""
    noise: float = 0.02
    """Largest standard deviation of the noise in black, in units of the full range."""
    shot: float = 0.02
    """Largest standard deviation of what white has besides (its variance grows with the signal), in
    units of the full range."""
    jpeg_share: float = 0.5
    """Share of the changed images that go through JPEG."""
    jpeg_quality: tuple[int, int] = (40, 95)
    """Range of the JPEG quality, as libjpeg counts it: 1 is worst, 100 is best."""

    def __post_init__(self) -> None:
        _check(
            "photometric.",
            self,
            share=SHARE,
            brightness=SHARE,
            contrast=SHARE,
            saturation=SHARE,
            hue=(0, 180),
            gamma=SHARE,
            blur_share=SHARE,
            blur=(0, 10),
            noise_share=SHARE,
            noise=SHARE,
            shot=SHARE,
            jpeg_share=SHARE,
            jpeg_quality=(1, 100),
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the weights it starts from."""

    name: str = "depth_anything_v2"
    """Which network. depth_anything_3: DA3MONO and DA3METRIC, whose metres depend on the focal
    length; efficientnet: EfficientNet-Lite with the fusion head of Depth Anything V2, for a CPU and
    few images; midas_v21: MiDaS v2.1, large and small; resnet50: ResNet-50 and five transposed
    convolutions, a plain baseline; dpt, zoedepth, depth_anything_v2_port: DPT (MiDaS v3, v3.1),
    ZoeDepth and Depth Anything V2 as transformers has them (extra `compare`); marigold: Stable
    Diffusion 2 as a depth model (extra `marigold`)."""
    encoder: str = "vits"
    """Its size. Depth Anything V2: vits, vitb, vitl or vitg, and vitt, a tiny one for tests; Depth
    Anything 3: vitl, the published one, vitb, vits or vitt; efficientnet: lite0; midas_v21:
    resnext101 or lite3; resnet50: resnet50; dpt and zoedepth: the name of a published file, such as
    beit_large_512; marigold: sd2; all but the first three also tiny."""
    kind: Literal["metric", "relative", "affine"] = "metric"
    """metric: depth in metres; relative: inverse depth up to scale and shift; affine: depth up to
    scale and shift."""
    max_depth_m: float = 20.0
    """Largest depth that a metric model can say, in metres (20 indoors, 80 outdoors); farther
    truth is not valid. Depth Anything 3 has no largest depth, and loads weights of any."""
    canonical_focal_px: float | None = None
    """Focal length in pixels of the network's input at which it predicts metres; those of an image
    of another are as many times larger as its focal length is, and so is max_depth_m there. For
    data of several cameras; about that of the network's input where most of the data, or the
    weights to start from, were taken. Null: metres whatever the camera (Depth Anything 3: 300)."""
    checkpoint: str | None = None
    """Weights to start from: a file (.safetensors, .pth, .pt, .ckpt, .bin), its folder or a hub id.
    Null: random weights."""
    head: Literal["keep", "fresh"] = "keep"
    """Whether the checkpoint's head is used or initialised anew."""
    freeze: Literal["none", "encoder", "head"] = "none"
    """Which part is not trained."""
    frozen_blocks: int = 0
    """Encoder blocks from the input on that are not trained; above 0 neither is what comes before
    them, such as the embeddings and the class token."""
    checkpointing: Literal["none", "encoder", "encoder+head"] = "encoder"
    """Which activations are recomputed in the backward pass to save memory."""
    lora_rank: int = 0
    """Rank of low-rank adapters (LoRA) on the encoder's linear layers, which are then all that is
    trained of the encoder; 0: none. Saved weights have them merged in. Needs the package peft."""
    lora_alpha: float = 16.0
    """The adapters' output is multiplied by lora_alpha / lora_rank."""
    teacher: str | None = None
    """Weights of the teacher that `loss.teacher` asks for, in any form that `checkpoint` takes, of
    any network. Null: those the run starts from."""

    def __post_init__(self) -> None:
        _require_name("model.name", self.name, NETWORKS)
        facts = NETWORKS[self.name]
        if self.encoder not in facts.encoders:
            homes = [name for name, other in NETWORKS.items() if self.encoder in other.encoders]
            fix = f"; set model.name to {homes[0]} for that one" if homes else ""
            raise UserError(
                f"model.encoder: expected one of {str(facts.encoders)[1:-1]} for "
                f"{self.name}, got '{self.encoder}'{fix}"
            )
        _require(
            self.kind in facts.kinds,
            f"model.kind: {self.name} predicts {' or '.join(facts.kinds)} depth, got '{self.kind}'",
        )
        _require(
            self.encoder not in facts.fixed,
            f"model.encoder: {self.name} {self.encoder} can only predict; train one of "
            f"{', '.join(size for size in facts.encoders if size not in facts.fixed)}",
        )
        _check(
            "model.",
            self,
            max_depth_m=MAX_DEPTH_M,
            frozen_blocks=(0, 40),
            lora_rank=(0, 1024),
            lora_alpha=(1e-3, 1e6),
        )
        if self.canonical_focal_px is not None:
            expect_canonical_focal(self.name, self.kind, self.canonical_focal_px)
        _require(
            not self.lora_rank or facts.adapters,
            f"model.lora_rank: {self.name} takes no adapters; set it to 0",
        )
        _require(
            not self.lora_rank or (self.freeze != "encoder" and not self.frozen_blocks),
            "model.lora_rank: adapters already freeze the encoder they are added to; set "
            "model.freeze to none or head and model.frozen_blocks to 0",
        )

    def reach_m(self, focal_px: float) -> float:
        """Up to which depth in metres truth is valid in an image of that focal length in pixels."""
        if self.canonical_focal_px is None:
            return self.max_depth_m
        return self.max_depth_m * focal_px / self.canonical_focal_px


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: a sum of losses, and the weights of the regions in all of them."""

    terms: dict[str, float] = field(default_factory=dict)
    """Losses and their factors, such as {silog: 1, ranking: 0.1}; empty: silog for metric and
    affine for the others. silog: scale-invariant log error; l1_log, l2_log: mean absolute and
    squared log error; affine: trimmed L1 with gradient matching, of inverse depth aligned by scale
    and shift (of depth itself for models of kind affine); ranking: which of two pixels is nearer.
    The first three need a metric model. diffusion: marigold's own, squared error of what the
    denoising network predicts of a noisy latent of the truth; it stands alone."""
    silog_lambda: float = 0.5
    """How far silog forgives a wrong scale, from 0 (not: RMS log error) to 1 (altogether)."""
    trim: float = 0.2
    """Share of an image's largest residuals that affine leaves out; 0 for perfect truth."""
    gradient_weight: float = 2.0
    """Factor of the multi-scale gradient matching inside affine; larger for sharper edges."""
    gradient_scales: int = 4
    """Scales of the gradient matching, each half of the one before."""
    background: float = 1.0
    """Weight of background pixels."""
    mirror: float = 1.0
    """Weight of mirror pixels."""
    art: float = 1.0
    """Weight of pixels of art, murals and screens."""
    frame: float = 1.0
    """Weight of the frames' pixels."""
    decoy: float = 1.0
    """Weight of decoy pixels."""
    teacher: float = 0.0
    """Factor of the same loss against a frozen teacher's depth of the photograph without pastes, on
    background pixels, those without truth too; it keeps what the network knew there. 0: no teacher.
    The teacher is `model.teacher`, or the network as it started."""

    @property
    def is_own(self) -> bool:
        """Whether it is a network's ``own_loss``, which then stands alone."""
        return any(homes_of(term) for term in self.terms)

    def __post_init__(self) -> None:
        for term, factor in self.terms.items():
            own = [loss for facts in NETWORKS.values() for loss in facts.losses]
            _require_name("loss.terms", term, [*LOSSES, *own])
            expect_within(f"loss.terms.{term}", factor, 1e-9, 1e9)
        _require(
            not self.is_own or len(self.terms) == 1,
            f"loss.terms: a loss of the network's own cannot be added to others, got "
            f"{', '.join(self.terms)}; give it alone",
        )
        _require(
            not self.is_own or not self.teacher,
            f"loss.teacher: a teacher's depth is compared by losses in pixels, not by "
            f"{', '.join(self.terms)}; set it to 0, or take other terms",
        )
        _check(
            "loss.",
            self,
            silog_lambda=SHARE,
            trim=(0, 0.99),
            gradient_weight=WEIGHT,
            gradient_scales=(1, 12),
            background=WEIGHT,
            mirror=WEIGHT,
            art=WEIGHT,
            frame=WEIGHT,
            decoy=WEIGHT,
            teacher=WEIGHT,
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, its schedule and the average of the weights."""

    kind: Literal["adamw", "adam", "adamw8bit"] = "adamw"
    """adamw: decoupled weight decay; adam: weight decay as an L2 term of the gradient; adamw8bit:
    AdamW whose moments take a quarter of the memory (needs the package bitsandbytes)."""
    lr: float = 5e-6
    """Peak learning rate of the encoder."""
    head_lr_factor: float = 10.0
    """The head's learning rate as a multiple of the encoder's."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and embeddings have none."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    schedule: Literal["constant", "polynomial", "cosine", "cyclic"] = "polynomial"
    """Shape of the learning rate over the run's optimiser steps; cyclic is triangular."""
    warmup: int = 0
    """Optimiser steps of linear warm-up."""
    power: float = 0.9
    """Exponent of the polynomial schedule."""
    floor: float = 0.0
    """Share of the peak learning rate that a schedule falls to."""
    cycle: int = 0
    """Optimiser steps of one rise and fall of the cyclic schedule."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, such as 0.999; 0: none. If on, it is
    the average that is validated and saved as best and final. Costs one more copy of the trained
    weights."""

    def __post_init__(self) -> None:
        _check(
            "optim.",
            self,
            lr=(1e-12, 10),
            head_lr_factor=(1e-6, 1e6),
            weight_decay=(0, 100),
            clip_norm=(1e-6, 1e9),
            warmup=(0, COUNT[1]),
            power=(1e-2, 100),
            floor=SHARE,
            cycle=(0, COUNT[1]),
            ema=(0, 0.999999),
        )
        _require(
            (self.cycle >= 2) == (self.schedule == "cyclic"),
            "optim.cycle: expected at least 2 steps with optim.schedule cyclic and 0 with any "
            f"other, got {self.cycle} with {self.schedule}",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation: every image clean, and the same image with pastes of a fixed seed."""

    every: int = 1000
    """Optimiser steps between validations; it also runs at the start and at the end."""
    images: int = 256
    """Most validation images, evenly spaced over the set; 0: all."""
    batch: int = 4
    """Images per forward pass and device."""
    seed: int = 1
    """Seed of the pastes."""
    pictures: int = 6
    """Rows of the contact sheet saved with each validation."""
    patience: int = 0
    """Stop after this many validations in a row without a better `metric`; 0: never."""
    metric: str = "flat.abs_rel"
    """What the best checkpoint and early stopping look at, as REGION.METRIC."""
    clean_guard: float = 0.05
    """A checkpoint is not the best if AbsRel on clean images is worse by more than this share than
    at the start (for a model that started from a checkpoint)."""

    def __post_init__(self) -> None:
        _check(
            "eval.",
            self,
            every=COUNT,
            images=(0, COUNT[1]),
            batch=MICRO_BATCH,
            seed=SEED,
            pictures=(0, 64),
            patience=(0, COUNT[1]),
            clean_guard=(0, 1e3),
        )
        region, _, metric = self.metric.partition(".")
        _require(
            region in REGIONS and metric in METRICS,
            f"eval.metric: expected REGION.METRIC of {', '.join(REGIONS)} and "
            f"{', '.join(METRICS)}, got '{self.metric}'",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Lengths in metres, steps are optimiser steps, shares between 0 and 1."""

    name: str = "run"
    """Name of the run; everything it makes is in `runs`/`name`."""
    runs: str = "runs"
    """Directory of all runs."""
    steps: int = 10_000
    """Optimiser steps."""
    batch: int = 16
    """Samples per optimiser step, over all devices."""
    micro_batch: int = 1
    """Most samples per device and forward pass; the rest of `batch` is accumulated. Less where the
    devices' shares of `batch` are no multiple of it."""
    precision: Literal["no", "fp16", "bf16"] = "fp16"
    """Autocast type of the network; on a CPU fp16 is not used and the run says so."""
    seed: int = 0
    """Seed of the weights, the order of the samples and everything that is random in them."""
    save_every: int = 500
    """Optimiser steps between checkpoints; one is also saved at the end and on SIGTERM."""
    keep: int = 2
    """Newest checkpoints kept; the best weights lie apart from them."""
    log_every: int = 10
    """Optimiser steps between lines of the log."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"
    """Where accelerate sends the metrics."""
    max_bad_steps: int = 20
    """Stop after this many optimiser steps in a row with a loss or gradient that is not finite."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run's newest checkpoint if it has one; never: refuse to touch it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    paste: PasteConfig = field(default_factory=PasteConfig)
    """Paste stage."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    """Photometric stage."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation."""

    def __post_init__(self) -> None:
        _check(
            "",
            self,
            steps=COUNT,
            batch=(1, 2**16),
            micro_batch=MICRO_BATCH,
            seed=SEED,
            save_every=COUNT,
            keep=COUNT,
            log_every=COUNT,
            max_bad_steps=COUNT,
        )
        _require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"name: expected a plain directory name, got '{self.name}'",
        )
        _require(
            self.data.min_depth_m < self.model.max_depth_m,
            f"data.min_depth_m ({self.data.min_depth_m}) must be below model.max_depth_m "
            f"({self.model.max_depth_m})",
        )
        for side in ("height", "width"):
            size, multiple = getattr(self.data, side), NETWORKS[self.model.name].multiple
            expect_multiple(f"data.{side}", size, multiple)
        for term in self.loss.terms:
            homes = homes_of(term)
            _require(
                not homes or self.model.name in homes,
                f"loss.terms: {term} is a loss of {' and '.join(homes)} alone, got model.name "
                f"'{self.model.name}'; take another loss or model",
            )
        metric_only = [term for term in self.loss.terms if LOSSES.get(term) == "metres"]
        _require(
            self.model.kind == "metric" or not metric_only,
            f"loss.terms: {', '.join(metric_only)} compare metres, which a model of kind "
            f"{self.model.kind} does not predict; take affine and ranking, or set model.kind to "
            "metric",
        )
        starts_knowing = self.model.checkpoint is not None and self.model.head == "keep"
        _require(
            not self.loss.teacher or self.model.teacher is not None or starts_knowing,
            "loss.teacher: the network starts with a random "
            f"{'head' if self.model.checkpoint else 'network'}, which is no teacher; give "
            "model.teacher the weights of one"
            f"{' or set model.head to keep' if self.model.checkpoint else ' or model.checkpoint'}",
        )
