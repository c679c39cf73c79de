"""`ddss compare`: many samplers of one model, judged alike."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddss_lightning.callbacks import SampleQuality
from ddss_lightning.commands import sampler_folder
from ddss_lightning.data import ImageDataModule
from ddss_lightning.files import replacing
from ddss_lightning.ggdm import GGDMSampler, read_card
from ddss_lightning.images import to_pixels
from ddss_lightning.module import DDSSModule
from ddss_lightning.noise import held_out_noise
from ddss_lightning.pictures import comparison_figure, curves_figure, save_figure
from ddss_lightning.solvers import STRIDES, stride_timesteps

SPACINGS = ("linspace", "leading", "trailing")
GRID_IMAGES = 64
# Classes whose `set_timesteps` takes explicit timesteps; quadratic ones are filled in when their number is known.
TAKE_TIMESTEPS = ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler")
QUADRATIC = {"timesteps": "quadratic"}


def _formula(anchor: str, eta: float = 0.0) -> list[dict[str, Any]]:
    return [{"anchor": anchor, "eta": eta, "stride": stride} for stride in STRIDES]


def _imported(class_name: str, **init_args: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    options = [{"timestep_spacing": spacing} for spacing in SPACINGS] + [{"use_karras_sigmas": True}]
    path = f"diffusers.{class_name}"
    anchors = [{"class_path": path, "init_args": {**init_args, **option}} for option in options]
    if class_name in TAKE_TIMESTEPS:
        anchors.append({"class_path": path, "init_args": init_args, "set_timesteps": QUADRATIC})
    return [{"anchor": anchor} for anchor in anchors]


# Name -> the ways of placing its network calls, each the arguments of a GGDMSampler; the best is taken.
SOLVERS: dict[str, list[dict[str, Any]]] = {
    "DDPM": _formula("ddim", eta=1.0),
    "DDIM": _formula("ddim"),
    "DPM-Solver++ 2M": _formula("dpmpp_2m"),
    "DPM-Solver++ 3M": _imported("DPMSolverMultistepScheduler", solver_order=3),
    "DEIS": _imported("DEISMultistepScheduler", solver_order=3),
    "UniPC": _imported("UniPCMultistepScheduler", solver_order=3),
    "Heun": _imported("HeunDiscreteScheduler"),
    "LMS": _imported("LMSDiscreteScheduler"),
    "PNDM": _imported("PNDMScheduler", skip_prk_steps=True)[:-1],
}
DEFAULT_SOLVERS = ("DDPM", "DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC")


@dataclass(frozen=True)
class Candidate:
    """A sampler to be scored: a solver with one placement of its calls, or a learned one from disk."""

    name: str
    nfe: int
    spacing: str
    sampler: GGDMSampler

    def key(self) -> str:
        """Identifies its numbers."""
        numbers = json.dumps(self.sampler.coefficients().detach().to_lists())
        return hashlib.sha256(numbers.encode()).hexdigest()[:16]


class NoSuchCallsError(ValueError):
    """A solver cannot make the number of network calls that was asked for."""


def solver_candidates(module: DDSSModule, name: str, nfe: int) -> list[Candidate]:
    """All placements of a solver that make exactly `nfe` network calls.

    Raises:
        NoSuchCallsError: there is none (Heun makes odd numbers of calls only), with the reason of the last one tried.
    """
    found, reason = [], ""
    for options in SOLVERS[name]:
        arguments: dict[str, Any] = {"learn": (), "prediction_type": module.denoiser.prediction_type, **options}
        try:
            if isinstance(options["anchor"], dict):
                arguments["anchor"] = _with_timesteps(options["anchor"], module, nfe)
            sampler = GGDMSampler(module.denoiser.schedule, nfe, **arguments)
        except ValueError as error:
            reason = str(error)
            continue
        found.append(Candidate(name, nfe, _spacing(options), sampler))
    if not found:
        raise NoSuchCallsError(f"{name} does not make {nfe} network calls: {reason}")
    return found


def _with_timesteps(anchor: dict[str, Any], module: DDSSModule, nfe: int) -> dict[str, Any]:
    if anchor.get("set_timesteps") is not QUADRATIC:
        return anchor
    steps = (nfe + 1) // 2 if "Heun" in anchor["class_path"] else nfe
    timesteps = [round(t) for t in stride_timesteps(module.denoiser.schedule, steps, "quadratic").tolist()]
    return {**anchor, "set_timesteps": {"timesteps": timesteps}}


def _spacing(options: dict[str, Any]) -> str:
    anchor = options["anchor"]
    if not isinstance(anchor, dict):
        return str(options["stride"])
    if "set_timesteps" in anchor:
        return "quadratic"
    init_args = anchor["init_args"]
    return "karras" if init_args.get("use_karras_sigmas") else str(init_args["timestep_spacing"])


def learned_candidates(module: DDSSModule, folders: list[str]) -> list[Candidate]:
    """Samplers from disk, checked against the model.

    Raises:
        ValueError: nothing there, a sampler that was learned for another model, or one folder twice.
    """
    found = []
    for folder in folders:
        path = sampler_folder(folder)
        if folders.count(folder) > 1:
            raise ValueError(f"'{folder}' is given {folders.count(folder)} times; give every sampler once.")
        module.load_sampler(path)
        found.append(Candidate(f"learned ({folder})", int(read_card(path)["nfe"]), "learned", module.sampler))
    return found


class Scores:
    """Scores on disk, so that what is finished is never computed again. Each write replaces the file at once."""

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        self.path, self.protocol = path, dict(protocol)
        self.cells: dict[str, dict[str, float]] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["protocol"] != self.protocol:
                changed = [key for key, value in self.protocol.items() if stored["protocol"].get(key) != value]
                raise ValueError(
                    f"'{path}' holds scores of another protocol (different: {', '.join(changed)}); give another "
                    "--output."
                )
            self.cells = stored["cells"]

    def put(self, key: str, scores: dict[str, float]) -> None:
        """Keep one cell."""
        self.cells[key] = scores
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            partial.write_text(
                json.dumps({"protocol": self.protocol, "cells": dict(sorted(self.cells.items()))}, indent=1)
            )


class Judge:
    """Scores candidates on held-out noise with the Trainer: on as many processes as it has.

    Args:
        module: the model, the feature network and a sampler of any kind.
        datamodule: the real images.
        trainer: its loggers and callbacks are taken off.
        scores: what is known already.
        num_images: images of the test noise per score.
        selection_images: images of the validation noise by which the placement of a solver's calls is chosen.
    """

    def __init__(
        self,
        module: DDSSModule,
        datamodule: ImageDataModule,
        trainer: Trainer,
        scores: Scores,
        num_images: int,
        selection_images: int,
    ) -> None:
        self.module, self.datamodule, self.trainer, self.scores = module, datamodule, trainer, scores
        self.num_images, self.selection_images = num_images, selection_images
        self.quality = SampleQuality(precision_recall=True)
        trainer.callbacks = [self.quality]  # type: ignore[attr-defined]
        trainer.loggers = []

    def score(self, candidate: Candidate, seed: int, split: str) -> dict[str, float]:
        """All scores on the noise of `split`: `test` or `validation`."""
        num_images = self.num_images if split == "test" else self.selection_images
        key = f"{candidate.name} | {candidate.nfe} | {candidate.key()} | {split}/{seed} | {num_images}"
        if key not in self.scores.cells:
            self.module.seed, self.module.sampler = seed, candidate.sampler.requires_grad_(False)
            self.module.averaged = self.module.sampler
            self.datamodule.num_val_images, self.datamodule.num_test_images = self.selection_images, self.num_images
            run = self.trainer.test if split == "test" else self.trainer.validate
            run(self.module, datamodule=self.datamodule, verbose=False)
            if self.quality.num_images != num_images:
                raise ValueError(
                    f"{self.quality.num_images} images were scored, not {num_images}: leave limit_{split}_batches and "
                    "fast_dev_run out of the trainer's settings."
                )
            if self.trainer.is_global_zero:
                self.scores.put(key, dict(self.quality.scores))
            self.scores.cells[key] = dict(self.quality.scores)
        return self.scores.cells[key]

    def best(self, candidates: list[Candidate], seed: int) -> Candidate:
        """The placement with the lowest FID on the validation noise."""
        if len(candidates) == 1:
            return candidates[0]

        def fid(candidate: Candidate) -> float:
            value = self.score(candidate, seed, "validation")["fid"]
            return value if math.isfinite(value) else math.inf

        return min(candidates, key=fid)

    @torch.no_grad()
    def images(self, candidate: Candidate, seed: int) -> Tensor:
        """The first images of the test noise, the same noise for every candidate."""
        module = self.module
        indices = list(range(GRID_IMAGES))
        x_T, noise = held_out_noise(f"test/{seed}", indices, module.denoiser.state_shape, candidate.nfe)
        device = next(module.denoiser.parameters(), torch.zeros(())).device
        return to_pixels(candidate.sampler.to(device)(module.denoiser, x_T.to(device), noise=noise.to(device))).cpu()


def rows_of(
    judge: Judge, steps: list[int], solvers: list[str], learned: list[Candidate], seeds: list[int]
) -> Iterator[tuple[dict[str, Any], Candidate]]:
    """One row for each sampler, number of calls and seed. The placement of a solver is chosen with the first seed."""
    for nfe in steps:
        chosen = []
        for name in solvers:
            try:
                chosen.append(judge.best(solver_candidates(judge.module, name, nfe), seeds[0]))
            except NoSuchCallsError as error:
                rank_zero_info(f"left out: {error}")
        for candidate in [*chosen, *(each for each in learned if each.nfe == nfe)]:
            for seed in seeds:
                scores = judge.score(candidate, seed, "test")
                row = {"sampler": candidate.name, "nfe": nfe, "spacing": candidate.spacing, "seed": seed, **scores}
                yield row, candidate


def markdown(rows: list[dict[str, Any]], protocol: Mapping[str, Any]) -> str:
    """One line a sampler and number of calls, mean over seeds (and standard deviation), and the protocol."""
    metrics = [key for key in rows[0] if key not in ("sampler", "nfe", "spacing", "seed")]
    lines = [f"| calls | sampler | spacing | {' | '.join(name.upper() for name in metrics)} |"]
    lines.append("|---" * (3 + len(metrics)) + "|")
    for key in dict.fromkeys((row["nfe"], row["sampler"], row["spacing"]) for row in rows):
        mine = [row for row in rows if (row["nfe"], row["sampler"], row["spacing"]) == key]
        cells = []
        for name in metrics:
            values = torch.tensor([row[name] for row in mine], dtype=torch.float64)
            spread = f" ± {float(values.std()):.2f}" if len(values) > 1 else ""
            cells.append(f"{float(values.mean()):.2f}{spread}")
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    notes = [f"- {name.replace('_', ' ')}: {value}" for name, value in protocol.items()]
    return "\n".join([*lines, "", "Protocol:", "", *notes, ""])


def protocol_of(module: DDSSModule, datamodule: ImageDataModule, arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be known to repeat the figures."""
    loader: Any = datamodule.real_dataloader()
    return {
        "images": arguments.num_images,
        "noise": "test/SEED, by index: the same for every sampler, unseen in learning and in the choice of spacings",
        "spacings_chosen_on": f"{arguments.selection_images} images of validation/{arguments.seeds[0]}, by FID",
        "real_images": f"{len(loader.dataset)} ({_digest(datamodule)})",
        "model": f"{module.denoiser.name} ({module.denoiser.fingerprint()})",
        "features": f"{type(module.features).__name__} ({module.features.fingerprint()})",
        "resize": module.features.protocol()["resize"],
        "pixels": "clamped to [-1, 1], rounded to 256 levels",
    }


