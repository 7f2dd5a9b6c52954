"""Labels beside RGB-D frames: read from every kind of file, planes fitted, read and refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatdepth.commands import pack as tool
from flatdepth.data.pack import pack
from flatdepth.data.polygons import Outline, write_labelme
from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.readers.labels import parse_names, read_labels_of_map
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import RawFrame, Region

HEIGHT, WIDTH = 60, 80
FOCAL, CX, CY = 70.0, 41.0, 29.0
WALL = np.array([0.08, -0.02, 0.35])
MIRROR, POSTER = (20.0, 15.0, 40.0, 35.0), (50.0, 20.0, 70.0, 45.0)


def inverse_depth(m: np.ndarray) -> np.ndarray:
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.stack([(u - CX) / FOCAL, (v - CY) / FOCAL, np.ones_like(u)], axis=-1) @ m


def inside(box: tuple[float, ...]) -> np.ndarray:
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    left, top, right, bottom = box
    return (u > left) & (u < right) & (v > top) & (v < bottom)


def outline(label: str, box: tuple[float, ...]) -> Outline:
    left, top, right, bottom = box
    points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    points = points.astype(np.float64)
    return Outline(label=label, parts=(points,))


OUTLINES = [outline("mirror", MIRROR), outline("poster", POSTER)]
NUMBERS = np.where(inside(MIRROR), 1, np.where(inside(POSTER), 2, 0)).astype(np.uint8)


def depth() -> np.ndarray:
    """A wall; behind the mirror the room seen in it, and the poster sticks out from the wall."""
    z = 1 / inverse_depth(WALL)
    z[inside(MIRROR)] *= 1.9
    z[inside(POSTER)] /= 1.05
    return z.astype(np.float32)


def write(
    raw: Path, depth_m: np.ndarray | None = None, size: tuple[int, int] | None = None
) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    image = Image.fromarray(pixels)
    (image if size is None else image.resize(size)).save(raw / "1.png")
    np.save(raw / "1.npy", depth() if depth_m is None else depth_m)


def reader(raw: Path, **options: object) -> FolderReader:
    camera = {"intrinsics": (FOCAL, FOCAL, CX, CY), "half_pixel_centres": True}
    return FolderReader(str(raw), "*.png", "*.npy", 1.0, **(camera | options))


def read(raw: Path, **options: object) -> RawFrame:
    own = reader(raw, **options)
    (item,) = own.list().items
    return own.read(item)


def labelme(raw: Path, *outlines: Outline, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    (raw / "1.json").write_bytes(write_labelme(outlines or OUTLINES, "1.png", *size))


def errors(raw: RawFrame, box: tuple[float, ...], factor: float) -> float:
    """Largest relative error of the planes' z against the wall's, nearer by ``factor``."""
    assert raw.things is not None
    (number,) = np.unique(raw.things.number[inside(box)])
    found = inverse_depth(raw.things.planes[number - 1])[inside(box)]
    return float(np.abs(found / (inverse_depth(WALL) * factor)[inside(box)] - 1).max())


def test_planes_of_outlines_are_the_walls_and_of_pictures_their_own(tmp_path: Path) -> None:
    write(tmp_path)
    labelme(tmp_path)
    found = read(tmp_path, polygon_glob="*.json")
    assert found.region is not None
    np.testing.assert_array_equal(found.region, NUMBERS)
    assert errors(found, MIRROR, 1) < 1e-3 and errors(found, POSTER, 1.05) < 1e-3
    around = read(tmp_path, polygon_glob="*.json", art_planes="ring")
    assert errors(around, POSTER, 1) < 1e-3
    said = found.meta["things"]
    assert isinstance(said, list)
    assert [(one["region"], one["from"]) for one in said] == [("mirror", "ring"), ("art", "inside")]
    assert all(one["residual"] < 1e-3 and one["share"] > 0.9 for one in said)
    assert read(tmp_path, polygon_glob="*.json", planes="none").things is None


def test_a_picture_without_depth_of_its_own_is_fitted_around(tmp_path: Path) -> None:
    dark = depth()
    dark[inside(POSTER)] = np.nan
    write(tmp_path, dark)
    labelme(tmp_path)
    found = read(tmp_path, polygon_glob="*.json")
    assert errors(found, POSTER, 1) < 1e-3
    assert found.meta["things"][1]["from"] == "ring"  # type: ignore[index]


def coco(path: Path) -> None:
    def flat(box: tuple[float, ...]) -> list[float]:
        left, top, right, bottom = box
        return [left, top, right, top, right, bottom, left, bottom]

    about = {
        "images": [{"id": 7, "file_name": "x/1.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "Spiegel"}, {"id": 2, "name": "tv"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "segmentation": [flat(MIRROR)]},
            {"image_id": 7, "category_id": 2, "segmentation": [flat(POSTER)]},
        ],
    }
    path.write_text(json.dumps(about))


def test_one_file_for_all_and_labels_of_the_users_own(tmp_path: Path) -> None:
    write(tmp_path)
    coco(tmp_path / "instances.json")
    options = {"polygon_glob": "instances.json", "region_names": "spiegel:mirror, TV : art"}
    found = read(tmp_path, **options)
    assert found.region is not None and "labels_unknown" not in found.meta
    np.testing.assert_array_equal(found.region, NUMBERS)
    assert errors(found, MIRROR, 1) < 1e-3
    half = read(tmp_path, **(options | {"region_names": "tv:art"}))
    assert half.meta["labels_unknown"] == {"Spiegel": 1}


def palette(numbers: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers, "P")
    image.putpalette([40, 40, 40, 255, 0, 0, 0, 0, 255] + [0] * (253 * 3))
    return image


COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)


@pytest.mark.parametrize(
    ("name", "image", "names"),
    [
        ("r.png", Image.fromarray(NUMBERS), "1:mirror,2:art"),
        ("r.png", Image.fromarray(NUMBERS.astype(np.uint16)), "1:mirror,2:art"),
        ("r.png", palette(NUMBERS), "1:mirror,2:art"),
        ("r.png", palette(NUMBERS), "#ff0000:mirror,#0000FF:art"),
        ("r.png", Image.fromarray(COLOURS[NUMBERS]), "#ff0000:mirror,#0000ff:art"),
        ("r.png", Image.fromarray(np.stack([NUMBERS] * 3, axis=-1)), "1:mirror,2:art"),
        ("r.png", Image.fromarray(NUMBERS * 100), "90-110:mirror,200-255:art"),
        ("r.jpg", Image.fromarray(NUMBERS * 120), "0-40:background,80-160:mirror,200-255:art"),
        ("r.tif", Image.fromarray(NUMBERS.astype(np.int32)), "1:mirror,2:art"),
    ],
)
def test_maps_of_every_kind_give_the_same_regions(
    name: str, image: Image.Image, names: str, tmp_path: Path
) -> None:
    options = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}
    image.save(tmp_path / name, **options)
    labels = read_labels_of_map(str(tmp_path / name), "x", parse_names(names))
    same = labels.region == NUMBERS
    assert same.mean() > (0.97 if name.endswith("jpg") else 0.999)
    assert same.all() or name.endswith("jpg")


def test_what_a_map_has_besides_is_told_and_colours_without_names_are_refused(
    tmp_path: Path,
) -> None:
    place = str(tmp_path / "r.png")
    Image.fromarray(COLOURS[NUMBERS]).save(place)
    labels = read_labels_of_map(place, "x", parse_names("#ff0000:mirror"))
    assert labels.unknown == {"#0000ff": int((NUMBERS == 2).sum())}
    with pytest.raises(
        BadFrame, match=r"regions are colours: .*r\.png: .* #(ff0000|0000ff):mirror"
    ):
        read_labels_of_map(place, "x", parse_names("1:mirror"))
    Image.fromarray(NUMBERS).save(place)
    labels = read_labels_of_map(place, "x", parse_names("1:mirror"))
    assert labels.unknown == {"2": int((NUMBERS == 2).sum())}


def test_maps_have_planes_where_they_are_wanted_one_for_each_area(tmp_path: Path) -> None:
    write(tmp_path)
    numbers = NUMBERS.copy()
    numbers[5:10, 2:12] = 2
    Image.fromarray(numbers).save(tmp_path / "r.tif")
    options = {"region_glob": "r.tif"}
    assert read(tmp_path, **options).things is None
    found = read(tmp_path, **options, planes="fit")
    assert found.things is not None and found.things.planes.shape == (3, 3)
    assert errors(found, MIRROR, 1) < 1e-3 and errors(found, POSTER, 1.05) < 1e-3


def test_pieces_that_something_cuts_off_a_mirror_have_no_plane_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The leg of a chair before its edge: around the piece is the leg."""
    z = depth()
    leg = inside((37, 10, 39, 40))
    z[leg] = 0.7
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw", z)
    numbers = np.where(leg | inside((39, 12, 40, 25)), 0, NUMBERS).astype(np.uint8)
    Image.fromarray(numbers).save(tmp_path / "raw" / "r.tif")
    own = reader(tmp_path / "raw", region_glob="r.tif", planes="fit", bad_planes="skip")
    summary = pack(own, tmp_path / "set", workers=1)
    assert summary.things.planes == 2 and summary.things.without == 0
    with ShardSet.open(tmp_path / "set") as shards:
        depth_m, raw = shards.frame(0).depth_m, shards.read(0)
    assert errors(raw, (20, 15, 37, 35), 1) < 1e-3
    assert np.isnan(depth_m[inside((39, 25, 40, 35))]).all()
    assert "no truth" not in capsys.readouterr().err


