"""Make `glyphs-features`, `glyphs-judge` and `glyphs-ddpm`: the networks of the glyphs benchmark.

    python checkpoints/make_glyphs.py --preset gpu --output checkpoints --overwrite    # 32x32
    python checkpoints/make_glyphs.py --preset cpu --output checkpoints --overwrite    # 16x16
    python checkpoints/make_glyphs.py ... --only_ddpm    # with the classifier and the judge that are there

Stages, each with a progress bar: images (once, into the cache), the classifier, the judge, the DDPM, samples of it
with all 1000 steps, and the figures of the cards. Any of them can be interrupted: each keeps its state in
`<folder>.partial`, every random number is a function of (seed, iteration), and the same command goes on where it
stopped, to the same result (bit for bit on a CPU with the same number of threads). While the DDPM trains,
`glyphs-ddpm.partial` also gets a picture of samples with every saved state.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from rich.progress import track
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import generator_at, save_atomically, train

from ddss_lightning.data.glyphs import GlyphArrays, load_glyphs
from ddss_lightning.denoisers import Denoiser, DiffusersDenoiser
from ddss_lightning.features import ConvFeatures, FeatureExtractor, ResidualFeatures
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.glyphs import CLASSES, RECIPE, TRAIN_FACES
from ddss_lightning.images import to_pixels
from ddss_lightning.metrics import frechet_distance, gaussian_moments
from ddss_lightning.pictures import comparison_figure, image_grid, save_png
from ddss_lightning.schedule import NoiseSchedule

NULL_LABEL = len(CLASSES)
FOLDERS = ("glyphs-features", "glyphs-judge", "glyphs-ddpm")


@dataclass
class Settings:
    """What is made; every field is a flag.

    Attributes:
        size: height = width of the images.
        encoder_width: channels of the first convolutions of classifier and judge.
        encoder_iterations: of each, with `encoder_batch` images.
        channels: of the resolutions of the U-Net.
        attention: resolutions (0 is the full one) with self-attention.
        iterations: of the U-Net in each round of its training, with `batch_size` images; see `make_ddpm`.
        lr: its peak learning rate.
        ema_decay: of the average of its weights.
        label_dropout: part of the images whose label is replaced by the null label.
        num_images: samples of the card's figures.
    """

    size: int = 32
    encoder_width: int = 48
    encoder_iterations: int = 8_000
    encoder_batch: int = 256
    channels: tuple[int, ...] = (64, 96, 128)
    attention: tuple[int, ...] = (1, 2)
    iterations: tuple[int, ...] = (60_000,)
    batch_size: int = 512
    lr: float = 5e-4
    ema_decay: float = 0.9998
    label_dropout: float = 0.5
    num_images: int = 10_000
    seed: int = 0


PRESETS = {
    "gpu": Settings(),
    "cpu": Settings(
        size=16,
        encoder_width=32,
        encoder_iterations=2000,
        encoder_batch=128,
        channels=(24, 48, 96),
        attention=(2,),
        iterations=(20_000, 40_000),
        batch_size=64,
        lr=1e-3,
        ema_decay=0.9995,
        num_images=2000,
    ),
}


def autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def images_at(arrays: GlyphArrays, index: Tensor) -> Tensor:
    """Images, float32 in [-1, 1], channels last."""
    return (arrays.pixels[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def partial_of(folder: Path) -> Path:
    """Where an unfinished stage keeps its state."""
    return folder.with_name(folder.name + ".partial")


def train_encoder(
    folder: Path, network: FeatureExtractor, heads: nn.ModuleDict, data: GlyphArrays, settings: Settings, device: str
) -> float:
    """Train for labels (`label`), faces (`face`) and parameters of the scenes (`scene`), whichever have heads.

    Cross-entropy and mean squared error, summed; AdamW with cosine decay. Returns seconds.
    """
    parts = nn.ModuleDict({"network": network, "heads": heads}).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-3, weight_decay=2e-2)
    iterations, batch_size = settings.encoder_iterations, settings.encoder_batch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    def step(iteration: int) -> Tensor:
        generator = generator_at(settings.seed, iteration, device=device)
        index = torch.randint(0, len(data.pixels), (batch_size,), generator=generator, device=device)
        with autocast(device):
            features = network(images_at(data, index))
            # Dropout by hand: its random numbers are functions of the iteration, as all others.
            kept = torch.rand(features.shape, generator=generator, device=device) < 0.8
            output = {name: head(features * kept / 0.8).float() for name, head in heads.items()}
        loss = torch.zeros((), device=device)
        for name, target in (("label", data.labels), ("face", data.faces)):
            if name in output:
                loss = loss + nn.functional.cross_entropy(output[name], target[index])
        if "scene" in output:
            loss = loss + nn.functional.mse_loss(output["scene"], data.parameters[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.detach()

    run = {"network": type(network).__name__, **run_of(settings, "size", "seed", "encoder_width", "encoder_batch")}
    keep = {"parts": parts, "optimizer": optimizer, "scheduler": scheduler}
    return train(folder.name, partial_of(folder), {**run, "device": device}, keep, step, iterations)


def run_of(settings: Settings, *names: str) -> dict[str, Any]:
    """Fields that a run's state must agree in, with the recipe of the images."""
    return {"recipe": RECIPE, **{name: value for name, value in asdict(settings).items() if name in names}}


