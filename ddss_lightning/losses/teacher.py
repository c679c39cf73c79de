"""Distance to the images that a teacher, a sampler of many steps, makes from the same noise."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddss_lightning.losses.base import SampleLoss, Samples, feature_scale
from ddss_lightning.losses.perceptual import Backbone, PerceptualDistance

Distance = Literal["l2", "features", "lpips"]
NEEDS = {"l2": ("images", "target"), "features": ("features", "target_features"), "lpips": ("images", "target")}


class TeacherLoss(SampleLoss):
    r"""Mean distance of the sampler's images x to the teacher's y from the same x_T.

    - `l2`: the mean of (x - y)^2 over pixels in [-1, 1];
    - `features`: the mean of (phi(x) - phi(y))^2 over features that were divided by the root mean square of the real
      ones, as in `KIDLoss`;
    - `lpips`: see `PerceptualDistance`.

    A mean over images: each process takes its own, and DDP the mean over processes.

    Args:
        distance: `l2`, `features` or `lpips`.
        backbone: of `lpips`: `alex`, `vgg` or `squeeze`.
        download: of `lpips`: let torchvision fetch the backbone's weights where they are missing.
        batch_size: images that go through the network of `lpips` at once; with more images than that it is computed
            again in the backward pass.

    Raises:
        ValueError: an unknown distance or backbone, weights that are not there, a batch size below 1.
    """

    def __init__(
        self, distance: Distance = "l2", backbone: Backbone = "alex", download: bool = False, batch_size: int = 64
    ) -> None:
        super().__init__()
        if distance not in get_args(Distance):
            raise ValueError(f"Unknown distance '{distance}'; choose one of {', '.join(get_args(Distance))}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.distance, self.backbone, self.batch_size = distance, backbone, batch_size
        self.name = f"teacher_{distance}"
        self.needs = frozenset(NEEDS[distance])
        self.scale = 1.0
        self.perceptual = PerceptualDistance(backbone, download) if distance == "lpips" else None

    def fit_real(self, features: Tensor, encode_real: object = None) -> None:  # noqa: ARG002 - see the base class
        """Take the scale of the features.

        Raises:
            ValueError: fewer than two vectors, or numbers that are not finite.
        """
        self.scale = feature_scale(features, "TeacherLoss")

    def identity(self) -> str:
        """With the distance, and the backbone of LPIPS."""
        return f"TeacherLoss({self.distance}{f', {self.backbone}' * (self.distance == 'lpips')})"

    def forward(self, samples: Samples) -> Tensor:
        """The mean over the images of this process.

        Raises:
            ValueError: no images or features of the teacher.
        """
        made, target = (samples[name] for name in NEEDS[self.distance])
        if self.perceptual is not None:
            with samples.precision():
                return self._perceptual(made, target)
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        difference = made - target.to(made.dtype)
        return (difference / (self.scale if self.distance == "features" else 1.0)).square().mean()

    def _perceptual(self, made: Tensor, target: Tensor) -> Tensor:
        assert self.perceptual is not None
        if len(made) <= self.batch_size:
            return self.perceptual(made, target).mean()  # type: ignore[no-any-return]
        pairs = zip(made.split(self.batch_size), target.split(self.batch_size), strict=True)
        return torch.cat([checkpoint(self.perceptual, x, y, use_reentrant=False) for x, y in pairs]).mean()
