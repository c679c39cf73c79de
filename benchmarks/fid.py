"""Time of FID: `FrechetDistance` against torchmetrics' `FrechetInceptionDistance`, on the same features, in one run.

    python benchmarks/fid.py --num 50000 --features 2048

It prints a JSON line: seconds of `update` and of `compute` of both, ratios, relative difference of the distances, and
the growth of peak memory between a tenth of the samples and all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator

import torch
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
    """How long it takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def fill(metric: Metric, options: argparse.Namespace, **kwargs: bool) -> tuple[float, float]:
    """Seconds of all updates with generated samples; growth of peak memory, MiB, after the first tenth of them."""
    total, early = 0.0, 0
    tenth = options.num // 10
    seen = 0
    for features in batches(options.num, options.features, seed=1):
        total += seconds(lambda features=features: metric.update(features, **kwargs))[0]
        seen += len(features)
        if not early and seen >= tenth:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=50_000, help="samples, real and generated each")
    parser.add_argument("--features", type=int, default=2048, help="length of a feature vector")
    options = parser.parse_args()
    d = options.features

    theirs = FrechetInceptionDistance(feature=Identity(d), normalize=True)
    theirs.set_dtype(torch.float64)
    for features in batches(options.num, d, seed=0):
        theirs.update(features, real=True)
    mean = theirs.real_features_sum / theirs.real_features_num_samples
    cov = theirs.real_features_cov_sum - theirs.real_features_num_samples * torch.outer(mean, mean)
    ours = FrechetDistance(ReferenceStatistics(mean, cov / (options.num - 1), options.num))

    our_update, growth = fill(ours, options)
    their_update, _ = fill(theirs, options, real=False)
    our_compute, our_value = seconds(ours.compute)
    their_compute, their_value = seconds(theirs.compute)
    print(
        json.dumps(
            {
                "num": options.num,
                "features": d,
                "threads": torch.get_num_threads(),
                "compute_seconds": {"ours": round(our_compute, 3), "torchmetrics": round(their_compute, 3)},
                "compute_ratio": round(our_compute / their_compute, 3),
                "update_seconds": {"ours": round(our_update, 3), "torchmetrics": round(their_update, 3)},
                "update_ratio": round(our_update / their_update, 3),
                "peak_memory_growth_mib": round(growth, 1),
                "relative_difference": float(abs(our_value - their_value) / abs(their_value)),
            }
        )
    )


if __name__ == "__main__":
    main()
