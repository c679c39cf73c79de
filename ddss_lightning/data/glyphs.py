"""Coloured letters and digits, drawn from the fonts that ship inside matplotlib: a benchmark that is code."""

from __future__ import annotations

import hashlib
import math
import os
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ddss_lightning.data.base import ImageDataModule

Split = Literal["train", "held_out"]
Floats = NDArray[np.float64]

# Changes whenever an image would: it is part of the random numbers, of the cache's name and of its metadata.
RECIPE = 1
CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
NUM_IMAGES = {"train": 50_000, "held_out": 10_000}
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


class GlyphArrays(NamedTuple):
    """One split: pixels, uint8 (N, 3, size, size); labels and faces, int64 (N,); parameters, float32 (N, 22)."""

    pixels: Tensor
    labels: Tensor
    faces: Tensor
    parameters: Tensor


def render_split(split: Split, size: int, num_images: int | None = None) -> GlyphArrays:
    """The first `num_images` images of a split (default all), with a progress bar."""
    from rich.progress import track

    indices = range(NUM_IMAGES[split] if num_images is None else num_images)
    pixels = np.empty((len(indices), 3, size, size), np.uint8)
    labels, faces, parameters = [], [], []
    for index in track(indices, f"drawing glyphs, {split}, {size}x{size}"):
        scene = draw_scene(split, index)
        pixels[index] = render(scene, size)
        labels.append(scene.label)
        faces.append(FACES["held_out"].index(scene.face))
        parameters.append(scene.parameters())
    return GlyphArrays(
        torch.from_numpy(pixels), torch.tensor(labels), torch.tensor(faces), torch.tensor(parameters).float()
    )


def default_cache_dir() -> Path:
    """`ddss_lightning` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ddss_lightning"


def cache_key(split: Split, size: int, num_images: int | None = None) -> dict[str, str]:
    """What a cached split must agree in: recipe, split, size, number of images, and the font files, by SHA-256."""
    if split not in get_args(Split):
        raise ValueError(f"Unknown split '{split}'; choose one of {', '.join(get_args(Split))}.")
    fonts = hashlib.sha256()
    for face in FACES["held_out"]:
        fonts.update(font_file(face).read_bytes())
    return {
        "recipe": str(RECIPE),
        "split": split,
        "size": str(size),
        "num_images": str(NUM_IMAGES[split] if num_images is None else num_images),
        "fonts": fonts.hexdigest()[:16],
    }


def load_glyphs(
    split: Split, size: int = 32, cache_dir: str | Path | None = None, num_images: int | None = None
) -> GlyphArrays:
    """A split from the cache, memory-mapped; it is rendered into the cache first if it is not there.

    A file appears under its name only when it is whole, so an interrupted rendering leaves nothing that is read.

    Args:
        split: `train` (50,000 images of 18 faces) or `held_out` (10,000 of 21).
        size: height = width in pixels: a divisor of 256; scenes are the same at any size.
        cache_dir: default: see `default_cache_dir`.
        num_images: only the first so many.

    Raises:
        ValueError: an unknown split, a size that cannot be, a cached file that is damaged or was made from other
            fonts or another recipe.
    """
    key = cache_key(split, size, num_images)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = folder / "glyphs-{recipe}-{split}-{size}-{num_images}.safetensors".format(**key)
    if not path.is_file():
        arrays = render_split(split, size, num_images)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(arrays._asdict(), partial, metadata=key)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            arrays = GlyphArrays(*(file.get_tensor(name) for name in GlyphArrays._fields))
    except SafetensorError as error:
        raise ValueError(f"The cached glyphs '{path}' are damaged ({error}); delete the file.") from error
    wrong = [f"{name} {found.get(name)} instead of {value}" for name, value in key.items() if found.get(name) != value]
    if wrong:
        raise ValueError(
            f"The cached glyphs '{path}' have {', '.join(wrong)}; delete the file or give another cache_dir."
        )
    return arrays


class GlyphImages(Dataset[Tensor]):
    """Cached glyphs as images, float32 in [-1, 1]."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index].float() / 127.5 - 1


class GlyphsDataModule(ImageDataModule):
    """50,000 coloured letters and digits, 3 x size x size, of 62 classes and 18 faces, rendered on first use.

    Labels, faces and the 10,000 held-out images are had from `load_glyphs`.

    Args:
        size: height = width in pixels: 32, or 16 for machines without a GPU.
        cache_dir: where images are kept; default `ddss_lightning` in `$XDG_CACHE_HOME`, else in `~/.cache`.
        split: which images are the real ones: `train`, or `held_out` to measure against images that no network saw.
        num_images: only the first so many.
        **kwargs: see `ImageDataModule`.
    """

    def __init__(
        self,
        size: int = 32,
        cache_dir: str | None = None,
        split: Split = "train",
        num_images: int | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.cache_dir, self.split, self.num_images = size, cache_dir, split, num_images

    def prepare_data(self) -> None:
        """Render the split into the cache, on one process of each machine."""
        load_glyphs(self.split, self.size, self.cache_dir, self.num_images)

    def real_images(self) -> Dataset[Tensor]:
        """All images of the split."""
        return GlyphImages(load_glyphs(self.split, self.size, self.cache_dir, self.num_images).pixels)
