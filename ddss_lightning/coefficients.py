r"""The numbers of a K-step sampler, and what Theorem 1 of the paper says of them.

Paper (Watson et al. 2022, https://arxiv.org/abs/2202.05830)   | here
---------------------------------------------------------------|-------------------------------------------
time index t = T (noise), T-1, ..., 0 (image), T = K           | state index k = 0 (noise), 1, ..., K (image)
mu_tu, weight of x_u in the mean of x_t, u > t                  | mu[k, j], weight of x_j in x_{k+1}, j <= k
mu_t0, weight of x_0 in the mean of x_t                         | nu[k], weight of x0_hat in x_{k+1}
sigma_t, noise added                                           | std[k] (sigma is kept for marginals)
a_t, v_t, marginal scale and variance                          | a[k], marginal std v[k]**0.5
x0_hat(x_t, eps), "+PRED" when learned                          | pred[k]: x0_hat = pred[k,0] x_k + pred[k,1] output
time given to the network, "+TIME" when learned                 | timesteps[k]
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    r"""All numbers of a K-step GGDM sampler, float64.

    .. math::
        \hat x_0^{(k)} &= \mathrm{pred}_{k0} x_k + \mathrm{pred}_{k1} \, \mathrm{net}(x_k, \mathrm{timestep}_k) \\
        x_{k+1} &= \sum_{j \le k} \mu_{kj} x_j + \nu_k \hat x_0^{(k)} + \mathrm{std}_k z_k, \qquad k = 0, \dots, K-1

    Args:
        mu: weights of the states, shape (K, K), lower triangular (diagonal included).
        nu: weights of the predicted image, shape (K,).
        std: noise added, shape (K,), at least 0; the last is 0.
        pred: the pair that turns (x_k, network output) into x0_hat, shape (K, 2).
        timesteps: what the network receives, shape (K,), strictly decreasing in every useful sampler.
        prior: (alpha, sigma) of the first state, shape (2,): the marginal from which Theorem 1 starts.
    """

    mu: Tensor
    nu: Tensor
    std: Tensor
    pred: Tensor
    timesteps: Tensor
    prior: Tensor

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
        }
        for name, shape in shapes.items():
            value: Tensor = getattr(self, name)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape} for {num_steps} steps, got {tuple(value.shape)}.")
            if not value.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite: {value.detach()}.")
        if self.mu.triu(1).any():
            raise ValueError("mu must be lower triangular: a state can only depend on the states before it.")
        if self.std[-1] != 0:
            raise ValueError(f"The last step makes the image and adds no noise, got std[-1] = {float(self.std[-1])}.")
        if (self.std < 0).any():
            raise ValueError(f"std must be at least 0, got {self.std.detach()}.")
        return self

    def detach(self) -> Coefficients:
        """The same numbers, cut from the graph and copied."""
        return Coefficients(**{field.name: getattr(self, field.name).detach().clone() for field in fields(self)})

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Marginals q(x_k | x_0) = N(a_k x_0, v_k I) of all states, see `marginals`.

        Returns:
            a and the standard deviation v^(1/2), both of shape (K + 1,).
        """
        return marginals(self.mu, self.nu, self.std, self.prior)


def marginals(mu: Tensor, nu: Tensor, std: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    r"""Theorem 1 in one triangular solve.

    The stacked states are x = M x + nu x_0 + diag(std) z with M strictly lower triangular, hence

    .. math:: a = (I - M)^{-1} \nu, \qquad v = \mathrm{rowsum} \left( ((I - M)^{-1} \mathrm{diag}(std))^2 \right)

    where row 0 is the prior: nu_0 = alpha and std_0 = sigma of the first timestep. Differentiable.

    Args:
        mu: shape (K, K), lower triangular.
        nu: shape (K,).
        std: shape (K,).
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
    noise = torch.cat([prior[1:], std]).double()
    solution = torch.linalg.solve_triangular(
        system, torch.cat([drift[:, None], torch.diag(noise)], dim=1), upper=False, unitriangular=True
    )
    return solution[:, 0], torch.linalg.vector_norm(solution[:, 1:], dim=1)
