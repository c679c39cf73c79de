"""Coloured letters and digits, drawn from the fonts that ship inside matplotlib: each a function of its index."""

from __future__ import annotations

import hashlib
import math
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out"]
Floats = NDArray[np.float64]

# Changes whenever an image would: it is part of the random numbers, of the cache's name and of its metadata.
RECIPE = 1
CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
# Faces of matplotlib's `fonts/ttf` with all 62 plain glyphs. Left out: symbol and display faces without them, the
# placeholders of LastResort, and cmex10, cmsy10, cmmi10, whose codes hold other signs or old-style numerals.
TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmti10",
    "cmtt10",
)
HELD_OUT_FACES = ("DejaVuSansMono-Oblique", "STIXGeneralBolIta", "cmss10")
FACES = {"train": TRAIN_FACES, "held_out": TRAIN_FACES + HELD_OUT_FACES}

_EM = 256.0  # units of the outlines; curves become polygons with an error of a fraction of a unit
_SUBROWS = 256  # scan lines of an image; coverage is exact along them
_CANDIDATES = 64
_CONTRAST = 0.25
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Scene:
    """What one image shows: everything but the number of pixels. Lengths are in image sides, colours in [0, 1]."""

    label: int
    face: str
    em: float
    angle: float
    shear: float
    stretch: float
    place: tuple[float, float]
    ink: Floats
    ink_direction: float
    ground: Floats
    ground_direction: float

    def parameters(self) -> list[float]:
        """How it is drawn, as 22 numbers of order 1 that the image determines.

        Size, angle, shear, stretch; then of ink and of ground the mean colour and the change of each channel along x
        and y (a gradient turned round, with its ends exchanged, is the same gradient).
        """
        values = [(self.em - 1.175) / 0.1, self.angle / 0.2, self.shear / 0.14, self.stretch / 0.12]
        for (first, second), angle in ((self.ink, self.ink_direction), (self.ground, self.ground_direction)):
            change = (second - first) / 0.085
            values += [*(first + second - 1) / 0.53, *change * math.cos(angle), *change * math.sin(angle)]
        return [float(value) for value in values]


