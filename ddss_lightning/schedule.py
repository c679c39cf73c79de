r"""The noise schedule that a pretrained denoiser was trained with.

q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), and everything is expressed by the half log-SNR
lambda_t = log(alpha_t / sigma_t), strictly decreasing in t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NoiseSchedule(nn.Module):
    r"""A variance preserving schedule with real-valued, differentiable time.

    The half log-SNRs of the `num_train_timesteps` trained timesteps 0, 1, ... are interpolated linearly in t, so that
    both t -> lambda and lambda -> t are differentiable almost everywhere and exact at the trained timesteps.
    All numbers are float64.

    Args:
        logsnrs: lambda_0, lambda_1, ..., shape (num_train_timesteps,), finite and strictly decreasing.

    Raises:
        ValueError: fewer than two values, values that are not finite, or not strictly decreasing.
    """

    table: Tensor

    def __init__(self, logsnrs: Tensor) -> None:
        super().__init__()
        logsnrs = logsnrs.detach().double().cpu()
        if logsnrs.ndim != 1 or len(logsnrs) < 2:
            raise ValueError(f"logsnrs must have shape (T,) with T >= 2, got {tuple(logsnrs.shape)}.")
        if not logsnrs.isfinite().all():
            raise ValueError(
                "The half log-SNRs must be finite. A schedule that ends with zero terminal SNR (alphas_cumprod = 0) "
                "has none there; use a scheduler without `rescale_betas_zero_snr`."
            )
        if not (logsnrs.diff() < 0).all():
            raise ValueError("The half log-SNRs must decrease strictly with the timestep: noise grows with t.")
        self.register_buffer("table", logsnrs, persistent=False)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:  # noqa: ANN401 - diffusers has no common base for this
        r"""Read the schedule of any diffusers scheduler that has `alphas_cumprod`.

        lambda_t = (log abar_t - log(1 - abar_t)) / 2 with abar = `alphas_cumprod`.

        Raises:
            ValueError: the scheduler has no `alphas_cumprod`, or they are not strictly between 0 and 1.
        """
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas_cumprod, Tensor):
            raise ValueError(
                f"{type(scheduler).__name__} has no `alphas_cumprod`; give a variance preserving scheduler such as "
                "diffusers' DDPMScheduler or DDIMScheduler."
            )
        alphas_cumprod = alphas_cumprod.double()
        return cls((alphas_cumprod.log() - torch.log1p(-alphas_cumprod)) / 2)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps that the network was trained with."""
        return len(self.table)

    def logsnr(self, timestep: Tensor) -> Tensor:
        """Half log-SNR lambda_t at real-valued t in [0, num_train_timesteps - 1]; constant outside."""
        timestep = timestep.double().clamp(0, self.num_train_timesteps - 1)
        left = timestep.detach().floor().long().clamp(max=self.num_train_timesteps - 2)
        return torch.lerp(self.table[left], self.table[left + 1], timestep - left)

    def timestep(self, logsnr: Tensor) -> Tensor:
        """The real-valued t in [0, num_train_timesteps - 1] with lambda_t = `logsnr`; constant outside the range."""
        logsnr = logsnr.double().clamp(float(self.table[-1]), float(self.table[0]))
        left = torch.searchsorted(-self.table, -logsnr.detach().contiguous(), right=True) - 1
        left = left.clamp(0, self.num_train_timesteps - 2)
        low, high = self.table[left], self.table[left + 1]
        return left + (logsnr - low) / (high - low)

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Marginal scales (alpha_t, sigma_t) at real-valued t."""
        return alpha_sigma_of_logsnr(self.logsnr(timestep))

    def matches(self, other: NoiseSchedule) -> bool:
        """Whether both are the same schedule: equal lengths, half log-SNRs equal to 0.01.

        Not to the last bit: diffusers computes `alphas_cumprod` in float32, differently on different processors.
        """
        return self.table.shape == other.table.shape and torch.allclose(self.table.cpu(), other.table.cpu(), 0, 1e-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        """Follow a module to another device, but stay float64 when it is cast."""
        exact = self.table
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.table = exact.to(self.table.device)
        return self


def alpha_sigma_of_logsnr(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    r"""Variance preserving scales alpha = sqrt(sigmoid(2 lambda)), sigma = sqrt(sigmoid(-2 lambda)), any shape.

    lambda = infinity is the clean image: (1, 0).
    """
    logsnr = logsnr.double()
    return torch.sigmoid(2 * logsnr).sqrt(), torch.exp(-torch.nn.functional.softplus(2 * logsnr) / 2)
