"""Learn a 5 to 25 step sampler for a frozen, pretrained diffusion model.

Names are loaded when first used, so that the sampler works without the cost of lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddss_lightning.callbacks import ImageWriter, Interruption, SampleQuality, SamplerPictures
    from ddss_lightning.coefficients import Coefficients
    from ddss_lightning.data import DigitsDataModule, GlyphsDataModule, ImageDataModule, ImageFolderDataModule
    from ddss_lightning.denoisers import Denoiser, DiffusersDenoiser, MixtureDenoiser, TextDenoiser
    from ddss_lightning.features import (
        ConvFeatures,
        DenoiserFeatures,
        FeatureExtractor,
        InceptionFeatures,
        ModuleFeatures,
        PixelFeatures,
        RandomFeatures,
        ResidualFeatures,
    )
    from ddss_lightning.full_matrix_adam import FullMatrixAdam
    from ddss_lightning.gauss_newton import GaussNewton
    from ddss_lightning.ggdm import GGDMSampler
    from ddss_lightning.losses import FrechetLoss, InFeatures, KIDLoss, SampleLoss, TeacherLoss, WeightedSum
    from ddss_lightning.metrics import (
        FrechetDistance,
        InceptionScore,
        KernelDistance,
        KernelDistanceSubsets,
        PrecisionRecall,
        ReferenceStatistics,
    )
    from ddss_lightning.module import DDSSModule
    from ddss_lightning.sampling import SamplingModule
    from ddss_lightning.schedule import NoiseSchedule
    from ddss_lightning.scheduler import GGDMScheduler
    from ddss_lightning.teacher import TeacherPairs

__version__ = "0.1.0.dev0"

_ROOMS = {
    "callbacks": ("ImageWriter", "Interruption", "SampleQuality", "SamplerPictures"),
    "coefficients": ("Coefficients",),
    "data": ("DigitsDataModule", "GlyphsDataModule", "ImageDataModule", "ImageFolderDataModule"),
    "denoisers": ("Denoiser", "DiffusersDenoiser", "MixtureDenoiser", "TextDenoiser"),
    "features": (
        "ConvFeatures",
        "DenoiserFeatures",
        "FeatureExtractor",
        "InceptionFeatures",
        "ModuleFeatures",
        "PixelFeatures",
        "RandomFeatures",
        "ResidualFeatures",
    ),
    "full_matrix_adam": ("FullMatrixAdam",),
    "gauss_newton": ("GaussNewton",),
    "ggdm": ("GGDMSampler",),
    "losses": ("FrechetLoss", "InFeatures", "KIDLoss", "SampleLoss", "TeacherLoss", "WeightedSum"),
    "metrics": (
        "FrechetDistance",
        "InceptionScore",
        "KernelDistance",
        "KernelDistanceSubsets",
        "PrecisionRecall",
        "ReferenceStatistics",
    ),
    "module": ("DDSSModule",),
    "sampling": ("SamplingModule",),
    "schedule": ("NoiseSchedule",),
    "scheduler": ("GGDMScheduler",),
    "teacher": ("TeacherPairs",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Coefficients",
    "ConvFeatures",
    "DDSSModule",
    "Denoiser",
    "DenoiserFeatures",
    "DiffusersDenoiser",
    "DigitsDataModule",
    "FeatureExtractor",
    "FrechetDistance",
    "FrechetLoss",
    "FullMatrixAdam",
    "GGDMSampler",
    "GGDMScheduler",
    "GaussNewton",
    "GlyphsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageWriter",
    "InFeatures",
    "InceptionFeatures",
    "InceptionScore",
    "Interruption",
    "KIDLoss",
    "KernelDistance",
    "KernelDistanceSubsets",
    "MixtureDenoiser",
    "ModuleFeatures",
    "NoiseSchedule",
    "PixelFeatures",
    "PrecisionRecall",
    "RandomFeatures",
    "ReferenceStatistics",
    "ResidualFeatures",
    "SampleLoss",
    "SampleQuality",
    "SamplerPictures",
    "SamplingModule",
    "TeacherLoss",
    "TeacherPairs",
    "TextDenoiser",
    "WeightedSum",
]


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
