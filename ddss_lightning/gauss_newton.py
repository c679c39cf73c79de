"""Gauss-Newton on the Frechet distance: second-order steps for a few hundred numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddss_lightning.losses.frechet import FrechetResidual

TIME_DEGREES = ("time", "logsnr")


@dataclass(frozen=True)
class GaussNewton:
    r"""Levenberg-Marquardt steps on r(theta), |r|^2 the Frechet distance of the sampler, see `FrechetResidual`.

    .. math:: \Delta = -(J^T J + \lambda I)^{-1} J^T r, \qquad J = \partial r / \partial \theta

    The numbers of a sampler act on its images with sensitivities that differ by a factor of 10^4 (eigenvalues of J^T J
    by 10^9): a first-order method must be slow along some or unstable along others. J comes from forward differences,
    one chain for each of the P numbers, all from the same noise, without a backward pass and without stored
    activations; each chain starts at the first network call that the number moves, see `Replay`. Every damping is tried
    on other noise than that of r, which the step has been fitted to, and the step that lowers the distance the most is
    taken; none, if none does.

    Args:
        residual_images: images of r, per process. They hold its sampling noise down, which a step would follow.
        trial_images: images, per process, on which each damping is tried.
        dampings: lambda, in squared features of mean square 1 per squared unit of the parameters.
        difference: step of the differences in corrections.
        time_difference: step of the differences in `time` and `logsnr`.
        rank: of the space of features in which the distance is measured.

    Raises:
        ValueError: an argument that is not positive, or no damping.

    References:
        Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963. That the Frechet distance
        is a sum of squares to second order is used here, not taken from elsewhere.
    """

    residual_images: int = 10_000
    trial_images: int = 10_000
    dampings: tuple[float, ...] = (0.3, 0.03, 0.003)
    difference: float = 2e-3
    time_difference: float = 1e-2
    rank: int = 128

    def __post_init__(self) -> None:
        for name, least in {"residual_images": 2, "trial_images": 2, "rank": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        # NaN is not positive either.
        if not self.dampings or not all(0 < each < torch.inf for each in self.dampings):
            raise ValueError(f"dampings must be positive numbers, got {self.dampings}.")
        if not all(0 < each < torch.inf for each in (self.difference, self.time_difference)):
            raise ValueError(f"Differences must be positive, got {self.difference} and {self.time_difference}.")

    @torch.no_grad()
    def step(
        self,
        parameters: Mapping[str, Tensor],
        distance: FrechetResidual,
        small: Callable[[], Tensor],
        large: Callable[[], Tensor],
        trial: Callable[[], Tensor],
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The step from the present parameters, which are left as they are.

        Args:
            parameters: name -> tensor; changed in place while measuring, and restored.
            distance: to the real features.
            small: moments (`distance.moments`) of a batch of samples with the present values of the parameters, always
                from the same noise, for J.
            large: the same of many samples, for r.
            trial: the same of many samples from other noise, to choose the damping.
            progress: told the number of differences done and to be done.

        Returns:
            name -> step, and what was found: `distance` before the step and `expected_distance` after it, both on the
            noise of the trials (not finite if the samples are not: then there is no step), `damping` (0 if no step is
            taken).
        """
        start = {name: value.clone() for name, value in parameters.items()}
        base = distance.residual(small())
        total = sum(value.numel() for value in start.values())
        try:
            columns = self._differences(parameters, start, base, distance, small, progress)
            return self._choose(parameters, start, torch.stack(columns, 1), distance, large, trial)
        finally:
            self._move(parameters, start, torch.zeros(total, dtype=torch.float64, device=base.device))

    def _differences(
        self,
        parameters: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        base: Tensor,
        distance: FrechetResidual,
        small: Callable[[], Tensor],
        progress: Callable[[int, int], None],
    ) -> list[Tensor]:
        """Columns of J; one that is not finite is zero, so that its number does not move."""
        columns: list[Tensor] = []
        total = sum(value.numel() for value in start.values())
        for name, value in parameters.items():
            size = self.time_difference if name in TIME_DEGREES else self.difference
            for index in range(value.numel()):
                value.view(-1)[index] += size
                columns.append(((distance.residual(small()) - base) / size).nan_to_num(0, 0, 0))
                value.view(-1)[index] = start[name].view(-1)[index]
                progress(len(columns), total)
        return columns

    def _choose(
        self,
        parameters: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        jacobian: Tensor,
        distance: FrechetResidual,
        large: Callable[[], Tensor],
        trial: Callable[[], Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The step with the damping that lowers the distance the most."""
        residual, before = distance.residual(large()), distance.residual(trial())
        found = {"distance": float(before @ before), "damping": 0.0}
        found["expected_distance"] = found["distance"]
        best = torch.zeros_like(jacobian[0])
        if not (residual.isfinite().all() and before.isfinite().all()):
            return _split(start, best), {**found, "distance": torch.nan}
        normal = jacobian.T @ jacobian
        for damping in self.dampings:
            eye = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
            delta = -torch.linalg.solve(normal + damping * eye, jacobian.T @ residual)
            self._move(parameters, start, delta)
            tried = distance.residual(trial())
            if float(tried @ tried) < found["expected_distance"]:
                best, found["damping"], found["expected_distance"] = delta, damping, float(tried @ tried)
        return _split(start, best), found

    @staticmethod
    def _move(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], delta: Tensor) -> None:
        for name, part in _split(start, delta).items():
            parameters[name].copy_(start[name] + part)


def _split(like: Mapping[str, Tensor], flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}
