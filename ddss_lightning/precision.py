"""Float32 as such: without autocast and without TF32, in matrix products and in convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch

# What is set, where it can be read: PyTorch has an older way and a newer one for each part, and refuses to tell the
# older where the two disagree. Settings of several operators come before those of one.
SETTINGS = (
    ("cudnn", "allow_tf32", False),  # by default True, for convolutions
    ("cudnn.conv", "fp32_precision", "ieee"),
    ("cudnn.rnn", "fp32_precision", "ieee"),
)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No autocast, no TF32. For what drowns in rounding: a KID is a small difference of large means.

    What was set before is set again at the end.

    Args:
        device_type: of autocast, such as `cuda`.
    """
    before = [(name, attribute, _get(name, attribute)) for name, attribute, _ in SETTINGS]
    try:
        product, matmul = torch.get_float32_matmul_precision(), None
    except RuntimeError:  # the user has set it in the newer way
        product, matmul = None, torch.backends.cuda.matmul.fp32_precision
    try:
        for (name, attribute, value), (*_, old) in zip(SETTINGS, before, strict=True):
            _set(name, attribute, value, old)
        if product is not None:
            torch.set_float32_matmul_precision("highest")
        else:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for name, attribute, old in before:
            _set(name, attribute, old, old)
        if product is not None:
            torch.set_float32_matmul_precision(product)
        else:
            torch.backends.cuda.matmul.fp32_precision = matmul


def _holder(name: str) -> Any:  # noqa: ANN401
    return attrgetter(name)(torch.backends)


def _get(name: str, attribute: str) -> Any:  # noqa: ANN401
    """A setting of `torch.backends`; None where there is none (PyTorch before 2.9) or where it cannot be told."""
    try:
        return getattr(_holder(name), attribute)
    except (AttributeError, RuntimeError):
        return None


def _set(name: str, attribute: str, value: Any, old: Any) -> None:  # noqa: ANN401
    if old is not None:
        setattr(_holder(name), attribute, value)
