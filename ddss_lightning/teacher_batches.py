"""Teacher pairs in the steps of a fit: which ones each step takes, and where their start noise has moved to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.teacher import TeacherPairs


class TeacherBatches:
    """Batches of teacher pairs, of one process of several, from images that are in the cache already.

    Where `teacher.relax_radius` is above 0, the start noise of each pair moves within its ball, see `TeacherPairs`:
    `start` gives x'_T, `plan` takes the gradient by it, and `advance` moves what was planned, so that a step that is
    skipped in between leaves it where it was.

    Args:
        teacher: the pairs.
        denoiser: of the teacher's images.
        batch_size: pairs of a step and process.
        rank: of this process.
        world_size: how many processes there are.
        offsets: x'_T - x_T of all pairs as an earlier fit left them, shape (num_pairs, *state_shape), which this object
            changes from now on; None: 0.
        seed: of the order of the pairs.

    Attributes:
        images: the teacher's, of all pairs.
        offsets: x'_T - x_T of all pairs, in main memory, the same on all processes; None where start noise stays.

    Raises:
        ValueError: images that are not there, see `TeacherPairs.load`; offsets of another number of pairs.
    """

    def __init__(
        self,
        teacher: TeacherPairs,
        denoiser: Denoiser,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        offsets: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.teacher, self.state_shape, self.seed = teacher, denoiser.state_shape, seed
        self.images = teacher.load(denoiser)
        self._own = slice(rank * batch_size, (rank + 1) * batch_size)
        self._global_batch = world_size * batch_size
        self.offsets = self._from(offsets) if teacher.relax_radius else None
        self._planned: tuple[list[int], Tensor] | None = None

    def _from(self, offsets: Tensor | None) -> Tensor:
        shape = (self.teacher.num_pairs, *self.state_shape)
        if offsets is None:
            return torch.zeros(shape)
        if offsets.shape != shape:
            raise ValueError(
                f"The checkpoint's start noise is of {len(offsets)} teacher pairs, num_pairs is {shape[0]}; resume "
                "with the recipe it was started with."
            )
        return offsets

    def start(self, step: int) -> tuple[list[int], Tensor, Tensor]:
        """What this process's batch starts from.

        Returns:
            Indices of the pairs, their x_T or, with a gradient, x'_T, shape (n, *state_shape), and the teacher's
            pixels, shape (n, C, H, W), all in main memory.
        """
        pairs = self._pairs(step)[self._own]
        x_T = self.teacher.noise(pairs, self.state_shape)
        if self.offsets is not None:
            x_T = (x_T + self.offsets[pairs]).requires_grad_()
        return pairs, x_T, self.images[pairs]

    def plan(self, step: int, gradient: Tensor) -> None:
        """What start noise becomes if the step is taken; `gradient` of the loss by the x'_T of `start`."""
        if self.offsets is not None:
            pairs = self._pairs(step)
            self._planned = pairs, self.teacher.moved(self.offsets[pairs[self._own]], gradient)

    def advance(self, gather: Callable[[Tensor], Tensor]) -> None:
        """The step was taken. `gather` concatenates what all processes have: in another epoch a pair is another's."""
        if self._planned is not None and self.offsets is not None:
            (pairs, moved), self._planned = self._planned, None
            self.offsets[pairs] = gather(moved).to(self.offsets)

    def _pairs(self, step: int) -> list[int]:
        """Of all processes."""
        return self.teacher.batch(step, self._global_batch, self.seed)