def make_features(folder: Path, data: GlyphArrays, settings: Settings, device: str) -> tuple[ConvFeatures, float]:
    """The classifier: labels from images."""
    torch.manual_seed(settings.seed)
    network = ConvFeatures(
        3, settings.size, settings.encoder_width, num_features=128, num_classes=len(CLASSES), num_stages=3
    )
    for module in network.body:
        # Without normalisation, torch's own start lets six convolutions and the hidden layer fade to nothing.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    seconds = train_encoder(folder, network, nn.ModuleDict({"label": network.head}), data, settings, device)
    network.save_pretrained(folder)
    return network.freeze(), seconds


def make_judge(
    folder: Path, data: GlyphArrays, settings: Settings, device: str
) -> tuple[ResidualFeatures, nn.ModuleDict, float]:
    """The judge: how the scene was drawn (face, shape, colours), never what letter it is."""
    torch.manual_seed(settings.seed + 1)
    network = ResidualFeatures(3, settings.size, settings.encoder_width)
    outputs = {"face": len(TRAIN_FACES), "scene": data.parameters.shape[1]}
    heads = nn.ModuleDict({name: nn.Linear(network.num_features, num) for name, num in outputs.items()})
    seconds = train_encoder(folder, network, heads, data, settings, device)
    network.save_pretrained(folder)
    return network.freeze(), heads.requires_grad_(False), seconds


def make_unet(settings: Settings) -> UNet2DModel:
    """One residual block per resolution on the way down, two on the way up; the last label is the null label."""
    attention = [level in settings.attention for level in range(len(settings.channels))]
    return UNet2DModel(
        sample_size=settings.size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=settings.channels,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        norm_num_groups=8,
        num_class_embeds=NULL_LABEL + 1,
    )


def make_ddpm(
    folder: Path, data: GlyphArrays, settings: Settings, device: str, save_minutes: float = 3.0
) -> tuple[DiffusersDenoiser, float]:
    """Train with the simple loss (Ho et al. 2020, eq. 14), in rounds with warm restarts (Loshchilov and Hutter 2017).

    Each round starts from the averaged weights of the one before, with a fresh Adam, warm-up and cosine decay, and
    averages its weights anew. Returns the network with the last average, and the seconds of all rounds.
    """
    torch.manual_seed(settings.seed)
    # Sampling stays linear in the network's output: no clipping of x_0 inside the chain.
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    schedule = NoiseSchedule.from_scheduler(noise_scheduler)
    unet, seconds = make_unet(settings), 0.0

    def as_denoiser(unet: nn.Module) -> DiffusersDenoiser:
        return DiffusersDenoiser(copy.deepcopy(unet), schedule, name=folder.name, null_label=NULL_LABEL)

    def preview(done: int, unet: nn.Module) -> None:
        images = sample_ddim(as_denoiser(unet), 64, 25, settings, device)
        save_png(image_grid(images, columns=16, scale=3), partial_of(folder) / f"samples-{done:06d}.png")

    for number in range(len(settings.iterations)):
        unet, spent = train_round(
            folder, number, unet, noise_scheduler.alphas_cumprod, data, settings, device, save_minutes, preview
        )
        seconds += spent
    finished = copy.deepcopy(unet).cpu().to(memory_format=torch.contiguous_format).eval()
    finished.save_pretrained(folder / "unet")
    noise_scheduler.save_pretrained(folder / "scheduler")
    (folder / "classes.json").write_text(json.dumps({"null_label": NULL_LABEL, "classes": list(CLASSES)}) + "\n")
    return as_denoiser(unet), seconds


