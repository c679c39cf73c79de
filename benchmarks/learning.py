"""Time of a learning step, against the calls of the bare network that it is made of.

    python benchmarks/learning.py

A step is `DDSSModule.training_step` and its backward pass, without the feature network and the loss, which are timed
apart and subtracted. It is compared with K calls of the network on the same batch without a gradient, and with K calls
and their gradients with respect to the input, each kept or computed again (`torch.utils.checkpoint`). The first call of
a chain needs no gradient, which the bare calls here have all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from networks import NETWORKS
from report import environment, write
from timing import autocast, clock_name, headline, medians, options
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddss_lightning import DDSSModule, GGDMSampler
from ddss_lightning.denoisers import Denoiser
from ddss_lightning.features import FeatureExtractor

BOUNDS = {"none": 2.0, "denoiser": 3.0}
BOUND_BARE = 1.08


class Encoder(FeatureExtractor):
    """A small encoder with 64 features; its part of the step is subtracted."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape, self.num_features = image_shape, 64
        self.network = nn.Conv2d(image_shape[0], 64, 3)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Means of one convolution."""
        return self.network(images).relu().mean((2, 3))


def module_for(denoiser: Denoiser, num_steps: int, remat: str, given: argparse.Namespace) -> DDSSModule:
    """A module that thinks it is in a fit."""
    features = Encoder(denoiser.image_shape)
    sampler = GGDMSampler(denoiser.schedule, num_steps)
    module = DDSSModule(denoiser, sampler, features, batch_size=given.batch_size, remat=remat).to(given.device)
    module.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module.log = lambda *_args, **_kwargs: None
    module.loss.fit_real(module.features(torch.rand(2000, *denoiser.image_shape, device=given.device)))
    return module


def variants(denoiser: Denoiser, num_steps: int, given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    shape = (given.batch_size, *denoiser.image_shape)
    x = torch.randn(shape, device=given.device)
    times = torch.linspace(999, 50, num_steps, device=given.device)[:, None].expand(num_steps, given.batch_size)
    modules = {remat: module_for(denoiser, num_steps, remat, given) for remat in BOUNDS}
    images = torch.rand(shape, device=given.device) * 2 - 1

    def forwards() -> None:
        with torch.no_grad(), autocast(given):
            for t in times:
                denoiser(x, t)

    def calls(again: bool) -> None:
        # All outputs first, then all gradients, as in a chain: with the same activations alive.
        outputs = []
        for t in times:
            leaf = x.clone().requires_grad_()
            with autocast(given):
                outputs.append(checkpoint(denoiser, leaf, t, use_reentrant=False) if again else denoiser(leaf, t))
        while outputs:
            outputs.pop().float().sum().backward()

    def step(module: DDSSModule) -> None:
        with autocast(given):
            loss = module.training_step(images, 0)
        loss.backward()

    def features() -> None:
        module = modules["none"]
        leaf = images.clone().requires_grad_()
        with autocast(given):
            found = module.features(leaf)
            _, (slope,) = module._loss_and_slopes([found.detach()], images)
        (found * slope.to(found)).sum().backward()

    return {
        "forwards": forwards,
        "bare none": lambda: calls(again=False),
        "bare denoiser": lambda: calls(again=True),
        "features": features,
        **{f"step {remat}": lambda module=module: step(module) for remat, module in modules.items()},
    }


def main() -> None:
    """Measure, print and write."""
    given = options(__doc__, batch_size=256)
    denoiser = NETWORKS[given.network]().to(given.device)
    rows = []
    for num_steps in given.steps:
        found = medians(variants(denoiser, num_steps, given), given.rounds, given.device)
        for remat, bound in BOUNDS.items():
            step = found[f"step {remat}"] - found["features"]
            row = {
                "calls": num_steps, "remat": remat, "step_ms": step, "features_ms": found["features"],
                "forwards_ms": found["forwards"], "bare_ms": found[f"bare {remat}"],
                "to_forwards": step / found["forwards"], "bound": bound, "to_bare": step / found[f"bare {remat}"],
            }  # fmt: skip
            rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    lines = [
        f"{headline(given)} {clock_name(given)}",
        "",
        "| calls | remat | step, ms | K forwards, ms | ratio (at most) | K bare calls with gradient, ms | "
        f"ratio (at most {BOUND_BARE}) | features and loss, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['calls']} | {row['remat']} | {row['step_ms']:.0f} | {row['forwards_ms']:.0f} | "
            f"**{row['to_forwards']:.2f}** ({row['bound']}) | {row['bare_ms']:.0f} | **{row['to_bare']:.2f}** | "
            f"{row['features_ms']:.1f} |"
        )
    steps = " ".join(map(str, given.steps))
    command = (
        f"python benchmarks/learning.py --network {given.network} --device {given.device} --steps {steps} "
        f"--rounds {given.rounds}"
    )
    result = {"command": command, **environment(), "settings": vars(given), "rows": rows}
    write(Path(given.results) / f"learning-{given.network}", "Time of a learning step", "\n".join(lines), result)


if __name__ == "__main__":
    main()
