"""GGDMScheduler: a learned sampler for diffusers pipelines.

This file needs torch and diffusers (which brings safetensors) alone, so that it can travel with a model: `ddss export`
puts a copy of it beside `scheduler_config.json`, and a pipeline that is loaded with `trust_remote_code=True` runs it
without this package.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

SAMPLER_CARD, SAMPLER_WEIGHTS, FORMAT_VERSIONS = "sampler.json", "sampler.safetensors", (1, 2)
# Of the coefficients of a `GGDMSampler`, those that sampling needs.
NUMBERS = ("mu", "nu", "std", "pred", "timesteps", "init_noise_sigma", "past_noise")
# Half-precision pipelines cast between steps; what differs by more than this share was changed on purpose.
CHANGED_SAMPLE_TOLERANCE = 1e-2
# Given explicitly wherever a scheduler is made: diffusers does not pass defaults on when it converts schedulers.
NOT_BETAS = "ggdm"
# A pipeline that does not scale the input of the first call makes an error of this relative size at most.
UNSCALED_INPUT_TOLERANCE = 1e-3


@dataclass
class GGDMSchedulerOutput(BaseOutput):
    """What a step returns.

    Args:
        prev_sample: x_{k+1}, the next input of the network; after the last step, the image (or latent).
        pred_original_sample: x0_hat, the image that the network sees in x_k.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class GGDMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    r"""A K-step sampler of the GGDM family with fixed coefficients.

    .. math::
        \hat x_0^{(k)} &= \mathrm{pred}_{k0} x_k + \mathrm{pred}_{k1} \, \mathrm{output}_k \\
        x_{k+1} &= \sum_{j \le k} \mu_{kj} x_j + \nu_k \hat x_0^{(k)} + n_k
        + \sum_{j < k} \mathrm{past}_{kj} n_j, \qquad n_k = \mathrm{std}_k z_k, \quad k = 0, \dots, K-1

    All numbers are in the configuration, as float64. `timesteps` are real-valued: the network must take them so (every
    network with sinusoidal embeddings does). The K steps belong together: they cannot be started in the middle
    (image-to-image), thinned out or lengthened.

    Args:
        mu: weights of the states, K rows of K numbers, lower triangular.
        nu: weights of the predicted image, K numbers.
        std: noise added, K numbers, the last 0.
        pred: pairs that turn (x_k, output) into x0_hat, K pairs.
        timesteps: what the network receives, K numbers.
        init_noise_sigma: scale of the noise that is the first state; applied by `scale_model_input` and `step`.
        past_noise: weights of the noises of earlier steps, K rows of K numbers, strictly lower triangular; default 0.
        prediction_type: what the network must predict.
        logsnrs: half log-SNRs of the noise schedule, for `add_noise`.
        schedule_timesteps: their timesteps; default 0, 1, ...
        scaling: `vp` or `flow`: how alpha and sigma follow from them.
        sigma_data: standard deviation of the data for which `vp` preserves the variance.
        num_train_timesteps: number of timesteps that the network was trained with.
        base_model: name of the model that the sampler was learned for.
        use_flow_sigmas: tells flow matching pipelines (Flux) to leave the times to the scheduler.
        beta_schedule: always `ggdm`: so that a pipeline which would silently turn this scheduler into another one
            (`DDIMPipeline(...)` does) fails instead.

    Raises:
        ValueError: numbers of shapes that do not fit together, or none.

    References:
        Watson et al., "Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality",
        ICLR 2022, https://arxiv.org/abs/2202.05830.
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 - the base class's

    @register_to_config  # type: ignore[misc]
    def __init__(
        self,
        mu: list[list[float]],
        nu: list[float],
        std: list[float],
        pred: list[list[float]],
        timesteps: list[float],
        init_noise_sigma: float = 1.0,
        past_noise: list[list[float]] | None = None,
        prediction_type: str = "epsilon",
        logsnrs: list[float] | None = None,
        schedule_timesteps: list[float] | None = None,
        scaling: str = "vp",
        sigma_data: float = 1.0,
        num_train_timesteps: int = 1000,
        base_model: str | None = None,
        beta_schedule: str = NOT_BETAS,
        use_flow_sigmas: bool = False,
    ) -> None:
        num_steps = len(timesteps)
        past_noise = past_noise or [[0.0] * num_steps] * num_steps
        tensors = [torch.tensor(value, dtype=torch.float64) for value in (mu, nu, std, pred, timesteps, past_noise)]
        square = num_steps, num_steps
        shapes = [square, (num_steps,), (num_steps,), (num_steps, 2), (num_steps,), square]
        if not num_steps or [tuple(value.shape) for value in tensors] != shapes:
            raise ValueError(
                f"mu, nu, std, pred, timesteps and past_noise must have shapes {shapes} for {num_steps} steps, got "
                f"{[tuple(value.shape) for value in tensors]}."
            )
        if not all(value.isfinite().all() for value in tensors):
            raise ValueError("The coefficients hold numbers that are not finite.")
        weights, image_weights, added, self._pred, self._times, past = tensors
        self._noise_weights = torch.diag(added) + past * added
        # x0_hat is a combination of x_k and the output; folding it in avoids a large x0_hat at high noise.
        self._state_weights = weights + torch.diag(image_weights * self._pred[:, 0])
        self._output_weights = image_weights * self._pred[:, 1]
        self.init_noise_sigma = 1.0
        self._start(None)

    @property
    def num_steps(self) -> int:
        """K, the number of network calls."""
        return len(self._times)

    def __len__(self) -> int:
        return int(self._numbers.num_train_timesteps)

    @property
    def _numbers(self) -> Any:  # noqa: ANN401 - diffusers types its FrozenDict, which has attributes, as dict
        return self.config

    # ------------------------------------------------------------------------------------------------ where it is from

    @classmethod
    def from_sampler(cls, sampler: Any, base_model: str | None = None) -> GGDMScheduler:  # noqa: ANN401 - no import
        """The scheduler with the coefficients of a `GGDMSampler`.

        Args:
            sampler: it is not changed.
            base_model: name of the model that it was learned for.
        """
        coefficients, schedule = sampler.coefficients().detach(), sampler.schedule
        return cls._of(
            {name: getattr(coefficients, name) for name in NUMBERS},
            schedule.table,
            schedule.grid,
            schedule.scaling,
            schedule.sigma_data,
            sampler.config["prediction_type"],
            base_model,
        )

    @classmethod
    def _of(
        cls,
        numbers: Mapping[str, Tensor],
        logsnrs: Tensor,
        timesteps: Tensor,
        scaling: str,
        sigma_data: float,
        prediction_type: str,
        base_model: str | None,
    ) -> GGDMScheduler:
        """Of coefficients and a noise schedule."""
        given = {name: value.tolist() for name, value in numbers.items() if name != "past_noise" or value.any()}
        is_flow, counted = scaling == "flow", timesteps.tolist() == list(range(len(timesteps)))
        scheduler: GGDMScheduler = cls(
            **given,
            prediction_type=prediction_type,
            logsnrs=logsnrs.tolist(),
            schedule_timesteps=None if counted else timesteps.tolist(),
            scaling=scaling,
            sigma_data=sigma_data,
            # As diffusers counts them: t = 0, ..., T - 1 of a discrete schedule, t = 1, ..., T of a flow.
            num_train_timesteps=len(timesteps) - is_flow,
            base_model=base_model,
            beta_schedule=NOT_BETAS,
            use_flow_sigmas=is_flow,
        )
        return scheduler

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Read a folder or repository with a `scheduler_config.json`, what `GGDMSampler.save_pretrained` wrote, or the
        log folder of a fit.

        Raises:
            OSError: not on the hub, see diffusers' `SchedulerMixin.from_pretrained`.
            ValueError: a damaged sampler, no such folder, or one without a learned sampler or with several.
        """
        folder = Path(str(pretrained_model_name_or_path or ""), str(subfolder or ""))
        if not (folder / cls.config_name).is_file():
            # The second is where a fit leaves it in its own folder, the third that of the only fit in a folder.
            fits = [path.parent for path in folder.glob(f"*/sampler/{SAMPLER_WEIGHTS}")]
            for saved in (folder, folder / "sampler", *(fits if len(fits) == 1 else ())):
                if (saved / SAMPLER_WEIGHTS).is_file():
                    scheduler = cls._from_sampler_folder(saved)
                    return (scheduler, kwargs) if return_unused_kwargs else scheduler
            if folder.is_dir():
                several = f"{len(fits)} fits; give the folder of one of them" if fits else "no learned sampler"
                raise ValueError(f"'{folder}' holds {several}: it needs {SAMPLER_WEIGHTS} or {cls.config_name}.")
        else:
            cls._check_config(folder / cls.config_name)
        # A name on the hub has one slash, and is no place in a folder that is here.
        name = str(pretrained_model_name_or_path or "")
        if not folder.exists() and (Path(name).parent.is_dir() or name.count("/") != 1):
            raise ValueError(
                f"There is no folder '{folder}', seen from '{Path.cwd()}'; give a saved or exported sampler."
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs)

    @classmethod
    def _check_config(cls, path: Path) -> None:
        try:
            name = json.loads(path.read_text()).get("_class_name")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"'{path}' is damaged: {error}") from error
        if name != "GGDMScheduler":
            raise ValueError(f"'{path}' is of {name}, no learned sampler; give a saved or exported one.")

    @classmethod
    def _from_sampler_folder(cls, folder: Path) -> GGDMScheduler:
        try:
            data = (folder / SAMPLER_WEIGHTS).read_bytes()
            card = json.loads((folder / SAMPLER_CARD).read_text())
            # Cards of older versions do not say.
            if card.get("weights_sha256") not in (None, hashlib.sha256(data).hexdigest()):
                raise ValueError(f"'{SAMPLER_WEIGHTS}' and '{SAMPLER_CARD}' do not belong together")
            tensors = load(data)
            if card["format_version"] not in FORMAT_VERSIONS:
                raise ValueError(f"its format version is {card['format_version']}, this file reads {FORMAT_VERSIONS}")
            numbers = {name.removeprefix("coefficients."): value for name, value in tensors.items()}
            # Files of older versions lack the last two.
            numbers = {"init_noise_sigma": torch.ones(()), "past_noise": torch.zeros_like(numbers["mu"]), **numbers}
            numbers = {name: numbers[name] for name in NUMBERS}
            logsnrs = tensors["schedule.logsnrs"]
            return cls._of(
                numbers,
                logsnrs,
                tensors.get("schedule.timesteps", torch.arange(len(logsnrs)).double()),
                card["schedule"].get("scaling", "vp"),
                card["schedule"].get("sigma_data", 1.0),
                card["config"]["prediction_type"],
                card["base_model"].get("name"),
            )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"The sampler in '{folder}' is damaged, or of another version: {error}") from error

    # ------------------------------------------------------------------------------------------------------- the loop

    def _start(self, device: str | torch.device | None) -> None:
        # As the unrolled chain shows them to a network in float32.
        self.timesteps = self._times.float().to(device)
        self.num_inference_steps = self.num_steps
        self._taken = 0
        self._states: list[Tensor] = []
        self._noises: list[Tensor] = []
        self._scaled: Tensor | None = None
        self._last: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a new sample.

        Args:
            num_inference_steps: K, or None.
            device: of `timesteps`.
            mu: ignored: the shift of the times that flow matching pipelines compute from the image's size.

        Raises:
            ValueError: another number of steps than K.
        """
        if num_inference_steps is not None and num_inference_steps != self.num_steps:
            raise ValueError(
                f"This sampler was learned for {self.num_steps} network calls, got num_inference_steps="
                f"{num_inference_steps}; call the pipeline with num_inference_steps={self.num_steps}."
            )
        self._start(device)

    @property
    def step_index(self) -> int:
        """Number of steps taken since `set_timesteps`."""
        return self._taken

    @property
    def begin_index(self) -> int:
        """Always 0."""
        return 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accept a start at the beginning, and nothing else.

        Raises:
            ValueError: a start in the middle, such as image-to-image.
        """
        if begin_index != 0:
            raise ValueError(
                f"A learned sampler starts from noise: it cannot begin at step {begin_index}, because its steps use "
                "all states before them. Image-to-image and inpainting need another scheduler."
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:  # noqa: ANN401
        """The network's input: the sample itself, but for the scale of the first state."""
        if self._taken or self._numbers.init_noise_sigma == 1:
            return sample
        self._scaled = sample * self._numbers.init_noise_sigma
        return self._scaled

    def _first_state(self, sample: Tensor) -> Tensor:
        scale: float = self._numbers.init_noise_sigma
        if scale == 1 or sample is self._scaled:
            return sample
        if self._scaled is not None:
            return sample * scale
        if abs(scale - 1) > UNSCALED_INPUT_TOLERANCE:
            raise ValueError(
                f"The first state of this sampler is {scale:.4g} times the noise, and this pipeline does not call "
                "`scale_model_input`, which applies it; use a pipeline that does, such as StableDiffusionPipeline."
            )
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> GGDMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{k+1} from the network's output at x_k.

        Args:
            model_output: of the network at (`sample`, `timestep`); of one with a learned variance, which has twice the
                channels, the first half is used.
            timestep: the k-th of `timesteps`.
            sample: x_k.
            eta: must be 0: how much noise is added was learned.
            use_clipped_model_output: must be false: clipping is not linear.
            generator: draws the noise.
            variance_noise: the noise itself, of the shape of `sample`, instead.
            return_dict: `GGDMSchedulerOutput` or a tuple.

        Raises:
            ValueError: a timestep that is not the next one (image-to-image, a missing `set_timesteps`), shapes that
                differ, or an option that a learned sampler does not have.
        """
        k, channels = self.step_index, sample.shape[1]
        if model_output.shape[1] == 2 * channels:
            model_output = model_output[:, :channels]
        self._check_step(k, model_output, timestep, sample, eta, use_clipped_model_output, variance_noise)
        self._states.append(sample if k else self._first_state(sample))
        dtype = torch.promote_types(sample.dtype, torch.float32)

        def weights(value: Tensor) -> Tensor:
            return value.to(device=sample.device, dtype=dtype)

        output = model_output.to(dtype)
        # Term by term: autocast and TF32 would round a product of matrices.
        x_next = weights(self._output_weights[k]) * output
        for weight, state in zip(weights(self._state_weights[k]), self._states, strict=False):
            x_next = x_next + weight * state.to(dtype)
        if self._noise_weights.any():
            if k < self.num_steps - 1:
                if variance_noise is None:
                    variance_noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
                self._noises.append(variance_noise)
            for weight, noise in zip(self._noise_weights[k].tolist(), self._noises, strict=False):
                if weight:
                    x_next = x_next + weight * noise.to(dtype)
        x_0 = weights(self._pred[k, 0]) * self._states[-1].to(dtype) + weights(self._pred[k, 1]) * output
        x_next, x_0 = x_next.to(sample.dtype), x_0.to(sample.dtype)
        self._taken, self._last = k + 1, x_next
        if self._taken == self.num_steps:
            # A pipeline keeps its scheduler: the states of images that are done would stay in memory.
            self._states, self._noises, self._scaled, self._last = [], [], None, None
        return GGDMSchedulerOutput(x_next, x_0) if return_dict else (x_next, x_0)

    def _check_step(
        self,
        k: int,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float,
        use_clipped_model_output: bool | None,
        variance_noise: Tensor | None,
    ) -> None:
        if k >= self.num_steps:
            raise ValueError(f"All {self.num_steps} steps were taken; call `set_timesteps` before a new sample.")
        if abs(float(timestep) - float(self._times[k])) > 1e-3 + 1e-6 * abs(float(self._times[k])):
            raise ValueError(
                f"Step {k} of this sampler is at timestep {float(self._times[k]):.6g}, got {float(timestep):.6g}. Its "
                "steps are taken in order from the first, on one sample after `set_timesteps`; image-to-image starts "
                "are not possible."
            )
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}; they must be equal "
                "(with a learned variance: twice as many channels)."
            )
        if self._states and self._states[-1].shape != sample.shape:
            raise ValueError(f"The sample changed from {tuple(self._states[-1].shape)} to {tuple(sample.shape)}.")
        if self._last is not None and sample is not self._last and self._changed(sample, self._last):
            raise ValueError(
                f"The sample of step {k} is not what step {k - 1} returned. The steps of a learned sampler use all "
                "states before them, so that nothing can be pasted in between, as inpainting does."
            )
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(
                f"variance_noise has shape {tuple(variance_noise.shape)}, sample {tuple(sample.shape)}; they must be "
                "equal."
            )
        if eta or use_clipped_model_output:
            raise ValueError(
                f"A learned sampler has no eta and no clipping, got eta={eta}, "
                f"use_clipped_model_output={use_clipped_model_output}; leave them at 0 and None."
            )

    @staticmethod
    def _changed(sample: Tensor, last: Tensor) -> bool:
        """Whether every sample of the batch was changed: DiTPipeline overwrites one half with the other."""
        difference = (sample - last.to(sample)).abs().flatten(1).amax(1)
        return bool((difference > CHANGED_SAMPLE_TOLERANCE * last.abs().flatten(1).amax(1).to(sample)).all())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x_0 + sigma_t noise, at real-valued timesteps.

        Args:
            original_samples: x_0, shape (N, ...).
            noise: of the same shape.
            timesteps: shape (N,) or (1,).

        Raises:
            ValueError: the scheduler has no noise schedule.
        """
        if self._numbers.logsnrs is None:
            raise ValueError("This scheduler has no `logsnrs`, which `add_noise` needs.")
        table = torch.tensor(self._numbers.logsnrs, dtype=torch.float64)
        grid = torch.tensor(self._numbers.schedule_timesteps or list(range(len(table))), dtype=torch.float64)
        t = timesteps.detach().cpu().double().clamp(grid[0], grid[-1])
        left = (torch.searchsorted(grid, t, right=True) - 1).clamp(0, len(grid) - 2)
        logsnr = torch.lerp(table[left], table[left + 1], (t - grid[left]) / (grid[left + 1] - grid[left]))
        if self._numbers.scaling == "flow":
            alpha, sigma = torch.sigmoid(logsnr), torch.sigmoid(-logsnr)
        else:
            ratio = torch.exp(-logsnr)
            alpha = (self._numbers.sigma_data**2 + ratio.square()).rsqrt()
            sigma = ratio * alpha
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (value.to(original_samples).reshape(shape) for value in (alpha, sigma))
        return alpha * original_samples + sigma * noise
