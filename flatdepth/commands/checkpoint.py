"""Look into weight files, convert, compare, blend, calibrate, check and publish them.

flatdepth checkpoint info FILE [--keys]
flatdepth checkpoint export FILE OUT [--half] [--quantise dynamic --pictures PICTURES]
flatdepth checkpoint diff A B [--out diff.png] [--json diff.json] [--tensors]
flatdepth checkpoint blend A B --alpha 0.5 OUT
flatdepth checkpoint calibrate FILE --data SHARDS --out NEW.safetensors
flatdepth checkpoint verify FILE [OTHER]
flatdepth checkpoint push FILE OWNER/NAME [--yes]

A FILE is a .safetensors, .pth, .pt, .ckpt or .bin, its folder, or a Hugging Face Hub id.
An OUT is NAME.pth, NAME.safetensors, or a folder for Hugging Face transformers (of Marigold:
diffusers); of export also NAME.onnx or NAME.pt2 (docs/export.md).
"""

import argparse
import tempfile
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from flatdepth.cli import Parser, as_called, called, number
from flatdepth.config import MAX_DEPTH_M
from flatdepth.errors import BadFrame, UserError
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.models.calibration import FORMS
from flatdepth.models.card import provenance, record_of
from flatdepth.models.checkpoint import (
    CALIBRATION,
    LoadReport,
    WeightFile,
    describe,
    model_of,
    open_model,
    read_weights,
)
from flatdepth.models.export import export_weights, for_original_code, largest_difference
from flatdepth.models.graph import SUFFIXES, Precision, export_graph, parity_table
from flatdepth.models.huggingface import takes
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.precision import best_device
from flatdepth.models.preprocessing import preprocessing
from flatdepth.models.surgery import (
    blend,
    blended_metadata,
    diff,
    diff_chart,
    diff_json,
    diff_table,
    info,
    keys,
)
from flatdepth.show.pictures import write_atomic

_ORIGIN = ("run", "blend", "converted_from")
"""Metadata that says where weights come from, kept on export."""


def main(argv: list[str]) -> int:
    arguments = command_line().parse_args(argv)
    return int(arguments.function(arguments) or 0)


