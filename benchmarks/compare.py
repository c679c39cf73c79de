"""Where the time of `ddss compare` goes: the denoiser and the feature network, and everything else.

    python benchmarks/compare.py --output compare-profile

Six samplers of the digits at 5, 10 and 20 network calls, 10,000 images each, in one process and one run. The calls of
the parts below are timed, each without the parts that it calls itself. It prints a Markdown table and writes it, with
machine, versions and date, to `benchmarks/results/compare.md` and `compare.json` (`--results`).
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import environment, write

import ddss_lightning.callbacks.quality as quality_file
import ddss_lightning.compare.candidates as candidates_file
import ddss_lightning.compare.run as compare_file
import ddss_lightning.sampling as module_file
from ddss_lightning.cli import command_line
from ddss_lightning.compare import parse
from ddss_lightning.ggdm import GGDMSampler

NETWORKS = ("denoiser", "feature network")
LEARNED = [f"checkpoints/digits-ggdm-{nfe}" for nfe in (5, 10, 20)]


class Clock:
    """Seconds of each part, without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole, inner = time.perf_counter() - start, self._inner.pop()
                self.seconds[part] += whole - inner
                self.calls[part] += 1
                self._inner[-1] += whole

        return wrapper

    def watch(self, part: str, owner: Any, name: str) -> None:  # noqa: ANN401
        """Time a function where it is looked up."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))


def main() -> None:
    """Compare, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--selection_images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("compare-profile"), help="of the comparison; emptied first")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)

    flags = ["-c", "recipes/digits_5.yaml", "--steps", "5", "10", "20", "--samplers", *LEARNED]
    flags += [f"--{name}={getattr(options, name)}" for name in ("num_images", "selection_images", "output")]
    recipes, settings, others = parse(flags)
    cli = command_line([*(f"--config={recipe}" for recipe in recipes), *others], run=False)

    clock = Clock()
    clock.watch("denoiser", cli.model.denoiser, "forward")
    clock.watch("feature network", cli.model.features, "forward")
    clock.watch("feature network", cli.model.features, "logits")
    clock.watch("noise by index", module_file, "held_out_noise")
    clock.watch("states of the samplers", GGDMSampler, "forward")
    clock.watch("rounding to pixels", module_file, "to_pixels")
    clock.watch("metrics: of the real images", quality_file.FeatureSpace, "__init__")
    clock.watch("metrics: update", quality_file.FeatureSpace, "update")
    clock.watch("metrics: compute", quality_file.MetricCollection, "compute")
    clock.watch("solvers read from diffusers", candidates_file, "solver_candidates")
    clock.watch("tables and pictures", compare_file, "write")
    clock.watch("rest: Trainer, loaders, scores on disk", compare_file, "compare")
    start = time.perf_counter()
    compare_file.compare(cli.model, cli.datamodule, cli.trainer, settings)
    total = time.perf_counter() - start

    outside = total - sum(clock.seconds[part] for part in NETWORKS)
    parts = {
        part: {"seconds": round(seconds, 2), "share": round(seconds / total, 4), "calls": clock.calls[part]}
        for part, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
    }
    result = {
        "command": "python benchmarks/compare.py",
        **environment(),
        "num_images": options.num_images,
        "selection_images": options.selection_images,
        "network_calls": settings.steps,
        "samplers": [*settings.solver_names, "learned"],
        "seconds": round(total, 1),
        "share_outside_the_networks": round(outside / total, 4),
        "parts": parts,
    }
    rows = [
        f"| {part} | {each['seconds']:.1f} | {each['share']:.1%} | {each['calls']} |" for part, each in parts.items()
    ]
    table = ["| part | seconds | share | calls |", "|---|---|---|---|", *rows, f"| all | {total:.1f} | 100% | |"]
    title = (
        f"`ddss compare`: {len(result['samplers'])} samplers at {', '.join(map(str, settings.steps))} network calls, "
        f"{options.num_images:,} images: {outside / total:.1%} of the time outside the denoiser and the feature network"
    )
    write(options.results / "compare", title, "\n".join(table), result)


if __name__ == "__main__":
    main()
