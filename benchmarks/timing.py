"""Times that can be compared: all variants in one run, in turns, and the median of the turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from networks import NETWORKS


def options(description: str, batch_size: int, steps: Sequence[int] = (5, 10, 20)) -> argparse.Namespace:
    """What every benchmark of the chain takes, from the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the network")
    parser.add_argument("--steps", type=int, nargs="+", default=list(steps))
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", default="benchmarks/results")
    return parser.parse_args()


def headline(given: argparse.Namespace) -> str:
    """What was measured, in words."""
    return f"{given.network}, batch {given.batch_size}, {given.precision}, {given.device}."


def clock_name(given: argparse.Namespace) -> str:
    """What the times are."""
    kind = "CPU time" if given.device == "cpu" else "wall time"
    return f"{kind}, median of {given.rounds} turns."


def autocast(given: argparse.Namespace) -> torch.autocast:
    """The precision of the network."""
    return torch.autocast(given.device.split(":")[0], torch.bfloat16, enabled=given.precision == "bfloat16")


def clock(device: str) -> float:
    """Seconds: of the processor that this process used, or, on an accelerator, of the wall when it has finished."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def medians(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each variant, taken in turns after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, work in variants.items():
            start = clock(device)
            work()
            if turn:
                times[name].append((clock(device) - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
