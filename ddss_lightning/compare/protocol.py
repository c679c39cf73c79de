"""What has to be known to repeat the figures of a comparison."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

from lightning.pytorch import Trainer

from ddss_lightning.compare.settings import Comparison
from ddss_lightning.data import ImageDataModule
from ddss_lightning.features import FeatureExtractor
from ddss_lightning.sampling import SamplingModule

CONDITIONS = "all in turn, in a random order that follows from the key of the noise; a sample's from its index"


def protocol_of(
    module: SamplingModule,
    datamodule: ImageDataModule,
    trainer: Trainer,
    settings: Comparison,
    judge: FeatureExtractor | None = None,
) -> dict[str, Any]:
    """What has to be known to repeat the figures."""
    loader: Any = datamodule.real_dataloader()
    protocol = {
        "images": settings.num_images,
        "noise": "test/SEED, by index: the same for every sampler, unseen in learning and in the choice of spacings",
        "spacings_chosen_on": f"{settings.selection_images} images of validation/{settings.seeds[0]}, by FID",
        "real_images": f"{len(loader.dataset)} ({_digest(datamodule)})",
        "model": f"{module.denoiser.name} ({module.denoiser.fingerprint()}){_code(module.denoiser)}",
        **({"model_settings": module.denoiser.settings()} if module.denoiser.settings() else {}),
        **({"conditions": CONDITIONS} if module.denoiser.settings().get("guidance_scale") is not None else {}),
        "precision": str(trainer.precision),
        "features": module.features.identity(),
        "resize": module.features.protocol()["resize"],
        "pixels": "clamped to [-1, 1], rounded to 256 levels",
    }
    if judge is None:
        return protocol
    chosen = "spacings are chosen by the FID of the features above, not by its own"
    return {**protocol, "judge": f"{judge.identity()}; {chosen}"}


def _code(denoiser: object) -> str:
    """Of a class outside this package the source: its scores are others when its `forward` has been mended."""
    try:
        source = inspect.getsource(type(denoiser))
    except (OSError, TypeError):
        return ""
    own = type(denoiser).__module__.partition(".")[0] == __name__.partition(".")[0]
    return "" if own else f", code {hashlib.sha256(source.encode()).hexdigest()[:16]}"


def _digest(datamodule: ImageDataModule) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all real images."""
    digest = hashlib.sha256()
    for images in datamodule.real_dataloader():
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
