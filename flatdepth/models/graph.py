"""A network as a graph for other runtimes: ONNX, or a program of ``torch.export``.

Normalisation, calibration and range are inside; batch, rows and columns are free. Input ``image``
(b, 3, h, w) float32 sRGB in 0..1, both sides multiples of the network's; where metres hang on the
focal length also ``focal_px`` (b,) float32 in pixels of the image. Output (b, 1, h, w) float32:
``depth`` (metres, or up to scale and shift of an affine network) or ``inverse_depth``.

A graph is compared with its network before it has its name; the figures stand in its metadata.
"""

import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatdepth.config import MOST_SIDE, nearest_multiple
from flatdepth.errors import UserError, import_extra
from flatdepth.models.checkpoint import describe, first_line, write_together
from flatdepth.models.network import DepthNetwork, nominal_focal
from flatdepth.models.onnx_depth import SUFFIX, OnnxDepth
from flatdepth.models.probe import probe_image

SUFFIXES = (SUFFIX, ".pt2")

Precision = Literal["float32", "float16", "int8"]
"""float16: the network computes in it where autocast may. int8: the weights of linear layers, and
what they are multiplied with, by ranges found anew in every call (dynamic quantisation)."""

OPSET = 18
"""Of ONNX. 17 is the first with layer norms; newer ones bring nothing that is used here."""

LIMITS: Mapping[Precision, float] = {"float32": 1e-3, "float16": 0.2, "int8": math.inf}
"""Largest difference that is written, as in ``Parity.largest``; NaN never is."""

