"""Adam on the KID against Gauss-Newton on the Frechet distance, at equal network calls.

    python benchmarks/optimizers.py

A call of the network on one image counts as one, so does a gradient with respect to its input. Gauss-Newton sets the
budget, Adam takes as many steps as fit into it. Both keep the best sampler on the same validation noise, and are
scored on the same test noise. Finished cells are kept in `--output` and not computed again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from networks import digits
from report import environment, write

from ddss_lightning import ConvFeatures, DDSSModule, DigitsDataModule, GaussNewton, GGDMSampler, SampleQuality
from ddss_lightning.data.digits import load_digits_tensors
from ddss_lightning.denoisers import Denoiser, MixtureDenoiser

GAUSS_NEWTON = GaussNewton(residual_images=10_000, trial_images=4000, dampings=(1.0, 0.1, 0.01))
DIFFERENCES = 256
ADAM_BATCH = 512
# Calls per image -> Gauss-Newton steps: about 100,000 sampled images each.
STEPS = {5: 3, 10: 2, 20: 1}


def mixture() -> Denoiser:
    """The exact denoiser of the digits, with a little noise: a Gaussian around each image."""
    return MixtureDenoiser(load_digits_tensors()[0], 0.05, digits().schedule)


MODELS = {"mixture": mixture, "digits": digits}


def budget(num_steps: int, num_parameters: int) -> int:
    """Network calls on one image of all Gauss-Newton steps."""
    method = GAUSS_NEWTON
    chains = (num_parameters + 1) * DIFFERENCES + method.residual_images
    chains += (len(method.dampings) + 1) * method.trial_images
    return STEPS[num_steps] * chains * num_steps


def learn(model: str, num_steps: int, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Learn, and score on test noise."""
    denoiser = MODELS[model]()
    sampler = GGDMSampler(denoiser.schedule, num_steps, stride="quadratic")
    calls = budget(num_steps, sum(value.numel() for value in sampler.parameters()))
    # The first call of a chain has no gradient.
    adam_steps = calls // (ADAM_BATCH * (2 * num_steps - 1))
    second_order = method == "Gauss-Newton"
    options: dict[str, Any] = (
        {"batch_size": DIFFERENCES, "gauss_newton": GAUSS_NEWTON, "ema_decay": 0.0}
        if second_order
        else {"batch_size": ADAM_BATCH, "lr": 2e-3, "time_lr": 8e-3, "warmup_steps": 5}
    )
    features = ConvFeatures.from_pretrained("checkpoints/digits-features")
    module = DDSSModule(denoiser, sampler, features, seed=seed, **options)
    quality = SampleQuality(dirpath=str(folder / "sampler"), overwrite=True)
    max_steps = STEPS[num_steps] if second_order else adam_steps
    trainer = Trainer(
        max_steps=max_steps, callbacks=[quality], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    validations = 1 if second_order else max(1, max_steps // 8)
    data = DigitsDataModule(steps_per_epoch=validations, num_val_images=4000, num_test_images=10_000)
    trainer.fit(module, data)
    (test,) = trainer.test(module, data, verbose=False)
    scores = {"validation": quality.best["fid"], "start": quality.initial["fid"], "fid": test["test/fid"]}
    return {"calls": calls, "steps": max_steps, "best_step": quality.best_step, **scores}


def main() -> None:
    """Learn all cells, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    lines = [
        "FID of 10,000 images of test noise (of validation noise, 4,000 images, at the start and for the best step).",
        "",
        "| model | calls | seed | image-calls of the network, millions | Adam, KID | Gauss-Newton, Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    results = []
    for model, num_steps, seed in ((m, k, s) for m in given.models for k in given.steps for s in given.seeds):
        cells = {}
        for method in ("Adam", "Gauss-Newton"):
            folder = given.output / f"{model}-{num_steps}-{seed}-{method}"
            path = folder / "scores.json"
            if not path.exists():
                scores = learn(model, num_steps, method, seed, folder)
                path.write_text(json.dumps(scores))
            cells[method] = json.loads(path.read_text())
        results.append({"model": model, "calls": num_steps, "seed": seed, **cells})
        shown = [
            f"**{cell['fid']:.2f}** ({cell['start']:.2f} -> {cell['validation']:.2f}, step {cell['best_step']} of "
            f"{cell['steps']})"
            for cell in cells.values()
        ]
        calls = cells["Adam"]["calls"] / 1e6
        lines.append(f"| {model} | {num_steps} | {seed} | {calls:.1f} | {' | '.join(shown)} |")
    command = f"python benchmarks/optimizers.py --models {' '.join(given.models)}"
    result = {"command": command, **environment(), "results": results}
    write(given.results / "optimizers", "Adam and Gauss-Newton at equal network calls", "\n".join(lines), result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
