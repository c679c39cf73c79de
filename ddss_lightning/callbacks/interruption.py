"""Checkpoints from which a fit goes on to the last bit, written in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ddss_lightning.files import replacing, why_no_folder
from ddss_lightning.signals import NOTHING_LEARNED, SIGNALS, agreed, stop


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all.

    Lightning's own local files are written to the system's folder for temporary files and then moved: between two file
    systems that is a copy, and a process killed in the middle leaves half a checkpoint under its final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write beside the final name, to the disk, then rename. Addresses such as `s3://...` are left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class Interruption(ModelCheckpoint):
    """Save `last.ckpt` every few minutes, after each epoch, and when the process is told to stop.

    SIGTERM and SIGINT (Ctrl+C) let the step that is under way finish, and the validation after it if there is one;
    then the checkpoint is written, one line says how to go on, and the process ends with status 128 + signal, 143 for
    SIGTERM. The second Ctrl+C stops at once. It is enough that one of several processes gets the signal: all agree
    after each step.

    A fit resumed from `last.ckpt`, with the same recipe on as many processes, is the uninterrupted fit to the last bit,
    wherever it was cut. ModelCheckpoint's own timer cannot be had with that: it saves between the last step of an
    epoch and its validation, which a resumed fit would then leave out.

    Args:
        minutes: time between checkpoints, at least 0; 0 saves after each step.
        dirpath: where `last.ckpt` goes; default `<log folder>/checkpoints`.

    Raises:
        ValueError: `minutes` is negative; when a fit starts, a folder that holds the checkpoint of another one.
    """

    def __init__(self, minutes: float = 10.0, dirpath: str | None = None) -> None:
        if minutes < 0:
            raise ValueError(f"minutes must be at least 0, got {minutes}.")
        super().__init__(dirpath, self.CHECKPOINT_NAME_LAST, save_top_k=0, save_on_train_epoch_end=True)
        self.minutes = minutes
        self.received: signal.Signals | None = None
        self._saved_at = 0.0
        self._interrupt: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; write whole files, unless the Trainer has a plugin of its own for checkpoints."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Refuse to overwrite the checkpoint of another fit, before any work starts.

        Raises:
            ValueError: the folder holds one, and this fit does not go on from that folder.
        """
        if getattr(trainer, "fast_dev_run", False) or "://" in self.path:
            return
        problem = why_no_folder(Path(self.path).parent) if self.dirpath and trainer.is_global_zero else ""
        if problem := trainer.strategy.broadcast(problem):
            raise ValueError(f"interruption.dirpath: {problem}.")
        path = Path(self.path).resolve()
        resumed = trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent == path.parent
        # The same Trainer, told to take more steps.
        goes_on = trainer.global_step and self.last_model_path == self.path
        if trainer.strategy.broadcast(not (resumed or goes_on) and path.exists()):
            where = "the logger's version" if trainer.loggers else "without a logger --trainer.default_root_dir"
            raise ValueError(
                f"'{self.path}' is the checkpoint of another fit; go on with it (ckpt_path), or give another folder "
                f"(dirpath, or {where})."
            )

    # ------------------------------------------------------------------------------------------------------ signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals. The Trainer puts its own handlers back when the fit ends, however it ends."""
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        # Lightning's handler took what came before.
        self.received = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's handler, which calls collectives of its own at whatever point a process is.
            self._interrupt = signal.getsignal(signal.SIGINT) or signal.default_int_handler
            for number in SIGNALS:
                signal.signal(number, self._receive)
        self._stop_if_told(trainer, NOTHING_LEARNED)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, self._interrupt)

    def _stop_if_told(self, trainer: Trainer, what: str) -> None:
        if agreed(trainer, self.received is not None):
            stop(trainer, self.received or signal.SIGTERM, what)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    @property
    def path(self) -> str:
        """Of the checkpoint."""
        return self.format_checkpoint_name({})

    def on_train_batch_end(  # noqa: D102 - Lightning's hook
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        due = time.monotonic() - self._saved_at >= 60 * self.minutes
        # A checkpoint before a validation would leave it out; there is one after the epoch, or after the next step.
        if agreed(trainer, due or self.received is not None) and not _validation_follows(trainer, batch_idx):
            self._save_and_stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """After the epoch's validation."""
        self._save_and_stop_if_told(trainer)

    def _save_and_stop_if_told(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self.best_model_path = self.last_model_path = self.path
            self._save_checkpoint(trainer, self.path)
            self._saved_at = time.monotonic()
        self._stop_if_told(
            trainer,
            f"saved '{self.path}'. To go on: `ddss fit` as before with --ckpt_path='{self.path}', "
            f"Trainer.fit(..., ckpt_path='{self.path}'), or the recipe's script again",
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on where it is."""
        return {}


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the fit may validate before the next step, or score its last sampler."""
    loop = trainer.fit_loop.epoch_loop
    if loop.batch_progress.is_last_batch or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    steps = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    every = trainer.val_check_batch
    return trainer.enable_validation and every is not None and (steps + 1) % every == 0
