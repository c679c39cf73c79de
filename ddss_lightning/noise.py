"""Random numbers as functions of what they are for, so that any run can be repeated, resumed and split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_IMAGES, BLOCK_NUMBERS = 1024, 2**20
# Beyond any number of conditions by so much that all of them are equally likely.
INDICES = 2**40


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key alone, such as ("train", seed, global_step, rank).

    It begins in one of 2^32 states, all that torch's CPU generator has: two different keys have the same noise with
    that probability, so that among 10,000 test noises and 10,000 of other use there is such a pair in one case of 43.
    """
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def draw_noise(
    shape: tuple[int, ...], num_steps: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x_T, shape `shape`, then the noise of the steps, shape (num_steps - 1, *shape), standard normal, on the CPU."""
    x_T = torch.randn(shape, generator=generator, dtype=dtype)
    return x_T, torch.randn((num_steps - 1, *shape), generator=generator, dtype=dtype)


def batch_noise(
    key: tuple[int | str, ...], start: int, stop: int, image_shape: tuple[int, ...], num_steps: int
) -> tuple[Tensor, Tensor]:
    """Noise of the images start, ..., stop - 1 of a global batch: the same however it is split over processes.

    Drawn in blocks of at most 1024 images (and about a million numbers per state), each from its own generator: quicker
    than one for each image as in `held_out_noise`. A block that lies partly outside is drawn and cut.

    Returns:
        x_T, shape (N, *image_shape), and noise, shape (num_steps - 1, N, *image_shape), N = stop - start >= 1.
    """
    size = min(BLOCK_IMAGES, max(1, BLOCK_NUMBERS // math.prod(image_shape)))
    blocks = range(start // size, -(-stop // size))
    draws = [draw_noise((size, *image_shape), num_steps, generator_for(*key, block)) for block in blocks]
    first = start - blocks[0] * size
    x_T, noise = torch.cat([x for x, _ in draws]), torch.cat([z for _, z in draws], dim=1)
    return x_T[first : first + stop - start], noise[:, first : first + stop - start]


def held_out_noise(key: str, indices: list[int], image_shape: tuple[int, ...], num_steps: int) -> tuple[Tensor, Tensor]:
    """Noise of samples by their global index: the same for any batch size and any number of processes.

    The first state of a sample depends on (key, index) only, so samplers of different K start from the same x_T.

    Returns:
        x_T, shape (N, *image_shape), and noise, shape (num_steps - 1, N, *image_shape).
    """
    draws = [draw_noise(image_shape, num_steps, generator_for("held-out", key, index)) for index in indices]
    x_T, noise = zip(*draws, strict=True)
    return torch.stack(x_T), torch.stack(noise, dim=1)


def take_turns(key: str, indices: Sequence[int], num: int) -> Tensor:
    """Which of `num` conditions each sample gets: equal numbers of all, in turn, in an order that the key gives.

    The order is random, so that what comes first is a fair sample however classes or prompts are sorted: a batch is
    compared with real images of all kinds. Scores are less noisy than with independent conditions. But n samples of
    C >= 2 conditions share theirs in fewer pairs than independent ones do, by (C - 1) / (C (n - 1)) of all pairs (where
    C divides n), and a KID, a mean over pairs, is lower by that times what the mean kernel within a condition is above
    that between two. A training batch is small, and draws its conditions independently: see `independent_indices`.

    Returns:
        order(key)[index mod num], integers, shape (N,).
    """
    order = torch.randperm(num, generator=generator_for("conditions", key))
    return order[torch.as_tensor(list(indices), dtype=torch.long) % num]


def independent_indices(key: tuple[int | str, ...], start: int, stop: int) -> list[int]:
    """Indices whose conditions the images start, ..., stop - 1 of a training batch are shown, drawn independently.

    The KID is unbiased for independent samples. Of 128 digits whose ten classes take turns it is too low by 0.034, and
    lowest where the means of the classes lie 6 % too far apart (see `take_turns`; features of the shipped classifier).

    Returns:
        Uniform integers in [0, 2^40), the same however a global batch is split over processes.
    """
    blocks = range(start // BLOCK_IMAGES, -(-stop // BLOCK_IMAGES))
    generators = [generator_for(*key, "conditions", block) for block in blocks]
    draws = torch.cat([torch.randint(INDICES, (BLOCK_IMAGES,), generator=each) for each in generators])
    first = start - blocks[0] * BLOCK_IMAGES
    indices: list[int] = draws[first : first + stop - start].tolist()
    return indices
