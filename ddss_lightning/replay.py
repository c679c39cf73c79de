"""The same chain with other coefficients: network calls whose input has not changed are not made again."""

from __future__ import annotations

import torch
from torch import Tensor

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.frozen import check_tensor
from ddss_lightning.unroll import Network, multiply_add, network_times, noises_used, step_weights


class Replay:
    r"""Samples of many sets of coefficients from one noise, each different from the first set in a few numbers.

    Call k sees x_k and its time. Where the first steps have the numbers of the first chain, their states are those of
    the first chain too, and a chain begins at the first call whose time, or the first step whose weights, differ: a
    number of step k (k = 0, ..., K-1) costs K - 1 - k calls, a time of call k costs K - k. For the differences

    .. math:: \frac{\partial x_0}{\partial \theta_p} \approx \frac{x_0(\theta + h e_p) - x_0(\theta)}{h}

    of all numbers of a sampler that is about a third (`mu`) to a half (the others) of K calls each. 2 K states are
    kept.

    Args:
        network: (x_k, timestep) -> output, shapes (N, C, H, W), (N,) -> (N, C, H, W).
        coefficients: of K steps, for the first chain, which is run at once: `x_0` is its end.
        x_T: standard normal, shape (N, C, H, W).
        noise: z_0, ..., z_{K-2}, shape (K - 1, N, C, H, W); it may lie in main memory.
    """

    @torch.no_grad()
    def __init__(self, network: Network, coefficients: Coefficients, x_T: Tensor, noise: Tensor) -> None:
        self.network, self.noise, self.shape = network, noise, x_T.shape
        self.num_calls = 0
        coefficients = coefficients.detach()
        if any(each.stop - each.start > 1 for each in noises_used(coefficients)):
            self.noise = noise.to(x_T)
        self._states = x_T.new_empty(coefficients.num_steps, x_T.numel())
        self._states[0] = (coefficients.init_noise_sigma.to(x_T) * x_T).flatten()
        self._numbers = self._numbers_of(coefficients)
        self.x_0, self._outputs = self._chain(self._numbers, 0, noises_used(coefficients), self._states)

    @torch.no_grad()
    def __call__(self, coefficients: Coefficients) -> Tensor:
        """x_0 with these coefficients (of K steps and the first ones' `init_noise_sigma`), shape (N, C, H, W)."""
        numbers = self._numbers_of(coefficients.detach())
        changed = (numbers != self._numbers).any(1).nonzero()
        if not len(changed):
            return self.x_0
        first = int(changed[0])
        same_time = numbers[first, 0] == self._numbers[first, 0]
        output = self._outputs[first] if same_time else None
        return self._chain(numbers, first, noises_used(coefficients), self._states.clone(), output)[0]

    def _numbers_of(self, coefficients: Coefficients) -> Tensor:
        """One row a step: the time, the weight of the output, those of the states and those of the noise."""
        state_weights, output_weights, noise_weights = (
            weight.to(self._states) for weight in step_weights(coefficients)
        )
        timesteps = network_times(coefficients, self._states)
        return torch.cat([torch.stack([timesteps, output_weights], 1), state_weights, noise_weights], 1)

    def _chain(
        self, numbers: Tensor, first: int, used: list[slice], states: Tensor, output: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x_0 and the outputs from call `first` on, whose output may be known; `states` gets what follows."""
        x, outputs = states[first].view(self.shape), []
        for k in range(first, len(numbers)):
            timestep, output_weight = numbers[k, :2]
            state_weights, noise_weights = numbers[k, 2:].chunk(2)
            if output is None or k > first:
                output = check_tensor(self.network(x, timestep.expand(len(x))), self.network).to(x.dtype)
                self.num_calls += 1
            outputs.append(output)
            x = multiply_add(output_weight * output, state_weights[: k + 1], states[: k + 1])
            if (draws := self.noise[used[k]]).numel():
                x = multiply_add(x, noise_weights[used[k]], draws.to(x).flatten(1))
            if k + 1 < len(numbers):
                states[k + 1] = x.flatten()
        return x, outputs
