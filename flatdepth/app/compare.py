"""The tab that shows two checkpoints on one photograph: depth, a mesh to turn, flatness."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from PIL import Image, ImageDraw

from flatdepth.app.events import listen
from flatdepth.app.networks import Networks
from flatdepth.config import MOST_SIDE
from flatdepth.data.polygons import Outline
from flatdepth.errors import UserError
from flatdepth.geometry import fit_plane, pixel_rays
from flatdepth.judge.metrics import flatness_residual, plane_normal_angle_deg
from flatdepth.models.network import Kind
from flatdepth.predict.inputs import open_photo
from flatdepth.predict.outputs import Prediction, render
from flatdepth.predict.systems import RANGE_M, on_one_scale
from flatdepth.show.pictures import FLAT_COLOUR, colour_depth, depth_limits

MOST_PX = 1024
"""Longer side at which a photograph is shown, predicted and measured, at most."""
SIDES = ("before", "after")
_LEAST_PX = 16
"""Of a polygon, in pixels: fewer say nothing of a plane."""
_READ, _MARK = "reads the depth", "marks a corner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A photograph and what two networks say of it.

    Attributes:
        names: of the networks.
        predictions: with the camera.
        depths_m: on one scale, in metres if one of the networks predicts them.
        alignments: what was done to each, in words.
    """

    names: Sequence[str]
    predictions: Sequence[Prediction]
    depths_m: Sequence[Float32[np.ndarray, "h w"]]
    alignments: Sequence[str]

    @property
    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        return self.predictions[0].image

    @property
    def K_px(self) -> Float64[np.ndarray, "3 3"]:
        camera = self.predictions[0].camera
        assert camera is not None
        return camera.K_px

    @property
    def kinds(self) -> list[Kind]:
        return [one.kind for one in self.predictions]

    def coloured(self) -> tuple[list[UInt8[np.ndarray, "h w 3"]], tuple[float, float]]:
        """Both in the same colours, and the depths at their ends."""
        whole = np.concatenate(self.depths_m)
        low, high = depth_limits(whole, np.isfinite(whole))
        return [colour_depth(one, low_m=low, high_m=high) for one in self.depths_m], (low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flatness:
    """How flat a network sees what a polygon surrounds.

    Attributes:
        relief: RMS distance of 1/z from its best plane over its mean (``flatness_residual``).
        rms_mm, worst_mm: of z from that plane; None without metres, as are the angles.
        axis_deg: angle of the plane's normal to the optical axis.
        between_deg: angle to the plane of the first network.
    """

    relief: float
    rms_mm: float | None
    worst_mm: float | None
    axis_deg: float | None
    between_deg: float | None


def compare(
    networks: Networks, names: Sequence[str], image: Path, size: int, fov_deg: float | None
) -> Compared:
    """What networks say of a photograph; ``size`` and ``fov_deg`` as in ``Networks.predict``.

    Raises:
        BadFrame, UserError: the photograph or the weights cannot be used.
    """
    photo = open_photo(image)
    small = Image.fromarray(photo.image)
    small.thumbnail((MOST_PX, MOST_PX), Image.Resampling.LANCZOS)
    focal_px = photo.focal_px and photo.focal_px * small.width / photo.image.shape[1]
    photo = replace(photo, image=np.asarray(small), focal_px=focal_px)
    found = [networks.predict(name, photo, size, fov_deg) for name in names]
    common = on_one_scale([one.values for _, one in found], [system for system, _ in found])
    return Compared(
        names=list(names),
        predictions=[one for _, one in found],
        depths_m=common.depths_m,
        alignments=common.alignments,
    )


def flatness(compared: Compared, corners: Sequence[tuple[float, float]]) -> list[Flatness]:
    """Of both networks, in the polygon of these corners (u, v) in pixels.

    Raises:
        UserError: it surrounds next to nothing.
    """
    outline = Outline(label="polygon", parts=(np.array(corners, np.float64).reshape(-1, 2),))
    inside = outline.inside(*compared.image.shape[:2])
    if len(corners) < 3 or inside.sum() < _LEAST_PX:
        raise UserError(f"mark at least 3 corners around {_LEAST_PX} pixels or more")
    v, u = (places + 0.5 for places in np.nonzero(inside))
    rays = pixel_rays(compared.K_px, u, v)
    K_px, mask = torch.from_numpy(compared.K_px)[None], torch.from_numpy(inside)[None, None]
    maps = [torch.from_numpy(one)[None, None] for one in compared.depths_m]
    low, high = RANGE_M
    result = []
    for kind, depth_m, one in zip(compared.kinds, compared.depths_m, maps, strict=True):
        relief = flatness_residual(one, K_px, mask, min_m=low, max_m=high).item()
        z = depth_m[inside].astype(np.float64).clip(low, high)
        m = fit_plane(rays, 1 / z)
        off_mm = 1000 * np.abs(z - 1 / np.maximum(rays @ m, 1 / high))
        between = plane_normal_angle_deg(
            one, maps[0].clamp(low, high), K_px, mask, min_m=low, max_m=high
        ).item()
        metres = kind == "metric"
        both = metres and compared.kinds[0] == "metric"
        axis = float(np.degrees(np.arctan2(np.hypot(m[0], m[1]), abs(m[2]))))
        result.append(
            Flatness(
                relief=relief,
                rms_mm=float(np.sqrt(np.mean(off_mm**2))) if metres else None,
                worst_mm=float(off_mm.max()) if metres else None,
                axis_deg=axis if metres else None,
                between_deg=between if both else None,
            )
        )
    return result


def depth_at(compared: Compared, u: int, v: int) -> str:
    """The depth that both see at a pixel (column, row), in words."""
    unit = " m" if "metric" in compared.kinds else " (no unit)"
    values = [
        f"{name} **{depth_m[v, u]:.3f}{unit}**"
        for name, depth_m in zip(SIDES, compared.depths_m, strict=True)
    ]
    return f"At ({u}, {v}) px: {', '.join(values)}"


def mesh(compared: Compared, which: int) -> bytes:
    """A prediction as glTF. Raises UserError if it is not in metres."""
    if compared.kinds[which] != "metric":
        raise UserError(
            f"{compared.names[which]} does not predict metres, and relative depth bends every "
            "surface; take metric weights for meshes"
        )
    prediction = compared.predictions[which]
    files = render(prediction, ("glb",), png_unit="mm", prune=0.05, about={})
    return next(data for suffix, data in files.items() if suffix.endswith(".glb"))


def drawn(compared: Compared, corners: Sequence[tuple[float, float]]) -> UInt8[np.ndarray, "h w 3"]:
    """The photograph with the polygon."""
    picture = Image.fromarray(compared.image)
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 300))
    if len(corners) > 1:
        draw.line([*corners, corners[0]] if len(corners) > 2 else list(corners), FLAT_COLOUR, width)
    for u, v in corners:
        draw.ellipse((u - width, v - width, u + width, v + width), fill=FLAT_COLOUR)
    return np.asarray(picture)