def command_line() -> Parser:
    parser = Parser(prog=called("checkpoint"), description=as_called("checkpoint", __doc__))
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    sub = commands.add_parser("info", help="kind, encoder, depth range, units, keys, size")
    sub.set_defaults(function=_info)
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--keys", action="store_true", help="list every tensor")

    sub = commands.add_parser("export", help="write another layout, with a model card")
    sub.set_defaults(function=_export)
    sub.add_argument("file", metavar="FILE")
    _add_target(sub)
    sub.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="run directory for the card (default: the one that FILE lies in)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace earlier files (no folders)")
    _add_kind(sub)
    graph = sub.add_argument_group("of graphs (.onnx, .pt2)")
    graph.add_argument("--half", action="store_true", help="compute in float16")
    graph.add_argument("--quantise", choices=("dynamic",), help="8-bit linear layers (.onnx)")
    graph.add_argument(
        "--pictures",
        nargs="+",
        default=[],
        metavar="PICTURE",
        help="to compare the graph with the network on; needed to quantise",
    )

    sub = commands.add_parser("diff", help="which layers moved from A to B")
    sub.set_defaults(function=_diff)
    sub.add_argument("a", metavar="A", help="for example the file that training started from")
    sub.add_argument("b", metavar="B", help="for example what it ended with")
    sub.add_argument("--out", type=Path, metavar="FILE.png", help="bar plot to write")
    sub.add_argument("--json", type=Path, metavar="FILE.json", help="all norms to write")
    sub.add_argument("--tensors", action="store_true", help="a line per tensor, not per block")

    sub = commands.add_parser("blend", help="interpolate: (1 - alpha) A + alpha B")
    sub.set_defaults(function=_blend)
    sub.add_argument("a", metavar="A", help="for example the file that training started from")
    sub.add_argument("b", metavar="B", help="for example what it ended with")
    sub.add_argument("--alpha", type=number(0.0, 1.0), required=True, help="share of B, 0 to 1")
    _add_target(sub)
    _add_kind(sub)

    sub = commands.add_parser(
        "calibrate", help="correct the metres of metric weights by a set, judged on held-out scenes"
    )
    sub.set_defaults(function=_calibrate)
    sub.add_argument("file", metavar="FILE")
    sub.add_argument(
        "--data", action="extend", nargs="+", required=True, metavar="SHARDS", help="shard sets"
    )
    sub.add_argument(
        "--part",
        choices=("all", "train", "val", "test"),
        default="val",
        help="which part of the sets, as in flatdepth evaluate (default: val)",
    )
    sub.add_argument(
        "--fit",
        choices=FORMS,
        default="scale",
        help="one factor, or scale and shift of inverse depth (default: scale)",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="NEW.safetensors")
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier file at --out")
    sub.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), default="none", help="crop and depth range"
    )
    sub.add_argument("--images", type=int, default=0, help="most images per set (default: all)")
    sub.add_argument("--size", type=int, metavar="PX", help="as in flatdepth evaluate")
    sub.add_argument("--batch", type=int, default=4, help="pictures per forward pass (default: 4)")
    _add_kind(sub)

    sub = commands.add_parser(
        "verify", help="compare one forward pass with OTHER's, or with copies in every layout"
    )
    sub.set_defaults(function=_verify)
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("other", metavar="OTHER", nargs="?")
    sub.add_argument(
        "--tolerance",
        type=number(0.0, 1e9),
        default=1e-4,
        help="largest difference (default: %(default)s)",
    )
    _add_kind(sub)

    sub = commands.add_parser(
        "push", help="show what would go to the Hugging Face Hub; with --yes, send it"
    )
    sub.set_defaults(function=_push)
    sub.add_argument("file", metavar="FILE", help="weight file, or a folder that export wrote")
    sub.add_argument("repo", metavar="OWNER/NAME", help="repository, made if there is none")
    sub.add_argument("--run", type=Path, metavar="RUN", help="run directory, as for export")
    sub.add_argument(
        "--eval",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="figures for the card, from flatdepth evaluate --out",
    )
    sub.add_argument(
        "--licence",
        type=str.lower,
        metavar="ID",
        help="the Hub's identifier, such as cc-by-nc-4.0 (default: that of the base weights)",
    )
    sub.add_argument("--pth", action="store_true", help="send the pickled .pth too")
    sub.add_argument("--private", action="store_true", help="for the owner's eyes only")
    sub.add_argument("--overwrite", action="store_true", help="replace files that are there")
    sub.add_argument("--yes", action="store_true", help="send it")
    return parser


def _add_target(parser: Parser) -> None:
    parser.add_argument(
        "target",
        type=Path,
        metavar="OUT",
        help="NAME.pth, NAME.safetensors, or a folder as transformers or diffusers reads it (Depth "
        "Anything 3: as its own code does)",
    )


def _add_kind(parser: Parser) -> None:
    group = parser.add_argument_group("for files that do not say it")
    group.add_argument("--kind", choices=("metric", "relative", "affine"))
    group.add_argument("--max_depth_m", type=number(*MAX_DEPTH_M), metavar="METRES")


def _info(arguments: argparse.Namespace) -> None:
    weights = read_weights(arguments.file)
    print(info(weights))
    if arguments.keys:
        print(keys(weights))


