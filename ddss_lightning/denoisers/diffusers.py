"""Unconditional pixel models saved by the diffusers library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type


class DiffusersDenoiser(Denoiser):
    """A diffusers `UNet2DModel` (or a network with the same call) and its schedule, frozen.

    Args:
        unet: (sample, timestep) -> object with `.sample`, with `in_channels` and `sample_size` in `unet.config`.
        schedule: the noise schedule it was trained with.
        prediction_type: see `ddss_lightning.coefficients.prediction_pair`.
        name: where it came from.

    Raises:
        ValueError: a network whose output has more channels than its input (a learned variance).
    """

    def __init__(
        self, unet: nn.Module, schedule: NoiseSchedule, prediction_type: str = "epsilon", name: str = "unet"
    ) -> None:
        super().__init__()
        config: Any = unet.config
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"The network maps {config.in_channels} channels to {config.out_channels}; models with a learned "
                "variance or conditioning channels are not supported."
            )
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.unet = unet.to(memory_format=torch.channels_last)
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.image_shape = (config.in_channels, height, width)
        self.name = name
        self.freeze()

    @classmethod
    def from_pretrained(cls, pretrained_path: str, **kwargs: str) -> DiffusersDenoiser:
        """Load the network and the schedule of a diffusers pipeline folder, or of a model on the Hugging Face hub.

        The pipeline's `unet` and `scheduler` folders are read, or, as in the oldest models of the hub such as
        `google/ddpm-cifar10-32`, both from the top of the repository.

        Args:
            pretrained_path: a local folder, or a hub name `owner/model`.
            **kwargs: passed to diffusers, such as `revision` or `cache_dir`.

        Raises:
            ValueError: nothing there, a damaged folder, a network that is not an unconditional `UNet2DModel`, or a
                scheduler of an unknown noise schedule.
        """
        folder = Path(pretrained_path)
        if not folder.is_dir() and (folder.parent.is_dir() or pretrained_path.count("/") != 1):
            raise ValueError(
                f"No diffusion model in '{pretrained_path}': there is no such folder. Give a folder written by a "
                "diffusers pipeline's `save_pretrained`, such as 'checkpoints/digits-ddpm', or a hub name owner/model."
            )
        try:
            unet, scheduler = _load_parts(pretrained_path, kwargs)
        except Exception as error:  # diffusers, safetensors, json and the hub each raise their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"The diffusion model in '{pretrained_path}' could not be loaded: {reason}") from error
        schedule = NoiseSchedule.from_scheduler(scheduler)
        return cls(unet, schedule, scheduler_prediction_type(scheduler), name=pretrained_path)

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Output of the network at real-valued timesteps, shape (N, C, H, W).

        Raises:
            ValueError: the images have another shape than the model's.
        """
        if tuple(x_t.shape[1:]) != self.image_shape:
            raise ValueError(
                f"The model '{self.name}' works on images of shape {self.image_shape} (channels, height, width), "
                f"got {tuple(x_t.shape[1:])}."
            )
        output: Tensor = self.unet(x_t.contiguous(memory_format=torch.channels_last), timestep, return_dict=False)[0]
        return output


def _load_parts(path: str, kwargs: dict[str, str]) -> tuple[nn.Module, Any]:
    """The network, and the scheduler by the class that its configuration names."""
    import diffusers

    def config_of(subfolder: str, base: Any) -> tuple[dict[str, Any], dict[str, str]]:  # noqa: ANN401
        try:
            return base.load_config(path, subfolder=subfolder, **kwargs), {"subfolder": subfolder, **kwargs}
        except OSError:
            return base.load_config(path, **kwargs), dict(kwargs)

    unet_config, where = config_of("unet", diffusers.UNet2DModel)
    name = unet_config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel" or unet_config.get("class_embed_type") or unet_config.get("num_class_embeds"):
        raise ValueError(f"its network is a {name} with conditions; only an unconditional UNet2DModel is supported.")
    # Loading in one go needs no further package (accelerate) and no warning of its absence.
    unet: nn.Module = diffusers.UNet2DModel.from_pretrained(path, low_cpu_mem_usage=False, **where)
    scheduler_config, where = config_of("scheduler", diffusers.DDPMScheduler)
    # `GaussianDDPMScheduler` is what the oldest models call DDPMScheduler.
    scheduler_class = getattr(diffusers, scheduler_config.get("_class_name", ""), diffusers.DDPMScheduler)
    return unet, scheduler_class.from_pretrained(path, **where)
