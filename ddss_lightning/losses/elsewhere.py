"""A loss in the space of another feature network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.losses.base import SampleLoss, Samples


class InFeatures(SampleLoss):
    """`loss` of the features of a network of its own, in place of those of the module.

    One feature network is easily fooled: what it was not trained to see does not count. In a `WeightedSum` with the
    loss in the module's own space, samplers must please both. Scores stay those of the module's features.

    Args:
        features: the network; it is frozen.
        loss: what is measured with it. A `KIDLoss` or `FrechetLoss` of all real images, a `TeacherLoss` of features,
            or a sum of several; what such a sum measures of pixels is the same here as outside.
        batch_size: images that go through the network at once; with more images than that it is computed again in the
            backward pass.

    Raises:
        ValueError: a loss that sees no features, or minibatches of real ones; a batch size below 1.
    """

    def __init__(self, features: FeatureExtractor, loss: SampleLoss, batch_size: int = 256) -> None:
        super().__init__()
        if "features" not in loss.needs:
            raise ValueError(f"A loss that looks at {', '.join(sorted(loss.needs))} needs no features of its own.")
        if "real" in loss.needs:
            raise ValueError("Minibatches of real images are encoded by the module alone; set real='bank'.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.features, self.loss, self.batch_size = features.freeze(), loss, batch_size
        self.name = loss.name
        pixels = {"features": "images", "target_features": "target"}
        self.needs = frozenset(pixels.get(need, need) for need in loss.needs)

    def fit_real(self, features: Tensor, encode_real: Callable[[FeatureExtractor], Tensor] | None = None) -> None:  # noqa: ARG002
        """Give the loss the features of all real images in its own space.

        Raises:
            ValueError: no `encode_real`.
        """
        if encode_real is None:
            raise ValueError("InFeatures encodes real images itself: give `fit_real` a function `encode_real`.")
        self.loss.fit_real(encode_real(self.features), encode_real)

    def fit_target(self, encode_target: Callable[[FeatureExtractor | None], Tensor]) -> None:
        """Give the loss the teacher's features in its own space."""
        self.loss.fit_target(lambda network: encode_target(network or self.features))

    def identity(self) -> str:
        """With that of the network."""
        return f"InFeatures({self.features.identity()})"

    def forward(self, samples: Samples) -> Tensor:
        """The loss of the features of `samples.images`.

        Raises:
            ValueError: no images, or none of the teacher, where it is compared with one.
        """
        # Pixels are the same in every space.
        inner = Samples(
            images=samples.images, target=samples.target, gather=samples.gather, precision=samples.precision
        )
        with samples.precision():
            inner.features = self._encoded(samples["images"])
            if "target_features" in self.loss.needs:
                inner.target_features = self._encoded(samples["target"])
        value: Tensor = self.loss(inner)
        self.terms = self.loss.terms
        return value

    def _encoded(self, images: Tensor) -> Tensor:
        images = images.to(self.features.dtype)
        if len(images) <= self.batch_size:
            return self.features(images)  # type: ignore[no-any-return]
        parts = [checkpoint(self.features, part, use_reentrant=False) for part in images.split(self.batch_size)]
        return torch.cat(parts)
