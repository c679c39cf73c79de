"""`ddss export` and `ddss inspect`: what can be done with a saved sampler besides running it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddss_lightning.scheduler as scheduler_module
from ddss_lightning.files import make_folder, replacing
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.pictures import mu_figure, save_figure, score_title
from ddss_lightning.saved import CARD_NAME, WEIGHTS_NAME, read_card, saved_sampler
from ddss_lightning.scheduler import GGDMScheduler

# Of a sampler whose card says that it is step 0.
NOTHING_LEARNED = "no step of the fit was better than its start: these are the numbers of the initial solver"
# Of the table of steps.
MARGINALS = "state x_k = a * image + std * noise; noise added: standard deviation of the noise that step k adds"
# The name under which a pipeline's `model_index.json` refers to the copy of `ddss_lightning/scheduler.py`.
MODULE_NAME = "scheduler.py"


def export(sampler: str, output: str, overwrite: bool = False) -> None:
    """Write a sampler as a diffusers scheduler: `scheduler_config.json`, `scheduler.py`, a card, the sampler's files.

    `GGDMScheduler.from_pretrained(output)` and `GGDMSampler.from_pretrained(output)` read it, also from the Hugging
    Face hub, to which the folder can be uploaded as it is. Put into a pipeline's folder as `scheduler/`, with
    `"scheduler": ["scheduler", "GGDMScheduler"]` in `model_index.json`, it also loads without this package, by
    `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.

    Args:
        sampler: a saved sampler, or the log folder of a fit.
        output: a folder; created, parents included.
        overwrite: replace files that are already there.

    Raises:
        ValueError: no sampler, a damaged one, no folder, or one of these files in it and `overwrite` is false.
    """
    source, folder = saved_sampler(sampler), Path(output)
    loaded = GGDMSampler.from_pretrained(source)
    for problem in loaded.coefficients().problems():
        warnings.warn(f"The sampler in '{source}' is no good one: {problem}.", stacklevel=2)
    scheduler = GGDMScheduler.from_sampler(loaded, base_model=read_card(source)["base_model"].get("name"))
    names = (GGDMScheduler.config_name, MODULE_NAME, "README.md", CARD_NAME, WEIGHTS_NAME)
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(f"'{folder}' already holds {', '.join(present)}; give another folder or --overwrite=true.")
    make_folder(folder, "output")
    with (
        replacing(folder / MODULE_NAME) as module,
        replacing(folder / "README.md") as card,
        tempfile.TemporaryDirectory(dir=folder) as made,
    ):
        shutil.copyfile(str(scheduler_module.__file__), module)
        card.write_text(_card(scheduler, read_card(source)))
        scheduler.save_pretrained(made)
        for name in (WEIGHTS_NAME, CARD_NAME):
            shutil.copyfile(source / name, Path(made, name))
        for name in (GGDMScheduler.config_name, WEIGHTS_NAME, CARD_NAME):
            os.replace(Path(made, name), folder / name)
    print(f"wrote {scheduler.num_steps} steps to '{folder}': {', '.join(names)}")


def _card(scheduler: GGDMScheduler, card: dict[str, Any]) -> str:
    base_model = card["base_model"].get("name", "the model it was learned for")
    note = f" ({NOTHING_LEARNED})" if card["scores"].get("training_step") == 0 else ""
    return f"""---
library_name: diffusers
tags: [ddss, ggdm, scheduler]
---

# A learned sampler of {scheduler.num_steps} network calls for `{base_model}`

A `GGDMScheduler` of `ddss_lightning` (Watson et al., "Learning Fast Samplers for Diffusion Models by Differentiating
Through Sample Quality", ICLR 2022). It is good for this model only.

```python
from ddss_lightning import GGDMScheduler

