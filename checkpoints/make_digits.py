"""Make `digits-features` and `digits-ddpm`: the feature network and the diffusion model of the examples.

    python checkpoints/make_digits.py --output checkpoints --overwrite

Three stages, each with a progress bar: the classifier (seconds), the DDPM (about half an hour on two cores), and the
quality figures of the cards (minutes). The DDPM can be interrupted: its state is written to
`<output>/digits-ddpm.partial` every three minutes, every random number is a function of (seed, iteration), and the
same command goes on where it stopped, to the same result.
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rich.progress import track
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import generator_at, train

from ddss_lightning.data.digits import load_digits_tensors
from ddss_lightning.features.convnet import ConvFeatures
from ddss_lightning.metrics import frechet_distance, gaussian_moments

BATCH_SIZE = 128


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images, each moved by up to one pixel in both directions; the rest as they are."""
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator)
    offsets[torch.rand(len(images), generator=generator) < 0.5] = 1
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, offsets.tolist(), strict=True)])


def train_classifier(images: Tensor, labels: Tensor, seed: int, epochs: int) -> ConvFeatures:
    """Train with AdamW, a cosine decay, dropout of the features and small random translations."""
    torch.manual_seed(seed)
    network = ConvFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=5e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in track(range(epochs), "classifier, epochs"):
        generator = generator_at(seed, epoch)
        for index in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            features = nn.functional.dropout(network(moved(images[index], generator)), 0.4)
            loss = nn.functional.cross_entropy(network.logits(features), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network.freeze()


def make_features(folder: Path, images: Tensor, labels: Tensor, seed: int) -> tuple[ConvFeatures, dict[str, float]]:
    """Measure held-out accuracy on a fifth of the data, then train the shipped network in the same way on all."""
    started = time.time()
    order = torch.randperm(len(images), generator=generator_at(seed))
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    judge = train_classifier(images[kept], labels[kept], seed, epochs=60)
    correct = judge.logits(judge(images[held_out])).argmax(1) == labels[held_out]
    network = train_classifier(images, labels, seed, epochs=60)
    network.save_pretrained(folder)
    return network, {"accuracy": correct.float().mean().item(), "seconds": time.time() - started}


def make_unet() -> UNet2DModel:
    """A U-Net of 0.70 M parameters: two resolutions, one residual block each, attention at 4x4."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def train_ddpm(folder: Path, images: Tensor, seed: int, iterations: int) -> tuple[DDPMPipeline, float]:
    """Train with the simple loss (Ho et al. 2020, eq. 14), Adam, warm-up and cosine decay, EMA of the weights."""
    torch.manual_seed(seed)
    # Sampling stays linear in the network's output: no clipping of x_0 inside the chain.
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    unet = make_unet().to(memory_format=torch.channels_last)
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.9995))
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 500) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / iterations)))
    )

    def step(iteration: int) -> Tensor:
        generator = generator_at(seed, iteration)
        x_0 = images[torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)]
        # Stratified timesteps: uniform, with less variance of the gradient.
        offsets = torch.rand(BATCH_SIZE, generator=generator)
        timesteps = ((torch.arange(BATCH_SIZE) + offsets) * (1000 / BATCH_SIZE)).long().clamp(max=999)
        noise = torch.randn(x_0.shape, generator=generator)
        eps = unet(noise_scheduler.add_noise(x_0, noise, timesteps), timesteps).sample
        loss = nn.functional.mse_loss(eps, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(unet)
        return loss.detach()

    parts = {"unet": unet, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    partial = folder.with_name(folder.name + ".partial")
    seconds = train("DDPM, iterations", partial, {"seed": seed}, parts, step, iterations)
    pipeline = DDPMPipeline(unet=ema.module.to(memory_format=torch.contiguous_format).eval(), scheduler=noise_scheduler)
    pipeline.save_pretrained(folder)
    return pipeline, seconds


@torch.no_grad()
def sample_ddpm(pipeline: DDPMPipeline, num_images: int, seed: int) -> Tensor:
    """Ancestral sampling with all 1000 timesteps, clamped and rounded to 8 bits as an image file would be."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1000)
    generator = generator_at(seed, num_images)
    x = torch.randn(num_images, 1, 8, 8, generator=generator)
    for timestep in track(scheduler.timesteps, "1000-step DDPM, steps"):
        eps = torch.cat([pipeline.unet(part, timestep).sample for part in x.split(500)])
        x = scheduler.step(eps, timestep, x, generator=generator).prev_sample
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


FEATURES_CARD = """---
license: apache-2.0
library_name: ddss_lightning
tags: [image-classification, feature-extraction]
datasets: [scikit-learn digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)]
---
# digits-features

A convolutional classifier of 8x8 digits ({parameters:.2f} M parameters). Its {num_features} penultimate features serve
FID, KID and the loss of the digits examples; its logits serve the Inception Score. Load it with
`ddss_lightning.features.ConvFeatures.from_pretrained`.

| | |
|---|---|
| held-out accuracy (same training on 80 %, tested on 20 %) | {accuracy:.4f} |
| the shipped weights | trained on all 1797 images |
| training command | `python checkpoints/make_digits.py --overwrite` (seed {seed}) |
| time | {seconds:.0f} s, {machine} |
"""

DDPM_CARD = """---
license: apache-2.0
library_name: diffusers
tags: [unconditional-image-generation, ddpm]
datasets: [scikit-learn digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)]
---
# digits-ddpm

A DDPM of 8x8 digits: `UNet2DModel` with {parameters:.2f} M parameters, 1000 steps, linear betas, noise prediction,
EMA 0.9995, trained on scikit-learn's 1797 digits scaled to [-1, 1].
`diffusers.DDPMPipeline.from_pretrained("checkpoints/digits-ddpm")` runs it.

| | |
|---|---|
| FID, DDPM sampling with 1000 network calls | {fid:.3f} ({num_images} images against all 1797 real images) |
| the same scale: half of the real set against all of it | {half:.3f} (mean of 10 random halves) |
| feature space | `digits-features`, 64 features, images clamped and rounded to 8 bits |
| training command | `python checkpoints/make_digits.py --overwrite` (seed {seed}) |
| training | {iterations} iterations of {batch_size} images |
| time | {minutes:.1f} min of training, {machine} |

Limits: it has seen every image that it is compared with, and 8x8 digits prove machinery, not image quality.
"""


def main() -> None:
    """Parse the command line and make both folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("checkpoints"), help="parent folder of both")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--num_images", type=int, default=2_000, help="images of the card's FID")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace folders that exist")
    args = parser.parse_args()
    folders = args.output / "digits-features", args.output / "digits-ddpm"
    for folder in folders:
        interrupted = (args.output / "digits-ddpm.partial").exists()
        if folder.exists() and not (args.overwrite or interrupted):
            parser.error(f"'{folder}' exists; give another --output or --overwrite.")
    machine = f"{torch.get_num_threads()} threads, {platform.machine()} CPU, torch {torch.__version__}"
    images, labels = load_digits_tensors()
    features, report = make_features(folders[0], images, labels, args.seed)
    card = FEATURES_CARD.format(
        parameters=sum(p.numel() for p in features.parameters()) / 1e6,
        num_features=features.num_features,
        seed=args.seed,
        machine=machine,
        **report,
    )
    (folders[0] / "README.md").write_text(card)

    pipeline, seconds = train_ddpm(folders[1], images, args.seed, args.iterations)
    with torch.no_grad():
        real = features(images)
        halves = [
            real[torch.randperm(len(real), generator=generator_at(args.seed, i))[: len(real) // 2]] for i in range(10)
        ]
        half = sum(frechet_distance(*gaussian_moments(part), *gaussian_moments(real)).item() for part in halves) / 10
        made = features(sample_ddpm(pipeline, args.num_images, args.seed))
        fid = frechet_distance(*gaussian_moments(made), *gaussian_moments(real)).item()
    card = DDPM_CARD.format(
        parameters=sum(p.numel() for p in pipeline.unet.parameters()) / 1e6,
        fid=fid,
        half=half,
        num_images=args.num_images,
        iterations=args.iterations,
        batch_size=BATCH_SIZE,
        seed=args.seed,
        minutes=seconds / 60,
        machine=machine,
    )
    (folders[1] / "README.md").write_text(card)
    shutil.rmtree(folders[1].with_name(folders[1].name + ".partial"))
    print(f"'{folders[0]}': held-out accuracy {report['accuracy']:.4f}")
    print(f"'{folders[1]}': FID {fid:.3f} ({args.num_images} images, 1000 steps); half the real set {half:.3f}")


if __name__ == "__main__":
    main()
