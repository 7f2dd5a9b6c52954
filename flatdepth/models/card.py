"""The model card that stands beside weights: what they are, how they came about, what they reach.

The header is what the Hugging Face Hub reads, figures included (``model-index``); the text is in
``templates/card.md``. Everything in them comes from the weights' own metadata and from the run
directory (``config.yaml``, ``metrics.json``). Local paths are cut to their last part, since cards
are made to be published.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from flatdepth.config import NETWORKS
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import CALIBRATION, calibration_of, network_of, read_metadata
from flatdepth.models.networks import network_class
from flatdepth.show.pictures import write_atomic
from flatdepth.types import METRICS, METRICS_FORMAT
from flatdepth.untrusted import parse_json, parse_yaml

Layout = Literal["files", "transformers", "diffusers", "hub"]

_NAMES = {"vits": "Small", "vitb": "Base", "vitl": "Large", "vitg": "Giant"}
_OTHER_NAMES = {"sd2": "of Stable Diffusion 2"}
_SMALL = "a small network for tests and the quickstart"
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
_KEEPING = {
    "cc-by-nc-4.0": ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    "openrail++": ("openrail++",),
}
"""Base's licence -> those that keep its restrictions; the others restrict no derived weights."""
_METRICS = {name: METRICS[name].label for name in ("abs_rel", "delta1")}
_TEMPLATES = Environment(
    loader=PackageLoader("flatdepth.models"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


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
        config = parse_yaml((run / "config.yaml").read_bytes())
        metrics = parse_json((run / "metrics.json").read_bytes())
        version = metrics["format"]
        _ = [(entry["step"], entry["label"], entry["table"]) for entry in metrics["evaluations"]]
        _ = [entry["path"] for entry in config["data"]["train"]]
        _ = [config["name"], config["data"]["val"], config["data"]["art"], metrics["protocol"]]
        _ = [config["data"]["height"], config["data"]["width"], config["model"]["checkpoint"]]
    except (ValueError, KeyError, TypeError) as error:
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


def record_of(run: Path | None, metadata: Mapping[str, str]) -> RunRecord | None:
    """``read_run`` of the run directory of weights, if it is known.

    Raises:
        UserError: as ``read_run``, or the weights say that they are of another run.
    """
    if run is None:
        return None
    record = read_run(run)
    if metadata.get("run", record.config["name"]) != record.config["name"]:
        raise UserError(
            f"{run} is the run {record.config['name']}, the weights come from the run "
            f"{metadata['run']}; give that run's directory"
        )
    return record


def model_card(
    name: str,
    metadata: Mapping[str, str],
    *,
    run: RunRecord | None,
    layout: Layout,
    licence: str | None = None,
    measured: Sequence[EvalResult] = (),
) -> str:
    """The card as Markdown with the header that the Hugging Face Hub reads.

    Args:
        name: the file's stem or the folder's name, on the hub after the repository's.
        metadata: encoder, kind, units, version and so on, as ``describe`` gives it.
        run: where recipe and figures come from; without one the card says that there are none.
        layout: which way of loading it shows.
        licence: the hub's identifier, where it is chosen (``checked_licence``).
        measured: further figures for the ``model-index``.
    """
    metadata = {**metadata, "network": network_of(metadata)}
    if recorded := calibration_of(metadata):
        metadata[CALIBRATION] = f"{'' if recorded.is_applied else 'not applied, '}{recorded}"
    published = network_class(metadata["network"]).licence(metadata["encoder"])
    identifier, reason = _licence(published, run)
    if licence is not None and licence != identifier:
        identifier, reason = licence, f"{licence}, as chosen by the publisher. {reason}"
    after = _evaluation(metadata, run)
    before = run.metrics["evaluations"][0] if run and after else None
    stem = name.rpartition("/")[2]
    title = f"{run.config['name']}, {stem}" if run and stem in ("final", "best") else stem
    base = (run.config["model"]["checkpoint"] if run else None) or ""
    results = [*(_results(run, after) if run and after else ()), *measured] or None
    header = ModelCardData(
        license=identifier,
        pipeline_tag="depth-estimation",
        library_name=layout if layout in ("transformers", "diffusers") else "flatdepth",
        tags=[_architecture(metadata)[0], "monocular-depth", "flatdepth", metadata["kind"]],
        base_model="/".join(base.split("/")[:2]) if base.startswith(_OFFICIAL) else None,
        model_name=title if results else None,
        eval_results=results,
    )
    text = _TEMPLATES.get_template("card.md").render(
        title=title,
        name=name,
        layout=layout,
        said=metadata,
        architecture=_architecture(metadata)[1],
        size=_NAMES.get(metadata["encoder"]),
        scale=(_NAMES | _OTHER_NAMES).get(metadata["encoder"], None if published else _SMALL),
        multiple=NETWORKS[metadata["network"]].multiple,
        canonical_px=_canonical_px(metadata),
        far=f"{float(metadata['max_depth_m']):g}" if "max_depth_m" in metadata else "",
        run=_recipe(run) if run else None,
        before=before if before is not after else None,
        after=after,
        regions=_REGIONS,
        metrics=_METRICS,
        measured=measured,
        number=_number,
        licence=reason,
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}\n"))


def _canonical_px(metadata: Mapping[str, str]) -> str:
    """The focal length at which the network predicts metres; "" where it does so whatever that."""
    own_px = NETWORKS[metadata["network"]].canonical_focal_px
    if own_px is not None and metadata["kind"] == "metric":
        return f"{own_px:g}"
    said = metadata.get("canonical_focal_px")
    return f"{float(said):g}" if said else ""


def _architecture(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Its tag on the hub, and in words."""
    network = network_class(metadata["network"])
    return network.name.replace("_", "-"), network.architecture


def _evaluation(metadata: Mapping[str, str], run: RunRecord | None) -> Mapping[str, Any] | None:
    """The run's validation of these very weights."""
    step = int(metadata.get("step", -1))
    evaluations = run.metrics["evaluations"] if run else ()
    return next((entry for entry in evaluations if entry["step"] == step), None)


def _results(run: RunRecord, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The figures for the ``model-index``: the region is the data set's config."""
    data = run.config["data"]
    names = [
        public_path(path) for path in data["val"] or [entry["path"] for entry in data["train"]]
    ]
    return [
        EvalResult(
            task_type="depth-estimation",
            dataset_type="+".join(names),
            dataset_name=", ".join(names),
            dataset_config=region,
            dataset_split="validation",
            metric_type=metric,
            metric_name=f"{label} on {words}",
            metric_value=evaluation["table"][region][metric],
        )
        for region, words in _REGIONS.items()
        for metric, label in _METRICS.items()
        if evaluation["table"].get(region, {}).get(metric) is not None
    ]


def evaluation_results(evaluation: Mapping[str, Any], checkpoint: Path) -> list[EvalResult]:
    """What ``flatdepth evaluate`` found for a weight file, for the ``model-index``.

    Args:
        evaluation: the JSON that it wrote.
        checkpoint: the file, which the evaluation names, or else the folder that holds it.

    Raises:
        UserError: it is of other weights.
    """
    contenders = evaluation["contenders"]
    places = (checkpoint.resolve(), checkpoint.resolve().parent)
    own = [c for c in contenders if Path(c["checkpoint"]).resolve() in places]
    if not own:
        others = ", ".join(sorted({c["checkpoint"] for c in contenders}))
        raise UserError(f"the evaluation is of {others}, not of {checkpoint}; evaluate that")
    return [
        EvalResult(
            task_type="depth-estimation",
            dataset_type=domain["name"],
            dataset_name=domain["name"],
            dataset_config=region,
            dataset_split=evaluation["part"],
            metric_type=metric,
            metric_name=f"{label} on {words}, alignment {contender['alignment']}",
            metric_value=figure["value"],
            metric_args={"protocol": evaluation["protocol"]["name"]},
        )
        for domain in evaluation["datasets"]
        for contender in own
        for region, words in _REGIONS.items()
        for metric, label in _METRICS.items()
        if (figure := domain["tables"][contender["label"]].get(region, {}).get(metric))
    ]


def _recipe(run: RunRecord) -> dict[str, Any]:
    """What the text says of a run."""
    config, data, metrics = run.config, run.config["data"], run.metrics
    start = config["model"]["checkpoint"]
    shown = {"run": {key: config[key] for key in _TOP_KEYS if key in config}}
    shown |= {group: config[group] for group in _GROUPS if group in config}
    return {
        "train": _paths(entry["path"] for entry in data["train"]),
        "art": _paths(data["art"]),
        "val": _paths(data["val"]) or "scenes held out of the training sets",
        "start": f"`{public_path(start)}`" if start else "random weights",
        "settings": [(group, _listed(values)) for group, values in shown.items()],
        "protocol": metrics["protocol"],
        "device": metrics.get("device", "an unknown device"),
        "versions": ", ".join(f"{k} {v}" for k, v in metrics.get("versions", {}).items()),
    }


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
            return public_path(value)
        case bool() | None:
            return json.dumps(value)
        case int() | float():
            return f"{value:g}"
        case dict():
            return f"({_listed(value)})"
        case [int() | float() as low, int() | float() as high]:
            return f"{low:g} to {high:g}"
    return f"({'; '.join(map(_value, value))})"


def _number(evaluation: Mapping[str, Any], region: str, metric: str) -> str:
    value = evaluation["table"].get(region, {}).get(metric)
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def provenance(metadata: Mapping[str, str], run: RunRecord | None) -> dict[str, str]:
    """What else a file without a card says of where its weights come from."""
    published = network_class(metadata["network"]).licence(metadata["encoder"])
    said = {"licence": _licence(published, run)[0]}
    if run is not None:
        names = (public_path(entry["path"]) for entry in run.config["data"]["train"])
        said |= {"trained_on": ", ".join(names), "pasted": _listed(run.config.get("paste", {}))}
    return said


def _licence(published: tuple[str, str] | None, run: RunRecord | None) -> tuple[str, str]:
    """The licence's identifier on the hub, and why it is that one."""
    own_start = run is not None and run.config["model"]["checkpoint"] is None
    if published is None or own_start:
        return "apache-2.0", "Not derived from official weights; Apache-2.0, as flatdepth."
    return published


def checked_licence(
    given: str | None, network: str, encoder: str | None, run: RunRecord | None
) -> str | None:
    """The identifier on the hub that weights may carry; None for that of what they derive from.

    Raises:
        UserError: none is given and that of the base is not known, or one that permits what the
            base's does not.
    """
    if run is not None and run.config["model"]["checkpoint"] is None:
        return given
    published = network_class(network).licence(encoder) if encoder else None
    if published is None and given is None:
        raise UserError(
            "what these weights were trained from has no licence that is known here; give theirs "
            "with --licence, such as apache-2.0"
        )
    base = published[0] if published else ""
    if given is not None and given not in _KEEPING.get(base, (given,)):
        raise UserError(
            f"--licence {given} permits what {base} of the base weights does not; expected "
            f"{' or '.join(_KEEPING[base])}"
        )
    return given


def _paths(paths: Iterable[str]) -> str:
    return ", ".join(f"`{public_path(path)}`" for path in paths)


def public_path(path: str) -> str:
    """A hub id of the official weights as it is; of any other path the last part."""
    return (
        path if path.startswith(_OFFICIAL) else path.rstrip("/\\").replace("\\", "/").split("/")[-1]
    )
