"""The gradient of a loss of a whole batch on the memory of a part of it, and without rounding to fewer digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def slope_by_parts(
    features_of: Callable[[slice], Tensor],
    parts: Sequence[slice],
    loss_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    r"""Exact gradient of L(f_1, ..., f_N) with respect to theta where the graph of only one part fits in memory.

    .. math:: \frac{dL}{d\theta} = \sum_{parts} \sum_{i \in part} \frac{\partial L}{\partial f_i} \frac{d f_i}{d \theta}

    First all features without a graph, then dL/df, then part by part the same features again with a graph.

    Args:
        features_of: features of the part of the batch in a slice, shape (n, d): the same whenever it is called.
        parts: slices that make up the batch.
        loss_and_slope: all features, shape (N, d) -> L and dL/df, shape (N, d).
        parameters: theta.

    Returns:
        L, and dL/dtheta for each parameter (zeros where the features do not depend on it).
    """
    with torch.no_grad():
        features = [features_of(part) for part in parts]
    loss, slope = loss_and_slope(torch.cat(features))
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for part, own in zip(parts, slope.split([len(each) for each in features]), strict=True):
        output = features_of(part)
        found = torch.autograd.grad(output, parameters, own.to(output), allow_unused=True)
        for total, each in zip(gradients, found, strict=True):
            if each is not None:
                total += each
    return loss, gradients


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in float32 as such: no autocast, no TF32. A KID is a small difference of large means.

    PyTorch has two ways of setting this and refuses to mix them: the one that the user took is taken.
    """
    try:
        before = torch.get_float32_matmul_precision()
        change = torch.set_float32_matmul_precision
        highest = "highest"
    except RuntimeError:
        before, highest = torch.backends.cuda.matmul.fp32_precision, "ieee"

        def change(precision: str) -> None:
            torch.backends.cuda.matmul.fp32_precision = precision

    change(highest)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        change(before)
