"""A learned sampler on disk: where it is, its card and its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ddss_lightning.files import fetch_from_hub, is_hub_name, replacing

CARD_NAME = "sampler.json"
WEIGHTS_NAME = "sampler.safetensors"
# 2: noise that a multistep solver's states hold is taken out of its past predictions, see `ggdm_form`.
FORMAT_VERSION = 2


def saved_sampler(path: str | Path) -> Path:
    """The folder of a saved sampler: `path` itself, or that in the log folder of a fit, or in a folder with one fit.

    Of a hub name `owner/model`: where the hub's cache keeps its two files.

    Raises:
        ValueError: no sampler there, those of several fits, or a hub name whose files cannot be fetched.
    """
    folder = fetch_from_hub(str(path), (CARD_NAME, WEIGHTS_NAME)) if is_hub_name(path) else Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder '{folder}'; give a saved sampler, the log folder of a fit, or a hub name owner/model."
        )
    for candidate in (folder, folder / "sampler"):
        if (candidate / CARD_NAME).is_file():
            return candidate
    runs = [card.parent for card in folder.glob(f"*/sampler/{CARD_NAME}")]
    if len(runs) == 1:
        return runs[0]
    if runs:
        names = ", ".join(f"'{run.parent}'" for run in sorted(runs))
        raise ValueError(f"'{folder}' holds {len(runs)} fits; give one of {names}.")
    raise ValueError(
        f"No sampler in '{folder}': neither '{CARD_NAME}' nor 'sampler/{CARD_NAME}' is there. Give a folder written by "
        "`ddss fit` or `GGDMSampler.save_pretrained`, such as 'checkpoints/digits-ggdm-5'."
    )


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card (`sampler.json`) of a saved sampler, in a folder or on the hub.

    Raises:
        ValueError: no sampler there, a card that is not JSON, or one of a newer format.
    """
    path = saved_sampler(folder) / CARD_NAME
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"The card '{path}' is damaged: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"The card '{path}' is damaged: it is no JSON object.")
    if card.get("format_version") not in (1, FORMAT_VERSION):
        raise ValueError(
            f"'{path}' has format version {card.get('format_version')}, this package reads 1 and {FORMAT_VERSION}; "
            "install the version of ddss_lightning that wrote it."
        )
    missing = [name for name in ("config", "schedule", "base_model", "scores", "nfe") if name not in card]
    if missing:
        raise ValueError(f"The card '{path}' is damaged: it has no '{missing[0]}'.")
    return card


def read_numbers(folder: Path, card: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors (`sampler.safetensors`) that belong to a card.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is damaged.
        ValueError: its numbers are those of another card.
    """
    numbers = (folder / WEIGHTS_NAME).read_bytes()
    # Cards of older versions do not say.
    if card.get("weights_sha256") not in (None, hashlib.sha256(numbers).hexdigest()):
        raise ValueError(
            f"'{WEIGHTS_NAME}' and '{CARD_NAME}' do not belong together. Writing was cut off between the two, or one "
            "was replaced; resume the fit, or save it again."
        )
    return load(numbers)


def write(folder: Path, class_name: str, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write card and numbers into a folder, which is created, parents included.

    Both files are written under other names and then renamed: no half-written file is left under its name. The card
    holds the SHA-256 of the numbers, so that a process that is killed between the two renames cannot leave numbers that
    pass for those of another card.
    """
    numbers = save({name: value.cpu() for name, value in tensors.items()})
    about = {
        "_class_name": class_name,
        "format_version": FORMAT_VERSION,
        "weights_sha256": hashlib.sha256(numbers).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Neither name changes before both files are complete.
    with replacing(folder / CARD_NAME) as card_file, replacing(folder / WEIGHTS_NAME) as numbers_file:
        numbers_file.write_bytes(numbers)
        card_file.write_text(json.dumps({**about, **card}, indent=2) + "\n")
