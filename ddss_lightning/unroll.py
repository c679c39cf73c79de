"""The chain of a sampler, unrolled and differentiable, and what of it is kept for the backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddss_lightning.coefficients import Coefficients

Network = Callable[[Tensor, Tensor], Tensor]
Remat = Literal["none", "denoiser"]
REMATS: tuple[Remat, ...] = get_args(Remat)


def unroll(
    network: Network, coefficients: Coefficients, x_T: Tensor, noise: Tensor | None = None, remat: Remat = "none"
) -> Tensor:
    r"""Run the sampler: x_{k+1} = sum_{j<=k} mu_kj x_j + nu_k x0_hat_k + std_k z_k for k = 0, ..., K-1.

    The weights are combined in float64 and applied in the dtype of `x_T`, under autocast too. Nothing is detached;
    callers choose `torch.no_grad`. All noise comes from outside, so that a rematerialised step sees the same numbers
    twice.

    Args:
        network: (x_k, timestep) -> output, shapes (N, C, H, W), (N,) -> (N, C, H, W).
        coefficients: of K steps.
        x_T: standard normal, shape (N, C, H, W); the first state is `init_noise_sigma` times it.
        noise: z_0, ..., z_{K-2}, shape (K - 1, N, C, H, W), or None where no noise is added.
        remat: `none` keeps all activations; `denoiser` keeps only the input of each network call and computes the
            call again in the backward pass.

    Returns:
        The last state, x_0, shape (N, C, H, W). A warning says if it is not finite.

    Raises:
        ValueError: an unknown `remat`, noise of a wrong shape, or none where the sampler adds noise.
    """
    if remat not in REMATS:
        raise ValueError(f"Unknown remat '{remat}'; choose one of {', '.join(REMATS)}.")
    num_steps = coefficients.num_steps
    if noise is not None and noise.shape != (num_steps - 1, *x_T.shape):
        raise ValueError(f"noise must have shape {(num_steps - 1, *x_T.shape)}, got {tuple(noise.shape)}.")
    if noise is None and (coefficients.std.detach() != 0).any():
        raise ValueError("This sampler adds noise: give `noise`, or call the GGDMSampler, which draws it.")

    # x0_hat is a combination of x_k and the output; folding it into the weights avoids a large x0_hat at high noise.
    output_weight = (coefficients.nu * coefficients.pred[:, 1]).to(x_T)
    state_weights = (coefficients.mu + torch.diag(coefficients.nu * coefficients.pred[:, 0])).to(x_T)
    std = coefficients.std.to(x_T)
    timesteps = coefficients.timesteps.to(device=x_T.device, dtype=torch.promote_types(torch.float32, x_T.dtype))
    states = [coefficients.init_noise_sigma.to(x_T) * x_T]
    for k in range(num_steps):
        timestep = timesteps[k].expand(len(x_T))
        if remat == "denoiser":
            output: Tensor = checkpoint(network, states[k], timestep, use_reentrant=False, preserve_rng_state=False)
        else:
            output = network(states[k], timestep)
        with torch.autocast(x_T.device.type, enabled=False):
            x_next = torch.tensordot(state_weights[k, : k + 1], torch.stack(states), 1)
        x_next = x_next + output_weight[k] * output.to(x_T.dtype)
        if noise is not None and k < num_steps - 1:
            x_next = x_next + std[k] * noise[k]
        states.append(x_next)
    if not states[-1].isfinite().all():
        warnings.warn(
            "The sampler made images that are not finite; look at `print(sampler)` for states that grow out of scale.",
            stacklevel=2,
        )
    return states[-1]
