"""Tables of `docs/evaluation.md`: FID of a perfect sampler by the number of images, and the ways of resizing.

    python recipes/evaluation.py

FID: real digits drawn with replacement against all of them, the mean of 20 draws. Resizing: synthetic images (sums of
sinusoids of random frequency, and sharp edges) of several sizes are resized to 299 x 299 in every way; the table gives
the root mean square difference to `tf1`, in pixel levels of 0 to 255.
"""

from __future__ import annotations

from typing import get_args

import torch
from demo import sampling_floor
from torch import Tensor

from ddss_lightning.data import DigitsDataModule
from ddss_lightning.features import ConvFeatures
from ddss_lightning.features.resize import Resize, resize_images
from ddss_lightning.noise import generator_for


def images(size: int, num: int = 32) -> Tensor:
    """Waves with up to `size / 4` periods, half of them cut into edges; shape (num, 3, size, size), 0 to 255."""
    generator = generator_for("resizing", size)
    axis = torch.linspace(0, 2 * torch.pi, size)
    frequency = torch.rand(num, 3, 2, 1, 1, generator=generator) * size / 4
    phase = torch.rand(num, 3, 1, 1, generator=generator) * 6
    waves = torch.sin(frequency[:, :, 0] * axis[:, None] + frequency[:, :, 1] * axis + phase)
    edges = torch.where(waves[num // 2 :] > 0, 1.0, -1.0)
    return (torch.cat([waves[: num // 2], edges]) + 1) * 127.5


@torch.no_grad()
def bias() -> None:
    """Print the FID of real images."""
    features = ConvFeatures.from_pretrained("checkpoints/digits-features")
    real = features(torch.cat(list(DigitsDataModule().real_dataloader())))
    counts = (250, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
    print("| images | " + " | ".join(f"{count:,}" for count in counts) + " |")
    print("|---" * (len(counts) + 1) + "|")
    print("| FID | " + " | ".join(f"{sampling_floor(real, count):.2f}" for count in counts) + " |")


def resizing() -> None:
    """Print the differences to `tf1`."""
    sizes, modes = (32, 64, 256, 512), get_args(Resize)
    print("| resize | " + " | ".join(f"{size} to 299" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for mode in modes:
        cells = []
        for size in sizes:
            x = images(size)
            difference = resize_images(x, 299, mode) - resize_images(x, 299, "tf1")
            cells.append(f"{float(difference.square().mean().sqrt()):.1f}")
        print(f"| `{mode}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    bias()
    print()
    resizing()
