"""The model card that stands beside weights: what they are, how they came about, what they reach.

Everything in it comes from the weights' own metadata and from the run directory (``config.yaml``,
``metrics.json``). Local paths are cut to their last part, since cards are made to be published.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import read_metadata
from flatdepth.show.pictures import write_atomic
from flatdepth.types import METRICS_FORMAT

Layout = Literal["files", "transformers"]

_NAMES = {"vits": "Small", "vitb": "Base", "vitl": "Large", "vitg": "Giant"}
_OFFICIAL = "depth-anything/"
_TOP_KEYS = ("steps", "batch", "precision", "seed")
_GROUPS = ("data", "paste", "photometric", "model", "loss", "optim")
_REGIONS = {
    "flat": "mirrors and art",
    "mirror": "mirrors",
    "art": "art",
    "frame": "frames",
    "decoy": "decoys (real openings)",
    "background": "background of pasted images",
    "clean": "clean images",
}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory says about the run; both as they were written."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]


def read_run(run: Path) -> RunRecord:
    """Read the configuration and the metrics of a run directory.

    Raises:
        UserError: a file is missing, damaged or of another version.
    """
    for name in ("config.yaml", "metrics.json"):
        if not (run / name).is_file():
            raise UserError(f"{run} holds no {name}; give a run directory, such as runs/NAME")
    try:
        config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        metrics = json.loads((run / "metrics.json").read_text("utf-8"))
        version = metrics["format"]
        _ = [(entry["step"], entry["label"], entry["table"]) for entry in metrics["evaluations"]]
        _ = [entry["path"] for entry in config["data"]["train"]]
        _ = [config["name"], config["data"]["val"], config["data"]["art"], metrics["protocol"]]
        _ = [config["data"]["height"], config["data"]["width"], config["model"]["checkpoint"]]
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{run} does not hold the config.yaml and metrics.json of a training run ({reason}); "
            "restore them or train again"
        ) from error
    if version != METRICS_FORMAT:
        raise UserError(
            f"{run / 'metrics.json'} has format {version!r}, this version reads {METRICS_FORMAT}; "
            "use the flatdepth version that wrote it"
        )
    return RunRecord(config, metrics)


def write_model_card(weights: Path, run: Path) -> Path:
    """Write the card of weights that a run has just saved, over an older one.

    Args:
        weights: a file written by ``save_weights``.
        run: the run directory.

    Returns:
        The card's path: that of the weights with the suffix ``.md``.

    Raises:
        UserError: the weights have no metadata of ours or the run directory cannot be read.
    """
    metadata = read_metadata(weights)
    if metadata is None:
        raise UserError(f"{weights} has no metadata; export it with flatdepth checkpoint first")
    card = weights.with_suffix(".md")
    text = model_card(weights.stem, metadata, run=read_run(run), layout="files")
    write_atomic(card, text.encode())
    return card


def model_card(
    name: str, metadata: Mapping[str, str], *, run: RunRecord | None, layout: Layout
) -> str:
    """The card as Markdown with the header that the Hugging Face Hub reads.

    Args:
        name: the file's stem or the folder's name.
        metadata: encoder, kind, units, version and so on, as ``describe`` gives it.
        run: where recipe and figures come from; without one the card says that there are none.
        layout: which way of loading it shows.
    """
    parts = [
        _front_matter(metadata, run, layout),
        f"# {_title(name, run)}",
        _what_it_is(metadata),
        _use(name, metadata, layout),
        *([_recipe(run)] if run else []),
        _figures(metadata, run),
        _section("Licence", _licence(metadata["encoder"], run)[1]),
        _origin(metadata, run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(name: str, run: RunRecord | None) -> str:
    return f"{run.config['name']}, {name}" if run and name in ("final", "best") else name


def _front_matter(metadata: Mapping[str, str], run: RunRecord | None, layout: Layout) -> str:
    header: dict[str, object] = {
        "license": _licence(metadata["encoder"], run)[0],
        "pipeline_tag": "depth-estimation",
        "tags": ["depth-anything-v2", "monocular-depth", "flatdepth", metadata["kind"]],
    }
    if layout == "transformers":
        header["library_name"] = "transformers"
    base = run.config["model"]["checkpoint"] if run else None
    if base and base.startswith(_OFFICIAL):
        header["base_model"] = "/".join(base.split("/")[:2])
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _what_it_is(metadata: Mapping[str, str]) -> str:
    says = (
        f"planar depth in metres, up to {float(metadata['max_depth_m']):g} m"
        if metadata["kind"] == "metric"
        else "relative inverse depth, known up to scale and shift"
    )
    size = _NAMES.get(metadata["encoder"], "a tiny network for tests and the quickstart")
    text = (
        f"Depth Anything V2 architecture, encoder `{metadata['encoder']}` ({size}). From one image "
        f"it predicts {says}."
    )
    if "run" in metadata:
        text += (
            " Trained with flatdepth so that mirrors, paintings, posters and screens come out as "
            "the flat surfaces that they are."
        )
    if blend := metadata.get("blend"):
        text += f" The weights are a blend: {blend}."
    return text


def _use(name: str, metadata: Mapping[str, str], layout: Layout) -> str:
    if layout == "transformers":
        return _section(
            "Use",
            "```python\n"
            "from transformers import AutoImageProcessor, AutoModelForDepthEstimation\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{name}")\n'
            f'model = AutoModelForDepthEstimation.from_pretrained("{name}")\n'
            'inputs = processor(images=image, return_tensors="pt")\n'
            "depth = model(**inputs).predicted_depth\n```\n\n"
            "At 518 x 518 pixels this equals the original code to rounding; at other sizes "
            "transformers places the position embedding differently, which moves single depths "
            "by up to a few percent.",
        )
    text = (
        "```python\n"
        "from flatdepth.models.checkpoint import open_model\n\n"
        f'model, report = open_model("{name}.safetensors")  # or .pth\n'
        "depth = model(image)  # (b, 3, h, w) sRGB in 0..1; sides multiples of 14\n```"
    )
    if metadata["encoder"] in _NAMES:
        far = f", max_depth={float(metadata['max_depth_m']):g}" if "max_depth_m" in metadata else ""
        text += (
            "\n\nThe names of the tensors are the official ones: the original code loads "
            f"`{name}.pth` too (`DepthAnythingV2(...{far})`, `load_state_dict`)."
        )
    return _section("Use", text)


def _recipe(run: RunRecord) -> str:
    config, data = run.config, run.config["data"]
    start = config["model"]["checkpoint"]
    validation = _paths(data["val"]) if data["val"] else "scenes held out of the training sets"
    sentences = [
        f"Trained on {_paths(entry['path'] for entry in data['train'])}",
        f"pictures hung from {_paths(data['art'])}" if data["art"] else "no pictures hung",
        f"validated on {validation}",
        "started from " + (f"`{_public(start)}`" if start else "random weights"),
    ]
    shown = {"run": {key: config[key] for key in _TOP_KEYS if key in config}}
    shown |= {group: config[group] for group in _GROUPS if group in config}
    rows = [f"| {group} | {_listed(values)} |" for group, values in shown.items()]
    command = (
        "# with config.yaml of the run's directory\n"
        "flatdepth train --config config.yaml --name NEW_NAME"
    )
    return _section(
        "Data and recipe",
        f"{'; '.join(sentences)}.\n\n"
        + "\n".join(["| | |", "|---|---|", *rows])
        + f"\n\n```bash\n{command}\n```",
    )


def _listed(values: Mapping[str, Any]) -> str:
    """``key value, key value``; the data's sets are said elsewhere, empty values not at all."""
    return ", ".join(
        f"{key} {_value(value)}"
        for key, value in values.items()
        if key not in ("train", "val", "art") or not isinstance(value, list)
        if value not in ([], {})
    )


