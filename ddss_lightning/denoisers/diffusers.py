"""Pixel and latent models saved by the diffusers library, without conditions or with class labels."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.denoisers.calls import Conditions, sizes_of, type_of
from ddss_lightning.denoisers.pipelines import check_path, decoder_factor, load_parts, loading
from ddss_lightning.noise import take_turns
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type


class NoNullLabelError(ValueError):
    """A network with classes, and neither a label that stands for none nor a guidance scale of 1."""


# Beside the folders `unet` and `scheduler` of a class-conditional model: {"null_label": ..., ...}.
CLASSES_NAME = "classes.json"
# Modes of `torch.compile` that record CUDA graphs: each call writes where the last one wrote.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
Weights = Literal["float32", "bfloat16"]
MODES = ("default", "max-autotune-no-cudagraphs", *CUDA_GRAPHS)


def read_null_label(path: Path) -> int:
    """Of the `classes.json` of a model.

    Raises:
        ValueError: the file is another.
    """
    try:
        return int(json.loads(path.read_text())["null_label"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"'{path}' must hold {{\"null_label\": N}}, N the label that stands for no class; mend it, delete it, or "
            "give null_label=N (--denoiser.null_label=N)"
        ) from error


class DiffusersDenoiser(Denoiser):
    r"""A diffusers `UNet2DModel` or DiT (or a network with the same call) and its schedule, frozen.

    A class-conditional network that was trained with label dropout is shown its null label, so that it serves as an
    unconditional one, or, with a `guidance_scale` w, the classes in turn (see `for_samples`), with classifier-free
    guidance (Ho and Salimans 2022, eq. 6, with w the weight of the conditional output: 1 is no guidance)

    .. math:: output = output_{null} + w (output_{label} - output_{null})

    which takes two evaluations of the network where w is neither 0 nor 1. `with_labels` shows it chosen classes.

    Of a network that predicts its variance too (Nichol and Dhariwal 2021: twice as many channels out as in) the first
    half is used: how much noise a step adds is the sampler's.

    A latent model's states are latents; `decode` makes images of them, x = decoder(z s / scaling_factor + m), with the
    decoder's `latents_std` and `latents_mean`, or 1 and its `shift_factor`.

    Args:
        unet: (sample, timestep) -> object with `.sample`, with `in_channels` and `sample_size` in `unet.config`.
        schedule: the noise schedule it was trained with.
        prediction_type: see `ddss_lightning.coefficients.prediction_pair`.
        name: where it came from.
        null_label: the label that stands for none, of a network with classes; None for a network without, or that was
            trained without one; that of a DiT is known.
        vae: decoder of a latent model: a diffusers `VQModel` or `AutoencoderKL`.
        guidance_scale: w, for images of all classes in equal numbers; None: of a network with classes the null label.

    Raises:
        ValueError: a network whose output has neither the channels of its input nor twice as many, that looks its times
            up in a table, or has weights in float16; a null label that the network does not have, or none where one is
            needed; a guidance scale without classes or below 0.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        name: str = "unet",
        null_label: int | None = None,
        vae: nn.Module | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        config: Any = unet.config
        in_channels, out_channels, size = sizes_of(unet)
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"The network maps {in_channels} channels to {out_channels}; it must be to as many, or, "
                "with a learned variance, to twice as many. Models with conditioning channels are not supported."
            )
        if config.get("time_embedding_type") == "learned":
            raise ValueError(
                "The network looks its times up in a table (time_embedding_type 'learned'), the times of a sampler are "
                "real-valued; wrap it in a subclass of ddss_lightning.Denoiser that rounds them, and learn neither "
                "`time` nor `logsnr`."
            )
        if not size:
            raise ValueError("The network's configuration does not say its sample_size; set it to the images' height.")
        if any(parameter.dtype == torch.float16 for parameter in unet.parameters()):
            raise ValueError(
                f"The network of '{name}' has weights in float16, in which small gradients are lost; load it in "
                "bfloat16 or float32."
            )
        height, width = (size, size) if isinstance(size, int) else size
        self.unet = unet.to(memory_format=torch.channels_last)
        self.schedule = schedule
        self.prediction_type = prediction_type
        self._state_shape = (in_channels, height, width)
        self.vae = vae
        self.image_shape = self._state_shape if vae is None else _decoded_shape(vae, self._state_shape)
        self.name = name
        self.num_labels, self.null_label = _labels_of(config, null_label)
        self.guidance_scale = guidance_scale
        self.num_classes = self.num_labels - (self.null_label is not None)
        self._check_guidance(self.num_classes, has_null=self.null_label is not None)
        # Of the images of a batch, in order.
        self.shown: Conditions | None = None
        self.compile_mode: str | None = None
        self.overwrites_outputs = False
        self.freeze()

    def _check_guidance(self, num_conditions: int, *, has_null: bool) -> None:
        scale = self.guidance_scale
        if scale is not None and not num_conditions:
            raise ValueError(
                f"The model '{self.name}' has no classes, so there is nothing to guide it to; leave guidance_scale out."
            )
        if scale is not None and not 0 <= scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0, got {scale}.")
        if num_conditions and not has_null and scale != 1:
            raise NoNullLabelError(
                f"The network has {num_conditions} classes; give the null_label (--denoiser.null_label) that it was "
                "trained with for images of any class, or, if it was trained without one, guidance_scale=1."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: str,
        null_label: int | None = None,
        compile_mode: str | None = None,
        guidance_scale: float | None = None,
        weights: Weights = "float32",
        **kwargs: str,
    ) -> DiffusersDenoiser:
        """Load the network and the schedule of a diffusers pipeline folder, or of a model on the Hugging Face hub.

        The pipeline's `unet` (of a DiT: `transformer`) and `scheduler` folders are read, or, as in the oldest models of
        the hub such as `google/ddpm-cifar10-32`, both from the top of the repository.

        Args:
            pretrained_path: a local folder, or a hub name `owner/model`.
            null_label: of a network with classes; default: that in `classes.json` of a local folder.
            compile_mode: compile the network with `torch.compile` in this mode: `default`,
                `max-autotune-no-cudagraphs`, or with CUDA graphs `reduce-overhead` or `max-autotune`, whose outputs are
                copied, for the next call overwrites them; None: not. Times are tensors: a step with other times is not
                compiled again.
            guidance_scale: see the class.
            weights: `bfloat16`: the network is held and evaluated in half precision, all else, such as the states of a
                chain, in float32. Half the memory of the network, and none for the copies that a Trainer of
                `bf16-mixed` makes for each call that is kept. It counts as another model than that in float32.
            **kwargs: passed to diffusers, such as `revision` or `cache_dir`.

        Raises:
            ValueError: nothing there, a damaged folder, a network that is not a `UNet2DModel` without conditions or
                with class labels, nor a DiT, a scheduler of an unknown noise schedule, an unknown mode or precision of
                the weights; and as the constructor.
        """
        pretrained_path = check_path(pretrained_path, kwargs)
        check_mode(compile_mode)
        dtype = dtype_of(weights)
        classes = Path(pretrained_path) / CLASSES_NAME
        if null_label is None and classes.is_file():
            null_label = read_null_label(classes)
        with loading(pretrained_path):
            unet, scheduler, vae = load_parts(pretrained_path, kwargs, dtype)
        denoiser = cls(
            unet,
            NoiseSchedule.from_scheduler(scheduler),
            scheduler_prediction_type(scheduler),
            pretrained_path,
            null_label,
            vae,
            guidance_scale,
        )
        return denoiser.compiled(compile_mode)

    def compiled(self, mode: str | None) -> DiffusersDenoiser:
        """Compile the network in place, see `from_pretrained`; returns `self`."""
        if mode is not None:
            self.unet.compile(mode=mode)
        self.compile_mode, self.overwrites_outputs = mode, mode in CUDA_GRAPHS
        return self

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of x_t."""
        return self._state_shape

    @property
    def evaluations_per_call(self) -> int:
        """Two with guidance, else one."""
        return 1 if self.guidance_scale in (None, 0, 1) else 2

    def settings(self) -> dict[str, Any]:
        """Null label and guidance scale of a network with classes; how the states of a latent model are scaled."""
        found: dict[str, Any] = {} if self.null_label is None else {"null_label": self.null_label}
        if self.guidance_scale is not None:
            found["guidance_scale"] = self.guidance_scale
        if self.vae is None:
            return found
        config: Any = self.vae.config
        found |= {"scaling_factor": config.scaling_factor, "shift_factor": config.get("shift_factor") or 0.0}
        return {**found, **({"latents": _latent_moments(config)} if _latent_moments(config) else {})}

    def decode(self, x_0: Tensor) -> Tensor:
        """Images of last states."""
        if self.vae is None:
            return x_0
        vae: Any = self.vae
        mean: Any = vae.config.get("shift_factor") or 0.0
        std: Any = 1.0
        if moments := _latent_moments(vae.config):
            mean, std = (x_0.new_tensor(value).view(1, -1, 1, 1) for value in moments)
        images: Tensor = vae.decode(x_0 * std / vae.config.scaling_factor + mean, return_dict=False)[0]
        # Under autocast the decoder answers in half precision, which has no 256 levels to round to.
        return images.to(x_0.dtype)

    # --------------------------------------------------------------------------------------------------- conditions

    def for_samples(self, key: str, indices: Sequence[int]) -> DiffusersDenoiser:
        """The same frozen network with the condition of each of these samples; nothing is copied.

        With a `guidance_scale` the conditions take turns over the indices, in an order that is a function of the key
        (in a training step the indices are random, and the conditions independent, see `independent_indices`);
        without one, it is this denoiser.
        """
        if self.guidance_scale is None:
            return self
        which = take_turns(key, indices, self.num_conditions)
        return self._showing(self._conditions(which), self.guidance_scale)

    def unguided(self) -> DiffusersDenoiser:
        """The same frozen network, shown no condition; nothing is copied.

        Raises:
            ValueError: a network of classes without a null label.
        """
        return self._showing(None, None)

    def with_labels(self, labels: Tensor | Sequence[int], guidance_scale: float = 1.0) -> DiffusersDenoiser:
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
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or not ((labels >= 0) & (labels < self.num_labels)).all():
            raise ValueError(
                f"labels must be integers from 0 to {self.num_labels - 1}, shape (N,), got {labels.dtype} of shape "
                f"{tuple(labels.shape)} from {labels.min()} to {labels.max()}."
            )
        return self._showing({"class_labels": labels}, guidance_scale)

    @property
    def num_conditions(self) -> int:
        """How many there are to take turns: the classes, without the null label."""
        return self.num_classes

    def _conditions(self, which: Tensor) -> Conditions:
        """The conditions of these numbers, 0 to num_conditions - 1, shape (N,)."""
        # The null label need not be the last one.
        skipped = self.num_labels if self.null_label is None else self.null_label
        return {"class_labels": which + (which >= skipped).long()}

    def _nothing(self, x_t: Tensor) -> Conditions:
        """What stands for no condition, for each of these states; nothing, where the network has no null label."""
        if self.null_label is None:
            return {}
        return {"class_labels": torch.full((len(x_t),), self.null_label, device=x_t.device)}

    def _showing(self, shown: Conditions | None, guidance_scale: float | None) -> DiffusersDenoiser:
        conditioned = copy.copy(self)
        conditioned.shown, conditioned.guidance_scale = shown, guidance_scale
        conditioned._check_guidance(self.num_conditions, has_null=bool(self._nothing(torch.empty(1))))
        return conditioned

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Output of the network at real-valued timesteps, shape (N, C, H, W).

        Raises:
            ValueError: the images have another shape than the model's, or are not as many as the conditions; it is not
                said which conditions are to be shown.
        """
        if tuple(x_t.shape[1:]) != self.state_shape:
            raise ValueError(
                f"The model '{self.name}' works on images of shape {self.state_shape} (channels, height, width), "
                f"got {tuple(x_t.shape[1:])}."
            )
        nothing, scale = self._nothing(x_t), self.guidance_scale
        if self.shown is None and scale is not None:
            raise ValueError(
                f"The model '{self.name}' is to show conditions: call what `for_samples(key, indices)` returns, which "
                "shows those of these samples."
            )
        if self.shown is None or scale is None or scale == 0:
            return self._call(x_t, timestep, nothing)
        shown = {name: rows.to(x_t.device, type_of(rows, x_t)) for name, rows in self.shown.items()}
        given = len(next(iter(shown.values())))
        if given != len(x_t):
            raise ValueError(f"The conditions of {given} images were given for a batch of {len(x_t)}.")
        if scale == 1:
            return self._call(x_t, timestep, shown)
        both = {name: torch.cat([rows, nothing[name]]) for name, rows in shown.items()}
        conditional, null = self._call(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), both).chunk(2)
        return null + scale * (conditional - null)

    def _call(self, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        dtype = x_t.dtype
        weights = self._weights_dtype or dtype
        if weights != dtype:
            x_t = x_t.to(weights)
            conditions = {name: rows.to(type_of(rows, x_t)) for name, rows in conditions.items()}
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        output = self._evaluate(x_t, timestep, conditions)[:, : x_t.shape[1]]
        output = output if weights == dtype else output.to(dtype)
        return output.clone() if self.overwrites_outputs else output

    @property
    def _weights_dtype(self) -> torch.dtype | None:
        # Some parts of a network that diffusers loads in half precision stay in float32.
        dtypes = dict.fromkeys(value.dtype for value in self.unet.parameters() if value.is_floating_point())
        return torch.bfloat16 if torch.bfloat16 in dtypes else next(iter(dtypes), None)

    def _evaluate(self, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        output: Tensor = self.unet(x_t, timestep, return_dict=False, **conditions)[0]
        return output


def _latent_moments(config: Any) -> list[list[float]] | None:  # noqa: ANN401
    """Mean and standard deviation of the latents by channel, of a decoder that has both, as in diffusers' SDXL."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    return None if mean is None or std is None else [list(mean), list(std)]


def dtype_of(weights: str) -> torch.dtype:
    """The precision in which weights are held.

    Raises:
        ValueError: another one than `Weights`.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"Unknown precision '{weights}' of weights; choose one of {', '.join(get_args(Weights))}.")
    return torch.bfloat16 if weights == "bfloat16" else torch.float32


def check_mode(compile_mode: str | None) -> None:
    """Make sure that `torch.compile` has this mode.

    Raises:
        ValueError: it has not.
    """
    if compile_mode is not None and compile_mode not in MODES:
        raise ValueError(f"Unknown compile_mode '{compile_mode}'; choose one of {', '.join(MODES)}, or none.")


def _labels_of(config: Any, null_label: int | None) -> tuple[int, int | None]:  # noqa: ANN401
    """How many labels a network has, the null label included, and which that is.

    Raises:
        ValueError: a null label that it does not have.
    """
    num_labels = config.get("num_class_embeds") or 0
    # A DiT counts its classes; the label after the last stands for none. PixArt has such a number, but is shown texts.
    classes = config.get("num_embeds_ada_norm")
    if classes and config.get("caption_channels") is None:
        num_labels = classes + 1
        null_label = classes if null_label is None else null_label
    if null_label is not None and not num_labels:
        raise ValueError(f"The network has no classes; leave null_label out, got {null_label}.")
    if null_label is not None and not 0 <= null_label < num_labels:
        raise ValueError(f"null_label must be one of the network's {num_labels} labels, got {null_label}.")
    return num_labels, null_label


def _decoded_shape(vae: nn.Module, state_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of the images that a decoder makes."""
    config: Any = vae.config
    _, height, width = state_shape
    factor = decoder_factor(config)
    # An `AutoencoderDC` (of Sana) has as many channels out as in.
    return (config.get("out_channels") or config.in_channels, height * factor, width * factor)
