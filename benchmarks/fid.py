"""Time of FID: `FrechetDistance` against torchmetrics' `FrechetInceptionDistance`, on the same features, in one run.

    python benchmarks/fid.py --num 50000 --features 2048

It prints a Markdown table and writes it, with machine, versions and date, to `benchmarks/results/fid.md` and
`fid.json` (`--results`): seconds of `update` with all generated samples and of `compute`, ours and theirs, by the
processor's clock, so that other programs on the machine do not count; the relative difference of the distances; and
peak memory of our metric, from a tenth of the samples and from all of them, in a process of its own each.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from report import environment, write
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from ddss_lightning.metrics import FrechetDistance, ReferenceStatistics


class Identity(nn.Module):
    """Torchmetrics wants a feature network: features pass through."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


def batches(num: int, num_features: int, seed: int, batch_size: int = 500) -> Iterator[Tensor]:
    """Correlated, positive features in batches: all of them are never in memory."""
    mix = torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(0)) / num_features**0.5
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, num, batch_size):
        noise = torch.randn(min(batch_size, num - start), num_features, generator=generator)
        yield (noise @ mix + 0.1 * seed).relu()


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of processor time that it takes, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def fill(metric: Metric, options: argparse.Namespace, **kwargs: bool) -> float:
    """Seconds of all updates with generated samples."""
    return sum(
        seconds(lambda features=features: metric.update(features, **kwargs))[0]
        for features in batches(options.num, options.features, seed=1)
    )


def peak(num: int, num_features: int) -> float:
    """Peak memory, MiB, of a process that computes our distance from `num` samples."""
    command = [sys.executable, __file__, "--peak", "--num", str(num), "--features", str(num_features)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(options: argparse.Namespace) -> None:
    """What `peak` runs."""
    d = options.features
    metric = FrechetDistance(ReferenceStatistics(torch.zeros(d).double(), torch.eye(d).double(), options.num))
    fill(metric, options)
    metric.compute()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=50_000, help="samples, real and generated each")
    parser.add_argument("--features", type=int, default=2048, help="length of a feature vector")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--peak", action="store_true", help="only print the peak memory of our metric")
    options = parser.parse_args()
    if options.peak:
        print_peak(options)
        return
    d = options.features
    theirs = FrechetInceptionDistance(feature=Identity(d), normalize=True)
    theirs.set_dtype(torch.float64)
    for features in batches(options.num, d, seed=0):
        theirs.update(features, real=True)
    mean = theirs.real_features_sum / theirs.real_features_num_samples
    cov = theirs.real_features_cov_sum - theirs.real_features_num_samples * torch.outer(mean, mean)
    ours = FrechetDistance(ReferenceStatistics(mean, cov / (options.num - 1), options.num))

    times = {"update": (fill(ours, options), fill(theirs, options, real=False))}
    our_compute, our_value = seconds(ours.compute)
    their_compute, their_value = seconds(theirs.compute)
    times["compute"] = (our_compute, their_compute)
    times["both"] = (sum(pair[0] for pair in times.values()), sum(pair[1] for pair in times.values()))
    memory = {num: peak(num, d) for num in (options.num // 10, options.num)}
    result = {
        "command": f"python benchmarks/fid.py --num {options.num} --features {d}",
        **environment(),
        "num": options.num,
        "features": d,
        "seconds": {
            name: {"ours": round(a, 3), "torchmetrics": round(b, 3), "ratio": round(a / b, 3)}
            for name, (a, b) in times.items()
        },
        "peak_memory_mib": {str(num): round(value, 1) for num, value in memory.items()},
        "relative_difference": float(abs(our_value - their_value) / abs(their_value)),
    }
    table = ["| | ours, s | torchmetrics, s | ratio |", "|---|---|---|---|"]
    table += [f"| `{name}` | {a:.2f} | {b:.2f} | {a / b:.2f} |" for name, (a, b) in times.items()]
    table += ["", "| samples | peak memory of our metric, MiB |", "|---|---|"]
    table += [f"| {num:,} | {value:.0f} |" for num, value in memory.items()]
    table += ["", f"Relative difference of the distances: {result['relative_difference']:.1e}."]
    write(options.results / "fid", f"FID of {options.num:,} x {d} features", "\n".join(table), result)


if __name__ == "__main__":
    main()
