"""Learn the sampler of a recipe and compare it with hand-made solvers at the same number of network calls.

    python recipes/demo.py --recipe recipes/digits_5.yaml --output demo

DDPM and DDIM and DPM-Solver++ 2M are each measured at three strides (linear, quadratic, uniform in log-SNR), and the
best is taken; all samplers start from the same noise, which learning and selection never saw. It writes into the
output folder: `sampler/` (the learned sampler), `table.md`, `table.json`, `samples.png`, and `logs/` (TensorBoard).
Interrupted while it learns, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ddss_lightning.callbacks.quality import FeatureSpace
from ddss_lightning.cli import DDSSCommandLine, command_line
from ddss_lightning.data import ImageDataModule
from ddss_lightning.files import replacing
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.metrics import FrechetDistance
from ddss_lightning.module import DDSSModule
from ddss_lightning.noise import generator_for, held_out_noise
from ddss_lightning.pictures import comparison_figure, save_figure
from ddss_lightning.precision import full_precision
from ddss_lightning.saved import saved_sampler
from ddss_lightning.solvers import STRIDES

SOLVERS = {"DDPM": ("ddim", 1.0), "DDIM": ("ddim", 0.0), "DPM-Solver++ 2M": ("dpmpp_2m", 0.0)}
BATCH_SIZE = 500


def learn(recipe: str, seed: int, output: Path) -> tuple[DDSSCommandLine, float]:
    """`ddss fit` with the recipe; the best sampler goes to `output/sampler`. Its objects, and seconds."""
    started = time.time()
    flags = {
        "model.seed": seed,
        "quality.dirpath": output / "sampler",
        "trainer.logger.save_dir": output / "logs",
        "trainer.logger.version": "demo",
        "ckpt_path": "last",
    }
    cli = command_line(["fit", "-c", recipe, *(f"--{name}={value}" for name, value in flags.items())])
    return cli, time.time() - started


@torch.no_grad()
def real_features(module: DDSSModule, datamodule: ImageDataModule) -> Tensor:
    """Features of all real images, in the precision in which those of generated ones are computed."""
    features, device = module.features, module.device
    with full_precision(device.type):
        return torch.cat([features(images.to(device, features.dtype)) for images in datamodule.real_dataloader()])


@torch.no_grad()
def score(
    cli: DDSSCommandLine, sampler: GGDMSampler, real: Tensor, num_images: int, seed: int
) -> tuple[dict[str, float], Tensor]:
    """FID, KID, IS of `num_images` samples from the test noise of `seed`, and the first 64 images."""
    module, precision = cli.model, cli.trainer.precision_plugin
    space = FeatureSpace(module.features, real)
    space.metrics.to(real.device)
    first: list[Tensor] = []
    for indices in torch.arange(num_images).split(BATCH_SIZE):
        key, samples = f"test/{seed}", indices.tolist()
        x_T, noise = held_out_noise(key, samples, module.denoiser.state_shape, sampler.num_steps)
        with precision.test_step_context():
            images = module.generate(x_T, noise, sampler, module.denoiser.for_samples(key, samples))
        space.update(images, indices)
        first = first or [images[:64]]
    return space.compute(), first[0]


def sampling_floor(real: Tensor, num_images: int, draws: int = 20) -> float:
    """Mean FID of real images drawn with replacement: what a perfect sampler would get from so many images."""
    generator, values = generator_for("sampling floor"), []
    for _ in range(draws):
        metric = FrechetDistance(real).to(real.device)
        metric.update(real[torch.randint(len(real), (num_images,), generator=generator)])
        values.append(float(metric.compute()))
    return sum(values) / draws


def compare(cli: DDSSCommandLine, real: Tensor, num_images: int, seed: int) -> dict[str, Any]:
    """Scores and first images of every solver at every stride, and of the learned sampler."""
    module = cli.model
    schedule, num_steps = module.denoiser.schedule, module.sampler.num_steps
    samplers = {
        (name, stride): GGDMSampler(
            schedule,
            num_steps,
            anchor=anchor,
            eta=eta,
            stride=stride,
            learn=(),
            prediction_type=module.sampler.config["prediction_type"],
        )
        for name, (anchor, eta) in SOLVERS.items()
        for stride in STRIDES
    }
    samplers["learned", ""] = module.sampler
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("comparing", total=len(samplers))
        for (name, stride), sampler in samplers.items():
            progress.update(bar, description=f"{name} {stride}, {num_images} images")
            results[name, stride] = score(cli, sampler, real, num_images, seed)
            progress.advance(bar)
    return results


def best_rows(results: dict[Any, Any]) -> list[dict[str, Any]]:
    """One row a sampler, at its stride of lowest FID."""
    rows = []
    for name in [*SOLVERS, "learned"]:
        mine = {stride: value for (who, stride), value in results.items() if who == name}
        stride = min(mine, key=lambda key: mine[key][0]["fid"])
        strides = {key: value[0]["fid"] for key, value in mine.items() if key}
        rows.append({"sampler": name, "stride": stride, **mine[stride][0], "fid_of_strides": strides})
    return rows


def reference_of(model_name: str) -> str:
    """What the model's card says of 1000-step DDPM sampling."""
    card = Path(model_name) / "README.md"
    found = re.search(
        r"FID, DDPM sampling with 1000 network calls \| ([^|]+)\|", card.read_text() if card.exists() else ""
    )
    return found.group(1).strip() if found else "not measured"


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The learned sampler's FID as a fraction of the baselines'."""
    fid = {row["sampler"]: row["fid"] for row in rows}
    return {
        "of the best DDPM/DDIM": fid["learned"] / min(fid["DDPM"], fid["DDIM"]),
        "of the best DPM-Solver++ 2M": fid["learned"] / fid["DPM-Solver++ 2M"],
    }


def write_table(rows: list[dict[str, Any]], report: dict[str, Any], output: Path, console: Console) -> None:
    """Print the table, write it as Markdown and JSON."""
    title = f"{report['nfe']} network calls, {report['num_images']} images"
    table = Table("sampler", "stride", title=title)
    for head in ("FID", "KID", "IS"):
        table.add_column(head, justify="right")
    lines = ["| sampler | stride | FID | KID | IS |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["sampler"], row["stride"] or "learned"]
        cells += [f"{row['fid']:.2f}", f"{row['kid']:.2f}", f"{row['is']:.2f}" if "is" in row else ""]
        table.add_row(*cells, style="bold" if row["sampler"] == "learned" else "")
        lines.append(f"| {' | '.join(cells)} |")
    reference = (
        f"For reference: DDPM with 1000 network calls has FID {report['ddpm_1000']}; real images drawn with "
        f"replacement, as many as here, {report['fid_of_real_images']:.2f}: no sampler can do much better"
    )
    summary = ", ".join(f"{value:.3f} {name}" for name, value in report["fid_ratio"].items())
    console.print(table)
    console.print(reference + ".", f"Learned FID: {summary}.", sep="\n")
    text = [f"{title}, noise of seed {report['seed']} that learning never saw.", "", *lines, "", reference + ".", ""]
    text += [f"Learned FID: {summary}.", ""]
    with replacing(output / "table.md") as partial:
        partial.write_text("\n".join(text))
    with replacing(output / "table.json") as partial:
        partial.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n")


def draw(rows: list[dict[str, Any]], results: dict[Any, Any], report: dict[str, Any], path: Path) -> None:
    """Grids side by side, all from the same noise."""
    grids = [(f"{row['sampler']}\nFID {row['fid']:.1f}", results[row["sampler"], row["stride"]][1]) for row in rows]
    save_figure(comparison_figure(grids, f"{report['nfe']} network calls, same noise"), path, dpi=100)


CARD = """---
license: apache-2.0
library_name: ddss_lightning
base_model: {model}
tags: [unconditional-image-generation, ddss, ggdm]
---
# {name}

