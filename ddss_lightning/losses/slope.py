"""The gradient of a loss of a whole batch on the memory of a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor


def slope_by_parts(
    outputs_of: Callable[[slice], Sequence[Tensor]],
    parts: Sequence[slice],
    loss_and_slopes: Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    r"""Exact gradient of L(f_1, ..., f_N) with respect to theta where the graph of only one part fits in memory.

    .. math:: \frac{dL}{d\theta} = \sum_{parts} \sum_{i \in part} \frac{\partial L}{\partial f_i} \frac{d f_i}{d \theta}

    First all outputs f without a graph, then dL/df, then part by part the same outputs again with a graph. One part
    alone keeps its graph from the first pass.

    Args:
        outputs_of: what L depends on, of the part of the batch in a slice, such as features, shape (n, d), and images,
            shape (n, C, H, W): the same whenever it is called.
        parts: slices that make up the batch.
        loss_and_slopes: all outputs, shapes (N, ...) -> L and dL/df, shapes (N, ...).
        parameters: theta.

    Returns:
        L, and dL/dtheta for each parameter (zeros where the outputs do not depend on it).
    """
    whole = len(parts) == 1
    with nullcontext() if whole else torch.no_grad():
        made = [outputs_of(part) for part in parts]
    sizes = [len(outputs[0]) for outputs in made]
    loss, slopes = loss_and_slopes([torch.cat(each).detach() for each in zip(*made, strict=True)])
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for part, *own in zip(parts, *(slope.split(sizes) for slope in slopes), strict=True):
        outputs = made[0] if whole else outputs_of(part)
        own = [slope.to(output) for slope, output in zip(own, outputs, strict=True)]
        found = torch.autograd.grad(outputs, parameters, own, allow_unused=True)
        for total, each in zip(gradients, found, strict=True):
            if each is not None:
                total += each
    return loss, gradients