def test_labels_of_the_images_size_are_brought_to_that_of_the_depth(tmp_path: Path) -> None:
    size = (3 * WIDTH, 3 * HEIGHT)
    write(tmp_path, size=size)
    large = [
        outline(one.label, tuple(3 * value for value in box))
        for one, box in zip(OUTLINES, (MIRROR, POSTER), strict=True)
    ]
    labelme(tmp_path, *large, size=size)
    found = read(tmp_path, polygon_glob="*.json", resize_images=True)
    np.testing.assert_array_equal(found.region, NUMBERS)
    (tmp_path / "1.json").unlink()
    Image.fromarray(np.kron(NUMBERS, np.ones((3, 3), np.uint8))).save(tmp_path / "r.tif")
    found = read(tmp_path, region_glob="r.tif", resize_images=True)
    np.testing.assert_array_equal(found.region, NUMBERS)


def test_an_empty_map_says_that_nothing_is_there(tmp_path: Path) -> None:
    write(tmp_path / "raw")
    Image.fromarray(0 * NUMBERS).save(tmp_path / "raw" / "r.tif")
    pack(reader(tmp_path / "raw", region_glob="r.tif", planes="fit"), tmp_path / "set", workers=1)
    with ShardSet.open(tmp_path / "set") as shards:
        frame = shards.frame(0)
    assert frame.region is not None and not frame.region.any() and frame.behind_m is None


