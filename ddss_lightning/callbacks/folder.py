"""Where a run keeps its recipe, its sampler, its pictures and its checkpoints."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run; to be called on all processes, which are told that of the first.

    `Trainer.log_dir` with the loggers of TensorBoard and CSV, and the Trainer's `default_root_dir` without one. Of all
    other loggers `log_dir` is a folder that their runs share; there it is `save_dir/name/version`, as in Lightning's
    `ModelCheckpoint`.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return Path(trainer.log_dir or trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(
        trainer.strategy.broadcast(Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version))
    )


def remove_start(trainer: Trainer) -> None:
    """Remove the folder of a run that came to nothing, so that the next one has its number; on the first process.

    Only where TensorBoard's logger of this process has made it, and nothing else is in it.
    """
    if not isinstance(trainer.logger, TensorBoardLogger):
        return
    folder = Path(trainer.logger.log_dir)
    names = {path.name for path in folder.glob("*")} - {"hparams.yaml"}
    if names and all(re.fullmatch(rf"events\.out\.tfevents\..*\.{os.getpid()}\.\d+", name) for name in names):
        # It would write its last events into a folder that is gone.
        trainer.logger.experiment.close()
        shutil.rmtree(folder)
