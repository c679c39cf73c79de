"""The Frechet distance as a loss, from running moments."""

from __future__ import annotations

import torch
from torch import Tensor

from ddss_lightning.losses.base import SampleLoss, Samples, feature_scale

DECAY = 0.9


class FrechetLoss(SampleLoss):
    r"""Frechet distance of running moments of generated features to the real ones; over all processes.

    With features divided by the root mean square of the real ones, as in `KIDLoss`, batch means \hat m, \hat S of x
    and x x^T, and decay b, after step t

    .. math::
        m_t = b\, m_{t-1} + (1 - b)\, \hat m_t, \quad S_t = b\, S_{t-1} + (1 - b)\, \hat S_t, \quad
        C_t = \frac{S_t - m_t m_t^T}{1 - q_t}, \quad L = |m_t - m_r|^2 + \mathrm{tr}(C_t + C_r - 2 (A C_t A)^{1/2})

    where A = C_r^{1/2}, and q_t, the sum of the squared weights of all samples so far, makes C_t unbiased for a sampler
    at rest: with b = 0 L is the FID of the batch, n / (n - 1) and all. The first step has b = 0.

    The gradient flows through the current batch alone, and as if it were the whole: dL/d(m, C) at the running moments,
    times the derivative of the batch's. Without the factor 1 - b, so that b changes noise and lag, not the size of the
    gradient. The trace is a sum over eigenvalues; those that are rounding errors of zero (batches smaller than d) are
    left out, value and gradient, which is the subgradient of least norm. All in float64.

    Args:
        decay: b, at least 0 and below 1: the moments remember about 1 / (1 - b) steps.

    Raises:
        ValueError: a decay outside its range.

    References:
        Heusel et al., 2017, https://arxiv.org/abs/1706.08500, eq. 6. The running moments' gradient is ours.
    """

    name = "frechet"
    has_memory = True

    def __init__(self, decay: float = DECAY) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        self.decay = decay
        self.scale = 1.0
        self._real: tuple[Tensor, Tensor, Tensor] | None = None
        # Not buffers: a Trainer would cast them to the precision of the network.
        self._memory: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def fit_real(self, features: Tensor, encode_real: object = None) -> None:  # noqa: ARG002 - see the base class
        """Take the moments of real features, shape (m, d).

        Raises:
            ValueError: fewer than two vectors, numbers that are not finite, or another d than that of a checkpoint.
        """
        self.scale = feature_scale(features, "FrechetLoss")
        if self._memory and len(self._memory["mean"]) != features.shape[1]:
            raise ValueError(
                f"The checkpoint's running moments are of {len(self._memory['mean'])} features, the feature network "
                f"has {features.shape[1]}; resume with the network that the fit was started with."
            )
        real = features.detach().double() / self.scale
        cov = torch.cov(real.T).reshape(real.shape[1], real.shape[1])
        eigenvalues, vectors = torch.linalg.eigh(cov)
        root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
        self._real = (real.mean(0), cov, root)

    def forward(self, samples: Samples) -> Tensor:
        """The distance; NaN where a feature is not finite.

        Raises:
            ValueError: `fit_real` was not called; one vector, or none.
        """
        if self._real is None:
            raise ValueError("FrechetLoss has no real features: call `fit_real` first.")
        x = samples.gather(samples["features"]).double() / self.scale
        if len(x) < 2:
            raise ValueError(f"FrechetLoss needs at least two generated feature vectors, got {len(x)}.")
        mean, second, squared_weights = self._running(x.mean(0), x.T @ x / len(x), 1 / len(x))
        mean_real, cov_real, root = self._real
        cov = (second - mean.outer(mean)) / (1 - squared_weights)
        # Eigenvalues of infinity are an error; a NaN is a skipped step.
        if not cov.isfinite().all():
            return x.sum() * torch.nan
        eigenvalues = torch.linalg.eigvalsh(root @ cov @ root)
        floor = len(cov) * torch.finfo(cov.dtype).eps * eigenvalues.detach().abs().max()
        trace = eigenvalues[eigenvalues.detach() > floor].sqrt().sum()
        distance: Tensor = (mean - mean_real).square().sum() + cov.trace() + cov_real.trace() - 2 * trace
        return distance

    def _running(self, mean: Tensor, second: Tensor, squared_weights: float) -> tuple[Tensor, Tensor, Tensor]:
        """Running values, with the gradients of the batch's."""
        batch = {"mean": mean, "second": second, "squared_weights": mean.new_tensor(squared_weights)}
        self._next = {}
        for name, value in batch.items():
            before = self._memory.get(name)
            b = self.decay if before is not None else 0.0
            rest = 0.0 if before is None else before.to(value)
            # Weights are squared where they are summed squared.
            old, new = (b * b, (1 - b) ** 2) if name == "squared_weights" else (b, 1 - b)
            self._next[name] = old * rest + new * value.detach()
        return tuple(self._next[name] + (value - value.detach()) for name, value in batch.items())  # type: ignore[return-value]

    def advance(self) -> None:
        """The moments of the last `forward` become those that the next step starts from."""
        self._memory = self._next or self._memory

    def identity(self) -> str:
        """With a decay that is not the default."""
        return type(self).__name__ if self.decay == DECAY else f"{type(self).__name__}(decay={self.decay:g})"

    def memory(self) -> dict[str, Tensor]:
        """`mean`, shape (d,), `second`, shape (d, d), `squared_weights`: q."""
        return dict(self._memory)

    def restore(self, memory: dict[str, Tensor]) -> None:
        """Go on from these moments; none: start afresh."""
        self._memory = dict(memory)
