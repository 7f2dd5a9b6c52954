"""Can a network tell where something was pasted? A classifier of paste borders.

If a small convolutional network can tell the border of a paste from a border that was in the
photograph, a depth network can learn that shortcut too, instead of what a flat thing looks like.
Patches of 32 x 32 pixels of luminance, half of them astride the outline of a paste and half astride
a strong edge of the clean image, are brought to mean 0 and variance 1 and matched in the strength
and straightness of the edge, so that neither contrast nor straightness gives them away. The network
is tested on scenes that it was not trained on; chance is one half.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from torch import Tensor, nn

from flatdepth.augment.draw.composite import paste
from flatdepth.augment.photometric import photometric
from flatdepth.augment.plan.appearance import Kind
from flatdepth.augment.plan.layout import Paste
from flatdepth.config import ContentShares, PhotometricConfig, TrainConfig
from flatdepth.data.frames import Corpus, open_corpus
from flatdepth.data.loader import Sample, to_device, training_samples, truth_range_m
from flatdepth.errors import UserError
from flatdepth.geometry import project
from flatdepth.types import Region

PATCH_PX = 32
PER_IMAGE = 24
FOLDS = 5
EPOCHS = 10
WAYS = ("naive", "flatdepth", "flatdepth + photometric")

_HALF = PATCH_PX // 2
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_BINS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Borders of one way of pasting.

    Attributes:
        values: (N, 32, 32) luminance with mean 0 and variance 1.
        pasted: (N,) whether it straddles a paste's border.
        scene: (N,) number of the scene.
    """

    values: Float32[np.ndarray, "n 32 32"]
    pasted: Bool[np.ndarray, " n"]
    scene: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How well one way of pasting is told from photographs.

    Attributes:
        accuracy: mean over the folds, on held-out scenes.
        spread: standard deviation over the folds.
        folds: in which other scenes were held out.
        patches: in all, half of them pasted.
    """

    accuracy: float
    spread: float
    folds: int
    patches: int


def gather(
    config: TrainConfig, images: int, progress: Callable[[int, int], None]
) -> dict[str, Patches]:
    """Patches of the first images of a training run, by each of ``WAYS``.

    Mirrors and pictures only, one per image. The naive way has the same outlines: the picture
    warped by OpenCV with a hard mask, a frame of one colour, the light as it comes.
    """
    config = replace(
        config,
        micro_batch=1,
        paste=replace(
            config.paste,
            share=1.0,
            max_pastes=1,
            stages=[],
            content=ContentShares(mural=0, screen=0, opening=0, empty=0),
            stylised=0.0,
        ),
        photometric=replace(PhotometricConfig(), share=1.0),
    )
    rng = np.random.default_rng(config.seed)
    books: dict[str, list[tuple[np.ndarray, bool, int]]] = {way: [] for way in WAYS}
    scenes: dict[tuple[str, str], int] = {}
    corpus = open_corpus(config.data)
    for number, sample in enumerate(_samples(corpus, config, images)):
        scene = scenes.setdefault((sample.frame.dataset, sample.frame.scene), len(scenes))
        for way, clean, pasted, outline in _looks(sample, corpus, config):
            for luminance, places, is_pasted in (
                (pasted, outline, True),
                (clean, _edges(clean), False),
            ):
                for row, column in _some(places, rng):
                    patch = luminance[row - _HALF : row + _HALF, column - _HALF : column + _HALF]
                    if patch.std() > 0.01:
                        normal = (patch - patch.mean()) / patch.std()
                        books[way].append((normal, is_pasted, scene))
        progress(number + 1, images)
    return {way: _matched(book, rng) for way, book in books.items()}


def _samples(corpus: Corpus, config: TrainConfig, images: int) -> Iterator[Sample]:
    stream = training_samples(
        corpus, config, first_step=0, rank=0, ranks=1, accumulation=config.batch
    )
    with closing(stream):
        for _, (sample,) in zip(range(images), stream, strict=False):
            yield sample


def _looks(
    sample: Sample, corpus: Corpus, config: TrainConfig
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Way, luminance of the clean and of the pasted image, and the outline's pixels."""
    cpu = torch.device("cpu")
    depth_range_m = truth_range_m(config)
    clean, groups, factors = to_device([sample], cpu, depth_range_m=depth_range_m)
    pasted = paste(clean, groups, depth_range_m=depth_range_m)
    inside = (pasted.region[0, 0] != Region.BACKGROUND).numpy()
    if not sample.plan or not inside.any():
        return
    naive = naive_paste(_pixels(clean.image), sample, corpus)
    outline = _outline(inside)
    yield WAYS[0], _luminance(clean.image), _luminance(naive[None]), outline
    yield WAYS[1], _luminance(clean.image), _luminance(pasted.image), outline
    clean_image, pasted_image = (photometric(x.image, factors) for x in (clean, pasted))
    yield WAYS[2], _luminance(clean_image), _luminance(pasted_image), outline