def _export(arguments: argparse.Namespace) -> None:
    is_graph = arguments.target.suffix in SUFFIXES
    if not is_graph and (arguments.half or arguments.quantise or arguments.pictures):
        raise UserError(
            f"{arguments.target}: --half, --quantise and --pictures are for "
            f"{' and '.join(SUFFIXES)}; leave them out"
        )
    model, report = _open(arguments.file, arguments)
    run = arguments.run or _run_of(Path(arguments.file))
    if is_graph:
        _export_graph(model, arguments, _origin(report), run)
        return
    model, notes = for_original_code(model, arguments.target)
    _write(model, arguments.target, _origin(report), run, arguments.overwrite)
    for note in notes:
        print(f"note: {note}")


def _export_graph(
    model: DepthNetwork, arguments: argparse.Namespace, extra: dict[str, str], run: Path | None
) -> None:
    target: Path = arguments.target
    precision: Precision = "float16" if arguments.half else "float32"
    if arguments.quantise:
        if arguments.half or target.suffix != ".onnx" or not arguments.pictures:
            raise UserError(
                "--quantise: expected NAME.onnx, no --half, and --pictures to measure its error on"
            )
        precision = "int8"
    extra |= provenance(describe(model), record_of(run, extra))
    pictures = _pictures(model, arguments.pictures, target.parent)
    found = export_graph(
        model,
        target,
        precision=precision,
        extra=extra,
        pictures=pictures,
        overwrite=arguments.overwrite,
    )
    print(parity_table(found))
    print(f"wrote {target} ({precision})")


def _pictures(
    model: DepthNetwork, given: list[str], beside: Path
) -> list[tuple[str, Float[Tensor, "1 3 h w"]]]:
    """Names of pictures, and what the network sees of them."""
    from flatdepth.predict.inputs import find_inputs, open_photo

    way = preprocessing("ours", model.side, model.multiple)
    found = []
    for one in find_inputs(given, beside / "-") if given else []:
        try:
            image = open_photo(one.path).image
        except BadFrame as error:
            raise UserError(f"{one.path}: {error.detail}; leave it out") from error
        pixels = torch.tensor(image).movedim(-1, 0)[None].float() / 255
        found.append((one.name, way.prepare(pixels)))
    return found


def _origin(report: LoadReport) -> dict[str, str]:
    """What a file made of another says of where it comes from."""
    said = report.metadata or {}
    extra = {key: said[key] for key in (*_ORIGIN, "step") if key in said}
    if not said.keys() & set(_ORIGIN):
        extra["converted_from"] = Path(report.source).name
    return extra


def _diff(arguments: argparse.Namespace) -> None:
    for path in (arguments.out, arguments.json):
        if path is not None and path.exists():
            raise UserError(f"{path} would be overwritten; choose another name")
    if arguments.out is not None and arguments.out.suffix.lower() != ".png":
        raise UserError(f"--out: expected a name that ends in .png, got {arguments.out}")
    result = diff(read_weights(arguments.a), read_weights(arguments.b))
    print(diff_table(result, tensors=arguments.tensors))
    if arguments.out is not None:
        write_atomic(arguments.out, diff_chart(result))
        print(arguments.out)
    if arguments.json is not None:
        write_atomic(arguments.json, diff_json(result).encode())
        print(arguments.json)


def _blend(arguments: argparse.Namespace) -> None:
    a, b = read_weights(arguments.a), read_weights(arguments.b)
    model = _model_like(a, b, arguments)
    model.load_state_dict(blend(model, _model_like(b, a, arguments), arguments.alpha))
    model.calibration = None  # A's, not the blend's
    extra = blended_metadata(arguments.a, arguments.b, arguments.alpha)
    _write(model, arguments.target, dict(extra), None)


