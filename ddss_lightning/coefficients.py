r"""The numbers of a K-step sampler, and what Theorem 1 of the paper says of them.

Paper (Watson et al. 2022, https://arxiv.org/abs/2202.05830)   | here
---------------------------------------------------------------|-------------------------------------------
time index t = T (noise), T-1, ..., 0 (image), T = K           | state index k = 0 (noise), 1, ..., K (image)
mu_tu, weight of x_u in the mean of x_t, u > t                  | mu[k, j], weight of x_j in x_{k+1}, j <= k
mu_t0, weight of x_0 in the mean of x_t                         | nu[k], weight of x0_hat in x_{k+1}
sigma_t, noise added                                           | std[k] (sigma is kept for marginals)
(not there)                                                    | past_noise[k, j], weight in x_{k+1} of the noise of
                                                               | step j < k: a noisy multistep solver takes it out
a_t, v_t, marginal scale and variance                          | a[k], marginal std v[k]**0.5
x0_hat(x_t, eps), "+PRED" when learned                          | pred[k]: x0_hat = pred[k,0] x_k + pred[k,1] output
time given to the network, "+TIME" when learned                 | timesteps[k]
(1)                                                            | init_noise_sigma: x_0 = init_noise_sigma * noise
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# Beyond these a marginal is reported: states of a size of 10, an image at less than half or more than 1.5 of x_0.
SANE_GROWTH = 10.0
SANE_IMAGE = (0.5, 1.5)
# Of imported numbers: schedulers hold their sigmas in float32.
ROUNDING = 1e-6

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm_epsilon", "edm_v_prediction"]


@dataclass(frozen=True)
class Coefficients:
    r"""All numbers of a K-step GGDM sampler, float64.

    .. math::
        \hat x_0^{(k)} &= \mathrm{pred}_{k0} x_k + \mathrm{pred}_{k1} \, \mathrm{net}(x_k, \mathrm{timestep}_k) \\
        x_{k+1} &= \sum_{j \le k} \mu_{kj} x_j + \nu_k \hat x_0^{(k)} + n_k
        + \sum_{j < k} \mathrm{past}_{kj} n_j, \qquad n_k = \mathrm{std}_k z_k, \quad k = 0, \dots, K-1

    The last sum is not in the paper. A multistep solver uses past predictions, which a GGDM has as combinations of
    the states after them; noise that was added to those states must then be taken out again (see `ggdm_form`).

    Args:
        mu: weights of the states, shape (K, K), lower triangular (diagonal included).
        nu: weights of the predicted image, shape (K,).
        std: noise added, shape (K,), at least 0; the last is 0.
        pred: the pair that turns (x_k, network output) into x0_hat, shape (K, 2).
        timesteps: what the network receives, shape (K,), strictly decreasing in every useful sampler.
        prior: (alpha, sigma) of the first state, shape (2,): the marginal from which Theorem 1 starts.
        init_noise_sigma: scale of the noise that is the first state, shape (): 1 but for samplers that were imported
            from schedulers which scale the network's input.
        past_noise: weights of the noises of earlier steps, shape (K, K), strictly lower triangular. Default: zeros.
    """

    mu: Tensor
    nu: Tensor
    std: Tensor
    pred: Tensor
    timesteps: Tensor
    prior: Tensor
    init_noise_sigma: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    past_noise: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        # A zero without dimensions, the default, stands for all of them.
        if self.past_noise.ndim == 0 and not self.past_noise:
            object.__setattr__(self, "past_noise", torch.zeros_like(self.mu))

    @property
    def num_steps(self) -> int:
        """K, the number of network calls (NFE)."""
        return len(self.nu)

    def validate(self) -> Coefficients:
        """Return `self` if it is a sampler.

        Raises:
            ValueError: a wrong shape, a number that is not finite, a weight of a later state, negative or last noise.
        """
        num_steps = self.num_steps
        shapes = {
            "mu": (num_steps, num_steps),
            "nu": (num_steps,),
            "std": (num_steps,),
            "pred": (num_steps, 2),
            "timesteps": (num_steps,),
            "prior": (2,),
            "init_noise_sigma": (),
            "past_noise": (num_steps, num_steps),
        }
        for name, shape in shapes.items():
            value: Tensor = getattr(self, name)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape} for {num_steps} steps, got {tuple(value.shape)}.")
            if not value.isfinite().all():
                number = int((~value.isfinite()).sum())
                raise ValueError(f"{name} holds numbers that are not finite, {number} of {value.numel()}.")
        if self.mu.triu(1).any():
            raise ValueError("mu must be lower triangular: a state can only depend on the states before it.")
        if self.past_noise.triu().any():
            raise ValueError("past_noise must be strictly lower triangular: it weighs the noise of earlier steps.")
        if self.std[-1] != 0:
            raise ValueError(f"The last step makes the image and adds no noise, got std[-1] = {float(self.std[-1])}.")
        if (self.std < 0).any():
            raise ValueError(f"std must be at least 0, got {self.std.detach()}.")
        return self

    @classmethod
    def from_lists(cls, numbers: Mapping[str, Any]) -> Coefficients:
        """Read what `to_lists` wrote, for example from JSON, and validate it.

        Raises:
            ValueError: a part is missing, unknown or not made of numbers, or it is not a sampler, see `validate`.
        """
        names = {each.name for each in fields(cls)}
        if numbers.keys() - names or (names - {"init_noise_sigma", "past_noise"}) - numbers.keys():
            raise ValueError(f"The numbers of a sampler are {sorted(names)}, got {sorted(numbers)}.")
        try:
            tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"The numbers of a sampler must be (nested) lists of numbers: {error}") from error
        return cls(**tensors).validate()

    def to_lists(self) -> dict[str, Any]:
        """All numbers as nested lists, exact: for JSON. `past_noise` is left out where there is no such noise."""
        unused = set() if (self.past_noise * self.std).any() else {"past_noise"}
        return {each.name: getattr(self, each.name).tolist() for each in fields(self) if each.name not in unused}

    def with_marginal_pair(self, prediction_type: PredictionType, sigma_data: float) -> Coefficients:
        """The same sampler with the pair of Theorem 1: `prediction_pair` at each state's marginal (a_k, v_k^(1/2)).

        The weights of x_k and of the output in each update stay; mu_kk and nu_k are split anew. Not differentiable.
        """
        current = self.detach()
        weights = current.mu + torch.diag(current.nu * current.pred[:, 0])
        output_weight = current.nu * current.pred[:, 1]
        mu, nu, pred = weights.clone(), torch.zeros_like(current.nu), torch.zeros_like(current.pred)
        noise_weights = current.noise_weights()
        # Rows are states; column 0 is the part of x_0 in them, the others are independent noises.
        marginal = weights.new_zeros(self.num_steps + 1, self.num_steps + 2)
        marginal[0, :2] = current.prior
        for k in range(self.num_steps):
            pred[k] = prediction_pair(prediction_type, marginal[k, 0], marginal[k, 1:].norm(), sigma_data)
            nu[k] = output_weight[k] / pred[k, 1]
            mu[k, k] = weights[k, k] - nu[k] * pred[k, 0]
            marginal[k + 1] = mu[k] @ marginal[:-1]
            marginal[k + 1, 0] += nu[k]
            marginal[k + 1, 2:] += noise_weights[k]
        return replace(current, mu=mu, nu=nu, pred=pred)

    def problems(self) -> list[str]:
        """What looks wrong about the marginals of Theorem 1; empty for a sane sampler.

        A learned sampler need not keep the marginals of the noise schedule, but one whose states grow or vanish, or
        whose image is not at the scale of x_0, is most likely broken.
        """
        a, marginal_std = (value.detach() for value in self.marginals())
        found: list[str] = []
        limit = SANE_GROWTH * float(self.prior.detach().max().clamp(min=1))
        for k in range(self.num_steps + 1):
            if not (a[k].isfinite() and marginal_std[k].isfinite()):
                return [*found, f"x_{k}: the marginal is not finite (a = {a[k]:.3g}, std = {marginal_std[k]:.3g})"]
            if max(abs(a[k]), marginal_std[k]) > limit:
                found.append(f"x_{k}: the state grows out of scale (a = {a[k]:.3g}, std = {marginal_std[k]:.3g})")
        low, high = SANE_IMAGE
        if not low < a[-1] < high:
            found.append(f"x_{self.num_steps}: the image is at {a[-1]:.3g} of its scale (a should be near 1)")
        if marginal_std[-1] > high - 1:
            found.append(f"x_{self.num_steps}: noise of std {marginal_std[-1]:.3g} is left in the image")
        return found

    def table(self) -> str:
        """One line a step: time, half log-SNR and marginal of the state, noise added, and the weights of its update."""
        a, marginal_std = (value.detach().tolist() for value in self.marginals())
        lines = [" k  timestep  ½logSNR        a      std  noise added      nu  mu: weights of the states"]
        for k in range(self.num_steps):
            weights = [f"{float(w):+.3f} x_{j}" for j, w in enumerate(self.mu[k, : k + 1].detach()) if abs(w) >= 5e-4]
            # Newest first, and no more than fit a line.
            shown = " ".join(weights[::-1][:6]) + (f" ... {len(weights) - 6} more" if len(weights) > 6 else "")
            logsnr = math.log(a[k] / marginal_std[k]) if a[k] > 0 and marginal_std[k] > 0 else math.nan
            lines.append(
                f"{k:2d}  {float(self.timesteps[k]):8.3f}  {logsnr:+7.3f}  {a[k]:7.4f}  {marginal_std[k]:7.4f}  "
                f"{float(self.std[k]):11.4f}  {float(self.nu[k]):+6.3f}  {shown}"
            )
        lines.append(f"{self.num_steps:2d}     image           {a[-1]:9.4f}  {marginal_std[-1]:7.4f}")
        taken_out = float(self.noise_weights().detach().tril(-1).abs().max())
        if taken_out:
            lines.append(f"noise of earlier steps is weighed by up to {taken_out:.3g} in a step (past_noise)")
        return "\n".join(lines)

    def detach(self) -> Coefficients:
        """The same numbers, cut from the graph and copied."""
        return Coefficients(**{each.name: getattr(self, each.name).detach().clone() for each in fields(self)})

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Marginals q(x_k | x_0) = N(a_k x_0, v_k I) of all states, see `marginals`.

        Returns:
            a and the standard deviation v^(1/2), both of shape (K + 1,).
        """
        return marginals(self.mu, self.nu, self.noise_weights(), self.prior)

    def noise_weights(self) -> Tensor:
        """Weights of z_0, ..., z_{K-1} in each update, shape (K, K): (1 + past_noise) diag(std), lower triangular."""
        return torch.diag(self.std) + self.past_noise * self.std


