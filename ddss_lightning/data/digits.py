"""The 8x8 handwritten digits that ship inside scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddss_lightning.data.base import ImageDataModule


class TensorImages(Dataset[Tensor]):
    """Images held in memory: a tensor of shape (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class DigitsDataModule(ImageDataModule):
    """scikit-learn's 1797 digits, 1x8x8; see `load_digits_tensors` and `ImageDataModule` for the arguments."""

    def real_images(self) -> Dataset[Tensor]:
        """All 1797 images."""
        return TensorImages(load_digits_tensors()[0])


def load_digits_tensors() -> tuple[Tensor, Tensor]:
    """All 1797 images, shape (1797, 1, 8, 8), float32 in [-1, 1], and their labels 0 to 9, shape (1797,).

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998 (CC BY 4.0), the test part, as shipped by scikit-learn. Pixels 0 to 16 become -1 to 1.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(labels).long()
