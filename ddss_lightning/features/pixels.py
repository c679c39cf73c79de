"""The pixels themselves as feature space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ddss_lightning.features.base import FeatureExtractor


class PixelFeatures(FeatureExtractor):
    r"""All pixel values, of images that are first averaged over equal areas to `size` x `size` where they are larger.

    .. math:: \phi(x) = \mathrm{vec}(\mathrm{mean}_{H/s \times W/s}\, x), \qquad d = C s^2

    The crudest feature space, and the one in which a gain of contrast or a shift of colours weighs most: the cubic
    kernel of a `KIDLoss` compares means, covariances and third moments of the pixels. Beside a network that was trained
    to see something else, it keeps what that network does not mind.

    Args:
        image_channels: C, at least 1.
        image_size: height = width of the images, a multiple of `size`.
        size: s; None: that of the images up to 16 pixels, of larger ones the largest divisor from 8 to 16.

    Raises:
        ValueError: a number below 1, an image_size that is no multiple of `size`, or one without such a divisor.
    """

    def __init__(self, image_channels: int = 3, image_size: int = 32, size: int | None = None) -> None:
        super().__init__()
        size = self._default_size(image_size) if size is None else size
        for name, value in {"image_channels": image_channels, "image_size": image_size, "size": size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if image_size % size:
            raise ValueError(f"image_size must be a multiple of size, got {image_size} and {size}.")
        self.num_features = image_channels * size**2
        self.image_shape = (image_channels, image_size, image_size)
        # Part of the fingerprint.
        self.register_buffer("size", torch.tensor(size))
        self._size = size
        self.freeze()

    @staticmethod
    def _default_size(image_size: int) -> int:
        divisors = [image_size] if image_size <= 16 else [size for size in range(16, 7, -1) if image_size % size == 0]
        if not divisors:
            raise ValueError(f"image_size {image_size} has no divisor from 8 to 16; give `size`, a divisor of it.")
        return divisors[0]

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, C s^2), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        return avg_pool2d(images, images.shape[-1] // self._size).flatten(1)
