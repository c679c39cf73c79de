"""The Frechet distance as a sum of squares, for Gauss-Newton."""

from __future__ import annotations

import torch
from torch import Tensor

# Eigenvalues of the real covariance below this fraction of the largest are treated as that large.
FLOOR = 1e-4


class FrechetResidual:
    r"""A vector r of a set of features with |r|^2 = Frechet distance to the real ones, to second order around them.

    With the real moments m_r and S_r = V diag(l) V^T (features divided by their root mean square, as in `KIDLoss`),

    .. math::
        F(m, S) = |m - m_r|^2 + \mathrm{tr}(S + S_r - 2 (S_r^{1/2} S S_r^{1/2})^{1/2})
        \approx |m - m_r|^2 + \frac{1}{2} \sum_{ij} \frac{(V^T (S - S_r) V)_{ij}^2}{l_i + l_j},

    the Bures metric, so r is (m - m_r) and the entries of V^T (S - S_r) V, each over (2 (l_i + l_j))^{1/2}.

    Args:
        real: features, shape (m, d), m >= 2.
        rank: number of leading eigenvectors V in whose span the distance is measured; all if d is smaller.

    Raises:
        ValueError: fewer than two vectors, numbers that are not finite, or a rank below 1.

    References:
        Heusel et al., 2017, https://arxiv.org/abs/1706.08500, eq. 6; Bhatia, Jain, Lim, "On the Bures-Wasserstein
        distance between positive definite matrices", 2019, https://arxiv.org/abs/1712.01504, section 3, for the metric.
    """

    def __init__(self, real: Tensor, rank: int = 128) -> None:
        if real.ndim != 2 or len(real) < 2:
            raise ValueError(f"At least two real feature vectors are needed, got shape {tuple(real.shape)}.")
        if not real.isfinite().all():
            raise ValueError("The real features hold numbers that are not finite; look for NaN in the real images.")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        real = real.detach().double()
        self.scale = float(real.square().mean().sqrt())
        real = real / self.scale
        eigenvalues, vectors = torch.linalg.eigh(torch.cov(real.T).reshape(real.shape[1], -1))
        self.eigenvalues, self.vectors = eigenvalues[-rank:], vectors[:, -rank:]
        self.mean = real.mean(0) @ self.vectors
        self.rank = len(self.mean)
        rows, columns = torch.triu_indices(self.rank, self.rank, device=real.device)
        # An entry off the diagonal stands for two.
        floor = FLOOR * eigenvalues[-1]
        sums = self.eigenvalues[rows].clamp(min=floor) + self.eigenvalues[columns].clamp(min=floor)
        self.weights = torch.where(rows == columns, 0.5, 1.0).double().div(sums).sqrt()
        self._rows, self._columns = rows, columns

    def moments(self, features: Tensor) -> Tensor:
        """Mean and second moments of features, shape (n, d), as one vector that can be averaged over equal batches."""
        x = features.double() / self.scale @ self.vectors
        return torch.cat([x.mean(0), (x.T @ x / len(x)).flatten()])

    def residual(self, moments: Tensor) -> Tensor:
        """r, shape (rank + rank (rank + 1) / 2,)."""
        mean, second = moments[: self.rank], moments[self.rank :].view(self.rank, self.rank)
        difference = second - mean.outer(mean) - torch.diag(self.eigenvalues)
        return torch.cat([mean - self.mean, difference[self._rows, self._columns] * self.weights])