def naive_paste(image: UInt8[np.ndarray, "h w 3"], sample: Sample, corpus: Corpus) -> Tensor:
    """The paste of a sample as a first script would do it, (3, H, W) in 0..1."""
    (one,) = sample.plan
    height, width = image.shape[:2]
    K_px = sample.view.intrinsics(sample.frame.K_px)
    outer, inner = (project(K_px, r.corners()) for r in (one.rectangle, one.picture_box))
    source = _source(image, one, corpus)
    rows, columns = source.shape[:2]
    whole = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], np.float32)
    matrix = cv2.getPerspectiveTransform(whole - np.float32(0.5), (inner - 0.5).astype(np.float32))
    picture = cv2.warpPerspective(source, matrix, (width, height), flags=cv2.INTER_LINEAR)
    result = image.copy()
    for corners, colour in ((outer, np.array(one.look.frame_colour) * 255), (inner, picture)):
        mask = np.zeros((height, width), np.uint8)
        cv2.fillConvexPoly(mask, np.round(corners - 0.5).astype(np.int32), 1)
        result = np.where(mask[..., None] > 0, colour, result).astype(np.uint8)
    return torch.from_numpy(result).movedim(-1, 0).float() / 255


def _source(image: np.ndarray, one: Paste, corpus: Corpus) -> np.ndarray:
    if one.kind is Kind.ART:
        return corpus.pictures.picture(one.picture)
    assert one.portion is not None
    right, top, left, bottom = (round(x) for x in one.portion)
    return np.ascontiguousarray(image[top : max(bottom, top + 2), left : max(right, left + 2)])[
        :, ::-1
    ]


