"""The marker: planes of a room that is known, files of others, strangers' requests, a browser."""

import base64
import dataclasses
import http.client
import io
import json
import math
import os
import re
import signal
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from flatdepth.commands.label import main
from flatdepth.data.polygons import Outline, read_labelme
from flatdepth.data.things import fit_thing
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import pixel_rays
from flatdepth.label.outline_file import OutlineFile, Refused, Shape
from flatdepth.label.planes import examine
from flatdepth.label.server import MOST_BYTES, LabelServer
from flatdepth.label.session import Session
from flatdepth.predict.inputs import open_photo
from flatdepth.predict.predictor import PredictOptions, predict_photo
from tests.browser import Browser, until
from tests.test_report import HOSTILE

HEIGHT, WIDTH, FOV_DEG = 210, 280, 60.0
FOCAL_PX = WIDTH / 2 / math.tan(math.radians(FOV_DEG) / 2)
K_PX = np.array([[FOCAL_PX, 0, WIDTH / 2], [0, FOCAL_PX, HEIGHT / 2], [0, 0, 1]])
WALL = np.array([0.2, 0.02, 0.4])
LEFT, TOP, RIGHT, BOTTOM = 84, 63, 196, 147
BOX = np.array([[LEFT, TOP], [RIGHT, TOP], [RIGHT, BOTTOM], [LEFT, BOTTOM]], np.float64)
CPU = torch.device("cpu")


class Room:
    """A network that sees a wall, and in a box on it a scene twice as far, whatever it is given."""

    needs_focal = False
    multiple = 14
    side = HEIGHT

    def __init__(self, kind: str = "metric") -> None:
        self.kind = kind

    def reach_m(self, focal_px: float) -> float:
        del focal_px
        return 20.0

    def __call__(self, image: Tensor, focal_px: Tensor | None = None) -> Tensor:
        del focal_px
        height, width = image.shape[-2:]
        v, u = np.mgrid[:height, :width] + 0.5
        u, v = u * WIDTH / width, v * HEIGHT / height
        inverse = pixel_rays(K_PX, u, v) @ WALL
        inverse[(u > LEFT) & (u < RIGHT) & (v > TOP) & (v < BOTTOM)] /= 2
        values = inverse if self.kind == "relative" else 1 / inverse
        return torch.from_numpy(values).float().expand(len(image), 1, -1, -1)


def photo(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (150, 140, 130)).save(path, **options)
    return path


def session(folder: Path, kind: str = "metric") -> Session:
    options = PredictOptions(fov_deg=FOV_DEG, unusual_camera=True)
    return Session(folder, Room(kind), options, CPU)


def shape(label: str = "mirror", corners: np.ndarray = BOX, key: str = "new 1") -> Shape:
    return Shape(key=key, label=label, corners=corners)


# Planes.


