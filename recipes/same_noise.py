"""The headline on the glyphs as a picture: 1000 calls, the best solver and the learned sampler from the same noise.

    python recipes/same_noise.py --output same-noise.png

DDPM with 1000 calls (minutes of a core); then, with 5 and with 10 calls, UniPC, the solver of the lowest FID, and
`checkpoints/glyphs-ggdm-5` and `-10`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from ddss_lightning import DiffusersDenoiser, GGDMSampler
from ddss_lightning.handmade import solver_samplers
from ddss_lightning.images import to_pixels
from ddss_lightning.noise import held_out_noise
from ddss_lightning.pictures import comparison_figure, save_figure

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
# The spacing of the lowest FID, by number of calls.
SPACINGS = {5: "quadratic", 10: "leading"}


def samplers_of(denoiser: DiffusersDenoiser, ddpm_calls: int) -> dict[str, GGDMSampler]:
    """What is shown, by title."""
    schedule, kind = denoiser.schedule, denoiser.prediction_type
    found = {f"DDPM, {ddpm_calls} calls": GGDMSampler(schedule, ddpm_calls, "ddim", eta=1.0, learn=())}
    for calls, spacing in SPACINGS.items():
        found[f"UniPC 3, {calls} calls"] = dict(solver_samplers("UniPC 3", schedule, kind, calls))[spacing]
        found[f"learned, {calls} calls"] = GGDMSampler.from_pretrained(CHECKPOINTS / f"glyphs-ggdm-{calls}")
    return found


@torch.no_grad()
def generate(denoiser: DiffusersDenoiser, sampler: GGDMSampler, num_images: int) -> Tensor:
    """Pixels from the first test noise, shape (num_images, C, H, W)."""
    x_T, noise = held_out_noise("test/0", list(range(num_images)), denoiser.state_shape, sampler.num_steps)
    return to_pixels(sampler(denoiser, x_T, noise=noise))


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("same-noise.png"))
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--ddpm_calls", type=int, default=1000)
    given = parser.parse_args()
    if given.num_images < 1:
        parser.error("--num_images must be at least 1.")
    denoiser = DiffusersDenoiser.from_pretrained(str(CHECKPOINTS / "glyphs-ddpm"))
    samplers = samplers_of(denoiser, given.ddpm_calls)
    grids = [(name, generate(denoiser, each, given.num_images)) for name, each in track(samplers.items(), "sampling")]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(comparison_figure(grids, "Glyphs, the same noise"), given.output)
    print(f"{given.output}: {', '.join(samplers)}")


if __name__ == "__main__":
    main()
