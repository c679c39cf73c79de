"""Scores of samplers on held-out noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ddss_lightning.callbacks import SampleQuality
from ddss_lightning.compare.candidates import Candidate, Contender
from ddss_lightning.compare.scores import Cell, Scores
from ddss_lightning.compare.settings import Comparison
from ddss_lightning.data import ImageDataModule
from ddss_lightning.features import FeatureExtractor
from ddss_lightning.sampling import SamplingModule
from ddss_lightning.signals import agreed

GRID_IMAGES = 64


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
        """All scores on the noise of `split` `test`; on `validation` the FID alone.

        Raises:
            ValueError: fewer images than were asked for, or processes that are not at the same sampler.
        """
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
            if agreed(self.trainer, self.trainer.strategy.broadcast(key) != key):
                raise ValueError(
                    "The processes found different scores in the output folder, into which another comparison writes; "
                    "start again, or give another --output."
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
