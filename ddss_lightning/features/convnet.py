"""A small convolutional classifier whose penultimate layer serves as feature space, for small images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.saved import load_features, save_features


class ConvFeatures(FeatureExtractor):
    """Classifier of small images: pairs of 3x3 convolutions, pooled in between, d hidden features, a linear head.

    All activations are SiLU, so that features are smooth functions of the image. It is made for training
    (`checkpoints/make_digits.py`), saved with `save_pretrained` and used through `from_pretrained`, which freezes it.

    Args:
        image_channels: C, at least 1.
        image_size: height = width of the images, a multiple of 2^(num_stages - 1).
        width: channels of the first two convolutions; each further pair has twice as many.
        num_features: d, the length of the penultimate layer.
        num_classes: number of classes of the head.
        num_stages: pairs of convolutions.
    """

    def __init__(
        self,
        image_channels: int = 1,
        image_size: int = 8,
        width: int = 32,
        num_features: int = 64,
        num_classes: int = 10,
        num_stages: int = 2,
    ) -> None:
        super().__init__()
        if num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {num_stages}.")
        multiple = 2 ** (num_stages - 1)
        if image_size < multiple or image_size % multiple:
            raise ValueError(
                f"image_size must be a multiple of {multiple} pixels for {num_stages} stages, got {image_size}."
            )
        self.config = {
            "image_channels": image_channels,
            "image_size": image_size,
            "width": width,
            "num_features": num_features,
            "num_classes": num_classes,
            "num_stages": num_stages,
        }
        self.num_features = num_features
        self.image_shape = (image_channels, image_size, image_size)
        layers: list[nn.Module] = []
        channels = [image_channels, *(width * 2**stage for stage in range(num_stages))]
        for inputs, outputs in pairwise(channels):
            layers += [nn.AvgPool2d(2)] if layers else []
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.SiLU()]
        last = channels[-1] * (image_size // 2 ** (num_stages - 1)) ** 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, num_features), nn.SiLU())
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Penultimate activations, shape (N, d), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        features: Tensor = self.body(images)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Class logits, shape (N, num_classes), of features of shape (N, d)."""
        logits: Tensor = self.head(features)
        return logits

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `save_directory` (created if missing)."""
        save_features(self, self.config, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path) -> ConvFeatures:
        """Read what `save_pretrained` wrote; the network comes back frozen.

        Args:
            pretrained_path: a local folder.

        Raises:
            ValueError: the folder or one of its files is missing or damaged, or holds a network of another class.
        """
        return load_features(pretrained_path, cls)
