"""Precision, recall, density and coverage by nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.metrics.base import RowMetric, check_real

# A neighbour at exactly the radius counts as outside whatever the rounding of its distance was.
MARGIN = 1e-9
# Rows of a matrix of distances at a time: more do not stay in the processor's cache.
BLOCK = 128


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, all pairs: (N, d), (M, d) -> (N, M)."""
    with torch.autocast(x.device.type, enabled=False):
        # In place: the matrix is large, and every copy of it takes as long as the product.
        distances = (x @ y.T).mul_(-2).add_(x.square().sum(1, keepdim=True)).add_(y.square().sum(1))
    return distances.clamp_(min=0)


def squared_radii(x: Tensor, num_neighbours: int, block: int = BLOCK) -> Tensor:
    """Squared distance of each vector to its k-th nearest neighbour among the others, shape (N,)."""
    radii = []
    for start, part in zip(range(0, len(x), block), x.split(block), strict=True):
        distances = squared_distances(part, x)
        distances[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        radii.append(distances.topk(num_neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(radii) * (1 - MARGIN)


class PrecisionRecall(RowMetric):
    r"""Fidelity and diversity apart from each other, from balls around each sample.

    With x_i the n generated and y_j the m real vectors, and B(y_j) the open ball around y_j that reaches to its
    k-th nearest neighbour among the real ones, B(x_i) likewise:

    .. math::
        \text{precision} &= \tfrac1n \sum_i 1[\exists j: x_i \in B(y_j)]
        & \text{density} &= \tfrac1{kn} \sum_{ij} 1[x_i \in B(y_j)] \\
        \text{recall} &= \tfrac1m \sum_j 1[\exists i: y_j \in B(x_i)]
        & \text{coverage} &= \tfrac1m \sum_j 1[\exists i: x_i \in B(y_j)]

    Density is 1 in the mean, and coverage 1 - 2^-k for many samples, where both sets have the same distribution.
    Distances are computed block by block: memory grows with n + m, not with their product. They are known to about
    1e-13 of the squared distance from the mean of the real vectors; samples closer than that are taken for copies.

    Args:
        real: features of the real images, shape (m, d), m > k.
        num_neighbours: k. Kynkaanniemi et al. use 3, Naeem et al. 5; a table must say which.
        features: the network of the real features, if `update` is to take images.

    Raises:
        ValueError: real features that cannot be used, k < 1; at most k generated vectors when computed.

    References:
        Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
        https://arxiv.org/abs/1904.06991, eqs. 1 and 2 (closed balls there; the same unless distances are equal);
        Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
        https://arxiv.org/abs/2002.09797, section 3 (open balls in the authors' code).
    """

    higher_is_better = True
    names = ("precision", "recall", "density", "coverage")
    real: Tensor
    centre: Tensor
    real_radii: Tensor

    def __init__(self, real: Tensor, num_neighbours: int = 5, features: FeatureExtractor | None = None) -> None:
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours must be at least 1, got {num_neighbours}.")
        real = check_real(real, minimum=num_neighbours + 1)
        super().__init__(real.shape[1], features)
        self.num_neighbours = num_neighbours
        # Centred: the rounding of squared distances grows with the norms.
        self.register_buffer("centre", real.mean(0), persistent=False)
        self.register_buffer("real", real - self.centre, persistent=False)
        self.register_buffer("real_radii", torch.empty(0, dtype=torch.float64), persistent=False)

    def compute(self) -> dict[str, Tensor]:
        """`precision`, `recall`, `density`, `coverage`."""
        x = self.all_rows(minimum=self.num_neighbours + 1) - self.centre
        if not len(self.real_radii):
            self.real_radii = squared_radii(self.real, self.num_neighbours)
        radii = squared_radii(x, self.num_neighbours)
        balls_around = torch.zeros(len(x), dtype=torch.long, device=x.device)
        recalled, covered = [], []
        for part, radius in zip(self.real.split(BLOCK), self.real_radii.split(BLOCK), strict=True):
            distances = squared_distances(part, x)
            inside = distances < radius[:, None]
            balls_around += inside.sum(0)
            covered.append(inside.any(1))
            recalled.append((distances < radii).any(1))
        return {
            "precision": (balls_around > 0).double().mean(),
            "recall": torch.cat(recalled).double().mean(),
            "density": balls_around.double().mean() / self.num_neighbours,
            "coverage": torch.cat(covered).double().mean(),
        }
