"""Differentiable measures of sample quality."""

from ddss_lightning.losses.base import SampleLoss, Samples
from ddss_lightning.losses.elsewhere import InFeatures
from ddss_lightning.losses.kid import KIDLoss, kid
from ddss_lightning.losses.moments import FrechetLoss
from ddss_lightning.losses.teacher import TeacherLoss
from ddss_lightning.losses.weighted import WeightedSum

__all__ = ["FrechetLoss", "InFeatures", "KIDLoss", "SampleLoss", "Samples", "TeacherLoss", "WeightedSum", "kid"]
