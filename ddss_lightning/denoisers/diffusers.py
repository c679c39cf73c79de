"""Pixel and latent models saved by the diffusers library, without conditions or with class labels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.files import not_here
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type

# Beside the folders `unet` and `scheduler` of a class-conditional model: {"null_label": ..., ...}.
CLASSES_NAME = "classes.json"
# Modes of `torch.compile` that record CUDA graphs: each call writes where the last one wrote.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class DiffusersDenoiser(Denoiser):
    r"""A diffusers `UNet2DModel` (or a network with the same call) and its schedule, frozen.

    A class-conditional network (`num_class_embeds`) that was trained with label dropout is shown its null label, so
    that it serves as an unconditional one; `with_labels` shows it others, with classifier-free guidance (Ho and
    Salimans 2022, eq. 6, with w the weight of the conditional output: 1 is no guidance)

    .. math:: output = output_{null} + w (output_{label} - output_{null})

    Of a network that predicts its variance too (Nichol and Dhariwal 2021: twice as many channels out as in) the first
    half is used: how much noise a step adds is the sampler's.

    A latent model's states are latents; `decode` makes images of them, x = decoder(z / scaling_factor + shift_factor).

    Args:
        unet: (sample, timestep) -> object with `.sample`, with `in_channels` and `sample_size` in `unet.config`.
        schedule: the noise schedule it was trained with.
        prediction_type: see `ddss_lightning.coefficients.prediction_pair`.
        name: where it came from.
        null_label: the label that stands for none, of a network with classes; None for a network without.
        vae: decoder of a latent model: a diffusers `VQModel` or `AutoencoderKL`.

    Raises:
        ValueError: a network whose output has neither the channels of its input nor twice as many; a null label that
            the network does not have, or none for a network with classes.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        name: str = "unet",
        null_label: int | None = None,
        vae: nn.Module | None = None,
    ) -> None:
        super().__init__()
        config: Any = unet.config
        num_labels = config.get("num_class_embeds") or 0
        if num_labels and null_label is None:
            raise ValueError(
                f"The network has {num_labels} classes; give the null_label (--denoiser.null_label) that it was "
                "trained with for images of any class. Networks that were trained without one are not supported."
            )
        if null_label is not None and not 0 <= null_label < num_labels:
            raise ValueError(f"null_label must be one of the network's {num_labels} labels, got {null_label}.")
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"The network maps {config.in_channels} channels to {config.out_channels}; it must be to as many, or, "
                "with a learned variance, to twice as many. Models with conditioning channels are not supported."
            )
        size = config.sample_size
        if not size:
            raise ValueError("The network's configuration does not say its sample_size; set it to the images' height.")
        height, width = (size, size) if isinstance(size, int) else size
        self.unet = unet.to(memory_format=torch.channels_last)
        self.schedule = schedule
        self.prediction_type = prediction_type
        self._state_shape = (config.in_channels, height, width)
        self.vae = vae
        self.image_shape = self._state_shape if vae is None else _decoded_shape(vae, self._state_shape)
        self.name = name
        self.num_labels, self.null_label = num_labels, null_label
        self.labels: Tensor | None = None
        self.guidance_scale = 1.0
        self.compile_mode: str | None = None
        self.overwrites_outputs = False
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, pretrained_path: str, null_label: int | None = None, compile_mode: str | None = None, **kwargs: str
    ) -> DiffusersDenoiser:
        """Load the network and the schedule of a diffusers pipeline folder, or of a model on the Hugging Face hub.

        The pipeline's `unet` and `scheduler` folders are read, or, as in the oldest models of the hub such as
        `google/ddpm-cifar10-32`, both from the top of the repository.

        Args:
            pretrained_path: a local folder, or a hub name `owner/model`.
            null_label: of a network with classes; default: that in `classes.json` of a local folder.
            compile_mode: compile the network with `torch.compile` in this mode: `default`,
                `max-autotune-no-cudagraphs`, or with CUDA graphs `reduce-overhead` or `max-autotune`, whose outputs are
                copied, for the next call overwrites them; None: not. Times are tensors: a step with other times is not
                compiled again.
            **kwargs: passed to diffusers, such as `revision` or `cache_dir`.

        Raises:
            ValueError: nothing there, a damaged folder, a network that is not a `UNet2DModel` without conditions or
                with class labels and a null label, a scheduler of an unknown noise schedule, or an unknown mode.
        """
        folder = Path(pretrained_path)
        if not folder.is_dir() and (folder.parent.is_dir() or pretrained_path.count("/") != 1):
            raise ValueError(
                f"No diffusion model in '{pretrained_path}': {not_here()}. Give a folder written by a diffusers "
                "pipeline's `save_pretrained`, such as 'checkpoints/digits-ddpm', or a hub name owner/model."
            )
        modes = ("default", "max-autotune-no-cudagraphs", *CUDA_GRAPHS)
        if compile_mode is not None and compile_mode not in modes:
            raise ValueError(f"Unknown compile_mode '{compile_mode}'; choose one of {', '.join(modes)}, or none.")
        try:
            unet, scheduler, vae = _load_parts(pretrained_path, kwargs)
            if null_label is None and (folder / CLASSES_NAME).is_file():
                null_label = int(json.loads((folder / CLASSES_NAME).read_text())["null_label"])
        except Exception as error:  # diffusers, safetensors, json and the hub each raise their own
            reason = " ".join(str(error).split()) or type(error).__name__
            asked = "" if folder.is_dir() else f" (The hub was asked, for {not_here()}.)"
            raise ValueError(
                f"The diffusion model in '{pretrained_path}' could not be loaded: {reason}{asked}"
            ) from error
        schedule = NoiseSchedule.from_scheduler(scheduler)
        if compile_mode is not None:
            unet.compile(mode=compile_mode)
        denoiser = cls(unet, schedule, scheduler_prediction_type(scheduler), pretrained_path, null_label, vae)
        denoiser.compile_mode, denoiser.overwrites_outputs = compile_mode, compile_mode in CUDA_GRAPHS
        return denoiser

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of x_t."""
        return self._state_shape

    def settings(self) -> dict[str, Any]:
        """The null label of a network with classes; scale and shift of a latent model's states."""
        found = {} if self.null_label is None else {"null_label": self.null_label}
        if self.vae is None:
            return found
        config: Any = self.vae.config
        return {**found, "scaling_factor": config.scaling_factor, "shift_factor": config.get("shift_factor") or 0.0}

    def decode(self, x_0: Tensor) -> Tensor:
        """Images of last states."""
        if self.vae is None:
            return x_0
        vae: Any = self.vae
        shift = vae.config.get("shift_factor") or 0.0
        images: Tensor = vae.decode(x_0 / vae.config.scaling_factor + shift, return_dict=False)[0]
        # Under autocast the decoder answers in half precision, which has no 256 levels to round to.
        return images.to(x_0.dtype)

    def with_labels(self, labels: Tensor, guidance_scale: float = 1.0) -> DiffusersDenoiser:
        """The same frozen network for images of given classes; nothing is copied.

        A call then costs one evaluation of the network at a guidance scale of 0 or 1, else two.

        Args:
            labels: of the images in every batch, in order, integers, shape (N,).
            guidance_scale: w; 0 is unconditional, 1 conditional, more than 1 guided.

        Raises:
            ValueError: a network without classes, labels of another shape or that it does not have.
        """
        if not self.num_labels:
            raise ValueError(f"The model '{self.name}' has no classes, so it cannot be given labels.")
        if labels.ndim != 1 or labels.is_floating_point() or not ((labels >= 0) & (labels < self.num_labels)).all():
            raise ValueError(
                f"labels must be integers from 0 to {self.num_labels - 1}, shape (N,), got {labels.dtype} of shape "
                f"{tuple(labels.shape)} from {labels.min()} to {labels.max()}."
            )
        conditioned = copy.copy(self)
        conditioned.labels, conditioned.guidance_scale = labels, guidance_scale
        return conditioned

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Output of the network at real-valued timesteps, shape (N, C, H, W).

        Raises:
            ValueError: the images have another shape than the model's, or are not as many as the labels given.
        """
        if tuple(x_t.shape[1:]) != self.state_shape:
            raise ValueError(
                f"The model '{self.name}' works on images of shape {self.state_shape} (channels, height, width), "
                f"got {tuple(x_t.shape[1:])}."
            )
        if self.labels is None or self.guidance_scale == 0:
            return self._call(x_t, timestep, None)
        if len(self.labels) != len(x_t):
            raise ValueError(f"{len(self.labels)} labels were given for a batch of {len(x_t)} images.")
        labels = self.labels.to(x_t.device)
        if self.guidance_scale == 1:
            return self._call(x_t, timestep, labels)
        both = torch.cat([labels, torch.full_like(labels, self.null_label or 0)])
        given, null = self._call(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), both).chunk(2)
        return null + self.guidance_scale * (given - null)

    def _call(self, x_t: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        if self.null_label is not None and labels is None:
            labels = torch.full((len(x_t),), self.null_label, device=x_t.device)
        conditions = {} if labels is None else {"class_labels": labels}
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        output: Tensor = self.unet(x_t, timestep, return_dict=False, **conditions)[0]
        output = output[:, : x_t.shape[1]]
        return output.clone() if self.overwrites_outputs else output


def _decoded_shape(vae: nn.Module, state_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of the images that a decoder makes: each of its levels but one doubles height and width."""
    config: Any = vae.config
    _, height, width = state_shape
    factor = 2 ** (len(config.block_out_channels) - 1)
    return (config.out_channels, height * factor, width * factor)


