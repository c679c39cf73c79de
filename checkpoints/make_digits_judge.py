"""Make `digits-judge`: an encoder of digits that no shipped sampler is learned or selected with.

    python checkpoints/make_digits_judge.py --output checkpoints --overwrite

Another architecture than `digits-features` (residual, group normalisation, pooled over positions) and another task: to
tell by which of the eight symmetries of the square an image was turned and mirrored (after Gidaris et al., ICLR 2018,
https://arxiv.org/abs/1803.07728, who use the four rotations), never which digit it shows. A minute on one core.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from training import generator_at

from ddss_lightning.data.digits import load_digits_tensors
from ddss_lightning.features import ResidualFeatures
from ddss_lightning.metrics import frechet_distance, gaussian_moments

BATCH_SIZE = 128
NAME = "digits-judge"


def turned(images: Tensor, symmetry: Tensor) -> Tensor:
    """Image i by the symmetry s_i of the square: s mod 4 quarter turns, and for s of 4 or more mirrored before."""
    result = images.clone()
    for s in range(8):
        mine = images[symmetry == s]
        result[symmetry == s] = torch.rot90(mine.flip(-1) if s >= 4 else mine, s % 4, (-2, -1))
    return result


def train_judge(images: Tensor, seed: int, epochs: int) -> tuple[ResidualFeatures, nn.Linear]:
    """AdamW with cosine decay, a random symmetry for each image and epoch."""
    torch.manual_seed(seed)
    network = ResidualFeatures(1, 8, width=16)
    head = nn.Linear(network.num_features, 8)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=2e-3, weight_decay=2e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in track(range(epochs), "judge, epochs"):
        generator = generator_at(seed, epoch)
        for index in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            symmetry = torch.randint(0, 8, (len(index),), generator=generator)
            loss = nn.functional.cross_entropy(head(network(turned(images[index], symmetry))), symmetry)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network.freeze(), head.requires_grad_(False)


def accuracy(network: ResidualFeatures, head: nn.Linear, images: Tensor) -> float:
    """Part of the symmetries that are told, of all eight of each image."""
    symmetry = torch.arange(8).repeat_interleave(len(images))
    told = head(network(turned(images.repeat(8, 1, 1, 1), symmetry))).argmax(1)
    return float((told == symmetry).float().mean())


CARD = """---
license: apache-2.0
library_name: ddss_lightning
tags: [feature-extraction]
datasets: [scikit-learn digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)]
---
# digits-judge

A residual encoder of 8x8 digits ({parameters:.2f} M parameters), whose {num_features} pooled features are a second
opinion on samplers: **no shipped sampler is learned or selected with it.** It was trained to tell by which of the eight
symmetries of the square an image was turned and mirrored, never which digit it shows. `ddss compare --judge
checkpoints/digits-judge` uses it; `ddss_lightning.features.ResidualFeatures.from_pretrained` loads it.

| | |
|---|---|
| held-out accuracy (same training on 80 %, tested on 20 %) | {accuracy:.4f} of eight symmetries |
| the same scale: half of the real set against all of it | FID {half:.3f} (mean of 10 random halves) |
| the shipped weights | trained on all 1797 images, {epochs} epochs |
| training command | `python checkpoints/make_digits_judge.py --overwrite` (seed {seed}) |
| time | {seconds:.0f} s, {machine} |
"""


def main() -> None:
    """Parse the command line and make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("checkpoints"), help="parent folder")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    args = parser.parse_args()
    folder = args.output / NAME
    if folder.exists() and not args.overwrite:
        parser.error(f"'{folder}' exists; give another --output or --overwrite.")
    started = time.time()
    images, _ = load_digits_tensors()
    order = torch.randperm(len(images), generator=generator_at(args.seed))
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    found = accuracy(*train_judge(images[kept], args.seed, args.epochs), images[held_out])
    network, _ = train_judge(images, args.seed, args.epochs)
    network.save_pretrained(folder)
    real = network(images)
    parts = [real[torch.randperm(len(real), generator=generator_at(args.seed, i))[: len(real) // 2]] for i in range(10)]
    half = sum(frechet_distance(*gaussian_moments(part), *gaussian_moments(real)).item() for part in parts) / 10
    card = CARD.format(
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        num_features=network.num_features,
        accuracy=found,
        half=half,
        epochs=args.epochs,
        seed=args.seed,
        seconds=time.time() - started,
        machine=f"{torch.get_num_threads()} threads, {platform.machine()} CPU, torch {torch.__version__}",
    )
    (folder / "README.md").write_text(card)
    print(f"'{folder}': accuracy {found:.4f}, half the real set against all of it: FID {half:.3f}")


if __name__ == "__main__":
    main()
