"""The exact denoiser of the digits, for the sweep `recipes/sweeps/mixture.yaml`: a Gaussian around each image."""

from __future__ import annotations

from diffusers import DDPMScheduler

from ddss_lightning import MixtureDenoiser, NoiseSchedule
from ddss_lightning.data.digits import load_digits_tensors

STD = 0.05


def digits_mixture() -> MixtureDenoiser:
    """1797 Gaussians of standard deviation 0.05, linear betas."""
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))
    return MixtureDenoiser(load_digits_tensors()[0], STD, schedule)
