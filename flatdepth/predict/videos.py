"""Predict depth on videos, frame by frame as on photographs, with bounded memory.

Colours, and codes that have no unit, mean the same in all frames of a video: what they span is
decided by a first look at ``LOOKS`` evenly spaced frames.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from flatdepth.data.loader import in_order
from flatdepth.errors import BadFrame, printable
from flatdepth.predict.inputs import Input, Photo
from flatdepth.predict.outputs import (
    FRAMES_SUFFIX,
    SPATIAL,
    VIDEO_SUFFIXES,
    ColourScale,
    Prediction,
    output_suffixes,
    render,
    saturated_pixels,
    side_by_side,
)
from flatdepth.predict.predictor import (
    DepthModel,
    PredictOptions,
    Progress,
    Skipped,
    Summary,
    Written,
    choose_camera,
    doubts,
    expect_fit,
    predict_photo,
    troubles_named,
)
from flatdepth.predict.steady import Gauge, Steadier
from flatdepth.predict.video_io import VideoFile, VideoWriter
from flatdepth.show.pictures import write_atomic

LOOKS = 8

_LOOK_SIDE = 256
_MARGIN = 0.5  # of the range of the first look, that codes reach beyond it on either side
_THREADS = 4


def predict_videos(
    model: DepthModel,
    videos: Sequence[Input],
    out: Path,
    options: PredictOptions,
    *,
    device: torch.device,
    checkpoint: str,
) -> Summary:
    """As ``predict_files``, for videos.

    ``colour`` and ``side`` become one video each, with the times of the input; the other products
    lie in a folder, a file per frame. Of each video is told how much it flickers, with
    ``options.steady`` and without; of one that is damaged or interrupted, how far it got.

    Raises:
        UserError: as ``predict_files``.
    """
    expect_fit(model, options, device)
    written: list[Written] = []
    skipped: list[Skipped] = []
    with troubles_named(out, device):
        for item in videos:
            try:
                written.append(_Job(model, item, out, options, device, checkpoint).run())
            except BadFrame as error:
                skipped.append(Skipped(item, error.detail))
                print(skipped[-1], file=sys.stderr)
    return Summary(written=written, skipped=skipped, out=out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    number: int
    time_s: float
    prediction: Prediction
    gauge: Gauge


@dataclass(frozen=True, slots=True)
class _Job:
    """One video."""

    model: DepthModel
    item: Input
    out: Path
    options: PredictOptions
    device: torch.device
    checkpoint: str

    def run(self) -> Written:
        with VideoFile(self.item.path) as video:
            scale = self._first_look(video)
        low, high = scale.span
        margin = _MARGIN * (high - low)
        least = -math.inf if scale.kind == "affine" else 0.0
        span = (max(least, low - margin), high + margin)
        steadier = Steadier(scale.kind, scale.depth)
        done = saturated = 0

        def write(frame: _Frame) -> tuple[_Frame, UInt8[np.ndarray, "h w 3"], int]:
            return frame, scale.colours(frame.prediction.field), self._write_files(frame, span)

        with (
            VideoFile(self.item.path) as video,
            Progress(video.count, "frame") as progress,
            ExitStack() as stack,
        ):
            writers = {
                product: stack.enter_context(
                    VideoWriter(self.out / (self.item.name + suffix), video.rate)
                )
                for product, suffix in VIDEO_SUFFIXES.items()
                if product in self.options.write
            }
            frames = self._predicted(video, steadier)
            try:
                for frame, colours, beyond in in_order(
                    write, frames, threads=_THREADS, ahead=_THREADS
                ):
                    if "colour" in writers:
                        writers["colour"].add(colours, frame.time_s)
                    if "side" in writers:
                        pair = side_by_side(frame.prediction.image, colours)
                        writers["side"].add(pair, frame.time_s)
                    done += 1
                    saturated += beyond
                    progress.step()
            except KeyboardInterrupt:
                of = f" of {video.count}" if video.count else ""
                progress.say(f"{self}: stopped; what is written ends after {done}{of} frames")
                raise
        if self.options.overwrite:
            self._remove_frames_from(done)
        if video.damaged or video.is_cut_off:
            of = f" of {video.seconds:.1f}" if video.seconds else ""
            self._say(
                f"warning: {self}: damaged or cut off; {done} frames up to "
                f"{video.reached_s:.1f}{of} s could be read"
            )
        if saturated:
            self._say(
                f"warning: {self}: {saturated} pixels of its depth PNGs saturate; --write npy has "
                "their values"
            )
        raw, steady = steadier.flicker
        flicker = f"flicker {raw:.2%} as predicted, {steady:.2%} with --steady"
        if math.isnan(raw):
            flicker = "no flicker to measure, for nothing in it stands still"
        self._say(f"{self}: {done} frames; {flicker}")
        return Written(self.item, saturated)

    def __str__(self) -> str:
        return printable(self.item.path)

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def _first_look(self, video: VideoFile) -> ColourScale:
        fields: list[Float32[np.ndarray, "h w"]] = []
        for image in video.look(LOOKS):
            photo = Photo(image=image, focal_px=None)
            field = predict_photo(self.model, photo, self.options, self.device).field
            if not fields:
                camera = choose_camera(None, field.shape[0], field.shape[1], self.options)
                for trouble in doubts(self.model, field, camera, self.options):
                    self._say(f"warning: {self}: {trouble}")
            step = max(1, min(field.shape) // _LOOK_SIDE)
            fields.append(field[::step, ::step])
        if not fields:
            raise BadFrame("no frames", "no frame of it can be decoded")
        return ColourScale.of(fields, self.model.kind)

    def _predicted(self, video: VideoFile, steadier: Steadier) -> Iterator[_Frame]:
        for number, frame in enumerate(video.frames()):
            photo = Photo(image=frame.image, focal_px=None)
            found = predict_photo(self.model, photo, self.options, self.device)
            gauge = steadier.step(frame.image, found.field, frame.time_s)
            field = gauge(found.field) if self.options.steady else found.field
            if self.model.kind != "affine":
                field = field.clip(0)
            camera = None
            if not SPATIAL.isdisjoint(self.options.write):
                camera = choose_camera(None, field.shape[0], field.shape[1], self.options)
            found = replace(found, field=field, camera=camera)
            yield _Frame(number=number, time_s=frame.time_s, prediction=found, gauge=gauge)

    def _write_files(self, frame: _Frame, span: tuple[float, float]) -> int:
        """Write what each frame has of its own; how many pixels saturate in its PNG."""
        products = tuple(one for one in self.options.write if one not in VIDEO_SUFFIXES)
        if not products:
            return 0
        about = {
            "video": self.item.path.name,
            "frame": frame.number,
            "time_s": frame.time_s,
            "checkpoint": Path(self.checkpoint).name,
            "tiles": self.options.tiles,
        }
        if self.options.steady:
            about["steady"] = {"scale": frame.gauge.scale, "shift": frame.gauge.shift}
        unit, prune = self.options.png_unit, self.options.prune
        files = render(
            frame.prediction, products, png_unit=unit, prune=prune, about=about, span=span
        )
        for suffix, data in files.items():
            write_atomic(self._frame_file(frame.number, suffix), data)
        return saturated_pixels(frame.prediction, unit, span) if "depth" in products else 0

    def _frame_file(self, number: int, suffix: str) -> Path:
        return self.out / (self.item.name + FRAMES_SUFFIX) / f"{number:06d}{suffix}"

    def _remove_frames_from(self, number: int) -> None:
        """Those of a longer video that was here before, of the products that are written."""
        for suffix in output_suffixes(self.options.write):
            at = number
            while (old := self._frame_file(at, suffix)).exists():
                old.unlink()
                at += 1