_SMALL_PX = (182, 252)
_BATCHES = (1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far a graph is from its network on one batch.

    Attributes:
        shown: what was predicted.
        largest, mean: absolute differences of the pixels as a share of the mean prediction.
    """

    shown: str
    largest: float
    mean: float


def export_graph(
    model: DepthNetwork,
    target: Path,
    *,
    precision: Precision = "float32",
    extra: Mapping[str, str] | None = None,
    pictures: Sequence[tuple[str, Tensor]] = (),
    overwrite: bool = False,
) -> list[Parity]:
    """Write ``NAME.onnx`` or ``NAME.pt2``, if it predicts what the network does.

    Args:
        model: float32, in evaluation mode, on the CPU.
        extra: further metadata.
        pictures: names and inputs (1, 3, h, w) to compare besides a rendered room.
        overwrite: replace files that exist.

    Raises:
        UserError: something would be overwritten, a package is missing, the network does not go
            into a graph or has nothing to quantise, or the graph differs too much.
    """
    beside = target.with_name(f"{target.name}.data")
    if not overwrite and (existing := [str(p) for p in (target, beside) if p.exists()]):
        raise UserError(
            f"{', '.join(existing)} would be overwritten; choose another name or add --overwrite"
        )
    for package in ("onnxscript", "onnxruntime") if target.suffix == SUFFIX else ():
        import_extra(package, target.name, "onnx")
    if precision == "int8" and not any(isinstance(m, nn.Linear) for m in model.modules()):
        raise UserError(
            f"--quantise dynamic: {model.title} has no linear layers, and only they are quantised; "
            "leave it out or take --half"
        )
    metadata = {
        **describe(model, extra),
        "multiple": str(model.multiple),
        "side_px": str(model.side),
        "precision": precision,
    }
    if model.needs_focal:
        metadata["canonical_focal_px"] = str(model.canonical_focal_px)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, for renaming; the files name each other, so they have their names already.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        file = Path(folder) / target.name
        try:
            with _quiet():
                program = _program(_halved(model) if precision == "float16" else model)
                run = _write(program, model, file, metadata, precision)
        except UserError:
            raise
        except Exception as error:  # The exporters' failures share no narrower base class.
            raise UserError(
                f"{model.title} ({model.encoder}) does not go into a graph ({first_line(error)}); "
                "take the weights themselves"
            ) from error
        found = _compared(model, run, [*_rooms(model), *pictures])
        worst = max(found, key=lambda one: one.largest if one.largest >= 0 else math.inf)
        if not worst.largest <= LIMITS[precision]:
            raise UserError(
                f"{target}: the {precision} graph differs from the network by {worst.largest:.2g} "
                f"of the mean prediction ({worst.shown}), expected {LIMITS[precision]:g} at most; "
                "nothing is written, take another precision"
            )
        metadata["parity"] = json.dumps([asdict(one) for one in found])
        if target.suffix == SUFFIX:
            _stamp(file, metadata)
        else:
            torch.export.save(program, file, extra_files={"flatdepth.json": json.dumps(metadata)})
        files = sorted(Path(folder).iterdir(), reverse=True)  # what is beside comes first
        write_together({target.with_name(one.name): one.replace for one in files})
    return found


def parity_table(found: Sequence[Parity]) -> str:
    """The figures as lines of text."""
    width = max(len(one.shown) for one in found)
    head = f"{'graph - network, of the mean prediction':{width}}  largest     mean"
    rows = (f"{one.shown:{width}}  {one.largest:7.1e}  {one.mean:7.1e}" for one in found)
    return "\n".join((head, *rows))


def _program(model: DepthNetwork) -> Any:
    """The program of torch.export, without the places in the code, which name local paths."""
    multiple = model.multiple
    batch, rows, columns = (
        torch.export.Dim(name, min=1, max=most)
        for name, most in (
            ("batch", 1 << 16),
            ("rows", MOST_SIDE // multiple),
            ("columns", MOST_SIDE // multiple),
        )
    )
    image = torch.rand(2, 3, 6 * multiple, 8 * multiple)
    shapes = {"image": {0: batch, 2: multiple * rows, 3: multiple * columns}}
    given = {"image": image}
    if model.needs_focal:
        given["focal_px"] = nominal_focal(image)
        shapes["focal_px"] = {0: batch}
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _halved(model: DepthNetwork) -> DepthNetwork:
    """A copy whose parameters are float16 where autocast computes in it.

    What is before and after the logits stays float32.
    """
    half = model.like().eval()
    half.load_state_dict(model.state_dict())
    for name, module in half.named_modules():
        if half.computes_in_half(name):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
    logits: Callable[[Tensor], Tensor] = half.logits
    half.logits = lambda image: logits(image.half())  # type: ignore[method-assign]
    return half


def _write(
    program: Any, model: DepthNetwork, file: Path, metadata: Mapping[str, str], precision: Precision
) -> Callable[..., Tensor]:
    """Write the graph, still without its figures, and give what runs it."""
    if file.suffix != SUFFIX:
        torch.export.save(program, file)
        return torch.export.load(file).module()
    written = torch.onnx.export(
        program,
        output_names=["inverse_depth" if model.kind == "relative" else "depth"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    written.save(file, external_data=False)  # of more than 2 GiB all the same
    if precision == "int8":
        _quantise(file)
    _stamp(file, metadata)
    return OnnxDepth(file, torch.device("cpu"))


def _quantise(file: Path) -> None:
    """Make the linear layers 8-bit, in place."""
    from onnxruntime.quantization import quantize_dynamic

    quantised = file.with_name("int8.onnx")
    quantize_dynamic(file, quantised, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    quantised.replace(file)


def _stamp(file: Path, metadata: Mapping[str, str]) -> None:
    """Put metadata into an ONNX file in place of what there are."""
    import onnx

    proto = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.save(proto, file)


def _rooms(model: DepthNetwork) -> Iterator[tuple[str, Tensor]]:
    """A rendered room at two sizes, and three different pictures of it at once."""
    room = probe_image(model.multiple)
    for side in (_SMALL_PX, (model.side, model.side)):
        size = tuple(nearest_multiple(pixels, model.multiple) for pixels in side)
        one = F.interpolate(room, size, mode="bilinear", antialias=True).clamp(0, 1)
        three = torch.cat((one, one.flip(-1), 1 - one))
        for batch in _BATCHES:
            yield f"{size[0]} x {size[1]}, batch {batch}", three[:batch]


@torch.no_grad()
def _compared(
    model: DepthNetwork, run: Callable[..., Tensor], batches: Sequence[tuple[str, Tensor]]
) -> list[Parity]:
    found = []
    for shown, image in batches:
        given = {"image": image}
        if model.needs_focal:
            given["focal_px"] = nominal_focal(image) * torch.linspace(0.5, 1.5, len(image))
        expected = model(**given)
        difference, scale = (run(**given) - expected).abs(), expected.abs().mean()
        found.append(
            Parity(
                shown=shown,
                largest=float(difference.max() / scale),
                mean=float(difference.mean() / scale),
            )
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and logs: what goes wrong shows in the figures."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
