"""The tab that shows what training would see: a frame, its pastes, and how flat their truth is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
from jaxtyping import Float32
from PIL import Image

from flatdepth.app.events import listen
from flatdepth.app.form import KNOBS, as_yaml, make_controls, paste_config
from flatdepth.app.networks import Networks
from flatdepth.config import (
    MAX_DEPTH_M,
    SEED,
    DataConfig,
    ModelConfig,
    PhotometricConfig,
    SetConfig,
    TrainConfig,
)
from flatdepth.data.demo import ensure_demo
from flatdepth.data.frames import Corpus, Pictures, Subset, open_corpus
from flatdepth.data.loader import Frames, training_sample
from flatdepth.data.readers.arrays import read_depth_array
from flatdepth.data.readers.files import same_proportions
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.predict.inputs import open_photo
from flatdepth.predict.outputs import Camera
from flatdepth.predict.predictor import PredictOptions, choose_camera
from flatdepth.predict.teacher import metres_of
from flatdepth.report.preview import COLUMN_NAMES, RESIDUAL_LIMIT, Row, row_of, see
from flatdepth.types import Frame

DROPPED = "the dropped picture"
"""In place of the name of a set."""
SIZES = {
    f"{height} × {width}": (height, width)
    for height, width in ((168, 224), (252, 336), (392, 518), (518, 518))
}
"""Rows and columns of the network's input that are offered."""
_MOST_PX = 2000
"""Longer side at which a picture without depth is taken, at most."""
_SEEDS = 2**31 - 1
"""A page's numbers are exact that far."""


@dataclass(frozen=True, slots=True)
class One:
    """A single frame; used as a ``Subset`` is."""

    only: Frame

    def __len__(self) -> int:
        return 1

    def frame(self, place: int) -> Frame:
        del place
        return self.only

    def identity(self, place: int) -> int:
        return place


class Workshop:
    """The shard sets that are offered, and what training makes of their frames."""

    def __init__(self, sets: Sequence[str], art: Sequence[str]) -> None:
        """
        Args:
            sets: shard sets; those of pictures are hung.
            art: sets of pictures that are hung if there are none among ``sets``.

        Raises:
            UserError: one cannot be opened.
        """
        opened = {path: _open(path) for path in sets}
        given = [path for path, shards in opened.items() if shards.index.kind == "art"]
        self.art = given or list(art)
        self.sets = [path for path in opened if path not in given]
        self._corpus = lru_cache(None)(self._open_corpus)

    def _open_corpus(self, name: str) -> Corpus:
        """What a training on a set has; all of it where nothing can be held out."""
        pictures = Pictures([_open(path) for path in self.art])
        corpus = Corpus(
            train=(), weights=(), locality=(), streams=(), val=(), pictures=pictures, digests={}
        )
        if name == DROPPED:
            return corpus
        if name not in self.sets:
            raise UserError(f"there is no shard set {name!r}; choose one that is offered")
        try:
            return open_corpus(DataConfig(train=[SetConfig(path=name)], art=self.art))
        except UserError:
            shards = _open(name)
            whole = Subset(shards=shards, rows=np.arange(len(shards)), first_identity=0)
            return replace(corpus, train=(whole,))

    def frames(self, name: str, dropped: Frame | None) -> Frames:
        """The training frames of a set, or the dropped one. Raises UserError if there is none."""
        if name != DROPPED:
            return self._corpus(name).train[0]
        if dropped is None:
            raise UserError("drop a picture first, or choose a shard set")
        return One(dropped)

    def config(self, name: str, *, size: str, max_depth_m: float, **others: Any) -> TrainConfig:
        """A training on a set that is like the defaults but for what was chosen.

        Args:
            size: one of ``SIZES``.
            max_depth_m: up to which truth is valid, in metres.
            others: fields of ``TrainConfig``.
        """
        height, width = SIZES.get(size) or SIZES[next(iter(SIZES))]
        train = [] if name == DROPPED else [SetConfig(path=name)]
        return TrainConfig(
            data=DataConfig(train=train, art=list(self.art), height=height, width=width),
            model=ModelConfig(max_depth_m=max_depth_m),
            **others,
        )

    def row(self, name: str, dropped: Frame | None, place: int, config: TrainConfig) -> Row:
        """A frame as the first epoch of a training shows it; the last one if there is none."""
        frames = self.frames(name, dropped)
        place = min(place, len(frames) - 1)
        sample = training_sample(self._corpus(name), config, frames, place, 0, 0)
        return row_of(see([sample], config, 0), 0)


