"""Tables of `docs/samplers.md`: imported diffusers solvers, measured.

    python recipes/imported.py equality            # coefficients against the schedulers' own loops
    python recipes/imported.py fid --output out    # FID of imported solvers on the shipped digits model

`fid` tries each solver at every spacing of its network calls that it offers (and at quadratic timesteps where it takes
explicit ones), chooses by 2,000 images of the validation noise, and scores the choice on 10,000 images of the test
noise. Finished scores are kept in `out/scores.json` and not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.progress import track

from ddss_lightning.data import DigitsDataModule
from ddss_lightning.denoisers import DiffusersDenoiser
from ddss_lightning.features import ConvFeatures
from ddss_lightning.files import replacing
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.images import to_pixels
from ddss_lightning.metrics import FrechetDistance
from ddss_lightning.noise import held_out_noise
from ddss_lightning.probing import build_scheduler, probe, rollout_error, scheduler_steps
from ddss_lightning.solvers import stride_timesteps

ROOT = Path(__file__).parent.parent
SPACINGS = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]
SIGMAS = [{"use_karras_sigmas": True}]
# Name in the table -> class, its options, the spacings it offers.
SOLVERS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "DDPM": ("DDPMScheduler", {"clip_sample": False}, SPACINGS),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, SPACINGS),
    "Euler": ("EulerDiscreteScheduler", {}, SPACINGS + SIGMAS),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, SPACINGS),
    "Heun": ("HeunDiscreteScheduler", {}, SPACINGS + SIGMAS),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, SPACINGS + SIGMAS),
    "LMS": ("LMSDiscreteScheduler", {}, SPACINGS + SIGMAS),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, SPACINGS),
    "DEIS 2": ("DEISMultistepScheduler", {"solver_order": 2}, SPACINGS + SIGMAS),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}, SPACINGS + SIGMAS),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}, SPACINGS + SIGMAS),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, SPACINGS + SIGMAS),
    "DPM-Solver++ 2S": ("DPMSolverSinglestepScheduler", {"solver_order": 2}, [{}, *SIGMAS]),
    "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}, SPACINGS + SIGMAS),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}, SPACINGS + SIGMAS),
}
QUADRATIC = ("DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")


def equality() -> None:
    """Print the table of the largest error over 3, 5, 10 and 20 steps, and of the refused schedulers."""
    sys.path.insert(0, str(ROOT))
    from tests.test_probing import REFUSED, SUPPORTED

    print("| scheduler | options | largest relative error |\n|---|---|---|")
    for name, (_, cases) in SUPPORTED.items():
        for options in cases:
            scheduler = getattr(diffusers, name)(**options)
            smallest = 4 if options.get("skip_prk_steps") is False else 3
            error = max(rollout_error(probe(scheduler, n), scheduler, n) for n in (smallest, 5, 10, 20))
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            print(f"| `{name}` | {shown} | {error:.0e} |")
    print("\n| refused | why |\n|---|---|")
    for name, (options, _) in REFUSED.items():
        try:
            probe(getattr(diffusers, name)(**options), 5)
        except ValueError as error:
            print(f"| `{name}` | {' '.join(str(error).split())} |")


def candidates(name: str, num_steps: int, schedule: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    """Anchors of a solver with at most `num_steps` network calls: as many as it can make."""
    cls, options, spacings = SOLVERS[name]
    class_path = f"diffusers.{cls}"
    for spacing in spacings:
        yield {"class_path": class_path, "init_args": {**options, **spacing}}
    if cls in QUADRATIC:
        count = (num_steps + 1) // 2 if cls == "HeunDiscreteScheduler" else num_steps
        timesteps = [round(t) for t in stride_timesteps(schedule, count, "quadratic").tolist()]
        yield {"class_path": class_path, "init_args": options, "set_timesteps": {"timesteps": timesteps}}


def calls(anchor: Mapping[str, Any], num_steps: int, schedule: Any) -> int:  # noqa: ANN401
    """The largest number of calls, at most `num_steps`, that the scheduler can make."""
    scheduler = build_scheduler(anchor, schedule, "epsilon")
    for nfe in (num_steps, num_steps - 1):
        try:
            scheduler_steps(scheduler, nfe, anchor.get("set_timesteps"))
        except ValueError:
            continue
        return nfe
    raise ValueError(f"{anchor} makes neither {num_steps} nor {num_steps - 1} calls.")


class Judge:
    """FID of samplers of the digits model; scores are kept on disk."""

    def __init__(self, output: Path) -> None:
        self.denoiser = DiffusersDenoiser.from_pretrained(str(ROOT / "checkpoints" / "digits-ddpm"))
        self.features = ConvFeatures.from_pretrained(str(ROOT / "checkpoints" / "digits-features"))
        with torch.no_grad():
            images = torch.cat(list(DigitsDataModule().real_dataloader()))
            self.real = self.features(images)
        self.path = output / "scores.json"
        self.scores: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    @torch.no_grad()
    def fid(self, anchor: Mapping[str, Any], nfe: int, noise_key: str, num_images: int) -> float:
        """Of `num_images` images from the given noise."""
        key = json.dumps([anchor, nfe, noise_key, num_images])
        if key not in self.scores:
            sampler = GGDMSampler(self.denoiser.schedule, nfe, anchor=dict(anchor), learn=())
            metric = FrechetDistance(self.real)
            for indices in torch.arange(num_images).split(500):
                x_T, noise = held_out_noise(noise_key, indices.tolist(), self.denoiser.image_shape, nfe)
                metric.update(self.features(to_pixels(sampler(self.denoiser, x_T, noise=noise))))
            self.scores[key] = float(metric.compute())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(self.scores, indent=1))
        return self.scores[key]


def fid(output: Path, seed: int) -> None:
    """Print and write the table; name the best anchor of each number of calls."""
    judge = Judge(output)
    schedule = judge.denoiser.schedule
    rows, best = ["| solver | 5 calls | spacing | 10 calls | spacing |", "|---|---|---|---|---|"], {}
    for name in track(SOLVERS, "solvers"):
        row = f"| {name} |"
        for num_steps in (5, 10):
            tried = []
            for anchor in candidates(name, num_steps, schedule):
                nfe = calls(anchor, num_steps, schedule)
                tried.append((judge.fid(anchor, nfe, f"validation/{seed}", 2000), nfe, anchor))
            _, nfe, anchor = min(tried, key=lambda each: each[0])
            score = judge.fid(anchor, nfe, f"test/{seed}", 10_000)
            extra = {k: v for k, v in anchor["init_args"].items() if k not in SOLVERS[name][1]}
            spacing = ", ".join(str(v) if isinstance(v, str) else k for k, v in extra.items())
            spacing = "quadratic timesteps" if "set_timesteps" in anchor else spacing or "default"
            row += f" {score:.2f}{'' if nfe == num_steps else f' ({nfe} calls)'} | {spacing} |"
            if num_steps not in best or score < best[num_steps][0]:
                best[num_steps] = (score, nfe, anchor)
        rows.append(row)
    text = "\n".join(rows)
    print(text)
    for num_steps, (score, nfe, anchor) in best.items():
        print(f"best at {num_steps}: {score:.2f}, {nfe} calls, {json.dumps(anchor)}")
    with replacing(output / "table.md") as partial:
        partial.write_text(text + "\n")
    print(f"wrote {output / 'table.md'}, {judge.path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["equality", "fid"])
    parser.add_argument("--output", default="imported", type=Path)
    parser.add_argument("--seed", default=0, type=int, help="of the noise")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    equality() if arguments.table == "equality" else fid(arguments.output, arguments.seed)
