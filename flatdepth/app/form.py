"""The paste stage's settings as controls, made from the configuration's own fields and bounds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gradio as gr
import yaml
from docstring_parser import parse_from_object

from flatdepth.config import PASTE_BOUNDS, Bounds, PasteConfig, SetConfig, TrainConfig

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "How many, how large": ("share", "max_pastes", "area", "max_area"),
    "What is pasted": ("content", "mirror_target", "mirror_portion"),
    "Where": (
        *("layout", "max_tilt_deg", "thickness_m"),
        *("plane_tolerance", "depth_noise", "depth_test"),
    ),
    "Outlines and frames": ("shape", "framed", "frame_width", "mat"),
    "Look": ("stylised", "glass", "worn", "shadow", "match_light", "match_sensor"),
}
"""Heading -> fields of ``PasteConfig``; its ``stages`` are for a whole run."""

_FINE = 0.001
_ENDS = ("lowest", "highest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A value that a control sets.

    Attributes:
        path: names of the field, from ``PasteConfig`` down.
        part: which number of a pair it is; None where there is one.
        default: its value by default.
        bounds: of a number.
        choices: of a name.
        about: what it means.
    """

    path: tuple[str, ...]
    part: int | None
    default: Any
    bounds: Bounds | None
    choices: tuple[str, ...]
    about: str

    @property
    def label(self) -> str:
        name = ".".join(self.path)
        return name if self.part is None else f"{name}, {_ENDS[self.part]}"

    @property
    def step(self) -> float:
        """Between the places of a slider, which it counts from its low end."""
        low, high = self.bounds or (0.0, 1.0)
        return 1.0 if isinstance(self.default, int) or high > 10 else min(_FINE, low or _FINE)


def knobs(section: str) -> Iterator[Knob]:
    """The values under a heading of ``SECTIONS``."""
    for name in SECTIONS[section]:
        group = getattr(PasteConfig(), name)
        if is_dataclass(group):
            for own in fields(group):
                yield from _of_field(group, (name, own.name), (0.0, 1.0))  # relative to each other
        else:
            yield from _of_field(PasteConfig(), (name,), PASTE_BOUNDS.get(name))


def _of_field(owner: Any, path: tuple[str, ...], bounds: Bounds | None) -> Iterator[Knob]:
    name = path[-1]
    hint, value = get_type_hints(type(owner))[name], getattr(owner, name)
    notes = {note.arg_name: note.description for note in parse_from_object(type(owner)).params}
    pair = isinstance(value, tuple)
    for part in (0, 1) if pair else (None,):
        yield Knob(
            path=path,
            part=part,
            default=value if part is None else value[part],
            bounds=bounds,
            choices=get_args(hint) if get_origin(hint) is Literal else (),
            about="" if part == 1 else " ".join(str(notes.get(name) or "").split()),
        )


KNOBS = tuple(knob for section in SECTIONS for knob in knobs(section))
"""All of them, in the order in which ``paste_config`` takes their values."""


def paste_config(values: Sequence[Any]) -> PasteConfig:
    """The configuration that the values of ``KNOBS`` make.

    Raises:
        UserError: they do not go together.
    """
    chosen: dict[str, Any] = {}
    for knob, value in zip(KNOBS, values, strict=True):
        whole = isinstance(knob.default, int) and not isinstance(knob.default, bool)
        given = type(knob.default)(round(value) if whole else value)
        *groups, name = knob.path
        inside = chosen
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[name] = given if knob.part is None else (*inside.get(name, ()), given)
    default = PasteConfig()
    for name, value in chosen.items():
        if isinstance(value, dict):
            chosen[name] = type(getattr(default, name))(**value)
    return PasteConfig(**chosen)


def as_yaml(config: TrainConfig) -> str:
    """What of a configuration differs from the defaults; ``flatdepth train --config`` reads it."""
    own, default = (json.loads(json.dumps(asdict(one))) for one in (config, TrainConfig()))
    plain = asdict(SetConfig(path=""))
    own["data"]["train"] = [_changed(plain, entry) for entry in own["data"]["train"]]
    return yaml.safe_dump(_changed(default, own), sort_keys=False)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            if inner := _changed(old[key], value):
                changed[key] = inner
        elif value != old.get(key):
            changed[key] = value
    return changed


def make_controls() -> list[Any]:
    """The controls of ``KNOBS``, under the headings of ``SECTIONS``."""
    controls: list[Any] = []
    for number, section in enumerate(SECTIONS):
        with gr.Accordion(section, open=number == 0):
            controls += [_control(knob) for knob in knobs(section)]
    return controls


def _control(knob: Knob) -> Any:
    about = {"label": knob.label, "info": knob.about or None, "value": knob.default}
    if knob.choices:
        return gr.Radio(list(knob.choices), **about)
    if isinstance(knob.default, bool):
        return gr.Checkbox(**about)
    assert knob.bounds is not None
    low, high = knob.bounds
    return gr.Slider(low, high, step=knob.step, precision=6, buttons=[], **about)
