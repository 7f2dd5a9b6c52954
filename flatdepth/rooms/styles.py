"""How generated pictures are made: functions of a generator and an RGB image."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from flatdepth.rooms.streams import Rng


def posterised(rng: Rng, image: Image.Image) -> Image.Image:
    """Few flat tones, as in a screen print."""
    flat = image.filter(ImageFilter.MedianFilter(5))
    count = int(rng.integers(4, 8))
    steps = [round(255 * ((x * count) // 256 + 0.5) / count) for x in range(256)]
    return flat.point(steps * 3)


def painted(rng: Rng, image: Image.Image) -> Image.Image:
    """Dabs of one colour each, and richer colours."""
    dabs = image.filter(ImageFilter.ModeFilter(int(rng.choice([5, 7]))))
    return ImageEnhance.Color(dabs).enhance(rng.uniform(1.2, 1.8))


def sketched(rng: Rng, image: Image.Image) -> Image.Image:
    """Pencil: the grey picture divided by its blurred negative (colour dodge), on tinted paper."""
    original = ImageOps.grayscale(image)
    blurred = original.filter(ImageFilter.GaussianBlur(rng.uniform(2, 5)))
    grey, soft = (np.asarray(layer, dtype=np.float64) for layer in (original, blurred))
    lines = np.clip(grey / np.maximum(soft, 1), 0, 1) ** 2
    tone = lines * (0.55 + 0.45 * grey / 255)
    paper = rng.uniform([225, 215, 190], [255, 250, 240])
    return Image.fromarray((tone[..., None] * paper).astype(np.uint8))


def toned(rng: Rng, image: Image.Image) -> Image.Image:
    """Old print: one ink on warm paper."""
    ink = tuple(int(x) for x in rng.uniform([20, 10, 10], [70, 60, 70]))
    paper = tuple(int(x) for x in rng.uniform([225, 210, 180], [255, 245, 225]))
    return ImageOps.colorize(ImageOps.grayscale(image), ink, paper)


def shifted(rng: Rng, image: Image.Image) -> Image.Image:
    """Hues turned and colours strengthened, contrast raised."""
    hue, saturation, value = image.convert("HSV").split()
    turn = int(rng.integers(-40, 40))
    turned = hue.point([(x + turn) % 256 for x in range(256)])
    merged = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    return ImageEnhance.Contrast(merged).enhance(rng.uniform(1.0, 1.35))


def plain(_: Rng, image: Image.Image) -> Image.Image:
    """As it is."""
    return image


STYLES: dict[str, Callable[[Rng, Image.Image], Image.Image]] = {
    "plain": plain,
    "posterised": posterised,
    "painted": painted,
    "sketched": sketched,
    "toned": toned,
    "shifted": shifted,
}
