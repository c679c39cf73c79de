"""Run by test_interruption.py: a fit that is killed again and again, and goes on each time from its last checkpoint.

    python -m tests.interruption_script FOLDER WORLD_SIZE '[{"signal": "SIGKILL", "steps": 3, "place": "saving"}, ...]'

Each life is a forked process (one per rank) of this one, which only imports. The last one is not killed. Prints the
exit statuses as JSON, negative for a signal.
"""

import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, Trainer

import ddss_lightning.callbacks.interruption as interruption
from ddss_lightning import (
    ConvFeatures,
    DDSSModule,
    DigitsDataModule,
    GGDMSampler,
    Interruption,
    KIDLoss,
    MixtureDenoiser,
    NoiseSchedule,
    SampleQuality,
)
from ddss_lightning.data.digits import load_digits_tensors
from tests.conftest import FEATURES

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
torch.set_num_threads(1)

MAX_STEPS = 74


class Killer(Callback):
    """Sends its own process a signal, `steps` steps after the start, at the next `place`."""

    def __init__(self, plan):
        self.plan = plan
        self.start = None

    def on_train_start(self, trainer, pl_module):
        self.start = trainer.global_step
        save = torch.save

        def half(checkpoint, file):
            if self.is_time(trainer, "saving"):
                save(checkpoint, file)
                file.truncate(file.tell() // 2)
                file.flush()
                self.kill(trainer)
            save(checkpoint, file)

        interruption.torch = SimpleNamespace(save=half)
        loss = pl_module.loss.forward

        def not_finite(*arguments):
            bad = self.is_time(trainer, "the loss is NaN") and trainer.global_rank == self.plan["rank"]
            self.plan = None if bad else self.plan
            return loss(*arguments) * (torch.nan if bad else 1.0)

        pl_module.loss.forward = not_finite
        score = pl_module.validation_step

        def told(batch, batch_idx):
            # Before the first step only `SampleQuality` makes images: those of the initial sampler.
            if self.plan and self.plan["place"] == "the initial sampler" and batch_idx == 1:
                self.kill(trainer)
            return score(batch, batch_idx)

        pl_module.validation_step = told
        # A minute a step, so that checkpoints do not depend on the machine.
        interruption.time = SimpleNamespace(monotonic=lambda: 60.0 * trainer.global_step)

    def is_time(self, trainer, place):
        return self.plan and place == self.plan["place"] and trainer.global_step >= self.start + self.plan["steps"]

    def kill(self, trainer):
        if trainer.global_rank == self.plan.get("rank", 0):
            os.kill(os.getpid(), getattr(signal, self.plan["signal"]))
        self.plan = None

    def hook(place):  # noqa: N805
        def method(self, trainer, *_):
            if self.is_time(trainer, place):
                self.kill(trainer)

        return method

    def on_train_end(self, trainer, pl_module):
        mine = torch.cat([value.detach().flatten() for value in pl_module.sampler.parameters()])
        assert (pl_module.all_gather(mine) == mine).all(), "processes differ"

    on_train_batch_start = hook("before the step")
    on_before_optimizer_step = hook("in the step")
    on_train_batch_end = hook("after the step")
    on_validation_batch_end = hook("in validation")
    on_train_epoch_end = hook("after the epoch")


def fit(folder, world_size, plan):
    images = load_digits_tensors()[0]
    schedule = NoiseSchedule(torch.linspace(5, -5, 1000, dtype=torch.float64))
    sampler = GGDMSampler(schedule, 3, anchor="ddim")
    features = ConvFeatures.from_pretrained(FEATURES)
    denoiser = MixtureDenoiser(images[:40], 0.1, schedule)
    module = DDSSModule(denoiser, sampler, features, KIDLoss(real="batch"), batch_size=8)
    last = Path(folder, "last.ckpt")
    trainer = Trainer(
        max_steps=MAX_STEPS,
        default_root_dir=folder,
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            Killer(plan),
            SampleQuality("kid", dirpath=str(Path(folder, "sampler")), overwrite=True),
            Interruption(minutes=3, dirpath=str(folder)),
        ],
    )
    data = DigitsDataModule(batch_size=8, steps_per_epoch=7, num_val_images=24, eval_batch_size=4)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)


def live(folder, world_size, plan):
    """One process per rank; the exit status of rank 0, negative for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {}
    for rank in range(world_size):
        if pid := os.fork():
            ranks[pid] = rank
            continue
        if world_size > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world_size))
            os.environ.update(NODE_RANK="0", LOCAL_RANK=str(rank))
        try:
            fit(folder, world_size, plan)
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stderr.flush()
        os._exit(status)
    statuses = {}
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        statuses[rank] = os.waitstatus_to_exitcode(status)
        if statuses[rank] < 0:
            # As torchrun and srun do with the others.
            time.sleep(0.2)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return min(statuses.values()) if min(statuses.values()) < 0 else statuses[0]


def check(folder):
    """What has its final name is whole."""
    if Path(folder, "last.ckpt").exists():
        torch.load(Path(folder, "last.ckpt"), weights_only=True)
    if Path(folder, "sampler", "sampler.json").exists():
        GGDMSampler.from_pretrained(Path(folder, "sampler"))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    found = []
    for plan in [*json.loads(sys.argv[3]), None]:
        found.append(live(sys.argv[1], int(sys.argv[2]), plan))
        check(sys.argv[1])
    print("STATUSES", json.dumps(found))
