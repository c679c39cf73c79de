"""Differentiable measures of sample quality."""

from ddss_lightning.losses.kid import KIDLoss, kid

__all__ = ["KIDLoss", "kid"]
