"""Frechet distance between Gaussians fitted to features (FID)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.metrics.base import SampleMetric
from ddss_lightning.metrics.statistics import ReferenceStatistics


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    r"""Squared Frechet (Wasserstein-2) distance between N(mean_1, cov_1) and N(mean_2, cov_2).

    .. math:: d^2 = |m_1 - m_2|^2 + \mathrm{tr}(C_1) + \mathrm{tr}(C_2) - 2 \mathrm{tr} (C_1^{1/2} C_2 C_1^{1/2})^{1/2}

    With C_1 = A_1 A_1^T and C_2 = A_2 A_2^T the last trace is the sum of the singular values of A_1^T A_2. So no square
    root is taken of an eigenvalue that rounding made, which for rank-deficient or nearly singular covariances would
    leave errors of 1e-8 to 1e-7, other ones for each order of the samples; and there is no complex part, as in the
    matrix square root of C_1 C_2.

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
    trace = torch.linalg.svdvals(_factor(cov_1).mT @ _factor(cov_2)).sum()
    distance: Tensor = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace
    return distance


def _factor(cov: Tensor) -> Tensor:
    """A of shape (d, r) with A A^T = cov: Cholesky's where all is well, else from eigenvalues that are not noise."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    if not failed and pivots.min() > 1e-12 * pivots.max():
        return lower
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    kept = eigenvalues > len(cov) * torch.finfo(cov.dtype).eps * eigenvalues.max()
    factor: Tensor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
    return factor


class FrechetDistance(SampleMetric):
    """FID of generated features against real ones, from summable float64 states.

    The result does not depend on batch sizes or on how samples are spread over processes, and memory does not grow
    with their number. It is biased: fewer images give a larger distance, so the number belongs to the figure.

    Args:
        real: features of the real images, shape (m, d), m >= 2, or their statistics.
        features: the network of the real features, if `update` is to take images.

    Raises:
        ValueError: real features that cannot be used, or statistics of another network; fewer than two generated
            vectors when computed.
    """

    higher_is_better = False
    num: Tensor
    total: Tensor
    outer: Tensor
    mean_real: Tensor
    cov_real: Tensor

    def __init__(self, real: Tensor | ReferenceStatistics, features: FeatureExtractor | None = None) -> None:
        statistics = real if isinstance(real, ReferenceStatistics) else ReferenceStatistics.from_features(real)
        super().__init__(len(statistics.mean), features)
        if features is not None:
            statistics.check(features)
        self.num_real = statistics.num
        self.register_buffer("mean_real", statistics.mean.double(), persistent=False)
        self.register_buffer("cov_real", statistics.cov.double(), persistent=False)
        self.add_state("num", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros_like(self.mean_real), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros_like(self.cov_real), dist_reduce_fx="sum")
        self._warned = False

    def update(self, samples: Tensor) -> None:
        """Add generated samples.

        Args:
            samples: vectors, shape (n, d); images, shape (n, C, H, W), if the metric has a feature network.

        Raises:
            TypeError: images that are not floats.
            ValueError: wrong shapes, images outside [-1, 1], or numbers that are not finite.
        """
        # Centred on the real mean for accuracy.
        centred = self.vectors(samples) - self.mean_real
        self.num += len(centred)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred

    def compute(self) -> Tensor:
        """The squared Frechet distance; NaN if a feature was so large that its square overflowed.

        It warns, once, if a covariance is of fewer images than it has rows, hence rank-deficient.
        """
        if self.num < 2:
            raise ValueError(f"FID needs at least two generated images, got {int(self.num)}.")
        self._warn_of_rank()
        if not self.outer.isfinite().all():
            return torch.full_like(self.total[0], torch.nan)
        mean = self.total / self.num
        cov = (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)
        return frechet_distance(self.mean_real, self.cov_real, mean + self.mean_real, cov)

    def _warn_of_rank(self) -> None:
        counts = {"generated": int(self.num), "real": self.num_real}
        few = [f"{num} {kind} images" for kind, num in counts.items() if num is not None and num <= self.num_features]
        if few and not self._warned:
            rank_zero_warn(
                f"FID in {self.num_features} dimensions from {' and '.join(few)}: the covariance is rank-deficient and "
                "the distance mostly bias. Use more images than features, or KID."
            )
        self._warned = True
