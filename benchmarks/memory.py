"""Peak memory of a learning step, from 5 to 25 network calls, with and without rematerialisation.

    python benchmarks/memory.py

What the tensors take at most, over what they take before the step: on the CPU by the profiler's account of allocations,
on an accelerator by its allocator's. The states are what `denoiser` keeps of a call: the batch once, and its noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from learning import module_for
from networks import NETWORKS
from report import environment, write
from timing import autocast, headline, options
from torch.profiler import ProfilerActivity, profile

from ddss_lightning.denoisers import Denoiser

REMATS = ("none", "every(2)", "denoiser", "denoiser+offload")


def peak(step: Callable[[], object], device: str) -> float:
    """MiB that the tensors of a step take at most."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**20


def measure(given: argparse.Namespace, denoiser: Denoiser, num_steps: int, remat: str) -> float:
    """MiB of one setting."""
    module = module_for(denoiser, num_steps, remat, given)

    def step() -> None:
        with autocast(given):
            loss = module.training_step(torch.zeros(0), 0)
        loss.backward()

    return peak(step, given.device)


def main() -> None:
    """Measure, print and write."""
    given = options(__doc__, batch_size=256, steps=(5, 10, 25))
    denoiser = NETWORKS[given.network]().to(given.device)
    state = given.batch_size * torch.Size(denoiser.image_shape).numel() * 4 / 2**20
    rows = {remat: {k: round(measure(given, denoiser, k, remat), 1) for k in given.steps} for remat in REMATS}
    first, last = given.steps[0], given.steps[-1]
    lines = [
        headline(given),
        "",
        "| remat | " + " | ".join(f"{k} calls, MiB" for k in given.steps) + f" | {last} calls over {first} | beyond "
        "the states |",
        "|---" * (len(given.steps) + 3) + "|",
    ]
    for remat, found in rows.items():
        beyond = [found[k] - 2 * k * state for k in (first, last)]
        cells = " | ".join(f"{found[k]:.0f}" for k in given.steps)
        lines.append(f"| {remat} | {cells} | {found[last] / found[first]:.2f} | **{beyond[1] / beyond[0]:.2f}** |")
    lines += ["", f"States and noise: {2 * state:.2f} MiB for each call."]
    command = f"python benchmarks/memory.py --network {given.network} --device {given.device}"
    result = {"command": command, **environment(), "settings": vars(given), "state_mib": state, "peak_mib": rows}
    write(Path(given.results) / f"memory-{given.network}", "Peak memory of a learning step", "\n".join(lines), result)


if __name__ == "__main__":
    main()