def marginals(mu: Tensor, nu: Tensor, noise_weights: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    r"""Theorem 1 in one triangular solve.

    The stacked states are x = M x + nu x_0 + N z with M strictly lower triangular, hence

    .. math:: a = (I - M)^{-1} \nu, \qquad v = \mathrm{rowsum} \left( ((I - M)^{-1} N)^2 \right)

    where row 0 is the prior: nu_0 = alpha and N_00 = sigma of the first timestep. Differentiable.

    Args:
        mu: shape (K, K), lower triangular.
        nu: shape (K,).
        noise_weights: shape (K, K), lower triangular; the paper's are diag(std). See `Coefficients.noise_weights`.
        prior: (alpha, sigma), shape (2,).

    Returns:
        a and v^(1/2), shape (K + 1,), float64.

    References:
        Watson et al., "Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality",
        ICLR 2022, https://arxiv.org/abs/2202.05830, Theorem 1.
    """
    num_states = len(nu) + 1
    identity = torch.eye(num_states, dtype=torch.float64, device=mu.device)
    system = identity - torch.nn.functional.pad(mu.double(), (0, 1, 1, 0))
    drift = torch.cat([prior[:1], nu]).double()
    noise = torch.block_diag(prior[1:], noise_weights).double()
    solution = torch.linalg.solve_triangular(
        system, torch.cat([drift[:, None], noise], dim=1), upper=False, unitriangular=True
    )
    return solution[:, 0], torch.linalg.vector_norm(solution[:, 1:], dim=1)


def prediction_pair(prediction_type: PredictionType, alpha: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    r"""The pair p with x0_hat = p_0 x + p_1 output, for x = alpha x_0 + sigma eps.

    - `epsilon`: (1, -sigma) / alpha;
    - `sample`: (0, 1);
    - `v_prediction`: (alpha, -sigma) / (alpha^2 + sigma^2), from v = alpha eps - sigma x_0 (Salimans and Ho 2022,
      https://arxiv.org/abs/2202.00512, appendix D);
    - `flow_prediction`: (1, -sigma) / (alpha + sigma), from v = eps - x_0;
    - `edm_epsilon`, `edm_v_prediction`: (s alpha / w^2, +-s^(1/2) sigma / w) with s = sigma_data^2 and
      w^2 = sigma^2 + s alpha^2, c_skip and c_out of Karras et al. 2022 (https://arxiv.org/abs/2206.00364, table 1) for
      the scaled input c_in (x_0 + sigma_edm eps), for which alpha = c_in, sigma = c_in sigma_edm and w = 1; of a state
      at another scale (learned, say) w is that scale.

    Args:
        prediction_type: what the network predicts.
        alpha: shape (...).
        sigma: shape (...).
        sigma_data: of the schedule, see `NoiseSchedule`; the EDM types alone depend on it.

    Returns:
        Shape (..., 2).

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return torch.stack([torch.ones_like(alpha), -sigma], -1) / alpha[..., None]
    if prediction_type == "sample":
        return torch.stack([torch.zeros_like(alpha), torch.ones_like(alpha)], -1)
    if prediction_type == "v_prediction":
        return torch.stack([alpha, -sigma], -1) / (alpha.square() + sigma.square())[..., None]
    if prediction_type == "flow_prediction":
        return torch.stack([torch.ones_like(alpha), -sigma], -1) / (alpha + sigma)[..., None]
    if prediction_type in ("edm_epsilon", "edm_v_prediction"):
        sign = 1 if prediction_type == "edm_epsilon" else -1
        variance = sigma.square() + sigma_data**2 * alpha.square()
        return torch.stack([sigma_data**2 * alpha / variance, sign * sigma_data * sigma / variance.sqrt()], -1)
    raise ValueError(
        f"Unknown prediction_type '{prediction_type}'; choose one of {', '.join(get_args(PredictionType))}."
    )


def without_rounding(weights: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Zero where a weight is within the rounding of imported numbers, a millionth of the scale."""
    return torch.where(weights.abs() > ROUNDING * scale, weights, 0.0)
