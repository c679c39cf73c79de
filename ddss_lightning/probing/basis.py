r"""Read the coefficients of any explicit, linear diffusers scheduler by running it on a basis.

`step` of such a scheduler is linear in the sample, the network outputs and the noise. Let the first sample be the unit
vector e_T, the k-th network output e_k and the k-th noise z_k: then every state that the network sees comes out as the
row of its exact coefficients, and no solver has to be written again.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ddss_lightning.coefficients import SANE_IMAGE, Coefficients, PredictionType, without_rounding
from ddss_lightning.probing.loop import NotAGGDMError, count_calls, run_scheduler
from ddss_lightning.probing.verification import verify
from ddss_lightning.schedule import NoiseSchedule, own_config, scheduler_prediction_type

# Of a hand-made sampler: noise left in the image, and the weights of state and output in the first predicted image.
LARGEST_REST, LARGEST_WEIGHT = 0.1, 1e4
# Options that make `step` nonlinear, and what turns them off.
NONLINEAR_OPTIONS = ("thresholding", "clip_sample", "clip_denoised")
# What the loop of a pipeline itself gives to `step`.
STEP_ARGUMENTS = {"model_output", "timestep", "sample", "generator", "return_dict"}
# Noise that a scheduler adds to the image itself in its last step, below which it counts as none.
NO_NOISE = 1e-8


def probe(
    scheduler: Any,  # noqa: ANN401 - diffusers has no common base for schedulers that can sample
    num_steps: int,
    set_timesteps: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
) -> Coefficients:
    r"""Coefficients and network times of a diffusers scheduler, exact.

    The rows r_k of the states that the network sees, after `scale_model_input`, satisfy r_{k+1} = sum_j A_kj r_j +
    w_k e_k + sum_j N_kj z_j, N the `noise_weights`. One triangular solve gives A; `Coefficients.with_marginal_pair`
    splits (A_kk, w_k) into mu_kk and nu_k. The result is then run against the scheduler's own loop with a nonlinear
    stand-in for the network: what is not linear, or not a GGDM, does not pass.

    Args:
        scheduler: any explicit, linear scheduler; it is not changed.
        num_steps: what `set_timesteps` gets. The number of network calls can be larger (Heun: 2 n - 1).
        set_timesteps: further arguments of `set_timesteps`, such as `sigmas`, `timesteps` or `mu`. With `sigmas` or
            `timesteps`, `num_steps` must be their number or that of the network calls.
        step: further arguments of `step`, such as `eta`.

    Raises:
        NotAGGDMError: a nonlinear option, a solver that is not a GGDM (a stage of weight zero), one that keeps a state
            of another kind.
        ValueError: one whose `step` needs more than the output, the timestep and the sample, or that cannot do so many
            steps, or whose own numbers are not finite.
    """
    set_timesteps, step = dict(set_timesteps or {}), dict(step or {})
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, method) for method in ("set_timesteps", "step")):
        raise NotAGGDMError(f"{name} is no sampler of the usual form: it lacks set_timesteps or step.")
    if "prev_timestep" in inspect.signature(scheduler.step).parameters:
        raise NotAGGDMError(
            f"{name} needs prev_timestep at every step, which the loop of other pipelines does not give; use "
            "DDPMScheduler with the same betas."
        )
    for option in NONLINEAR_OPTIONS:
        if own_config(scheduler).get(option):
            raise NotAGGDMError(
                f"{name} with {option}=True is not linear and has no coefficients; make it with {option}=False. "
                "Images are clamped after sampling."
            )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    if is_learned(scheduler):
        return _own_numbers(scheduler, num_steps, set_timesteps, step)
    takes = inspect.signature(scheduler.step).parameters
    if unknown := [option for option in step if option not in takes]:
        options = ", ".join(option for option in takes if option not in STEP_ARGUMENTS) or "none"
        raise ValueError(f"{name} has no option {unknown[0]} of `step`; its options are {options}.")
    rows, timesteps = _run_on_basis(scheduler, num_steps, set_timesteps, step)
    coefficients = _solve(rows, timesteps, scheduler)
    verify(coefficients, scheduler, num_steps, set_timesteps, step)
    problems = [*coefficients.problems(), *_weaknesses(coefficients)]
    if problems:
        warnings.warn(
            f"{name} with these options is no good sampler: {'; '.join(problems)}. So it is in diffusers too: use "
            "other options or another number of steps.",
            stacklevel=3,
        )
    return coefficients


def _weaknesses(coefficients: Coefficients) -> list[str]:
    """What is allowed of a learned sampler, but looks wrong of a hand-made one."""
    left, first = float(coefficients.marginals()[1][-1]), float(coefficients.pred[0].abs().max())
    found = []
    if LARGEST_REST < left <= SANE_IMAGE[1] - 1:
        found.append(f"noise of std {left:.3g} is left in the image")
    if first > LARGEST_WEIGHT:
        found.append(f"the first predicted image is {first:.3g} times the state and the network's output")
    return found


def _run_on_basis(
    scheduler: Any,  # noqa: ANN401
    num_steps: int,
    set_timesteps: Mapping[str, Any],
    step: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Rows of the states, shape (K + 1, 1 + 2 K), and timesteps, shape (K,), K the number of calls."""
    count = count_calls(scheduler, num_steps, set_timesteps)
    for option in ("sigmas", "timesteps"):
        given = set_timesteps.get(option)
        if given is not None and num_steps not in (len(given), count):
            raise ValueError(f"num_steps is {num_steps}, but {len(given)} {option} were given, for {count} calls.")
    # The shape of a small image: some schedulers look at four dimensions.
    basis = torch.eye(1 + 2 * count, dtype=torch.float64)[:, None, None, None, :]
    outputs, noise = basis[1 : 1 + count], basis[1 + count :]
    states, timesteps = run_scheduler(
        scheduler, lambda k, _x, _t: outputs[k].clone(), basis[0], list(noise), num_steps, set_timesteps, step
    )
    return torch.stack([state.double().flatten() for state in states]), timesteps


