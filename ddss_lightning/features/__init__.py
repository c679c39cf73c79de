"""Feature networks in which images are compared."""

from ddss_lightning.features.adapter import ModuleFeatures
from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.convnet import ConvFeatures
from ddss_lightning.features.denoiser import DenoiserFeatures
from ddss_lightning.features.inception import InceptionFeatures
from ddss_lightning.features.load import load_any
from ddss_lightning.features.pixels import PixelFeatures
from ddss_lightning.features.random import RandomFeatures
from ddss_lightning.features.residual import ResidualFeatures

__all__ = [
    "ConvFeatures",
    "DenoiserFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "ModuleFeatures",
    "PixelFeatures",
    "RandomFeatures",
    "ResidualFeatures",
    "load_any",
]
