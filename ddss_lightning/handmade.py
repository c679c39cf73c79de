"""The hand-made solvers that learned samplers are compared with, and the ways in which each places its calls."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.solvers import STRIDES

SPACINGS = ("linspace", "leading", "trailing")
# diffusers' `trailing` is the stride `linear` of our own formulas, up to the rounding of timesteps.
OTHERS = ("linspace", "leading")
QUADRATIC = {"timesteps": "quadratic"}
# s in t' = s t / (1 + (s - 1) t), t from 0 to 1: of the noisier times of a flow model. Pipelines take 1 to 5.
SHIFTS = (1.0, 2.0, 3.0, 5.0)


class Placement(NamedTuple):
    """One way of placing the calls of a solver.

    Attributes:
        spacing: its name.
        arguments: of a `GGDMSampler`.
    """

    spacing: str
    arguments: dict[str, Any]


class NoSuchCallsError(ValueError):
    """A solver cannot make the number of network calls that was asked for."""


def _formula(anchor: str, eta: float = 0.0, strides: Sequence[str] = STRIDES) -> list[Placement]:
    return [Placement(stride, {"anchor": anchor, "eta": eta, "stride": stride}) for stride in strides]


def _scheduler(spacing: str, class_name: str, init_args: dict[str, Any], **options: Any) -> Placement:  # noqa: ANN401
    anchor = {"class_path": f"diffusers.{class_name}", "init_args": init_args, **options}
    return Placement(spacing, {"anchor": anchor})


def _imported(
    class_name: str,
    spacings: Sequence[str | None] = SPACINGS,
    sigmas: bool = True,
    quadratic: bool = True,
    **init_args: Any,  # noqa: ANN401
) -> list[Placement]:
    """The ways in which a diffusers scheduler places its calls: all that it offers; None is one without a name.

    `sigmas`: Karras's, and uniform in log-SNR. `quadratic`: our stride of that name too, see `import_anchor`.
    """
    options: list[tuple[str, dict[str, Any]]] = [
        (spacing, {"timestep_spacing": spacing}) if spacing else ("its own", {}) for spacing in spacings
    ]
    options += [(name, {f"use_{name}_sigmas": True}) for name in ("karras", "exponential") if sigmas]
    found = [_scheduler(spacing, class_name, {**init_args, **option}) for spacing, option in options]
    return [*found, _scheduler("quadratic", class_name, init_args, set_timesteps=QUADRATIC)] if quadratic else found


# Of models with noise at whole timesteps. Name -> the ways of placing its network calls; the best is taken.
SOLVERS: dict[str, list[Placement]] = {
    "DDPM": _formula("ddim", eta=1.0) + _imported("DDPMScheduler", OTHERS, False, False, clip_sample=False),
    "DDIM": _formula("ddim") + _imported("DDIMScheduler", OTHERS, False, False, clip_sample=False),
    "Euler": _imported("EulerDiscreteScheduler"),
    "Euler ancestral": _imported("EulerAncestralDiscreteScheduler", sigmas=False),
    "Heun": _imported("HeunDiscreteScheduler"),
    "KDPM2": _imported("KDPM2DiscreteScheduler", quadratic=False),
    "LMS": _imported("LMSDiscreteScheduler"),
    "PNDM": _imported("PNDMScheduler", sigmas=False, quadratic=False, skip_prk_steps=True),
    "DEIS 2": _imported("DEISMultistepScheduler", solver_order=2),
    "DEIS 3": _imported("DEISMultistepScheduler", solver_order=3),
    "DPM-Solver++ 2M": _formula("dpmpp_2m") + _imported("DPMSolverMultistepScheduler", OTHERS, quadratic=False),
    "DPM-Solver++ 3M": _imported("DPMSolverMultistepScheduler", solver_order=3),
    "DPM-Solver++ 2M SDE": _imported("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ 2S": _imported("DPMSolverSinglestepScheduler", (None,), solver_order=2),
    "UniPC 2": _imported("UniPCMultistepScheduler", solver_order=2),
    "UniPC 3": _imported("UniPCMultistepScheduler", solver_order=3),
}


def _shifted(class_name: str, name: str = "flow_shift", **init_args: Any) -> list[Placement]:  # noqa: ANN401
    return [_scheduler(f"shift {shift:g}", class_name, {**init_args, name: shift}) for shift in SHIFTS]


# Solvers of our own: anchor and eta.
FORMULAS = {"DDPM": ("ddim", 1.0), "DDIM": ("ddim", 0.0), "DPM-Solver++ 2M": ("dpmpp_2m", 0.0)}
# Of models with times of another kind: our own formulas, which need none.
OTHER_SOLVERS = {name: _formula(anchor, eta, ["logsnr"]) for name, (anchor, eta) in FORMULAS.items()}
# Of flow matching models. Euler's method is DDIM, here as diffusers' own scheduler places it, ending near the image.
# (Its DEIS does not make its last step there.)
FLOW_SOLVERS: dict[str, list[Placement]] = {
    "DDPM": _formula("ddim", eta=1.0),
    "DDIM": _formula("ddim"),
    "Euler": _shifted("FlowMatchEulerDiscreteScheduler", "shift"),
    "Heun": _shifted("FlowMatchHeunDiscreteScheduler", "shift"),
    "DPM-Solver++ 2M": _formula("dpmpp_2m"),
    "DPM-Solver++ 3M": _shifted("DPMSolverMultistepScheduler", solver_order=3),
    "DPM-Solver++ 2M SDE": _shifted("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ 2S": _shifted("DPMSolverSinglestepScheduler", solver_order=2),
    "UniPC 2": _shifted("UniPCMultistepScheduler", solver_order=2),
    "UniPC 3": _shifted("UniPCMultistepScheduler", solver_order=3),
}


# `exponential` is the stride `logsnr` of our own formulas.
OTHER = ("karras",)


def _edm(class_name: str, spacings: Sequence[str] = ("karras", "exponential"), **init_args: Any) -> list[Placement]:  # noqa: ANN401
    return [_scheduler(name, class_name, {**init_args, "sigma_schedule": name}) for name in spacings]


# Of EDM models (Karras et al. 2022), whose times are logarithms of noise; Euler's method is DDIM.
EDM_SOLVERS: dict[str, list[Placement]] = {
    **OTHER_SOLVERS,
    "DDIM": OTHER_SOLVERS["DDIM"] + _edm("EDMEulerScheduler", OTHER),
    "Euler": _edm("EDMEulerScheduler"),
    "DPM-Solver++ 2M": OTHER_SOLVERS["DPM-Solver++ 2M"] + _edm("EDMDPMSolverMultistepScheduler", OTHER),
    "DPM-Solver++ 3M": _edm("EDMDPMSolverMultistepScheduler", solver_order=3),
    "DPM-Solver++ 2M SDE": _edm("EDMDPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
}


def placements(name: str, schedule: NoiseSchedule, prediction_type: str, nfe: int) -> list[Placement]:
    """The ways in which a solver can place its calls for models of this kind; arguments as of `solver_samplers`.

    Raises:
        NoSuchCallsError: the solver is not for such models.
    """
    kind, solvers = "", SOLVERS
    if schedule.scaling == "flow":
        kind, solvers = "flow matching models", FLOW_SOLVERS
    elif prediction_type.startswith("edm_"):
        kind, solvers = "EDM models", EDM_SOLVERS
    elif schedule.grid[0] != 0:
        kind, solvers = f"models whose times begin at {float(schedule.grid[0]):.4g}", OTHER_SOLVERS
    if name not in solvers:
        raise NoSuchCallsError(f"{name} is not for {kind}; those are {', '.join(solvers)}")
    if solvers is not FLOW_SOLVERS or name not in FORMULAS:
        return solvers[name]
    # Our own formulas take the shifted times as they are: t = T, ..., T / K before the shift.
    anchor, eta = FORMULAS[name]
    times = 1 - torch.arange(nfe, dtype=torch.float64) / nfe
    return solvers[name] + [
        Placement(f"shift {s:g}", {"anchor": anchor, "eta": eta, "timesteps": _shift(times, s, schedule)})
        for s in SHIFTS
        # Without a shift it is the stride `linear`.
        if s != 1
    ]


def _shift(times: torch.Tensor, shift: float, schedule: NoiseSchedule) -> list[float]:
    shifted: list[float] = (float(schedule.grid[-1]) * shift * times / (1 + (shift - 1) * times)).tolist()
    return shifted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers' DPM-Solver of single steps says of each odd number of calls."""
    logger = logging.getLogger("diffusers.schedulers.scheduling_dpmsolver_singlestep")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def solver_samplers(
    name: str, schedule: NoiseSchedule, prediction_type: str, nfe: int
) -> list[tuple[str, GGDMSampler]]:
    """All placements of a solver that make exactly `nfe` network calls: names of their spacings, and samplers.

    Args:
        name: of `SOLVERS`.
        schedule: of the model.
        prediction_type: what its network predicts.
        nfe: how many calls, at least 1.

    Raises:
        NoSuchCallsError: there is none (Heun makes odd numbers of calls only), with the reason of the first one tried.
    """
    found, reason = [], ""
    for spacing, options in placements(name, schedule, prediction_type, nfe):
        arguments: dict[str, Any] = {"learn": (), "prediction_type": prediction_type, **options}
        try:
            with warnings.catch_warnings(), _quiet():
                # Of all placements of its calls the best one is taken.
                warnings.filterwarnings("ignore", message=".* is no good sampler")
                found.append((spacing, GGDMSampler(schedule, nfe, **arguments)))
        except ValueError as error:
            reason = reason or str(error)
    if not found:
        raise NoSuchCallsError(f"{name} does not make {nfe} network calls: {reason}")
    return found