def test_the_plane_is_fit_things_own_of_the_predicted_depth(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    found = session(tmp_path).planes(0, [shape()])
    (thing,) = found.things
    options = PredictOptions(fov_deg=FOV_DEG)
    predicted = predict_photo(Room(), open_photo(path), options, CPU).values
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[TOP:BOTTOM, LEFT:RIGHT] = True
    expected = fit_thing(predicted, K_PX, inside, np.zeros_like(inside))
    assert thing.fit is not None and expected is not None and thing.trouble is None
    np.testing.assert_allclose(thing.fit.m, expected.m, rtol=1e-5)
    np.testing.assert_allclose(thing.fit.m, WALL, atol=2e-4)
    assert thing.fit.residual == pytest.approx(expected.residual, abs=1e-6)
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    wall = 1 / (pixel_rays(K_PX, u, v) @ WALL)
    np.testing.assert_allclose(found.planed[inside], wall[inside], rtol=1e-3)
    np.testing.assert_array_equal(found.planed[~inside], predicted[~inside])


def test_distance_tilt_and_illusion_are_those_of_the_room(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (thing,) = session(tmp_path).planes(0, [shape()]).things
    (middle,) = pixel_rays(K_PX, *BOX.mean(axis=0)[:, None])
    assert thing.distance == pytest.approx(1 / (middle @ WALL), rel=1e-3)
    slope = math.hypot(WALL[0], WALL[1]) / WALL[2]
    assert thing.tilt_deg == pytest.approx(math.degrees(math.atan(slope)), abs=0.05)
    assert thing.excess == pytest.approx(1, abs=0.01), "seen twice as far"


@pytest.mark.parametrize(
    "plane, side",
    [([0.2, 0.02, 0.4], "above"), ([0.01, 0.3, 0.2], "the side"), ([0.01, -0.02, 0.5], "above")],
)
def test_in_section_the_plane_is_a_line(plane: list[float], side: str) -> None:
    m = np.array(plane)
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inverse = pixel_rays(K_PX, u, v) @ m
    depth_m = np.where(inverse > 0.02, 1 / np.maximum(inverse, 0.02), np.nan).astype(np.float32)
    box = BOX + np.array([0, 40 * (side == "the side")])
    depth_m[int(box[0, 1]) : int(box[2, 1]), LEFT:RIGHT] *= 2
    depth_m[:, 200:203] *= 3
    ((thing,), _) = examine(depth_m, K_PX, [Outline(label="mirror", parts=(box,))])
    section = thing.section
    assert section is not None and section.seen_from == side
    frontal = math.hypot(m[0], m[1]) < 0.1 * np.linalg.norm(m)
    sideways = 0 if frontal else math.hypot(m[0], m[1])
    law = np.array([sideways, m[2]])
    slack = 0.03 if frontal else 1e-3
    assert len(section.on_plane) > 100 and len(section.seen) > 100 and len(section.off_plane) > 0
    np.testing.assert_allclose(section.on_plane @ law, 1, atol=slack)
    np.testing.assert_allclose(section.thing @ law, 1, atol=slack)
    np.testing.assert_allclose(section.seen @ law, 2, atol=2 * slack)
    np.testing.assert_allclose(section.off_plane @ law, 3, atol=3 * slack)


def test_full_size_outlines_of_a_large_photograph_give_the_same_plane(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", (12 * WIDTH, 12 * HEIGHT), quality=30)
    large = session(tmp_path)
    document = large.document(0)
    assert (document.width, document.height) == (12 * WIDTH, 12 * HEIGHT)
    (thing,) = large.planes(0, [shape(corners=12 * BOX)]).things
    assert thing.fit is not None
    np.testing.assert_allclose(thing.fit.m, WALL, atol=2e-3)  # the network blurs the box's rim
    shown = tmp_path / "shown"
    shown.write_bytes(large.shown(0))
    with Image.open(shown) as image:
        assert max(image.size) == 2000 and image.height == 1500


def test_a_sideways_photograph_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20] = 255  # above as it is stored, on the right when upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = session(tmp_path)
    assert (turned.document(0).width, turned.document(0).height) == (40, 60)
    shown = tmp_path / "shown"
    shown.write_bytes(turned.shown(0))
    with Image.open(shown) as image:
        assert image.size == (40, 60)
        assert image.getpixel((35, 30)) == (255, 255, 255) and image.getpixel((5, 30)) == (0, 0, 0)


def test_depth_that_is_relative_gives_flat_things_without_metres(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    found = session(tmp_path, "relative").planes(0, [shape()])
    (thing,) = found.things
    assert not found.metric and thing.trouble is None and thing.fit is not None
    assert thing.fit.m / np.linalg.norm(thing.fit.m) == pytest.approx(
        WALL / np.linalg.norm(WALL), abs=1e-3
    )
    with pytest.raises(UserError, match="planes are not flat"):
        session(tmp_path, "affine")


def test_what_says_nothing_of_a_thing_is_in_its_place_or_hidden(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    drawn = [
        shape("frame", np.where(BOX.mean(axis=0) < BOX, BOX + 9, BOX - 9)),
        shape("cat", BOX / 4),
        shape("mirror", BOX),
        shape("screen", BOX / 8 + 100),
        shape("object", BOX / 8 + 100),
    ]
    shapes = [dataclasses.replace(one, key=f"new {n}") for n, one in enumerate(drawn)]
    things = session(tmp_path).planes(0, shapes).things
    assert [one.place for one in things] == [2, 3]
    assert things[0].trouble is None
    assert things[1].trouble == "nothing of it is seen"


def test_what_others_drew_counts_as_in_packing(tmp_path: Path) -> None:
    """Two halves of one group are one mirror; a circle and a mask hang on the bare wall."""
    middle = (LEFT + RIGHT) / 2
    halves = [
        np.clip(BOX, (low, 0), (high, HEIGHT)) for low, high in ((0, middle), (middle, WIDTH))
    ]
    patch = io.BytesIO()
    Image.new("L", (30, 20), 255).save(patch, "PNG")
    mask = base64.b64encode(patch.getvalue()).decode()
    shapes = [
        {"label": "mirror", "points": halves[0].tolist(), "group_id": 5},
        {"label": "mirror", "points": [[1, 1]], "shape_type": "point"},
        {"label": "mirror", "points": halves[1].tolist(), "group_id": 5},
        {"label": "tv", "points": halves[1].tolist(), "group_id": 5},
        {"label": "screen", "points": [[35, 35], [35, 50]], "shape_type": "circle"},
        {"label": "poster", "points": [[20, 170], [49, 189]], "shape_type": "mask", "mask": mask},
    ]
    photo(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(
        json.dumps({"shapes": shapes, "imageWidth": WIDTH, "imageHeight": HEIGHT})
    )
    found = session(tmp_path)
    document = found.document(0)
    assert [one.corners is None for one in document.shapes] == [
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    things = found.planes(0, document.shapes).things
    assert [one.place for one in things] == [0, 4, 5]
    for thing, excess in zip(things, (1, 0, 0), strict=True):
        assert thing.fit is not None and thing.trouble is None
        np.testing.assert_allclose(thing.fit.m, WALL, atol=2e-3)
        assert thing.excess == pytest.approx(excess, abs=0.01)
    (state,) = found.states()
    assert (state.outlines, state.things) == (3, 3)


# Files.

FOREIGN_FIELDS: dict[str, Any] = {
    "version": "4.0",
    "flags": {"indoor": True},
    "lineColor": [0, 255, 0, 128],
    "shapes": [
        {"label": "ball", "points": [[9, 9], [12, 9]], "shape_type": "circle", "flags": {}},
        {
            "label": "mirror",
            "points": [[10, 9], [30, 50]],
            "shape_type": "rectangle",
            "group_id": 7,
            "flags": {"sure": False},
            "description": "ünusual",
        },
        {"label": "tv", "points": BOX.tolist(), "group_id": 12345678901234567890},
    ],
    "imagePath": "..\\a.png",
    "imageData": "QUJD",
    "imageHeight": HEIGHT,
    "imageWidth": WIDTH,
}


def outlines_of(path: Path) -> OutlineFile:
    return OutlineFile(path, WIDTH, HEIGHT)


def test_outlines_come_back_from_the_file(tmp_path: Path) -> None:
    path = photo(tmp_path / "deep" / "a.png")
    first = session(tmp_path)
    assert first.document(0).digest is None and first.labelled() == 0
    drawn = [shape("mirror", BOX + 0.25), shape("opening", BOX / 3, key="new 2")]
    digest = first.save(0, drawn, None)
    payload = path.with_suffix(".json").read_bytes()
    for one, other in zip(read_labelme(payload, WIDTH, HEIGHT), drawn, strict=True):
        assert one.label == other.label
        np.testing.assert_array_equal(one.parts[0], other.corners)
    assert json.loads(payload)["imagePath"] == "a.png"
    again = session(tmp_path).document(0)
    assert again.digest == digest and again.trouble is None
    assert [one.label for one in again.shapes] == ["mirror", "opening"]
    (state,) = first.states()
    assert (state.name, state.outlines, state.things) == ("deep/a.png", 2, 1)
    assert first.labelled() == 1


def test_what_others_wrote_into_the_file_stays(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(FOREIGN_FIELDS))
    file = outlines_of(path)
    shapes, digest = file.read()
    assert [one.corners is None for one in shapes] == [True, False, False]
    ball, mirror, tv = shapes
    moved = shape("screen", BOX + 1, key=tv.key)
    digest = file.save([mirror, ball, moved, shape()], digest)
    about = json.loads(beside.read_bytes())
    ours = {name: value for name, value in about.items() if name != "shapes"}
    assert ours == {name: value for name, value in FOREIGN_FIELDS.items() if name != "shapes"}
    was = FOREIGN_FIELDS["shapes"]
    assert about["shapes"][:2] == [was[1], was[0]], "as they were, the rectangle a rectangle"
    changed = {"label": "screen", "points": (BOX + 1).tolist(), "shape_type": "polygon"}
    assert about["shapes"][2] == was[2] | changed
    assert about["shapes"][3]["label"] == "mirror"

    file.save([ball, shape("mirror", BOX, key=mirror.key)], digest)
    (_, turned) = json.loads(beside.read_bytes())["shapes"]
    assert turned == was[1] | {"points": BOX.tolist(), "shape_type": "polygon"}


def test_a_removed_outline_that_is_undone_is_whole_again(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    path.with_suffix(".json").write_text(json.dumps(FOREIGN_FIELDS))
    file = outlines_of(path)
    shapes, digest = file.read()
    digest = file.save(shapes[:1], digest)
    file.save(shapes, digest)
    assert json.loads(path.with_suffix(".json").read_bytes()) == FOREIGN_FIELDS


@pytest.mark.parametrize(
    "payload",
    [b"", b"no json", b"[]", b'{"a": 1}', b'{"shapes": [{"label": "a", "points": 1}]}',
     json.dumps(FOREIGN_FIELDS | {"imageWidth": WIDTH + 1}).encode()],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_never_written(tmp_path: Path, payload: bytes) -> None:
    path = photo(tmp_path / "a.png")
    beside = path.with_suffix(".json")
    beside.write_bytes(payload)
    other = session(tmp_path)
    document = other.document(0)
    assert document.trouble is not None and "a.json: expected a LabelMe file" in document.trouble
    assert document.digest is None and not document.shapes
    with pytest.raises(Refused, match="changed it meanwhile"):
        other.save(0, [shape()], document.digest)
    assert beside.read_bytes() == payload
    if b"imageWidth" not in payload:
        assert "expected a LabelMe file" in str(other.states()[0].trouble)

    (tmp_path / "a.json.1.bak").write_bytes(b"taken")
    assert other.set_aside(0) == "a.json.2.bak"
    assert other.save(0, [shape()], None) == other.document(0).digest
    assert (tmp_path / "a.json.2.bak").read_bytes() == payload
    assert (tmp_path / "a.json.1.bak").read_bytes() == b"taken"


def test_a_file_that_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    beside = path.with_suffix(".json")
    file = outlines_of(path)
    digest = file.save([shape()], None)
    theirs = beside.read_bytes().replace(b"mirror", b"screen")
    beside.write_bytes(theirs)
    for known in (digest, None):
        with pytest.raises(Refused, match="another program changed it meanwhile"):
            file.save([shape("picture")], known)
    assert beside.read_bytes() == theirs
    beside.unlink()
    with pytest.raises(Refused, match="changed it meanwhile"):
        file.save([shape("picture")], digest)
    assert not beside.exists()
    assert file.save([], None) is None and not beside.exists(), "nothing to write"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path / "a.png")
    file = outlines_of(path)
    digest = file.save([shape()], None)
    before = path.with_suffix(".json").read_bytes()

    def fail(self: Path, target: Path) -> None:
        assert target == path.with_suffix(".json")
        assert len(self.read_bytes()) > len(before), "it is written before it is renamed"
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            file.save([shape(), shape(key="new 2")], digest)
    assert path.with_suffix(".json").read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_two_photographs_do_not_share_a_file(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        photo(tmp_path / name)
    both = session(tmp_path)
    both.save(0, [shape()], None)
    assert both.document(0).trouble is None
    assert "in the file of a.jpg" in str(both.document(1).trouble)
    for refused in (lambda: both.save(1, [shape()], None), lambda: both.set_aside(1)):
        with pytest.raises(Refused, match="rename one"):
            refused()
    assert both.labelled() == 1


def test_links_lead_nowhere(tmp_path: Path) -> None:
    outside = photo(tmp_path / "outside" / "b.png")
    folder = tmp_path / "photos"
    photo(folder / "a.png")
    (folder / "b.png").symlink_to(outside)
    (folder / "a.json").symlink_to(tmp_path / "outside" / "a.json")
    linked = session(folder)
    assert linked.names == ["a.png"]
    assert "it is a link" in str(linked.document(0).trouble)
    with pytest.raises(Refused, match="it is a link"):
        linked.save(0, [shape()], None)
    assert sorted(one.name for one in (tmp_path / "outside").iterdir()) == ["b.png"]


def test_a_damaged_photograph_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    broken = session(tmp_path)
    for ask in (broken.shown, broken.document, broken.depth):
        with pytest.raises(BadFrame):
            ask(0)


# The server.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    photo(tmp_path / "photos" / "a.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "photos" / "notes.json").write_bytes(b"secret")
    with LabelServer(session(tmp_path / "photos"), note=HOSTILE) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Connection(http.client.HTTPConnection):
    """Sends a path as its bytes are, where Python's own takes ASCII only."""

    def _encode_request(self, request: str) -> bytes:
        return request.encode("latin-1")


def ask(
    server: LabelServer,
    path: str,
    body: bytes | None = None,
    method: str | None = None,
    token: str | None = None,
    **headers: str,
) -> tuple[int, bytes]:
    """Status and content of an answer; ``path`` is below the token."""
    connection = Connection("127.0.0.1", server.server_port, timeout=30)
    fields = {"Host": f"127.0.0.1:{server.server_port}"}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    how = method or ("GET" if body is None else "POST")
    connection.putrequest(
        how, f"/{token or server.token}/{path}", skip_host=True, skip_accept_encoding=True
    )
    for name, value in fields.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def sent(*labels: str, digest: str | None = None) -> bytes:
    shapes = [
        {"key": f"new {name}", "label": name, "kind": "polygon", "corners": BOX.tolist()}
        for name in labels
    ]
    return json.dumps({"shapes": shapes, "digest": digest}).encode()


def test_the_server_is_on_this_machine_alone(server: LabelServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url.startswith("http://127.0.0.1:") and len(server.token) >= 32
    with LabelServer(server.session) as other:
        assert other.token != server.token


def test_its_page_is_answered_with_its_parts(server: LabelServer) -> None:
    status, page = ask(server, "")
    assert status == 200 and page.startswith(b"<!doctype html>")
    assert HOSTILE.encode() not in page, "escaped"
    status, states = ask(server, "photos")
    assert status == 200 and json.loads(states)[0]["name"] == "a.png"
    assert ask(server, "photos/0/image")[1][:2] == b"\xff\xd8"
    assert ask(server, "photos/0/depth")[1][8:12] == b"WEBP"
    status, planes = ask(server, "photos/0/planes", sent("mirror"))
    (thing,) = json.loads(planes)["things"]
    assert status == 200 and thing["trouble"] is None and thing["excess"] == pytest.approx(1, 0.02)
    status, saved = ask(server, "photos/0", sent("mirror"))
    assert status == 200
    status, document = ask(server, "photos/0")
    assert json.loads(document)["digest"] == json.loads(saved)["digest"]
    status, refused = ask(server, "photos/0", sent("screen"))
    assert status == 409 and "changed it meanwhile" in json.loads(refused)["error"]
    status, aside = ask(server, "photos/0/aside", b"{}")
    assert status == 200 and json.loads(aside) == {"name": "a.json.1.bak"}


@pytest.mark.parametrize("path", ["", "photos", "photos/0", "photos/0/image"])
def test_strangers_are_refused(server: LabelServer, path: str) -> None:
    assert ask(server, path)[0] == 200
    for changed in (
        {"token": "x" * len(server.token)},
        {"token": server.token[:-1]},
        {"token": "\xe9"},
        {"Host": "evil.example"},
        {"Host": f"evil.example:{server.server_port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ):
        status, answer = ask(server, path, **changed)
        assert status == 403 and server.token.encode() not in answer, changed


def test_other_pages_save_nothing(server: LabelServer, tmp_path: Path) -> None:
    own = f"http://127.0.0.1:{server.server_port}"
    for headers, expected in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": own, "Content_Type": "text/plain"}, 415),
        ({"Origin": own, "token": "y" * 32}, 403),
    ):
        assert ask(server, "photos/0", sent("mirror"), **headers)[0] == expected
        assert not (tmp_path / "photos" / "a.json").exists()
    assert ask(server, "photos/0", sent("mirror"), Origin=own)[0] == 200
    assert (tmp_path / "photos" / "a.json").exists()


@pytest.mark.parametrize(
    "path",
    [
        "photos/1",
        "photos/-1",
        "photos/a.png",
        "photos/0/../../notes.json",
        "../secret.png",
        "..%2fsecret.png",
        "photos/%2e%2e/secret.png",
        "photos//etc/passwd",
        "notes.json",
        "photos/0/image/",
        "photos/٠",
        "photos/99999999999999999999",
    ],
)
def test_nothing_else_can_be_read_or_written(
    server: LabelServer, tmp_path: Path, path: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    path = path.encode().decode("latin-1")
    for body in (None, sent("mirror")):
        status, answer = ask(server, path, body)
        assert status in (400, 404) and b"secret" not in answer
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_sent_is_bounded_and_checked(server: LabelServer, tmp_path: Path) -> None:
    assert ask(server, "photos/0", b"{}", Content_Length=str(MOST_BYTES + 1))[0] == 413
    assert ask(server, "photos/0", b"{}", Content_Length="-1")[0] == 411
    assert ask(server, "photos/0", b"{}", Content_Length="9" * 30)[0] == 411
    assert ask(server, "photos/0/image", b"{}")[0] == 405
    assert ask(server, "photos/0/planes")[0] == 405
    good = json.loads(sent("mirror"))
    for changed in (
        {"corners": [[0, 0], [1, 1]]},
        {"corners": [[0, 0], [1, 1], [2]]},
        {"corners": [[0, 0], [1, 1], [2, 1e300]]},
        {"corners": [[0, 0], [1, 1], [2, float("nan")]]},
        {"corners": "abc"},
        {"corners": None},
        {"label": " "},
        {"label": "x" * 999},
    ):
        body = json.dumps(good | {"shapes": [good["shapes"][0] | changed]}).encode()
        assert ask(server, "photos/0", body)[0] == 400, changed
    for body in (b"", b"[", b"[]", b"null", b'{"shapes": 1, "digest": null}', b"[" * 99999):
        assert ask(server, "photos/0", body)[0] == 400, body[:9]
    assert not (tmp_path / "photos" / "a.json").exists()


# The command.


def test_mistakes_are_one_sentence(tmp_path: Path, server: LabelServer) -> None:
    weights = ["--no_browser", "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected a folder with pictures"):
        main([str(tmp_path / "empty"), *weights])
    with pytest.raises(UserError, match=r"nowhere: expected a folder with photographs"):
        main([str(tmp_path / "nowhere"), *weights])
    with pytest.raises(UserError, match=rf"--port: {server.server_port} cannot be had"):
        main([str(tmp_path / "photos"), *weights, "--port", str(server.server_port)])
    with pytest.raises(UserError, match=r"secret\.png"):
        main([str(tmp_path / "photos"), *weights, "--model", str(tmp_path / "secret.png")])
    with pytest.raises(UserError, match="--fov_deg"):
        main([str(tmp_path / "photos"), *weights, "--fov_deg", "180"])


def test_ctrl_c_ends_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    outlines_of(path).save([shape()], None)
    opened: list[str] = []

    def press(url: str) -> bool:
        opened.append(url)
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(webbrowser, "open", press)
    main([str(tmp_path), "--device", "cpu", "--fov_deg", "70"])
    out, err = capsys.readouterr()
    assert opened == re.findall(r"http://127\.0\.0\.1:\d+/[\w-]{32,}/", out)
    assert "1 of 2 photographs have outlines" in out
    assert f"flatdepth pack photos --raw {tmp_path} --teacher WEIGHTS" in out
    assert (
        "--polygon_glob '**/*.json' --fov_deg 70.0 --out SET\n" in out and "official weights" in err
    )


# The page.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


READY = "doc && doc.things && !doc.waiting && !saves"


def visit(browser: Browser, server: LabelServer) -> None:
    browser.open("about:blank")
    browser.open(server.url)
    until(browser, READY)


def place(browser: Browser, u: float, v: float) -> tuple[float, float]:
    """Where a pixel of the photograph is in the window."""
    box = "document.querySelector('#photo').getBoundingClientRect()"
    left, top, width = browser.run(f"(b => [b.x, b.y, b.width])({box})")
    return left + u * width / WIDTH, top + v * width / WIDTH


def mouse(browser: Browser, *path: tuple[float, float]) -> None:
    """Press at the first pixel of the photograph, move, release at the last."""
    where = [place(browser, *one) for one in path]
    kinds = ["mousePressed", *["mouseMoved"] * (len(where) - 1), "mouseReleased"]
    for kind, (x, y) in zip(kinds, [*where, where[-1]], strict=True):
        held = int(kind != "mouseReleased")
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=held,
                     clickCount=1)  # fmt: skip


def press(browser: Browser, key: str, code: int, control: bool = False, alt: bool = False) -> None:
    browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key=key, code=key,
                 windowsVirtualKeyCode=code, modifiers=2 * control + alt)  # fmt: skip
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key,
                 windowsVirtualKeyCode=code)  # fmt: skip


def saved(server: LabelServer) -> list[tuple[str, UInt8[np.ndarray, "n 2"] | Any]]:
    path = server.session.photos[0].with_suffix(".json")
    return [(one.label, one.parts[0]) for one in read_labelme(path.read_bytes(), WIDTH, HEIGHT)]


TEXT = "document.querySelector('#things').innerText"


def test_a_mirror_is_drawn_fitted_saved_and_there_again(
    browser: Browser, server: LabelServer
) -> None:
    visit(browser, server)
    for corner in BOX[:3]:
        mouse(browser, tuple(corner))
    mouse(browser, (10, 10))  # one too many
    press(browser, "Backspace", 8)
    mouse(browser, tuple(BOX[3]))
    assert browser.run("open.length") == 4
    press(browser, "Enter", 13)
    until(browser, f"{READY} && doc.things.size === 1")
    text = browser.run(TEXT)
    ((label, corners),) = saved(server)
    assert label == "mirror"
    np.testing.assert_allclose(corners, BOX, atol=0.6)
    (thing,) = server.session.planes(0, [shape(corners=corners)]).things
    assert thing.fit is not None and thing.distance is not None and thing.tilt_deg is not None
    assert f"{thing.distance:.2f} m" in text and f"{thing.tilt_deg:.0f}°" in text
    assert f"{100 * thing.fit.residual:.1f} %" in text and "100 % farther" in text
    assert browser.run("document.querySelectorAll('.section circle.seen').length") > 100
    assert browser.run("document.querySelector('#photos').innerText.includes('1 thing')")

    browser.run("document.querySelector('[data-layer=planed]').click()")
    until(browser, "(i => !i.hidden && i.complete && i.naturalWidth)(find('#depth'))")
    visit(browser, server)
    until(browser, "doc.things.size === 1")
    assert browser.run("doc.shapes[0].corners") == corners.tolist()
    assert browser.run("document.querySelectorAll('#drawn g').length") == 1
    assert browser.complaints() == [] and browser.requests() <= {"http", "data", "about"}


def test_outlines_are_moved_relabelled_reordered_undone_and_removed(
    browser: Browser, server: LabelServer
) -> None:
    visit(browser, server)
    mouse(browser, (40, 40), (60, 60), (100, 90))
    until(browser, f"{READY} && doc.things.size === 1")
    np.testing.assert_allclose(
        saved(server)[0][1], [[40, 40], [100, 40], [100, 90], [40, 90]], atol=0.6
    )
    x, y = place(browser, 100, 90)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    press(browser, "Delete", 46, alt=True)
    until(browser, f"{READY} && doc.shapes[0].corners.length === 3")
    np.testing.assert_allclose(saved(server)[0][1], [[40, 40], [100, 40], [40, 90]], atol=0.6)
    press(browser, "4", 52)  # what is drawn next; the mirror stays one
    mouse(browser, (150, 40), (160, 60), (200, 90))
    until(browser, f"{READY} && doc.shapes.length === 2")
    assert [label for label, _ in saved(server)] == ["mirror", "frame"]
    press(browser, "v", 86)
    press(browser, "3", 51)
    press(browser, "[", 219)
    until(browser, f"{READY} && doc.shapes[0].label === 'screen'")
    assert [label for label, _ in saved(server)] == ["screen", "mirror"]

    before = saved(server)[0][1]
    by, further = np.array([10, 20]), np.array([20, 5])
    mouse(browser, (175, 65), (180, 70), (185, 85))
    until(browser, READY)
    np.testing.assert_allclose(saved(server)[0][1], before + by, atol=1)
    at = before[2] + by
    mouse(browser, tuple(at), tuple(at + 3), tuple(at + further))
    until(browser, READY)
    np.testing.assert_allclose(saved(server)[0][1][2], at + further, atol=1.2)
    mouse(browser, tuple(before[0] + by), (270, 205), (400, 400))
    until(browser, READY)
    np.testing.assert_array_equal(saved(server)[0][1][0], [WIDTH, HEIGHT])
    for _ in range(3):
        press(browser, "z", 90, control=True)
    until(browser, READY)
    np.testing.assert_array_equal(saved(server)[0][1], before)
    press(browser, "y", 89, control=True)
    until(browser, READY)
    np.testing.assert_allclose(saved(server)[0][1], before + by, atol=1)
    press(browser, "Delete", 46)
    until(browser, f"{READY} && doc.shapes.length === 1")
    assert [label for label, _ in saved(server)] == ["mirror"]
    assert browser.complaints() == []


def test_a_finger_draws_and_two_zoom(browser: Browser, server: LabelServer) -> None:
    visit(browser, server)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=fingers)

    for corner in (*BOX[:3], BOX[0]):
        touch("touchStart", place(browser, *corner))
        touch("touchEnd")
    until(browser, f"{READY} && doc.shapes.length === 1")
    np.testing.assert_allclose(saved(server)[0][1], BOX[:3], atol=0.6)
    scale = browser.run("view.scale")
    x, y = place(browser, 140, 100)
    touch("touchStart", (x - 50, y))
    touch("touchStart", (x - 50, y), (x + 50, y))
    touch("touchMove", (x - 100, y), (x + 100, y))
    touch("touchEnd")
    assert browser.run("view.scale") == pytest.approx(2 * scale, rel=0.02)
    assert place(browser, 140, 100) == pytest.approx((x, y), abs=2), "the middle stays"
    assert browser.run("doc.shapes.length") == 1 and browser.run("open.length") == 0
    assert browser.complaints() == []


def test_without_metres_none_are_told(browser: Browser, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    relative = session(tmp_path, "relative")
    relative.save(0, [shape()], None)
    with LabelServer(relative) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        visit(browser, server)
        browser.run("document.querySelector('#things .pick').click()")
        text = browser.run("document.querySelector('aside').innerText")
        server.shutdown()
    assert "a plane to 0" in text and "units are arbitrary" in text
    assert re.search(r"\d (m|°)\b|Distance|Turned", text) is None
    assert browser.complaints() == []


def test_a_file_changed_meanwhile_is_settled_by_a_choice(
    browser: Browser, server: LabelServer
) -> None:
    visit(browser, server)
    mouse(browser, (40, 40), (60, 60), (100, 90))
    until(browser, f"{READY} && doc.things.size === 1")
    path = server.session.photos[0].with_suffix(".json")
    theirs = path.read_bytes().replace(b"mirror", b"screen")
    path.write_bytes(theirs)
    press(browser, "v", 86)
    press(browser, "2", 50)
    until(browser, "!find('#banner').hidden")
    assert "another program changed it" in browser.run("find('#banner').innerText")
    assert path.read_bytes() == theirs
    browser.run("find('[data-do=aside]').click()")
    until(browser, f"{READY} && find('#banner').hidden")
    assert saved(server)[0][0] == "picture"
    assert path.with_name("a.json.1.bak").read_bytes() == theirs

    path.write_bytes(theirs)
    press(browser, "1", 49)
    until(browser, "!find('#banner').hidden")
    browser.run("find('[data-do=reload]').click()")
    until(browser, f"{READY} && find('#banner').hidden")
    assert browser.run("doc.shapes[0].label") == "screen" and path.read_bytes() == theirs


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1500])
def test_the_page_fits_and_everything_has_a_name(
    browser: Browser, server: LabelServer, scheme: str, width: int
) -> None:
    server.session.save(0, [shape(), shape("frame", BOX / 2, key="new 2")], None)
    browser.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
    try:
        visit(browser, server)
        until(browser, "doc.things.size === 1")
        browser.run("find('#things .pick').click()")
        assert browser.run("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert browser.run("find('#stage').clientHeight") > 300
        edges = "['#stage', 'aside'].map(name => find(name).getBoundingClientRect())"
        assert browser.run(f"(([a, b]) => a.right <= b.left + 1 || a.bottom <= b.top)({edges})")
        page = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (page == "rgb(255, 255, 255)") == (scheme == "light")
        browser.call("Accessibility.enable")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        names = [
            (node["role"]["value"], node["name"]["value"])
            for node in nodes
            if not node["ignored"]
            and node["role"]["value"] in {"button", "combobox", "slider", "image", "application"}
        ]
        assert len(names) > 20 and all(name.strip() for _, name in names), names
        assert browser.complaints() == []
    finally:
        browser.call("Accessibility.disable")
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])
