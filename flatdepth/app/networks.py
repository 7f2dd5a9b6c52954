"""The checkpoints that are offered, opened when they are first asked for."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch

from flatdepth.config import nearest_multiple
from flatdepth.errors import UserError
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.predict.inputs import Photo
from flatdepth.predict.outputs import Prediction
from flatdepth.predict.predictor import PredictOptions, choose_camera, predict_photo
from flatdepth.predict.systems import SYSTEMS, OpenedSystem, Settings, open_system
from flatdepth.resources import demo_file

_KEPT = 2
"""Networks in memory."""


class Networks:
    """Names of checkpoints, and what they predict."""

    def __init__(
        self,
        sources: Sequence[str],
        device: torch.device,
        *,
        kind: Kind | None = None,
        max_depth_m: float | None = None,
    ) -> None:
        """
        Args:
            sources: weight files, their folders, hub ids or names of ``SYSTEMS``.
            kind, max_depth_m: of weights that do not say it.

        Raises:
            UserError: one is none of these.
        """
        for source in sources:
            hub = source in SYSTEMS or (source.count("/") == 1 and not Path(source).suffix)
            if not hub and not Path(demo_file(source)).exists():
                raise UserError(f"--checkpoint: {source}: no such file; check the name")
        self._sources = dict(zip(_short(sources), sources, strict=True))
        self._device, self._kind, self._max_depth_m = device, kind, max_depth_m
        self._lock = Lock()
        self._opened = lru_cache(_KEPT)(self._open)

    @property
    def names(self) -> list[str]:
        """As they are offered."""
        return list(self._sources)

    def opened(self, name: str) -> OpenedSystem:
        """One of ``names``. Raises UserError if its weights cannot be used."""
        with self._lock:
            return self._opened(name)

    def predict(
        self, name: str, photo: Photo, size: int, fov_deg: float | None
    ) -> tuple[OpenedSystem, Prediction]:
        """What one says of a photograph; with a camera, assumed if need be.

        Args:
            size: about the shorter side of the network's input in pixels; 0: its own.
            fov_deg: horizontal field of view; None: by EXIF, else the usual assumption.

        Raises:
            BadFrame, UserError: as ``predict_photo`` and ``opened``.
        """
        system = self.opened(name)
        network = system.network
        assert network is not None
        options = self._options(network, size, fov_deg)
        found = predict_photo(network, photo, options, self._device)
        height, width = photo.image.shape[:2]
        camera = choose_camera(photo.focal_px, height, width, options)
        return system, replace(found, camera=camera)

    def _open(self, name: str) -> OpenedSystem:
        if name not in self._sources:
            raise UserError(f"there is no checkpoint {name!r}; choose one that is offered")
        source = demo_file(self._sources[name])
        given = source if source in SYSTEMS else f"{name}={source}"
        return open_system(
            given, Settings(), self._device, kind=self._kind, max_depth_m=self._max_depth_m
        )

    @staticmethod
    def _options(network: DepthNetwork, size: int, fov_deg: float | None) -> PredictOptions:
        side = nearest_multiple(size, network.multiple) if size else None
        return PredictOptions(size=side, fov_deg=fov_deg, unusual_camera=True)


def _short(sources: Sequence[str]) -> list[str]:
    """A name for each: as much of its path's end as tells them apart."""
    parts = [Path(source).parts for source in sources]
    for count in range(1, max((len(one) for one in parts), default=0) + 1):
        names = ["/".join(one[-count:]).replace("=", "-") for one in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--checkpoint: the same file is named twice; name it once")
