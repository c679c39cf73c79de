"""A denoiser in closed form: the exact answer for a known distribution, as an oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.schedule import NoiseSchedule


class MixtureDenoiser(Denoiser):
    r"""Exact noise prediction for a mixture of Gaussians N(m_i, s^2 I) of equal weight.

    .. math::
        p(x_t) \propto \sum_i N(x_t; \alpha_t m_i, (\alpha_t^2 s^2 + \sigma_t^2) I), \qquad
        eps(x_t, t) = \frac{\sigma_t}{\alpha_t^2 s^2 + \sigma_t^2} \left(x_t - \alpha_t \sum_i w_i(x_t) m_i\right)

    with w_i the posterior weights of the components. With one component per training image and a small s it is the
    perfect denoiser of that training set; with one component everything a linear sampler does is known in closed form.

    Args:
        means: m_i, shape (M, C, H, W).
        std: s, at least 0.
        schedule: any noise schedule.
    """

    means: Tensor
    std: Tensor

    def __init__(self, means: Tensor, std: float, schedule: NoiseSchedule) -> None:
        super().__init__()
        if not 0 <= std < float("inf"):
            raise ValueError(f"std must be a number of at least 0, got {std}.")
        self.register_buffer("means", means)
        # A buffer, so that it is part of the fingerprint.
        self.register_buffer("std", torch.tensor(float(std), dtype=torch.float64))
        self.schedule = schedule
        self.prediction_type = "epsilon"
        self.image_shape = (means.shape[1], means.shape[2], means.shape[3])
        self.name = f"mixture of {len(means)} Gaussians"
        self.freeze()

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The exact conditional mean of the noise, shape (N, C, H, W)."""
        alpha, sigma = (value.to(x_t)[:, None] for value in self.schedule.alpha_sigma(timestep))
        x, means = x_t.flatten(1), self.means.flatten(1).to(x_t)
        variance = alpha.square() * self.std.square().to(x_t) + sigma.square()
        # |x - alpha m|^2 without the term that all components share.
        logits = (alpha * (x @ means.T) - alpha.square() * means.square().sum(1) / 2) / variance
        mean = torch.softmax(logits, dim=1) @ means
        return (sigma / variance * (x - alpha * mean)).reshape(x_t.shape)