pipeline.scheduler = GGDMScheduler.from_pretrained("THIS_FOLDER")
images = pipeline(num_inference_steps={scheduler.num_steps}).images
```

Without that package: put this folder into the pipeline's as `scheduler/`, write
`"scheduler": ["scheduler", "GGDMScheduler"]` into its `model_index.json`, and load it with `trust_remote_code=True`,
which runs `scheduler.py`.

Scores as the sampler's card has them{note}:

```json
{json.dumps(card["scores"], indent=2)}
```
"""


def inspect(sampler: str, picture: str | None = None, overwrite: bool = False) -> None:
    """Show what a sampler is: network calls, anchor, what was learned, a table of its steps, and what looks wrong.

    Args:
        sampler: a saved sampler, or the log folder of a fit.
        picture: a PNG file for the heat map of mu and nu.
        overwrite: replace a picture that is already there.

    Raises:
        ValueError: no sampler there, or a damaged one; a picture that is no `.png`, or is there already, or
            whose folder cannot be made.
    """
    if picture and Path(picture).suffix.lower() != ".png":
        raise ValueError(f"--picture must be a PNG file, such as mu.png, got '{picture}'.")
    if picture and (Path(picture).is_dir() or (Path(picture).exists() and not overwrite)):
        raise ValueError(f"'{picture}' is already there; give another file or --overwrite=true.")
    source = saved_sampler(sampler)
    loaded, card = GGDMSampler.from_pretrained(source), read_card(source)
    if picture:
        make_folder(Path(picture).parent, "--picture")
    print(loaded, MARGINALS, sep="\n")
    _print_heat_map(loaded)
    base_model = card["base_model"]
    settings = ", ".join(f"{name} {value}" for name, value in base_model.get("settings", {}).items())
    print(f"learned for: {base_model.get('name', 'unknown')}{f' ({settings})' if settings else ''}")
    print(f"scores: {_in_words(card['scores'])}")
    if card["scores"].get("training_step") == 0:
        print(NOTHING_LEARNED)
    if picture:
        save_figure(mu_figure(loaded.coefficients()), picture)
        print(f"heat map: '{picture}'")


def _in_words(scores: Any) -> str:  # noqa: ANN401 - whatever a card holds
    """Nested scores on one line: names without underscores, numbers with four figures, `;` after a group."""
    if isinstance(scores, float):
        return f"{scores:.4g}" if abs(scores) < 1e4 else f"{scores:.0f}"
    if not isinstance(scores, dict):
        return str(scores)
    groups = [f"{score_title(name)}: {_in_words(value)}" for name, value in scores.items() if isinstance(value, dict)]
    plain = [f"{score_title(name)} {_in_words(value)}" for name, value in scores.items() if not isinstance(value, dict)]
    return "; ".join([*groups, *([", ".join(plain)] if plain else [])])


def _print_heat_map(sampler: GGDMSampler) -> None:
    """Mu and nu as coloured cells: red above zero, blue below, in the colours of `mu_figure`."""
    from rich.console import Console
    from rich.text import Text

    coefficients = sampler.coefficients().detach()
    limit = float(max(coefficients.mu.abs().max(), coefficients.nu.abs().max()))
    console = Console()
    if not console.is_terminal:
        return
    lines = Text("\n")
    for k in range(sampler.num_steps):
        lines.append(f"x_{k + 1:<3d}")
        for value in [*coefficients.mu[k, : k + 1].tolist(), None, float(coefficients.nu[k])]:
            if value is None:
                lines.append(" " + "   " * (sampler.num_steps - 1 - k))
                continue
            other = round(255 * (1 - min(1.0, abs(value) / limit) ** 0.5))
            colour = f"rgb(255,{other},{other})" if value > 0 else f"rgb({other},{other},255)"
            lines.append("   ", style=f"on {colour}")
        lines.append("\n")
    lines.append(f"rows: x_(k+1); columns: x_0 ... x_k, then x0_hat; full colour: +-{limit:.3g}\n")
    console.print(lines)


COMMANDS: dict[str, Callable[..., None]] = {"export": export, "inspect": inspect}
