"""Folders of diffusers' pipelines: their schedulers, configurations and text encoders.

A pipeline is a folder per component and a ``model_index.json`` that says which there are. The
components are read and written by diffusers and transformers, which are imported when used.
"""

import inspect
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flatdepth.errors import UserError, import_extra
from flatdepth.untrusted import parse_json

WANTED = ("model.name: marigold", "marigold")
"""What needs these packages, and the extra that installs them."""

TEXT_TOKENS = 2
"""Begin and end: what the empty text is made of."""

MOST_TIMES = 100_000
"""Steps of the noise that a scheduler may have been trained with; 1000 is usual."""

CLIPPING = (
    *("clip_sample", "clip_sample_range"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
)
"""What schedulers of pixels do, and none of ours."""

MOST_BYTES = 1 << 20
"""Of a component's configuration; published ones have a thousandth."""


def make_scheduler(config: object) -> tuple[Any, float]:
    """diffusers' scheduler of a configuration, and the gain of its one step from zeros.

    Everything but LCM is sampled by DDIM, as Marigold does. From a latent of zeros all prediction
    types are proportional to what the UNet says: with v and alpha-bar a at the last time the step
    is to ``-sqrt(1 - a) v``, or a little less where the scheduler takes the first time, which has
    some noise yet, for the end (``set_alpha_to_one`` false).

    Raises:
        UserError: diffusers refuses it, or the step is not such a multiple.
    """
    if not isinstance(config, Mapping):
        raise UserError("scheduler: expected the configuration of a scheduler of diffusers")
    name = "LCMScheduler" if config.get("_class_name") == "LCMScheduler" else "DDIMScheduler"
    kind = getattr(import_extra("diffusers", *WANTED), name)
    known = inspect.signature(kind.__init__).parameters
    own = {"clip_sample": False} | {key: value for key, value in config.items() if key in known}
    times = own.get("num_train_timesteps", 1000)
    if not (isinstance(times, int) and 2 <= times <= MOST_TIMES):
        raise UserError(f"scheduler: num_train_timesteps: expected 2 to {MOST_TIMES}, got {times}")
    if own["clip_sample"] or own.get("thresholding"):
        raise UserError("scheduler: clip_sample and thresholding: expected false, found true")
    try:
        with torch.device("cpu"):
            scheduler = kind.from_config(own)
            single = kind.from_config({**own, "timestep_spacing": "trailing"})
            single.set_timesteps(1)
            (last,) = single.timesteps
            one = torch.ones(1, 1, 1, 1)
            gain = float(single.step(one, last, torch.zeros_like(one), return_dict=False)[0])
    except Exception as error:  # Of values that cannot be diffusers raises almost anything.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"scheduler: diffusers does not take {own} ({reason})") from error
    if not math.isfinite(gain):
        raise UserError(
            "scheduler: a network that predicts the noise cannot begin where there is nothing "
            "else: expected rescale_betas_zero_snr false, or the prediction_type v_prediction"
        )
    return scheduler, gain


def scheduler_text(scheduler: Any) -> str:
    """What counts of a scheduler's configuration, as JSON."""
    config = {
        key: value
        for key, value in scheduler.config.items()
        if not key.startswith("_") and key not in CLIPPING and value is not None
    }
    return json.dumps({**config, "_class_name": type(scheduler).__name__}, sort_keys=True)


def read_part(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a pipeline."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch the whole pipeline") from error
    return content


def fits(config: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    """Whether a component's configuration says nothing else than a spec."""

    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    return all(plain(config.get(key, value)) == plain(value) for key, value in spec.items())


@torch.no_grad()
def empty_text(folder: Path) -> Float[Tensor, "1 n d"]:
    """What the text encoder of a pipeline says of the empty text."""
    transformers = import_extra("transformers", *WANTED)
    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} holds no {part}; fetch the whole pipeline")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    tokens = tokenizer(
        "",
        padding="do_not_pad",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    text: Tensor = encoder(tokens.input_ids)[0]
    return text


def stand_in(text: Float[Tensor, "1 2 d"]) -> tuple[Any, Any]:
    """A text encoder without layers that says ``text`` of the empty text, and its tokenizer.

    The embedding of "begin" is the power of two 1024 with alternating signs, that of "end" its
    negative, which the final norm makes 1 and -1; scale and bias of the norm then give both rows.
    """
    transformers = import_extra("transformers", *WANTED)
    begin, end = text[0].detach().cpu().float()
    signs = torch.ones_like(begin)
    signs[1::2] = -1
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=len(begin),
            intermediate_size=1,
            num_hidden_layers=0,
            num_attention_heads=1,
            vocab_size=TEXT_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    own = {name.rpartition("text_model.")[2]: p for name, p in encoder.named_parameters()}
    with torch.no_grad():
        own["embeddings.token_embedding.weight"].copy_(1024 * torch.stack((signs, -signs)))
        own["embeddings.position_embedding.weight"].zero_()
        own["final_layer_norm.weight"].copy_(signs * (begin - end) / 2)
        own["final_layer_norm.bias"].copy_((begin + end) / 2)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    return encoder, tokenizer


def write_tokens(folder: Path) -> None:
    """The vocabulary of the empty text, in the files of CLIP's tokenizer."""
    tokens = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