def _calibrate(arguments: argparse.Namespace) -> None:
    from flatdepth.data.progress import picture_progress
    from flatdepth.judge.calibration import calibrate, render
    from flatdepth.judge.scoring import Request

    target: Path = arguments.out
    if target.suffix != ".safetensors":
        raise UserError(f"--out: expected a name that ends in .safetensors, got {target}")
    if target.resolve() == Path(arguments.file).resolve():
        raise UserError(f"--out: {target} is the file to calibrate; choose another name")
    for path in (target, target.with_suffix(".md")):
        if path.exists() and not arguments.overwrite:
            raise UserError(f"{path} would be overwritten; choose another --out or --overwrite")
    model, report = _open(arguments.file, arguments)
    request = Request(
        checkpoints=(arguments.file,),
        kinds=(arguments.kind,),
        max_depths_m=(arguments.max_depth_m,),
        trained_on=(None,),
        data=tuple(arguments.data),
        part=arguments.part,
        protocol=PROTOCOLS[arguments.protocol],
        size=arguments.size,
        images=arguments.images,
        batch=arguments.batch,
    )
    found = calibrate(model, request, arguments.fit, best_device(), picture_progress())
    print(render(found))
    extra = _origin(report)
    model.calibration = found if found.is_applied else None
    if not found.is_applied:
        extra[CALIBRATION] = found.text()
    _write(model.cpu(), target, extra, None, overwrite=arguments.overwrite)


def _verify(arguments: argparse.Namespace) -> int:
    model, _ = _open(arguments.file, arguments)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.other is not None:
            found = {
                arguments.other: largest_difference(model, _open(arguments.other, arguments)[0])
            }
        else:
            names = ["copy.pth", "copy.safetensors"]
            if model.hub_config() is not None:
                names.append("folder of the hub")
            elif model.layout is not None:
                names.append(f"{model.layout} layout")
            elif takes(model):
                names.append("transformers layout")
            else:
                print("transformers takes no such model or whole metres only: left out")
            found = {name: export_weights(model, Path(folder) / name) for name in names}
    for name, difference in found.items():
        verdict = "equal" if difference <= arguments.tolerance else "NOT equal"
        print(f"{verdict} to {name}: largest difference {difference:.3g} {model.units}")
    return int(not all(difference <= arguments.tolerance for difference in found.values()))


def _push(arguments: argparse.Namespace) -> None:
    from flatdepth.hub import NOT_SENT, send
    from flatdepth.judge.tables import read_json
    from flatdepth.models.card import evaluation_results
    from flatdepth.models.publish import weights_upload

    weights = read_weights(arguments.file)
    measured = [
        result
        for path in arguments.eval
        for result in evaluation_results(read_json(path), weights.path)
    ]
    upload = weights_upload(
        weights,
        arguments.repo,
        run=arguments.run or _run_of(Path(arguments.file)),
        licence=arguments.licence,
        measured=measured,
        pickled=arguments.pth,
        private=arguments.private,
    )
    print(upload)
    print(send(upload, overwrite=arguments.overwrite) if arguments.yes else NOT_SENT)


def _open(source: str, arguments: argparse.Namespace) -> tuple[DepthNetwork, LoadReport]:
    model, report = open_model(source, kind=arguments.kind, max_depth_m=arguments.max_depth_m)
    print(report)
    return model, report


def _model_like(file: WeightFile, other: WeightFile, arguments: argparse.Namespace) -> DepthNetwork:
    """The model of a file that may leave it to another to say what it is."""
    said = {**(other.metadata or {}), **(file.metadata or {})}
    kind = cast(Kind | None, arguments.kind or said.get("kind"))
    far = arguments.max_depth_m or said.get("max_depth_m")
    model, report = model_of(file, kind=kind, max_depth_m=None if far is None else float(far))
    print(report)
    return model


def _write(
    model: DepthNetwork,
    target: Path,
    extra: dict[str, str],
    run: Path | None,
    overwrite: bool = False,
) -> None:
    difference = export_weights(model, target, extra=extra, run=run, overwrite=overwrite)
    print(f"wrote {target}; read again, its largest difference is {difference:g} {model.units}")


def _run_of(file: Path) -> Path | None:
    """The run directory whose ``weights`` folder holds the file, if there is one."""
    run = file.parent.parent
    return run if file.parent.name == "weights" and (run / "metrics.json").is_file() else None
