"""Draws the images of the data set of glyphs: one character each, in colour, 32x32, a little bent and not alone."""

import functools
import math

import numpy as np
from glyph_fonts import CHARACTERS, Face
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
SCALE = 4  # drawn so much larger, then averaged down
CANVAS = SIZE * SCALE
CONTRAST = 90.0  # least distance of the two mean colours, root of the mean square over channels, of 255
# EMNIST's classes "by merge" (Cohen et al. 2017): these letters have one class for both cases. Of the rest 0 and O, and
# 1, I and L (which has l), remain alike in many fonts.
MERGED = "CIJKLMOPSUVWXYZ"
CLASSES = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")


def characters_of(name: str) -> str:
    """The characters of a class."""
    return name + name.lower() if name in MERGED else name


@functools.lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.cache
def _capital_height(path: str) -> float:
    """Height of an H as a share of the em."""
    _, top, _, bottom = _font(path, 200).getbbox("H", anchor="ls")
    return max(0.2, (bottom - top) / 200)


def image(face: Face, character: str, generator: np.random.Generator) -> np.ndarray:
    """uint8 (32, 32, 3): the character in random colours, size, place and slant on a random background."""
    shape = coverage(face, character, generator)
    below = background(generator)
    above = _ink(below, generator)
    pixels = below * (1 - shape[..., None]) + above * shape[..., None]
    blurred = Image.fromarray(_bytes(pixels)).filter(ImageFilter.GaussianBlur(generator.uniform(0, 0.7)))
    noise = generator.normal(0, generator.uniform(0, 12), (SIZE, SIZE, 3))
    return _bytes(np.asarray(blurred, np.float64) + noise)


def coverage(face: Face, character: str, generator: np.random.Generator) -> np.ndarray:
    """(32, 32) in [0, 1]: what the ink covers. Capitals are 17 to 24 pixels high; other characters may reach in."""
    height = generator.uniform(17, 24) * SCALE
    font = _font(str(face.path), max(8, round(height / _capital_height(str(face.path)))))
    canvas = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(canvas)
    left, _, right, _ = font.getbbox(character, anchor="ls")
    x, y = (CANVAS - right - left) / 2, (CANVAS + height) / 2
    draw.text((x, y), character, fill=255, font=font, anchor="ls")
    for side in (-1, 1):
        if generator.random() < 0.25:  # a neighbour, as in a word
            other = CHARACTERS[generator.integers(len(CHARACTERS))]
            theirs = font.getbbox(other, anchor="ls")
            gap = generator.uniform(1, 5) * SCALE
            place = x + right + gap - theirs[0] if side > 0 else x + left - gap - theirs[2]
            draw.text((place, y), other, fill=255, font=font, anchor="ls")
    bent = canvas.transform((CANVAS, CANVAS), Image.Transform.AFFINE, _bending(generator), Image.Resampling.BILINEAR)
    return np.asarray(bent.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64) / 255


def _bending(generator: np.random.Generator) -> list[float]:
    """A map from output to input: rotation up to 14°, shear, stretch, and a shift of up to 2 pixels."""
    turn, shear = generator.uniform(-0.25, 0.25), generator.uniform(-0.2, 0.2)
    wide, high = np.exp(generator.uniform(-0.18, 0.18, 2))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear = np.linalg.inv(rotation @ np.array([[wide, shear], [0, high]]))
    centre = np.full(2, CANVAS / 2)
    shift = centre - linear @ (centre + generator.uniform(-2, 2, 2) * SCALE)
    return [*linear[0], shift[0], *linear[1], shift[1]]


def background(generator: np.random.Generator) -> np.ndarray:
    """(32, 32, 3) in 0 to 255: two colours mixed flatly, along a gradient, in stripes or in soft patches."""
    return _mixed(generator.uniform(0, 255, (2, 3)), _pattern(generator))


def _ink(below: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(32, 32, 3): one colour, or a gradient of two close ones, that stands out from the background."""
    while True:
        colour = generator.uniform(0, 255, 3)
        if np.sqrt(((colour - below) ** 2).mean(axis=2)).min() >= CONTRAST:
            break
        below = below + (below.mean(axis=(0, 1)) - below) * 0.02  # so that an end is certain
    ends = np.clip(np.stack([colour, colour + generator.uniform(-30, 30, 3)]), 0, 255)
    return _mixed(ends, _gradient(generator))


def _mixed(ends: np.ndarray, share: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * share[..., None]


def _gradient(generator: np.random.Generator) -> np.ndarray:
    turn = generator.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    return np.clip(rows * math.sin(turn) + columns * math.cos(turn) + 0.5, 0, 1)


def _pattern(generator: np.random.Generator) -> np.ndarray:
    """(32, 32) in [0, 1]."""
    kind = generator.integers(4)
    if kind == 0:
        return np.zeros((SIZE, SIZE))
    if kind == 1:
        return _gradient(generator)
    if kind == 2:
        waves = np.sin(_gradient(generator) * generator.uniform(10, 50) + generator.uniform(0, 6))
        return (waves * 0.5 + 0.5) * generator.uniform(0.2, 0.7)
    cells = generator.uniform(0, 255, (generator.integers(3, 9),) * 2).astype(np.uint8)
    return np.asarray(Image.fromarray(cells).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64) / 255


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
