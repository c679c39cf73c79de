"""Kernel Inception Distance as a metric: of all samples at once, and by the subset protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.losses.kid import KERNELS, Kernel, kernel_sum, kid, mean_within
from ddss_lightning.metrics.base import RowMetric, check_real


def _check_kernel(kernel: Kernel) -> Kernel:
    if kernel not in KERNELS:
        raise ValueError(f"Unknown kernel '{kernel}'; choose one of {', '.join(KERNELS)}.")
    return kernel


class KernelDistance(RowMetric):
    """Unbiased KID of all generated features against all real ones, float64, as `ddss_lightning.losses.kid.kid`.

    Args:
        real: features of the real images, shape (m, d), m >= 2, in the feature network's own scale.
        kernel: `cubic` or `linear`.
        features: the network of the real features, if `update` is to take images.

    Raises:
        ValueError: real features that cannot be used, an unknown kernel; fewer than two generated vectors when
            computed.
    """

    higher_is_better = False
    real: Tensor
    real_term: Tensor

    def __init__(self, real: Tensor, kernel: Kernel = "cubic", features: FeatureExtractor | None = None) -> None:
        real = check_real(real)
        super().__init__(real.shape[1], features)
        self.kernel: Kernel = _check_kernel(kernel)
        self.register_buffer("real", real, persistent=False)
        self.register_buffer("real_term", mean_within(real, kernel), persistent=False)

    def compute(self) -> Tensor:
        """The unbiased squared maximum mean discrepancy."""
        x = self.all_rows(minimum=2)
        across = kernel_sum(x, self.real, self.kernel) / (len(x) * len(self.real))
        return mean_within(x, self.kernel) + self.real_term - 2 * across


class KernelDistanceSubsets(RowMetric):
    """KID by the literature's protocol: mean and standard deviation over random subsets.

    Each of the `num_subsets` estimates is the unbiased KID of `subset_size` generated against as many real vectors,
    both drawn without replacement from a generator with the given seed. The deviation says how far estimates from
    so few samples scatter; it is not the standard error of the mean, because subsets overlap.

    The same samples give the same result in any batches and processes: bit by bit if they come with their
    `indices`, or if their features are equal to the last bit.

    Args:
        real: features of the real images, shape (m, d), m >= `subset_size`, in one fixed order.
        num_subsets: number of estimates.
        subset_size: n = m of each.
        seed: of the subsets.
        kernel: `cubic` or `linear`.
        features: the network of the real features, if `update` is to take images.

    Raises:
        ValueError: real features that cannot be used, an unknown kernel, no subset; fewer generated vectors than
            `subset_size` when computed.

    References:
        Binkowski et al., "Demystifying MMD GANs", ICLR 2018, https://arxiv.org/abs/1801.01401, section 4; the
        deviation is that of the population, as in torch-fidelity.
    """

    higher_is_better = False
    real: Tensor

    def __init__(
        self,
        real: Tensor,
        num_subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        kernel: Kernel = "cubic",
        features: FeatureExtractor | None = None,
    ) -> None:
        if num_subsets < 1 or subset_size < 2:
            raise ValueError(
                f"At least one subset of two samples is needed, got num_subsets {num_subsets}, "
                f"subset_size {subset_size}."
            )
        real = check_real(real, minimum=subset_size)
        super().__init__(real.shape[1], features)
        self.num_subsets, self.subset_size, self.seed = num_subsets, subset_size, seed
        self.kernel: Kernel = _check_kernel(kernel)
        self.register_buffer("real", real, persistent=False)

    def compute(self) -> dict[str, Tensor]:
        """`kid_mean` and `kid_std`."""
        x = self.all_rows(minimum=self.subset_size)
        generator = torch.Generator().manual_seed(self.seed)
        estimates = []
        for _ in range(self.num_subsets):
            of_generated = torch.randperm(len(x), generator=generator)[: self.subset_size].to(x.device)
            of_real = torch.randperm(len(self.real), generator=generator)[: self.subset_size].to(x.device)
            estimates.append(kid(x[of_generated], self.real[of_real], self.kernel))
        values = torch.stack(estimates)
        return {"kid_mean": values.mean(), "kid_std": values.std(correction=0)}
