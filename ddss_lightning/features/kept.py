"""Features of real images on disk: they are the same in every command, and take hours with Inception on a CPU."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.files import default_cache_dir, replacing

FORMAT_VERSION = 1


class KeptFeatures:
    """The output of one feature network for one set of real images, in a file of `default_cache_dir`.

    The file's name is a digest of what the features follow from: the network's `protocol` (class, weights, resizing)
    and dtype, what the images are, and their number. That the code of a network is still the one that made them is seen
    by encoding a few images again, see `SamplingModule.encode_real`. A file that is damaged is made again; one that
    cannot be written is warned of.

    Args:
        network: the feature network.
        images: what the images are, see `ImageDataModule.identity`.
        number: of images.
    """

    def __init__(self, network: FeatureExtractor, images: str, number: int) -> None:
        self.number = number
        self.key = {name: str(value) for name, value in network.protocol().items()}
        self.key |= {"dtype": str(network.dtype), "images": images, "format": str(FORMAT_VERSION)}

    @property
    def path(self) -> Path:
        """Where they are."""
        digest = hashlib.sha256(json.dumps([self.key, self.number], sort_keys=True).encode()).hexdigest()
        return default_cache_dir() / f"features-{digest[:16]}.safetensors"

    def read(self) -> Tensor | None:
        """Features, shape (number, d); None where there are none, or none that can be read."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                found, features = file.metadata() or {}, file.get_tensor("features")
        except (SafetensorError, OSError) as error:
            warnings.warn(
                f"The features kept in '{self.path}' are damaged ({error}); they are made again.", stacklevel=2
            )
            return None
        return features if found == self.key and len(features) == self.number else None

    def write(self, features: Tensor) -> None:
        """Keep features, shape (number, d)."""
        tensors: dict[str, Any] = {"features": features.detach().cpu().contiguous()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                save_file(tensors, partial, metadata=self.key)
        except (SafetensorError, OSError) as error:
            warnings.warn(f"The features of the real images could not be kept in '{self.path}': {error}", stacklevel=2)


def agree(known: Tensor, again: Tensor) -> bool:
    """Whether features, both of shape (n, d), are the same but for rounding."""
    if known.shape != again.shape:
        return False
    known, again = known.double().cpu(), again.double().cpu()
    scale = float(again.square().mean().sqrt())
    return torch.allclose(known, again, rtol=1e-3, atol=1e-3 * scale)