A sampler of {nfe} network calls for [`{model}`](../{model}), learned by `{recipe}`; the model's weights are untouched.
`GGDMSampler.from_pretrained("checkpoints/{name}")` loads it.

![All from the same noise](samples.png)

{table}
| | |
|---|---|
| scores | in the space of [`digits-features`](../digits-features), images clamped and rounded, 1797 real images |
| command | `{command}` |
| learning | {minutes:.1f} min{since}, {machine} |
"""


def release(report: dict[str, Any], command: str, output: Path, folder: Path) -> None:
    """Copy sampler, picture and table into a folder of `checkpoints/`, with a card."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ["sampler/sampler.json", "sampler/sampler.safetensors", "samples.png", "table.json"]
    for name in files:
        with replacing(folder / Path(name).name) as partial:
            shutil.copyfile(output / name, partial)
    card = CARD.format(
        name=folder.name,
        model=Path(report["model"]).name,
        nfe=report["nfe"],
        recipe=report["recipe"],
        table=(output / "table.md").read_text(),
        command=command,
        minutes=report["minutes_of_learning"],
        since=" since it was resumed" * report["resumed"],
        machine=report["machine"],
    )
    with replacing(folder / "README.md") as partial:
        partial.write_text(card)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/digits_5.yaml")
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--sampler", help="compare this saved sampler instead of learning one")
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of learning and of the test noise")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run wrote into the output folder"
    )
    parser.add_argument("--release", type=Path, help="also copy the sampler with a card into this folder")
    args = parser.parse_args()
    if args.release and args.sampler:
        parser.error("--release is for a sampler that this command learned; leave out --sampler.")
    if args.num_images < 2:
        parser.error(f"--num_images must be at least 2, got {args.num_images}.")
    if not Path(args.recipe).is_file():
        parser.error(f"there is no recipe '{args.recipe}'.")
    if args.release and (args.release / "README.md").exists() and not args.overwrite:
        parser.error(f"'{args.release}' holds a released sampler; give another folder or --overwrite.")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output: '{args.output}' is no folder; give another.")
    # What is being learned there, until it is compared.
    task, begun = {"recipe": Path(args.recipe).read_text(), "seed": args.seed}, args.output / "unfinished.json"
    ours = not args.sampler and begun.is_file() and json.loads(begun.read_text()) == task
    resumed = ours and any(args.output.glob("logs/*/demo/checkpoints/last.ckpt"))
    if args.output.exists() and any(args.output.iterdir()) and not (args.overwrite or ours):
        parser.error(f"the output folder '{args.output}' is not empty; give another or --overwrite.")
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console()

    minutes = None
    if args.sampler:
        flags = ["--model.seed", str(args.seed), "--trainer.logger", "false"]
        cli = command_line(["-c", args.recipe, *flags], run=False)
        try:
            cli.model.load_sampler(saved_sampler(args.sampler))
        except ValueError as error:
            parser.error(f"--sampler: {error}")
    else:
        if not resumed:
            # The recipe is sound: what it makes may take the place of what was there.
            command_line(["-c", args.recipe], run=False)
            for name in ("sampler", "logs", "table.md", "table.json", "samples.png"):
                path = args.output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with replacing(begun) as partial:
                partial.write_text(json.dumps(task))
        cli, seconds = learn(args.recipe, args.seed, args.output)
        minutes = seconds / 60
    # A fit ends on the CPU, wherever it was.
    module, datamodule = cli.model.to(cli.trainer.strategy.root_device), cli.datamodule
    started = time.time()
    real = real_features(module, datamodule)
    results = compare(cli, real, args.num_images, args.seed)
    rows = best_rows(results)
    report = {
        "recipe": args.recipe,
        "model": module.denoiser.name,
        "nfe": module.sampler.num_steps,
        "num_images": args.num_images,
        "seed": args.seed,
        "fid_ratio": ratios(rows),
        "fid_of_real_images": sampling_floor(real, args.num_images),
        "ddpm_1000": reference_of(module.denoiser.name),
        "minutes_of_learning": minutes,
        "resumed": resumed,
        "minutes_of_comparing": (time.time() - started) / 60,
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()} CPU, torch {torch.__version__}",
    }
    write_table(rows, report, args.output, console)
    draw(rows, results, report, args.output / "samples.png")
    if not args.sampler:
        begun.unlink(missing_ok=True)
    if args.release:
        command = f"python recipes/demo.py --recipe {args.recipe} --seed {args.seed} --num_images {args.num_images}"
        release(report, command, args.output, args.release)
    if minutes is not None:
        since = " since it was resumed" * resumed
        console.print(f"learned in {minutes:.1f} min{since}, compared in {report['minutes_of_comparing']:.1f} min")
    where = {
        "sampler": args.sampler or args.output / "sampler",
        "table": f"{args.output / 'table.md'} and {args.output / 'table.json'}",
        "picture": args.output / "samples.png",
    }
    if not args.sampler:
        where["TensorBoard"] = f"tensorboard --logdir {args.output / 'logs'}"
    for name, place in where.items():
        console.print(f"{name + ':':12s} {place}", highlight=False)


if __name__ == "__main__":
    main()
