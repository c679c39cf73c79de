"""Pictures of samples and samplers: image grids, heat maps, curves. matplotlib is imported where it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.files import replacing
from ddss_lightning.images import to_uint8

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grid(images: Tensor, columns: int = 8, scale: int = 1, gap: int = 1) -> Tensor:
    """One picture of many: shape (N, C, H, W) in [-1, 1] -> uint8 (C, rows * H + ..., columns * W + ...).

    Args:
        images: N at least 1; the last row is filled with white.
        columns: images per row.
        scale: whole-number enlargement of each pixel.
        gap: white pixels between images.
    """
    pixels = to_uint8(images).cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    pixels = torch.nn.functional.pad(pixels, (0, gap, 0, gap), value=255)
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), 255)])
    return rearrange(pixels, "(row column) c h w -> c (row h) (column w)", column=columns)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a uint8 picture of shape (C, H, W), C = 1 or 3, as PNG."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    with replacing(path) as partial:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(partial, format="PNG")


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure as PNG."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)


def mu_figure(coefficients: Coefficients) -> Figure:
    """Heat map of mu and nu: row k says from what state k + 1 is made."""
    from matplotlib.figure import Figure

    mu, nu = coefficients.mu.detach().cpu(), coefficients.nu.detach().cpu()
    num_steps = len(nu)
    table = torch.cat([mu.masked_fill(torch.ones_like(mu).triu(1).bool(), torch.nan), nu[:, None]], 1).numpy()
    figure = Figure(figsize=(1.2 + 0.45 * (num_steps + 1), 1.2 + 0.4 * num_steps), layout="constrained")
    axes = figure.subplots()
    limit = float(np.nanmax(np.abs(table)))
    picture = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if num_steps <= 10:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(num_steps + 1), [f"$x_{{{j}}}$" for j in range(num_steps)] + [r"$\hat x_0$"], fontsize=8)
    axes.set_yticks(range(num_steps), [f"$x_{{{k + 1}}}$" for k in range(num_steps)], fontsize=8)
    axes.set_title("weights of the states ($\\mu$) and of $\\hat x_0$ ($\\nu$)", fontsize=9)
    figure.colorbar(picture)
    return figure


def times_figure(steps: Sequence[int], logsnrs: Sequence[Sequence[float]], times: Sequence[Sequence[float]]) -> Figure:
    """Learned half log-SNRs and network timesteps over training.

    Args:
        steps: global steps, length n.
        logsnrs: n rows of K half log-SNRs.
        times: n rows of K timesteps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2),
        (logsnrs, times),
        ("half log-SNR of the states", "timestep shown to the network"),
        strict=True,
    ):
        axes.plot(steps, np.array(values), marker=".")
        axes.set_xlabel("training step")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    return figure


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """FID against the number of network calls, one line a sampler; the band spans the seeds.

    Args:
        rows: each with `sampler`, `nfe`, `seed` and `fid`, None for no point. Learned samplers, named `learned (...)`,
            are one line if there is one for each number of calls.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["fid"] is not None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    learned_rows = {(row["nfe"], row["sampler"]) for row in rows if row["sampler"].startswith("learned")}
    one_line = len({nfe for nfe, _ in learned_rows}) == len(learned_rows)
    names = ["learned" if one_line and row["sampler"].startswith("learned") else row["sampler"] for row in rows]
    for name in dict.fromkeys(names):
        mine = [row for row, mine in zip(rows, names, strict=True) if mine == name]
        nfes = sorted({row["nfe"] for row in mine})
        values = [[row["fid"] for row in mine if row["nfe"] == nfe] for nfe in nfes]
        learned = name.startswith("learned")
        (line,) = axes.plot(nfes, [np.mean(v) for v in values], "o-", label=name, linewidth=2.5 if learned else 1.2)
        axes.fill_between(nfes, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["nfe"] for row in rows}))
    axes.set_xlabel("network calls")
    axes.set_ylabel("FID")
    axes.grid(alpha=0.3, which="both")
    if rows:
        axes.legend(fontsize=8)
    return figure


def comparison_figure(grids: Sequence[tuple[str, Tensor]], title: str) -> Figure:
    """Grids of images side by side.

    Args:
        grids: (title, images of shape (N, C, H, W) in [-1, 1]).
        title: of the whole.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(grids), 3.5), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
        grid = image_grid(images, columns=8, scale=4).permute(1, 2, 0).numpy()
        axes.imshow(np.broadcast_to(grid, (*grid.shape[:2], 3)))
        axes.set_title(name, fontsize=11)
        axes.set_axis_off()
    figure.suptitle(title, fontsize=12)
    return figure
