"""Depth from an ONNX file that ``flatdepth.models.graph`` wrote, by ONNX Runtime."""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flatdepth.config import MAX_DEPTH_M
from flatdepth.errors import UserError, import_extra
from flatdepth.models.checkpoint import (
    FORMAT,
    calibration_of,
    checked_metadata,
    first_line,
    open_model,
    trained_px,
)
from flatdepth.models.network import DepthNetwork, Kind, Reach

SUFFIX = ".onnx"


class OnnxDepth(Reach):
    """A graph that predicts as the network it was made of; what it is stands in its metadata.

    It computes with as many threads as torch, on the GPU if the device is one and ONNX Runtime can.

    Args:
        path: the file; weights of more than 2 GiB lie beside it.
        device: where the caller has its tensors.

    Raises:
        UserError: ONNX Runtime is missing, or the file is damaged or not one of flatdepth's.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        runtime = import_extra("onnxruntime", str(path), "onnx")
        if not path.is_file():
            raise UserError(f"{path}: no such file; give what flatdepth checkpoint export wrote")
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        known = runtime.get_available_providers()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session: Any = runtime.InferenceSession(
                path, options, [p for p in [*wanted, "CPUExecutionProvider"] if p in known]
            )
            said = dict(self._session.get_modelmeta().custom_metadata_map)
        except Exception as error:  # Of damaged files ONNX Runtime raises almost anything.
            raise UserError(
                f"{path} cannot be read as ONNX ({first_line(error)}); export it again"
            ) from error
        if said.get("format") != FORMAT:
            raise UserError(
                f"{path}: expected an ONNX file that flatdepth checkpoint export wrote, whose "
                "metadata say what it predicts, found another; export it from the weights"
            )
        self.metadata = checked_metadata(said, path)
        try:
            self.multiple, self.side = int(said["multiple"]), int(said["side_px"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path}: its metadata are damaged ({error}); export it again"
            ) from error
        self.kind = cast(Kind, said["kind"])
        self.encoder = said.get("encoder", "unknown")
        self.bounded = "max_depth_m" in said
        self.max_depth_m = float(said.get("max_depth_m", MAX_DEPTH_M[1]))
        self.trained_px = trained_px(said)
        focal_px = said.get("canonical_focal_px")
        self.canonical_focal_px = None if focal_px is None else float(focal_px)
        self.calibration = calibration_of(said)

    def __call__(
        self, image: Float[Tensor, "b 3 h w"], focal_px: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """As ``DepthNetwork.forward`` in evaluation mode, without gradients."""
        fed = {"image": image.float().cpu().numpy()}
        if self.needs_focal:
            if focal_px is None:
                raise ValueError("the graph predicts metres only with a focal length")
            fed["focal_px"] = focal_px.float().cpu().numpy()
        return torch.from_numpy(self._session.run(None, fed)[0]).to(image.device)

    def __str__(self) -> str:
        """What it is, in a sentence."""
        said = ", ".join(
            f"{key} {self.metadata[key]}"
            for key in ("network", "encoder", "kind", "max_depth_m", "precision")
            if key in self.metadata
        )
        return f"a graph of {said}, by ONNX Runtime on {self._session.get_providers()[0]}"


def open_depth(
    source: str, device: torch.device, *, kind: Kind | None = None, max_depth_m: float | None = None
) -> tuple[DepthNetwork | OnnxDepth, str]:
    """What predicts depth: the network of weights, on the device, or an ONNX file; and what it is.

    Args:
        source: an ONNX file, or as in ``read_weights``.
        kind, max_depth_m: as in ``open_model``.

    Raises:
        UserError: as for ``OnnxDepth`` and ``open_model``, or a graph was to be read as another.
    """
    if Path(source).suffix != SUFFIX:
        model, report = open_model(source, kind=kind, max_depth_m=max_depth_m)
        return model.to(device), str(report)
    if kind is not None or max_depth_m is not None:
        raise UserError(f"{source} says its kind and range; leave --kind and --max_depth_m out")
    graph = OnnxDepth(Path(source), device)
    return graph, f"{source}: {graph}."
