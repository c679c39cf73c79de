"""A small feature network from its folder, of whatever class it is."""

from __future__ import annotations

from pathlib import Path

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.convnet import ConvFeatures
from ddss_lightning.features.residual import ResidualFeatures
from ddss_lightning.features.saved import load_features


def load_any(pretrained_path: str | Path) -> FeatureExtractor:
    """Read what the `save_pretrained` of any small network wrote; it comes back frozen.

    Args:
        pretrained_path: a local folder, whose `config.json` names the class.

    Raises:
        ValueError: the folder or one of its files is missing or damaged, or holds something else.
    """
    return load_features(pretrained_path, ConvFeatures, ResidualFeatures)
