"""Weight files: loading with an account of what matched, saving in the official layout.

Loading is strict. Wrappers that training scripts add are taken off and reported; anything that
would leave a tensor of the model unset, or one of the file unused, is an error that says why.
"""

import contextlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

import flatdepth
from flatdepth.errors import UserError
from flatdepth.models.depth_anything import ENCODERS, DepthAnythingV2

FORMAT = "flatdepth"
"""The value of ``format`` in the metadata of files that we wrote."""

ENCODER = "pretrained."
HEAD = "depth_head."

WRAPPERS = ("model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")
"""Left on every name by DistributedDataParallel and torch.compile."""

TRANSFORMERS_PREFIXES = ("backbone.", "neck.", "embeddings.", "encoder.layer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
        source: the file or hub id as it was given.
        matched: tensors of the model that came from the file.
        total: tensors of the model.
        fresh: names of the tensors left as the model had them.
        unwrapped: what was taken off or converted on the way, in words.
        metadata: what we wrote into the file about the model, or None for files of others.
    """

    source: str
    matched: int
    total: int
    fresh: tuple[str, ...]
    unwrapped: tuple[str, ...]
    metadata: Mapping[str, str] | None

    def __str__(self) -> str:
        sentences = [f"{self.source}: loaded {self.matched} of {self.total} tensors"]
        if self.fresh:
            sentences.append(f"{len(self.fresh)} kept their initialisation ({_some(self.fresh)})")
        if self.unwrapped:
            sentences.append(f"On the way: {'; '.join(self.unwrapped)}")
        if self.metadata is None:
            sentences.append("The file does not say which kind of model it holds")
        else:
            fields = (f"{key} {value}" for key, value in self.metadata.items() if key != "format")
            sentences.append(f"The file says: {', '.join(fields)}")
        return ". ".join(sentences) + "."


def load_weights(
    model: DepthAnythingV2, source: str, *, head: Literal["keep", "fresh"] = "keep"
) -> LoadReport:
    """Load weights into ``model``, every tensor or none.

    Args:
        source: a local ``.pth`` or ``.safetensors`` file, or a Hugging Face Hub id ``org/name`` or
            ``org/name/path/of/file``. Without a file, the repository's only ``.safetensors`` is
            taken, else its only ``.pth``.
        head: ``"keep"`` loads the head as well, ``"fresh"`` leaves the model's own as it is, and
            so also accepts files of another kind or maximum depth and plain DINOv2 encoders.

    Raises:
        UserError: the file cannot be had or read, says that it holds another kind of model, or
            its tensors differ from the model's in name or shape. The model is unchanged then.
    """
    path = _locate(source)
    metadata = read_metadata(path)
    if metadata is not None:
        _check_metadata(model, source, metadata, head)
    tensors, unwrapped = _unwrap(_read(path, source), source)
    tensors, notes = _as_official_layout(tensors, source, head)
    unwrapped += notes
    expected = model.state_dict()
    fresh = tuple(name for name in expected if head == "fresh" and name.startswith(HEAD))
    if head == "fresh":
        tensors = {name: t for name, t in tensors.items() if not name.startswith(HEAD)}
    wanted = {name: t for name, t in expected.items() if name not in fresh}
    _check_encoder(model, source, tensors)
    _check_tensors(model, source, wanted, tensors)
    unwrapped += _conversions(wanted, tensors)
    model.load_state_dict({**expected, **tensors}, strict=True)
    return LoadReport(
        source=source,
        matched=len(tensors),
        total=len(expected),
        fresh=fresh,
        unwrapped=tuple(unwrapped),
        metadata=metadata,
    )


def save_weights(
    model: DepthAnythingV2,
    stem: Path,
    *,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write ``<stem>.pth`` and ``<stem>.safetensors``, both flat and in the official key layout.

    The original code and ours load either. What kind of model it is (``format``, ``encoder``,
    ``kind``, ``units``, ``version``, ``max_depth_m`` if metric, and ``extra``) stands in the
    safetensors header and, since a ``.pth`` has no place for it, in ``<stem>.json``. Each file is
    written under a temporary name, synced and renamed, so it exists whole or not at all.

    Args:
        stem: path without suffix; missing folders are made.
        extra: further metadata; may not redefine the names above.

    Returns:
        The paths of the ``.pth`` and of the ``.safetensors``.

    Raises:
        UserError: one of the three files exists and ``overwrite`` is False.
        ValueError: ``extra`` redefines a name.
    """
    extra = extra or {}
    metadata = _describe(model)
    if taken := sorted(metadata.keys() & extra.keys()):
        raise ValueError(f"extra metadata redefines {', '.join(taken)}")
    metadata = {**metadata, **extra}
    # The sidecar comes first: a .pth without one would be taken for an official file.
    sidecar, pth, safe = (
        stem.with_name(stem.name + suffix) for suffix in (".json", ".pth", ".safetensors")
    )
    if not overwrite and (existing := [str(p) for p in (sidecar, pth, safe) if p.exists()]):
        raise UserError(
            f"{', '.join(existing)} would be overwritten; choose another name or pass "
            "overwrite=True"
        )
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    writers: dict[Path, Callable[[Path], object]] = {
        sidecar: lambda path: path.write_text(json.dumps(metadata, indent=2) + "\n", "utf-8"),
        pth: lambda path: torch.save(state, path),
        safe: lambda path: safetensors.torch.save_file(state, path, metadata),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    _write_all(writers)
    return pth, safe


def read_metadata(path: Path) -> dict[str, str] | None:
    """What we wrote about the model in a weight file, or None if the file is not one of ours.

    Args:
        path: a ``.safetensors``, or a ``.pth`` whose ``.json`` of the same stem is read.

    Raises:
        UserError: the header or the ``.json`` is damaged.
    """
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(_unreadable(str(path), error)) from error
    else:
        sidecar = path.with_suffix(".json")
        if not sidecar.exists():
            return None
        try:
            metadata = json.loads(sidecar.read_text("utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(_unreadable(str(sidecar), error)) from error
    ours = isinstance(metadata, dict) and metadata.get("format") == FORMAT
    return {key: str(metadata[key]) for key in sorted(metadata)} if ours else None


def _locate(source: str) -> Path:
    """The local path of a source, downloaded if it is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source} is a folder; name the .pth or .safetensors file in it")
    if not path.is_file():
        parts = source.split("/")
        local = source.startswith((".", "/", "~")) or "" in parts or "\\" in source
        if local or len(parts) < 2 or (len(parts) == 2 and path.suffix in _READERS):
            raise UserError(f"{source}: no such file; give a weight file or a hub id like org/name")
        path = _download(source, "/".join(parts[:2]), "/".join(parts[2:]))
    if path.suffix not in _READERS:
        raise UserError(f"{source}: expected a {' or '.join(_READERS)} file, found {path.name}")
    return path


def _download(source: str, repo: str, file: str) -> Path:
    try:
        file = file or _only_weights(source, huggingface_hub.list_repo_files(repo))
        path = Path(huggingface_hub.hf_hub_download(repo, file))
        if path.suffix == ".pth":
            # Lands beside the weights, where read_metadata looks; official files have none.
            with contextlib.suppress(EntryNotFoundError):
                huggingface_hub.hf_hub_download(repo, file.removesuffix(".pth") + ".json")
    except UserError:
        raise
    except Exception as error:  # The failures of the hub's client share no narrower base class.
        raise UserError(
            f"{source} is neither a local file nor to be had from the Hugging Face Hub "
            f"({_first_line(error)}); check the name and the connection, or download the file and "
            "give its path"
        ) from error
    return path


def _only_weights(source: str, files: Iterable[str]) -> str:
    found = {suffix: sorted(f for f in files if f.endswith(suffix)) for suffix in _READERS}
    for suffix in (".safetensors", ".pth"):
        if len(found[suffix]) == 1:
            return found[suffix][0]
        if found[suffix]:
            break
    choice = ", ".join(found[".safetensors"] + found[".pth"]) or "no weight file"
    raise UserError(
        f"{source}: expected one .safetensors or .pth in the repository, found {choice}; "
        f"name the file as in {source}/FILE"
    )


def _read(path: Path, source: str) -> object:
    try:
        return _READERS[path.suffix](path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{source} is damaged or holds Python objects besides tensors, which are never loaded "
            "because they could run code; save its plain state dict with torch.save and load that"
        ) from error
    except Exception as error:  # On damaged bytes torch's unpickler raises almost anything.
        raise UserError(_unreadable(source, error)) from error


_READERS: dict[str, Callable[[Path], object]] = {
    ".pth": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    ".safetensors": lambda path: safetensors.torch.load_file(path),
}


def _unwrap(content: object, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Take off the dicts and name prefixes that training scripts wrap a state dict in."""
    notes = []
    while isinstance(content, dict):
        key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        rest = ", ".join(repr(other) for other in content if other != key)
        notes.append(f"took the entry {key!r}" + (f" and left {rest}" if rest else ""))
        content = content[key]
    if not isinstance(content, dict) or not content:
        found = "an empty dict" if content == {} else type(content).__name__
        raise UserError(f"{source}: expected a dict of named tensors, found {found}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{source}: expected a dict of named tensors, found {type(value).__name__} at "
                f"{name!r}; save the model's state dict alone"
            )
    tensors: dict[str, Tensor] = content
    while prefix := _shared_prefix(tensors):
        notes.append(f"took the prefix {prefix!r} off every name")
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors, notes


def _shared_prefix(names: Iterable[str]) -> str | None:
    return next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)


def _as_official_layout(
    tensors: dict[str, Tensor], source: str, head: Literal["keep", "fresh"]
) -> tuple[dict[str, Tensor], list[str]]:
    """Name the tensors as the official checkpoints do, or say why that cannot be."""
    if any(name.startswith(TRANSFORMERS_PREFIXES) for name in tensors):
        raise UserError(
            f"{source}: expected the official key layout, found the layout of transformers (names "
            f"such as {_some(tensors)}); take the original file, whose repository name has no -hf"
        )
    if "patch_embed.proj.weight" not in tensors:
        return tensors, []
    if head == "keep":
        raise UserError(
            f"{source} holds a plain DINOv2 encoder and no depth head; pass head='fresh' to start "
            "with a new head"
        )
    note = f"put the prefix {ENCODER!r} before every name of a plain DINOv2 encoder"
    return {ENCODER + name: t for name, t in tensors.items()}, [note]


def _check_metadata(
    model: DepthAnythingV2, source: str, metadata: Mapping[str, str], head: Literal["keep", "fresh"]
) -> None:
    described = _describe(model)
    # Kind and maximum depth say what the head's output means; the encoder is the same for all.
    for field in ("encoder",) if head == "fresh" else ("encoder", "kind", "max_depth_m"):
        if field in metadata and field in described and metadata[field] != described[field]:
            advice = "" if field == "encoder" else " or pass head='fresh'"
            raise UserError(
                f"{source}: {field} is {metadata[field]} in the file but {described[field]} in the "
                f"model; set {field} to {metadata[field]}{advice}"
            )


def _describe(model: DepthAnythingV2) -> dict[str, str]:
    """The metadata that tells files of the same tensors apart."""
    described = {
        "format": FORMAT,
        "encoder": model.encoder,
        "kind": model.kind,
        "units": model.units,
        "version": flatdepth.__version__,
    }
    if model.kind == "metric":
        described["max_depth_m"] = str(model.max_depth_m)
    return described


def _check_encoder(model: DepthAnythingV2, source: str, tensors: Mapping[str, Tensor]) -> None:
    """Explain an encoder of another size before its hundreds of tensors are compared."""
    token = tensors.get(ENCODER + "cls_token")
    if token is None:
        return
    prefix = ENCODER + "blocks."
    inside = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
    blocks = {name.split(".")[0] for name in inside}
    found = (token.shape[-1], len(blocks))
    sizes = {(spec.embed_dim, spec.depth): name for name, spec in ENCODERS.items()}
    spec = ENCODERS[model.encoder]
    if found != (spec.embed_dim, spec.depth):
        like = sizes.get(found)
        raise UserError(
            f"{source}: expected encoder {model.encoder} (width {spec.embed_dim}, {spec.depth} "
            f"blocks), found {like or 'one of no known size'} (width {found[0]}, {found[1]} "
            f"blocks); {f'set encoder to {like}' if like else 'take another file'}"
        )


def _check_tensors(
    model: DepthAnythingV2,
    source: str,
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Hold the file's tensors against the model's, by name, shape and kind of number."""
    if not wanted.keys() & tensors.keys():
        raise UserError(
            f"{source}: none of its {len(tensors)} tensors belongs to the model: expected names "
            f"such as {_some(wanted)}, found {_some(tensors)}; take a Depth Anything V2 file"
        )
    missing = [name for name in wanted if name not in tensors]
    if missing and set(missing) == {name for name in wanted if name.startswith(HEAD)}:
        raise UserError(
            f"{source} holds no depth head (expected names such as {_some(missing)}); pass "
            "head='fresh' to start with a new one"
        )
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unexpected := [name for name in tensors if name not in wanted]:
        faults.append(f"{len(unexpected)} are unexpected ({_some(unexpected)})")
    differing = [
        f"{name}: expected {_form(wanted[name])}, found {_form(tensor)}"
        for name, tensor in tensors.items()
        if name in wanted and (tensor.shape != wanted[name].shape or not tensor.is_floating_point())
    ]
    if differing:
        faults.append(f"{len(differing)} differ ({_some(differing)})")
    if faults:
        raise UserError(
            f"{source} does not fit {model.encoder}: {', '.join(faults)}; take a file of the same "
            "model"
        )


def _conversions(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    pairs = [(t.dtype, wanted[name].dtype) for name, t in tensors.items()]
    counts = Counter((str(found), str(own)) for found, own in pairs if found != own)
    return [f"converted {n} tensors from {a} to {b}" for (a, b), n in counts.items()]


def _write_all(writers: Mapping[Path, Callable[[Path], object]]) -> None:
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
            _sync_folder(path.parent)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; Windows cannot and need not sync folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _some(items: Iterable[str], limit: int = 3) -> str:
    listed = list(items)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip()


def _unreadable(name: str, error: Exception) -> str:
    return f"{name} cannot be read ({_first_line(error)}); if it is damaged, fetch or save it again"
