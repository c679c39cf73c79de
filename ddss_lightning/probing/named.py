"""The scheduler of diffusers that a recipe names, along the noise schedule of a model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ddss_lightning.schedule import NoiseSchedule, own_config, scheduler_prediction_type
from ddss_lightning.suggestions import closest

# Arguments of schedulers that say which noise schedule they step along.
BETAS = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale"}
SIGMAS = {"use_flow_sigmas", "flow_shift", "shift", "sigma_min", "sigma_max", "sigma_data"}
SCHEDULE_ARGUMENTS = {"num_train_timesteps", *BETAS, *SIGMAS}


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
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in given:
        if name not in parameters and not takes_any:
            close = closest(str(name), list(parameters))
            meant = f"; did you mean {close}?" if close else f"; it has {', '.join(list(parameters)[1:])}."
            raise ValueError(f"anchor: {anchor['class_path']} has no argument '{name}'{meant}")
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
                else "it cannot be given the model's; use another class, or dpmpp_2m with stride: logsnr, which is for "
                "any model."
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
