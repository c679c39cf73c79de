"""A small residual encoder whose pooled activations serve as feature space: a second opinion on small images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import relu

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.saved import load_features, save_features


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a 1x1 convolution on the short way where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, inputs, h, w) to (N, outputs, h / stride, w / stride)."""
        change = self.conv_2(relu(self.norm_2(self.conv_1(relu(self.norm_1(x))))))
        total: Tensor = self.short(x) + change
        return total


class ResidualFeatures(FeatureExtractor):
    """Residual encoder with group normalisation and ReLU, four stages, averaged over positions.

    It has no head: what it is trained for is up to the script that trains it (`checkpoints/make_glyphs.py`).

    Args:
        image_channels: C, at least 1.
        image_size: height = width of the images, a multiple of 8.
        width: channels of the first stage, a multiple of 8; the stages have 1, 2, 4 and 4 times as many, and halve
            the resolution from the second on.

    Raises:
        ValueError: an image_size or a width that is not such a multiple.
    """

    def __init__(self, image_channels: int = 3, image_size: int = 32, width: int = 32) -> None:
        super().__init__()
        for name, value in {"image_size": image_size, "width": width}.items():
            if value < 8 or value % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {value}.")
        self.config = {"image_channels": image_channels, "image_size": image_size, "width": width}
        self.num_features = 4 * width
        self.image_shape = (image_channels, image_size, image_size)
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
            ResidualBlock(4 * width, 4 * width, 2),
            nn.GroupNorm(8, 4 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, 4 width), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        features: Tensor = self.body(images)
        return features

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `save_directory` (created if missing)."""
        save_features(self, self.config, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path) -> ResidualFeatures:
        """Read what `save_pretrained` wrote; the network comes back frozen.

        Args:
            pretrained_path: a local folder.

        Raises:
            ValueError: the folder or one of its files is missing or damaged, or holds a network of another class.
        """
        return load_features(pretrained_path, cls)
