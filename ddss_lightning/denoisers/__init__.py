"""Pretrained diffusion networks behind one interface."""

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.denoisers.diffusers import DiffusersDenoiser
from ddss_lightning.denoisers.mixture import MixtureDenoiser
from ddss_lightning.denoisers.text import TextDenoiser

__all__ = ["Denoiser", "DiffusersDenoiser", "MixtureDenoiser", "TextDenoiser"]
