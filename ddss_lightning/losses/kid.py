"""Kernel Inception Distance as a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.losses.base import SampleLoss, Samples, feature_scale

Kernel = Literal["cubic", "linear"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
# Rows of a Gram matrix at a time: a block that stays in the processor's cache is four times as fast as one of 2048.
BLOCK = 128
# A feature with less than this part of the root mean square of all deviations is constant to `standardize`.
LEAST_SPREAD = 1e-3


def polynomial_kernel(x: Tensor, y: Tensor, kernel: Kernel = "cubic") -> Tensor:
    r"""k(x, y) = (x . y / d + 1)^3 (`cubic`) or x . y / d (`linear`), all pairs: (N, d), (M, d) -> (N, M)."""
    with torch.autocast(x.device.type, enabled=False):
        product = x @ y.T / x.shape[1]
    return (product + 1) ** 3 if kernel == "cubic" else product


def mean_off_diagonal(gram: Tensor) -> Tensor:
    """Mean of k(x_i, x_j) over i != j for a Gram matrix of shape (N, N), N >= 2."""
    num = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (num * (num - 1))


def kernel_sum(x: Tensor, y: Tensor, kernel: Kernel, block: int = BLOCK) -> Tensor:
    """Sum of k(x_i, y_j) over all pairs, block by block: memory does not grow with the square of N."""
    return torch.stack([polynomial_kernel(part, y, kernel).sum() for part in x.split(block)]).sum()


def mean_within(x: Tensor, kernel: Kernel) -> Tensor:
    """Mean of k(x_i, x_j) over i != j, of vectors of shape (n, d), n >= 2; each pair is computed once."""
    sums = []
    for start in range(0, len(x), BLOCK):
        part, rest = x[start : start + BLOCK], x[start + BLOCK :]
        gram = polynomial_kernel(part, part, kernel)
        sums.append(gram.sum() - gram.diagonal().sum() + 2 * polynomial_kernel(part, rest, kernel).sum())
    return torch.stack(sums).sum() / (len(x) * (len(x) - 1))


def kid(generated: Tensor, real: Tensor, kernel: Kernel = "cubic") -> Tensor:
    r"""Unbiased estimate of the squared maximum mean discrepancy of two sets of features.

    .. math::
        \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{nm} \sum_{ij} k(x_i, y_j)

    It can be negative. Differentiable in both sets.

    Args:
        generated: x, shape (n, d), n >= 2.
        real: y, shape (m, d), m >= 2.
        kernel: `cubic` or `linear`.

    Returns:
        A scalar.

    References:
        Binkowski et al., "Demystifying MMD GANs", ICLR 2018, https://arxiv.org/abs/1801.01401, eq. 4.
    """
    within = mean_off_diagonal(polynomial_kernel(generated, generated, kernel))
    across = polynomial_kernel(generated, real, kernel).mean()
    return within + mean_off_diagonal(polynomial_kernel(real, real, kernel)) - 2 * across


def _check_samples(generated: Tensor, real: Tensor) -> None:
    if generated.ndim != 2 or len(generated) < 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"KIDLoss compares the features of at least two samples, shape (n, {real.shape[1]}) as those of the real "
            f"images, got {tuple(generated.shape)}."
        )


class KIDLoss(SampleLoss):
    r"""`kid` of features that were divided by the root mean square of the real ones; over all processes.

    Without that scale the cubic kernel's gradients are in the millions. Where features have a mean far larger than
    their spread, as those of `RandomFeatures`, the kernel sees little but the mean: `standardize` shifts each of them
    to mean 0, and divides it by its standard deviation, of the real ones; those that hardly differ between real images
    (a thousandth of the root mean square of all deviations) are left out: nothing can be said in such units. The
    scale and the real-real term come from the bank of real features that `fit_real` receives once; the bank itself is
    what generated images are compared with (`real="bank"`: less gradient noise) unless a minibatch of real features is
    given at each step (`real="batch"`).

    What a batch of samples says of all is mostly chance: its x_T are lighter or darker, have more letters of one kind.
    With `control_variate` the teacher's images from the same x_T, which share that chance, are subtracted, and all of
    its images added, in the space of the kernel. With x_i the samples of a batch, t_i the teacher's images from the
    same x_T, T those of all pairs and y real images, the loss is

    .. math::
        \frac{1}{n(n-1)} \sum_{i \ne j} (k(x_i, x_j) - k(x_i, t_j) - k(t_i, x_j) + k(t_i, t_j))
        + \frac{2}{n} \sum_i (b_i(x_i) - b_i(t_i)) + c

    with b_i(x) the mean of k(x, T) over all pairs but that of i less the mean of k(x, y), and c the KID of T. Its mean
    over batches is the KID of the samples of all pairs, its noise the less the nearer sampler and teacher are.

    Args:
        kernel: `cubic` or `linear`.
        real: `bank` or `batch`.
        standardize: each feature for itself.
        control_variate: subtract the chance of a batch that the teacher's images show; needs a teacher.

    Raises:
        ValueError: an unknown kernel or choice of real features, or a control variate without the bank.
    """

    name = "kid"
    shift: Tensor
    scale: Tensor
    bank: Tensor
    teacher: Tensor

    def __init__(
        self,
        kernel: Kernel = "cubic",
        real: Literal["bank", "batch"] = "bank",
        standardize: bool = False,
        control_variate: bool = False,
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"Unknown kernel '{kernel}'; choose one of {', '.join(KERNELS)}.")
        if real not in ("bank", "batch"):
            raise ValueError(f"real must be 'bank' or 'batch', got '{real}'.")
        if control_variate and real == "batch":
            raise ValueError("A control variate is for all real features; set real='bank'.")
        self.kernel: Kernel = kernel
        self.real = real
        self.standardize = standardize
        self.control_variate = control_variate
        besides = {"real"} if real == "batch" else {"target_features"} if control_variate else set()
        self.needs = frozenset({"features", *besides})
        self.real_term = self.teacher_term = 0.0
        empty = {"bank": torch.empty(0), "teacher": torch.empty(0)}
        for name, value in {"shift": torch.zeros(1), "scale": torch.ones(1), **empty}.items():
            self.register_buffer(name, value, persistent=False)

    def fit_real(self, features: Tensor, encode_real: object = None) -> None:  # noqa: ARG002 - see the base class
        """Take the scale, the real-real term and (for `real="bank"`) the bank from features of shape (m, d).

        Raises:
            ValueError: fewer than two vectors, numbers that are not finite, or, to be standardised, none that differ.
        """
        rms = feature_scale(features, "KID")
        real = features.detach().double()
        if self.standardize:
            std = real.std(0)
            # Float32 features that are equal differ by rounding.
            varies = std > max(LEAST_SPREAD * float(std.square().mean().sqrt()), 1e-7 * rms)
            if not varies.any():
                raise ValueError(
                    f"The features of all {len(real)} real images are the same: there is nothing to compare with; look "
                    "at the images, or take another feature network."
                )
            # Divided by infinity a feature is 0, and so is its gradient.
            self.shift, self.scale = real.mean(0), torch.where(varies, std, torch.inf)
        else:
            self.shift, self.scale = real.new_zeros(1), real.new_full((1,), rms)
        scaled = self._scaled(real)
        # Minibatches of real features bring a term of their own.
        if self.real == "bank":
            self.real_term, self.bank = float(mean_within(scaled, self.kernel)), scaled.float()

    def fit_target(self, encode_target: Callable[[FeatureExtractor | None], Tensor]) -> None:
        """Take the teacher's features, where they are a control variate, and their KID.

        Raises:
            ValueError: fewer than two vectors, numbers that are not finite, or no real features before them.
        """
        if not self.control_variate:
            return
        if not len(self.bank):
            raise ValueError("KIDLoss has no real features: call `fit_real` first.")
        features = encode_target(None)
        if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
            raise ValueError(
                "A control variate needs finite features of at least two images of the teacher, got shape "
                f"{tuple(features.shape)}."
            )
        scaled = self._scaled(features.detach().double())
        self.teacher = scaled.float()
        across = kernel_sum(scaled, self.bank.to(scaled), self.kernel) / (len(scaled) * len(self.bank))
        self.teacher_term = float(mean_within(scaled, self.kernel) + self.real_term - 2 * across)

    def identity(self) -> str:
        """With what is not as by default."""
        found: list[str] = [] if self.kernel == "cubic" else [self.kernel]
        found += [] if self.real == "bank" else [f"real={self.real}"]
        found += [name for name in ("standardize", "control_variate") if getattr(self, name)]
        return f"{type(self).__name__}({', '.join(found)})" if found else type(self).__name__

    def forward(self, samples: Samples) -> Tensor:
        """KID of `samples.features` against the bank, or against `samples.real`.

        Raises:
            ValueError: no bank, or no real features; with a control variate, none of the teacher; fewer than two
                samples, or features of another length than the real ones.
        """
        generated = samples.gather(samples["features"])
        generated = generated.to(torch.promote_types(generated.dtype, torch.float32))
        if self.real == "batch":
            real = samples.gather(samples["real"])
            _check_samples(generated, real)
            return kid(self._scaled(generated), self._scaled(real.to(generated.dtype)), self.kernel)
        if not len(self.bank):
            raise ValueError("KIDLoss has no real features: call `fit_real` first.")
        _check_samples(generated, self.bank)
        scaled = self._scaled(generated)
        if self.control_variate:
            return self._controlled(
                scaled, self._scaled(samples.gather(samples["target_features"]).to(generated.dtype))
            )
        within = mean_off_diagonal(polynomial_kernel(scaled, scaled, self.kernel))
        across = polynomial_kernel(scaled, self.bank.to(scaled), self.kernel).mean()
        return within + self.real_term - 2 * across

    def _controlled(self, x: Tensor, t: Tensor) -> Tensor:
        if not len(self.teacher):
            raise ValueError("KIDLoss has no features of the teacher for its control variate: call `fit_target` first.")
        mixed, own = polynomial_kernel(x, t, self.kernel), polynomial_kernel(t, t, self.kernel)
        paired = mean_off_diagonal(polynomial_kernel(x, x, self.kernel) - mixed - mixed.T + own)
        return paired + 2 * (self._gap(x, mixed) - self._gap(t, own)) + self.teacher_term

    def _gap(self, x: Tensor, to_batch: Tensor) -> Tensor:
        """Mean over i of b_i(x_i), of x, shape (n, d), and k(x_i, t_j), shape (n, n)."""
        all_pairs = polynomial_kernel(x, self.teacher.to(x), self.kernel).sum(1)
        others = (all_pairs - to_batch.diagonal()) / (len(self.teacher) - 1)
        return others.mean() - polynomial_kernel(x, self.bank.to(x), self.kernel).mean()

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self.shift.to(features)) / self.scale.to(features)
