"""The chain of a sampler: unrolled and differentiable, or sampled with next to no work besides the network."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.frozen import check_tensor
from ddss_lightning.remat import Offload, Remat, measured_call

Network = Callable[[Tensor, Tensor], Tensor]


def unroll(
    network: Network, coefficients: Coefficients, x_T: Tensor, noise: Tensor | None = None, remat: str | Remat = "none"
) -> Tensor:
    r"""Run the sampler of `Coefficients`: x_{k+1} = sum_{j<=k} (mu_kj x_j + noise_weights_kj z_j) + nu_k x0_hat_k.

    The weights are combined in float64 and applied in the dtype of `x_T`, under autocast too. Nothing is detached but
    the time of the first call: its input is pure noise, no sampler learns it, and without it that call needs no
    backward pass. Callers choose `torch.no_grad`; then each step is one multiply-add over the stacked states. All
    noise comes from outside, so that a rematerialised step sees the same numbers twice.

    Args:
        network: (x_k, timestep) -> output, shapes (N, C, H, W), (N,) -> (N, C, H, W).
        coefficients: of K steps.
        x_T: standard normal, shape (N, C, H, W); the first state is `init_noise_sigma` times it.
        noise: z_0, ..., z_{K-2}, shape (K - 1, N, C, H, W), or None where no noise is added. It may lie in main
            memory: each step fetches its own, or, where steps look back (`past_noise`), all is fetched once.
        remat: what is kept for the backward pass, a `Remat` or its name. `none` keeps all activations; `denoiser` keeps
            only the input of each network call but the last, and computes the call again; `every(n)` and
            `budget(bytes)` lie between; `+offload` keeps the states in main memory.

    Returns:
        The last state, x_0, shape (N, C, H, W). A warning says if it is not finite.

    Raises:
        ValueError: an unknown `remat`, noise of a wrong shape, or none where the sampler adds noise; a network that
            does not return a tensor.
    """
    policy = Remat.parse(remat)
    num_steps = coefficients.num_steps
    if noise is not None and noise.shape != (num_steps - 1, *x_T.shape):
        raise ValueError(f"noise must have shape {(num_steps - 1, *x_T.shape)}, got {tuple(noise.shape)}.")
    if noise is None and (coefficients.std.detach() != 0).any():
        raise ValueError("This sampler adds noise: give `noise`, or call the GGDMSampler, which draws it.")
    chain = _differentiable if torch.is_grad_enabled() else _fused
    x_0 = chain(network, coefficients, x_T, noise, policy)
    # The sum is not finite if one number is not (or if they are as large as that), and is quicker to come by.
    if not x_0.detach().sum(dtype=torch.promote_types(x_0.dtype, torch.float32)).isfinite():
        warnings.warn(
            "The sampler made images that are not finite; look for NaN in the model's output, and at `print(sampler)` "
            "for states that grow out of scale.",
            stacklevel=2,
        )
    return x_0


def step_weights(coefficients: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the states, shape (K, K), of the network's outputs, (K,), and of the noise, (K, K), float64.

    x0_hat is a combination of x_k and the output; folding it into the weights avoids a large x0_hat at high noise.
    """
    nu, pred = coefficients.nu, coefficients.pred
    return coefficients.mu + torch.diag(nu * pred[:, 0]), nu * pred[:, 1], coefficients.noise_weights()


def noises_used(coefficients: Coefficients) -> list[slice]:
    """Of z_0, ..., z_{K-2}, what each step looks at: its own, and those before it from the first with a weight."""
    last, std = coefficients.num_steps - 1, coefficients.std
    # A weight of zero that can be learned has a slope.
    weights = coefficients.past_noise.detach() if std.requires_grad else (coefficients.past_noise * std).detach()
    if coefficients.past_noise.requires_grad:
        weights = torch.ones_like(weights)
    past = weights.tolist()
    firsts = [next((j for j in range(k) if past[k][j]), k) for k in range(last + 1)]
    return [slice(first, min(k + 1, last)) for k, first in enumerate(firsts)]


def network_times(coefficients: Coefficients, x_T: Tensor) -> Tensor:
    """Times of the calls, shape (K,), on the device of the images and not in half precision."""
    return coefficients.timesteps.to(device=x_T.device, dtype=torch.promote_types(torch.float32, x_T.dtype))


