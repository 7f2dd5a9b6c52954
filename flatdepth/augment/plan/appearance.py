"""What a paste looks like: outline, frame, mat, light, wear. Small numbers drawn on the CPU."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from flatdepth.augment.draw.stylise import Style
from flatdepth.augment.plan.coarse import LUMA, ThinView
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import Rectangle, project
from flatdepth.types import Region

_FRAMES = (
    (0.36, 0.23, 0.13),
    (0.20, 0.12, 0.07),
    (0.55, 0.38, 0.22),
    (0.72, 0.58, 0.28),
    (0.08, 0.08, 0.08),
    (0.90, 0.89, 0.86),
    (0.55, 0.55, 0.56),
)
_BEZELS = ((0.03, 0.03, 0.035), (0.10, 0.10, 0.11), (0.62, 0.63, 0.65))
_JOINERY = ((0.88, 0.87, 0.84), (0.94, 0.93, 0.91), (0.40, 0.27, 0.16), (0.30, 0.32, 0.33))
_MATS = ((0.96, 0.95, 0.92), (0.90, 0.87, 0.80), (0.20, 0.20, 0.21), (0.45, 0.47, 0.42))
Colour = tuple[float, float, float]
# how the face of a frame slants from its outer (0) to its inner edge (1): from a + b t
_PROFILES = ((1.0, 0.0), (-1.0, 0.0), (1.0, -2.0), (-1.0, 2.0), (0.0, 0.0))
# hexagon (flat top), octagon, diamond: normal and offset of the cut in the first quadrant, in half
# sizes of the box around the polygon
_CUTS = (
    (1.0, 0.5, 1.0),
    (1.0, 1.0, math.sqrt(2.0)),
    (1.0, 1.0, 1.0),
)
NO_CUT = (0.0, 0.0, 1.0)
SQUARE = (0.0, 0.0)
Outline = tuple[tuple[float, float], tuple[float, float], tuple[float, float, float]]


class Kind(StrEnum):
    """What is pasted; the names of ``ContentShares``.

    Any other name is that of something flat, whose picture ``draw.content.CONTENTS`` makes.
    """

    MIRROR = "mirror"
    ART = "art"
    MURAL = "mural"
    SCREEN = "screen"
    OPENING = "opening"
    EMPTY = "empty"

    @classmethod
    def _missing_(cls, value: object) -> "Kind":
        kind = str.__new__(cls, value)
        kind._name_, kind._value_ = str(value).upper(), str(value)
        return kind

    @property
    def region(self) -> Region:
        """The region of the pixels inside the frame."""
        if self is Kind.MIRROR:
            return Region.MIRROR
        return Region.DECOY if self.is_decoy else Region.ART

    @property
    def is_decoy(self) -> bool:
        return self in (Kind.OPENING, Kind.EMPTY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Proportions of a paste before it has a size; lengths for a height of 1 with the frame.

    Attributes:
        aspect: width / height with the frame.
        frame: width of the frame.
        mat: width of the mat between frame and picture.
        area: of the whole, as a share of the image.
        shape: name in ``ShapeShares``.
    """

    aspect: float
    frame: float
    mat: float
    area: float
    shape: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a paste is drawn on its rectangle.

    Lengths are metres on the rectangle, x to the right and y down from its centre; "half sizes" are
    those of the rectangle.

    Attributes:
        radius_top, radius_bottom: (x, y) radii of the corners as shares of the half sizes.
        cut: (n_x, n_y, c): the outline is cut where n_x |x| + n_y |y| > c, in half sizes.
        frame_m, mat_m: widths, 0 if there is none.
        frame_colour, lip_colour, mat_colour: sRGB 0..1; the lip is the inner edge of the frame.
        lip: share of the frame's width.
        profile: (a, b) slant of the frame's face: a + b t from the outer to the inner edge.
        relief: strength of light and shade on the frame.
        tint: (3,) factor on the content's colour, the light included.
        light: factor on frame and mat.
        falloff: (x, y) relative change of the light over a half size.
        glare: (strength, n_x, n_y, offset, width) of a soft bright band, in half sizes.
        shadow: (strength, x, y, softness) of the shadow on the wall, offset and softness in metres;
            a strength below 0 brightens (the glow of a screen).
        style: of the content.
        blur_px, dust: of the content: Gaussian sigma in its pixels, opacity of the dust.
        sharpness_px: Gaussian sigma of the photograph's own edges, in texels.
        noise: standard deviation of the photograph's noise, in units of the full range.
    """

    radius_top: tuple[float, float]
    radius_bottom: tuple[float, float]
    cut: tuple[float, float, float]
    frame_m: float
    mat_m: float
    frame_colour: Colour
    lip_colour: Colour
    mat_colour: Colour
    lip: float
    profile: tuple[float, float]
    relief: float
    tint: Colour
    light: float
    falloff: tuple[float, float]
    glare: tuple[float, float, float, float, float]
    shadow: tuple[float, float, float, float]
    style: Style
    blur_px: float
    dust: float
    sharpness_px: float
    noise: float


def draw_form(draws: Draws, config: PasteConfig, kind: Kind, picture_aspect: float) -> Form:
    """Draw the proportions of a paste; ``picture_aspect`` is width / height of a picture."""
    aspect = picture_aspect
    if kind is Kind.SCREEN:
        aspect = draws.uniform("screen aspect", 1.25, 1.9)
    elif kind is not Kind.ART:
        aspect = draws.log_uniform("aspect", 0.5, 1.6)
    shape = draws.choice("shape", asdict(config.shape))
    if kind is Kind.MURAL:
        shape = "rectangle"
    elif kind is Kind.SCREEN:
        shape = "rounded" if shape == "rounded" else "rectangle"
    framed = draws.uniform("framed") < config.framed
    short = min(aspect, 1.0)
    frame = draws.uniform("frame width", *config.frame_width) * short if framed else 0.0
    if kind is Kind.SCREEN:
        frame = draws.uniform("bezel", 0.008, 0.05) * short
    elif kind.is_decoy:
        frame = draws.uniform("frame width", *config.frame_width) * short
    elif kind is Kind.MURAL and draws.uniform("bare") < 0.7:
        frame = 0.0
    mat = 0.0
    can_have_mat = kind is Kind.ART and frame > 0 and shape == "rectangle"
    if can_have_mat and draws.uniform("mat") < config.mat:
        mat = draws.uniform("mat width", 0.06, 0.25) * short
    height = 1 + 2 * (mat + frame)
    return Form(
        aspect=(aspect + 2 * (mat + frame)) / height,
        frame=frame / height,
        mat=mat / height,
        area=draws.log_uniform("area", *config.area),
        shape=shape,
    )


def draw_look(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    kind: Kind,
    form: Form,
    rectangle: Rectangle,
    *,
    hung: bool,
    sensor: tuple[float, float],
) -> Look:
    """Draw the look of a placed paste, in the light of its surroundings.

    ``sensor`` is what ``sharpness_and_noise`` says of the photograph.
    """
    light, cast, falloff = _surrounding_light(thin, rectangle, config.match_light)
    light *= draws.uniform("light", 0.92, 1.06)
    tint = light * cast
    if kind is Kind.MIRROR:
        tint = draws.uniform("mirror light", 0.86, 0.99) + 0.05 * draws.uniforms("tint", 3) - 0.03
        falloff = (0.0, 0.0)
    elif kind is Kind.SCREEN:
        tint = draws.uniform("screen light", 0.7, 1.0) * np.array([0.96, 0.98, 1.0])
        falloff = (0.0, 0.0)
    worn = kind is Kind.MIRROR and draws.uniform("worn") < config.worn
    stylised = kind in (Kind.ART, Kind.MURAL) and draws.uniform("stylised") < config.stylised
    top, bottom, cut = _outline(draws, form, rectangle)
    frame_colour, lip_colour, lip, profile, relief = _frame(draws, kind)
    mat_colour = _colour(draws, "mat", _MATS, cast)
    # averaging over several source pixels sharpens and denoises
    per_texel = max(
        1.0,
        math.sqrt(
            thin.view.crop_width * thin.view.crop_height / (thin.view.width * thin.view.height)
        ),
    )
    sharpness, noise = sensor
    return Look(
        radius_top=top,
        radius_bottom=bottom,
        cut=cut,
        frame_m=form.frame * rectangle.height,
        mat_m=form.mat * rectangle.height,
        frame_colour=_three(np.asarray(frame_colour) * cast),
        lip_colour=_three(np.asarray(lip_colour) * cast),
        mat_colour=mat_colour,
        lip=lip,
        profile=profile,
        relief=relief,
        tint=_three(np.minimum(tint, 1.0)),
        light=light,
        falloff=falloff,
        glare=_glare(draws, config, kind),
        shadow=_shadow(draws, config, kind, rectangle) if hung else (0.0, 0.0, 0.0, 1.0),
        style=Style(1 + draws.integer("style", 3)) if stylised else Style.NONE,
        blur_px=draws.uniform("blur", 0.0, 1.2) if worn else 0.0,
        dust=draws.uniform("dust", 0.0, 0.25) if worn else 0.0,
        sharpness_px=config.match_sensor * sharpness / per_texel,
        noise=config.match_sensor * noise / per_texel,
    )


def _three(values: np.ndarray) -> Colour:
    red, green, blue = np.asarray(values, dtype=np.float64).tolist()
    return red, green, blue


def _surrounding_light(
    thin: ThinView, rectangle: Rectangle, strength: float
) -> tuple[float, np.ndarray, tuple[float, float]]:
    """Factor for a white surface, colour cast (3,) and falloff (x, y), from the image around.

    The brightness of a wall says both how it is lit and how it is painted, so half of it comes
    from the brighter parts of the whole image; the cast is the fourth root of the wall's colour
    times the image's.
    """
    near = thin.covered(project(thin.K_px, rectangle.corners()), reach_cells=1.5)
    if not near.any():
        return 1.0, np.ones(3), (0.0, 0.0)
    luminance = thin.colour @ LUMA
    wall = thin.colour[near].mean(axis=0)
    level = 0.5 * float(luminance[near].mean()) + 0.5 * float(np.percentile(luminance, 80))
    light = float(np.clip(level / 0.72, 0.12, 1.0))
    chroma = (wall + 0.02) / (wall @ LUMA + 0.02)
    whole = thin.colour.mean(axis=0)
    chroma = chroma * (whole + 0.02) / (whole @ LUMA + 0.02)
    cast = np.clip(chroma**0.25, 0.8, 1.25)
    a, b, _ = thin.on_rectangle(rectangle)
    fit = near & np.isfinite(a) & np.isfinite(b)
    falloff = np.zeros(2)
    if fit.sum() >= 12:
        design = np.stack([np.ones(int(fit.sum())), a[fit], -b[fit]], axis=1)
        level_fit = np.linalg.lstsq(design, luminance[fit], rcond=None)[0]
        falloff = np.clip(level_fit[1:] / max(float(level_fit[0]), 0.05), -0.25, 0.25)
    light = 1 + strength * (light - 1)
    cast = 1 + strength * (cast - 1)
    gx, gy = (strength * falloff).tolist()
    return light, cast, (gx, gy)


def _outline(draws: Draws, form: Form, rectangle: Rectangle) -> Outline:
    half = np.array([rectangle.width, rectangle.height]) / 2
    return OUTLINES[form.shape](draws, half)


def _rounded(draws: Draws, half: np.ndarray) -> Outline:
    x, y = (draws.uniform("corner", 0.06, 0.5) * half.min() / half).tolist()
    return (x, y), (x, y), NO_CUT


def _arch(draws: Draws, half: np.ndarray) -> Outline:
    rise = min(1.0, draws.uniform("arch", 0.5, 1.0) * half[0] / half[1])
    return (1.0, rise), SQUARE, NO_CUT


OUTLINES: dict[str, Callable[[Draws, np.ndarray], Outline]] = {
    "rectangle": lambda *_: (SQUARE, SQUARE, NO_CUT),
    "rounded": _rounded,
    "ellipse": lambda *_: ((1.0, 1.0), (1.0, 1.0), NO_CUT),
    "arch": _arch,
    "polygon": lambda draws, _: (SQUARE, SQUARE, _CUTS[draws.integer("polygon", len(_CUTS))]),
}
"""Name in ``ShapeShares`` -> (draws, half sizes (2,) in metres) -> ``Look.radius_top``,
``radius_bottom`` and ``cut``."""


def _frame(draws: Draws, kind: Kind) -> tuple[Colour, Colour, float, tuple[float, float], float]:
    """Colour, colour of the lip, width of the lip, profile and relief of a frame."""
    palette: tuple[Colour, ...] = _FRAMES
    if kind is Kind.SCREEN:
        palette = _BEZELS
    elif kind.is_decoy:
        palette = _JOINERY + _FRAMES[:3]
    colour = _colour(draws, "frame", palette, np.ones(3))
    lip = 0.0
    if kind is not Kind.SCREEN and draws.uniform("lip") < 0.4:
        lip = draws.uniform("lip width", 0.1, 0.35)
    lip_colour = _colour(draws, "lip", _FRAMES, np.ones(3))
    profile = _PROFILES[draws.integer("profile", len(_PROFILES))]
    relief = draws.uniform("relief", 0.05, 0.3)
    if kind is Kind.SCREEN:
        profile, relief = _PROFILES[0], 0.05
    return colour, lip_colour, lip, profile, relief


def _colour(draws: Draws, name: str, palette: tuple[Colour, ...], light: np.ndarray) -> Colour:
    base = np.array(palette[draws.integer(f"{name} palette", len(palette))])
    varied = base * draws.uniform(f"{name} light", 0.75, 1.15)
    varied = varied + 0.06 * (draws.uniforms(f"{name} hue", 3) - 0.5)
    return _three(np.clip(varied, 0.0, 1.0) * light)


def _glare(
    draws: Draws, config: PasteConfig, kind: Kind
) -> tuple[float, float, float, float, float]:
    if kind.is_decoy or kind is Kind.MURAL or draws.uniform("glass") >= config.glass:
        return (0.0, 1.0, 0.0, 0.0, 1.0)
    angle = draws.uniform("glare angle", 0.15, 1.2) * (
        1 if draws.uniform("glare side") < 0.5 else -1
    )
    return (
        draws.uniform("glare", 0.05, 0.3),
        math.cos(angle),
        math.sin(angle),
        draws.uniform("glare offset", -0.8, 0.8),
        draws.uniform("glare width", 0.1, 0.5),
    )


def _shadow(
    draws: Draws, config: PasteConfig, kind: Kind, rectangle: Rectangle
) -> tuple[float, float, float, float]:
    if kind in (Kind.MURAL, Kind.OPENING):
        return (0.0, 0.0, 0.0, 1.0)
    side = min(rectangle.width, rectangle.height)
    if kind is Kind.SCREEN and draws.uniform("glow") < 0.5:
        return (-draws.uniform("glow strength", 0.0, 0.15), 0.0, 0.0, 0.12 * side)
    return (
        draws.uniform("shadow", 0.1, 1.0) * config.shadow,
        draws.uniform("shadow x", -0.03, 0.03) * side,
        draws.uniform("shadow y", 0.005, 0.05) * side,
        draws.uniform("shadow softness", 0.01, 0.04) * side,
    )
