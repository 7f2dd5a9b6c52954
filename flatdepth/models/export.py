"""Weights for others: ``.pth``, ``.safetensors`` or a folder that transformers, diffusers or the
original code loads.

Beside the weights stands a model card. What was written is read again and has to predict the same.
"""

import copy
import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from flatdepth.config import NETWORKS
from flatdepth.errors import UserError
from flatdepth.models.card import Layout, model_card, record_of
from flatdepth.models.checkpoint import (
    describe,
    open_model,
    plain_state,
    sync_folder,
    write_json,
    write_together,
)
from flatdepth.models.huggingface import (
    CONFIG,
    IMAGE_SIZE,
    PREPROCESSOR,
    WEIGHTS,
    model_config,
    preprocessor_config,
    takes,
    to_huggingface,
)
from flatdepth.models.network import DepthNetwork, nominal_focal
from flatdepth.models.port import TransformersNetwork
from flatdepth.models.probe import probe_image

_OTHER_SUFFIXES = (".pt", ".pt2", ".bin", ".ckpt", ".onnx", ".h5")

Writers = dict[Path, Callable[[Path], object]]


def export_weights(
    model: DepthNetwork,
    target: Path,
    *,
    extra: Mapping[str, str] | None = None,
    run: Path | None = None,
    overwrite: bool = False,
) -> float:
    """Write a model for others and check the copy.

    ``NAME.pth`` becomes the flat official state dict with its metadata in ``NAME.json``,
    ``NAME.safetensors`` the same with the metadata in its header, both with the card ``NAME.md``;
    any other name a folder with ``config.json``, ``model.safetensors`` and the card ``README.md``
    as the original code reads it where it reads folders (``hub_config``), else what the network's
    own ``layout`` takes, else, with ``preprocessor_config.json``, as transformers does. Files are
    written under temporary names and renamed; missing parent folders are made.

    Args:
        model: what to write; float32 whatever it was read from.
        target: file or folder to write.
        extra: further metadata, such as the run and the step.
        run: run directory whose figures and recipe go into the card; also sets the picture size in
            ``preprocessor_config.json`` (518 x 518 otherwise).
        overwrite: replace files (not folders) that exist.

    Returns:
        The largest difference between the predictions of the model and of its copy for a rendered
        room; 0 unless a file system lies (and rounding in layouts that compute a part anew).

    Raises:
        UserError: something would be overwritten, the name ends like a format that is not written,
            the weights say that they are of another run, or nobody reads folders of this network,
            or transformers not those of this maximum depth.
    """
    metadata = describe(model, extra)
    if target.suffix in _OTHER_SUFFIXES:
        raise UserError(
            f"{target}: expected NAME.pth, NAME.safetensors or a folder for the layout of the "
            f"hub, found a name that ends in {target.suffix}"
        )
    state = plain_state(model)
    record = record_of(run, metadata)
    if target.suffix in (".pth", ".safetensors"):
        card = model_card(target.stem, metadata, run=record, layout="files")
        _write_files(_file_writers(target, state, metadata, card), overwrite)
    elif model.layout is not None:
        card = model_card(target.name, metadata, run=record, layout=model.layout)
        _write_folder(target, lambda folder: _write_own_layout(model, folder, card))
    else:
        layout: Layout = "transformers" if model.hub_config() is None else "hub"
        card = model_card(target.name, metadata, run=record, layout=layout)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        if record is not None:
            size = (int(record.config["data"]["height"]), int(record.config["data"]["width"]))
        writers = _folder_writers(model, state, metadata, card, size)
        _write_folder(target, lambda folder: _write_inside(folder, writers))
    copy, _ = open_model(str(target))
    return largest_difference(model, copy)


