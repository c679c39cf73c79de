"""Frechet distance between Gaussians fitted to features (FID)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    r"""Squared Frechet (Wasserstein-2) distance between N(mean_1, cov_1) and N(mean_2, cov_2).

    .. math:: d^2 = |m_1 - m_2|^2 + \mathrm{tr}(C_1) + \mathrm{tr}(C_2) - 2 \mathrm{tr} (C_1^{1/2} C_2 C_1^{1/2})^{1/2}

    The last trace is taken from symmetric eigenvalues, clamped at 0: no matrix square root of a nonsymmetric
    product, hence no complex part for rank-deficient covariances.

    Args:
        mean_1: m_1, shape (d,), float64.
        cov_1: C_1, shape (d, d), symmetric positive semidefinite, float64.
        mean_2: m_2, as mean_1.
        cov_2: C_2, as cov_1.

    Returns:
        A scalar, at least 0 up to rounding.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, https://arxiv.org/abs/1706.08500, eq. 6.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(cov_1)
    root_1 = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.mT
    trace = torch.linalg.eigvalsh(root_1 @ cov_2 @ root_1).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace
    return distance


def gaussian_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Sample mean, shape (d,), and unbiased covariance, shape (d, d), of features of shape (N, d), in float64."""
    features = features.double()
    return features.mean(dim=0), features.T.cov()


class FrechetDistance(Metric):
    """FID of generated features against real ones, from summable float64 states.

    The result does not depend on batch sizes or on how samples are spread over processes.

    Args:
        real: features of the real images, shape (m, d), m >= 2.

    Raises:
        ValueError: fewer than two generated vectors when computed.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    num: Tensor
    total: Tensor
    outer: Tensor
    mean_real: Tensor
    cov_real: Tensor

    def __init__(self, real: Tensor) -> None:
        super().__init__()
        mean, cov = gaussian_moments(real)
        self.register_buffer("mean_real", mean, persistent=False)
        self.register_buffer("cov_real", cov, persistent=False)
        self.add_state("num", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros_like(mean), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros_like(cov), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add generated features, shape (n, d). They are centred on the real mean for accuracy."""
        centred = features.double() - self.mean_real
        self.num += len(features)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred

    def compute(self) -> Tensor:
        """The squared Frechet distance; NaN if any feature was not finite."""
        if self.num < 2:
            raise ValueError(f"FID needs at least two generated images, got {int(self.num)}.")
        if not self.outer.isfinite().all():
            return torch.full_like(self.total[0], torch.nan)
        mean = self.total / self.num
        cov = (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)
        return frechet_distance(mean + self.mean_real, cov, self.mean_real, self.cov_real)
