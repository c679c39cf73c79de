r"""Read the coefficients of any explicit, linear diffusers scheduler by running it on a basis.

`step` of such a scheduler is linear in the sample, the network outputs and the noise. Let the first sample be the unit
vector e_T, the k-th network output e_k and the k-th noise z_k: then every state that the network sees comes out as the
row of its exact coefficients, and no solver has to be written again.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddss_lightning.coefficients import SANE_IMAGE, Coefficients, PredictionType, without_rounding
from ddss_lightning.schedule import NoiseSchedule, own_config, scheduler_prediction_type
from ddss_lightning.unroll import unroll

# Of a hand-made sampler: noise left in the image, and the weights of state and output in the first predicted image.
LARGEST_REST, LARGEST_WEIGHT = 0.1, 1e4
# Options that make `step` nonlinear, and what turns them off.
NONLINEAR_OPTIONS = ("thresholding", "clip_sample", "clip_denoised")
# A sampler that is linear reproduces its scheduler to 1e-10, or 5e-7 where the scheduler computes in float32.
TOLERANCE = 1e-5
# The same with images in float32, half a grey level of 8-bit pixels; with weights from LARGE_WEIGHT on float64 suffers.
FLOAT32_TOLERANCE = 4e-3
LARGE_WEIGHT = 1e6
# Arguments of schedulers that say which noise schedule they step along.
BETAS = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale"}
SIGMAS = {"use_flow_sigmas", "flow_shift", "shift", "sigma_min", "sigma_max", "sigma_data"}
SCHEDULE_ARGUMENTS = {"num_train_timesteps", *BETAS, *SIGMAS}
# What the loop of a pipeline itself gives to `step`.
STEP_ARGUMENTS = {"model_output", "timestep", "sample", "generator", "return_dict"}
# Noise that a scheduler adds to the image itself in its last step, below which it counts as none.
NO_NOISE = 1e-8


def build_scheduler(anchor: Mapping[str, Any], schedule: NoiseSchedule, prediction_type: str) -> Any:  # noqa: ANN401
    """The scheduler that a recipe names: `class_path` and `init_args`.

    Where `init_args` say nothing of them, the betas are those of `schedule`, or for flow matching there are none
    (`use_flow_sigmas`), and the prediction type is the model's.

    Raises:
        ValueError: an unknown key or class, arguments that the class does not take, or another noise schedule.
    """
    known = {"class_path", "init_args", "set_timesteps", "step"}
    if "class_path" not in anchor or set(anchor) - known:
        raise ValueError(
            f"anchor: a scheduler is named by class_path and, if needed, {', '.join(sorted(known - {'class_path'}))}; "
            f"got {', '.join(map(str, anchor)) or 'nothing'}. On the command line an anchor is given whole: "
            "--sampler.anchor='{class_path: ..., init_args: {...}}'."
        )
    module_name, _, class_name = str(anchor["class_path"]).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name or "diffusers"), class_name)
        parameters = inspect.signature(cls.__init__).parameters
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"anchor: there is no scheduler '{anchor['class_path']}' ({error}); name a class such as "
            "'diffusers.UniPCMultistepScheduler'."
        ) from error
    given = (anchor.get("init_args") or {}).keys()
    init_args = {**_schedule_arguments(schedule, parameters, anchor), **(anchor.get("init_args") or {})}
    if "trained_betas" in init_args:
        # The betas are those of the model already, at zero terminal SNR too: not to be rescaled a second time.
        init_args.pop("rescale_betas_zero_snr", None)
        if "snr_shift_scale" in parameters:
            init_args["snr_shift_scale"] = 1.0
    if schedule.scaling == "flow" and "use_flow_sigmas" in parameters:
        init_args.setdefault("use_flow_sigmas", True)
    if "prediction_type" in parameters:
        init_args.setdefault("prediction_type", prediction_type.removeprefix("edm_"))
    try:
        scheduler = cls(**init_args)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"anchor: {anchor['class_path']} could not be made: {error}") from error
    # One for networks that predict a flow may still step along its betas.
    by_betas = hasattr(scheduler, "alphas_cumprod") and not own_config(scheduler).get("use_flow_sigmas")
    other = schedule.scaling == "flow" and by_betas
    if other and not given & {"use_flow_sigmas"}:
        raise ValueError(
            f"anchor: {class_name} steps along betas, the model is one of flow matching; use "
            "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler or DPMSolverMultistepScheduler."
        )
    if other or not NoiseSchedule.from_scheduler(scheduler).matches(schedule):
        raise ValueError(
            f"anchor: {class_name} with these init_args has another noise schedule than the model; "
            + (
                "leave out what belongs to the schedule (betas, sigmas, num_train_timesteps): the model's is used."
                if SCHEDULE_ARGUMENTS & given
                else "it cannot be given the model's; use another class."
            )
        )
    if scheduler_prediction_type(scheduler) != prediction_type:
        remedy = "leave prediction_type out of init_args, or " if "prediction_type" in given else ""
        raise ValueError(
            f"anchor: {class_name} is for networks that predict '{scheduler_prediction_type(scheduler)}', the model "
            f"predicts '{prediction_type}'; {remedy}use another class."
        )
    return scheduler


def _schedule_arguments(
    schedule: NoiseSchedule, parameters: Mapping[str, Any], anchor: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments that give a scheduler the model's noise schedule, unless the anchor has betas of its own."""
    given = (anchor.get("init_args") or {}).keys()
    if {"sigma_data", "sigma_min"} <= parameters.keys() and "trained_betas" not in parameters:
        sigmas = torch.exp(-schedule.table)
        return {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1]), "sigma_data": schedule.sigma_data}
    if schedule.scaling == "flow":
        return {"num_train_timesteps": len(schedule.grid) - 1} if "num_train_timesteps" in parameters else {}
    if "trained_betas" not in parameters or given & {"trained_betas", "beta_start", "beta_end", "beta_schedule"}:
        return {}
    alphas_cumprod = torch.sigmoid(2 * schedule.table)
    ratios = alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    found = {"trained_betas": (1 - ratios).tolist(), "num_train_timesteps": len(ratios)}
    # As `NoiseSchedule.from_scheduler` reads it.
    is_continuous = "timestep_type" in parameters and schedule.grid[0] != 0
    return {**found, "timestep_type": "continuous"} if is_continuous else found