def _table(compared: Compared, corners: Sequence[tuple[float, float]]) -> str:
    """The flatness of both as Markdown."""
    if not corners:
        return ""
    if len(corners) < 3:
        return f"{len(corners)} of at least 3 corners"

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [
        "| inside the polygon | " + " | ".join(SIDES) + " |",
        "|---|--:|--:|",
    ]
    found = flatness(compared, corners)
    for label, name, form in (
        ("relief: RMS of 1/z from its plane", "relief", ".2%"),
        ("RMS distance of z from its plane, mm", "rms_mm", ",.1f"),
        ("largest distance of z from its plane, mm", "worst_mm", ",.1f"),
        ("plane to the camera's image plane, °", "axis_deg", ".1f"),
        ("plane to the plane of “before”, °", "between_deg", ".1f"),
    ):
        cells = " | ".join(shown(getattr(one, name), form) for one in found)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def _about(compared: Compared, limits: tuple[float, float]) -> str:
    unit = "m" if "metric" in compared.kinds else "(no unit)"
    camera = compared.predictions[0].camera
    aligned = "; ".join(
        f"{side}: {how}"
        for side, how in zip(SIDES, compared.alignments, strict=True)
        if not how.startswith("none")
    )
    colours = f"Colours: {limits[0]:.2f} {unit} red to {limits[1]:.2f} {unit} violet"
    return " · ".join(part for part in (colours, camera and camera.origin, aligned) if part)


