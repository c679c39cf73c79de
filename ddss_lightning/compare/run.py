"""`ddss compare`: many samplers of one model, judged alike."""

from __future__ import annotations

import signal
from pathlib import Path

from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ddss_lightning.callbacks.quality import check_judge
from ddss_lightning.compare.candidates import contenders
from ddss_lightning.compare.protocol import protocol_of
from ddss_lightning.compare.report import shown, write
from ddss_lightning.compare.scorer import Scorer
from ddss_lightning.compare.scores import Scores
from ddss_lightning.compare.settings import Comparison
from ddss_lightning.data import ImageDataModule
from ddss_lightning.features import load_any
from ddss_lightning.files import make_folder, why_no_folder
from ddss_lightning.sampling import SamplingModule
from ddss_lightning.signals import agreed, noted


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
    make_folder(settings.output, "--output")
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
                description = f"{candidate.name}, {candidate.nfe} calls, seed {seed}: FID {shown(cell['fid'])}"
                progress.update(bar, description=description)
            # Shares of several processes are not equal.
            progress.update(bar, completed=sum(left[: index + 1]))
    if trainer.is_global_zero:
        write(rows, chosen, scorer, protocol, settings)


def _check_output(output: Path) -> None:
    """Refuse a folder with files of the names of the results that are none.

    Raises:
        ValueError: it has such a file and no scores, or cannot be made.
    """
    if problem := why_no_folder(output):
        raise ValueError(f"--output: {problem}.")
    results = ("table.md", "table.json", "fid.png", "judge_fid.png", "samples-*.png")
    found = sorted(path.name for pattern in results for path in output.glob(pattern))
    if found and not (output / "scores.json").exists():
        raise ValueError(
            f"--output: '{output}' holds {', '.join(found)}, which would be replaced, and no scores of a comparison to "
            "go on with; give another folder."
        )
