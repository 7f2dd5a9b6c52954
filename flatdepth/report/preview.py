"""What training sees: the batches of an optimiser step, and how flat the truth on each paste is.

Nothing is remade here: the samples come from the training stream and the batch from training's own
function, on the CPU (a GPU's batch differs by rounding only). Pastes are functions of the seed, the
sample and the configuration, so the batch of any step of any run can be shown without a checkpoint.
"""

import io
import itertools
import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from flatdepth.augment.photometric import NEUTRAL
from flatdepth.augment.plan.layout import Paste
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, training_samples
from flatdepth.errors import UserError
from flatdepth.geometry import fit_plane, pixel_rays
from flatdepth.show.html import render_page
from flatdepth.show.pictures import (
    REGION_COLOURS,
    UNKNOWN_COLOUR,
    colour_depth,
    colour_region,
    contact_sheet,
    depth_limits,
)
from flatdepth.training.launch import share_out
from flatdepth.training.loop import make_training_batch
from flatdepth.types import Batch, Region

RESIDUAL_LIMIT = 1e-4
COLUMN_NAMES = ("image", "depth", "region", f"1/z off its plane, 0 to {RESIDUAL_LIMIT:g}")

_CPU = torch.device("cpu")
_LEAST_PANEL_PX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One micro-batch of training.

    Attributes:
        step: the optimiser step that it belongs to, from 0.
        samples: the B samples it was made of.
        batch: what the model is given, bit for bit.
        owner: (B, 1, H, W) int64, the number (in ``Sample.plan``) of the paste that each pixel
            shows; -1 on the background.
    """

    step: int
    samples: list[Sample]
    batch: Batch
    owner: Int64[Tensor, "b 1 h w"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training image with everything that is shown of it.

    Attributes:
        step: as in ``Seen``.
        sample: where the image comes from and what was planned.
        image: (H, W, 3) uint8 sRGB, the model's input rounded to 8 bits.
        depth_m: (H, W) planar z in metres, NaN where not valid.
        region: (H, W) values of ``Region``.
        owner: (H, W) as in ``Seen``.
        residual: (H, W) as ``plane_residual`` gives it.
    """

    step: int
    sample: Sample
    image: UInt8[np.ndarray, "h w 3"]
    depth_m: Float32[np.ndarray, "h w"]
    region: UInt8[np.ndarray, "h w"]
    owner: Int64[np.ndarray, "h w"]
    residual: Float64[np.ndarray, "h w"]

    @property
    def limits_m(self) -> tuple[float, float]:
        """The depths at the two ends of the depth panel's colours."""
        return depth_limits(self.depth_m, np.isfinite(self.depth_m))

    def panels(self) -> list[UInt8[np.ndarray, "h w 3"]]:
        """The pictures of ``COLUMN_NAMES``."""
        low, high = self.limits_m
        return [
            self.image,
            colour_depth(self.depth_m, low_m=low, high_m=high),
            colour_region(self.image, self.region),
            colour_residual(self.residual, RESIDUAL_LIMIT),
        ]

    def worst(self, number: int | None = None) -> float:
        """Largest residual of one paste or of all; NaN if none of its pixels is valid."""
        of_paste = self.owner >= 0 if number is None else self.owner == number
        values = np.abs(self.residual[of_paste & np.isfinite(self.residual)])
        return float(values.max()) if values.size else math.nan

    def title(self) -> str:
        """Data set, key, the pastes and the largest residual."""
        name = f"{self.sample.frame.dataset} {self.sample.frame.key}"
        if not self.sample.plan:
            return f"{name}\nclean"
        kinds = ", ".join(paste.describe() for paste in self.sample.plan)
        return f"{name}\n{kinds}\n{_residual(self.worst())}"


