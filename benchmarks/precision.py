"""Learning in bf16-mixed against float32: FID of the learned samplers, the same seeds.

    python benchmarks/precision.py

The 5-call recipe of the digits with batches of 512 images, in each precision and with each seed: same noise, same
steps. The learned samplers are scored on the test noise of their seed with the network in float32, so that what is
compared is what was learned. Finished fits are kept in `--output`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from report import environment, write

from ddss_lightning.cli import command_line
from ddss_lightning.files import replacing

RECIPE = "recipes/digits_5.yaml"
PRECISIONS = ("32-true", "bf16-mixed")


def learn(precision: str, seed: int, max_steps: int, folder: Path) -> dict[str, Any]:
    """`ddss fit` with the precision, then `ddss test` in float32."""
    path = folder / "scores.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    # What an interrupted run has left is in the way of a new one.
    shutil.rmtree(folder, ignore_errors=True)
    flags = [
        "-c", RECIPE, "--model.batch_size=512", f"--model.seed={seed}", "--data.num_val_images=2000",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    fit = [f"--trainer.precision={precision}", f"--trainer.max_steps={max_steps}", "--trainer.logger=false"]
    fit += [
        f"--quality.dirpath={folder / 'sampler'}",
        "--quality.overwrite=true",
        f"--trainer.default_root_dir={folder}",
    ]
    quality = command_line(["fit", *flags, *fit, "--trainer.enable_checkpointing=false"]).quality
    cli = command_line([*flags, f"--pretrained_sampler={folder / 'sampler'}", "--trainer.logger=false"], run=False)
    (test,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    scores = {
        "start": quality.initial["fid"], "validation": quality.best["fid"], "best_step": quality.best_step,
        "fid": test["test/fid"], "kid": test["test/kid"],
    }  # fmt: skip
    with replacing(path) as partial:
        partial.write_text(json.dumps(scores))
    return scores


def main() -> None:
    """Learn all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/precision"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    results = {
        precision: [
            learn(precision, seed, given.max_steps, given.output / f"{precision}-{given.max_steps}-{seed}")
            for seed in given.seeds
        ]
        for precision in PRECISIONS
    }
    lines = [
        f"FID of 10,000 images of the test noise of each seed, network in float32; {given.max_steps} steps on "
        "batches of 512. In brackets: FID of 2,000 images of validation noise, start and best.",
        "",
        f"| precision of learning | {' | '.join(f'seed {seed}' for seed in given.seeds)} | mean |",
        "|---" * (2 + len(given.seeds)) + "|",
    ]
    for precision, rows in results.items():
        cells = [f"**{row['fid']:.2f}** ({row['start']:.2f} -> {row['validation']:.2f})" for row in rows]
        mean = sum(row["fid"] for row in rows) / len(rows)
        lines.append(f"| {precision} | {' | '.join(cells)} | {mean:.2f} |")
    result = {
        "command": f"python benchmarks/precision.py --max_steps {given.max_steps}",
        **environment(),
        "results": results,
    }
    write(given.results / "precision", "Learning in bf16-mixed and in float32", "\n".join(lines), result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
