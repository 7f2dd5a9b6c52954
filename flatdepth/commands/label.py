"""Draw the outlines of mirrors, pictures and screens on your own photographs, in a browser.

flatdepth label photos --model WEIGHTS
flatdepth label photos --model WEIGHTS --fov_deg 70 --port 8800 --no_browser

Each outline is answered with the plane that training would be given for it: fitted to the depth
that the model predicts around it. Outlines are saved beside each photograph as LabelMe JSON after
every change; a file that LabelMe did not write, or that another program changed, is never
overwritten. The page can be opened from this machine only. Ctrl-C ends.
"""

import shlex
import sys
import threading
import webbrowser
from pathlib import Path

from flatdepth.cli import Parser, as_called, called, number, signals_to
from flatdepth.config import MAX_DEPTH_M
from flatdepth.models.precision import chosen_device
from flatdepth.resources import demo_file

DEMO = "shards/demo_lite0.safetensors"
DEMO_NOTE = (
    "The depth is that of the small demo network, which is too rough for most planes: give --model "
    "the official weights of Depth Anything V2 or 3, or your own. Outlines are saved all the same."
)


def main(argv: list[str]) -> None:
    chosen = parser().parse_args(argv)
    from flatdepth.label.server import LabelServer
    from flatdepth.label.session import Session
    from flatdepth.models.checkpoint import open_model
    from flatdepth.predict.predictor import PredictOptions

    device = chosen_device(chosen.device)
    weights = chosen.model or demo_file(DEMO)
    model, report = open_model(weights, kind=chosen.kind, max_depth_m=chosen.max_depth_m)
    print(report, file=sys.stderr)
    note = "" if chosen.model else DEMO_NOTE
    if note:
        print(note, file=sys.stderr)
    options = PredictOptions(fov_deg=chosen.fov_deg, unusual_camera=True)
    session = Session(chosen.dir, model.to(device), options, device)
    ended = threading.Event()
    with (
        LabelServer(session, chosen.port, note) as server,
        signals_to(lambda *_: ended.set()),
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"{len(session.photos)} photographs at {server.url} (Ctrl-C ends)", flush=True)
        if not chosen.no_browser:
            webbrowser.open(server.url)
        ended.wait()
        server.shutdown()
    print(f"\n{session.labelled()} of {len(session.photos)} photographs have outlines; next:")
    packing = ["flatdepth", "pack", "photos", "--raw", str(chosen.dir)]
    packing += ["--teacher", chosen.model or "WEIGHTS", "--polygon_glob", "**/*.json"]
    for option, value in {
        "--teacher_kind": chosen.kind,
        "--max_depth_m": chosen.max_depth_m,
        "--fov_deg": chosen.fov_deg,
        "--out": "SET",
    }.items():
        packing += [] if value is None else [option, str(value)]
    print(shlex.join(packing))


def parser() -> Parser:
    """The options."""
    result = Parser(prog=called("label"), description=as_called("label", __doc__))
    add = result.add_argument
    add("dir", type=Path, metavar="DIR", help="folder with photographs")
    add(
        "--model",
        metavar="WEIGHTS",
        help="weight file, its folder or a hub id, metric or relative (default: the demo network; "
        "take official weights)",
    )
    add("--kind", choices=("metric", "relative"), help="of weights that do not say it")
    add("--max_depth_m", type=number(*MAX_DEPTH_M), metavar="M", help="of metric weights: 20, 80")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    add(
        "--fov_deg",
        type=number(1.0, 170.0),
        metavar="DEG",
        help="horizontal field of view (default: by EXIF, else 60)",
    )
    add("--port", type=number(0, 65535), default=0, help="default: any that is free")
    add("--no_browser", action="store_true", help="print the address only")
    return result