def tab(networks: Networks) -> None:
    """Lay the tab out."""
    names = networks.names
    found, corners = gr.State(None), gr.State([])
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = gr.File(label="Photograph", height=130, elem_id="photograph")
            before = gr.Dropdown(names, value=names[0], label="Before")
            after = gr.Dropdown(names, value=names[-1], label="After")
            size = gr.Slider(
                *(0, min(1036, MOST_SIDE)),
                value=0,
                step=14,
                label="Shorter side of the network's input, px (0: its own)",
                buttons=[],
                elem_id="predict_size",
            )
            fov = gr.Number(0, label="Horizontal field of view, ° (0: by EXIF, else 60)")
            go = gr.Button("Predict", variant="primary", elem_id="predict")
        with gr.Column(scale=5, min_width=300):
            slider = gr.ImageSlider(
                label="Depth: before | after",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="depths",
                elem_classes="captioned",
            )
            words = gr.Markdown(elem_id="predict_about")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            click = gr.Radio([_READ, _MARK], value=_READ, label="A click on the photograph")
            picture = gr.Image(
                label="Photograph",
                format="png",
                interactive=False,
                buttons=[],
                elem_id="clicked",
                elem_classes="captioned",
            )
            with gr.Row(elem_classes="tight"):
                undo = gr.Button("Remove the last corner", size="sm", min_width=120)
                clear = gr.Button("Remove all corners", size="sm", min_width=120)
            reading = gr.Markdown("Click to read the depth.", elem_id="reading")
            table = gr.Markdown(elem_id="flatness")
        with gr.Column(scale=1, min_width=300):
            which = gr.Radio(list(SIDES), value="after", label="As a mesh, in metres")
            turn = gr.Button("Turn it", size="sm")
            model = gr.Model3D(
                label="Mesh: drag to turn, scroll to zoom",
                interactive=False,
                height=420,
                camera_position=(100, 80, None),
                elem_id="mesh",
            )

    def predict(
        photo: str | None, before: str | None, after: str | None, size: float, fov: float | None
    ) -> list[Any]:
        if photo is None:
            raise UserError("drop a photograph first")
        if before is None or after is None:
            raise UserError("choose two networks; give them with --checkpoint")
        now = compare(networks, (before, after), Path(photo), int(size), fov or None)
        colours, limits = now.coloured()
        return [now, tuple(colours), _about(now, limits), now.image, [], "", "", None]

    def clicked(
        now: Compared | None, mode: str, corners: list[Any], event: gr.SelectData
    ) -> list[Any]:
        if now is None:
            raise UserError("predict first")
        height, width = now.image.shape[:2]
        u, v = min(max(int(event.index[0]), 0), width - 1), min(int(event.index[1]), height - 1)
        if mode == _READ:
            return [depth_at(now, u, v), gr.skip(), gr.skip(), gr.skip()]
        return [gr.skip(), *marked(now, [*corners, (u + 0.5, v + 0.5)])]

    def marked(now: Compared | None, corners: list[Any]) -> list[Any]:
        if now is None:
            raise UserError("predict first")
        return [corners, drawn(now, corners), _table(now, corners)]

    def turned(now: Compared | None, which: str) -> Any:
        if now is None:
            raise UserError("predict first")
        folder = tempfile.mkdtemp(dir=model.GRADIO_CACHE)
        path = Path(folder, f"{which}.glb")
        path.write_bytes(mesh(now, SIDES.index(which)))
        return str(path)

    shown = [found, slider, words, picture, corners, reading, table, model]
    listen([go.click, photo.upload], predict, [photo, before, after, size, fov], shown)
    polygon = [corners, picture, table]
    listen([picture.select], clicked, [found, click, corners], [reading, *polygon])
    listen([undo.click], lambda now, old: marked(now, old[:-1]), [found, corners], polygon)
    listen([clear.click], lambda now: marked(now, []), [found], polygon)
    listen([turn.click], turned, [found, which], [model])
