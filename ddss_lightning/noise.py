"""Random numbers as functions of what they are for, so that any run can be repeated, resumed and split."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key alone, such as ("train", seed, global_step, rank)."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def draw_noise(
    shape: tuple[int, ...], num_steps: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x_T, shape `shape`, then the noise of the steps, shape (num_steps - 1, *shape), standard normal, on the CPU."""
    x_T = torch.randn(shape, generator=generator, dtype=dtype)
    return x_T, torch.randn((num_steps - 1, *shape), generator=generator, dtype=dtype)


def held_out_noise(key: str, indices: list[int], image_shape: tuple[int, ...], num_steps: int) -> tuple[Tensor, Tensor]:
    """Noise of samples by their global index: the same for any batch size and any number of processes.

    The first state of a sample depends on (key, index) only, so samplers of different K start from the same x_T.

    Returns:
        x_T, shape (N, *image_shape), and noise, shape (num_steps - 1, N, *image_shape).
    """
    draws = [draw_noise(image_shape, num_steps, generator_for("held-out", key, index)) for index in indices]
    x_T, noise = zip(*draws, strict=True)
    return torch.stack(x_T), torch.stack(noise, dim=1)
