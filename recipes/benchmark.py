"""Learn many samplers at equal cost, and compare them: a sweep of settings x network calls x seeds.

    python recipes/benchmark.py recipes/sweeps/digits.yaml --output runs/benchmark-digits

A sweep is a YAML file: a base recipe, what all its runs change in it (`common`), what each setting changes, and a
budget of network calls for learning, the same for all settings of one number of steps. A call of the network on one
image counts as one, so does a gradient with respect to its input; the calls that make a teacher's images count too.
The plan is printed before the first run. Every run is `ddss fit` with the base recipe and the one in its folder;
finished runs are kept, an interrupted one goes on where it stopped. Then `ddss compare` scores all learned samplers and
the sweep's solvers, on the same noise.

It writes into the output folder: `<setting>/<steps>-<seed>/` (recipe, logs, sampler, `run.json`), `plan.md`,
`learning.md`, `learning.png` (validation FID against network calls), and `compare/` (all steps on the seeds that they
share; `compare-<steps>/` on more seeds, where there are more).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from rich.console import Console

from ddss_lightning.cli import DDSSCommandLine, command_line
from ddss_lightning.compare import Comparison, compare
from ddss_lightning.cost import calls_per_step, teacher_calls
from ddss_lightning.features import load_any
from ddss_lightning.files import replacing
from ddss_lightning.handmade import SOLVERS
from ddss_lightning.pictures import save_figure


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        base: the recipe that all runs start from.
        steps: numbers of network calls of the samplers.
        seeds: of learning, its teacher's pairs too, and of the test noise.
        calls: steps -> network calls of learning, of one image each.
        settings: name -> what it changes in the base recipe.
        common: what all runs change.
        validations: how often an Adam run is validated; Gauss-Newton is after each step.
        only: setting -> steps -> seeds that it is run for, where not for all.
        by_steps: setting -> steps -> what it changes for these besides, such as the solver to start from.
        compare: arguments of `Comparison`: `solvers`, `num_images`, `selection_images`, `judge`.
    """

    base: str
    steps: list[int]
    seeds: list[int]
    calls: dict[int, float]
    settings: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    validations: int = 8
    only: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    by_steps: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    compare: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Sweep:
        """From a file; `extends` names another one beside it, whose values hold where this one has none.

        Raises:
            SystemExit: no such file, or one that is no sweep.
        """
        try:
            content = yaml.safe_load(path.read_text())
            if "extends" in content:
                content = merged(yaml.safe_load((path.parent / content.pop("extends")).read_text()), content)
            sweep = Sweep(**content)
        except (OSError, TypeError, yaml.YAMLError) as error:
            raise SystemExit(f"'{path}' is no sweep: {error}") from None
        sweep.check(path)
        return sweep

    def check(self, path: Path) -> None:
        """Find what would otherwise be found after hours.

        Raises:
            SystemExit: a number of steps without a budget, `only` or `by_steps` of something not there, settings that
                have seeds of their own, two names for one folder, or a comparison that cannot be.
        """

        def refuse(problem: str) -> None:
            raise SystemExit(f"'{path}': {problem}")

        if not Path(self.base).is_file():
            refuse(f"there is no base recipe '{self.base}', seen from '{Path.cwd()}'.")
        slugs: dict[str, str] = {}
        for name in self.settings:
            if name in SOLVERS:
                refuse(f"the setting '{name}' has the name of a solver; give it another one.")
            if slugs.setdefault(slug(name), name) != name or set("=/") & set(name):
                refuse(
                    f"the setting '{name}' needs another name: without '=' and '/', and not like '{slugs[slug(name)]}'."
                )
        for key in ("only", "by_steps"):
            for name, by_steps in getattr(self, key).items():
                unknown = [steps for steps in by_steps if steps not in self.steps]
                if name not in self.settings or unknown:
                    refuse(
                        f"`{key}` names '{name if name not in self.settings else unknown[0]}', which is not in the "
                        "sweep."
                    )
        for steps in self.steps:
            if steps not in self.calls:
                refuse(f"`calls` has no budget for {steps} steps.")
            seeds = {name: tuple(self.seeds_of(name, steps)) for name in self.settings if self.seeds_of(name, steps)}
            if len(set(seeds.values())) > 1:
                refuse(f"at {steps} steps the settings have different seeds: {seeds}; give all the same, or none.")
        try:
            judge = Comparison(**self.compare).judge
            if judge is not None:
                load_any(str(judge))
        except (TypeError, ValueError) as error:
            refuse(f"compare: {error}")

    def seeds_of(self, setting: str, steps: int) -> list[int]:
        """The seeds that a setting is run with."""
        return self.only.get(setting, {}).get(steps, self.seeds)


