"""Several losses at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.losses.base import SampleLoss, Samples

# Logged by the module under these names.
RESERVED = ("loss", "grad_norm", "skipped_steps")


class WeightedSum(SampleLoss):
    r"""L = sum_i w_i L_i of named losses. Each L_i is logged as `train/<name>`, without its weight; L as `train/loss`.

    Args:
        losses: L_i by name.
        weights: w_i by the same names; 1 for a name that is left out.

    Raises:
        ValueError: no loss, a weight for a name that no loss has, one that is negative or not finite, a name that logs
            use for something else, or that `nn.ModuleDict` has already, such as `type` or `keys`.
    """

    def __init__(self, losses: dict[str, SampleLoss], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        weights = weights or {}
        if not isinstance(losses, Mapping):
            raise ValueError(f"losses must be a mapping from names to losses, got {type(losses).__name__}.")
        if not losses:
            raise ValueError("losses must hold at least one loss, got {}.")
        for name in losses:
            if name in RESERVED or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"A loss cannot be called '{name}'; give it another name, such as 'first'.")
        for name, weight in weights.items():
            if name not in losses:
                raise ValueError(f"weights: there is no loss '{name}'; the losses are {', '.join(losses)}.")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"The weight of '{name}' must be a number of at least 0, got {weight}.")
        self.losses = nn.ModuleDict(losses)
        self.weights = {name: float(weights.get(name, 1.0)) for name in losses}
        self.needs = frozenset().union(*(loss.needs for loss in losses.values()))

    def fit_real(self, features: Tensor, encode_real: Callable[[FeatureExtractor], Tensor] | None = None) -> None:
        """Give all losses their real features."""
        for _, loss in self._named():
            loss.fit_real(features, encode_real)

    def fit_target(self, encode_target: Callable[[FeatureExtractor | None], Tensor]) -> None:
        """Give all losses the teacher's features."""
        for _, loss in self._named():
            loss.fit_target(encode_target)

    def identity(self) -> str:
        """With the weights that are not 1."""
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items() if weight != 1)
        return f"WeightedSum({weights})" if weights else "WeightedSum"

    def forward(self, samples: Samples) -> Tensor:
        """The sum."""
        values = {name: loss(samples) for name, loss in self._named()}
        self.terms = {name: value.detach() for name, value in values.items()}
        return torch.stack([self.weights[name] * value.double() for name, value in values.items()]).sum()

    def _named(self) -> list[tuple[str, SampleLoss]]:
        return list(self.losses.items())  # type: ignore[arg-type]
