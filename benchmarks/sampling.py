"""Time of sampling besides the network, and against the loops of diffusers' pipelines.

    python benchmarks/sampling.py

"Besides the network": the same chain with the identity in the network's place, over K calls of the bare network. The
loops are those of diffusers' pipelines, `scale_model_input`, network, `step`, without their conversion to images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from networks import NETWORKS
from report import environment, write
from timing import autocast, clock_name, headline, medians, options
from torch import Tensor

from ddss_lightning import GGDMSampler
from ddss_lightning.denoisers import Denoiser

SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def identity(x: Tensor, _timestep: Tensor) -> Tensor:
    """In the network's place."""
    return x


def variants(denoiser: Denoiser, num_steps: int, given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    x_T = torch.randn(given.batch_size, *denoiser.image_shape, device=given.device)
    noise = torch.randn(num_steps - 1, *x_T.shape, device=given.device)
    sampler = GGDMSampler(denoiser.schedule, num_steps).to(given.device)
    # As after learning: with weights of all states, and noise.
    with torch.no_grad():
        for value in sampler.corrections.values():
            value += 1e-3
    times = torch.linspace(999, 50, num_steps, device=given.device)

    def bare() -> None:
        for t in times:
            denoiser(x_T, t.expand(len(x_T)))

    def loop(name: str, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(num_steps)
        x = x_T
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t.to(given.device).expand(len(x)))
            x = scheduler.step(output, t, x).prev_sample

    found = {
        "network": bare,
        "besides": lambda: sampler(identity, x_T, noise=noise),
        "sampler": lambda: sampler(denoiser, x_T, noise=noise),
    }
    for name in SCHEDULERS:
        found[name] = lambda name=name: loop(name, denoiser)
        found[f"{name} besides"] = lambda name=name: loop(name, identity)

    def without_gradient(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad(), autocast(given):
                work()

        return run

    return {name: without_gradient(work) for name, work in found.items()}


def main() -> None:
    """Measure, print and write."""
    given = options(__doc__, batch_size=256)
    denoiser = NETWORKS[given.network]().to(given.device)
    rows, bound = [], 2 if given.device == "cpu" else 1
    lines = [
        f"{headline(given)} {clock_name(given)}",
        "",
        f"| calls | K bare calls, ms | sampler, ms | besides the network (at most {bound} %) | "
        + " | ".join(f"{name.removesuffix('Scheduler')}: loop, ms (besides the network)" for name in SCHEDULERS)
        + " |",
        "|---" * (4 + len(SCHEDULERS)) + "|",
    ]
    for num_steps in given.steps:
        found = medians(variants(denoiser, num_steps, given), given.rounds, given.device)
        rows.append({"calls": num_steps, **{name: round(value, 3) for name, value in found.items()}})
        share = {name: 100 * found[name] / found["network"] for name in found}
        loops = [f"{found[name]:.0f} ({share[name + ' besides']:.2f} %)" for name in SCHEDULERS]
        lines.append(
            f"| {num_steps} | {found['network']:.0f} | {found['sampler']:.0f} | **{share['besides']:.2f} %** | "
            + " | ".join(loops)
            + " |"
        )
    command = f"python benchmarks/sampling.py --network {given.network} --device {given.device}"
    result = {"command": command, **environment(), "settings": vars(given), "milliseconds": rows}
    write(Path(given.results) / f"sampling-{given.network}", "Time of sampling", "\n".join(lines), result)


if __name__ == "__main__":
    main()