def _value(value: Any) -> str:
    match value:
        case str():
            return _public(value)
        case bool() | None:
            return json.dumps(value)
        case int() | float():
            return f"{value:g}"
        case dict():
            return f"({_listed(value)})"
        case [int() | float() as low, int() | float() as high]:
            return f"{low:g} to {high:g}"
    return f"({'; '.join(map(_value, value))})"


def _figures(metadata: Mapping[str, str], run: RunRecord | None) -> str:
    if run is None:
        return _section(
            "Figures", "No validation is on record for these weights; measure before you rely."
        )
    evaluations = run.metrics["evaluations"]
    step = int(metadata.get("step", -1))
    after = next((e for e in evaluations if e["step"] == step), None)
    if after is None:
        return _section("Figures", f"The run has no validation at step {step} of these weights.")
    before = evaluations[0] if evaluations[0]["step"] < step else None
    columns = [e for e in (before, after) if e is not None]
    heads = [f"{metric} {'before' if e is before else 'after'}"
             for metric in ("AbsRel", "δ < 1.25") for e in columns]  # fmt: skip
    lines = [
        f"| region | images | {' | '.join(heads)} |",
        "|---|--:|" + "--:|" * len(heads),
    ]
    for region, label in _REGIONS.items():
        if region in after["table"]:
            cells = [
                _cell(e["table"].get(region, {}).get(metric))
                for metric in ("abs_rel", "delta1")
                for e in columns
            ]
            count = after["table"][region].get("images", "")
            lines.append(f"| {label} | {count} | {' | '.join(cells)} |")
    gaps = [e["illusion_gap"] for e in columns if e.get("illusion_gap") is not None]
    gap = (
        f"\n\nIllusion gap (AbsRel on mirrors and art over AbsRel on the background; 1 is none): "
        f"{' before, '.join(f'{value:.2f}' for value in gaps)}{' after' if len(gaps) > 1 else ''}."
        if gaps
        else ""
    )
    spoken = "Before: the weights the run started from. " if before else ""
    return _section(
        "Figures",
        f"Protocol: {run.metrics['protocol']}. {spoken}After: step {step}. AbsRel: lower is "
        "better; δ < 1.25: higher is better.\n\n" + "\n".join(lines) + gap + "\n\n"
        "The mirrors and pictures are pasted into the validation images with their exact planar "
        "depth; photographs of real mirrors, and cameras unlike those of the training data, were "
        "not measured.",
    )


