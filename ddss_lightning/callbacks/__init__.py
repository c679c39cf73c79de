"""Lightning callbacks."""

from ddss_lightning.callbacks.interruption import Interruption
from ddss_lightning.callbacks.pictures import SamplerPictures
from ddss_lightning.callbacks.quality import SampleQuality
from ddss_lightning.callbacks.writer import ImageWriter

__all__ = ["ImageWriter", "Interruption", "SampleQuality", "SamplerPictures"]
