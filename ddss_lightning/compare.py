"""`ddss compare`: many samplers of one model, judged alike."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddss_lightning.callbacks import SampleQuality
from ddss_lightning.callbacks.quality import check_judge
from ddss_lightning.data import ImageDataModule
from ddss_lightning.features import FeatureExtractor, load_any
from ddss_lightning.files import replacing
from ddss_lightning.ggdm import GGDMSampler, read_card, saved_sampler
from ddss_lightning.handmade import SOLVERS, NoSuchCallsError, solver_samplers
from ddss_lightning.pictures import comparison_figure, curves_figure, save_figure, thumbnails
from ddss_lightning.sampling import SamplingModule
from ddss_lightning.signals import agreed, noted

GRID_IMAGES = 64
DEFAULT_SOLVERS = ("DDPM", "DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC 3")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        steps: numbers of network calls.
        solvers: names of `SOLVERS`; `["all"]` for all of them.
        samplers: folders of learned samplers, each as `FOLDER` or `LABEL=FOLDER`. Samplers of one label are one curve,
            each of another number of calls. `{seed}` in a folder stands for the seed of the noise: what was learned
            with a seed is scored on the test noise of that seed. A folder with `=` in its name is `./FOLDER`.
        judge: a second feature network, or the folder of one, in which the same images are scored too; it chooses
            nothing.
        seeds: of the noise; with the first one the spacings of solvers are chosen.
        num_images: images of the test noise per score.
        selection_images: images of the validation noise by which the spacing of a solver's calls is chosen.
        output: the folder for scores, tables and pictures.

    Raises:
        ValueError: an unknown solver, or numbers below 1 (`steps`), 6 (`num_images`) and 2 (`selection_images`).
    """

    steps: Sequence[int] = (5, 10, 20)
    solvers: Sequence[str] = DEFAULT_SOLVERS
    samplers: Sequence[str] = ()
    judge: FeatureExtractor | str | Path | None = None
    seeds: Sequence[int] = (0,)
    num_images: int = 10_000
    selection_images: int = 2000
    output: Path = Path("compare")

    def __post_init__(self) -> None:
        unknown = [name for name in self.solvers if name not in SOLVERS and list(self.solvers) != ["all"]]
        if unknown:
            raise ValueError(f"Unknown solver '{unknown[0]}'; choose any of {', '.join(SOLVERS)}, or all.")
        # Precision and recall look at the five nearest neighbours.
        for name, least in {"num_images": 6, "selection_images": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if min(self.steps) < 1:
            raise ValueError(f"--steps must be at least 1, got {min(self.steps)}.")
        object.__setattr__(self, "output", Path(self.output))
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output: '{self.output}' is no folder; give another one.")
        # What is named twice is one thing to measure.
        object.__setattr__(self, "steps", list(dict.fromkeys(self.steps)))
        object.__setattr__(self, "seeds", list(dict.fromkeys(self.seeds)))

    @property
    def solver_names(self) -> list[str]:
        """All solvers to compare, by name, each once."""
        return list(SOLVERS) if list(self.solvers) == ["all"] else list(dict.fromkeys(self.solvers))


@dataclass(frozen=True)
class Candidate:
    """A sampler to be scored: a solver with one placement of its calls, or a learned one from a folder."""

    name: str
    nfe: int
    spacing: str
    sampler: GGDMSampler
    folder: str = ""

    @property
    def origin(self) -> str:
        """Where its numbers come from, whatever label it has."""
        return f"learned ({self.folder})" if self.folder else self.name

    def key(self) -> str:
        """Identifies its numbers."""
        numbers = json.dumps(self.sampler.coefficients().detach().to_lists())
        return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def solver_candidates(module: SamplingModule, name: str, nfe: int) -> list[Candidate]:
    """All placements of a solver that make exactly `nfe` network calls.

    Raises:
        NoSuchCallsError: there is none, see `solver_samplers`.
    """
    samplers = solver_samplers(name, module.denoiser.schedule, module.denoiser.prediction_type, nfe)
    return [Candidate(name, nfe, spacing, sampler) for spacing, sampler in samplers]


def learned_candidates(
    module: SamplingModule, samplers: Sequence[str], seeds: Sequence[int]
) -> list[dict[int, Candidate]]:
    """Samplers from disk, checked against the model: for each of `samplers` (see `Comparison`) the one of each seed.

    Raises:
        ValueError: nothing there, a sampler that was learned for another model, one folder twice, one label for two
            samplers of as many calls, or the name of a solver as a label.
    """
    found: list[dict[int, Candidate]] = []
    given: dict[tuple[str, int], str] = {}
    folders = [_label_and_folder(text)[1] for text in samplers]
    for text in samplers:
        label, folder = _label_and_folder(text)
        if folders.count(folder) > 1:
            raise ValueError(f"'{folder}' is given {folders.count(folder)} times; give every sampler once.")
        if label in SOLVERS:
            raise ValueError(f"The label of '{text}' is the name of a solver; give another label.")
        by_seed = _of_seeds(module, label, folder, seeds)
        key = label, by_seed[seeds[0]].nfe
        if key in given:
            raise ValueError(
                f"'{given[key]}' and '{folder}' both make {key[1]} network calls and have the label '{label}'; give "
                "them two labels, or for samplers of several seeds one folder with {seed} in its name."
            )
        given[key] = folder
        found.append(by_seed)
    return found


def _label_and_folder(text: str) -> tuple[str, str]:
    match = re.fullmatch("([^=/]+)=(.+)", text)
    return (match[1], match[2]) if match else (f"learned ({text})", text)


def _of_seeds(module: SamplingModule, label: str, folder: str, seeds: Sequence[int]) -> dict[int, Candidate]:
    found: dict[int, Candidate] = {}
    for seed in seeds:
        mine = folder.replace("{seed}", str(seed))
        same = [candidate for candidate in found.values() if candidate.folder == mine]
        try:
            found[seed] = same[0] if same else _learned(module, label, mine)
        except ValueError as error:
            where = f"'{folder}' has no sampler for seed {seed} of --seeds: " if mine != folder else ""
            raise ValueError(f"{where}{error}") from error
    calls = {candidate.nfe for candidate in found.values()}
    if len(calls) > 1:
        raise ValueError(
            f"The samplers of '{folder}' make {' or '.join(map(str, sorted(calls)))} network calls, depending on the "
            "seed; give samplers of one number of calls."
        )
    return found


def _learned(module: SamplingModule, label: str, folder: str) -> Candidate:
    path = saved_sampler(folder)
    module.load_sampler(path)
    return Candidate(label, int(read_card(path)["nfe"]), "learned", module.sampler, folder)


# For each seed of the noise the placements of which the best is taken: for a solver always the same, for a learned
# sampler one, which may differ between seeds.
Contender = dict[int, list[Candidate]]
# Scores by name; None, and the number of images under `not_finite`, where a sampler made images that are not finite.
Cell = dict[str, float | None]


class Scores:
    """Scores on disk, so that what is finished is never computed again. Each write replaces the file at once."""

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        # As it comes back from the file: without tuples.
        self.path, self.protocol = path, json.loads(json.dumps(protocol))
        self.cells: dict[str, Cell] = {}
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                known, cells = dict(stored["protocol"]), dict(stored["cells"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"The scores in '{path}' are damaged ({error}); delete the file, or give another --output."
                ) from error
            if known != self.protocol:
                keys = dict.fromkeys([*self.protocol, *known])
                changed = [key for key in keys if known.get(key) != self.protocol.get(key)]
                raise ValueError(
                    f"'{path}' holds scores of another protocol (different: {', '.join(changed)}); give another "
                    "--output."
                )
            self.cells = cells

    def put(self, key: str, cell: Cell) -> None:
        """Keep one cell."""
        self.cells[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            partial.write_text(
                json.dumps({"protocol": self.protocol, "cells": dict(sorted(self.cells.items()))}, indent=1)
            )


class Progressed(Callback):
    """Tells a function how many network calls, of one image each, were made: at every batch."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_validation_batch_end(  # noqa: D102 - Lightning's hook
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        assert isinstance(pl_module, SamplingModule)
        self.advance(len(batch) * trainer.world_size * pl_module.sampler.num_steps)

    on_test_batch_end = on_validation_batch_end


class Scorer:
    """Scores candidates on held-out noise with the Trainer: on as many processes as it has.

    Args:
        module: the model, the feature network and a sampler of any kind.
        datamodule: the real images.
        trainer: its loggers and callbacks are taken off.
        scores: what is known already.
        settings: numbers of images, seeds.
        judge: a second feature network for the same images.
        advance: is told how many network calls were made.
        told_to_stop: is asked after each score, on every process.
    """

    def __init__(
        self,
        module: SamplingModule,
        datamodule: ImageDataModule,
        trainer: Trainer,
        scores: Scores,
        settings: Comparison,
        judge: FeatureExtractor | None,
        advance: Callable[[int], None],
        told_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.told_to_stop = told_to_stop
        self.module, self.datamodule, self.trainer, self.scores = module, datamodule, trainer, scores
        self.seeds = settings.seeds
        self.num_images = {"test": settings.num_images, "validation": settings.selection_images}
        datamodule.num_test_images, datamodule.num_val_images = settings.num_images, settings.selection_images
        # To choose a spacing the FID is enough.
        self.quality = {
            "test": SampleQuality(precision_recall=True, judge=judge),
            "validation": SampleQuality(fid_only=True),
        }
        self.progressed = Progressed(advance)
        trainer.loggers = []

    def key(self, candidate: Candidate, seed: int, split: str) -> str:
        """The name of a cell."""
        numbers = candidate.key()
        return f"{candidate.origin} | {candidate.nfe} | {numbers} | {split}/{seed} | {self.num_images[split]}"

    def calls(self, contender: Contender) -> int:
        """Network calls, of one image each, that are still to be made for a row of the table."""
        known = self.scores.cells
        placements = contender[self.seeds[0]]
        # A set: at few calls two spacings can be the same sampler.
        selection = {self.key(each, self.seeds[0], "validation") for each in placements} - known.keys()
        images = self.num_images["validation"] * len(selection) if len(placements) > 1 else 0
        for seed, candidates in contender.items():
            scored = any(self.key(each, seed, "test") in known for each in candidates)
            images += 0 if scored else self.num_images["test"]
        return images * placements[0].nfe

    def score(self, candidate: Candidate, seed: int, split: str) -> Cell:
        """All scores on the noise of `split` `test`; on `validation` the FID alone."""
        key = self.key(candidate, seed, split)
        if key not in self.scores.cells:
            self._take(candidate, seed)
            run, quality = self.trainer.test if split == "test" else self.trainer.validate, self.quality[split]
            self.trainer.callbacks = [quality, self.progressed]  # type: ignore[attr-defined]
            run(self.module, datamodule=self.datamodule, verbose=False)
            if quality.num_images != self.num_images[split]:
                raise ValueError(
                    f"{quality.num_images} images were scored, not {self.num_images[split]}: leave "
                    f"limit_{split}_batches and fast_dev_run out of the trainer's settings."
                )
            cell: Cell = {name: v if math.isfinite(v) else None for name, v in quality.scores.items()}
            if quality.num_not_finite:
                cell["not_finite"] = quality.num_not_finite
            if self.trainer.is_global_zero:
                self.scores.put(key, cell)
            self.scores.cells[key] = cell
            # In its last batch, and while metrics are computed, Lightning does not listen.
            if self.told_to_stop():
                raise SIGTERMException
        return self.scores.cells[key]

    def best(self, placements: Sequence[Candidate]) -> Candidate:
        """The placement with the lowest FID on the validation noise of the first seed."""
        if len(placements) == 1:
            return placements[0]

        def fid(candidate: Candidate) -> float:
            value = self.score(candidate, self.seeds[0], "validation")["fid"]
            return math.inf if value is None else value

        return min(placements, key=fid)

    @torch.no_grad()
    def images(self, candidate: Candidate, seed: int) -> Tensor:
        """The first images of the test noise, the same noise for every candidate; black where they are not finite."""
        self._take(candidate, seed)
        # The Trainer has taken the model from its device when it was done.
        self.module.to(self.trainer.strategy.root_device)
        parts = torch.arange(GRID_IMAGES).split(self.datamodule.eval_batch_size)
        with self.trainer.precision_plugin.test_step_context():
            images = torch.cat([self.module.samples("test", part) for part in parts])
        return images.nan_to_num(-1.0).float().cpu()

    def _take(self, candidate: Candidate, seed: int) -> None:
        self.module.seed, self.module.sampler = seed, candidate.sampler.requires_grad_(False)
        self.module.averaged = self.module.sampler


def contenders(module: SamplingModule, settings: Comparison) -> list[Contender]:
    """What is compared, by number of calls: a row of the table each.

    Raises:
        ValueError: a sampler of another model, or nothing to compare.
    """
    learned = [
        {seed: [candidate] for seed, candidate in by_seed.items()}
        for by_seed in learned_candidates(module, settings.samplers, settings.seeds)
    ]
    first = settings.seeds[0]
    if not settings.solver_names and not any(contender[first][0].nfe in settings.steps for contender in learned):
        raise ValueError(
            f"Nothing to compare at {list(settings.steps)} network calls: give --solvers or other --steps."
        )
    found: list[Contender] = []
    said: set[str] = set()
    for nfe in settings.steps:
        for name in settings.solver_names:
            try:
                found.append(dict.fromkeys(settings.seeds, solver_candidates(module, name, nfe)))
            except NoSuchCallsError as error:
                # What is not for a model is so for all numbers of calls.
                if str(error) not in said:
                    rank_zero_info(f"left out: {error}")
                said.add(str(error))
        found += [contender for contender in learned if contender[first][0].nfe == nfe]
    for contender in learned:
        if contender[first][0].nfe not in settings.steps:
            candidate = contender[first][0]
            rank_zero_info(f"left out: '{candidate.folder}' makes {candidate.nfe} network calls, which --steps lacks.")
    if not found:
        raise ValueError(f"Nothing to compare: no solver makes {list(settings.steps)} network calls.")
    return found


# What a row of the table holds besides scores.
ABOUT = ("sampler", "nfe", "spacing", "folder", "seed", "not_finite")


def markdown(rows: list[dict[str, Any]], protocol: Mapping[str, Any]) -> str:
    """One line a sampler and number of calls, mean over seeds (and standard deviation), and the protocol."""
    metrics = [key for key in rows[0] if key not in ABOUT]
    lines = [f"| calls | sampler | spacing | {' | '.join(name.upper().replace('_', ' ') for name in metrics)} |"]
    lines.append("|---" * (3 + len(metrics)) + "|")
    digits = {name: _digits([row[name] for row in rows]) for name in metrics}
    for key in dict.fromkeys((row["nfe"], row["sampler"], row["spacing"]) for row in rows):
        mine = [row for row in rows if (row["nfe"], row["sampler"], row["spacing"]) == key]
        not_finite = sum(row.get("not_finite", 0) for row in mine)
        cells = [f"{not_finite} of {len(mine) * protocol['images']} images are not finite"] + [""] * len(metrics[1:])
        for column, name in enumerate([] if not_finite else metrics):
            # None stands for NaN, which JSON does not have.
            values = torch.tensor([math.nan if row[name] is None else row[name] for row in mine], dtype=torch.float64)
            spread = f" ± {float(values.std()):.{digits[name]}f}" if len(values) > 1 else ""
            cells[column] = f"{float(values.mean()):.{digits[name]}f}{spread}"
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    notes = [f"- {name.replace('_', ' ')}: {value}" for name, value in protocol.items()]
    seeds = ", ".join(map(str, dict.fromkeys(row["seed"] for row in rows)))
    return "\n".join([*lines, "", "Protocol:", "", *notes, f"- seeds: {seeds}", ""])


def starts(rows: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate]) -> str:
    """For each number of calls the solver of the lowest mean FID, as `sampler.init_args` of a recipe; "" without any.

    One that has no score with one of the seeds is none.

    Args:
        rows: of the table, one a sampler, number of calls and seed.
        candidates: the sampler of each row.
    """
    lines = []
    for nfe in dict.fromkeys(row["nfe"] for row in rows):
        fids: dict[str, list[float]] = {}
        solvers: dict[str, Candidate] = {}
        for row, candidate in zip(rows, candidates, strict=True):
            if row["nfe"] == nfe and not candidate.folder:
                fids.setdefault(candidate.name, []).append(math.inf if row["fid"] is None else row["fid"])
                solvers[candidate.name] = candidate
        totals = {name: math.fsum(values) for name, values in fids.items() if math.isfinite(math.fsum(values))}
        if not totals:
            continue
        best = solvers[min(totals, key=lambda name: totals[name])]
        config = best.sampler.config
        anchor = config["anchor"]
        if isinstance(anchor, dict):
            # What was read off the scheduler is read off it again.
            anchor = {name: value for name, value in anchor.items() if name != "coefficients"}
        # All of them, with what may be learned: laid over a recipe, what is left out would be the recipe's.
        placement = {name: config[name] for name in ("stride", "eta", "timesteps")}
        arguments = {"num_steps": nfe, "anchor": anchor, **placement, "learn": None}
        text = yaml.safe_dump(arguments, default_flow_style=True, sort_keys=False, width=math.inf).strip()
        lines.append(f"- {best.name}, {best.spacing}: `{text}`")
    title = (
        "The best solver for each number of calls, as `init_args` of a recipe's `sampler`, to learn from it (`learn: "
        "null`: all but `pred`):"
    )
    return "\n".join([title, "", *lines, ""]) if lines else ""


def _digits(values: Sequence[float | None]) -> int:
    """Decimals of a column: two, or three figures of its largest value (scores of small features are small)."""
    largest = max((abs(value) for value in values if value), default=1.0)
    return max(2, 2 - math.floor(math.log10(largest)))


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


CONDITIONS = "all in turn, in a random order that follows from the key of the noise; a sample's from its index"


def _digest(datamodule: ImageDataModule) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all real images."""
    digest = hashlib.sha256()
    for images in datamodule.real_dataloader():
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Parser(argparse.ArgumentParser):
    """Without usage, and without an end of the process: a wrong value is an error like others."""

    def error(self, message: str) -> NoReturn:
        """Raise it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see `ddss compare --help`.")


# Flags of the other commands that `ddss compare` has its own for.
NOT_HERE = {
    "--pretrained_sampler": "--samplers FOLDER",
    "--ckpt_path": "--samplers FOLDER, where FOLDER is the `sampler` in the folder of the run",
    "--data.num_test_images": "--num_images",
    "--data.init_args.num_test_images": "--num_images",
    "--data.num_val_images": "--selection_images",
    "--data.init_args.num_val_images": "--selection_images",
}


def parse(args: list[str]) -> tuple[list[str], Comparison, list[str]]:
    """The recipes of `ddss compare`, what is compared, and the other flags, which override the recipes.

    Raises:
        ValueError: a wrong value, no recipe, a flag that would have no effect; see `Comparison`, too.
    """
    parser = _Parser(
        prog="ddss compare",
        description="Score solvers and learned samplers of the model of a recipe on the same noise. Further flags, "
        "such as --trainer.devices=2 --trainer.strategy=ddp, override the recipe. Interrupted, it goes on where it "
        "stopped.",
        allow_abbrev=False,
    )
    default = Comparison()
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        required=True,
        help="a recipe: its denoiser, features, data and trainer; several lie on top of each other",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=default.steps, help="numbers of network calls")
    parser.add_argument(
        "--solvers", nargs="*", default=default.solvers, help=f"of {', '.join(SOLVERS)}; or all", metavar="SOLVER"
    )
    parser.add_argument(
        "--samplers",
        nargs="*",
        default=default.samplers,
        help="folders (or hub names) of learned samplers; those of one label are one curve; {seed} stands for the seed "
        "of the noise",
        metavar="[LABEL=]FOLDER",
    )
    parser.add_argument(
        "--judge",
        help="folder of a second feature network, which scores the same images; default: the recipe's `quality.judge`",
        metavar="FOLDER",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds, help="of the noise")
    parser.add_argument("--num_images", type=int, default=default.num_images)
    parser.add_argument(
        "--selection_images",
        type=int,
        default=default.selection_images,
        help="to choose the spacing of a solver's calls",
    )
    parser.add_argument("--output", type=Path, default=default.output)
    arguments, others = parser.parse_known_args(args)
    for flag in others:
        if flag.partition("=")[0] in NOT_HERE:
            name = flag.partition("=")[0]
            raise ValueError(f"`ddss compare` does not look at {name}; give {NOT_HERE[name]}.")
    given = vars(arguments)
    return given.pop("config"), Comparison(**given), others


def compare(module: SamplingModule, datamodule: ImageDataModule, trainer: Trainer, settings: Comparison) -> None:
    """Score everything, write `table.md`, `table.json`, pictures and TensorBoard logs into the output folder.

    Args:
        module: the model, the feature network and a sampler of any kind, which does not take part.
        datamodule: the real images.
        trainer: of one process or several.
        settings: what is compared, and where the results go.

    Raises:
        ValueError: a judge that does not fit, a sampler of another model, scores of another protocol in the output
            folder, or nothing to compare.
    """
    _check_output(settings.output)
    judge = load_any(settings.judge) if isinstance(settings.judge, (str, Path)) else settings.judge
    if judge is not None:
        check_judge(judge, module)
    found = contenders(module, settings)
    protocol = protocol_of(module, datamodule, trainer, settings, judge)
    scores = Scores(settings.output / "scores.json", protocol)
    rows, chosen = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # One long average: the time left must not jump with the batch size or between samplers.
    with (
        noted(signal.SIGTERM) as received,
        Progress(
            *columns, console=Console(stderr=True), disable=not trainer.is_global_zero, speed_estimate_period=600
        ) as progress,
    ):
        bar = progress.add_task("comparing")
        scorer = Scorer(
            module,
            datamodule,
            trainer,
            scores,
            settings,
            judge,
            lambda n: progress.advance(bar, n),
            lambda: agreed(trainer, bool(received)),
        )
        # What is on disk already takes no time: it is not in the total.
        left = [scorer.calls(contender) for contender in found]
        progress.update(bar, total=sum(left))
        for index, contender in enumerate(found):
            for seed, placements in contender.items():
                candidate = scorer.best(placements)
                cell = scorer.score(candidate, seed, "test")
                about = {"sampler": candidate.name, "nfe": candidate.nfe, "spacing": candidate.spacing, "seed": seed}
                rows.append({**about, **({"folder": candidate.folder} if candidate.folder else {}), **cell})
                chosen.append(candidate)
                description = f"{candidate.name}, {candidate.nfe} calls, seed {seed}: FID {_shown(cell['fid'])}"
                progress.update(bar, description=description)
            # Shares of several processes are not equal.
            progress.update(bar, completed=sum(left[: index + 1]))
    if trainer.is_global_zero:
        _write(rows, chosen, scorer, protocol, settings)


def _check_output(output: Path) -> None:
    """Make the folder; refuse one with files of the names of the results that are none.

    Raises:
        ValueError: it has such a file and no scores, or cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: '{output}' cannot be made ({error.strerror}); give another one.") from error
    results = ("table.md", "table.json", "fid.png", "judge_fid.png", "samples-*.png")
    found = sorted(path.name for pattern in results for path in output.glob(pattern))
    if found and not (output / "scores.json").exists():
        raise ValueError(
            f"--output: '{output}' holds {', '.join(found)}, which would be replaced, and no scores of a comparison to "
            "go on with; give another folder."
        )


def _shown(fid: float | None) -> str:
    return "not finite" if fid is None else f"{fid:.{_digits([fid])}f}"


def _write(
    rows: list[dict[str, Any]],
    candidates: list[Candidate],
    scorer: Scorer,
    protocol: dict[str, Any],
    settings: Comparison,
) -> None:
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(filter(None, [markdown(rows, protocol), starts(rows, candidates)]))
    with replacing(output / "table.md") as partial:
        partial.write_text(text)
    with replacing(output / "table.json") as partial:
        partial.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2) + "\n")
    figures = {"fid": curves_figure(rows)}
    if "judge" in protocol:
        figures["judge_fid"] = curves_figure(rows, "judge_fid", "FID of the judge")
    for nfe in settings.steps:
        seed = settings.seeds[0]
        mine = [(r, c) for r, c in zip(rows, candidates, strict=True) if (r["nfe"], r["seed"]) == (nfe, seed)]
        if mine:
            grids = [
                (f"{row['sampler']}\nFID {_shown(row['fid'])}", thumbnails(scorer.images(each, seed)))
                for row, each in mine
            ]
            figures[f"samples-{nfe}"] = comparison_figure(grids, f"{nfe} network calls, same noise")
    with SummaryWriter(str(output / "tensorboard")) as writer:
        for name, figure in figures.items():
            space = protocol["judge"].partition(";")[0] if name == "judge_fid" else protocol["features"]
            figure.supxlabel(f"{protocol['images']} images, {space}, {protocol['pixels']}", fontsize=6)
            save_figure(figure, output / f"{name}.png", dpi=120)
            writer.add_figure(name, figure)
    print(text)
    curves = ", ".join(f"{name}.png" for name in figures if name.endswith("fid"))
    print(f"wrote table.md, table.json, {curves}, samples-*.png, scores.json and tensorboard/ to '{output}'")
