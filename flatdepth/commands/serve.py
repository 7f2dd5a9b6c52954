"""The workbench: try the paste stage, compare checkpoints and watch runs, in a browser.

flatdepth serve                                            the demo sets and network
flatdepth serve --shards shards/redwood --shards shards/my_art --runs runs
flatdepth serve --checkpoint shards/demo_lite0.safetensors --checkpoint WEIGHTS

The page can be opened from this machine only, by the address that is printed; --host and --share
are for those who want it otherwise. It offers what is named here and what is dropped on it, and no
other file. Ctrl-C ends.
"""

import sys
import threading
import webbrowser
from pathlib import Path

from flatdepth.cli import Parser, as_called, called, number, signals_to
from flatdepth.config import MAX_DEPTH_M
from flatdepth.errors import import_extra
from flatdepth.models.precision import chosen_device
from flatdepth.resources import demo_file

DEMO_SHARDS = ("shards/rooms-train", "shards/flatbench")
"""The sets of the quickstart."""
DEMO_WEIGHTS = "shards/demo_lite0.safetensors"


def main(argv: list[str]) -> None:
    chosen = parser().parse_args(argv)
    device = chosen_device(chosen.device)
    # Gradio reads its variables when it is imported, too
    from flatdepth.app.environment import environment

    with environment():
        import_extra("gradio", "flatdepth serve", "app")
        from flatdepth.app.augment import Workshop
        from flatdepth.app.networks import Networks
        from flatdepth.app.page import make_page, served
        from flatdepth.data.demo import DEMO_ART

        weights = chosen.checkpoint or [DEMO_WEIGHTS]
        shards = chosen.shards or list(DEMO_SHARDS)
        networks = Networks(weights, device, kind=chosen.kind, max_depth_m=chosen.max_depth_m)
        workshop = Workshop(shards, DEMO_ART)
        page = make_page(workshop, networks, chosen.runs)
        named = [chosen.runs, *map(Path, map(demo_file, [*shards, *weights]))]
        blocked = [str(path.resolve()) for path in named if path.exists()]
        ended = threading.Event()
        with (
            served(
                page, host=chosen.host, port=chosen.port, share=chosen.share, blocked=blocked
            ) as url,
            signals_to(lambda *_: ended.set()),
        ):
            print(f"workbench at {url} (Ctrl-C ends)", flush=True)
            if not chosen.no_browser:
                webbrowser.open(url)
            ended.wait()
    print("\nended", file=sys.stderr)


def parser() -> Parser:
    """The options."""
    result = Parser(prog=called("serve"), description=as_called("serve", __doc__))
    add = result.add_argument
    add(
        "--shards",
        action="append",
        metavar="DIR",
        help="shard set of frames, or of pictures to hang; repeat (default: the quickstart's)",
    )
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="of runs (default: runs)")
    add(
        "--checkpoint",
        action="append",
        metavar="WEIGHTS",
        help="weight file, its folder or a hub id; repeat (default: the demo network)",
    )
    add("--kind", choices=("metric", "relative"), help="of weights that do not say it")
    add("--max_depth_m", type=number(*MAX_DEPTH_M), metavar="M", help="of metric weights: 20, 80")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=number(0, 65535), default=0, help="default: any that is free")
    add("--share", action="store_true", help="make a public link through Gradio's servers, too")
    add("--no_browser", action="store_true", help="print the address only")
    return result
