"""Video files, by PyAV (FFmpeg): upright frames with their times in, one H.264 video out."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flatdepth.data.shards.codec import MAX_PIXELS
from flatdepth.errors import BadFrame

TICKS = 60000
"""Per second, in what is written: usual frame rates, 1001/30000 s too, are whole numbers of them,
and MPEG-4 part 2 counts no finer than to 65535."""

_SLACK_S = 0.5
"""By how much sound may outlast the pictures of a file that is whole."""

_BT709 = 1
"""Primaries, transfer curve and matrix as FFmpeg numbers them (ISO/IEC 23091-2)."""


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """An upright frame, and when it is shown, in seconds from the start of the file."""

    image: UInt8[np.ndarray, "h w 3"]
    time_s: float


class VideoFile:
    """An opened video; of several in a file the one that players show.

    Attributes:
        rate: frames per second on average; 25 if the file does not say it.
        seconds, count: how long it is and how many frames it has by its header, or None.
        damaged: how many parts of it could not be decoded so far.
        reached_s: where the last decoded frame ends.

    Raises:
        BadFrame: it is no video, damaged, absurdly large, or PyAV is missing.
    """

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("av") is None:
            raise BadFrame(
                "video", "videos need PyAV; install it with: pip install 'flatdepth[video]'"
            )
        av = importlib.import_module("av")
        self._error = av.FFmpegError
        try:
            # a file may name others, which are not to be fetched
            options = {"protocol_whitelist": "file"}
            self._container: Any = av.open(str(path), container_options=options)
        except av.FFmpegError as error:
            raise BadFrame("damaged", f"the video cannot be opened ({error.strerror})") from error
        self._stream: Any = self._container.streams.best("video")
        if self._stream is None or self._stream.width * self._stream.height > MAX_PIXELS:
            self._container.close()
            raise BadFrame("no video", f"it has no pictures of at most {MAX_PIXELS} pixels")
        self._stream.thread_type = "AUTO"
        self._start_s = (self._container.start_time or 0) / av.time_base
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.seconds: float | None = None
        if self._stream.duration:
            self.seconds = float(self._stream.duration * self._stream.time_base)
        elif self._container.duration:
            self.seconds = self._container.duration / av.time_base
        guess = None if self.seconds is None else round(self.seconds * self.rate)
        self.count: int | None = self._stream.frames or guess
        self.damaged, self.reached_s = 0, 0.0

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    @property
    def is_cut_off(self) -> bool:
        """Whether what could be decoded ends before the header says."""
        return self.seconds is not None and self.reached_s < self.seconds - _SLACK_S

    def frames(self) -> Iterator[VideoFrame]:
        """All frames from here on, at strictly rising times; damaged parts are left out.

        All have the size of the first one. A frame without a time follows the one before at the
        average rate.
        """
        for frame, time_s in self._decoded():
            yield VideoFrame(self._upright(frame), time_s)

    def look(self, count: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """At most ``count`` frames, at evenly spaced times if it is known how long the video is."""
        for number in range(count):
            at_s = (self.seconds or 0.0) * (number + 0.5) / count
            with suppress(self._error):  # then it is read on from where it is
                self._container.seek(round((self._start_s + at_s) * 1e6))
            last = None
            for frame, time_s in self._decoded():
                last = frame
                if time_s >= at_s:
                    break
            if last is not None:
                yield self._upright(last)

    def _decoded(self) -> Iterator[tuple[Any, float]]:
        step_s = float(1 / self.rate)
        time_s = -step_s
        for packet in self._packets():
            try:
                decoded = self._stream.decode(packet)
            except self._error:
                self.damaged += 1
                continue
            for frame in decoded:
                if frame.pts is None:
                    time_s += step_s
                else:
                    own_s = float(frame.pts * frame.time_base) - self._start_s
                    time_s = max(own_s, time_s + 1 / TICKS)
                self.reached_s = time_s + step_s
                yield frame, time_s

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._stream)
        except self._error:
            self.damaged += 1
            yield None  # what the decoder still holds

    def _upright(self, frame: Any) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels of a frame, turned and mirrored as its display matrix says.

        The matrix (ISO/IEC 14496-12, 6.2.2) takes a stored (x, y) to ``(a x + c y, b x + d y)``.
        """
        size = {"width": self._stream.width, "height": self._stream.height}
        pixels = frame.to_ndarray(format="rgb24", **size)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


class VideoWriter:
    """An MP4 file, written frame by frame under a temporary name until it is whole.

    H.264, or MPEG-4 part 2 where FFmpeg is built without libx264; yuv420p, BT.709, even sides: the
    last row or column is doubled where one is odd. Interrupted, the file ends with the last frame;
    after an error, and without a frame, there is none.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._path, self._rate = path, rate.limit_denominator(1001)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._container is None:
            return
        try:
            self._mux(None)
            self._container.close()
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def add(self, image: UInt8[np.ndarray, "h w 3"], time_s: float) -> None:
        """Show an image from a time on; all have one size, and times rise by 1 / TICKS or more."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        height, width = image.shape[:2]
        even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*even.shape[:2])
        frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts, frame.time_base = round(time_s * TICKS), Fraction(1, TICKS)
        self._mux(frame)

    def _open(self, height: int, width: int) -> None:
        import av

        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w", format="mp4")
        if "libx264" in av.codecs_available:
            # no frames held back, so that an interrupted file is whole at once
            options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
            stream = self._container.add_stream("libx264", self._rate, options)
        else:
            options = {"flags": "+qscale", "global_quality": str(3 * 118)}
            stream = self._container.add_stream("mpeg4", self._rate, options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, TICKS)
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = 1  # 16 to 235
        self._stream = stream

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            if not packet.duration:  # else the last frame is shown for no time at all
                packet.duration = round(1 / (self._rate * packet.time_base))
            self._container.mux(packet)