def _open(path: str) -> ShardSet:
    ensure_demo(path)
    return ShardSet.open(path)


def read_frame(
    image: Path,
    depth: Path | None,
    *,
    scale_m: float,
    fov_deg: float | None,
    networks: Networks,
    name: str | None,
) -> Frame:
    """A dropped picture with its depth.

    Args:
        depth: a file of its depth, to whose size the picture is reduced; None: it is predicted.
        scale_m: metres per unit of depth in integers; floats are metres. 0 and NaN are unknown.
        fov_deg: horizontal field of view in degrees; None: by EXIF, else the usual assumption.
        networks, name: that predict; relative depth has made-up metres.

    Raises:
        BadFrame, UserError: one of the files cannot be used, or there is no depth to be had.
    """
    photo = open_photo(image)
    options = PredictOptions(fov_deg=fov_deg, unusual_camera=True)
    if depth is not None:
        depth_m = _metres(read_depth_array(str(depth), "depth"), scale_m)
        height, width = depth_m.shape
        rows, columns = photo.image.shape[:2]
        if not same_proportions(rows, columns, height, width):
            raise UserError(
                f"the picture has {columns} × {rows} pixels and the depth {width} × {height}; "
                "give a depth of the picture's proportions"
            )
        picture = Image.fromarray(photo.image)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        focal_px = photo.focal_px and photo.focal_px * width / columns
        camera = choose_camera(focal_px, height, width, options)
        pixels = np.array(picture)
    elif name is None:
        raise UserError("drop a file of its depth too, or name a network that predicts it")
    else:
        scale = min(1.0, _MOST_PX / max(photo.image.shape))
        if scale < 1:
            small = Image.fromarray(photo.image)
            small.thumbnail((_MOST_PX, _MOST_PX), Image.Resampling.LANCZOS)
            focal_px = photo.focal_px and photo.focal_px * scale
            photo = replace(photo, image=np.asarray(small), focal_px=focal_px)
        system, found = networks.predict(name, photo, 0, fov_deg)
        if found.kind == "affine":
            raise UserError(
                f"{name} predicts depth up to scale and shift, in which planes are not flat; take "
                "metric or relative weights"
            )
        assert system.network is not None
        pixels, camera = found.image, cast(Camera, found.camera)
        depth_m = metres_of(found.field, found.kind, system.network.reach_m(camera.focal_px))
    return Frame(
        image=pixels,
        depth_m=depth_m,
        K_px=camera.K_px,
        key=image.stem,
        dataset="dropped",
        scene=image.stem,
    )


def _metres(values: np.ndarray, scale_m: float) -> Float32[np.ndarray, "h w"]:
    metres = values.astype(np.float64) * (1.0 if values.dtype.kind == "f" else scale_m)
    metres[~(metres > 0)] = np.nan
    if not np.isfinite(metres).any():
        raise UserError("no value of the depth is above 0; is it the right file?")
    return metres.astype(np.float32)


def about(row: Row) -> str:
    """What is seen in words, with the largest residual as a number."""
    heading = f"**{row.sample.frame.dataset} {row.sample.frame.key}**"
    if not row.sample.plan:
        return f"{heading} · clean: this seed pastes nothing here (`share`, or no place was found)"
    pastes = ", ".join(paste.describe() for paste in row.sample.plan)
    worst = row.worst()
    flat = (
        f"largest residual **{worst:.1e}** of 1/z"
        if math.isfinite(worst)
        else "no plane is seen (decoys are none)"
    )
    return f"{heading} · {pastes} · {flat}"


