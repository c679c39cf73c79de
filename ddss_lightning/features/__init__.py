"""Feature networks in which images are compared."""

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.convnet import ConvFeatures

__all__ = ["ConvFeatures", "FeatureExtractor"]