def _differentiable(
    network: Network, coefficients: Coefficients, x_T: Tensor, noise: Tensor | None, policy: Remat
) -> Tensor:
    """What autograd keeps of a step is x_{k+1}, and the activations of the calls that are not computed again."""
    num_steps, num = coefficients.num_steps, len(x_T)
    state_weights, output_weights, noise_weights = (weight.to(x_T) for weight in step_weights(coefficients))
    used = noises_used(coefficients)
    timesteps = network_times(coefficients, x_T)
    times = [timesteps[k].expand(num) for k in range(num_steps)]
    times[0] = times[0].detach()
    offload = Offload() if policy.offload else None
    keep = offload.hold if offload else lambda state: state

    def weighted_output(x: Tensor, timestep: Tensor, weight: Tensor) -> Tensor:
        # The product is computed again with the call: its gradient needs the output, which then is not kept either.
        return weight * check_tensor(network(x, timestep), network).to(x_T.dtype)

    with offload or contextlib.nullcontext():
        states, noises = [keep(coefficients.init_noise_sigma.to(x_T) * x_T)], []
        first: list[Tensor] = []

        def bytes_per_call() -> int:
            output, size = measured_call(network, states[0], times[0])
            first.append(output)
            return size

        recomputed = policy.recomputed(num_steps, bytes_per_call)
        for k in range(num_steps):
            arguments = (states[k], times[k], output_weights[k])
            if k == 0 and first and not states[0].requires_grad:
                update = output_weights[0] * first[0].to(x_T.dtype)
            elif recomputed[k] and (states[k].requires_grad or times[k].requires_grad):
                update = checkpoint(weighted_output, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                update = weighted_output(*arguments)
            x_next = _Combine.apply(update, state_weights[k, : k + 1], *states)
            if noise is not None:
                noises += [keep(z.to(x_T)) for z in noise[k : k + 1]]
                if noises[used[k]]:
                    x_next = _Combine.apply(x_next, noise_weights[k, used[k]], *noises[used[k]])
            states.append(keep(x_next))
    return states[-1]


class _Combine(torch.autograd.Function):
    """update + sum_j w_j x_j. A stack of the states serves the forward pass only; autograd keeps the states."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, weights: Tensor, *states: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weights, *states)
        return multiply_add(update, weights, torch.stack(states).flatten(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weights, *states = ctx.saved_tensors
        _, *needed = ctx.needs_input_grad
        slopes = torch.stack([(gradient * state).sum() for state in states]) if needed[0] else None
        return gradient, slopes, *(w * gradient if need else None for w, need in zip(weights, needed[1:], strict=True))


def multiply_add(update: Tensor, weights: Tensor, states: Tensor) -> Tensor:
    """update, shape (N, C, H, W), + weights^T states, shapes (k,), (k, N C H W), in full precision."""
    with torch.autocast(update.device.type, enabled=False):
        return torch.addmv(update.flatten(), states.T, weights).view(update.shape)


def _fused(network: Network, coefficients: Coefficients, x_T: Tensor, noise: Tensor | None, _policy: Remat) -> Tensor:
    """The same numbers without a gradient: the states lie stacked in memory, and each is written where it stays."""
    num_steps, num = coefficients.num_steps, len(x_T)
    state_weights, output_weights, noise_weights = (weight.to(x_T) for weight in step_weights(coefficients))
    used = noises_used(coefficients)
    timesteps = network_times(coefficients, x_T)
    states, x_0 = x_T.new_empty(num_steps, *x_T.shape), x_T.new_empty(x_T.shape)
    stacked = states.flatten(1)
    if noise is not None and any(each.stop - each.start > 1 for each in used):
        noise = noise.to(x_T)
    torch.mul(coefficients.init_noise_sigma.to(x_T), x_T, out=states[0])
    for k, x_next in enumerate((*states[1:], x_0)):
        output = check_tensor(network(states[k], timesteps[k].expand(num)), network)
        update = output_weights[k] * output.to(x_T.dtype)
        # As `multiply_add`: what has an `out` does not go through autocast.
        torch.addmv(update.flatten(), stacked[: k + 1].T, state_weights[k, : k + 1], out=x_next.view(-1))
        if noise is not None and (draws := noise[used[k]]).numel():
            x_next.view(-1).addmv_(draws.to(x_T).flatten(1).T, noise_weights[k, used[k]])
    return x_0