def tab(workshop: Workshop, networks: Networks, startup: list[Any]) -> None:
    """Lay the tab out. ``startup`` gets what is to be called when the page opens."""
    sets, dropped = workshop.sets, gr.State(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown([*sets, DROPPED], value=(sets or [DROPPED])[0], label="Frames of")
            most = len(workshop.frames(sets[0], None)) - 1 if sets else 0
            place = gr.Slider(0, max(most, 1), value=0, step=1, label="Frame", buttons=[])
            with gr.Row(elem_classes="tight"):
                back = gr.Button("◀", scale=0, min_width=48, elem_id="seed_back")
                seed = gr.Number(
                    0, label="Seed", precision=0, minimum=SEED[0], maximum=_SEEDS, min_width=90
                )
                forward = gr.Button("▶", scale=0, min_width=48, elem_id="seed_next")
            size = gr.Dropdown(
                list(SIZES), value=next(iter(SIZES)), label="Network's input, rows × columns, px"
            )
            far = gr.Number(
                ModelConfig().max_depth_m,
                label="Truth up to, m (model.max_depth_m)",
                minimum=MAX_DEPTH_M[0],
                maximum=MAX_DEPTH_M[1],
            )
            photometric = gr.Checkbox(True, label="Light, lens and JPEG too (photometric)")
            with gr.Accordion("Drop a picture of your own", open=False):
                picture = gr.File(label="Picture", height=110, elem_id="augment_picture")
                depth = gr.File(
                    label="Its depth: 16-bit PNG, .npy, .npz, PFM …; none: predicted",
                    height=110,
                    elem_id="augment_depth",
                )
                scale_m = gr.Number(0.001, label="Metres per unit of depth in integers", step=0.001)
                fov = gr.Number(0, label="Horizontal field of view, ° (0: by EXIF, else 60)")
                teacher = gr.Dropdown(networks.names, value=networks.names[0], label="Predicted by")
            gr.Markdown("### paste")
            controls = make_controls()
            reset = gr.Button("Back to the defaults", size="sm")
        with gr.Column(scale=5, min_width=300, elem_classes="pictures"):
            words = gr.Markdown(elem_id="augment_about")
            panels = []
            captions = (
                "image",
                "depth",
                "region: mirror blue, art orange, frame green, decoy pink",
                f"residual of 1/z from its plane: black 0, pale {RESIDUAL_LIMIT:g}, grey none",
            )
            assert len(captions) == len(COLUMN_NAMES)
            for pair in (captions[:2], captions[2:]):
                with gr.Row():
                    panels += [
                        gr.Image(
                            label=caption,
                            format="png",
                            interactive=False,
                            buttons=["download", "fullscreen"],
                            elem_classes=["panel", "captioned"],
                            min_width=260,
                        )
                        for caption in pair
                    ]
            text = gr.Code(
                language="yaml",
                label="For flatdepth train --config: what is not by default",
                interactive=False,
                elem_id="augment_yaml",
            )

    def show(
        dropped: Frame | None,
        chosen: str,
        place: float,
        seed: float | None,
        size: str,
        far: float | None,
        photometric: bool,
        *values: Any,
    ) -> list[Any]:
        light = PhotometricConfig() if photometric else PhotometricConfig(share=0.0)
        config = workshop.config(
            chosen,
            size=size,
            max_depth_m=ModelConfig().max_depth_m if far is None else far,
            seed=int(seed or 0),
            paste=paste_config(values),
            photometric=light,
        )
        row = workshop.row(chosen, dropped, int(place), config)
        low, high = row.limits_m
        caption = f"depth: {low:.2f} m red to {high:.2f} m violet, grey unknown"
        image, coloured, *rest = row.panels()
        return [about(row), image, gr.update(value=coloured, label=caption), *rest, as_yaml(config)]

    def take(
        picture: str | None, depth: str | None, scale_m: float, fov: float, teacher: str | None
    ) -> list[Any]:
        if picture is None:
            return [gr.skip(), gr.skip()]
        frame = read_frame(
            Path(picture),
            Path(depth) if depth else None,
            scale_m=scale_m,
            fov_deg=fov or None,
            networks=networks,
            name=teacher,
        )
        return [frame, DROPPED]

    def reach(chosen: str) -> Any:
        count = 1 if chosen == DROPPED else len(workshop.frames(chosen, None))
        return gr.update(maximum=max(count - 1, 1), value=0, interactive=count > 1)

    settings = [dropped, chosen, place, seed, size, far, photometric, *controls]
    changes = [one.change for one in settings[2:]] + [dropped.change, chosen.change]
    listen(changes, show, settings, [words, *panels, text])
    listen([chosen.input], reach, [chosen], [place])
    given = [picture, depth, scale_m, fov, teacher]
    taking = [picture.upload, depth.upload, depth.clear, scale_m.submit, fov.submit, teacher.input]
    listen(taking, take, given, [dropped, chosen])
    for button, by in ((back, -1), (forward, 1)):
        listen(
            [button.click],
            lambda seed, by=by: min(max(int(seed or 0) + by, 0), _SEEDS),
            [seed],
            [seed],
            lane="seed",
            show_progress="hidden",
        )
    listen([reset.click], lambda: [knob.default for knob in KNOBS], [], controls, lane="seed")
    startup.append((show, settings, [words, *panels, text]))
