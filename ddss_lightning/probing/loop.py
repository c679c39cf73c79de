"""The loop of a diffusers pipeline, with any network and given noise."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddss_lightning.schedule import NoiseSchedule, own_config


class NotAGGDMError(ValueError):
    """A sampler that no GGDM can express."""


def scheduler_steps(scheduler: Any, nfe: int, set_timesteps: Mapping[str, Any] | None = None) -> int:  # noqa: ANN401
    """The number that `set_timesteps` must get so that the network is called `nfe` times.

    Raises:
        ValueError: there is none: Heun's method, for example, makes 2 n - 1 calls; or not with these timesteps.
    """
    if _are_explicit(set_timesteps or {}):
        # They bring their own number.
        if (count := count_calls(scheduler, nfe, set_timesteps or {})) != nfe:
            raise ValueError(f"{type(scheduler).__name__} makes {count} network calls with these, not {nfe}.")
        return nfe
    counts: dict[int, int] = {}
    reason: ValueError | None = None
    for steps in range(nfe, 0, -1):
        try:
            counts[steps] = count_calls(scheduler, steps, set_timesteps or {})
        except ValueError as error:
            reason = reason or error  # too few steps for this scheduler, or wrong arguments
            continue
        if counts[steps] == nfe:
            return steps
    if reason is not None and not counts:
        raise reason
    others = [str(count) for count in sorted(set(counts.values()))]
    possible = ", ".join(others if len(others) < 20 else ["...", *others[-5:]])
    raise ValueError(f"{type(scheduler).__name__} cannot make {nfe} network calls, only {possible}, or more.")


def count_calls(scheduler: Any, steps: int, set_timesteps: Mapping[str, Any]) -> int:  # noqa: ANN401
    """The number of network calls that `set_timesteps` of `steps` makes.

    Raises:
        ValueError: the scheduler cannot be set so.
    """
    scheduler = copy.deepcopy(scheduler)
    _set_timesteps(scheduler, steps, set_timesteps)
    return len(scheduler.timesteps)


def run_scheduler(
    scheduler: Any,  # noqa: ANN401
    network: Callable[[int, Tensor, Tensor], Tensor],
    x_T: Tensor,
    noise: Sequence[Tensor],
    num_steps: int,
    set_timesteps: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The loop of a diffusers pipeline, on a copy of the scheduler.

    Args:
        scheduler: it is not changed.
        network: (call index, input, timestep) -> output.
        x_T: standard normal; `init_noise_sigma` is applied here.
        noise: what each step gets when it draws.
        num_steps: what `set_timesteps` gets.
        set_timesteps: its further arguments.
        step: further arguments of `step`.

    Returns:
        The inputs of the network and, last, the image; and the timesteps, shape (number of calls,).

    Raises:
        NotAGGDMError: it draws twice in one step, or returns something else than samples.
        ValueError: it fails.
    """
    scheduler, name = copy.deepcopy(scheduler), type(scheduler).__name__
    _set_timesteps(scheduler, num_steps, set_timesteps or {})
    # Flow matching schedulers have neither: their first state is the noise, and the network sees the states.
    scale = getattr(scheduler, "scale_model_input", lambda x, _t: x)
    states, draws = [], _Draws(noise, name)
    with draws:
        try:
            x = x_T * float(getattr(scheduler, "init_noise_sigma", 1.0))
            for k, timestep in enumerate(scheduler.timesteps):
                draws.begin(k)
                states.append(scale(x, timestep))
                x = scheduler.step(network(k, states[-1], timestep), timestep, x, return_dict=False, **(step or {}))[0]
                if x.shape != x_T.shape or not x.is_floating_point():
                    raise NotAGGDMError(f"{name} does not return samples of the shape and kind it got.")
        except NotAGGDMError:
            raise
        except Exception as error:  # whatever a scheduler raises that is not made for this loop
            raise ValueError(
                f"{name} does not run in the loop of a pipeline (set_timesteps, scale_model_input, step): {error!r}. "
                "Only schedulers of that loop can be imported, such as UniPCMultistepScheduler."
            ) from error
    return [*states, x], torch.as_tensor(scheduler.timesteps, dtype=torch.float64)