def for_original_code(model: DepthNetwork, target: Path) -> tuple[DepthNetwork, list[str]]:
    """The model to write for code that is not ours, and what that code has to be told, in words.

    A calibration by a factor alone goes into ``max_depth_m`` where the prediction is its product
    with a sigmoid, which is exact; then others predict calibrated metres too. What cannot be
    expressed stays in the metadata, for flatdepth. A ``.safetensors`` file is taken for ours.

    Returns:
        The model, or a copy that shares its tensors; and a line for everything that was changed or
        that only flatdepth knows.
    """
    if target.suffix == ".safetensors":
        return model, []
    notes = []
    if (calibration := model.calibration) is not None:
        folded = copy.copy(model)
        folded.calibration = None
        folded.max_depth_m = model.max_depth_m * calibration.correction.factor
        is_exact = calibration.form == "scale" and type(model).decode is DepthNetwork.decode
        if is_exact and (target.suffix == ".pth" or takes(folded) or not takes(model)):
            notes.append(
                f"calibrated: max_depth_m is {folded.max_depth_m:.9g} instead of "
                f"{model.max_depth_m:g}, for the original code too"
            )
            model = folded
        else:
            notes.append(
                f"only flatdepth reads the calibration ({calibration.correction}); other code "
                "predicts uncalibrated metres"
            )
    if model.canonical_focal_px != NETWORKS[model.name].canonical_focal_px and model.needs_focal:
        notes.append(
            "only flatdepth reads canonical_focal_px; elsewhere multiply depth by the focal length "
            f"in pixels of the input over {model.canonical_focal_px:g}"
        )
    return model, notes


@torch.no_grad()
def largest_difference(a: DepthNetwork, b: DepthNetwork) -> float:
    """The largest difference between two models' predictions for a rendered room, in their units.

    Raises:
        UserError: the models predict different quantities.
    """
    if a.units != b.units:
        raise UserError(
            f"one model predicts {a.units} and the other {b.units}; compare models of one kind"
        )
    image = probe_image(math.lcm(a.multiple, b.multiple))
    focal_px = nominal_focal(image)
    return float((a.eval()(image, focal_px) - b.eval()(image, focal_px)).abs().max())


def _file_writers(
    target: Path, state: Mapping[str, Tensor], metadata: dict[str, str], card: str
) -> Writers:
    writers: Writers = {}
    beside = target.with_suffix(".md")
    # NAME.pth and NAME.safetensors of one model share their card.
    if not beside.exists() or beside.read_text("utf-8") != card:
        writers[beside] = lambda path: path.write_text(card, "utf-8")
    if target.suffix == ".safetensors":
        writers[target] = lambda path: safetensors.torch.save_file(dict(state), path, metadata)
    else:
        writers[target.with_suffix(".json")] = lambda path: write_json(path, metadata)
        writers[target] = lambda path: torch.save(dict(state), path)
    return writers


def _folder_writers(
    model: DepthNetwork,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    card: str,
    size: tuple[int, int],
) -> Writers:
    """By the names inside the folder; the header of transformers has to say ``pt``."""
    config, header = model.hub_config(), {**metadata, "format": "pt"}
    documents: dict[str, object] = {CONFIG: config}
    tensors = state
    if config is None:
        processor = preprocessor_config(model, *size)
        documents = {CONFIG: model_config(model), PREPROCESSOR: processor}
        tensors = state if isinstance(model, TransformersNetwork) else to_huggingface(state)
    return {
        Path("README.md"): lambda path: path.write_text(card, "utf-8"),
        **{Path(name): partial(write_json, content=c) for name, c in documents.items()},
        Path(WEIGHTS): lambda path: safetensors.torch.save_file(dict(tensors), path, header),
    }


def _write_files(writers: Writers, overwrite: bool) -> None:
    if not overwrite and (existing := [str(path) for path in writers if path.exists()]):
        raise UserError(f"{', '.join(existing)} would be overwritten; choose another name")
    for path in writers:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_together(writers)


def _write_inside(folder: Path, writers: Writers) -> None:
    write_together({folder / name: write for name, write in writers.items()})


def _write_own_layout(model: DepthNetwork, folder: Path, card: str) -> None:
    model.write_layout(folder)
    (folder / "README.md").write_text(card, "utf-8")


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    if folder.exists():
        raise UserError(f"{folder} would be overwritten; choose another name")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