def slug(setting: str) -> str:
    """The folder of a setting."""
    return re.sub(r"[^a-z0-9]+", "-", setting.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    """One setting at one number of steps with one seed."""

    setting: str
    steps: int
    seed: int
    folder: Path


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings on top of each other; the last one wins."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and "class_path" not in value
            result[key] = merged(result[key], value) if both else value
    return result


def runs_of(sweep: Sweep, output: Path) -> list[Run]:
    """All runs; first all settings of the first steps and seed, so that an unfinished sweep can be looked at."""
    found = []
    for seed in sweep.seeds:
        for steps in sweep.steps:
            for setting in sweep.settings:
                if seed in sweep.seeds_of(setting, steps):
                    found.append(Run(setting, steps, seed, output / slug(setting) / f"{steps}-{seed}"))
    return found


def prepare(run: Run, sweep: Sweep) -> tuple[Path, dict[str, Any]]:
    """Write the recipe of a run, with as many optimiser steps as its budget allows; the recipe and its cost.

    Raises:
        SystemExit: the budget does not suffice for one step, or the folder holds a run of another recipe.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    changes = merged(
        sweep.common,
        sweep.settings[run.setting],
        sweep.by_steps.get(run.setting, {}).get(run.steps, {}),
        {
            "sampler": {"init_args": {"num_steps": run.steps}},
            "model": {"seed": run.seed},
            "quality": {"dirpath": str(run.folder / "sampler"), "overwrite": True},
            "trainer": {
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {
                        "save_dir": str(run.folder), "name": "logs", "version": 0, "default_hp_metric": False
                    },
                }
            },
        },
    )  # fmt: skip
    recipe = run.folder / "recipe.yaml"
    with replacing(run.folder / "draft.yaml") as partial:
        partial.write_text(yaml.safe_dump(changes, sort_keys=False))
    # Each command line reports its seed and devices; the plan would not be seen among them.
    logging.disable(logging.INFO)
    try:
        module = command_line(["-c", sweep.base, "-c", str(run.folder / "draft.yaml")], run=False).model
    finally:
        logging.disable(logging.NOTSET)
        (run.folder / "draft.yaml").unlink()
    each, budget = calls_per_step(module), sweep.calls[run.steps] - teacher_calls(module)
    max_steps = int(budget // each)
    if max_steps < 1:
        raise SystemExit(
            f"{run.setting}, {run.steps} steps: one optimiser step takes {each:,} network calls, the budget leaves "
            f"{budget:,.0f}; raise `calls` or lower the images of a step."
        )
    every = 1 if module.gauss_newton else max(1, max_steps // sweep.validations)
    # The last step is validated too.
    max_steps -= max_steps % every
    changes = merged(changes, {"trainer": {"max_steps": max_steps}, "data": {"init_args": {"steps_per_epoch": every}}})
    if module.teacher is not None:
        # Its start noise and their order, too, else samplers of several seeds are not independent.
        changes = merged(changes, {"model": {"teacher": {"seed": run.seed}}})
    text = yaml.safe_dump(changes, sort_keys=False)
    begun = (run.folder / "logs").exists() or (run.folder / "run.json").exists()
    if begun and recipe.exists() and recipe.read_text() != text:
        raise SystemExit(f"'{run.folder}' holds a run of another recipe; delete it, or give another --output.")
    with replacing(recipe) as partial:
        partial.write_text(text)
    calls = max_steps * each + teacher_calls(module)
    return recipe, {
        "optimiser": "Gauss-Newton" if module.gauss_newton else "full-matrix Adam" if module.full_matrix else "Adam",
        "optimiser_steps": max_steps,
        "calls_per_step": each,
        "network_calls": calls,
        "numbers": sum(value.numel() for value in module.sampler.parameters()),
    }


def learn(run: Run, sweep: Sweep, recipe: Path, cost: dict[str, Any]) -> None:
    """`ddss fit`, unless it is finished; what came out goes to `run.json`."""
    path = run.folder / "run.json"
    if path.exists():
        return
    resumed = (run.folder / "logs" / "version_0" / "checkpoints" / "last.ckpt").exists()
    started = time.time(), time.process_time()
    cli: DDSSCommandLine = command_line(["-c", sweep.base, "-c", str(recipe)], run=False)
    diverged = False
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path="last" if resumed else None)
    except FloatingPointError as error:
        # Its best sampler is kept; the sweep goes on.
        rank_zero_warn(f"{run.folder}: {error}")
        diverged = True
    quality, threads = cli.quality, torch.get_num_threads()
    found = {
        "setting": run.setting,
        "steps": run.steps,
        "seed": run.seed,
        **cost,
        "minutes": (time.time() - started[0]) / 60,
        "processor_minutes": (time.process_time() - started[1]) / 60,
        "resumed": resumed,
        "diverged": diverged,
        "machine": f"{threads} thread{'s' * (threads > 1)}, {platform.machine()}, torch {torch.__version__}",
        "best_step": quality.best_step,
        "validation": quality.best,
        "validation_of_initial_sampler": quality.initial,
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")


def curve(run: Run, calls: int) -> tuple[list[float], list[float]]:
    """Network calls and validation FIDs of a run, from its logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "logs" / "version_0"), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars("val/fid") if "val/fid" in events.Tags()["scalars"] else []
    by_step = {each.step: each.value for each in found}
    return [step * calls for step in by_step], list(by_step.values())