def seen_batches(config: TrainConfig, step: int) -> Generator[Seen, None, None]:
    """The micro-batches that a run sees from an optimiser step on, without end.

    They are those of a run on one device; on more devices the same samples are shared out.

    Raises:
        UserError: the data do not fit the configuration, or the run has no such step.
    """
    if not 0 <= step < config.steps:
        raise UserError(
            f"--step: expected 0 to {config.steps - 1} (steps: {config.steps}, counted from 0), "
            f"got {step}"
        )
    if step and config.data.loader == "webdataset":
        raise UserError(
            "--step: a WebDataset stream cannot be entered in the middle, so only step 0 can be "
            f"shown again, not {step}"
        )
    config, accumulation = share_out(config, ranks=1)
    stream = training_samples(
        open_corpus(config.data),
        config,
        first_step=step,
        rank=0,
        ranks=1,
        accumulation=accumulation,
    )
    with closing(stream):
        for number, samples in enumerate(stream):
            yield see(samples, config, step + number // accumulation)


def see(samples: list[Sample], config: TrainConfig, step: int) -> Seen:
    """Samples as one micro-batch of training."""
    batch = make_training_batch(samples, config, _CPU)
    return Seen(
        step=step,
        samples=samples,
        batch=batch,
        owner=paste_owner(samples, config, batch.region),
    )


def paste_owner(
    samples: list[Sample], config: TrainConfig, shown: UInt8[Tensor, "b 1 h w"]
) -> Int64[Tensor, "b 1 h w"]:
    """Which paste each pixel of the batch shows, -1 for none.

    A batch with only the k-th paste of every sample shows which pixels that paste covers; of those
    that cover a pixel the last one is on top, but through an empty frame one sees the one behind.
    ``shown`` is the region map of the whole batch.
    """
    height, width = config.data.height, config.data.width
    owner = torch.full((len(samples), 1, height, width), -1)
    for number in range(max(len(sample.plan) for sample in samples)):
        one = slice(number, number + 1)
        alone = [
            replace(
                sample,
                frame=replace(sample.frame, region=None),
                plan=sample.plan[one],
                contents=sample.contents[one],
            )
            for sample in samples
        ]
        region = make_training_batch(alone, config, _CPU).region
        through = (region == Region.DECOY) & (shown != Region.DECOY)
        owner[(region != Region.BACKGROUND) & ~through] = number
    return owner


def preview_rows(config: TrainConfig, step: int, count: int | None) -> list[Row]:
    """The first ``count`` images from a step on; None: those of that step.

    Raises:
        UserError: as ``seen_batches``, or ``count`` is below 1.
    """
    if count is not None and count < 1:
        raise UserError(f"--rows: expected at least 1, got {count}")
    with closing(seen_batches(config, step)) as batches:
        rows = (row_of(seen, position) for seen in batches for position in range(len(seen.samples)))
        return list(itertools.islice(rows, config.batch if count is None else count))


def row_of(seen: Seen, position: int) -> Row:
    """One image of a micro-batch."""
    batch = seen.batch
    image = (batch.image[position].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    depth_m, valid = batch.depth_m[position, 0].numpy(), batch.valid[position, 0].numpy()
    owner = seen.owner[position, 0].numpy()
    region = batch.region[position, 0].numpy()
    sample = seen.samples[position]
    bent = region == Region.DECOY
    if sample.mirror_target == "virtual":
        bent |= region == Region.MIRROR
    return Row(
        step=seen.step,
        sample=sample,
        image=image,
        depth_m=np.where(valid, depth_m, np.float32(np.nan)),
        region=region,
        owner=owner,
        residual=plane_residual(
            depth_m, valid, np.where(bent, -1, owner), batch.K_px[position].numpy()
        ),
    )


def plane_residual(
    depth_m: Float32[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    owner: Int64[np.ndarray, "h w"],
    K_px: Float64[np.ndarray, "3 3"],
) -> Float64[np.ndarray, "h w"]:
    """How far each paste's truth is from flat: ``(1/z) / (m . ray) - 1``, NaN elsewhere.

    ``m`` is the plane that fits the valid pixels of that paste best, by least squares in inverse
    depth and in float64; a plane leaves nothing but the rounding of ``depth_m``.
    """
    height, width = depth_m.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    rays = pixel_rays(K_px, u, v)
    residual = np.full(depth_m.shape, np.nan)
    for number in range(int(owner.max()) + 1):
        of_paste = valid & (owner == number)
        inverse = 1 / depth_m[of_paste].astype(np.float64)
        residual[of_paste] = inverse / (rays[of_paste] @ fit_plane(rays[of_paste], inverse)) - 1
    return residual


def colour_residual(
    residual: Float64[np.ndarray, "h w"], limit: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Colour residuals by size: black is 0, pale is ``limit`` or more, mid-grey is NaN."""
    share = np.clip(np.abs(np.nan_to_num(residual)) / limit, 0, 1)
    colours = matplotlib.colormaps["magma"](share, bytes=True)[..., :3]
    return np.where(np.isnan(residual)[..., None], np.array(UNKNOWN_COLOUR, np.uint8), colours)


def preview_sheet(rows: Sequence[Row], config: TrainConfig) -> Image.Image:
    """The rows as a contact sheet; panels are a whole multiple of the input's size."""
    width = config.data.width
    return contact_sheet(
        [row.panels() for row in rows],
        list(COLUMN_NAMES),
        [row.title() for row in rows],
        title=preview_title(rows, config),
        limits_m=[row.limits_m for row in rows],
        panel_width=width * math.ceil(_LEAST_PANEL_PX / width),
    )


def preview_title(rows: Sequence[Row], config: TrainConfig) -> str:
    """Run, steps and seed, and a word if there are no pastes yet."""
    first, last = rows[0].step, rows[-1].step
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    note = " (no pastes at this step)" if config.paste.at(first).share == 0 else ""
    return f"{config.name}: {steps}, seed {config.seed}{note}"


def preview_page(rows: Sequence[Row], config: TrainConfig) -> str:
    """The rows as one HTML page with a card per image, its panels and its pastes' parameters.

    The page holds everything it shows, has no script, and forbids the browser to load anything.
    """
    return render_page(
        "preview.html",
        title=preview_title(rows, config),
        limit=f"{RESIDUAL_LIMIT:g}",
        regions=[(r.name.lower(), _css(np.array(c) / 255)) for r, c in REGION_COLOURS.items()],
        columns=_PASTE_COLUMNS,
        cards=[
            {
                "frame": f"{row.sample.frame.dataset} {row.sample.frame.key}",
                "origin": _origin(row),
                "panels": [
                    (name, _webp(panel), panel.shape[:2])
                    for name, panel in zip(_captions(row), row.panels(), strict=True)
                ],
                "pastes": [_paste_row(row, number) for number in range(len(row.sample.plan))],
            }
            for row in rows
        ],
    )


def _captions(row: Row) -> list[str]:
    low, high = row.limits_m
    image, depth, region, residual = COLUMN_NAMES
    return [image, f"{depth}, {low:.2f} m (red) to {high:.2f} m (violet)", region, residual]


def _origin(row: Row) -> str:
    """Where the image was cut from its frame, and what the photometric stage did to it."""
    sample, view = row.sample, row.sample.view
    crop = f"{view.crop_width} × {view.crop_height} px at ({view.left}, {view.top})"
    factors = dict(zip(NEUTRAL, sample.photometric.tolist(), strict=True))
    changes = [
        f"{name} {value:.3g}"
        for name, value in factors.items()
        if value != NEUTRAL[name] and name != "noise seed"
    ]
    flipped = ", flipped" if view.flip else ""
    photometric = ", ".join(changes) or "colours unchanged"
    return f"step {row.step}, scene {sample.frame.scene}, crop {crop}{flipped}; {photometric}"


def _paste_row(row: Row, number: int) -> tuple[str, str, list[str], str, str]:
    """Name, colour of the region, ``_PASTE_COLUMNS``, colour of the frame ("": none), residual."""
    paste = row.sample.plan[number]
    rectangle = paste.rectangle
    shows = "another frame"
    if paste.portion is not None:
        left, top, right, bottom = paste.portion
        shows = f"image {right:.0f} to {left:.0f}, {top:.0f} to {bottom:.0f} px"
    elif paste.picture >= 0:
        shows = f"picture {paste.picture}"
    cells = [
        f"{rectangle.width:.2f} × {rectangle.height:.2f} m",
        f"{rectangle.centre[2]:.2f} m",
        f"{_tilt_deg(paste):.0f}°",
        f"{np.mean(row.owner == number):.1%}",
        shows,
        f"{paste.picture_px[0]} × {paste.picture_px[1]} px",
        f"{paste.look.light:.2f}",
    ]
    colour = _css(np.array(REGION_COLOURS[paste.kind.region]) / 255)
    frame = _css(paste.look.frame_colour) if paste.look.frame_m > 0 else ""
    return paste.describe(), colour, cells, frame, _residual(row.worst(number))


_PASTE_COLUMNS = (
    "paste",
    "size",
    "distance",
    "tilt",
    "seen area",
    "shows",
    "texels",
    "light",
    "frame",
    "residual",
)


def _tilt_deg(paste: Paste) -> float:
    """Angle between the paste's normal and the ray to its centre, in degrees."""
    m, ray = paste.rectangle.plane, paste.rectangle.centre
    cosine = m @ ray / (np.linalg.norm(m) * np.linalg.norm(ray))
    return math.degrees(math.acos(min(1.0, float(cosine))))


def _residual(worst: float) -> str:
    return f"max {worst:.1e}" if math.isfinite(worst) else "no plane seen"


def _css(colour: Sequence[float] | Float64[np.ndarray, " 3"]) -> str:
    """An sRGB colour 0..1 for a style."""
    red, green, blue = (round(255 * float(value)) for value in colour)
    return f"rgb({red}, {green}, {blue})"


def _webp(panel: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The panel without loss."""
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "WEBP", lossless=True, method=3)
    return buffer.getvalue()