def scheduler_steps(scheduler: Any, nfe: int, set_timesteps: Mapping[str, Any] | None = None) -> int:  # noqa: ANN401
    """The number that `set_timesteps` must get so that the network is called `nfe` times.

    Raises:
        ValueError: there is none: Heun's method, for example, makes 2 n - 1 calls.
    """
    counts: dict[int, int] = {}
    reason: ValueError | None = None
    for steps in range(nfe, 0, -1):
        try:
            counts[steps] = _count_calls(scheduler, steps, set_timesteps or {})
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


def _count_calls(scheduler: Any, steps: int, set_timesteps: Mapping[str, Any]) -> int:  # noqa: ANN401
    scheduler = copy.deepcopy(scheduler)
    _set_timesteps(scheduler, steps, set_timesteps)
    return len(scheduler.timesteps)


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
    _verify(coefficients, scheduler, num_steps, set_timesteps, step)
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


# ---------------------------------------------------------------------------------------------- the scheduler's loop


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
    explicit = any(kwargs.get(option) is not None for option in ("sigmas", "timesteps"))
    try:
        scheduler.set_timesteps(**({} if explicit else {"num_inference_steps": num_steps}), **kwargs)
    except Exception as error:  # index errors, assertions, type errors, ...
        raise ValueError(f"{type(scheduler).__name__} cannot be set to {num_steps} steps: {error!r}") from error


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


class NotAGGDMError(ValueError):
    """A sampler that no GGDM can express."""


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


# ------------------------------------------------------------------------------------------------- rows -> coefficients


def _run_on_basis(
    scheduler: Any,  # noqa: ANN401
    num_steps: int,
    set_timesteps: Mapping[str, Any],
    step: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Rows of the states, shape (K + 1, 1 + 2 K), and timesteps, shape (K,), K the number of calls."""
    count = _count_calls(scheduler, num_steps, set_timesteps)
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
    _count_calls(scheduler, num_steps, set_timesteps)  # refuses another number
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


def _verify(
    coefficients: Coefficients,
    scheduler: Any,  # noqa: ANN401
    num_steps: int,
    set_timesteps: Mapping[str, Any],
    step: Mapping[str, Any],
) -> None:
    name, arguments = type(scheduler).__name__, (scheduler, num_steps, set_timesteps, step)
    largest, error = float(coefficients.mu.abs().max()), rollout_error(coefficients, *arguments)
    if not error < TOLERANCE and largest < LARGE_WEIGHT:
        raise NotAGGDMError(
            f"{name} is not linear, or keeps a state that its samples do not show: its own images and those of its "
            f"coefficients differ by {error:.2g} (relative). Use another scheduler or other options."
        )
    # Networks run in float32.
    error = max(error, rollout_error(coefficients, *arguments, dtype=torch.float32))
    if not error < FLOAT32_TOLERANCE:
        raise NotAGGDMError(
            f"{name} with {coefficients.num_steps} calls uses past predictions that its states say too little about: "
            f"written with them, its weights are as large as {largest:.2g}, and its images are off by {error:.2g} "
            "(relative) in float32. Use fewer calls or a lower solver_order."
        )


def rollout_error(
    coefficients: Coefficients,
    scheduler: Any,  # noqa: ANN401
    num_steps: int,
    set_timesteps: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Largest difference between the scheduler's own images and those of the coefficients over the largest pixel.

    Both run from the same noise with the same nonlinear stand-in for a network,
    tanh(x + sin(t / 100)) + x^2 / (4 + x^2), the scheduler in float64, the coefficients in `dtype`.
    """

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        time = torch.as_tensor(timestep).double().flatten()[0]
        return torch.tanh(x + torch.sin(time / 100)) + x.square() / (4 + x.square())

    generator = torch.Generator().manual_seed(0)
    shape = (coefficients.num_steps + 1, 2, 1, 4, 4)
    x_T, *noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    states, _ = run_scheduler(
        scheduler,
        lambda _k, x, t: network(x, t),
        x_T,
        noise,
        num_steps,
        set_timesteps,
        step,
    )
    ours = unroll(network, coefficients, x_T.to(dtype), torch.stack(noise[:-1]).to(dtype) if noise[1:] else None)
    return float((ours - states[-1]).abs().max() / states[-1].abs().max())
