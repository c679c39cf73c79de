"""Whether coefficients make the images of the scheduler that they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.probing.loop import NotAGGDMError, run_scheduler
from ddss_lightning.unroll import unroll

# A sampler that is linear reproduces its scheduler to 1e-10, or 5e-7 where the scheduler computes in float32.
TOLERANCE = 1e-5
# The same with images in float32, half a grey level of 8-bit pixels; with weights from LARGE_WEIGHT on float64 suffers.
FLOAT32_TOLERANCE = 4e-3
LARGE_WEIGHT = 1e6


def verify(
    coefficients: Coefficients,
    scheduler: Any,  # noqa: ANN401
    num_steps: int,
    set_timesteps: Mapping[str, Any],
    step: Mapping[str, Any],
) -> None:
    """Refuse coefficients that are not the scheduler's, or whose images float32 spoils.

    Raises:
        NotAGGDMError: its own images and those of the coefficients differ, see `rollout_error`.
    """
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
