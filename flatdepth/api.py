"""What ``import flatdepth`` offers: training, evaluating and predicting from Python.

Mistakes are ``flatdepth.errors.UserError``, as on the command line.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.demo import DEMO_ART
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import BadFrame, UserError
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import Part, Request, Verdict, judge
from flatdepth.models.checkpoint import open_model
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.precision import best_device
from flatdepth.predict.inputs import Photo, open_photo, upright
from flatdepth.predict.outputs import Prediction
from flatdepth.predict.predictor import DEFAULT_FOV_DEG, PredictOptions, predict_photo
from flatdepth.resources import QUICKSTART

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def configure(
    config: str | os.PathLike[str] = QUICKSTART, overrides: Mapping[str, object] | None = None
) -> TrainConfig:
    """The configuration of a training, checked, to look at before ``train`` gets it.

    Args:
        config: a YAML file, or the name of a packaged one, such as ``"vits_indoor"``; by default
            the quickstart.
        overrides: by dotted key: ``{"steps": 20, "optim.lr": 1e-5}``.

    Raises:
        UserError: an unknown key, or a value that cannot be.
    """
    arguments = [f"--config={os.fspath(config)}"]
    arguments += [f"--{key}={_as_option(value)}" for key, value in (overrides or {}).items()]
    return parse_config(TrainConfig, arguments, prog="flatdepth train", description=None)


def train(
    config: TrainConfig | str | os.PathLike[str] = QUICKSTART,
    overrides: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Run a training, or go on with it, and return what its ``metrics.json`` says.

    Args:
        config: a configuration, or a file or name as ``configure`` takes it.
        overrides: of a file, as ``configure`` takes them.

    Raises:
        UserError: an unknown key, or data, checkpoint or run directory do not fit.
    """
    from flatdepth.training import loop

    if isinstance(config, TrainConfig):
        if overrides:
            raise UserError("overrides: expected none with a TrainConfig; use dataclasses.replace")
        return loop.train(config)
    return loop.train(configure(config, overrides))


def _as_option(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def open_shards(url: str | os.PathLike[str]) -> ShardSet:
    """Open the shard set in a directory, at an fsspec URL, or at the path of its ``index.json``.

    Raises:
        UserError: there is no finished set, or it is damaged.
    """
    return ShardSet.open(url)


def evaluate(
    checkpoints: Paths,
    data: Paths,
    *,
    part: Part = "all",
    protocol: str = "none",
    paste_seed: int | None = None,
    art: Paths = DEMO_ART,
    images: int = 0,
    size: int | None = None,
) -> Verdict:
    """Judge checkpoints on shard sets, as ``flatdepth evaluate`` does.

    Args:
        checkpoints: one or several weight files or hub ids, which say their kind.
        data: one or several shard sets of frames.
        part: which samples of the sets.
        protocol: crop and depth range, a name of ``judge.protocol.PROTOCOLS``.
        paste_seed: every picture is judged again with pastes of this seed; None: clean only.
        art: shard sets of the pictures to paste; by default those of the quickstart.
        images: most images per set, evenly spaced; 0: all.
        size: shorter side of the network's input in pixels; None: that of the checkpoints' runs,
            else 518.

    Returns:
        All figures; ``judge.tables.render`` prints them.

    Raises:
        UserError: a checkpoint, set or option does not fit.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    sources = _as_strings(checkpoints)
    unsaid = (None,) * len(sources)
    request = Request(
        checkpoints=sources,
        kinds=unsaid,
        max_depths_m=unsaid,
        trained_on=unsaid,
        data=_as_strings(data),
        art=() if paste_seed is None else _as_strings(art),
        part=part,
        protocol=PROTOCOLS[protocol],
        paste_seed=paste_seed,
        images=images,
        size=size,
    )
    return judge(request, best_device(), lambda _done, _total: None)


def _as_strings(paths: Paths) -> tuple[str, ...]:
    several = (paths,) if isinstance(paths, str | os.PathLike) else paths
    return tuple(os.fspath(path) for path in several)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A network that predicts the depth of pictures.

    Attributes:
        model: in evaluation mode, on ``device``.
        device: where it computes.
    """

    model: DepthNetwork
    device: torch.device

    def predict(
        self,
        image: str | os.PathLike[str] | Image.Image | np.ndarray,
        *,
        size: int | None = None,
        tiles: bool = False,
        intrinsics: tuple[float, float, float, float] | None = None,
        unusual_camera: bool = False,
    ) -> Prediction:
        """Predict the depth of a picture at its own resolution, upright.

        Args:
            image: a file, a Pillow image, or (h, w, 3) uint8 sRGB.
            size: shorter side of the network's input in pixels, a multiple of what it takes (14 for
                Depth Anything); None: as in its training, else the one nearest to 518.
            tiles: refine with tiles of ``size`` pixels at the picture's own resolution.
            intrinsics: fx, fy, cx, cy in pixels, cx and cy for pixel centres at integers (OpenCV).
            unusual_camera: take intrinsics of any field of view and any ratio of fx and fy.

        Returns:
            ``values`` holds (h, w) float32 metres, inverse depth up to scale and shift from
            relative weights, depth up to scale and shift from affine ones; ``camera`` the
            intrinsics if they were given or EXIF says them, else None.

        Raises:
            UserError: it is no picture, or an option is out of range.

        Warns:
            UserWarning: the metres depend on a focal length that nothing says.
        """
        options = PredictOptions(
            size=size, tiles=tiles, intrinsics=intrinsics, unusual_camera=unusual_camera
        )
        try:
            found = predict_photo(self.model, _photo(image), options, self.device)
        except BadFrame as error:
            name = image if isinstance(image, str | os.PathLike) else "image"
            raise UserError(f"{name}: {error.detail or error.reason}; give another one") from error
        if self.model.needs_focal and found.camera is None:
            warnings.warn(
                f"the focal length is unknown; a view of {DEFAULT_FOV_DEG:g} degrees is assumed, "
                "and the metres are wrong by as much; give intrinsics",
                stacklevel=2,
            )
        return found


def load(
    checkpoint: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    max_depth_m: float | None = None,
    device: str | None = None,
) -> Predictor:
    """Load weights to predict with, calibrated where they say how (``model.calibration``).

    Args:
        checkpoint: a weight file, its folder or a Hugging Face Hub id, as
            ``models.checkpoint.read_weights`` takes them.
        kind, max_depth_m: what the file holds, for one that does not say it.
        device: such as ``"cpu"``; by default a GPU if there is one.

    Raises:
        UserError: the file cannot be had or read, or does not say what it holds.

    Warns:
        UserWarning: something makes it doubtful that the file is what it is taken for.
    """
    where = best_device() if device is None else torch.device(device)
    model, report = open_model(os.fspath(checkpoint), kind=kind, max_depth_m=max_depth_m)
    for doubt in report.doubts:
        warnings.warn(f"{report.source}: {doubt}", stacklevel=2)
    return Predictor(model.to(where), where)


def _photo(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> Photo:
    if isinstance(image, str | os.PathLike):
        return open_photo(Path(image))
    if isinstance(image, Image.Image):
        return upright(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(
            f"image: expected uint8 of shape (h, w, 3), got {image.dtype} of shape {image.shape}; "
            "convert it"
        )
    return Photo(image=image, focal_px=None)
