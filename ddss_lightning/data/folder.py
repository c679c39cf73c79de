"""Real images from a folder of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddss_lightning.data.base import ImageDataModule

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class FolderImages(Dataset[Tensor]):
    """All image files below a folder, centre-cropped to a square, resized (Lanczos) and scaled to [-1, 1].

    They are turned as their EXIF data say; what is transparent becomes white; 16 bits a pixel become 8.

    Args:
        root: the folder; subfolders are included, linked ones too, what is hidden (`.name`) is not.
        image_size: height = width of the result, pixels.
        image_channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: a number outside its range; the folder is missing or holds no image file; when it is read, a file
            that is damaged, too large for Pillow, or of numbers of 32 bits, whose range no file says.
    """

    def __init__(self, root: str | Path, image_size: int, image_channels: int = 3) -> None:
        _check_shape(image_size, image_channels)
        if not Path(root).is_dir():
            raise ValueError(f"There is no image folder '{root}'; give the folder that holds the real images.")
        self.files = sorted(path for path in _files(Path(root)) if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ValueError(f"'{root}' holds no image file ({', '.join(sorted(SUFFIXES))}).")
        self.image_size, self.mode = image_size, {1: "L", 3: "RGB"}[image_channels]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image, ImageOps

        try:
            with Image.open(self.files[index]) as image:
                # Pillow reads PNG files of 16 bits as `I`, in some of its versions.
                if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                    raise ValueError(
                        f"'{self.files[index]}' holds numbers of 32 bits, of which it is not known what is black and "
                        "what is white; convert it to 8 or 16 bits."
                    )
                whole = _opaque(ImageOps.exif_transpose(image)).convert(self.mode)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words do not say which file
            raise ValueError(f"'{self.files[index]}' cannot be read as an image: {error}; remove it.") from error
        side = min(whole.size)
        square = ImageOps.fit(whole, (side, side), Image.Resampling.NEAREST)
        resized = square.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(resized)).float() / 127.5 - 1
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _check_shape(image_size: int, image_channels: int) -> None:
    if image_channels not in (1, 3):
        raise ValueError(f"image_channels must be 1 (grey) or 3 (RGB), got {image_channels!r}.")
    if not isinstance(image_size, Integral):
        raise ValueError(f"image_size must be a whole number of pixels, got {image_size!r}.")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder; not hidden ones, nor those in hidden folders, which macOS, Jupyter and others leave."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        # A link to a folder above would have no end.
        place = os.path.realpath(folder)
        subfolders[:] = [] if place in seen else [name for name in subfolders if not name.startswith(".")]
        if place not in seen:
            yield from (Path(folder, name) for name in names if not name.startswith("."))
        seen.add(place)


def _opaque(image: Image) -> Image:
    """An image without transparency, of at most 8 bits a channel."""
    from PIL import Image as Images

    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float64)
        # Pillow's own conversion cuts at 255, and knows no transparent level.
        pixels = (levels / 257).round().clip(0, 255).astype(np.uint8)
        pixels[levels == image.info.get("transparency", -1)] = 255
        return Images.fromarray(pixels)
    if image.mode == "LAB":
        return image.convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Images.alpha_composite(Images.new("RGBA", image.size, "white"), image)
    return image


class ImageFolderDataModule(ImageDataModule):
    """Real images from a folder, for one's own model.

    Args:
        root: the folder; subfolders are included.
        image_size: height = width that the model works on, pixels.
        image_channels: 1 (grey) or 3 (RGB).
        **kwargs: see `ImageDataModule`.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, root: str, image_size: int, image_channels: int = 3, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        _check_shape(image_size, image_channels)
        self.root, self.image_size, self.image_channels = root, image_size, image_channels

    def identity(self) -> str:
        """Names, sizes and times of change of all files, and what is made of them."""
        import PIL

        digest = hashlib.sha256()
        for path in FolderImages(self.root, self.image_size, self.image_channels).files:
            about = path.stat()
            digest.update(f"{path.relative_to(self.root)} {about.st_size} {about.st_mtime_ns}\n".encode())
        size = f"{self.image_channels}x{self.image_size}x{self.image_size}"
        return f"{size} of files {digest.hexdigest()[:16]}, Pillow {PIL.__version__}"

    def real_images(self) -> Dataset[Tensor]:
        """All images of the folder."""
        return FolderImages(self.root, self.image_size, self.image_channels)