def _uniform(split: str, index: int, num: int) -> Floats:
    """`num` uniform numbers in [0, 1), a function of (recipe, split, index) on any machine and any numpy."""
    key = f"ddss_lightning glyphs {RECIPE} {split} {index}".encode()
    integers = np.frombuffer(hashlib.shake_256(key).digest(8 * num), "<u8")
    return (integers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_scene(split: Split, index: int) -> Scene:
    """The scene of an image: a function of (split, index) alone.

    Classes follow each other in turn, then faces, so any range of indices is balanced in both up to one round.
    Ink differs from ground in luma by 0.25 or more at every point; in one image of a hundred, where 64 draws fail, by
    the most of them.
    """
    faces = FACES[split]
    u = _uniform(split, index, 15 + 7 * _CANDIDATES)
    ground, inks = _two_colours(u[8:15]), _two_colours(u[15:].reshape(_CANDIDATES, 7))
    lumas, ground_luma = inks @ _LUMA, ground @ _LUMA
    gaps = np.maximum(lumas.min(axis=1) - ground_luma.max(), ground_luma.min() - lumas.max(axis=1))
    # The first that stands out, else the one that does most.
    ink = inks[int(np.argmax(np.minimum(gaps, _CONTRAST)))]
    return Scene(
        label=index % len(CLASSES),
        face=faces[index // len(CLASSES) % len(faces)],
        em=1.0 + 0.35 * u[0],
        angle=0.35 * (2 * u[1] - 1),
        shear=0.25 * (2 * u[2] - 1),
        stretch=0.2 * (2 * u[3] - 1),
        place=(float(u[4]), float(u[5])),
        ink=ink,
        ink_direction=2 * math.pi * u[6],
        ground=ground,
        ground_direction=2 * math.pi * u[7],
    )


def _two_colours(u: Floats) -> Floats:
    """The ends of gradients, shape (..., 2, 3): a colour, and one up to half of the way to another."""
    first, other = u[..., :3], u[..., 3:6]
    return np.stack([first, first + 0.5 * u[..., 6:] * (other - first)], axis=-2)


def font_file(face: str) -> Path:
    """The file of a face inside matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@cache
def outline(face: str, character: str) -> tuple[Floats, Floats]:
    """Edges of a glyph without hinting, from points to points, each of shape (E, 2), in em, y upwards."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), character, size=_EM, prop=FontProperties(fname=str(font_file(face))))
    loops = [np.asarray(loop)[:-1] for loop in path.to_polygons(closed_only=True)]
    starts, ends = np.concatenate(loops), np.concatenate([np.roll(loop, -1, axis=0) for loop in loops])
    return starts / _EM, ends / _EM


def coverage(starts: Floats, ends: Floats, size: int) -> Floats:
    """The part of each pixel that closed polygons cover, shape (size, size), by the nonzero winding rule.

    Each of 256 scan lines is cut exactly where it meets the edges; pixels average their scan lines.

    Args:
        starts: where the edges begin, shape (E, 2), x and y in [0, 1], y downwards.
        ends: where they end, likewise.
        size: height = width, a divisor of 256.
    """
    (x0, y0), (x1, y1) = (starts * (size, _SUBROWS)).T, (ends * (size, _SUBROWS)).T
    # Scan line r lies at r + 1/2.
    first, last = np.ceil(np.minimum(y0, y1) - 0.5).astype(int), np.ceil(np.maximum(y0, y1) - 0.5).astype(int)
    counts = last - first
    edge = np.repeat(np.arange(len(counts)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    cut = x0[edge] + (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge]) * (x1 - x0)[edge]
    sign = np.sign(y1 - y0)[edge]
    column = np.clip(cut.astype(int), 0, size - 1)
    part = cut - column
    # Right of a cut the winding number changes by its sign; within its pixel, by the part that is right of it.
    flat = row * (size + 1) + column
    steps = np.bincount(flat, sign * (1 - part), minlength=_SUBROWS * (size + 1))
    steps += np.bincount(flat + 1, sign * part, minlength=_SUBROWS * (size + 1))
    winding = steps.reshape(_SUBROWS, size + 1)[:, :size].cumsum(axis=1)
    covered: Floats = np.minimum(np.abs(winding), 1).reshape(size, -1, size).mean(axis=1)
    return covered


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Pixels of a scene, shape (3, size, size).

    The glyph is sheared, stretched, turned, made smaller where it would not fit, and lies anywhere in the room left.

    Args:
        scene: what is shown.
        size: height = width, a divisor of 256.

    Raises:
        ValueError: another size.
    """
    if size < 1 or _SUBROWS % size:
        raise ValueError(f"size must be a divisor of {_SUBROWS}, such as 16 or 32, got {size}.")
    starts, ends = outline(scene.face, CLASSES[scene.label])
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    wide, high = math.exp(scene.stretch / 2), math.exp(-scene.stretch / 2)
    matrix = np.array([[cos, sin], [sin, -cos]]) @ np.array([[wide, wide * scene.shear], [0.0, high]])
    starts, ends = starts @ matrix.T, ends @ matrix.T
    low, span = starts.min(axis=0), np.ptp(starts, axis=0)
    margin = 1 / 32
    scale = min(scene.em, (1 - 2 * margin) / span.max())
    offset = margin + np.array(scene.place) * (1 - 2 * margin - scale * span) - scale * low
    mask = coverage(starts * scale + offset, ends * scale + offset, size)
    ink, ground = (
        _gradient(colours, direction, size)
        for colours, direction in ((scene.ink, scene.ink_direction), (scene.ground, scene.ground_direction))
    )
    return np.rint(255 * (ground + mask * (ink - ground))).astype(np.uint8)


def _gradient(colours: Floats, direction: float, size: int) -> Floats:
    """A soft change from the first colour to the second across the image, shape (3, size, size)."""
    x = (np.arange(size) + 0.5) / size - 0.5
    along = x * math.cos(direction) + x[:, None] * math.sin(direction)
    ramp = 0.5 + 0.5 * np.sin(math.pi * along / math.sqrt(2))
    first, second = colours[:, :, None, None]
    blend: Floats = first + ramp * (second - first)
    return blend