def _pixels(image: Tensor) -> np.ndarray:
    return (image[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()


def _luminance(image: Tensor) -> np.ndarray:
    return torch.einsum("chw,c->hw", image[0], _LUMA).numpy()


def _outline(inside: np.ndarray) -> np.ndarray:
    """Pixels inside next to one outside, (n, 2) as (row, column)."""
    grown = np.pad(inside, 1, mode="edge")
    core = grown[:-2, 1:-1] & grown[2:, 1:-1] & grown[1:-1, :-2] & grown[1:-1, 2:]
    return np.argwhere(inside & ~core)


def _edges(luminance: np.ndarray) -> np.ndarray:
    """The tenth of the pixels with the steepest luminance that are steepest across their edge."""
    smooth = cv2.GaussianBlur(luminance, (0, 0), 1.0)
    du, dv = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    steep = np.hypot(du, dv)
    ridge = steep >= cv2.dilate(steep, np.ones((3, 3), np.uint8))
    return np.argwhere(ridge & (steep >= np.quantile(steep, 0.9)))


def _some(places: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Up to ``PER_IMAGE`` places at random; patches that would leave the image come back short."""
    for row, column in rng.permutation(places)[:PER_IMAGE].tolist():
        if row >= _HALF and column >= _HALF:
            yield row, column


def _matched(book: list[tuple[np.ndarray, bool, int]], rng: np.random.Generator) -> Patches:
    """As many natural as pasted patches in every class of edge strength and straightness."""
    book = [entry for entry in book if entry[0].shape == (PATCH_PX, PATCH_PX)]
    values = np.stack([entry[0] for entry in book]).astype(np.float32)
    pasted = np.array([entry[1] for entry in book])
    scene = np.array([entry[2] for entry in book])
    features = np.stack([_edge(patch) for patch in values])
    classes = np.zeros(len(book), dtype=int)
    for feature in features.T:
        limits = np.quantile(feature[pasted], np.linspace(0, 1, _BINS + 1)[1:-1])
        classes = classes * _BINS + np.searchsorted(limits, feature)
    kept = []
    for one in np.unique(classes):
        yes, no = (np.flatnonzero((classes == one) & (pasted == label)) for label in (True, False))
        count = min(len(yes), len(no))
        kept += [rng.permutation(yes)[:count], rng.permutation(no)[:count]]
    chosen = np.concatenate(kept)
    return Patches(values=values[chosen], pasted=pasted[chosen], scene=scene[chosen])


def _edge(patch: np.ndarray) -> np.ndarray:
    """Log strength of the edge through the middle of a patch, and how straight it is (0..1).

    From the structure tensor over the middle 16 x 16 pixels: its trace, and the coherence
    ((l1 - l2) / (l1 + l2))^2 of its eigenvalues (Bigun and Granlund 1987).
    """
    du, dv = np.gradient(patch)[::-1]
    middle = slice(_HALF - 8, _HALF + 8)
    du, dv = du[middle, middle], dv[middle, middle]
    uu, vv, uv = (du * du).mean(), (dv * dv).mean(), (du * dv).mean()
    trace = uu + vv + 1e-6
    return np.array([np.log(trace), ((uu - vv) ** 2 + 4 * uv**2) / trace**2])


def classify(patches: Patches, seed: int) -> Result:
    """Train and test the classifier, in up to ``FOLDS`` folds of whole scenes.

    Raises:
        UserError: all patches are of one scene.
    """
    scenes = np.unique(patches.scene)
    if len(scenes) < 2:
        raise UserError("the training sets have one scene only; give at least two (--data.train)")
    fold = np.random.default_rng(seed).permutation(len(scenes)) % min(FOLDS, len(scenes))
    fold_of = dict(zip(scenes.tolist(), fold.tolist(), strict=True))
    held_in = np.array([fold_of[scene] for scene in patches.scene.tolist()])
    accuracy = []
    for number in range(int(fold.max()) + 1):
        held = held_in == number
        torch.manual_seed(seed)
        network = _network()
        _fit(network, patches.values[~held], patches.pasted[~held])
        network.eval()
        with torch.no_grad():
            score = network(torch.from_numpy(patches.values[held])[:, None])[:, 0]
        right = (score > 0).numpy() == patches.pasted[held]
        # pasted and natural count alike, though a scene may have more of one
        accuracy.append(np.mean([right[patches.pasted[held] == x].mean() for x in (True, False)]))
    return Result(
        accuracy=float(np.mean(accuracy)),
        spread=float(np.std(accuracy)),
        folds=len(accuracy),
        patches=len(patches.scene),
    )


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))


def _fit(network: nn.Module, values: np.ndarray, pasted: np.ndarray) -> None:
    inputs, targets = torch.from_numpy(values)[:, None], torch.from_numpy(pasted).float()
    steps = EPOCHS * (len(values) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 1))
    network.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs)).split(128)[: len(inputs) // 128]:
            flips = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
            batch = inputs[chosen].flip(flips)
            loss = F.binary_cross_entropy_with_logits(network(batch)[:, 0], targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def patch_sheet(patches: Patches, rows: int = 8, columns: int = 12, scale: int = 2) -> Image.Image:
    """Pasted borders on the left, natural ones on the right."""
    halves = []
    for label in (True, False):
        chosen: Sequence[np.ndarray] = patches.values[patches.pasted == label][
            :: max(1, int((patches.pasted == label).sum()) // (rows * columns))
        ][: rows * columns]
        tiles = [np.pad(patch, 1, constant_values=-3) for patch in chosen]
        tiles += [np.full((34, 34), -3.0)] * (rows * columns - len(tiles))
        grid = np.stack(tiles).reshape(rows, columns, 34, 34).transpose(0, 2, 1, 3)
        halves.append(np.pad(grid.reshape(rows * 34, columns * 34), 4, constant_values=-3))
    grey = np.clip((np.concatenate(halves, axis=1) + 2.5) / 5 * 255, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).resize((grey.shape[1] * scale, grey.shape[0] * scale))
