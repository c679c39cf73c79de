"""Frechet distances of glyph samplers in several spaces: is it the images that get better, or one score?

    python recipes/spaces.py checkpoints/glyphs-ggdm-5 checkpoints/glyphs-ggdm-20

For each sampler and the solver that it starts from, on the same noise, against the training images: the classifier and
the pixels, which the loss sees; an untrained network of another seed than that of the loss; the model's own U-Net; the
judge. Then what anyone can see: the part of pixel values at the ends of the range, contrast (standard
deviation of an image's values, mean over images) and edges (mean absolute difference of neighbours).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from ddss_lightning import (
    ConvFeatures,
    DenoiserFeatures,
    DiffusersDenoiser,
    GGDMSampler,
    RandomFeatures,
    ResidualFeatures,
)
from ddss_lightning.data.glyphs import load_glyphs
from ddss_lightning.images import to_pixels
from ddss_lightning.metrics import frechet_distance, gaussian_moments
from ddss_lightning.noise import held_out_noise
from ddss_lightning.saved import read_card

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@torch.no_grad()
def generate(denoiser: DiffusersDenoiser, sampler: GGDMSampler, num_images: int, what: str) -> Tensor:
    """Pixels from the first test noise."""
    parts = []
    for indices in track(torch.arange(num_images).split(250), what):
        x_T, noise = held_out_noise("test/0", indices.tolist(), denoiser.state_shape, sampler.num_steps)
        parts.append(to_pixels(denoiser.decode(sampler(denoiser, x_T, noise=noise))))
    return torch.cat(parts)


@torch.no_grad()
def moments(encode: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features."""
    return gaussian_moments(torch.cat([encode(part) for part in images.split(500)]).double())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samplers", nargs="+", type=Path)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--num_real", type=int, default=10_000)
    given = parser.parse_args()
    if min(given.num_images, given.num_real) < 2:
        parser.error("--num_images and --num_real must be at least 2.")
    denoiser = DiffusersDenoiser.from_pretrained(str(CHECKPOINTS / "glyphs-ddpm"))
    size = denoiser.image_shape[-1]
    spaces: dict[str, Callable[[Tensor], Tensor]] = {
        "classifier": ConvFeatures.from_pretrained(CHECKPOINTS / "glyphs-features"),
        "pixels": lambda images: images.flatten(1),
        "untrained": RandomFeatures(3, size, seed=1),
        "U-Net": DenoiserFeatures(denoiser),
        "judge": ResidualFeatures.from_pretrained(CHECKPOINTS / "glyphs-judge"),
    }
    samplers = {}
    for folder in given.samplers:
        learned = GGDMSampler.from_pretrained(folder)
        card = read_card(folder)
        base_model, config = card["base_model"], card["config"]
        if base_model.get("fingerprint") != denoiser.fingerprint():
            parser.error(f"the sampler in '{folder}' was learned for '{base_model.get('name')}', not for the glyphs.")
        start = GGDMSampler(denoiser.schedule, **{**config, "learn": ()})
        anchor = config["anchor"]
        name = anchor["class_path"].rpartition(".")[2] if isinstance(anchor, dict) else anchor
        samplers[f"{name}, {learned.num_steps} calls, start of {folder}"] = start
        samplers[f"{folder}, {learned.num_steps} calls"] = learned
    sets = {name: generate(denoiser, sampler, given.num_images, name) for name, sampler in samplers.items()}
    everything = load_glyphs("train", size).pixels
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    images = everything[order[: given.num_real + given.num_images]].float() / 127.5 - 1
    real = images[: given.num_real]
    # Others than those that are compared with.
    sets = {"real images": images[given.num_real :], **sets}
    print(f"| {given.num_images} images | {' | '.join(spaces)} | saturated | contrast | edges |")
    print("|---" * (len(spaces) + 4) + "|")
    reference = {name: moments(encode, real) for name, encode in spaces.items()}
    for name, images in sets.items():
        found = [float(frechet_distance(*moments(encode, images), *reference[key])) for key, encode in spaces.items()]
        saturated, contrast = (images.abs() > 0.98).float().mean(), images.flatten(1).std(1).mean()
        edges = (images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2
        cells = [f"{value:.4g}" for value in found] + [f"{100 * saturated:.1f} %", f"{contrast:.3f}", f"{edges:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