def lonely(raw: Path) -> None:
    """A mirror in the void: no plane around it."""
    write(raw, np.where(inside(MIRROR) | inside(POSTER), depth(), np.nan))
    labelme(raw)


def test_a_thing_without_a_plane_has_no_truth_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely(tmp_path / "raw")
    labelme(tmp_path / "raw", *OUTLINES, outline("cat", (0, 0, 9, 9)))
    summary = pack(reader(tmp_path / "raw", polygon_glob="*.json"), tmp_path / "set", workers=1)
    said = capsys.readouterr().err
    assert "no truth at a flat thing of 1: mirror 1: too little is known around it" in said
    assert "labels that are not understood, in so many frames: cat (1)" in said
    assert (summary.things.planes, summary.things.without) == (1, 1)
    assert re.search(
        r"flat things +1 with planes, median residual 0\.\d\d%; 1 without", str(summary)
    )
    with ShardSet.open(tmp_path / "set") as shards:
        frame = shards.frame(0)
    assert np.isnan(frame.depth_m[inside(MIRROR)]).all()
    assert np.isfinite(frame.depth_m[inside(POSTER)]).all()
    assert frame.behind_m is not None and np.isfinite(frame.behind_m[inside(MIRROR)]).all()
    again = pack(reader(tmp_path / "raw", polygon_glob="*.json"), tmp_path / "set", workers=1)
    assert again.already_complete and "flat things" not in str(again)


