"""Sample quality in a feature space, as torchmetrics."""

from ddss_lightning.metrics.fid import FrechetDistance, frechet_distance, gaussian_moments
from ddss_lightning.metrics.inception_score import InceptionScore
from ddss_lightning.metrics.kid import KernelDistance

__all__ = ["FrechetDistance", "InceptionScore", "KernelDistance", "frechet_distance", "gaussian_moments"]
