"""Anchors: the samplers that learning starts from, with what can move them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddss_lightning.coefficients import Coefficients, PredictionType, prediction_pair
from ddss_lightning.probing import build_scheduler, probe, scheduler_steps
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.solvers import (
    Solver,
    anchor_formula,
    ddim_noise_angles,
    first_timestep,
    ggdm_form,
    magnitude,
    solver_form,
    stride_timesteps,
)

# C, B and Q of `solver_form`.
SOLVER_FORM = ("state_weights", "predictions", "past_noise")


class FormulaAnchor(nn.Module):
    """A solver with a differentiable formula: its coefficients follow its half log-SNRs.

    Args:
        solver: `ddim` or `dpmpp_2m`.
        schedule: of the model.
        timesteps: of the network calls, shape (K,), decreasing.
        eta: noise, 0 (deterministic) to 1 (with `ddim`: DDPM).
        prediction_type: what the network predicts.
    """

    logsnrs_0: Tensor
    angles_0: Tensor

    def __init__(
        self, solver: Solver, schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: PredictionType
    ) -> None:
        super().__init__()
        self.solver, self.schedule, self.prediction_type = solver, schedule, prediction_type
        self.register_buffer("logsnrs_0", schedule.logsnr(timesteps), persistent=False)
        self.register_buffer("angles_0", ddim_noise_angles(self.logsnrs_0, eta), persistent=False)
        self.coefficients(*torch.zeros(3))

    def logsnrs(self, log_factors: Tensor) -> Tensor:
        """Half log-SNRs, shape (K,), increasing: the gaps are multiplied by exp(log_factors)."""
        gaps = self.logsnrs_0.diff() * log_factors.exp()
        # Their sums, without `cumsum`, whose order of addition on a GPU is not always the same.
        sums = gaps.new_ones(len(gaps), len(gaps)).tril() @ gaps
        return torch.cat([self.logsnrs_0[:1], self.logsnrs_0[:1] + sums])

    def timesteps(self, log_factors: Tensor, offsets: Tensor) -> Tensor:
        """Times shown to the network, shape (K,): at the half log-SNRs plus offsets, never increasing."""
        return self._timesteps(self.logsnrs(log_factors), offsets)

    def _timesteps(self, logsnrs: Tensor, offsets: Tensor) -> Tensor:
        return self.schedule.timestep(torch.cat([logsnrs[:1], logsnrs[1:] + offsets]).cummax(0).values)

    def coefficients(self, log_factors: Tensor, angles: Tensor, offsets: Tensor) -> Coefficients:
        """The solver's formula at moved half log-SNRs, with moved noise angles, see `anchor_formula`, and times."""
        logsnrs = self.logsnrs(log_factors)
        mu, nu, std, past_noise = anchor_formula(self.solver, self.schedule, logsnrs, self.angles_0 + angles)
        alpha, sigma = self.schedule.scales(logsnrs)
        pred = prediction_pair(self.prediction_type, alpha, sigma, self.schedule.sigma_data)
        timesteps = self._timesteps(logsnrs, offsets)
        prior = torch.stack([alpha[0], sigma[0]])
        return Coefficients(mu, nu, std, pred, timesteps, prior, past_noise=past_noise)