# The numbers in the configuration of a `GGDMScheduler`; the rest of `Coefficients` follows from the noise schedule.
NUMBERS = {each.name for each in dataclasses.fields(Coefficients)} - {"prior"}


def is_learned(scheduler: Any) -> bool:  # noqa: ANN401
    """Whether it is a `GGDMScheduler`, or the copy of one that travels with a model: its configuration says all."""
    return own_config(scheduler).keys() >= NUMBERS


def _own_numbers(
    scheduler: Any,  # noqa: ANN401
    num_steps: int,
    set_timesteps: Mapping[str, Any],
    step: Mapping[str, Any],
) -> Coefficients:
    """Those that a `GGDMScheduler` was made from, with their own pair: learned, it is not that of Theorem 1."""
    count_calls(scheduler, num_steps, set_timesteps)  # refuses another number
    if any(step.values()):
        raise ValueError(f"A learned sampler has neither eta nor other options of `step`, got {dict(step)}.")
    given = {name: scheduler.config[name] for name in NUMBERS if scheduler.config[name] is not None}
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    prior = torch.stack(NoiseSchedule.from_scheduler(scheduler).alpha_sigma(numbers["timesteps"][0]))
    return Coefficients(**numbers, prior=prior).validate()


def _solve(rows: Tensor, timesteps: Tensor, scheduler: Any) -> Coefficients:  # noqa: ANN401
    name, count = type(scheduler).__name__, len(timesteps)
    if not rows.isfinite().all():
        raise ValueError(
            f"{name} with these options computes numbers that are not finite. Epsilon prediction divides by alpha, "
            "which is 0 at the first timestep of a schedule with zero terminal SNR (rescale_betas_zero_snr: use "
            "v_prediction); some solvers take the logarithm of a last sigma of 0 (use final_sigmas_type='sigma_min')."
        )
    if timesteps[-1] > timesteps[0]:
        raise NotAGGDMError(f"{name} goes from the image to noise; only samplers, from noise to image, are imported.")
    inputs, noise = rows[:, : 1 + count], rows[:, 1 + count :]
    # State j brings in the output of call j - 1: this matrix is lower triangular.
    if (inputs[:-1].diagonal().abs() < 1e-12 * inputs[:-1].abs().amax(1)).any():
        raise NotAGGDMError(
            f"{name} has a step in which the newest network output has no weight, so that a later state cannot be "
            "written with the states before it; use another scheduler, for example DEISMultistepScheduler."
        )
    # Row k without its newest output, e_k, is a combination of the states 0 ... k.
    known = inputs[1:, :count].tril()
    weights = torch.linalg.solve_triangular(inputs[:-1, :count], known, upper=False, left=False).tril()
    output_weight = inputs[1:, 1:].diagonal()
    noise_weights = noise[1:] - weights @ noise[:-1]
    std = noise_weights.diagonal()
    if std[-1].abs() > NO_NOISE:
        raise NotAGGDMError(
            f"{name} adds noise of standard deviation {float(std[-1]):.3g} to the image in its last step; choose "
            "options with a last step to the clean image, such as set_alpha_to_one=True or final_sigmas_type='zero', "
            "and without s_churn."
        )
    # In units of what their own step added; one that added none has none to take out.
    past_noise = without_rounding(torch.where(std.abs() > NO_NOISE, noise_weights / std, 0.0).tril(-1))
    std = torch.cat([std[:-1].abs(), std.new_zeros(1)])
    schedule = NoiseSchedule.from_scheduler(scheduler)
    prior = torch.stack(schedule.alpha_sigma(timesteps[0]))
    # x0_hat = output, so that nu is the weight of the output, until the pair is split off.
    pred = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(len(timesteps), 2)
    plain = Coefficients(weights, output_weight, std, pred, timesteps, prior, rows[0, 0], past_noise)
    predicts = cast(PredictionType, scheduler_prediction_type(scheduler))
    return plain.with_marginal_pair(predicts, schedule.sigma_data).validate()
