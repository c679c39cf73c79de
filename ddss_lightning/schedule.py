r"""The noise schedule that a pretrained denoiser was trained with.

q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), and everything is expressed by the half log-SNR
lambda_t = log(alpha_t / sigma_t), strictly decreasing in t.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Scaling = Literal["vp", "flow"]


class NoiseSchedule(nn.Module):
    r"""A noise schedule with real-valued, differentiable time.

    The half log-SNRs of the trained timesteps are interpolated linearly in t, so that both t -> lambda and
    lambda -> t are differentiable almost everywhere and exact at the trained timesteps. All numbers are float64.

    Args:
        logsnrs: lambda at the trained timesteps, shape (T,), finite and strictly decreasing from above 0.
        timesteps: the trained timesteps, shape (T,), strictly increasing; default 0, 1, ..., T - 1.
        scaling: how alpha and sigma follow from lambda: `vp`, sigma_data^2 alpha^2 + sigma^2 = 1; `flow`,
            alpha + sigma = 1.
        sigma_data: standard deviation of the data for which `vp` preserves the variance. EDM models scale their input
            in this way (c_in of Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1); elsewhere it is 1.

    Raises:
        ValueError: fewer than two values, a wrong shape, values that are not finite, not monotone or no log-SNRs, an
            unknown scaling.
    """

    table: Tensor
    grid: Tensor

    def __init__(
        self, logsnrs: Tensor, timesteps: Tensor | None = None, scaling: Scaling = "vp", sigma_data: float = 1.0
    ) -> None:
        super().__init__()
        logsnrs = logsnrs.detach().double().cpu()
        if logsnrs.ndim != 1 or len(logsnrs) < 2:
            raise ValueError(f"logsnrs must have shape (T,) with T >= 2, got {tuple(logsnrs.shape)}.")
        if not logsnrs.isfinite().all():
            raise ValueError("The half log-SNRs must be finite: 0 < alpha and 0 < sigma at every timestep.")
        if not (logsnrs.diff() < 0).all():
            raise ValueError("The half log-SNRs must decrease strictly with the timestep: noise grows with t.")
        first, last = float(logsnrs[0]), float(logsnrs[-1])
        # Those of `alphas_cumprod` lie in [0, 1], and below 0. A schedule of few timesteps can end above 0.
        if first <= 0 or (first <= 1 and last >= 0):
            raise ValueError(
                "The half log-SNRs log(alpha / sigma) must begin near the image, well above 0, and end near noise, got "
                f"{first:.4g} to {last:.4g}. Use NoiseSchedule.from_scheduler, or, of alphas_cumprod a, "
                "NoiseSchedule(a.double().logit() / 2)."
            )
        grid = torch.arange(len(logsnrs)) if timesteps is None else timesteps.detach().cpu()
        grid = grid.double()
        if grid.shape != logsnrs.shape or not grid.isfinite().all() or not (grid.diff() > 0).all():
            raise ValueError(f"timesteps must be {len(logsnrs)} finite, strictly increasing numbers, got {grid}.")
        if scaling not in get_args(Scaling):
            raise ValueError(f"Unknown scaling '{scaling}'; choose one of {', '.join(get_args(Scaling))}.")
        if not (math.isfinite(sigma_data) and sigma_data > 0):
            raise ValueError(f"sigma_data must be a positive number, got {sigma_data}.")
        self.scaling, self.sigma_data = scaling, float(sigma_data)
        self.register_buffer("table", logsnrs, persistent=False)
        self.register_buffer("grid", grid, persistent=False)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:  # noqa: ANN401 - diffusers has no common base for this
        r"""Read the schedule of a diffusers scheduler.

        - `GGDMScheduler` (`logsnrs`): what it holds;
        - flow matching (`shift` without betas, `use_flow_sigmas`, or `flow_prediction`): t / num_train_timesteps =
          sigma = 1 - alpha;
        - `alphas_cumprod` (DDPM and everything made for such models): alpha^2 = `alphas_cumprod`; a last one of 0
          (zero terminal SNR; some schedulers put 2^-24 there) is extrapolated from the two before it;
        - EDM (`sigma_data`): t = log(sigma_edm) / 4 between `sigma_min` and `sigma_max`.

        Raises:
            ValueError: none of these, `alphas_cumprod` that do not decrease between 1 and 0, or time the other way.
        """
        config = own_config(scheduler)
        if config.get("logsnrs"):
            table = (config["logsnrs"], config.get("schedule_timesteps") or range(len(config["logsnrs"])))
            logsnrs, timesteps = (torch.tensor(list(values), dtype=torch.float64) for values in table)
            return cls(logsnrs, timesteps, config["scaling"], config["sigma_data"])
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if is_flow or (alphas_cumprod is None and "shift" in config and "num_train_timesteps" in config):
            if config.get("invert_sigmas"):
                raise ValueError(
                    f"{type(scheduler).__name__} with invert_sigmas counts time from noise to image, which is not "
                    "supported."
                )
            return cls._flow(int(config["num_train_timesteps"]))
        if isinstance(alphas_cumprod, Tensor):
            alphas_cumprod = alphas_cumprod.double()
            logsnrs = (alphas_cumprod.log() - torch.log1p(-alphas_cumprod)) / 2
            if len(logsnrs) > 2 and (alphas_cumprod[-1] == 0 or config.get("rescale_betas_zero_snr")):
                logsnrs[-1] = 2 * logsnrs[-2] - logsnrs[-3]
            # EulerDiscreteScheduler shows networks that predict v log(sigma) / 4, if its timestep_type says so.
            continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
            return cls(logsnrs, -logsnrs / 4 if continuous else None)
        if {"sigma_data", "sigma_min", "sigma_max"} <= config.keys():
            ends = math.log(config["sigma_min"]), math.log(config["sigma_max"])
            log_sigmas = torch.linspace(*ends, 1000, dtype=torch.float64)
            return cls(-log_sigmas, log_sigmas / 4, sigma_data=config["sigma_data"])
        raise ValueError(
            f"{type(scheduler).__name__} has no `alphas_cumprod` and is neither a flow matching nor an EDM scheduler; "
            "give one such as diffusers' DDIMScheduler, FlowMatchEulerDiscreteScheduler or EDMEulerScheduler."
        )

    @classmethod
    def _flow(cls, num_train_timesteps: int) -> NoiseSchedule:
        timesteps = torch.arange(num_train_timesteps + 1, dtype=torch.float64)
        # At the ends the log-SNR is infinite: pure noise and the clean image.
        sigma = (timesteps / num_train_timesteps).clamp(1e-6, 1 - 1e-6)
        return cls(torch.log1p(-sigma) - sigma.log(), timesteps, scaling="flow")

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps in the table; for DDPM models, that of the timesteps the network was trained with."""
        return len(self.table)

    def logsnr(self, timestep: Tensor) -> Tensor:
        """Half log-SNR lambda_t at real-valued t between the first and the last timestep; constant outside."""
        timestep = timestep.double().clamp(self.grid[0], self.grid[-1])
        left = torch.searchsorted(self.grid, timestep.detach().contiguous(), right=True) - 1
        left = left.clamp(0, self.num_train_timesteps - 2)
        fraction = (timestep - self.grid[left]) / (self.grid[left + 1] - self.grid[left])
        return torch.lerp(self.table[left], self.table[left + 1], fraction)

    def timestep(self, logsnr: Tensor) -> Tensor:
        """The real-valued t with lambda_t = `logsnr`; constant outside the range of the table."""
        logsnr = logsnr.double().clamp(self.table[-1], self.table[0])
        left = torch.searchsorted(-self.table, -logsnr.detach().contiguous(), right=True) - 1
        left = left.clamp(0, self.num_train_timesteps - 2)
        low, high = self.table[left], self.table[left + 1]
        return self.grid[left] + (logsnr - low) / (high - low) * (self.grid[left + 1] - self.grid[left])

    def scales(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        r"""Marginal scales (alpha, sigma) at half log-SNR lambda, any shape. lambda = infinity is the clean image.

        `vp`: alpha = sqrt(sigmoid(2 lambda')) / sigma_data, sigma = sqrt(sigmoid(-2 lambda')) with
        lambda' = lambda + log sigma_data. `flow`: alpha = sigmoid(lambda), sigma = sigmoid(-lambda).
        """
        if self.scaling == "flow":
            return torch.sigmoid(logsnr.double()), torch.sigmoid(-logsnr.double())
        shifted = 2 * (logsnr.double() + math.log(self.sigma_data))
        return torch.sigmoid(shifted).sqrt() / self.sigma_data, torch.exp(-torch.nn.functional.softplus(shifted) / 2)

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Marginal scales (alpha_t, sigma_t) at real-valued t."""
        return self.scales(self.logsnr(timestep))

    def matches(self, other: NoiseSchedule) -> bool:
        """Whether both are the same schedule: equal timesteps and scaling, half log-SNRs equal to 0.01.

        Not to the last bit: diffusers computes `alphas_cumprod` in float32, differently on different processors.
        """
        return (
            (self.scaling, self.sigma_data) == (other.scaling, other.sigma_data)
            and self.table.shape == other.table.shape
            # Continuous times are a quarter of them.
            and torch.allclose(self.grid.cpu(), other.grid.cpu(), 1e-5, 2.5e-3)
            and torch.allclose(self.table.cpu(), other.table.cpu(), 0, 1e-2)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        """Follow a module to another device, but stay float64 when it is cast."""
        exact = self.table, self.grid
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.table, self.grid = (value.to(self.table.device) for value in exact)
        return self


def check_schedule(schedule: object, name: str = "schedule") -> None:
    """Make sure that it is a `NoiseSchedule`, not a scheduler or the betas.

    Raises:
        ValueError: it is none; `name` says what was given.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"{name} must be a NoiseSchedule, got {type(schedule).__name__}; use "
            "NoiseSchedule.from_scheduler(scheduler), with a scheduler of diffusers that has the model's betas."
        )


def own_config(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 - diffusers has no common base
    """The options of a scheduler that its class has, or one that it is made from.

    `from_config` of another scheduler's configuration keeps what the class does not take, such as the `clip_sample` of
    most saved pipelines, in `scheduler.config`, where it has no effect.
    """
    config = dict(getattr(scheduler, "config", {}))
    if not hasattr(scheduler, "from_config"):
        return config
    makers = [vars(cls)["__init__"] for cls in type(scheduler).__mro__[:-1] if "__init__" in vars(cls)]
    known = {name for maker in makers for name in inspect.signature(maker).parameters}
    return {name: value for name, value in config.items() if name in known}


def scheduler_prediction_type(scheduler: Any) -> str:  # noqa: ANN401 - diffusers has no common base
    """What a network must predict for a diffusers scheduler, in the words of `prediction_pair`."""
    config = own_config(scheduler)
    predicts = config.get("prediction_type")
    if predicts is None and "shift" in config:
        return "flow_prediction"
    if config.get("logsnrs"):
        return str(predicts)
    if predicts is not None and "sigma_data" in config and not hasattr(scheduler, "alphas_cumprod"):
        return f"edm_{predicts}"
    return predicts or "epsilon"
