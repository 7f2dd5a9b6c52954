"""The marker's page for a browser on this machine, and nobody else.

The server listens on 127.0.0.1 and answers paths below a random token alone, to requests whose Host
is its own, so that no other page can reach it through a name of its choice (DNS rebinding), and to
POST from its own pages alone. Photographs are addressed by number, so no path leads anywhere else.
"""

import base64
import errno
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from flatdepth.data.polygons import NAMES
from flatdepth.errors import BadFrame, UserError
from flatdepth.label.outline_file import Refused, Shape
from flatdepth.label.planes import Section, Thing
from flatdepth.label.session import Planes, Session
from flatdepth.show.html import render_page
from flatdepth.show.pictures import REGION_COLOURS, colour_depth
from flatdepth.types import Region
from flatdepth.untrusted import parse_json

MOST_BYTES = 1 << 22
"""Of what a page may send; outlines of 255 things have some 100 kB."""
MOST_CORNERS = 10_000
LABELS: Mapping[str, tuple[str, Region]] = {
    "mirror": ("Mirror", Region.MIRROR),
    "picture": ("Picture", Region.ART),
    "screen": ("Screen", Region.ART),
    "frame": ("Frame", Region.FRAME),
    "opening": ("Opening", Region.DECOY),
    "object": ("Object in front", Region.BACKGROUND),
}
"""Label in the file -> its title on the page and what becomes of it."""
MEANINGS = {
    name: name if name in LABELS else next(own for own, (_, of) in LABELS.items() if of == kind)
    for name, kind in NAMES.items()
}
"""Every label that is understood -> the one of ``LABELS`` that means the same."""
_PHOTO = re.compile(r"photos/([0-9]{1,7})(?:/(image|depth|planes|aside))?")
_OBJECT_COLOUR = (150, 156, 164)
_POLICY = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""Besides that of the page itself, which allows what it loads."""
_RAMP = np.linspace(1, 2, 17, dtype=np.float32)[None]


class _Failure(Exception):
    """A request that is not served, and the sentence that says why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class LabelServer(ThreadingHTTPServer):
    """Serves a session; ``url`` is where its page is."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0, note: str = "") -> None:
        """
        Args:
            port: 0 for any that is free.
            note: a sentence that the page shows.

        Raises:
            UserError: the port cannot be had.
        """
        self.session, self.note, self.token = session, note, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(
                f"--port: {port} cannot be had ({error.strerror}); take another, or leave it out"
            ) from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: LabelServer

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what a person has to know."""

    def _answer(self) -> None:
        try:
            kind, data = self._result(self._checked_path())
            self._send(HTTPStatus.OK, kind, data)
        except _Failure as failure:
            self._send_error(failure.status, failure)
        except Refused as refusal:
            self._send_error(HTTPStatus.CONFLICT, refusal)
        except BadFrame as error:
            self._send_error(HTTPStatus.UNPROCESSABLE_ENTITY, error)
        except UserError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, error)
        except ConnectionError:  # the page was left before the answer
            self.close_connection = True
        except Exception as error:
            is_refusal = isinstance(error, OSError) and error.filename is not None
            sentence = str(error) if is_refusal else "an error; it is in the terminal"
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, UserError(sentence))
            if not is_refusal:
                raise

    def _checked_path(self) -> str:
        """The path below the token, of a request that may be answered."""
        port = self.server.server_port
        own = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        if self.headers.get("Host") not in own:
            raise _Failure(HTTPStatus.FORBIDDEN, "the request is for another host")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in own]:
            raise _Failure(HTTPStatus.FORBIDDEN, "the request is from another page")
        _, token, *rest = [*self.path.split("/", 2), ""]
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _Failure(HTTPStatus.FORBIDDEN, "open the address that flatdepth label printed")
        return rest[0]

    def _result(self, path: str) -> tuple[str, bytes]:
        """Content type and content of what a path names."""
        session = self.server.session
        if self.command == "GET" and path == "":
            return "text/html; charset=utf-8", _page(self.server).encode()
        if self.command == "GET" and path == "photos":
            return _json([asdict(state) for state in session.states()])
        found = _PHOTO.fullmatch(path)
        number = int(found[1]) if found else -1
        if found is None or number >= len(session.photos):
            raise _Failure(HTTPStatus.NOT_FOUND, "there is no such page")
        match self.command, found[2]:
            case "GET", None:
                return _json(_document(session, number))
            case "GET", "image":
                return "image/jpeg", session.shown(number)
            case "GET", "depth":
                return "image/webp", session.depth(number)
            case "POST", None:
                shapes, digest = self._shapes()
                digest = session.save(number, shapes, digest)
                return _json({"digest": digest, "state": asdict(session.state(number))})
            case "POST", "planes":
                planes = session.planes(number, self._shapes()[0])
                state = asdict(session.state(number))
                return _json(_planes(planes, session.coloured(planes)) | {"state": state})
            case "POST", "aside":
                self._body()
                return _json({"name": session.set_aside(number)})
        raise _Failure(HTTPStatus.METHOD_NOT_ALLOWED, "there is nothing to send here")

    def _body(self) -> bytes:
        """What was sent, as JSON of a bounded size; a form of another page cannot send that."""
        if self.headers.get_content_type() != "application/json":
            raise _Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 12:
            raise _Failure(HTTPStatus.LENGTH_REQUIRED, "the length is not said")
        if int(length) > MOST_BYTES:
            raise _Failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MOST_BYTES} bytes")
        return self.rfile.read(int(length))

    def _shapes(self) -> tuple[list[Shape], str | None]:
        """The shapes that a page sent, and the digest of the file that they change."""
        try:
            sent = parse_json(self._body())
            return [_shape(one) for one in sent["shapes"]], sent["digest"]
        except (KeyError, TypeError, ValueError) as error:
            raise _Failure(HTTPStatus.BAD_REQUEST, f"not outlines: {error}") from error

    def _send_error(self, status: HTTPStatus, error: Exception) -> None:
        self.close_connection = True  # what was sent may not have been read
        self._send(status, *_json({"error": str(error)}))

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