class ImportedAnchor(nn.Module):
    r"""A sampler given by its numbers, for example those of a diffusers scheduler. They stay; corrections move.

    Noise moves so that the marginals stay (where no step adds noise of earlier ones: Q = 0 in `solver_form`, as in
    every solver of diffusers): with E_k = (update without its own noise) - a_{k+1} x0_hat_k, whose standard
    deviation is v_{k+1}^{1/2} cos(theta_k) where std_k = v_{k+1}^{1/2} sin(theta_k),

    .. math::
        x_{k+1} = a_{k+1} \hat x_0^{(k)} + \frac{\cos \theta'_k}{\cos \theta_k} E_k
        + v_{k+1}^{1/2} |\sin \theta'_k| z_k, \qquad \theta'_k = \theta_k + \mathrm{angle}_k,

    written with past predictions (`solver_form`), which the noise that is added between does not change.
    A step that is all noise (theta_k = pi/2, as in LCM) is a stationary point: its noise is not learned.

    Args:
        coefficients: of K steps.
        schedule: of the model.

    Raises:
        ValueError: numbers that are no sampler, see `Coefficients.validate`.
    """

    a: Tensor
    marginal_std: Tensor
    state_weights: Tensor
    predictions: Tensor
    past_noise: Tensor

    def __init__(self, coefficients: Coefficients, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self._names = list(vars(coefficients.validate()))
        for name, value in vars(coefficients.detach()).items():
            self.register_buffer(f"{name}_0", value.double(), persistent=False)
        a, marginal_std = coefficients.detach().marginals()
        self.register_buffer("a", a[1:], persistent=False)
        self.register_buffer("marginal_std", marginal_std[1:-1], persistent=False)
        solver = solver_form(coefficients.detach())
        for name, value in zip(SOLVER_FORM, solver, strict=True):
            self.register_buffer(name, value, persistent=False)
        # Without past predictions there is no noise of earlier steps to be taken out of them.
        self._looks_back = bool(self.predictions.tril(-1).any() or self.past_noise.any())

    def start(self) -> Coefficients:
        """The numbers as they were given."""
        return Coefficients(**{name: getattr(self, f"{name}_0") for name in self._names})

    def logsnrs(self, log_factors: Tensor) -> Tensor:  # noqa: ARG002 - the interface of anchors
        """Half log-SNRs at the network's times, shape (K,)."""
        return self.schedule.logsnr(self.start().timesteps)

    def timesteps(self, log_factors: Tensor, offsets: Tensor) -> Tensor:
        """Times shown to the network, shape (K,): the given ones, moved by offsets of their half log-SNR."""
        timesteps = self.start().timesteps
        if offsets.ndim == 0:
            return timesteps
        logsnrs = self.logsnrs(log_factors)
        moved = self.schedule.timestep(logsnrs[1:] + offsets) - self.schedule.timestep(logsnrs[1:])
        return torch.cat([timesteps[:1], timesteps[1:] + moved])

    def coefficients(self, log_factors: Tensor, angles: Tensor, offsets: Tensor) -> Coefficients:
        """The given numbers with moved noise angles and times."""
        start = replace(self.start(), timesteps=self.timesteps(log_factors, offsets))
        if angles.ndim == 0:
            return start
        # A state without noise stays without: its angle is 0.
        share = start.std[:-1] / torch.where(self.marginal_std > 0, self.marginal_std, 1.0)
        angles_0 = torch.asin(share.clamp(max=1))
        moved = angles_0 + angles
        # A step that is all noise has no other part to stretch.
        ratio = torch.where(angles_0.cos() > 1e-6, moved.cos() / angles_0.cos(), 1.0)
        std = self.marginal_std * magnitude(moved.sin())
        ratio = torch.nn.functional.pad(ratio, (0, 1), value=1.0)[:, None]
        mu_0, _, past_0 = ggdm_form(self.state_weights, self.predictions, self.past_noise)
        mu, nu, past = ggdm_form(
            ratio * self.state_weights,
            ratio * self.predictions + torch.diag((1 - ratio[:, 0]) * self.a),
            ratio * self.past_noise,
        )
        # What has not moved stays to the last bit.
        past = torch.where(start.std != 0, start.past_noise + past - past_0, past)
        return replace(
            start,
            mu=start.mu + mu - mu_0,
            nu=nu,
            std=torch.nn.functional.pad(std, (0, 1)),
            past_noise=past if self._looks_back else start.past_noise,
        )


def given_options(anchor: Mapping[str, Any]) -> dict[str, Any]:
    """An anchor without the options that are null.

    Raises:
        ValueError: `init_args`, `set_timesteps` or `step` that are no mapping.
    """
    # The command line makes 'None' of the null in `--sampler.anchor.set_timesteps=null`.
    given = {name: value for name, value in anchor.items() if value not in (None, "None", "null")}
    for name in ("init_args", "set_timesteps", "step"):
        if not isinstance(given.get(name, {}), Mapping):
            raise ValueError(
                f"anchor: {name} must be a mapping from arguments to values, such as {{num: 3}}, got {given[name]!r}."
            )
    return given


def import_anchor(
    anchor: Mapping[str, Any], schedule: NoiseSchedule, num_steps: int, prediction_type: PredictionType
) -> Coefficients:
    """The numbers of an anchor that is given as a mapping: `coefficients`, or a diffusers scheduler to be probed.

    Args:
        anchor: `coefficients` (what `Coefficients.to_lists` gives), or `class_path` of a diffusers scheduler with
            `init_args` and, if needed, `set_timesteps` and `step`, the further arguments of these methods. The
            `timesteps` of `set_timesteps` can be the name of a stride, see `stride_timesteps`; a scheduler that takes
            none, but steps from sigma to sigma, is given them all the same.
        schedule: of the model. A scheduler gets its betas.
        num_steps: K, the number of network calls.
        prediction_type: what the network predicts.

    Raises:
        ValueError: neither, a scheduler that cannot be imported or cannot make K calls, or numbers of another K.
    """
    if "coefficients" in anchor:
        coefficients = Coefficients.from_lists(anchor["coefficients"])
        if coefficients.num_steps != num_steps:
            raise ValueError(f"anchor: coefficients of {coefficients.num_steps} steps, but num_steps is {num_steps}.")
        return coefficients
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    scheduler = build_scheduler(anchor, schedule, prediction_type)
    options = {name: dict(anchor.get(name) or {}) for name in ("set_timesteps", "step")}
    if isinstance(options["set_timesteps"].get("timesteps"), str):
        first = first_timestep(schedule, prediction_type)
        options["set_timesteps"] = _strided(options["set_timesteps"], scheduler, schedule, num_steps, first)
    return probe(scheduler, scheduler_steps(scheduler, num_steps, options["set_timesteps"]), **options)


def _strided(
    set_timesteps: dict[str, Any],
    scheduler: Any,  # noqa: ANN401
    schedule: NoiseSchedule,
    num_steps: int,
    first: float,
) -> dict[str, Any]:
    """The arguments with timesteps, whole numbers, in place of the name of their stride: as many as make K calls.

    Raises:
        ValueError: an unknown stride, or one whose timesteps are not whole numbers; a scheduler that takes no timesteps
            or cannot make K calls.
    """
    if schedule.grid[0] != 0:
        raise ValueError(
            f"anchor: strides are for timesteps from 0 on, these begin at {float(schedule.grid[0]):.4g}; leave "
            "`timesteps` out. Of an EDM scheduler `sigma_schedule: karras` or `exponential` places the calls."
        )
    reasons: list[ValueError] = []
    for steps in range(num_steps, 0, -1):
        placed = stride_timesteps(schedule, steps, set_timesteps["timesteps"], first).round().long().tolist()
        try:
            if len(set(placed)) < steps:
                raise ValueError(
                    f"anchor: a scheduler's timesteps are whole numbers, and the stride '{set_timesteps['timesteps']}' "
                    f"has no {steps} different ones; use fewer steps, another stride, or the anchors dpmpp_2m or ddim."
                )
            scheduler_steps(scheduler, num_steps, {**set_timesteps, "timesteps": placed})
        except ValueError as error:
            reasons.append(error)
            continue
        return {**set_timesteps, "timesteps": placed}
    raise reasons[0]
