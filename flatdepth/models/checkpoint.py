"""Weight files: loading with an account of what matched, saving in the official layout.

Loading is strict. The network is looked for among what training scripts save beside and around it,
and what was left or taken off is reported; anything that would leave a tensor of the model unset,
or one of the network in the file unused, is an error that says why. What a file says about its
model (kind, maximum depth, encoder) has to agree with the model; a file that does not say it, or
says it only by its name, has to predict a rendered room as such a model would
(``flatdepth.models.probe``).
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

import flatdepth
from flatdepth.config import CANONICAL_FOCAL_PX, MAX_DEPTH_M, NETWORKS
from flatdepth.errors import UserError, expect_within
from flatdepth.models.calibration import Calibration
from flatdepth.models.depth_anything import ENCODERS, width_and_depth
from flatdepth.models.huggingface import CONFIG, WEIGHTS
from flatdepth.models.network import UNITS, DepthNetwork, Kind
from flatdepth.models.networks import CLASSES, make_network, network_class
from flatdepth.models.probe import check_weights, likely_kind
from flatdepth.models.unwrap import listed, unwrap
from flatdepth.resources import demo_file
from flatdepth.untrusted import parse_json

FORMAT = "flatdepth"
"""The value of ``format`` in the metadata of files that we wrote."""

CALIBRATION = "calibration"
"""The name in the metadata under which a ``Calibration`` is recorded."""

PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
INDEX = f"{WEIGHTS}.index.json"
"""Says in which of several files a tensor lies."""
PIPELINE = "model_index.json"
"""Says of which components a pipeline of diffusers is made; each is a folder beside it."""
PIPELINE_FILES = (PIPELINE, *(f"*/*.{suffix}" for suffix in ("json", "txt", "safetensors")))
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
MAX_JSON_BYTES = 1 << 24
"""An index of ViT-L takes 0.05 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A weight file as it was read.

    Attributes:
        source: the file, folder or hub id as it was given.
        path: the local file.
        network: the name of the network that its tensors look like, ``config.NETWORKS``.
        tensors: official name -> tensor in the file's own dtype, on the CPU.
        unwrapped: what was taken off or converted on the way, in words.
        metadata: as ``read_metadata`` gives it.
    """

    source: str
    path: Path
    network: str
    tensors: Mapping[str, Tensor]
    unwrapped: tuple[str, ...]
    metadata: Mapping[str, str] | None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and number of blocks of a DINOv2 encoder; None if there is none."""
        return width_and_depth(self.tensors)

    @property
    def encoder(self) -> str | None:
        """The encoder's name; None if there is none or none of that size."""
        return network_class(self.network).size_of(self.tensors)

    @property
    def file_bytes(self) -> int:
        """Size of the file, or of all that an index names, or of a pipeline's weights."""
        if self.path.name == PIPELINE:
            return sum(part.stat().st_size for part in self.path.parent.glob("*/*.safetensors"))
        is_index = self.path.name == INDEX
        names = _shards(self.path, self.source) if is_index else (self.path.name,)
        return sum(self.path.with_name(name).stat().st_size for name in names)

    @property
    def has_head(self) -> bool:
        prefix = network_class(self.network).head_prefix
        return not prefix or any(name.startswith(prefix) for name in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
        source: the file or hub id as it was given.
        matched: tensors of the model that came from the file.
        total: tensors of the model.
        fresh: names of the tensors left as the model had them.
        unwrapped: what was taken off or converted on the way, in words.
        metadata: what the file says about its model, as ``read_metadata`` gives it.
        doubts: what makes it doubtful that depths are right, in words.
        calibration: what became of a calibration in the file, in a sentence.
    """

    source: str
    matched: int
    total: int
    fresh: tuple[str, ...]
    unwrapped: tuple[str, ...]
    metadata: Mapping[str, str] | None
    doubts: tuple[str, ...] = ()
    calibration: str | None = None

    def __str__(self) -> str:
        sentences = [f"{self.source}: loaded {self.matched} of {self.total} tensors"]
        if self.fresh:
            sentences.append(f"{len(self.fresh)} kept their initialisation ({listed(self.fresh)})")
        if self.unwrapped:
            sentences.append(f"On the way: {'; '.join(self.unwrapped)}")
        if self.metadata is None:
            sentences.append("The file does not say which kind of model it holds")
        else:
            own = ("format", CALIBRATION)
            fields = (f"{key} {value}" for key, value in self.metadata.items() if key not in own)
            who = "Its official name" if self.metadata["format"] == "official" else "The file"
            sentences.append(f"{who} says: {', '.join(fields)}")
        sentences += [self.calibration] if self.calibration else []
        sentences += [f"Doubtful: {doubt}" for doubt in self.doubts]
        return ". ".join(sentences) + "."


def read_weights(source: str, *, network: str | None = None) -> WeightFile:
    """Read a weight file of any layout that is understood, under the official names.

    Args:
        source: a local file whose name ends in one of ``SUFFIXES`` or is ``INDEX``, a folder, or a
            Hugging Face Hub id ``org/name`` or ``org/name/path/of/file``. Without a file, a
            pipeline of diffusers is taken whole, else ``model.safetensors``, else what its index
            names, else the only file of the first ending in ``SUFFIXES`` that there is.
        network: what the file is read as; None takes the first network that knows its names.

    Raises:
        UserError: the file cannot be had or read, or holds something else than named tensors, or
            than ``network``.
    """
    path = _locate(source)
    metadata = read_metadata(path, network)
    unwrapped: tuple[str, ...] = ()
    if path.name == PIPELINE:
        found, tensors, notes = _assembled(path, source, metadata)
    else:
        tensors, unwrapped = unwrap(_read(path, source), source)
        found, tensors, notes = _recognised(tensors, metadata, network, source)
    return WeightFile(
        source=source,
        path=path,
        network=found,
        tensors=tensors,
        unwrapped=(*unwrapped, *notes),
        metadata=metadata,
    )


def weight_digest(source: str) -> str:
    """SHA-256 of a weight file, or of all that an index names after it, in order.

    Args:
        source: as in ``read_weights``.

    Raises:
        UserError: the file cannot be had.
    """
    path = _locate(source)
    names = sorted(_shards(path, source)) if path.name == INDEX else []
    digest = hashlib.sha256()
    for name in (path.name, *names):
        with path.with_name(name).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load_weights(
    model: DepthNetwork, source: str, *, head: Literal["keep", "fresh"] = "keep"
) -> LoadReport:
    """Load weights into ``model``, every tensor or none.

    A calibration in the file is left out: it is of these very weights, and they are to be trained.

    Args:
        source: as in ``read_weights``.
        head: ``"keep"`` loads the head as well, ``"fresh"`` leaves the model's own as it is, and
            so also accepts files of another kind or maximum depth and plain DINOv2 encoders.

    Raises:
        UserError: the file cannot be had or read, says that it holds another kind of model or
            predicts like one, or its tensors differ from the model's in name or shape. The model is
            unchanged then.
    """
    try:
        weights = read_weights(source, network=model.name)
    except _OtherNetwork:
        weights = read_weights(source)  # to say what it holds instead
    return _load(model, weights, head)


def open_model(
    source: str,
    *,
    kind: Kind | None = None,
    max_depth_m: float | None = None,
    network: str | None = None,
) -> tuple[DepthNetwork, LoadReport]:
    """The model that a file holds, in evaluation mode, and how it was loaded.

    It has the file's calibration where that helped on scenes that it was not fitted on.

    Args:
        source, network: as in ``read_weights``.
        kind, max_depth_m: what the file holds, for one that does not say it.

    Raises:
        UserError: as for ``load_weights``, the file holds no encoder of a known size or no head, or
            neither it nor the arguments say the kind.
    """
    weights = read_weights(source, network=network)
    return model_of(weights, kind=kind, max_depth_m=max_depth_m)


def model_of(
    weights: WeightFile, *, kind: Kind | None = None, max_depth_m: float | None = None
) -> tuple[DepthNetwork, LoadReport]:
    """``open_model`` for a file that has been read."""
    source, said = weights.source, weights.metadata or {}
    network = network_class(weights.network)
    if weights.encoder is None:
        width_and_depth = f"one of width and depth {weights.size}"
        found = "no encoder of these" if weights.size is None else width_and_depth
        raise UserError(
            f"{source}: expected an encoder of {network.title} ({', '.join(network.sizes)}), found "
            f"{found}; take another file"
        )
    if not weights.has_head:
        raise UserError(
            f"{source}{_notes(weights)} holds no depth head and so predicts nothing; train one "
            "from it with model.head fresh"
        )
    given = {"kind": kind, "max_depth_m": None if max_depth_m is None else str(float(max_depth_m))}
    for field, value in given.items():
        believed = said.get("format") != "official"
        if believed and value is not None and field in said and said[field] != value:
            raise UserError(
                f"{source} says that its {field} is {said[field]}, so {value} would misread it; "
                f"leave {field} out"
            )
    kinds = NETWORKS[weights.network].kinds
    chosen = kind or said.get("kind") or (kinds[0] if len(kinds) == 1 else None)
    if chosen is None:
        guess = guess_kind(weights)
        hint = f", and its logits look {guess}" if guess else ""
        with_range = " and --max_depth_m" if network.bounded else ""
        choices = (f"--kind {k}{with_range if k == 'metric' else ''}" for k in kinds)
        raise UserError(f"{source} does not say its kind{hint}; give {', or '.join(choices)}")
    if chosen != "metric":
        model = make_network(weights.network, weights.encoder, kind=cast(Kind, chosen))
    elif max_depth_m is None and "max_depth_m" not in said and network.bounded:
        raise UserError(
            f"{source} does not say its maximum depth; give --max_depth_m, which is 20 for the "
            "official indoor files and 80 for outdoor"
        )
    else:
        known = float(said.get("max_depth_m", MAX_DEPTH_M[1]))
        model = make_network(
            weights.network,
            weights.encoder,
            kind="metric",
            max_depth_m=known if max_depth_m is None else max_depth_m,
            canonical_focal_px=_canonical_focal_px(said),
        )
        recorded = calibration_of(said)
        model.calibration = recorded if recorded and recorded.is_applied else None
    model.trained_px = trained_px(said)
    return model.eval(), _load(model, weights, "keep")


def trained_px(said: Mapping[str, str]) -> tuple[int, int] | None:
    """Rows and columns of the input in the training, if metadata say them."""
    size = re.fullmatch(r"(\d{1,5}) x (\d{1,5})", said.get("input_px", ""))
    return (int(size[1]), int(size[2])) if size else None


def _canonical_focal_px(said: Mapping[str, str]) -> float | None:
    return float(said["canonical_focal_px"]) if "canonical_focal_px" in said else None


def calibration_of(said: Mapping[str, str]) -> Calibration | None:
    """The calibration that metadata record, applied or not.

    Raises:
        UserError: it is damaged.
    """
    return Calibration.read(said[CALIBRATION]) if CALIBRATION in said else None


def guess_kind(weights: WeightFile) -> Kind | None:
    """What the logits of a whole model look like; None if they do not tell or are no whole model.

    Raises:
        UserError: the tensors are not those of a model of the encoder's size.
    """
    probed = network_class(weights.network).probed
    if weights.encoder is None or not weights.has_head or not probed:
        return None
    model = make_network(weights.network, weights.encoder, kind="relative")
    _check_tensors(model, weights, model.state_dict(), weights.tensors)
    model.load_state_dict({name: t.float() for name, t in weights.tensors.items()})
    return likely_kind(model)


def _load(model: DepthNetwork, weights: WeightFile, head: Literal["keep", "fresh"]) -> LoadReport:
    doubts = _check_metadata(model, weights, head)
    expected = model.state_dict()
    fresh = tuple(
        name for name in expected if head == "fresh" and name.startswith(model.head_prefix)
    )
    wanted = {name: t for name, t in expected.items() if name not in fresh}
    tensors = {
        name: t
        for name, t in weights.tensors.items()
        if head == "keep" or not name.startswith(model.head_prefix)
    }
    _check_encoder(model, weights)
    _check_tensors(model, weights, wanted, tensors)
    state = {**expected, **{name: t.to(expected[name]) for name, t in tensors.items()}}
    said = weights.metadata or {}
    # What we wrote is believed; names and configs of others are soon wrong.
    if model.probed and head == "keep" and said.get("format") != FORMAT:
        probed = check_weights(model, state, weights.source)
        doubts += () if "max_depth_m" in said else probed
    model.adopt(said)
    model.load_state_dict(state, strict=True)
    return LoadReport(
        source=weights.source,
        matched=len(tensors),
        total=len(expected),
        fresh=fresh,
        unwrapped=(*weights.unwrapped, *_conversions(wanted, tensors)),
        metadata=weights.metadata,
        doubts=doubts,
        calibration=_fate(calibration_of(said), model),
    )


def _fate(recorded: Calibration | None, model: DepthNetwork) -> str | None:
    """What becomes of a file's calibration, in a sentence without its full stop."""
    if recorded is None:
        return None
    if not recorded.is_applied:
        return f"Not calibrated: {recorded} did not help on both halves of the scenes"
    if model.calibration is None:
        return f"Its calibration ({recorded}) is left out: calibrate anew what is trained"
    return f"Calibrated: {recorded}"


def save_weights(
    model: DepthNetwork,
    stem: Path,
    *,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write ``<stem>.pth`` and ``<stem>.safetensors``, both flat and in the official key layout.

    The original code and ours load either. What kind of model it is (``format``, ``network``,
    ``encoder``, ``kind``, ``units``, ``version``, ``max_depth_m`` if metric and bounded,
    ``canonical_focal_px`` if it was chosen, ``input_px`` if known, ``calibration`` if it has one,
    and ``extra``) stands in the safetensors header and, since a ``.pth`` has no place for it, in
    ``<stem>.json``. Each file is written under a temporary name, synced and renamed, so it exists
    whole or not at all.

    Args:
        stem: path without suffix; missing folders are made.
        extra: further metadata; may not redefine the names above.

    Returns:
        The paths of the ``.pth`` and of the ``.safetensors``.

    Raises:
        UserError: one of the three files exists and ``overwrite`` is False.
        ValueError: ``extra`` redefines a name.
    """
    metadata = describe(model, extra or {})
    # The sidecar comes first: a .pth without one would be taken for an official file.
    sidecar, pth, safe = (
        stem.with_name(stem.name + suffix) for suffix in (".json", ".pth", ".safetensors")
    )
    if not overwrite and (existing := [str(p) for p in (sidecar, pth, safe) if p.exists()]):
        raise UserError(
            f"{', '.join(existing)} would be overwritten; choose another name or pass "
            "overwrite=True"
        )
    state = plain_state(model)
    writers: dict[Path, Callable[[Path], object]] = {
        sidecar: lambda path: write_json(path, metadata),
        pth: lambda path: torch.save(state, path),
        safe: lambda path: safetensors.torch.save_file(state, path, metadata),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_together(writers)
    return pth, safe


def read_metadata(path: Path, network: str | None = None) -> dict[str, str] | None:
    """What a weight file says about its model, or None if it says nothing.

    ``format`` tells who says it: ``flatdepth`` for the metadata that ``save_weights`` wrote,
    ``transformers`` for the ``config.json`` of that layout, ``diffusers`` for a pipeline's
    ``model_index.json``, ``official`` for the name of a file of the original project, whose names
    are fixed.

    Args:
        path: a ``.safetensors``, an index, a pickle whose ``.json`` of the same stem is read, or a
            ``model_index.json``.
        network: as in ``read_weights``.

    Raises:
        UserError: the header or the ``.json`` is damaged, or the name is one of version 1.
    """
    header: object = None
    networks = [network] if network else list(CLASSES)
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = file.metadata()
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(unreadable(str(path), error)) from error
    elif path.suffix in PICKLES:
        header = _read_json(path.with_suffix(".json"))
    if isinstance(header, dict) and header.get("format") == FORMAT:
        said = checked_metadata({key: str(header[key]) for key in sorted(header)}, path)
        readers = network_class(network).reads_files_of if network else ()
        return said | {"network": str(network)} if said.get("network") in readers else said
    if path.name in (WEIGHTS, INDEX, PICKLED_WEIGHTS, PIPELINE):
        is_pipeline = path.name == PIPELINE
        config = _read_json(path.with_name(PIPELINE if is_pipeline else CONFIG))
        for name in networks if isinstance(config, dict) else ():
            configured = network_class(name).configured(cast(dict[str, object], config), str(path))
            if configured is not None:
                own = header if isinstance(header, dict) else {}
                layout = "diffusers" if is_pipeline else "transformers"
                said = {**own, **_with_units(configured), "network": name, "format": layout}
                return _with_sound_camera({key: str(said[key]) for key in sorted(said)}, path)
    for name in networks:
        named = network_class(name).named(path.stem)
        if named is not None:
            return {"format": "official", "network": name, **named}
    return None


def _with_units(said: Mapping[str, str]) -> dict[str, str]:
    units = UNITS.get(cast(Kind, said.get("kind")))
    return {**said, "units": units} if units else dict(said)


def network_of(said: Mapping[str, str]) -> str:
    """The network that metadata mean; files of earlier versions say its encoder only."""
    homes = (name for name, facts in NETWORKS.items() if said.get("encoder") in facts.encoders)
    return said.get("network") or next(homes, next(iter(NETWORKS)))


def checked_metadata(said: dict[str, str], path: Path) -> dict[str, str]:
    """Metadata that we wrote, after a look at the values on which reading the weights depends."""
    network = network_of(said)
    bounded = network not in CLASSES or network_class(network).bounded
    far = said.get("max_depth_m", "nan" if said.get("kind") == "metric" and bounded else "1")
    try:
        sound = 0 < float(far) < math.inf and said.get("kind") in get_args(Kind)
    except ValueError:
        sound = False
    if not sound:
        shown = ", ".join(f"{key} {said.get(key)}" for key in ("kind", "max_depth_m"))
        raise UserError(
            f"{path}: expected in its metadata the kind metric, with max_depth_m in metres, "
            f"relative or affine, found {shown}; save it again"
        )
    return _with_sound_camera(said, path)


def _with_sound_camera(said: dict[str, str], path: Path) -> dict[str, str]:
    """Metadata after a look at focal length and calibration, which folders of others carry too."""
    try:
        focal_px = _canonical_focal_px(said)
        if focal_px is not None:
            expect_within("canonical_focal_px", focal_px, *CANONICAL_FOCAL_PX)
        calibration_of(said)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: its metadata are damaged ({error}); save it again") from error
    return said


def _read_json(path: Path) -> object:
    """The content of a JSON file; None if there is no such file."""
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        return parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(unreadable(str(path), error)) from error


def _locate(source: str) -> Path:
    """The local path of a source, downloaded if it is a hub id."""
    path = Path(demo_file(source)).expanduser()
    if path.is_dir():
        path /= _only_weights(source, (file.name for file in path.iterdir()))
    elif not path.is_file():
        parts = source.split("/")
        local = source.startswith((".", "/", "~")) or "" in parts or "\\" in source
        if local or len(parts) < 2 or (len(parts) == 2 and path.suffix in SUFFIXES):
            raise UserError(f"{source}: no such file; give a weight file or a hub id like org/name")
        path = _download(source, "/".join(parts[:2]), "/".join(parts[2:]))
    if path.suffix not in SUFFIXES and path.name not in (INDEX, PIPELINE):
        raise UserError(
            f"{source}: expected a file that ends in {', '.join(SUFFIXES)} or {INDEX}, found "
            f"{path.name}"
        )
    return path


def _download(source: str, repo: str, file: str) -> Path:
    try:
        file = file or _only_weights(source, huggingface_hub.list_repo_files(repo))
        if file == PIPELINE:
            ignored = ["*fp16*", "*non_ema*", "safety_checker/*"]
            whole = huggingface_hub.snapshot_download(
                repo, allow_patterns=list(PIPELINE_FILES), ignore_patterns=ignored
            )
            return Path(whole) / PIPELINE
        path = Path(huggingface_hub.hf_hub_download(repo, file))
        folder = file.removesuffix(path.name)
        shards = _shards(path, source) if path.name == INDEX else ()
        # These land beside the weights, where they are looked for; official files have none.
        for beside in (f"{path.stem}.json", CONFIG, *shards):
            with contextlib.suppress(EntryNotFoundError):
                huggingface_hub.hf_hub_download(repo, folder + beside)
    except UserError:
        raise
    except Exception as error:  # The failures of the hub's client share no narrower base class.
        raise UserError(
            f"{source} is neither a local file nor to be had from the Hugging Face Hub "
            f"({first_line(error)}); check the name and the connection, or download the file and "
            "give its path"
        ) from error
    return path


def _only_weights(source: str, files: Iterable[str]) -> str:
    """The one file of a folder or repository that ``read_weights`` takes."""
    files = list(files)
    if PIPELINE in files:
        return PIPELINE
    found = [file for file in sorted(files) if file.endswith(SUFFIXES) or file == INDEX]
    alike = [[file for file in found if file.endswith(suffix)] for suffix in SUFFIXES]
    choice = next((c for c in ([WEIGHTS], [INDEX], *alike) if c and c[0] in found), [])
    if len(choice) == 1:
        return choice[0]
    raise UserError(
        f"{source}: expected one .safetensors or .pth in it, found "
        f"{', '.join(found) or 'no weight file'}; name the file as in {source}/FILE"
    )


def _read(path: Path, source: str) -> object:
    if path.name != INDEX:
        return _read_file(path, source)
    tensors: dict[str, Tensor] = {}
    for shard, names in _shards(path, source).items():
        if not path.with_name(shard).is_file():
            raise UserError(
                f"{source}: {shard}, which {INDEX} names, is missing; put all files of the index "
                "into one folder"
            )
        part = cast(dict[str, Tensor], _read_file(path.with_name(shard), f"{source}: {shard}"))
        if part.keys() != names:
            differing = listed(sorted(part.keys() ^ names))
            raise UserError(
                f"{source}: {shard} and {INDEX} do not name the same tensors ({differing}); take "
                "both from one export"
            )
        tensors |= part
    return tensors


def _shards(index: Path, source: str) -> dict[str, set[str]]:
    """Name of each file beside an index -> names of its tensors."""
    content = _read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    shards: dict[str, set[str]] = {}
    for name, shard in places.items() if isinstance(places, dict) else ():
        if not (isinstance(shard, str) and SHARD_NAME.fullmatch(shard)):
            raise UserError(
                f"{source}: expected in {INDEX} names of .safetensors files in its own folder, "
                f"found {shard!r} for {name}; download or export it again"
            )
        shards.setdefault(shard, set()).add(name)
    if not shards:
        raise UserError(
            f"{source}: expected in {INDEX} a weight_map from tensors to files, found none; "
            "download or export it again"
        )
    return shards


def _read_file(path: Path, source: str) -> object:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # torch warns of some pickles before it refuses them; the refusal says it all.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{source} holds {refused[1]} besides tensors, and only tensors are loaded because "
                "anything else could run code; where you trust the file, save its state dict "
                "alone, as in torch.save(torch.load(FILE, weights_only=False)['state_dict'], "
                "'weights.pth')"
            ) from error
        raise UserError(
            f"{source} is damaged or holds Python objects besides tensors, which are never loaded "
            "because they could run code; save its plain state dict with torch.save and load that"
        ) from error
    except Exception as error:  # On damaged bytes torch's unpickler raises almost anything.
        if "TorchScript" in str(error):
            raise UserError(
                f"{source} is a TorchScript program, expected a state dict; save that alone, as in "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            ) from error
        raise UserError(unreadable(source, error)) from error


class _OtherNetwork(UserError):
    """The tensors are not those of the network that was asked for."""


def _assembled(
    path: Path, source: str, metadata: Mapping[str, str] | None
) -> tuple[str, dict[str, Tensor], list[str]]:
    """What ``_recognised`` gives, of a pipeline of diffusers."""
    if metadata is None:
        raise UserError(
            f"{source}: expected a pipeline of diffusers that predicts depth, such as Marigold, "
            f"found another in {PIPELINE}; take another one"
        )
    try:
        return (metadata["network"], *network_class(metadata["network"]).assembled(path.parent))
    except UserError:
        raise
    except Exception as error:  # Of damaged components the libraries raise almost anything.
        raise UserError(unreadable(source, error)) from error


def _recognised(
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str] | None,
    network: str | None,
    source: str,
) -> tuple[str, dict[str, Tensor], list[str]]:
    """The network whose tensors they look like, the tensors by its names, and what was done.

    ``network`` if it is given; that which the file says comes before others; what no network knows
    is taken for the first.
    """
    said = (metadata or {}).get("network")
    for name in [network] if network else sorted(CLASSES, key=lambda name: name != said):
        found = network_class(name).renamed(tensors)
        if found is not None:
            return (name, *found)
    if network is not None:
        raise _OtherNetwork(
            f"{source}: expected tensors of {network_class(network).title}, found names such as "
            f"{listed(tensors)}; take another file or network"
        )
    return next(iter(CLASSES)), tensors, []


def _check_metadata(
    model: DepthNetwork, weights: WeightFile, head: Literal["keep", "fresh"]
) -> tuple[str, ...]:
    """Hold what a file says against the model; what only its name says is doubted, not refused."""
    described, metadata = describe(model), weights.metadata or {}
    doubts = [] if head == "fresh" else _focal_doubts(model, weights)
    # Kind and maximum depth say what the head's output means; the encoder is the same for all.
    meaning = () if head == "fresh" else ("kind", "max_depth_m") if model.bounded else ("kind",)
    for field in ("network", "encoder", *meaning):
        said, own = metadata.get(field), described.get(field)
        if said is None or own is None or said == own:
            continue
        if metadata["format"] == "official":
            if field in meaning:  # The tensors say the rest.
                doubts.append(
                    f"{field} is {said} by the file's official name but {own} in the model; set it "
                    f"to {said} if the file is what its name says"
                )
            continue
        advice = " or pass head='fresh'" if field in meaning else ""
        raise UserError(
            f"{weights.source}: {field} is {said} in the file but {own} in the model"
            f"{_CONSEQUENCES.get((said, own), '')}; set {field} to {said}{advice}"
        )
    return tuple(doubts)


def _focal_doubts(model: DepthNetwork, weights: WeightFile) -> list[str]:
    """Whether weights were trained for another focal length than the model, in words.

    Raises:
        UserError: both have one, and not the same.
    """
    said = _canonical_focal_px(weights.metadata or {})
    own = model.canonical_focal_px
    if model.kind != "metric" or NETWORKS[model.name].canonical_focal_px is not None or said == own:
        return []
    if said is not None and own is not None:
        raise UserError(
            f"{weights.source}: canonical_focal_px is {said:g} in the file but {own:g} in the "
            f"model, which would make every depth wrong by a factor of {said / own:.3g}; set it to "
            f"{said:g} or pass head='fresh'"
        )
    if own is not None:
        return [
            "the weights were trained without canonical_focal_px; their metres are as before in "
            f"images of {own:g} px and in proportion to the focal length elsewhere, until trained"
        ]
    return [
        f"the weights were trained with canonical_focal_px {said:g} and the model is without; "
        f"their metres are right in images of {said:g} px only, so set it to {said:g}"
    ]


_CONSEQUENCES = {
    ("relative", "metric"): ", which would read relative weights as max_depth_m nearly everywhere",
    ("metric", "relative"): ", which would read metric weights as 0 nearly everywhere",
}


def describe(model: DepthNetwork, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata that tells files of the same tensors apart, and ``extra``.

    Raises:
        ValueError: ``extra`` redefines a name.
    """
    described = {
        "format": FORMAT,
        "network": model.name,
        "encoder": model.encoder,
        "kind": model.kind,
        "units": model.units,
        "version": flatdepth.__version__,
        **model.said(),
    }
    # The class, not the model: ZoeDepth's bins have a range even where predictions may exceed it.
    if model.kind == "metric" and type(model).bounded:
        described["max_depth_m"] = str(model.max_depth_m)
    if model.canonical_focal_px != NETWORKS[model.name].canonical_focal_px and model.needs_focal:
        described["canonical_focal_px"] = str(model.canonical_focal_px)
    if model.trained_px:
        described["input_px"] = " x ".join(map(str, model.trained_px))
    if model.calibration is not None:
        described[CALIBRATION] = model.calibration.text()
    extra = extra or {}
    if taken := sorted(described.keys() & extra.keys()):
        raise ValueError(f"extra metadata redefines {', '.join(taken)}")
    return {**described, **extra}


def plain_state(model: DepthNetwork) -> dict[str, Tensor]:
    """The state dict as it is written: on the CPU, contiguous, without gradients."""
    state = model.published(model.state_dict())
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}


def _check_encoder(model: DepthNetwork, weights: WeightFile) -> None:
    """Explain an encoder of another size before its hundreds of tensors are compared."""
    like, size = weights.encoder, weights.size
    if like == model.encoder or (like is None and size is None):
        return
    spec = ENCODERS.get(model.encoder) if weights.size else None
    wanted = f" (width {spec.embed_dim}, {spec.depth} blocks)" if spec else ""
    found = f" (width {size[0]}, {size[1]} blocks)" if size else ""
    raise UserError(
        f"{weights.source}: expected encoder {model.encoder}{wanted}, found "
        f"{like or 'one of no known size'}{found}; "
        f"{f'set encoder to {like}' if like else 'take another file'}"
    )


def _check_tensors(
    model: DepthNetwork,
    weights: WeightFile,
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Hold the file's tensors against the model's, by name, shape and kind of number."""
    source = f"{weights.source}{_notes(weights)}"
    if not wanted.keys() & tensors.keys():
        raise UserError(
            f"{source}: none of its {len(tensors)} tensors belongs to the model: expected names "
            f"such as {listed(wanted)}, found {listed(tensors)}; take a {model.title} file"
        )
    missing = [name for name in wanted if name not in tensors]
    if missing and set(missing) == {n for n in wanted if n.startswith(model.head_prefix)}:
        raise UserError(
            f"{source} holds no depth head (expected names such as {listed(missing)}); pass "
            "head='fresh' to start with a new one"
        )
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({listed(missing)})")
    if unexpected := [name for name in tensors if name not in wanted]:
        faults.append(f"{len(unexpected)} are unexpected ({listed(unexpected)})")
    differing = [
        f"{name}: expected {_form(wanted[name])}, found {_form(tensor)}"
        for name, tensor in tensors.items()
        if name in wanted and (tensor.shape != wanted[name].shape or not tensor.is_floating_point())
    ]
    if differing:
        faults.append(f"{len(differing)} differ ({listed(differing)})")
    if faults:
        fix = "take a file of the same model"
        if weights.network != model.name:
            fix = f"it looks like {weights.network}, so set model.name to that or {fix}"
        raise UserError(f"{source} does not fit {model.encoder}: {', '.join(faults)}; {fix}")


def _notes(weights: WeightFile) -> str:
    """What was done to the file on the way, in brackets."""
    return f" ({'; '.join(weights.unwrapped)})" if weights.unwrapped else ""


def _conversions(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    pairs = [(t.dtype, wanted[name].dtype) for name, t in tensors.items()]
    counts = Counter((str(found), str(own)) for found, own in pairs if found != own)
    return [f"converted {n} tensors from {a} to {b}" for (a, b), n in counts.items()]


def write_json(path: Path, content: object) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_together(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files that belong together: all under temporary names, then rename in order."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            temporary[path].touch()
            mode = temporary[path].stat().st_mode
            write(temporary[path])
            # safetensors makes files that only their owner may read; the umask shall decide.
            temporary[path].chmod(mode)
            with temporary[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path, written in temporary.items():
            written.replace(path)
            sync_folder(path.parent)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; Windows cannot and need not sync folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def unreadable(name: str, error: Exception) -> str:
    return f"{name} cannot be read ({first_line(error)}); if it is damaged, fetch or save it again"
