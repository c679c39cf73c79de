"""Run by test_ddp.py in one and in two processes; prints scores and the first gradient (or step) as JSON."""

import json
import logging
import sys
import warnings

import torch
from lightning.pytorch import Trainer

import ddss_lightning.sample_moments as moments_file
from ddss_lightning import DigitsDataModule, GaussNewton, SampleQuality, SamplerPictures
from ddss_lightning.noise import draw_noise, generator_for
from tests.test_module import make

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def noise_of_two_ranks(shape, num_steps, key):
    """What ranks 0 and 1 draw for Gauss-Newton, for one process that takes both halves of the batch."""
    half = (shape[0] // 2, *shape[1:])
    draws = [draw_noise(half, num_steps, generator_for(*key[:-1], rank)) for rank in (0, 1)]
    return torch.cat([x for x, _ in draws]), torch.cat([z for _, z in draws], dim=1)


def main(world_size):
    module = make()
    if sys.argv[3] == "gauss_newton":
        module.gauss_newton = GaussNewton(residual_images=16 // world_size, trial_images=16 // world_size)
        if world_size == 1:
            moments_file.generator_for, moments_file.draw_noise = lambda *key: key, noise_of_two_ranks
    if sys.argv[3] == "not finite":
        original = module.validation_step
        # Two images that, with two processes, both belong to the second one; only of the initial sampler.
        module.validation_step = lambda batch, batch_idx: original(batch, batch_idx).masked_fill(
            torch.isin(batch, torch.tensor([3, 7]))[:, None, None, None] & (module.global_step == 0), torch.nan
        )
    gradients = {}

    def keep_gradients(_):
        for name, value in module.sampler.corrections.items():
            gradients.setdefault(name, value.grad.tolist())

    module.on_before_optimizer_step = keep_gradients
    module.batch_size = 16 // world_size
    trainer = Trainer(
        strategy="ddp" if world_size > 1 else "auto",
        devices=world_size,
        accelerator="cpu",
        # Differences would take the rounding of float32, which depends on the size of a batch, for slopes.
        precision="64-true" if sys.argv[3] == "gauss_newton" else "32-true",
        max_steps=1,
        default_root_dir=sys.argv[2],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[quality := SampleQuality(), SamplerPictures()],
    )
    data = DigitsDataModule(batch_size=8, steps_per_epoch=1, num_val_images=25, eval_batch_size=4)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        result = {"initial": quality.initial, "final": quality.scores, "images": quality.num_images}
        print("RESULT", json.dumps({**result, "gradients": gradients}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
