"""A small convolutional classifier whose penultimate layer serves as feature space, for small images."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class ConvFeatures(FeatureExtractor):
    """Classifier of small images: four 3x3 convolutions, one pooling, a hidden layer of d features, a linear head.

    All activations are SiLU, so that features are smooth functions of the image. It is made for training
    (`checkpoints/make_digits.py`), saved with `save_pretrained` and used through `from_pretrained`, which freezes it.

    Args:
        image_channels: C, at least 1.
        image_size: height = width of the images, an even number.
        width: channels of the first two convolutions; the last two have twice as many.
        num_features: d, the length of the penultimate layer.
        num_classes: number of classes of the head.
    """

    def __init__(
        self,
        image_channels: int = 1,
        image_size: int = 8,
        width: int = 32,
        num_features: int = 64,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if image_size < 2 or image_size % 2:
            raise ValueError(f"image_size must be an even number of pixels, got {image_size}.")
        self.config = {
            "image_channels": image_channels,
            "image_size": image_size,
            "width": width,
            "num_features": num_features,
            "num_classes": num_classes,
        }
        self.num_features = num_features
        self.image_shape = (image_channels, image_size, image_size)
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 2) ** 2, num_features),
            nn.SiLU(),
        )
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
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(
            json.dumps({"_class_name": type(self).__name__, **self.config}, indent=2) + "\n"
        )
        save_file(self.state_dict(), folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path) -> ConvFeatures:
        """Read what `save_pretrained` wrote; the network comes back frozen.

        Args:
            pretrained_path: a local folder.

        Raises:
            ValueError: the folder or one of its files is missing or damaged.
        """
        folder = Path(pretrained_path)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(
                    f"No feature network in '{folder}': '{name}' is missing. Give the folder written by "
                    "`ConvFeatures.save_pretrained`, such as 'checkpoints/digits-features'."
                )
        try:
            config = json.loads((folder / CONFIG_NAME).read_text())
            config.pop("_class_name", None)
            network = cls(**config)
            network.load_state_dict(load_file(folder / WEIGHTS_NAME))
        except (json.JSONDecodeError, SafetensorError, RuntimeError, TypeError) as error:
            raise ValueError(f"The feature network in '{folder}' is damaged or of another kind: {error}") from error
        return network.freeze()
