"""Networks to measure with. Time and memory depend on the architecture: weights are random, but for the digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddss_lightning.denoisers import Denoiser, DiffusersDenoiser
from ddss_lightning.schedule import NoiseSchedule


def digits() -> Denoiser:
    """The shipped model, 8x8, 0.7 M parameters."""
    return DiffusersDenoiser.from_pretrained("checkpoints/digits-ddpm")


def _random(**config: Any) -> Denoiser:  # noqa: ANN401
    torch.manual_seed(0)
    unet = UNet2DModel(
        layers_per_block=2, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        attention_head_dim=None, **config,
    )  # fmt: skip
    return DiffusersDenoiser(unet, NoiseSchedule.from_scheduler(DDPMScheduler(1000)))


def cifar10() -> Denoiser:
    """The architecture of google/ddpm-cifar10-32, 35.7 M parameters."""
    return _random(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def church128() -> Denoiser:
    """The architecture of google/ddpm-church-256 on images of 128 pixels, 113.7 M parameters."""
    return _random(
        sample_size=128,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    )


NETWORKS: dict[str, Callable[[], Denoiser]] = {"digits": digits, "cifar10": cifar10, "church128": church128}
