"""Lightning data modules."""

from ddss_lightning.data.base import ImageDataModule
from ddss_lightning.data.digits import DigitsDataModule
from ddss_lightning.data.folder import ImageFolderDataModule
from ddss_lightning.data.glyphs import GlyphsDataModule

__all__ = ["DigitsDataModule", "GlyphsDataModule", "ImageDataModule", "ImageFolderDataModule"]