def learning_figure(runs: list[Run], results: list[dict[str, Any]]) -> Figure:
    """Validation FID against network calls, a panel for each number of steps, a line for each run."""
    steps = sorted({run.steps for run in runs})
    settings = list(dict.fromkeys(run.setting for run in runs))
    colours = {name: f"C{index % 10}" for index, name in enumerate(settings)}
    styles = {name: ("-", "--")[index // 10 % 2] for index, name in enumerate(settings)}
    figure = Figure(figsize=(5 * len(steps) + 2.5, 4.5), layout="constrained")
    for axes, num_steps in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        for run, result in zip(runs, results, strict=True):
            if run.steps != num_steps:
                continue
            calls, fids = curve(run, result["calls_per_step"])
            offset = result["network_calls"] - result["optimiser_steps"] * result["calls_per_step"]
            calls = [each + offset for each in calls]
            first = run.seed == min(each.seed for each in runs if each.setting == run.setting)
            axes.plot(
                np.array(calls) / 1e6, fids, styles[run.setting], color=colours[run.setting], linewidth=1,
                label=run.setting if first else None,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("network calls of learning, millions")
        axes.set_ylabel("FID, validation noise")
        axes.set_title(f"{num_steps} network calls", fontsize=10)
        axes.grid(alpha=0.3, which="both")
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside right upper", fontsize=7)
    return figure


def table(runs: list[Run], results: list[dict[str, Any]]) -> str:
    """One line a run."""
    lines = [
        "| calls | setting | seed | numbers | optimiser steps | network calls | validation FID: start, best (step) "
        "| minutes (of a processor) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, row in sorted(zip(runs, results, strict=True), key=lambda pair: (pair[0].steps, pair[0].setting)):
        start, best = row["validation_of_initial_sampler"].get("fid", math.nan), row["validation"].get("fid", math.nan)
        lines.append(
            f"| {run.steps} | {run.setting} | {run.seed} | {row['numbers']} | {row['optimiser_steps']} "
            f"{row['optimiser']} | {row['network_calls'] / 1e6:.2f} M | {start:.2f}, {best:.2f} ({row['best_step']}) | "
            f"{row['minutes']:.1f} ({row['processor_minutes']:.1f}){' since it was resumed' * row['resumed']} |"
        )
    return "\n".join([*lines, ""])


def plan(runs: list[Run], costs: list[dict[str, Any]]) -> str:
    """What will be run."""
    lines = ["| calls | setting | seed | optimiser steps | network calls of learning |", "|---|---|---|---|---|"]
    for run, cost in zip(runs, costs, strict=True):
        lines.append(
            f"| {run.steps} | {run.setting} | {run.seed} | {cost['optimiser_steps']} {cost['optimiser']} | "
            f"{cost['network_calls'] / 1e6:.2f} M |"
        )
    total = sum(cost["network_calls"] for cost in costs) / 1e6
    return "\n".join([*lines, "", f"{len(runs)} runs, {total:.1f} million network calls of learning.", ""])


def worth_comparing(runs: list[Run], done: list[Run]) -> list[Run]:
    """All that is finished, if the settings of each number of steps have the same seeds, else what was asked for.

    So a part of a finished sweep that is run again does not take the place of the whole in its tables.
    """
    seeds: dict[int, dict[str, set[int]]] = {}
    for run in done:
        seeds.setdefault(run.steps, {}).setdefault(run.setting, set()).add(run.seed)
    even = all(len({frozenset(each) for each in mine.values()}) == 1 for mine in seeds.values())
    return done if even else runs


def score(sweep: Sweep, runs: list[Run], output: Path) -> dict[int, Path]:
    """`ddss compare` of all steps on the seeds that all have, then of those with more seeds on all theirs.

    Returns:
        Where the scores of each number of steps are.
    """
    folders: dict[int, Path] = {}
    common = output / "common.yaml"
    with replacing(common) as partial:
        partial.write_text(yaml.safe_dump(merged(sweep.common, {"trainer": {"logger": False}})))
    seeds: dict[int, set[int]] = {}
    for run in runs:
        seeds.setdefault(run.steps, set()).add(run.seed)
    shared = set.intersection(*seeds.values())
    groups = {"compare": (sorted(seeds), shared)} if shared else {}
    groups |= {f"compare-{steps}": ([steps], mine) for steps, mine in sorted(seeds.items()) if mine != shared}
    for name, (steps, mine) in groups.items():
        # Of the first seed are the spacings of the solvers, which is part of what is compared.
        folder = output / (name if min(mine) == min(sweep.seeds) else f"{name}-from-seed-{min(mine)}")
        known = output / "compare" / "scores.json"
        if not (folder / "scores.json").exists() and known.exists() and shared and min(mine) == min(shared):
            # The same protocol: what is measured there is not measured again.
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "scores.json") as partial:
                shutil.copyfile(known, partial)
        samplers = dict.fromkeys(
            f"{run.setting}={run.folder.parent / f'{run.steps}-{{seed}}' / 'sampler'}"
            for run in runs
            if run.steps in steps and run.seed in mine
        )
        cli = command_line(["-c", sweep.base, "-c", str(common)], run=False)
        settings = Comparison(steps=steps, seeds=sorted(mine), samplers=list(samplers), output=folder, **sweep.compare)
        compare(cli.model, cli.datamodule, cli.trainer, settings)
        folders = dict.fromkeys(steps, folder) | folders
    return folders


CARD = """---
license: apache-2.0
library_name: ddss_lightning
base_model: {model}
tags: [unconditional-image-generation, ddss, ggdm]
---
# {name}

A sampler of {steps} network calls for [`{model}`](../{model}), learned by the setting `{setting}` of
[`{sweep}`](../../{sweep}); the model's weights are untouched.
`GGDMSampler.from_pretrained("checkpoints/{name}")` loads it.

![All from the same noise](samples.png)

| sampler | spacing | FID | KID | precision | recall | FID of the judge |
|---|---|---|---|---|---|---|
{rows}

| | |
|---|---|
| scores | noise of seed {seed} that learning never saw, {images} images against {real}; {pixels} |
| features, judge | `{features}`, `{judge}` |
| settings of the model | {settings} |
| learning | {network_calls:.2f} million network calls, {optimiser_steps} steps of {optimiser} |
| time | {minutes:.1f} min, of a processor {processor_minutes:.1f}, {machine} |
| command | `python recipes/benchmark.py {sweep} --output OUT --settings "{setting}" --steps {steps} --seeds {seed}` |
"""


def release(sweep_path: Path, run: Run, compared: Path, folder: Path) -> None:
    """Copy a learned sampler into a folder of `checkpoints/`, with a card and the grid of its number of calls."""
    found = json.loads((run.folder / "run.json").read_text())
    scores = json.loads((compared / "table.json").read_text())
    protocol, rows = scores["protocol"], []
    for row in scores["rows"]:
        if (row["nfe"], row["seed"]) == (run.steps, run.seed):
            name = f"**{row['sampler']}**" if row["sampler"] == run.setting else row["sampler"]
            values = [row.get(key) for key in ("fid", "kid", "precision", "recall", "judge_fid")]
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            rows.append(f"| {name} | {row['spacing']} | {' | '.join(cells)} |")
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(run.folder / "sampler").glob("sampler.*"), compared / f"samples-{run.steps}.png"):
        with replacing(folder / ("samples.png" if source.suffix == ".png" else source.name)) as partial:
            shutil.copyfile(source, partial)
    card = CARD.format(
        name=folder.name, sweep=sweep_path, rows="\n".join(rows), model=Path(protocol["model"].split(" ")[0]).name,
        images=protocol["images"], real=f"{protocol['real_images'].split(' ')[0]} real ones", pixels=protocol["pixels"],
        features=protocol["features"], judge=protocol.get("judge", "none").partition(";")[0],
        settings=", ".join(f"{key} {value}" for key, value in protocol.get("model_settings", {}).items()) or "none",
        **{**found, "network_calls": found["network_calls"] / 1e6},
    )  # fmt: skip
    with replacing(folder / "README.md") as partial:
        partial.write_text(card)


def main() -> None:
    """Plan, learn, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", help="only these numbers of network calls")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--settings", nargs="+", help="only these settings")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--no_compare", action="store_true", help="learn and stop")
    parser.add_argument(
        "--release", nargs=2, metavar=("SETTING", "FOLDER"), help="copy its samplers to FOLDER-<steps>, with cards"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace samplers that were released before")
    given, console = parser.parse_args(), Console()
    if given.output.exists() and not given.output.is_dir():
        parser.error(f"--output: '{given.output}' is no folder; give another one.")
    sweep = Sweep.read(given.sweep)
    if given.release and given.release[0] not in sweep.settings:
        parser.error(f"--release: '{given.release[0]}' is not a setting of '{given.sweep}'.")
    for name in ("steps", "seeds", "settings"):
        unknown = [each for each in getattr(given, name) or [] if each not in getattr(sweep, name)]
        if unknown:
            known = ", ".join(map(str, getattr(sweep, name)))
            parser.error(f"--{name}: '{unknown[0]}' is not in '{given.sweep}', which has {known}.")
    runs = [
        run
        for run in runs_of(sweep, given.output)
        if all(
            getattr(given, names) is None or value in getattr(given, names)
            for names, value in (("steps", run.steps), ("seeds", run.seed), ("settings", run.setting))
        )
    ]
    if not runs:
        parser.error("no setting is run with these --steps, --seeds and --settings; see `only` in the sweep.")
    released = {}
    if given.release:
        first = min(run.seed for run in runs)
        released = {run: Path(f"{given.release[1]}-{run.steps}") for run in runs if run.setting == given.release[0]}
        released = {run: folder for run, folder in released.items() if run.seed == first}
    for folder in released.values():
        if (folder / "README.md").exists() and not given.overwrite:
            parser.error(f"--release: '{folder}' holds a released sampler; give another folder or --overwrite.")
    prepared = [prepare(run, sweep) for run in runs]
    text = plan(runs, [cost for _, cost in prepared])
    given.output.mkdir(parents=True, exist_ok=True)
    if not (given.steps or given.seeds or given.settings):
        with replacing(given.output / "plan.md") as partial:
            partial.write_text(text)
    print(text)  # a table of Markdown: not to be wrapped
    if given.plan:
        return
    for index, (run, (recipe, cost)) in enumerate(zip(runs, prepared, strict=True)):
        console.print(f"run {index + 1} of {len(runs)}: {run.setting}, {run.steps} steps, seed {run.seed}")
        learn(run, sweep, recipe, cost)
        # All that is finished, not only what was asked for this time.
        done = [each for each in runs_of(sweep, given.output) if (each.folder / "run.json").exists()]
        results = [json.loads((each.folder / "run.json").read_text()) for each in done]
        with replacing(given.output / "learning.md") as partial:
            partial.write_text(table(done, results))
    save_figure(learning_figure(done, results), given.output / "learning.png")
    console.print(f"learned: '{given.output / 'learning.md'}', '{given.output / 'learning.png'}'")
    if given.no_compare:
        return
    folders = score(sweep, worth_comparing(runs, done), given.output)
    for run, folder in released.items():
        release(given.sweep, run, folders[run.steps], folder)


if __name__ == "__main__":
    main()