def _shape(sent: Any) -> Shape:
    """A shape as a page sends it. Raises KeyError, TypeError or ValueError if it is none."""
    shape = Shape(key=str(sent["key"]), label=str(sent["label"]), kind=str(sent["kind"]))
    if sent["corners"] is None:
        return shape
    corners = np.array(sent["corners"], np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or not 3 <= len(corners) <= MOST_CORNERS:
        raise ValueError(f"corners of shape {corners.shape}")
    if not (np.abs(corners) < 1e6).all() or not 0 < len(shape.label.strip()) <= 200:
        raise ValueError("a corner or a label out of range")
    return Shape(key=shape.key, label=shape.label, kind=shape.kind, corners=corners)


def _document(session: Session, number: int) -> dict[str, Any]:
    document = session.document(number)
    shapes = [
        {
            "key": shape.key,
            "label": shape.label,
            "kind": shape.kind,
            "corners": None if shape.corners is None else shape.corners.tolist(),
        }
        for shape in document.shapes
    ]
    return {
        "width": document.width,
        "height": document.height,
        "shapes": shapes,
        "digest": document.digest,
        "trouble": document.trouble,
    }


def _planes(planes: Planes, picture: bytes) -> dict[str, Any]:
    return {
        "things": [_thing(thing, planes.metric) for thing in planes.things],
        "planed": f"data:image/webp;base64,{base64.b64encode(picture).decode()}",
        "metric": planes.metric,
        "camera": planes.camera,
        "limits": planes.limits,
    }


def _thing(thing: Thing, metric: bool) -> dict[str, Any]:
    """Angles and distances of relative depth mean nothing, so they are not told."""
    fit = thing.fit
    return {
        "place": thing.place,
        "trouble": thing.trouble,
        "residual": fit and fit.residual,
        "share": fit and fit.share,
        "uncertainty": fit and fit.uncertainty,
        "distance": thing.distance if metric else None,
        "tilt_deg": thing.tilt_deg if metric else None,
        "excess": thing.excess if metric else None,
        "section": thing.section and _section(thing.section),
    }


def _section(section: Section) -> dict[str, Any]:
    points = {
        name: np.round(getattr(section, name), 4).tolist()
        for name in ("on_plane", "off_plane", "seen", "thing")
    }
    return {"seen_from": section.seen_from, **points}


def _json(value: object) -> tuple[str, bytes]:
    return "application/json", json.dumps(value, allow_nan=False).encode()


def _page(server: LabelServer) -> str:
    colours = {**REGION_COLOURS, Region.BACKGROUND: _OBJECT_COLOUR}
    ramp = colour_depth(1 / _RAMP[:, ::-1], low_m=0.5, high_m=1.0)[0].tolist()
    return render_page(
        "label.html",
        labels=[(name, title, _css(colours[kind])) for name, (title, kind) in LABELS.items()],
        meanings=json.dumps(MEANINGS),
        ramp=", ".join(map(_css, ramp)),
        note=server.note,
        metric=server.session.metric,
    )


def _css(colour: Any) -> str:
    return f"rgb({', '.join(map(str, colour))})"