def _read_config(base: Any, path: str, subfolder: str = "", **kwargs: str) -> dict[str, Any] | None:  # noqa: ANN401
    """A configuration file, as `base` names it, of a local folder or of a model on the hub; None if it has none.

    Raises:
        OSError: it is damaged, or the hub did not say whether there is one: no connection, no access, a fault there.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = f"{subfolder}/{base.config_name}" if subfolder else base.config_name
    if Path(path).is_dir() and not Path(path, name).is_file():
        return None
    try:
        config: dict[str, Any] = base.load_config(path, subfolder=subfolder or None, **kwargs)
    except OSError as error:
        # The texts of diffusers say of most causes that there is no such file.
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, LocalEntryNotFoundError):
            where = {option: kwargs[option] for option in ("cache_dir", "revision") if option in kwargs}
            if try_to_load_from_cache(path, name, **where) is _CACHED_NO_EXIST:
                return None
        elif isinstance(cause, EntryNotFoundError):
            return None
        raise OSError(f"'{name}' could not be read: {cause}") from error
    return config


def _load_parts(path: str, kwargs: dict[str, str]) -> tuple[nn.Module, Any, nn.Module | None]:
    """The network, the scheduler by the class that its configuration names, and the decoder of a latent model."""
    import diffusers

    def config_of(subfolder: str, base: Any) -> tuple[dict[str, Any], dict[str, str]]:  # noqa: ANN401
        problem: OSError | None = None
        for where in ({"subfolder": subfolder, **kwargs}, kwargs):
            try:
                config = _read_config(base, path, **where)
            except OSError as error:
                # Of a hub out of reach, the other one may be in the cache.
                problem = problem or error
            else:
                if config is not None:
                    return config, where
        raise problem or OSError(f"it has no '{base.config_name}', neither in '{subfolder}' nor at the top")

    unet_config, where = config_of("unet", diffusers.UNet2DModel)
    name = unet_config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel" or unet_config.get("class_embed_type"):
        raise ValueError(
            f"its network is a {name} with conditions; only a UNet2DModel without, or with class labels, is supported."
        )
    # Loading in one go needs no further package (accelerate) and no warning of its absence.
    unet: nn.Module = diffusers.UNet2DModel.from_pretrained(path, low_cpu_mem_usage=False, **where)
    scheduler_config, where = config_of("scheduler", diffusers.DDPMScheduler)
    scheduler_class = _scheduler_class(scheduler_config.get("_class_name", "DDPMScheduler"))
    return unet, scheduler_class.from_pretrained(path, **where), _load_decoder(path, kwargs)


def _scheduler_class(name: str) -> Any:  # noqa: ANN401 - diffusers has no common base for this
    """A scheduler's class by its name.

    Raises:
        ValueError: it is none of diffusers': which noise schedule the network was trained with is not known then.
    """
    import diffusers

    if name == "GGDMScheduler":
        from ddss_lightning.scheduler import GGDMScheduler

        return GGDMScheduler
    # What the oldest models call DDPMScheduler.
    found = getattr(diffusers, name.replace("GaussianDDPM", "DDPM"), None)
    if found is None:
        raise ValueError(
            f"its scheduler is a {name}, which diffusers does not have, so that its noise schedule is not known; put "
            "the configuration of one with the same betas there, such as a DDPMScheduler with `trained_betas`"
        )
    return found


def _load_decoder(path: str, kwargs: dict[str, str]) -> nn.Module | None:
    """The first-stage model that the pipeline's `model_index.json` names, if any."""
    import diffusers

    # Without the file: a network and a scheduler without a pipeline.
    index = _read_config(diffusers.DiffusionPipeline, path, **kwargs) or {}
    for part in ("vqvae", "vae"):
        if index.get(part, (None, None))[1] is not None:
            decoder: nn.Module = getattr(diffusers, index[part][1]).from_pretrained(
                path, subfolder=part, low_cpu_mem_usage=False, **kwargs
            )
            return decoder
    return None