def train_round(
    folder: Path,
    number: int,
    unet: UNet2DModel,
    alphas_cumprod: Tensor,
    data: GlyphArrays,
    settings: Settings,
    device: str,
    save_minutes: float,
    preview: Callable[[int, nn.Module], None],
) -> tuple[UNet2DModel, float]:
    """One round from the weights of `unet`, with label dropout; returns the averaged network and seconds.

    `preview` is called with the iterations done in all rounds and the averaged network, at each saved state.
    """
    unet = unet.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    optimizer = torch.optim.Adam(unet.parameters(), lr=settings.lr)
    earlier, iterations = sum(settings.iterations[:number]), settings.iterations[number]
    alphas_cumprod, batch_size = alphas_cumprod.to(device), settings.batch_size
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 500) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / iterations)))
    )

    def step(iteration: int) -> Tensor:
        generator = generator_at(settings.seed, earlier + iteration, device=device)
        index = torch.randint(0, len(data.pixels), (batch_size,), generator=generator, device=device)
        x_0 = images_at(data, index)
        dropped = torch.rand(batch_size, generator=generator, device=device) < settings.label_dropout
        labels = data.labels[index].masked_fill(dropped, NULL_LABEL)
        # Stratified timesteps: uniform, with less variance of the gradient.
        offsets = torch.rand(batch_size, generator=generator, device=device)
        timesteps = (torch.arange(batch_size, device=device) + offsets) * (1000 / batch_size)
        timesteps = timesteps.long().clamp(max=999)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        alpha_squared = alphas_cumprod[timesteps][:, None, None, None]
        x_t = alpha_squared.sqrt() * x_0 + (1 - alpha_squared).sqrt() * noise
        with autocast(device):
            eps = unet(x_t, timesteps, labels).sample
        loss = nn.functional.mse_loss(eps.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(unet)
        return loss.detach()

    names = ("size", "seed", "channels", "attention", "batch_size", "lr", "ema_decay", "label_dropout")
    keep = {"unet": unet, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    run = {**run_of(settings, *names), "device": device, "round": number}
    partial = partial_of(folder) / f"round-{number}"
    seconds = train(
        folder.name,
        partial,
        run,
        keep,
        step,
        iterations,
        save_minutes,
        lambda done: preview(earlier + done, ema.module),
    )
    return ema.module, seconds


@torch.no_grad()
def sample_ddim(denoiser: Denoiser, num_images: int, num_steps: int, settings: Settings, device: str) -> Tensor:
    """DDIM at equal steps in time, from the first noises of `sample_ddpm`."""
    sampler = GGDMSampler(denoiser.schedule, num_steps, anchor="ddim", stride="linear", learn=())
    noise = [first_noise(start, settings) for start in range(0, num_images, SAMPLE_BATCH)]
    parts = torch.cat(noise)[:num_images].split(SAMPLE_BATCH)
    with autocast(device):
        return to_pixels(torch.cat([sampler(denoiser, part.to(device)).float().cpu() for part in parts]))


SAMPLE_BATCH = 250


def first_noise(start: int, settings: Settings) -> Tensor:
    """x_T of samples `start` to `start + 249`, on the CPU, shape (250, 3, size, size)."""
    shape = (SAMPLE_BATCH, 3, settings.size, settings.size)
    return torch.randn(shape, generator=generator_at(settings.seed, 10**9, start))


@torch.no_grad()
def sample_ddpm(denoiser: Denoiser, partial: Path, settings: Settings, device: str) -> Tensor:
    """Ancestral sampling with all 1000 steps, as 8-bit images; each finished batch is kept in `partial`."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    batches = []
    for start in range(0, settings.num_images, SAMPLE_BATCH):
        path = partial / f"images-{start}.pt"
        if not path.exists():
            generator = generator_at(settings.seed, 10**9 + 1, start, device=device)
            x = first_noise(start, settings).to(device)
            for timestep in track(scheduler.timesteps, f"1000-step DDPM, images from {start}"):
                with autocast(device):
                    eps = denoiser(x, timestep.to(device).expand(len(x)))
                x = scheduler.step(eps.float(), timestep, x, generator=generator).prev_sample
            save_atomically(to_pixels(x).cpu(), path)
        batches.append(torch.load(path, weights_only=True))
    return torch.cat(batches)[: settings.num_images]


@torch.no_grad()
def features_of(features: FeatureExtractor, data: GlyphArrays | Tensor, device: str) -> Tensor:
    """Features of images, or of all images of a split, float32 on the CPU."""
    num = len(data) if isinstance(data, Tensor) else len(data.pixels)
    batches = torch.arange(num, device=device).split(1000)
    images = (data[i.cpu()].to(device) if isinstance(data, Tensor) else images_at(data, i) for i in batches)
    return torch.cat([features(part).cpu() for part in images])


def distances(features: FeatureExtractor, sets: dict[str, Tensor], real: GlyphArrays, device: str) -> dict[str, float]:
    """Frechet distance of each set of images to all real images, in one feature space."""
    moments = gaussian_moments(features_of(features, real, device))
    made = {name: gaussian_moments(features_of(features, images, device)) for name, images in sets.items()}
    return {name: float(frechet_distance(*mine, *moments)) for name, mine in made.items()}


@torch.no_grad()
def accuracy(features: FeatureExtractor, head: nn.Module, data: GlyphArrays, targets: Tensor, device: str) -> float:
    """Part of the images whose largest output is the target."""
    return float((head(features_of(features, data, device).to(device)).argmax(1) == targets).float().mean())


HEADER = """---
license: apache-2.0
library_name: {library}
tags: [{tags}]
datasets: [glyphs (ddss_lightning.GlyphsDataModule, recipe {recipe}, {size}x{size})]
---
"""

FEATURES_CARD = """# glyphs-features

A convolutional classifier of {size}x{size} glyphs, 62 classes ({parameters:.2f} M parameters). Its 128 penultimate
features serve FID, KID and the loss of the glyphs benchmark; its logits serve the Inception Score. Load it with
`ddss_lightning.features.ConvFeatures.from_pretrained`.

| | |
|---|---|
| accuracy, 10,000 held-out images | {accuracy:.4f} (no network reaches 1: o and O, l and I, ... differ in size alone) |
| accuracy, those of the faces it was trained on | {accuracy_seen:.4f} |
| trained on | all 50,000 training images, {encoder_iterations} iterations of {encoder_batch} |
| training command | `{command}` (seed {seed}) |
| time | {minutes:.1f} min, {machine} |
"""

JUDGE_CARD = """# glyphs-judge

A residual encoder of {size}x{size} glyphs ({parameters:.2f} M parameters), whose {num_features} pooled features are a
second opinion on samplers: **no shipped sampler is learned with it, and no step of learning selected**. (When the
weights of the loss in `recipes/glyphs.yaml` were chosen, its scores on validation noise were in view;
`docs/findings/attempts.md` says how.) Its architecture (residual, group normalisation, ReLU, pooled over positions) and
its task differ from those of `glyphs-features`: it was trained to tell how an image was drawn (face; size, rotation,
shear, stretch; colours of glyph and background and how they change across the image), never which letter it shows.
Load it with `ddss_lightning.features.ResidualFeatures.from_pretrained`.

| | |
|---|---|
| accuracy of the face, held-out images of the {faces} faces it was trained on | {accuracy:.4f} |
| part of the variance of the 22 parameters explained, held-out images | {explained:.4f} |
| trained on | all 50,000 training images, {encoder_iterations} iterations of {encoder_batch} |
| training command | `{command}` (seed {seed}) |
| time | {minutes:.1f} min, {machine} |
"""

DDPM_CARD = """# glyphs-ddpm

A DDPM of {size}x{size} coloured glyphs: `UNet2DModel` with {parameters:.2f} M parameters, 1000 steps, linear betas,
noise prediction, EMA {ema_decay}, class-conditional with label dropout {label_dropout}. Label {null} is the null label,
0 to 61 are `{classes}`.
`DiffusersDenoiser.from_pretrained("checkpoints/glyphs-ddpm")` shows it the null label, so it is unconditional;
`.with_labels(labels, guidance_scale)` conditions and guides it.

![From the same noise: DDPM with 1000 steps, DDIM with 10; and labels 0 to 61, guidance scale 2](samples.png)

| | |
|---|---|
| FID, DDPM sampling with 1000 network calls | {ddpm:.3f} ({num_images} images against all 50,000 training images) |
| the same in the space of `glyphs-judge` | {ddpm_judge:.3f} |
| FID, DDIM with 50 and 10 network calls at equal steps, same noise | {ddim_50:.3f}, {ddim_10:.3f} |
| the same in the space of `glyphs-judge` | {ddim_50_judge:.3f}, {ddim_10_judge:.3f} |
| the same scale: {num_images} held-out images of the faces in training | {real:.3f}; judge {real_judge:.3f} |
| feature spaces | `glyphs-features` (128), `glyphs-judge` ({num_features}), images clamped and rounded to 8 bits |
| training command | `{command}` (seed {seed}) |
| training | {rounds} iterations of {batch_size} images, in rounds with warm restarts |
| time | {minutes:.1f} min of training, {machine} |
"""


def parse() -> tuple[argparse.Namespace, Settings]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="defaults of the flags below")
    parser.add_argument("--output", type=Path, default=Path("checkpoints"), help="parent folder of all three")
    parser.add_argument("--device", help="default: cuda for the preset gpu, else cpu")
    parser.add_argument("--cache_dir", help="of the images; default: see ddss_lightning.data.glyphs")
    parser.add_argument("--overwrite", action="store_true", help="replace folders that exist")
    parser.add_argument("--only_ddpm", action="store_true", help="with the classifier and the judge of --output")
    for name, value in asdict(Settings()).items():
        several = isinstance(value, tuple)
        kind = type(value[0] if several else value)
        parser.add_argument(f"--{name}", type=kind, nargs="+" if several else None)
    args = parser.parse_args()
    settings = copy.copy(PRESETS[args.preset])
    for name, value in vars(args).items():
        if hasattr(settings, name) and value is not None:
            setattr(settings, name, tuple(value) if isinstance(value, list) else value)
    args.device = args.device or ("cuda" if args.preset == "gpu" else "cpu")
    made = FOLDERS[2:] if args.only_ddpm else FOLDERS
    for name in FOLDERS[: -len(made)]:
        if not (args.output / name / "config.json").exists():
            parser.error(f"--only_ddpm: there is no '{args.output / name}'; leave the flag out to make it.")
        size = json.loads((args.output / name / "config.json").read_text())["image_size"]
        if size != settings.size:
            parser.error(f"--only_ddpm: '{args.output / name}' is for images of {size} pixels, not {settings.size}.")
    for name in made:
        folder = args.output / name
        if folder.exists() and not (args.overwrite or partial_of(args.output / made[0]).exists()):
            parser.error(f"'{folder}' exists; give another --output or --overwrite.")
    return args, settings


@dataclass
class Cards:
    """Writes the README.md of each folder, with what all cards have in common."""

    settings: Settings
    command: str
    machine: str

    def write(self, folder: Path, library: str, tags: str, card: str, network: nn.Module, **values: Any) -> None:  # noqa: ANN401
        """One of the three cards, filled in."""
        header = HEADER.format(library=library, tags=tags, recipe=RECIPE, size=self.settings.size)
        values |= {"parameters": sum(p.numel() for p in network.parameters()) / 1e6}
        values |= {"command": self.command, "machine": self.machine}
        (folder / "README.md").write_text(header + card.format(**asdict(self.settings), **values))


@dataclass
class Images:
    """The images of training, those held out, and those held out of the faces in training."""

    train: GlyphArrays
    held_out: GlyphArrays
    held_out_seen: GlyphArrays

    @staticmethod
    def load(size: int, cache_dir: str | None, device: str) -> Images:
        """From the cache, or rendered into it."""
        train, held_out = (
            GlyphArrays(*(array.to(device) for array in load_glyphs(split, size, cache_dir)))
            for split in ("train", "held_out")
        )
        seen = held_out.faces < len(TRAIN_FACES)
        return Images(train, held_out, GlyphArrays(*(array[seen] for array in held_out)))


def features_with_card(folder: Path, images: Images, settings: Settings, cards: Cards, device: str) -> ConvFeatures:
    """`glyphs-features`."""
    features, seconds = make_features(folder, images.train, settings, device)
    right, right_seen = (
        accuracy(features, features.head, part, part.labels, device) for part in (images.held_out, images.held_out_seen)
    )
    tags = "image-classification, feature-extraction"
    cards.write(
        folder, "ddss_lightning", tags, FEATURES_CARD, features,
        accuracy=right, accuracy_seen=right_seen, minutes=seconds / 60,
    )  # fmt: skip
    return features


def judge_with_card(folder: Path, images: Images, settings: Settings, cards: Cards, device: str) -> ResidualFeatures:
    """`glyphs-judge`."""
    judge, heads, seconds = make_judge(folder, images.train, settings, device)
    held_out, seen = images.held_out, images.held_out_seen
    predicted = heads["scene"](features_of(judge, held_out, device).to(device))
    explained = 1 - (predicted - held_out.parameters).square().mean() / held_out.parameters.var(dim=0).mean()
    cards.write(
        folder, "ddss_lightning", "feature-extraction", JUDGE_CARD, judge,
        num_features=judge.num_features, faces=len(TRAIN_FACES), explained=float(explained), minutes=seconds / 60,
        accuracy=accuracy(judge, heads["face"], seen, seen.faces, device),
    )  # fmt: skip
    return judge


def ddpm_with_card(
    folder: Path,
    features: FeatureExtractor,
    judge: FeatureExtractor,
    images: Images,
    settings: Settings,
    cards: Cards,
    device: str,
) -> None:
    """`glyphs-ddpm`, with its samples and their distances to real images."""
    denoiser, seconds = make_ddpm(folder, images.train, settings, device)
    sets = {"ddpm": sample_ddpm(denoiser, partial_of(folder), settings, device)}
    for steps in (50, 10):
        sets[f"ddim_{steps}"] = sample_ddim(denoiser, settings.num_images, steps, settings, device)
    # Faces and letters follow the index: the first images are no fair sample.
    order = torch.randperm(len(images.held_out_seen.pixels), generator=generator_at(settings.seed, 10**9 + 2))
    sets["real"] = images_at(images.held_out_seen, order[: settings.num_images].to(device)).cpu()
    labels = torch.arange(len(CLASSES))
    guided = sample_ddim(denoiser.with_labels(labels, 2.0), len(CLASSES), 50, settings, device)
    figure = comparison_figure(
        [("DDPM, 1000 steps", sets["ddpm"][:64]), ("DDIM, 10 steps", sets["ddim_10"][:64]), ("guided, 2.0", guided)],
        f"glyphs-ddpm, {settings.size}x{settings.size}",
    )
    figure.savefig(folder / "samples.png", dpi=120)
    judged = distances(judge, sets, images.train, device)
    tags = "unconditional-image-generation, class-conditional-image-generation, ddpm"
    cards.write(
        folder, "diffusers", tags, DDPM_CARD, denoiser,
        null=NULL_LABEL, classes=CLASSES, rounds=" + ".join(str(number) for number in settings.iterations),
        minutes=seconds / 60, num_features=judge.num_features, **distances(features, sets, images.train, device),
        **{f"{name}_judge": value for name, value in judged.items()},
    )  # fmt: skip


def main() -> None:
    """Make the three folders, or the last one with the first two as they are."""
    args, settings = parse()
    device, folders = args.device, [args.output / name for name in FOLDERS]
    images = Images.load(settings.size, args.cache_dir, device)
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}, {platform.machine()} CPU"
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else threads
    command = f"python checkpoints/make_glyphs.py --preset {args.preset} --overwrite"
    cards = Cards(settings, command, f"{machine}, torch {torch.__version__}")
    features: FeatureExtractor
    judge: FeatureExtractor
    if args.only_ddpm:
        features = ConvFeatures.from_pretrained(str(folders[0])).to(device)
        judge = ResidualFeatures.from_pretrained(str(folders[1])).to(device)
    else:
        features = features_with_card(folders[0], images, settings, cards, device)
        judge = judge_with_card(folders[1], images, settings, cards, device)
    ddpm_with_card(folders[2], features, judge, images, settings, cards, device)
    for folder in folders[2:] if args.only_ddpm else folders:
        shutil.rmtree(partial_of(folder))
        print(f"'{folder}': see its README.md")


if __name__ == "__main__":
    main()
