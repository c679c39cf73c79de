"""Shared parts: the linear DDPM schedule, an exact denoiser, the shipped digits models."""

from pathlib import Path

import pytest
import torch
import torchvision
from diffusers import DDPMScheduler

from ddss_lightning.denoisers import DiffusersDenoiser, MixtureDenoiser
from ddss_lightning.features import ConvFeatures
from ddss_lightning.schedule import NoiseSchedule

ROOT = Path(__file__).parent.parent
DDPM = str(ROOT / "checkpoints" / "digits-ddpm")
FEATURES = str(ROOT / "checkpoints" / "digits-features")
ALEXNET = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="session")
def schedule():
    return NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))


@pytest.fixture(scope="session")
def mixture(schedule):
    """An exact, nonlinear denoiser in float64: five Gaussians of 1x2x2 images."""
    means = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return MixtureDenoiser(means, 0.1, schedule)


@pytest.fixture(scope="session")
def denoiser():
    return DiffusersDenoiser.from_pretrained(DDPM)


@pytest.fixture(scope="session")
def features():
    return ConvFeatures.from_pretrained(FEATURES)


@pytest.fixture
def at_root(monkeypatch):
    """Run in the checkout's root, where the recipes' relative paths hold."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """torch's cache, with random numbers in place of AlexNet's weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), folder / ALEXNET)
    return folder
