"""A benchmark that is code: coloured letters and digits, drawn once into a cache and memory-mapped."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ddss_lightning.data.base import ImageDataModule
from ddss_lightning.files import default_cache_dir, replacing
from ddss_lightning.glyphs import FACES, RECIPE, Split, draw_scene, font_file, render

NUM_IMAGES = {"train": 50_000, "held_out": 10_000}


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
        with replacing(path) as partial:
            save_file(arrays._asdict(), partial, metadata=key)
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

    def identity(self) -> str:
        """Recipe, split, size, number and fonts."""
        return f"glyphs {cache_key(self.split, self.size, self.num_images)}"

    def real_images(self) -> Dataset[Tensor]:
        """All images of the split."""
        return GlyphImages(load_glyphs(self.split, self.size, self.cache_dir, self.num_images).pixels)
