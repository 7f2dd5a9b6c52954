"""The network among what training scripts save around it.

A checkpoint of a training holds the network's tensors in some dict, under some entry (``model``,
``state_dict``, ``ema``, ...), and their names may begin with the attribute that the script keeps
the network in. Neither has to be known: the encoder's class token, or of a convolutional one the
first convolution, shows where a network is.

Of several networks those with a depth head go first, then averages over the steps (of whose name
``ema`` or ``swa`` is a part), and a ``teacher`` comes last.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from flatdepth.errors import UserError

_SKY_STACKS = {
    "model.backbone.pretrained.cls_token": "model.head.scratch.sky_output_conv2.0.weight",
    "backbone.pretrained.cls_token": "head.scratch.sky_output_conv2.0.weight",
    "net.pretrained.cls_token": "all_heads.head.scratch.output_conv2_additional.sky_mask.0.weight",
}
"""The class token of Depth Anything 3 on the hub, of its network alone and of older files, and what
lies elsewhere if the network is that one and not another one in a wrapper."""

_FIRST = (
    *_SKY_STACKS,
    "pretrained.cls_token",
    "backbone.embeddings.cls_token",
    "embeddings.cls_token",
    "cls_token",
    "pretrained.layer1.0.weight",
    "pretrained.stem.0.weight",
    "pretrained.stem.weight",
    "conv1.weight",
    "_conv_stem.weight",
)
"""Names of the class token in the official layouts, in that of transformers with and without a
head, in DINOv2; of the first convolution in MiDaS v2.1, in our ResNet and EfficientNet and in
theirs."""

_HEADS = (
    *("depth_head.", "neck.", "scratch."),
    *("model.head.scratch.", "head.scratch.", "all_heads.head.scratch."),
)

_WRAPPER = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\."
)
"""What DataParallel, torch.compile, Lightning, FSDP and checkpointing put into names."""

_OWNER = re.compile(
    r"\w*model|\w*net|network|student|teacher|backbone|dinov2|depth_anything|\w*ema\w*|da3_metric"
)
"""Attributes that hold a network. ``core``, as in the metric models of Depth Anything version 1, is
none: the names after it are those of version 2, the blocks that the head reads are not. Nor is
``da3``, beside ``da3_metric`` in nested files: a network of several views."""

_AVERAGE = re.compile(r"(?<![^._])(?:ema|swa)(?![^._])")

_DEPTH = 4
"""Dicts in dicts that are looked into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """Tensors in a file that may be a network.

    Attributes:
        path: entries of the dicts, from the outermost, that lead to the tensors.
        prefix: what is before each name; None if nothing shows where they begin.
        tensors: name without prefix and wrappers -> tensor.
        notes: what was left or taken off, in words.
    """

    path: tuple[str, ...]
    prefix: str | None
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        return ".".join((*self.path, *(self.prefix or "").split(".")[:-1])) or "the outermost"

    @property
    def has_head(self) -> bool:
        return any(name.startswith(_HEADS) for name in self.tensors)

    def rank(self) -> tuple[bool, bool, bool, bool, int]:
        """Smaller is better; of those that nothing marks the most tensors are best."""
        unknown = self.prefix is None
        is_teacher, is_average = "teacher" in self.label, _AVERAGE.search(self.label)
        size = len(self.tensors) if unknown else 0
        return unknown, not self.has_head, is_teacher, not is_average, -size


def unwrap(content: object, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The network's tensors by their names in it, and what was left or taken off, in words.

    Args:
        content: what a weight file holds.
        source: the file's name for messages.

    Raises:
        UserError: there is no dict of named tensors.
    """
    found = list(_networks(content)) if isinstance(content, dict) else []
    if not found:
        holds = type(content).__name__
        if isinstance(content, dict):
            entries = ", ".join(f"{key!r}: {type(content[key]).__name__}" for key in [*content][:3])
            holds = f"a dict of {entries}" if entries else "an empty dict"
        raise UserError(
            f"{source}: expected a dict of named tensors, found {holds}; save the model's state "
            "dict with torch.save"
        )
    best = min(found, key=_Network.rank)
    notes = list(best.notes)
    rivals = [n.label for n in found if n.rank()[:2] == best.rank()[:2] and n.prefix is not None]
    if len(rivals) > 1:
        notes.insert(0, f"of the networks {listed(rivals)} took {best.label}")
    return best.tensors, tuple(notes)


def listed(items: Iterable[str], limit: int = 3) -> str:
    """The first of them, with an ellipsis if there are more."""
    some = list(items)
    return ", ".join(some[:limit]) + (", ..." if len(some) > limit else "")


def _networks(content: Mapping[object, object]) -> Iterator[_Network]:
    """All dicts that hold tensors, the outer ones first; each once, whatever leads to it."""
    seen: set[int] = set()
    queue: list[tuple[tuple[str, ...], tuple[str, ...], Mapping[object, object]]]
    queue = [((), (), content)]
    for path, notes, level in queue:
        if id(level) in seen or len(path) > _DEPTH:
            continue
        seen.add(id(level))
        for key, value in level.items():
            if isinstance(value, dict):
                note = f"took the entry {key!r}{_left(repr(k) for k in level if k != key)}"
                queue.append(((*path, str(key)), (*notes, note), value))
        named = {n: t for n, t in level.items() if isinstance(n, str) and isinstance(t, Tensor)}
        others = [repr(key) for key in level if key not in named]
        if others:
            notes = (*notes, _left(others).removeprefix(" and "))
        prefixes: list[str | None] = [*_prefixes(named)]
        for prefix in prefixes or ([None] if named else []):
            yield _network(path, prefix, named, notes)


def _network(
    path: tuple[str, ...], prefix: str | None, named: Mapping[str, Tensor], notes: tuple[str, ...]
) -> _Network:
    start = prefix or ""
    inside = {n.removeprefix(start): t for n, t in named.items() if n.startswith(start)}
    if start:
        outside = [n for n in named if not n.startswith(start)]
        notes = (*notes, f"took the prefix {start!r} off every name{_left(outside)}")
    bare = {_WRAPPER.sub("", name): tensor for name, tensor in inside.items()}
    # Where wrapped and bare names coincide, all stay as they are, for the caller to complain about.
    if bare.keys() != inside.keys() and len(bare) == len(inside):
        wrappers = {match for name in inside for match in _WRAPPER.findall(name)}
        inside, notes = bare, (*notes, f"took {listed(sorted(wrappers))} out of the names")
    return _Network(path=path, prefix=prefix, tensors=inside, notes=notes)


def _prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of ``_FIRST``, for every one of them."""
    bare_names = {name: _WRAPPER.sub("", name) for name in names}
    known = {*bare_names.values()}

    def is_token(bare: str, token: str) -> bool:
        beside = _SKY_STACKS.get(token)
        owner = bare.removesuffix(token)
        return f".{bare}".endswith(f".{token}") and (beside is None or owner + beside in known)

    prefixes = []
    for name, bare in bare_names.items():
        token = next((t for t in _FIRST if is_token(bare, t)), None)
        owners = bare.removesuffix(token or "").split(".")[:-1]
        if token and all(_OWNER.fullmatch(owner) for owner in owners):
            prefixes.append(name[: name.rindex(token.split(".")[0])])
    return prefixes


def _left(others: Iterable[str]) -> str:
    rest = listed(others)
    return f" and left {rest}" if rest else ""
