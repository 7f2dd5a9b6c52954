"""Weights for the Hugging Face Hub: which files go there, with a card made for the repository."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from flatdepth.errors import UserError
from flatdepth.hub import CARD, Upload
from flatdepth.models.card import Layout, checked_licence, model_card, public_path, record_of
from flatdepth.models.checkpoint import PICKLES, PIPELINE, PIPELINE_FILES, WeightFile
from flatdepth.models.huggingface import CONFIG, PREPROCESSOR
from flatdepth.models.network import DepthNetwork
from flatdepth.models.networks import network_class


def weights_upload(
    weights: WeightFile,
    repo: str,
    *,
    run: Path | None = None,
    licence: str | None = None,
    measured: Sequence[EvalResult] = (),
    pickled: bool = False,
    private: bool = False,
) -> Upload:
    """A weight file, or the folder that ``export_weights`` wrote, as an upload.

    With a file goes ``config.yaml`` of its run, local paths cut to their last part as in the card;
    of a folder what its layout consists of, and nothing else that lies there.

    Args:
        weights: a local file that was read.
        repo: id of the repository.
        run, licence, measured: as for ``model_card``, which makes the card.
        pickled: send ``NAME.pth`` and its ``NAME.json`` too.

    Raises:
        UserError: the file does not say what it holds, is a pickle that nobody asked for, its run
            is another one, the licence cannot be that, or no repository can have that id.
    """
    path, metadata = weights.path, weights.metadata
    if metadata is None or metadata["format"] == "official":
        raise UserError(
            f"{path} does not say what it holds; flatdepth checkpoint export makes a file or "
            "folder that does"
        )
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which careful people do not load; give a .safetensors, which "
            "flatdepth checkpoint export makes, and --pth to send the .pth beside it too"
        )
    record = record_of(run, metadata)
    layout, patterns = _layout(weights)
    found = [file for pattern in patterns for file in sorted(path.parent.glob(pattern))]
    files: dict[str, Path | bytes] = {f.relative_to(path.parent).as_posix(): f for f in found}
    if pickled:
        beside = path.with_suffix(".pth")
        for file in (beside, beside.with_suffix(".json")):
            if not file.is_file():
                raise UserError(f"--pth: {file} is missing; export {beside} again")
            files[file.name] = file
    if record is not None and layout == "files":
        files["config.yaml"] = yaml.safe_dump(_public(record.config), sort_keys=False).encode()
    card = model_card(
        f"{repo}/{path.stem}" if layout == "files" else repo,
        metadata,
        run=record,
        layout=layout,
        licence=checked_licence(licence, weights.network, weights.encoder, record),
        measured=measured,
    )
    files[CARD] = card.encode()
    return Upload(repo=repo, kind="model", files=files, private=private)


def _layout(weights: WeightFile) -> tuple[Layout, tuple[str, ...]]:
    """How the file is loaded, and the patterns of the files that are needed for it."""
    if weights.path.name == PIPELINE:
        return "diffusers", PIPELINE_FILES
    if weights.metadata and weights.metadata["format"] == "transformers":
        own = network_class(weights.network).hub_config is not DepthNetwork.hub_config
        return ("hub" if own else "transformers"), (CONFIG, PREPROCESSOR, "model*.safetensors*")
    return "files", (glob.escape(weights.path.name),)


def _public(value: Any) -> Any:
    """A configuration without local paths."""
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return public_path(value) if isinstance(value, str) else value