def _licence(encoder: str, run: RunRecord | None) -> tuple[str, str]:
    """The licence's identifier on the hub, and why it is that one."""
    own_start = run is not None and run.config["model"]["checkpoint"] is None
    data = "Data sets and pictures keep the terms of their owners."
    if encoder == "vitt" or own_start:
        return "apache-2.0", f"Not derived from official weights; Apache-2.0, as flatdepth. {data}"
    name = f"The official Depth Anything V2 {_NAMES[encoder]} weights are"
    if encoder == "vits":
        return "apache-2.0", f"{name} Apache-2.0, and so are weights derived from them. {data}"
    return (
        "cc-by-nc-4.0",
        f"{name} CC-BY-NC-4.0, which weights derived from them inherit: no commercial use. {data}",
    )


def _origin(metadata: Mapping[str, str], run: RunRecord | None) -> str:
    facts = {key: value for key, value in metadata.items() if key != "format"}
    listed = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = f"Metadata of the file: {listed}."
    if run:
        versions = ", ".join(f"{k} {v}" for k, v in run.metrics.get("versions", {}).items())
        text += f" Trained on {run.metrics.get('device', 'an unknown device')} with {versions}."
    return _section("Origin", text)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _paths(paths: Iterable[str]) -> str:
    return ", ".join(f"`{_public(path)}`" for path in paths)


def _public(path: str) -> str:
    """A hub id of the official weights as it is; of any other path the last part."""
    return (
        path if path.startswith(_OFFICIAL) else path.rstrip("/\\").replace("\\", "/").split("/")[-1]
    )
