"""Sample quality in a feature space, as torchmetrics."""

from ddss_lightning.metrics.fid import FrechetDistance, frechet_distance
from ddss_lightning.metrics.inception_score import InceptionScore
from ddss_lightning.metrics.kid import KernelDistance, KernelDistanceSubsets
from ddss_lightning.metrics.prdc import PrecisionRecall
from ddss_lightning.metrics.statistics import ReferenceStatistics, gaussian_moments

__all__ = [
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "KernelDistanceSubsets",
    "PrecisionRecall",
    "ReferenceStatistics",
    "frechet_distance",
    "gaussian_moments",
]