def _digest(datamodule: ImageDataModule) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all real images."""
    digest = hashlib.sha256()
    for images in datamodule.real_dataloader():
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of `compare`, and the others, which override the recipe."""
    parser = argparse.ArgumentParser(
        prog="ddss compare",
        description="Score solvers and learned samplers of the model of a recipe on the same noise. Further flags, "
        "such as --trainer.devices=2 --trainer.strategy=ddp, override the recipe. Interrupted, it goes on where it "
        "stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="a recipe: its denoiser, features, data and trainer")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20], help="numbers of network calls")
    parser.add_argument("--solvers", nargs="*", default=list(DEFAULT_SOLVERS), help=f"of {', '.join(SOLVERS)}")
    parser.add_argument("--samplers", nargs="*", default=[], help="folders of learned samplers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise")
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--selection_images", type=int, default=2000, help="to choose the spacing of a solver's calls")
    parser.add_argument("--output", type=Path, default=Path("compare"))
    arguments, others = parser.parse_known_args(args)
    unknown = [name for name in arguments.solvers if name not in SOLVERS]
    if unknown:
        raise ValueError(f"Unknown solver '{unknown[0]}'; choose any of {', '.join(SOLVERS)}.")
    for name in ("num_images", "selection_images"):
        if getattr(arguments, name) < 2:
            raise ValueError(f"--{name} must be at least 2, got {getattr(arguments, name)}.")
    if min(arguments.steps) < 1:
        raise ValueError(f"--steps must be at least 1, got {min(arguments.steps)}.")
    return arguments, others


def compare(module: DDSSModule, datamodule: ImageDataModule, trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Score everything, write `table.md`, `table.json`, pictures and TensorBoard logs into the output folder.

    Raises:
        ValueError: a sampler of another model, scores of another protocol in the output folder, or nothing to compare.
    """
    output: Path = arguments.output
    learned = learned_candidates(module, arguments.samplers)
    protocol = protocol_of(module, datamodule, arguments)
    scores = Scores(output / "scores.json", protocol)
    judge = Judge(module, datamodule, trainer, scores, arguments.num_images, arguments.selection_images)
    if not arguments.solvers and not any(candidate.nfe in arguments.steps for candidate in learned):
        raise ValueError(f"Nothing to compare at {arguments.steps} network calls: give --solvers or other --steps.")
    total = sum(
        nfe * len(arguments.seeds) * (len(arguments.solvers) + sum(each.nfe == nfe for each in learned))
        for nfe in arguments.steps
    )
    rows, candidates = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not trainer.is_global_zero) as progress:
        bar = progress.add_task("comparing", total=total)
        for row, candidate in rows_of(judge, arguments.steps, arguments.solvers, learned, arguments.seeds):
            rows.append(row)
            candidates.append(candidate)
            description = f"{row['sampler']}, {row['nfe']} calls, seed {row['seed']}: FID {row['fid']:.2f}"
            progress.update(bar, advance=row["nfe"], description=description)
    if not rows:
        raise ValueError(f"Nothing to compare: no solver makes {arguments.steps} network calls.")
    if trainer.is_global_zero:
        _write(rows, candidates, judge, protocol, arguments)


def _write(
    rows: list[dict[str, Any]],
    candidates: list[Candidate],
    judge: Judge,
    protocol: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, protocol)
    with replacing(output / "table.md") as partial:
        partial.write_text(text)
    with replacing(output / "table.json") as partial:
        partial.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2) + "\n")
    figures = {"fid": curves_figure(rows)}
    for nfe in arguments.steps:
        seed = arguments.seeds[0]
        mine = [(r, c) for r, c in zip(rows, candidates, strict=True) if (r["nfe"], r["seed"]) == (nfe, seed)]
        if mine:
            grids = [(f"{row['sampler']}\nFID {row['fid']:.2f}", judge.images(each, seed)) for row, each in mine]
            figures[f"samples-{nfe}"] = comparison_figure(grids, f"{nfe} network calls, same noise")
    with SummaryWriter(str(output / "tensorboard")) as writer:
        for name, figure in figures.items():
            save_figure(figure, output / f"{name}.png", dpi=120)
            writer.add_figure(name, figure)
    print(text)
    print(f"wrote table.md, table.json, fid.png, samples-*.png, scores.json and tensorboard/ to '{output}'")
