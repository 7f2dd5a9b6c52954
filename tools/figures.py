"""Draw the figures of docs/augmentation.md: one per option of the paste and photometric stages.

python tools/figures.py --data shards/redwood --dark shards/kinect --art shards/my_art --out DIR
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from flatdepth.augment.draw.composite import paste
from flatdepth.augment.draw.stylise import Style, stylise
from flatdepth.augment.photometric import NEUTRAL, photometric
from flatdepth.augment.plan.appearance import Kind
from flatdepth.augment.rng import Draws
from flatdepth.cli import run_command
from flatdepth.config import (
    ContentShares,
    DataConfig,
    LayoutShares,
    PasteConfig,
    PasteStage,
    SetConfig,
    ShapeShares,
)
from flatdepth.data.frames import Corpus, open_corpus
from flatdepth.data.loader import Sample, central_view, pasted_sample, to_device
from flatdepth.errors import UserError
from flatdepth.show.pictures import colour_depth, colour_region, contact_sheet, depth_limits
from flatdepth.types import Batch

RANGE_M = (0.1, 20.0)
SIZE = DataConfig(height=392, width=518)
ONE = PasteConfig(
    share=1.0,
    max_pastes=1,
    area=(0.12, 0.2),
    layout=LayoutShares(hung=1.0, standing=0.0),
    content=ContentShares(mirror=0, mural=0, screen=0, opening=0, empty=0),
    shape=ShapeShares(rounded=0, ellipse=0, arch=0, polygon=0),
    framed=1.0,
    stylised=0.0,
    glass=0.0,
)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="shard set of bright frames with walls")
    parser.add_argument("--dark", required=True, help="shard set of darker, noisier ones")
    parser.add_argument("--art", required=True, help="shard set of pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder; figures are replaced")
    parser.add_argument("--only", choices=sorted(FIGURES), help="one figure")
    chosen = parser.parse_args(sys.argv[1:])
    corpus = open_corpus(
        DataConfig(
            train=[SetConfig(path=chosen.data)],
            val=[chosen.dark],
            art=[chosen.art],
        )
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        if chosen.only in (None, name):
            path = chosen.out / f"{name}.webp"
            draw(corpus).save(path, quality=84, method=6)
            print(path)


def pasted(
    corpus: Corpus,
    config: PasteConfig,
    kind: Kind | None = None,
    layout: str | None = None,
    *,
    dark: bool = False,
) -> Iterator[tuple[Sample, Batch]]:
    """Frames with pastes of a kind and layout, those that have one, from the first draw on."""
    (subset,) = corpus.val if dark else corpus.train
    for number in range(40 * len(subset)):
        place = number % len(subset)
        frame = subset.frame(place)
        sample = pasted_sample(
            subset,
            place,
            central_view(frame.depth_m.shape, SIZE),
            Draws(0, number, place),
            config,
            frame=frame,
            pictures=corpus.pictures,
            depth_range_m=RANGE_M,
        )
        if sample.plan and all(
            (kind is None or one.kind is kind) and (layout is None or one.layout == layout)
            for one in sample.plan
        ):
            clean, groups, _ = to_device([sample], torch.device("cpu"), depth_range_m=RANGE_M)
            yield sample, paste(clean, groups, depth_range_m=RANGE_M)
    raise UserError(f"no wall of these frames took a {layout or ''} {kind or 'paste'}")


def pixels(image: torch.Tensor) -> np.ndarray:
    return (image.movedim(0, -1) * 255).round().to(torch.uint8).numpy()


def depth_picture(batch: Batch) -> np.ndarray:
    valid = batch.valid[0, 0].numpy()
    depth = np.where(valid, batch.depth_m[0, 0].numpy(), np.float32(np.nan))
    low, high = depth_limits(depth, valid)
    return colour_depth(depth, low_m=low, high_m=high)


def sheet(rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], title: str) -> Image.Image:
    names = ["image", "depth"] if len(rows) == 2 else [""] * len(rows)
    whole = contact_sheet(rows, columns, names, title=title, regions=False)
    return whole if len(rows) == 2 else whole.crop((170, 0, whole.width, whole.height))


def over_depth(columns: dict[str, Batch], title: str) -> Image.Image:
    """A row of images over a row of their depths."""
    images = [pixels(batch.image[0]) for batch in columns.values()]
    return sheet([images, [depth_picture(b) for b in columns.values()]], list(columns), title)


def layouts(corpus: Corpus) -> Image.Image:
    """Hung, standing and legacy."""
    rows, names = [], []
    for layout in ("hung", "standing", "legacy"):
        shares = {"hung": 0.0, "standing": 0.0, "legacy": 0.0, layout: 1.0}
        config = replace(ONE, layout=LayoutShares(**shares))
        sample, batch = next(pasted(corpus, config, layout=layout))
        image = pixels(batch.image[0])
        region = colour_region(image, batch.region[0, 0].numpy())
        rows.append([image, depth_picture(batch), region])
        names.append(sample.plan[0].describe())
    return contact_sheet(rows, ["image", "depth", "region"], names, title="paste.layout")


def contents(corpus: Corpus) -> Image.Image:
    """Mirror, art, mural, screen."""
    return over_depth(
        {
            kind.value: one_of(corpus, kind, replace(ONE, stylised=0.0))
            for kind in (Kind.MIRROR, Kind.ART, Kind.MURAL, Kind.SCREEN)
        },
        "paste.content: things that are flat",
    )


def mirror_targets(corpus: Corpus) -> Image.Image:
    """One mirror with each truth."""
    targets: tuple[Literal["surface", "ignore", "virtual"], ...] = ("surface", "ignore", "virtual")
    return over_depth(
        {
            target: one_of(corpus, Kind.MIRROR, replace(ONE, mirror_target=target))
            for target in targets
        },
        "paste.mirror_target",
    )


def decoys(corpus: Corpus) -> Image.Image:
    """Openings and empty frames."""
    return over_depth(
        {
            "opening": one_of(corpus, Kind.OPENING, ONE),
            "empty frame": one_of(corpus, Kind.EMPTY, ONE),
            "a picture": one_of(corpus, Kind.ART, ONE),
        },
        "paste.content: decoys, beside a picture",
    )


def only(kind: Kind) -> ContentShares:
    return ContentShares(**{**dict.fromkeys((k.value for k in Kind), 0.0), kind.value: 1.0})


def one_of(corpus: Corpus, kind: Kind, config: PasteConfig, *, dark: bool = False) -> Batch:
    config = replace(config, content=only(kind))
    for sample, batch in pasted(corpus, config, kind=kind, layout="hung", dark=dark):
        if kind is not Kind.OPENING or sample.contents[0].opening is not None:
            return batch
    raise AssertionError("pasted() ends with an error")


def shapes(corpus: Corpus) -> Image.Image:
    """Outlines."""
    names = ("rectangle", "rounded", "ellipse", "arch", "polygon")
    columns = {}
    for name in names:
        shares = dict.fromkeys(names, 0.0)
        config = replace(ONE, shape=ShapeShares(**{**shares, name: 1.0}))
        columns[name] = one_of(corpus, Kind.MIRROR, config)
    return over_depth(columns, "paste.shape")


def frames(corpus: Corpus) -> Image.Image:
    """No frame, frames, mats."""
    plain = [
        one_of(corpus, Kind.ART, replace(ONE, framed=0.0)),
        *(batch for _, batch in take(pasted(corpus, replace(ONE, mat=0.0), layout="hung"), 3)),
        *(batch for _, batch in take(pasted(corpus, replace(ONE, mat=1.0), layout="hung"), 2)),
    ]
    names = ["framed 0", "framed 1", "", "", "mat 1", ""]
    return sheet([[pixels(batch.image[0]) for batch in plain]], names, "paste.framed, paste.mat")


def take(found: Iterator[tuple[Sample, Batch]], count: int) -> list[tuple[Sample, Batch]]:
    """Every second one, for variety."""
    return [one for _, one in zip(range(2 * count), found, strict=False)][::2]


def realism(corpus: Corpus) -> Image.Image:
    """Each option off and on, around the paste, enlarged."""
    rows, names = [], []
    options: tuple[tuple[str, Kind], ...] = (
        ("match_light", Kind.ART),
        ("match_sensor", Kind.ART),
        ("shadow", Kind.ART),
        ("glass", Kind.ART),
        ("worn", Kind.MIRROR),
    )
    for name, kind in options:
        content = only(kind)
        both = []
        for value in (0.0, 1.0):
            changes: dict[str, Any] = {name: value}
            config = replace(ONE, area=(0.05, 0.09), content=content, **changes)
            both.append(pasted(corpus, config, layout="hung", dark=name.startswith("match")))
        for pair in zip(*both, strict=False):
            look = pair[1][0].plan[0].look
            shows = {"glass": look.glare[0] > 0.2, "worn": look.dust + look.blur_px > 1.2}
            if shows.get(name, True):
                break
        panels = []
        for _, batch in pair:
            inside = torch.nonzero(batch.region[0, 0] != 0)
            (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
            image = pixels(batch.image[0])
            margin = 24
            panels.append(
                image[
                    max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin
                ]
            )
        rows.append(panels)
        names.append(f"paste.{name}")
    return contact_sheet(rows, ["0", "1"], names, title="Light, sensor, wear", regions=False)


def styles(corpus: Corpus) -> Image.Image:
    """Stylised contents."""
    picture = corpus.train[0].frame(0).image
    source = torch.from_numpy(picture.copy()).movedim(-1, 0)[None].float() / 255
    panels = [pixels(stylise(source, style)[0]) for style in Style]
    return sheet([panels], [style.name.lower() for style in Style], "paste.stylised")


def curriculum(corpus: Corpus) -> Image.Image:
    """The same draws at three stages."""
    config = replace(
        ONE,
        layout=LayoutShares(),
        content=ContentShares(),
        stages=[
            PasteStage(step=0, area=(0.2, 0.4), max_pastes=1),
            PasteStage(step=1000, area=(0.08, 0.3), max_pastes=2, max_area=0.4),
            PasteStage(step=3000, area=(0.02, 0.15), max_pastes=4, max_area=0.5),
        ],
    )
    rows = [
        [pixels(batch.image[0]) for _, batch in take(pasted(corpus, config.at(step)), 4)]
        for step in (0, 1000, 3000)
    ]
    names = ["from step 0", "from step 1000", "from step 3000"]
    return contact_sheet(rows, [""] * 4, names, title="paste.stages", regions=False)


def photometrics(corpus: Corpus) -> Image.Image:
    """Each photometric effect alone, at a strength that shows."""
    _, batch = next(pasted(corpus, ONE, layout="hung"))
    effects: dict[str, dict[str, float]] = {
        "none": {},
        "brightness 0.8": {"brightness": 0.8},
        "contrast 1.2": {"contrast": 1.2},
        "saturation 0.8": {"saturation": 0.8},
        "hue 10 degrees": {"hue": 10.0},
        "gamma 1.2": {"gamma": 1.2},
        "blur 1 px": {"blur": 1.0},
        "noise 0.02 + 0.02": {"noise": 0.02, "shot": 0.02},
        "JPEG quality 40": {"jpeg": 40.0},
        "all": {"brightness": 0.9, "hue": -8.0, "blur": 0.6, "noise": 0.01, "jpeg": 60.0},
    }
    panels = []
    for changes in effects.values():
        factors = torch.tensor([list({**NEUTRAL, **changes}.values())], dtype=torch.float64)
        panels.append(pixels(photometric(batch.image, factors)[0])[:200, 250:510])
    names = list(effects)
    top, bottom = sheet([panels[:5]], names[:5], "photometric"), sheet([panels[5:]], names[5:], "")
    bottom = bottom.crop((0, 60, bottom.width, bottom.height))
    whole = Image.new("RGB", (top.width, top.height + bottom.height), "white")
    whole.paste(top, (0, 0))
    whole.paste(bottom, (0, top.height))
    return whole


def geometry(corpus: Corpus) -> Image.Image:  # noqa: ARG001  (every figure takes the corpus)
    """The camera, a pixel's ray, the wall's plane and the paste lifted off it, from above."""
    figure = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    m = np.array([0.14, 0.30])  # x and z part of the wall's plane in 1/m
    x = np.array([-2.2, 2.4])
    axes.plot(x, (1 - m[0] * x) / m[1], color="0.35", lw=2, label="wall  $m \\cdot X = 1$")
    lifted = m / 0.94
    board = np.array([-1.1, 0.7])
    axes.plot(
        board, (1 - lifted[0] * board) / lifted[1], color="tab:red", lw=4, label="paste, lifted"
    )
    for slope, colour in ((-0.28, "tab:blue"), (0.12, "tab:blue")):
        z = 1 / (lifted @ np.array([slope, 1.0]))
        axes.plot([0, slope * z], [0, z], color=colour, lw=1)
        axes.plot([slope * z], [z], "o", color=colour, ms=4)
    z = 1 / (lifted @ np.array([-0.28, 1.0]))
    axes.text(-2.9, 1.5, "$X = z\\,r(u,v)$\n$1/z = m \\cdot r$", color="tab:blue")
    axes.plot([0], [0], "k^", ms=10)
    axes.text(0.15, -0.08, "camera")
    axes.set(xlabel="x, metres", ylabel="z, metres", aspect="equal", ylim=(-0.4, 4.6))
    axes.set_xlim(-3.2, 4.6)
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


FIGURES: dict[str, Callable[[Corpus], Image.Image]] = {
    "geometry": geometry,
    "layouts": layouts,
    "contents": contents,
    "mirror_targets": mirror_targets,
    "decoys": decoys,
    "shapes": shapes,
    "frames": frames,
    "realism": realism,
    "styles": styles,
    "curriculum": curriculum,
    "photometric": photometrics,
}


if __name__ == "__main__":
    run_command(main)