def _set_timesteps(scheduler: Any, num_steps: int, kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401
    timesteps = kwargs.get("timesteps")
    if timesteps is not None:
        if kwargs.get("sigmas") is None:
            _check_shift(scheduler)
        _check_timesteps(scheduler, timesteps)
    if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        _set_timesteps(scheduler, len(timesteps), {name: each for name, each in kwargs.items() if name != "timesteps"})
        _place(scheduler, timesteps)
        return
    # Explicit sigmas or timesteps bring their own number, and most schedulers refuse to be told both.
    number = {} if _are_explicit(kwargs) else {"num_inference_steps": num_steps}
    try:
        scheduler.set_timesteps(**number, **kwargs)
    except Exception as error:  # index errors, assertions, type errors, ...
        raise ValueError(f"{type(scheduler).__name__} cannot be set to {num_steps} steps: {error!r}") from error


def _are_explicit(set_timesteps: Mapping[str, Any]) -> bool:
    return any(set_timesteps.get(option) is not None for option in ("sigmas", "timesteps"))


def _check_shift(scheduler: Any) -> None:  # noqa: ANN401
    """Along a flow, diffusers shifts noise levels, and leaves given timesteps as they are, or takes none.

    Raises:
        ValueError: the network would be shown times of other noise.
    """
    config = own_config(scheduler)
    if config.get("use_flow_sigmas") or config.get("use_dynamic_shifting") or config.get("shift", 1.0) != 1:
        raise ValueError(
            f"{type(scheduler).__name__} places its calls along the flow by a shift of its noise levels, and would "
            "show the network other times than `timesteps`; leave them out (and give `shift` or `flow_shift`, or "
            "`sigmas`), or use the anchors dpmpp_2m or ddim with a stride or timesteps."
        )


def _check_timesteps(scheduler: Any, timesteps: Sequence[float]) -> None:  # noqa: ANN401
    """Schedulers look them up from either end of their tables, whatever they are.

    Raises:
        ValueError: none, or not decreasing numbers of the noise schedule.
    """
    grid = NoiseSchedule.from_scheduler(scheduler).grid
    given = torch.as_tensor(timesteps, dtype=torch.float64)
    inside = ((given >= grid[0]) & (given <= grid[-1])).all()
    if given.ndim != 1 or not len(given) or not inside or not (given.diff() < 0).all():
        raise ValueError(
            f"timesteps must be strictly decreasing numbers from {float(grid[-1]):g} to {float(grid[0]):g}, got "
            f"{given.tolist()}."
        )


def _place(scheduler: Any, timesteps: Sequence[int]) -> None:  # noqa: ANN401
    """Set the timesteps of a scheduler whose `set_timesteps` takes none: its steps go by `sigmas`, one for each.

    Its last sigma, after the last call, stays.

    Raises:
        ValueError: its steps do not go by sigmas of the noise schedule, or not one by one; timesteps between those of
            the network's training.
    """
    own: Any = scheduler.timesteps
    sigmas: Any = getattr(scheduler, "sigmas", ())
    one_by_one = len(own) == len(timesteps) == len(sigmas) - 1
    if not one_by_one or not hasattr(scheduler, "alphas_cumprod") or own_config(scheduler).get("use_flow_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} takes no timesteps; leave them out, or use a scheduler whose set_timesteps "
            "takes them, such as DPMSolverMultistepScheduler."
        )
    if any(timestep != int(timestep) for timestep in timesteps):
        raise ValueError(f"timesteps of a {type(scheduler).__name__} must be whole numbers, got {list(timesteps)}.")
    table = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64)
    placed = ((1 - table) / table).sqrt()[torch.as_tensor(timesteps)]
    scheduler.timesteps = torch.as_tensor(timesteps).to(own)
    scheduler.sigmas = torch.cat([placed.to(sigmas), sigmas[-1:]])


class _Draws(TorchFunctionMode):
    """Gives a scheduler that draws normal numbers in step k the k-th of the given noises."""

    def __init__(self, noise: Sequence[Tensor], name: str) -> None:
        super().__init__()
        self.noise, self.name, self.step, self.drawn = noise, name, -1, False

    def begin(self, step: int) -> None:
        self.step, self.drawn = step, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **(kwargs or {}))
        if self.drawn or self.step < 0:
            raise NotAGGDMError(f"{self.name} draws noise more than once in a step, or outside the steps; not a GGDM.")
        self.drawn = True
        return self.noise[self.step].clone()
