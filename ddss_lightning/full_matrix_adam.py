"""Adam with the whole matrix of second moments, which a few hundred numbers can afford."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class FullMatrixAdam(Optimizer):
    r"""Adam whose second moment is the matrix of all products of gradients, not its diagonal alone.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad V_t = \beta_2 V_{t-1} + (1 - \beta_2) g_t g_t^T, \\
        \theta_t = \theta_{t-1} - \eta \, (\hat V_t + \delta \bar v I)^{-1/2} \, \hat m_t

    Both moments are corrected for their start at zero; v is the mean of the diagonal of the corrected V. This is Adam
    in the eigenvectors of V: along each of them a step is of about the learning rate, however little the gradients vary
    there. The numbers of a sampler need it: states of a chain resemble each other, so that the difference of two
    coefficients moves an image a thousand times less than their sum, and Adam, which sees each coefficient by itself,
    hardly moves along it. The price is an eigenvalue problem a step.

    The parameters of all groups that require a gradient are one vector, in units of the groups' learning rates where
    these differ; betas and damping are those of the first group. Adam moves d numbers that all agree by sqrt(d) eta,
    this by eta: it takes learning rates a few times as large. For hundreds of numbers: the state is a matrix of d x d,
    and its eigenvectors take a second where d is 1400.

    Args:
        params: as in `torch.optim.Adam`.
        lr: eta.
        betas: beta_1 and beta_2.
        damping: delta.

    Raises:
        ValueError: a number outside its range, or a state that is of other parameters.

    References:
        Kingma and Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980. With a full matrix: Agarwal et al.,
        "Efficient full-matrix adaptive regularization", ICML 2019, https://arxiv.org/abs/1806.02958.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        damping: float = 1e-6,
    ) -> None:
        if not lr >= 0 or not damping > 0:
            raise ValueError(f"lr must be at least 0 and damping above 0, got {lr} and {damping}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}.")
        super().__init__(params, {"lr": lr, "betas": betas, "damping": damping})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - whatever the closure returns
        """One step, or none where no parameter has a gradient or all learning rates are 0. Returns what `closure` does.

        Raises:
            ValueError: a gradient that is not finite, before anything has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        learned = [(p, float(group["lr"])) for group in self.param_groups for p in group["params"] if p.requires_grad]
        rate = max((lr for _, lr in learned), default=0.0)
        if not rate or all(p.grad is None for p, _ in learned):
            return loss
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p, _ in learned])
        if not gradient.isfinite().all():
            raise ValueError("FullMatrixAdam was given a gradient that is not finite; leave the step out.")
        units = torch.cat([gradient.new_full((p.numel(),), lr / rate) for p, lr in learned])
        direction = self._direction(gradient, units)
        for (p, lr), part in zip(learned, direction.split([p.numel() for p, _ in learned]), strict=True):
            p.sub_(lr * part.view_as(p))
        return loss

    def _direction(self, gradient: Tensor, units: Tensor) -> Tensor:
        """Takes g, shape (d,), into m and V, and returns (V + damping)^(-1/2) m, corrected, in `units`, shape (d,)."""
        settings, num = self.param_groups[0], len(gradient)
        state = self.state[next(p for group in self.param_groups for p in group["params"])]
        if not state:
            state.update(step=torch.zeros(()), mean=gradient.new_zeros(num), matrix=gradient.new_zeros(num, num))
        if "matrix" not in state or len(state["matrix"]) != num:
            raise ValueError(f"The state of FullMatrixAdam is not of these {num} numbers; go on as it was started.")
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), settings["betas"]
        state["mean"].lerp_(gradient, 1 - beta1)
        state["matrix"].lerp_(gradient.outer(gradient), 1 - beta2)
        # In float64 on the processor: it is small, and not every accelerator has either.
        units, mean, matrix = (value.cpu().double() for value in (units, state["mean"], state["matrix"]))
        values, vectors = torch.linalg.eigh(units[:, None] * matrix * units / (1 - beta2**step))
        damped = values.clamp(min=0) + settings["damping"] * values.mean()
        along = vectors.T @ (units * mean) / (1 - beta1**step)
        # All gradients were zero where all values are.
        direction: Tensor = vectors @ torch.where(damped > 0, along / damped.sqrt(), 0.0)
        return direction.to(gradient)
