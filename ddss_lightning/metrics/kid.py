"""Kernel Inception Distance as a metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from ddss_lightning.losses.kid import Kernel, polynomial_kernel


def kernel_sum(x: Tensor, y: Tensor, kernel: Kernel, block: int = 2048) -> Tensor:
    """Sum of k(x_i, y_j) over all pairs, block by block: memory does not grow with the square of N."""
    return torch.stack([polynomial_kernel(part, y, kernel).sum() for part in x.split(block)]).sum()


class KernelDistance(Metric):
    """Unbiased KID of all generated features against all real ones, float64, as `ddss_lightning.losses.kid.kid`.

    Args:
        real: features of the real images, shape (m, d), m >= 2, in the feature network's own scale.
        kernel: `cubic` or `linear`.

    Raises:
        ValueError: fewer than two generated vectors when computed.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    generated: list[Tensor]
    real: Tensor
    real_term: Tensor

    def __init__(self, real: Tensor, kernel: Kernel = "cubic") -> None:
        super().__init__()
        self.kernel: Kernel = kernel
        self.register_buffer("real", real.double(), persistent=False)
        self.register_buffer("real_term", self._within(self.real), persistent=False)
        self.add_state("generated", [], dist_reduce_fx="cat")

    def _within(self, x: Tensor) -> Tensor:
        """Mean of k(x_i, x_j) over i != j."""
        diagonal = torch.stack([polynomial_kernel(row, row, self.kernel).sum() for row in x.split(1)]).sum()
        return (kernel_sum(x, x, self.kernel) - diagonal) / (len(x) * (len(x) - 1))

    def update(self, features: Tensor) -> None:
        """Add generated features, shape (n, d)."""
        self.generated.append(features.double())

    def compute(self) -> Tensor:
        """The unbiased squared maximum mean discrepancy."""
        x = torch.cat(self.generated) if isinstance(self.generated, list) else self.generated
        if len(x) < 2:
            raise ValueError(f"KID needs at least two generated images, got {len(x)}.")
        across = kernel_sum(x, self.real, self.kernel) / (len(x) * len(self.real))
        return self._within(x) + self.real_term - 2 * across
