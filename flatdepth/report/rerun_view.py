"""Predictions in the Rerun viewer: pictures before their cameras, their depth turned as points.

Everything is below ``camera``: ``image``, ``truth`` and ``region`` where they are known, and one
map per network. Metric depth is in metres and becomes points in the viewer; of other networks it
shows colours. Coordinates are those of ``flatdepth.types``, x right, y down, z forward.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8

from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import validation_sample
from flatdepth.predict.inputs import Input, Photo, open_photo
from flatdepth.predict.outputs import Prediction, colour_field
from flatdepth.predict.predictor import DepthModel, PredictOptions, choose_camera, predict_photo
from flatdepth.report.preview import row_of, see
from flatdepth.show.pictures import REGION_COLOURS

PICTURES = 8
"""Of a run's validation, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture to show.

    Attributes:
        name: of it.
        image: (H, W, 3) uint8 sRGB.
        K_px: (3, 3) its intrinsics in pixels, centres at integer + 0.5.
        truth_m: (H, W) planar z in metres, NaN where not known; None if nothing is known.
        region: (H, W) values of ``Region``; None if nothing is known.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    K_px: Float64[np.ndarray, "3 3"]
    truth_m: Float32[np.ndarray, "h w"] | None = None
    region: UInt8[np.ndarray, "h w"] | None = None


def photographs(inputs: Iterable[Input], options: PredictOptions) -> Iterator[Scene]:
    """Pictures in files. Raises BadFrame if one cannot be read."""
    for one in inputs:
        photo = open_photo(one.path)
        height, width = photo.image.shape[:2]
        camera = choose_camera(photo.focal_px, height, width, options)
        yield Scene(name=one.name, image=photo.image, K_px=camera.K_px)


def validation_scenes(config: TrainConfig) -> Iterator[Scene]:
    """The first pictures that a run validates on, with the pastes of its validation."""
    corpus = open_corpus(config.data)
    for number, place in corpus.val_places(PICTURES):
        sample = validation_sample(corpus, config, corpus.val[number], place, pasted=True)
        row = row_of(see([sample], config, 0), 0)
        yield Scene(
            name=sample.frame.key,
            image=row.image,
            K_px=sample.view.intrinsics(sample.frame.K_px),
            truth_m=row.depth_m,
            region=row.region,
        )


def log_scenes(
    rerun: Any,
    recording: Any,
    scenes: Iterable[Scene],
    models: Mapping[str, DepthModel],
    options: PredictOptions,
    device: torch.device,
) -> int:
    """Predict on pictures and log them, one after the other on the timeline ``picture``.

    Args:
        rerun: the module.
        recording: its ``RecordingStream``.
        scenes: the pictures.
        models: the networks, by the name of their map.

    Returns:
        How many there were.
    """
    recording.log("/", rerun.ViewCoordinates.RDF, static=True)
    colours = [(int(region), region.name.lower(), c) for region, c in REGION_COLOURS.items()]
    recording.log("/", rerun.AnnotationContext(colours), static=True)
    count = 0
    for number, scene in enumerate(scenes):
        count = number + 1
        recording.set_time("picture", sequence=number)
        height, width = scene.image.shape[:2]
        pinhole = rerun.Pinhole(image_from_camera=scene.K_px, resolution=[width, height])
        recording.log("camera", pinhole)
        recording.log("camera/image", rerun.Image(scene.image))
        recording.log("name", rerun.TextDocument(scene.name))
        if scene.truth_m is not None:
            recording.log("camera/truth", _depth(rerun, scene.truth_m))
        if scene.region is not None:
            recording.log("camera/region", rerun.SegmentationImage(scene.region))
        focal_px = float(scene.K_px.diagonal()[:2].mean())
        for name, model in models.items():
            photo = Photo(image=scene.image, focal_px=focal_px)
            found = predict_photo(model, photo, options, device)
            recording.log(f"camera/{name}", _map(rerun, found))
    return count


def log_history(rerun: Any, recording: Any, run: Path) -> None:
    """Log the curves of a run over its steps: loss, learning rate, validation."""
    for line in (run / "history.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        recording.set_time("step", sequence=int(entry["step"]))
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                recording.log(f"training/{name}", rerun.Scalars(float(value)))


def _map(rerun: Any, found: Prediction) -> Any:
    if found.kind == "metric":
        return _depth(rerun, found.values)
    return rerun.Image(colour_field(found.field, found.kind))


def _depth(rerun: Any, depth_m: Float32[np.ndarray, "h w"]) -> Any:
    return rerun.DepthImage(np.nan_to_num(depth_m, nan=0.0, posinf=0.0), meter=1.0)
