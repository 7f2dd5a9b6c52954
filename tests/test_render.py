"""Path-traced rooms: the files of a bench frame obey the laws of planes and of removal."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.shards.codec import decode_frame
from flatdepth.judge.experiment import PLAIN
from flatdepth.types import Region
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bpy") is None, reason="needs the extra render"
)

BACKGROUND, MIRROR, FRAME, OPENING = 0, 1, 3, 6


def render(out: Path, scenes: str) -> None:
    command = [sys.executable, str(REPOSITORY / "tools/render_rooms.py"), "bench"]
    sizes = ["--width", "64", "--height", "48", "--samples", "1"]
    subprocess.run([*command, "--out", str(out), "--scenes", scenes, *sizes], check=True)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A room with one mirror."""
    out = tmp_path_factory.mktemp("bench")
    render(out, "26:27")
    return out


def test_a_mirror_is_a_plane_before_what_its_twin_shows(raw: Path) -> None:
    depth_m = np.load(raw / "room_0026" / "0.npy").astype(np.float64)
    plain = np.load(raw / "room_0026" / "0.plain.npy")
    region = np.asarray(Image.open(raw / "room_0026" / "0.region.png"))
    assert set(np.unique(region)) == {BACKGROUND, MIRROR, FRAME, OPENING}
    v, u = np.nonzero(region == MIRROR)
    assert len(u) > 0.03 * region.size
    pixels = np.stack([u, v, np.ones(len(u))], axis=1)
    plane = pixels @ np.linalg.lstsq(pixels, 1 / depth_m[v, u], rcond=None)[0]
    np.testing.assert_allclose(1 / depth_m[v, u], plane, rtol=1e-4)
    untouched = np.isin(region, (BACKGROUND, OPENING))
    np.testing.assert_allclose(plain[untouched], depth_m[untouched], rtol=1e-5)
    assert (plain[~untouched] > depth_m[~untouched]).all()


def test_a_frame_depends_on_its_numbers_only(raw: Path, tmp_path: Path) -> None:
    render(tmp_path, "25:27")
    for name in ("0.npy", "0.region.png", "0.plain.npy", "0.txt"):
        again = (tmp_path / "room_0026" / name).read_bytes()
        assert again == (raw / "room_0026" / name).read_bytes(), name


def test_packing_reads_them_with_their_regions_and_twins(raw: Path) -> None:
    reader = FolderReader(
        raw=str(raw),
        image_glob="*/*.jpg",
        depth_glob="*/*.npy",
        depth_scale=1.0,
        intrinsics_glob="*/0.txt",
        region_glob="*/*.region.png",
        region_names="1:mirror,2:art,3:frame,5:art,6:decoy",
    )
    frames = {item.key: decode_frame(reader.read(item)) for item in reader.list().items}
    assert {*frames} == {"room_0026/0", f"room_0026/0{PLAIN}"}
    frame, twin = frames["room_0026/0"], frames[f"room_0026/0{PLAIN}"]
    assert (frame.scene, twin.scene, twin.region) == ("room_0026", "room_0026", None)
    stored = np.asarray(Image.open(raw / "room_0026" / "0.region.png"))
    assert frame.region is not None
    assert np.array_equal(frame.region == Region.MIRROR, stored == MIRROR)
    assert np.array_equal(frame.region == Region.DECOY, stored == OPENING)
    stored_m = np.load(raw / "room_0026" / "0.npy")
    np.testing.assert_allclose(frame.depth_m, stored_m, rtol=1e-4)
    np.testing.assert_array_equal(frame.K_px, twin.K_px)
    np.testing.assert_array_equal(frame.K_px[:2, 2], (32, 24))
