"""Statistics of an untrained convolutional network: a feature space that no task has made blind to anything."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor

# Variances of dead channels have a square root with a finite slope.
EPSILON = 1e-4


def _reflected(x: Tensor) -> Tensor:
    """With the second pixels from each edge beside it: `reflect`, whose gradient on a GPU is not always the same."""
    x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], 2)
    return torch.cat([x[..., 1:2], x, x[..., -2:-1]], 3)


def _random_convolution(inputs: int, outputs: int, generator: torch.Generator) -> nn.Conv2d:
    # Without its own initialisation, which would move torch's global generator.
    layer: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3)
    weight, bias = torch.randn(outputs, inputs, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    layer.weight, layer.bias = nn.Parameter(weight * math.sqrt(2 / (9 * inputs))), nn.Parameter(bias)
    return layer


class RandomFeatures(FeatureExtractor):
    r"""Mean and standard deviation over positions of every channel of convolutions with random weights.

    .. math::
        h_0 = x, \quad h_l = \mathrm{silu}(W_l * h_{l-1}), \quad
        \phi = (\mathrm{mean}_{hw} h_l, (\mathrm{var}_{hw} h_l + 10^{-4})^{1/2})_{l \ge 1}

    with 3x3 convolutions, halved in resolution after each. Weights are normal with variance 2 / (9 C), biases normal
    with variance 1, a function of `seed` alone. A classifier is trained to ignore what does not tell its classes apart,
    such as colours or the strength of noise; here nothing is ignored, and nothing is understood.

    Args:
        image_channels: C, at least 1.
        image_size: height = width of the images, a multiple of 2^(num_stages - 1).
        width: channels of each convolution; there are 2 width num_stages features.
        num_stages: convolutions.
        seed: of the weights.

    Raises:
        ValueError: a number below 1, or an image_size that is not such a multiple.

    References:
        Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
        https://arxiv.org/abs/2002.09797, section 4, for randomly initialised networks as feature spaces.
    """

    def __init__(
        self, image_channels: int = 3, image_size: int = 32, width: int = 48, num_stages: int = 3, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in {"image_channels": image_channels, "width": width, "num_stages": num_stages}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        multiple = 2 ** (num_stages - 1)
        if image_size < 2 * multiple or image_size % multiple:
            raise ValueError(
                f"image_size must be a multiple of {multiple} and at least {2 * multiple} pixels for {num_stages} "
                f"stages, got {image_size}."
            )
        self.num_features = 2 * width * num_stages
        self.image_shape = (image_channels, image_size, image_size)
        generator = torch.Generator().manual_seed(seed)
        channels = [image_channels] + [width] * (num_stages - 1)
        self._made_of = f"RandomFeatures {image_channels} {width} {num_stages} {seed}"
        self.layers = nn.ModuleList(_random_convolution(inputs, width, generator) for inputs in channels)
        self.freeze()

    def _digest(self) -> str:
        # Random numbers differ in their last digits between processors.
        return hashlib.sha256(self._made_of.encode()).hexdigest()[:16]

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, 2 width num_stages), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        features, x = [], images
        for layer in self.layers:
            x = nn.functional.silu(layer(_reflected(x)))
            features += [x.mean((2, 3)), (x.var((2, 3), correction=0) + EPSILON).sqrt()]
            x = nn.functional.avg_pool2d(x, 2) if layer is not self.layers[-1] else x
        return torch.cat(features, 1)
