"""Small feature networks in a folder: `config.json` with the constructor's arguments, and the weights.

Functions, not a base class: a recipe finds out what `from_pretrained` makes by the class in its return annotation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.files import not_here, replacing

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FeaturesT = TypeVar("FeaturesT", bound=FeatureExtractor)


def save_features(network: FeatureExtractor, config: dict[str, Any], save_directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors` into `save_directory` (created if missing)."""
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_NAME) as partial:
        partial.write_text(json.dumps({"_class_name": type(network).__name__, **config}, indent=2) + "\n")
    with replacing(folder / WEIGHTS_NAME) as partial:
        # Weights may lie channels last.
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, partial)


def load_features(pretrained_path: str | Path, *classes: type[FeaturesT]) -> FeaturesT:
    """Read what `save_features` wrote; the network comes back frozen.

    Args:
        pretrained_path: a local folder.
        classes: what may be there; the first one is meant where the folder does not say.

    Raises:
        ValueError: the folder or one of its files is missing or damaged, or holds a network of another class.
    """
    folder, known = Path(pretrained_path), {cls.__name__: cls for cls in classes}
    names = " or ".join(known)
    if not folder.is_dir():
        raise ValueError(
            f"No feature network in '{folder}': {not_here()}. Give the folder written by `save_pretrained` of {names}."
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"No feature network in '{folder}': '{name}' is missing. Give the folder written by "
                f"`save_pretrained` of {names}, such as 'checkpoints/digits-features'."
            )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        kind = config.pop("_class_name", classes[0].__name__)
        if kind not in known:
            raise TypeError(f"its class is {kind}, not {names}")
        network = known[kind](**config)
        network.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (json.JSONDecodeError, SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(f"The feature network in '{folder}' is damaged or of another kind: {error}") from error
    return network.freeze()