def test_or_costs_the_frame(tmp_path: Path) -> None:
    lonely(tmp_path)
    with pytest.raises(BadFrame, match="plane of a flat thing not known: thing 1: too little"):
        read(tmp_path, polygon_glob="*.json", bad_planes="skip")


def test_planes_of_files_are_in_the_units_of_the_depth(tmp_path: Path) -> None:
    """A plane n . X = d of Mirror3D, in mm, scaled at will; its instances may touch."""
    write(tmp_path)
    np.save(tmp_path / "1.npy", (1000 * depth()).round().astype(np.uint16))
    numbers = np.where(inside((30, 15, 40, 35)), 7, NUMBERS).astype(np.uint16)
    Image.fromarray(numbers).save(tmp_path / "r.tif")
    planes = [
        {"plane": [*(k * m * 1e-3), -k], "mask_id": mask_id}
        for mask_id, m, k in ((1, WALL, 0.9), (7, 2 * WALL, -5.0))
    ]
    (tmp_path / "1.json").write_text(json.dumps(planes))
    own = FolderReader(
        str(tmp_path),
        "*.png",
        "*.npy",
        0.001,
        region_glob="r.tif",
        region_names="1-255:mirror",
        planes="file",
        plane_glob="*.json",
        intrinsics=(FOCAL, FOCAL, CX, CY),
        half_pixel_centres=True,
    )
    (item,) = own.list().items
    found = own.read(item)
    assert errors(found, (20, 15, 30, 35), 1) < 1e-9
    assert errors(found, (30, 15, 40, 35), 2) < 1e-9
    assert found.meta["things"][2]["trouble"] == "the file has 0 planes for mask_id 2"  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region_glob": "r.tif", "polygon_glob": "*.json"}, "both given"),
        ({"planes": "fit"}, "planes: fit needs the labels of region_glob or polygon_glob"),
        ({"region_glob": "r.tif", "planes": "file"}, "planes and plane_glob: expected file and a"),
        ({"region_glob": "r.tif", "plane_glob": "*.json"}, "planes and plane_glob: expected file"),
        ({"polygon_glob": "*/*.json"}, "polygon_glob: expected at most the 1 runs of wildcards"),
        ({"region_glob": "r.tif", "region_names": "wall mirror:mirror"}, "labels are for the outl"),
        ({"polygon_glob": "*.json", "region_names": "9-3:mirror"}, "region_names: expected"),
        ({"polygon_glob": "*.json", "region_names": "tv"}, "region_names: expected"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        reader(tmp_path, **options)


def test_labels_for_none_of_the_frames_or_of_no_meaning_are_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"\*\.json has labels of none of the 1 frames"):
        read(tmp_path, polygon_glob="*.json")
    coco(tmp_path / "all.json")
    with pytest.warns(UserWarning, match=r"understood \(Spiegel, tv\); .*--region_names 'Spiegel'"):
        read(tmp_path, polygon_glob="all.json")
    (tmp_path / "all.json").write_text((tmp_path / "all.json").read_text().replace("x/1", "x/2"))
    with pytest.raises(UserError, match=r"all\.json has labels of none of the 1 frames"):
        read(tmp_path, polygon_glob="all.json")


def test_the_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw")
    coco(tmp_path / "raw" / "all.json")
    command = [
        *("folder", "--raw", str(tmp_path / "raw"), "--image_glob=*.png", "--depth_glob=*.npy"),
        *("--depth_scale=1", f"--intrinsics={FOCAL},{FOCAL},{CX},{CY}", "--workers=1"),
        *("--polygon_glob=all.json", "--region_names", "Spiegel:mirror,tv:art"),
        *("--out", str(tmp_path / "set")),
    ]
    assert tool.main(command) == 0
    assert "2 with planes" in capsys.readouterr().out
    with ShardSet.open(tmp_path / "set") as shards:
        assert shards.frame(0).region is not None
        assert {Region.MIRROR, Region.ART} <= set(np.unique(shards.frame(0).region).tolist())
