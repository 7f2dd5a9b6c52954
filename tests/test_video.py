"""Videos: frames, times and turns as they are in the file, what is written, steadiness, damage."""

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flatdepth.errors import BadFrame, UserError
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.predict import video_io, videos
from flatdepth.predict.outputs import ColourScale
from flatdepth.predict.predictor import PredictOptions, Summary, plan_inputs
from flatdepth.predict.steady import FORGET_S, Steadier
from flatdepth.predict.video_io import TICKS, VideoFile, VideoWriter
from flatdepth.predict.videos import predict_videos
from tests.test_predict import Stub, brightness_as_depth, command, photo

av = pytest.importorskip("av")

HEIGHT, WIDTH = 56, 84


def texture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(20, 236, (8, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def moving_square(count: int) -> list[np.ndarray]:
    """A white square of 12 px that crosses a texture, 2 px per frame."""
    frames = [texture().copy() for _ in range(count)]
    for number, frame in enumerate(frames):
        left = 2 * number % (WIDTH - 12)
        frame[20:32, left : left + 12] = 255
    return frames


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    times_s: Sequence[float] | None = None,
    *,
    codec: str = "ffv1",
    turn: tuple[float, bool] | None = None,
    **options: str,
) -> Path:
    """A video of those frames, by default bit for bit, at 10 frames/s or at those times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    formats = {"ffv1": "bgr0", "png": "rgb24", "gif": "rgb8"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = formats.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            time_s = number / 10 if times_s is None else times_s[number]
            frame.pts, frame.time_base = round(1000 * time_s), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> list[tuple[np.ndarray, float]]:
    """Frames and times by PyAV alone."""
    with av.open(str(path)) as container:
        return [(one.to_ndarray(format="rgb24"), one.time) for one in container.decode(video=0)]


def run(source: Path, out: Path, model: Stub | None = None, **options: Any) -> Summary:
    chosen = PredictOptions(**{"size": HEIGHT, "write": ("side",), **options})
    return predict_videos(
        model or Stub(brightness_as_depth, multiple=1),
        plan_inputs([str(source)], out, chosen),
        out,
        chosen,
        device=torch.device("cpu"),
        checkpoint="weights/final.safetensors",
    )


# Reading.


def test_frames_and_times_are_those_of_the_file(tmp_path: Path) -> None:
    times_s = [0.0, 0.04, 0.1, 0.5, 0.517, 2.0]
    frames = [texture(seed=number) for number in range(len(times_s))]
    with VideoFile(film(tmp_path / "a.mkv", frames, times_s)) as video:
        found = list(video.frames())
        assert not video.damaged and not video.is_cut_off
    np.testing.assert_allclose([one.time_s for one in found], times_s, atol=1e-9)
    for one, expected in zip(found, frames, strict=True):
        np.testing.assert_array_equal(one.image, expected)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_turned_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    """The display matrix turns counter-clockwise, then mirrors, as PyAV writes it."""
    frames = [texture()] * 2
    path = film(tmp_path / "a.mov", frames, codec="png", turn=(degrees, mirrored))
    upright = np.rot90(frames[0], degrees // 90)
    with VideoFile(path) as video:
        found = [one.image for one in video.frames()]
    for image in found:
        np.testing.assert_array_equal(image, upright[:, ::-1] if mirrored else upright)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "ffv1"), ("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.gif", "gif")],
)
def test_the_first_look_is_spread_over_the_video(tmp_path: Path, name: str, codec: str) -> None:
    """Frame k is grey of 10 k; looks at the middles of quarters of 20 frames are 3, 8, 13, 18."""
    frames = [np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8) for number in range(20)]
    with VideoFile(film(tmp_path / name, frames, codec=codec)) as video:
        assert video.count == 20
        found = [float(image.mean()) / 10 for image in video.look(4)]
    np.testing.assert_allclose(found, [3, 8, 13, 18], atol=1.5)


def test_a_file_that_is_no_video_is_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = film(tmp_path / "whole.mp4", [texture()] * 20, codec="libx264").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index was at the end
    (tmp_path / "in" / "text.mp4").write_text("no video")
    summary = run(tmp_path / "in", tmp_path / "out")
    reasons = [one.reason for one in summary.skipped]
    assert len(reasons) == 2 and all("the video cannot be opened" in one for one in reasons)
    assert capsys.readouterr().err.count("; skipped\n") == 2
    monkeypatch.setattr(video_io.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadFrame, match=r"pip install 'flatdepth\[video\]'"):
        VideoFile(tmp_path / "whole.mp4")


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_file_that_ends_in_the_middle_is_predicted_so_far(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [texture(seed=number) for number in range(30)]
    path = film(tmp_path / name, frames, codec="libx264", movflags="+faststart", g="5")
    content = path.read_bytes()
    path.write_bytes(content[: int(0.6 * len(content))])
    summary = run(path, tmp_path / "out")
    assert len(summary.written) == 1
    done = len(read(tmp_path / "out" / "a_side.mp4"))
    assert 9 <= done < 25
    errors = capsys.readouterr().err
    assert f"a{path.suffix}: damaged or cut off; {done} frames up to" in errors
    assert errors.count("damaged") == 1


# Writing.


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (57, 83)])
def test_a_side_video_has_the_frames_and_times_of_its_source(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    times_s = [0.2, 0.24, 0.3, 0.7, 0.717, 2.2]
    grey = texture(*shape)[..., :1].repeat(3, axis=2)  # colour has half the resolution
    path = film(tmp_path / "a.mkv", [grey] * 6, times_s)
    run(path, tmp_path / "out")
    found = read(tmp_path / "out" / "a_side.mp4")
    start_s = found[0][1]
    for (image, time_s), expected_s in zip(found, times_s, strict=True):
        assert time_s - start_s == pytest.approx(expected_s - times_s[0], abs=1 / TICKS)
        height, width = shape
        assert image.shape[0] == height + height % 2 and image.shape[1] % 2 == 0
        assert image.shape[1] - (2 * width + max(1, width // 40)) in (0, 1)
        assert np.abs(image[:height, :width].astype(int) - grey).mean() < 3


def test_a_build_without_libx264_writes_mpeg_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    grey = texture()[..., :1].repeat(3, axis=2)
    with VideoWriter(tmp_path / "a.mp4", Fraction(30)) as writer:
        for number in range(5):
            writer.add(grey, number / 30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    found = read(tmp_path / "a.mp4")
    assert len(found) == 5 and np.abs(found[4][0].astype(int) - grey).mean() < 4


def test_colours_come_back_as_they_went_in(tmp_path: Path) -> None:
    """With the matrix of BT.601 in place of the one in the file they would be off by 20."""
    colour = np.array([200, 40, 60])
    with VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer:
        writer.add(np.broadcast_to(colour, (HEIGHT, WIDTH, 3)).astype(np.uint8), 0.0)
    ((image, _),) = read(tmp_path / "a.mp4")
    assert np.abs(image - colour).max() <= 3


def test_one_frame_is_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(film(tmp_path / "a.mkv", [texture()]), tmp_path / "out", write=("colour", "side", "npy"))
    assert len(read(tmp_path / "out" / "a_side.mp4")) == 1
    with av.open(str(tmp_path / "out" / "a_colour.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(0.1, abs=0.002)
    assert [one.name for one in (tmp_path / "out" / "a_frames").glob("*.npy")] == [
        "000000_depth.npy"
    ]
    assert "1 frames; no flicker to measure" in capsys.readouterr().err


def test_a_colour_means_the_same_depth_in_all_frames(tmp_path: Path) -> None:
    """The left half stays while the right half gets brighter, that is farther."""
    frames = [np.full((HEIGHT, WIDTH, 3), 100, np.uint8) for _ in range(10)]
    for number, frame in enumerate(frames):
        frame[:, WIDTH // 2 :] = 100 + 15 * number
    run(film(tmp_path / "a.mkv", frames), tmp_path / "out", write=("colour",))
    colours = [image.astype(int) for image, _ in read(tmp_path / "out" / "a_colour.mp4")]
    for image in colours:
        assert np.abs(image[:, :30] - colours[0][:, :30]).max() <= 4
    assert np.abs(colours[9][:, -20:] - colours[0][:, -20:]).max() > 80


@pytest.mark.parametrize(("kind", "steady"), [("relative", False), ("metric", True)])
def test_each_frame_has_its_files(tmp_path: Path, kind: Any, steady: bool) -> None:
    """Codes have one scale and offset for all frames and hold what the arrays hold."""
    frames = moving_square(6)
    out = tmp_path / "out"
    path = film(tmp_path / "a.mkv", frames, [0, 0.1, 0.25, 0.3, 0.4, 0.9])
    products = ("depth", "npy", "ply") if kind == "metric" else ("depth", "npy")
    run(path, out, Stub(brightness_as_depth, kind, multiple=1), write=products, steady=steady)
    files = {one.name for one in (out / "a_frames").iterdir()}
    suffixes = ["depth.png", "depth.npy", "depth.json"] + ["points.ply"] * (kind == "metric")
    assert files == {f"{number:06d}_{one}" for number in range(6) for one in suffixes}
    scales = set()
    for number, time_s in enumerate([0, 0.1, 0.25, 0.3, 0.4, 0.9]):
        stem = out / "a_frames" / f"{number:06d}"
        about = json.loads(Path(f"{stem}_depth.json").read_text())
        assert (about["video"], about["frame"]) == ("a.mkv", number)
        assert about["time_s"] == pytest.approx(time_s, abs=1e-6)
        assert ("steady" in about) == steady
        with Image.open(f"{stem}_depth.png") as image:
            codes = np.asarray(image)
        decoded = codes * about["png"]["scale"] + about["png"]["offset"]
        values = np.load(f"{stem}_depth.npy")
        np.testing.assert_allclose(decoded, values, atol=0.51 * about["png"]["scale"])
        scales.add((about["png"]["scale"], about["png"]["offset"]))
    assert len(scales) == 1


def test_nothing_is_overwritten_and_nothing_older_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = film(tmp_path / "a.mkv", [texture()] * 6)
    run(path, out, write=("side", "npy"))
    with pytest.raises(UserError, match=r"a_side\.mp4 and 1 more would be overwritten"):
        run(path, out, write=("side", "npy"))
    film(path, [texture()] * 4)
    run(path, out, write=("side", "npy"), overwrite=True)
    assert len(list((out / "a_frames").glob("*.npy"))) == 4
    photo(tmp_path / "both" / "a_frames" / "000000.png")
    film(tmp_path / "both" / "a.mkv", [texture()])
    with pytest.raises(UserError, match="outputs of both would lie in a_frames"):
        run(tmp_path / "both", tmp_path / "other")


def test_few_frames_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stub(brightness_as_depth, multiple=1)
    held = []
    monkeypatch.setattr(
        VideoWriter, "add", lambda *_: held.append(len(model.seen) - videos.LOOKS - len(held))
    )
    run(film(tmp_path / "a.mkv", [texture()] * 40), tmp_path / "out", model)
    assert len(held) == 40 and max(held) <= 6


def test_interrupted_a_video_is_whole_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Stub(brightness_as_depth, multiple=1)

    def tire(image: Tensor) -> Tensor:
        if len(model.seen) == videos.LOOKS + 20:
            raise KeyboardInterrupt
        return brightness_as_depth(image)

    model.function = tire
    path = film(tmp_path / "a.mkv", moving_square(30))
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out", model)
    done = len(read(tmp_path / "out" / "a_side.mp4"))
    assert 14 <= done < 20
    assert f"stopped; what is written ends after {done} of 30 frames" in capsys.readouterr().err
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["a_side.mp4"]


# Steadiness.


def jitter(seed: int, count: int, spread: float) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1 - spread, 1 + spread, count)


@pytest.mark.parametrize("kind", ["metric", "relative", "affine"])
def test_the_steady_gauge_is_the_exponential_mean_of_the_predicted_ones(kind: Any) -> None:
    """Whatever the times: g_t = k g_{t-1} + (1 - k) n_t, in a scene that stands still.

    Its steps are then at most (1 - k) of the range of the predicted gauges, and its mean over time
    differs from theirs by no more than that range / (1 - k) / frames.
    """
    count = 120
    field = texture()[..., 0].astype(np.float32) / 255 + 0.2
    scales = jitter(0, count, 0.1)
    shifts = np.zeros(count) if kind == "metric" else jitter(1, count, 0.1) - 0.9
    times_s = np.cumsum(np.random.default_rng(2).uniform(0.02, 0.06, count))
    steadier = Steadier(kind, ColourScale.of([field], kind).depth)
    predicted = np.stack([scales, shifts], axis=1)
    expected = predicted[0]
    steady = []
    for number, (scale, shift) in enumerate(predicted):
        if number:
            kept = math.exp(-(times_s[number] - times_s[number - 1]) / FORGET_S)
            expected = kept * expected + (1 - kept) * predicted[number]
        own = np.float32(scale) * field + np.float32(shift)
        gauge = steadier.step(texture(), own, float(times_s[number]))
        np.testing.assert_allclose(gauge(own), expected[0] * field + expected[1], rtol=2e-4)
        steady.append(expected[0])
    raw, left = steadier.flicker
    least = 1 - math.exp(-0.06 / FORGET_S)
    assert left <= least * 0.2 / 0.9 and left < raw / 10
    if kind == "metric":
        assert raw == pytest.approx(np.abs(np.diff(np.log(scales))).mean(), rel=1e-4)
        assert abs(np.mean(steady) - scales.mean()) <= 0.2 / least / count * 3


def test_what_does_not_flicker_is_left_as_it_is() -> None:
    field = texture()[..., 0].astype(np.float32) / 255 + 0.2
    for kind in ("metric", "relative", "affine"):
        steadier = Steadier(kind, ColourScale.of([field], kind).depth)
        for number in range(50):
            steady = steadier.step(texture(), field, number / 25)(field)
            np.testing.assert_allclose(steady, field, rtol=1e-5)
        assert steadier.flicker == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_noise_does_not_flatten_the_depth_in_the_long_run(kind: Any) -> None:
    """One-sided fits, chained, shrink a field with noise of a fifth of its spread in seconds."""
    rng = np.random.default_rng(0)
    field = texture(84, 126)[..., 0].astype(np.float32) / 255 + 0.5
    noise = 0.2 * float(field.std())
    steadier = Steadier(kind, ColourScale.of([field], kind).depth)
    spreads = []
    for number in range(150):
        own = field + rng.normal(0, noise, field.shape).astype(np.float32)
        gauge = steadier.step(texture(84, 126), own, number / 30)
        spreads.append(gauge.scale)
    assert np.mean(spreads[50:]) == pytest.approx(1, abs=0.02)


def test_what_moves_does_not_count_and_a_cut_changes_nothing() -> None:
    """A square comes near before a wall that stays; then another scene, twice as near, follows."""
    field = texture()[..., 0].astype(np.float32) / 255 + 0.5
    steadier = Steadier("metric", ColourScale.of([field], "metric").depth)
    for number, image in enumerate(moving_square(30)):
        own = np.where((image == 255).all(-1), np.float32(5 + number), field)
        gauge = steadier.step(image, own, number / 30)
        assert gauge.scale == pytest.approx(1, abs=1e-3)
    after = steadier.step(255 - texture(seed=3), 2 * field, 1.0)
    assert after.scale == pytest.approx(1, abs=1e-3)


def test_steady_removes_the_flicker_of_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of inverse depth, to (1 - k) of the range of its gauges; the report has the same figures."""
    gauges = jitter(3, videos.LOOKS + 30, 0.1)
    model = Stub(brightness_as_depth, multiple=1)
    model.function = lambda x: brightness_as_depth(x) / gauges[len(model.seen) - 1]
    frames = moving_square(30)
    path = film(tmp_path / "a.mkv", frames)
    still = ~np.any([(frame == 255).all(-1) for frame in frames], axis=0)
    own = gauges[videos.LOOKS :]
    for steady in (False, True):
        model.seen.clear()
        out = tmp_path / str(steady)
        run(path, out, model, write=("npy",), steady=steady)
        depth = [np.load(one) for one in sorted(out.rglob("*.npy"))]
        steps = [np.median(np.abs(np.log(b / a))[still]) for a, b in pairwise(depth)]
        report = capsys.readouterr().err
        if steady:
            assert max(steps) <= (1 - math.exp(-0.1 / FORGET_S)) * np.ptp(own) / own.min()
            assert f"{np.mean(steps):.2%} with --steady" in report
        else:
            raw = np.abs(np.diff(np.log(own))).mean()
            assert np.mean(steps) == pytest.approx(raw, rel=1e-3)
            assert f"30 frames; flicker {raw:.2%} as predicted" in report


# The command.


def test_the_command_takes_videos_beside_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = DepthAnythingV2("vitt", kind="metric", max_depth_m=8)
    weights = save_weights(network, tmp_path / "weights")[1]
    photo(tmp_path / "in" / "a.png")
    film(tmp_path / "in" / "a.mp4", moving_square(5), codec="libx264")
    film(tmp_path / "in" / "a.gif", moving_square(5), codec="gif")
    out = tmp_path / "out"
    options = ["--checkpoint", weights, "--size", 28, "--device", "cpu", "--steady"]
    code, text, errors = command(
        monkeypatch, capsys, tmp_path / "in", *options, "--out", out, "--write", "side,depth"
    )
    assert (code, text) == (0, f"3 predicted; outputs in {out}\n"), errors
    assert {one.name for one in out.iterdir()} == {
        "a_side.png", "a_depth.png", "a_depth.json",
        "a.mp4_side.mp4", "a.mp4_frames", "a.gif_side.mp4", "a.gif_frames",
    }  # fmt: skip
    assert errors.count("5 frames; flicker") == 2
    assert len(read(out / "a.mp4_side.mp4")) == 5
