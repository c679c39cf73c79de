"""Pictures of samples and samplers: image grids, heat maps, curves. matplotlib is imported where it draws."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.files import replacing
from ddss_lightning.images import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Pixels of the longer side of an image in a figure of many, at most.
THUMBNAIL = 64


def enlargement(height: int) -> int:
    """By how much pixels are enlarged to be seen, so that an image is at least 64 high: 8 times at 8, once at 64."""
    return -(-THUMBNAIL // height)


def thumbnails(images: Tensor) -> Tensor:
    """Images, shape (N, C, H, W), of at most 64 pixels a side: means over areas."""
    factor = max(images.shape[-2:]) / THUMBNAIL
    if factor <= 1:
        return images
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    return torch.nn.functional.interpolate(images, size, mode="area")


def image_grid(images: Tensor, columns: int = 8, scale: int = 1, gap: int = 1) -> Tensor:
    """One picture of many: shape (N, C, H, W) in [-1, 1] -> uint8 (1 or 3, rows * H + ..., columns * W + ...).

    Args:
        images: N at least 1; the last row is filled with white. Of two channels their mean is shown, of more than three
            the first three.
        columns: images per row, at most.
        scale: whole-number enlargement of each pixel.
        gap: white pixels between images.
    """
    columns = min(columns, len(images))
    visible = images.mean(1, keepdim=True) if images.shape[1] == 2 else images[:, :3]
    pixels = to_uint8(visible).cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    pixels = torch.nn.functional.pad(pixels, (0, gap, 0, gap), value=255)
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), 255)])
    return rearrange(pixels, "(row column) c h w -> c (row h) (column w)", column=columns)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a uint8 picture of shape (C, H, W), C = 1 (grey), 3 (RGB) or 4 (RGBA), as PNG."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    with replacing(path) as partial:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(partial, format="PNG")


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure as PNG."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)


def score_title(name: str) -> str:
    """How a score is written: `judge_fid` is "judge FID", `validation_images` "validation images"."""
    return " ".join(word.upper() if word in ("fid", "kid", "is") else word for word in name.split("_"))


def mu_figure(coefficients: Coefficients) -> Figure:
    """Heat map of mu and nu: row k says from what state k + 1 is made. Grey are the states that come later."""
    from matplotlib.figure import Figure

    mu, nu = coefficients.mu.detach().cpu(), coefficients.nu.detach().cpu()
    num_steps = len(nu)
    table = torch.cat([mu.masked_fill(torch.ones_like(mu).triu(1).bool(), torch.nan), nu[:, None]], 1).numpy()
    # At least as wide as the title.
    size = max(3.2, 1.2 + 0.45 * (num_steps + 1)), 1.2 + 0.4 * num_steps
    # Cells are square: the constrained layout reckons with a wider plot, and cuts the labels of the rows.
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots()
    # A weight of zero is white.
    axes.set_facecolor("0.85")
    limit = float(np.nanmax(np.abs(table)))
    picture = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if num_steps <= 10:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * limit else "black"
                # Adding zero takes the sign from -0.00.
                text = f"{round(value, 2) + 0.0:.2f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(num_steps + 1), [f"$x_{{{j}}}$" for j in range(num_steps)] + [r"$\hat x_0$"], fontsize=8)
    axes.set_yticks(range(num_steps), [f"$x_{{{k + 1}}}$" for k in range(num_steps)], fontsize=8)
    axes.set_title("weights of the states ($\\mu$) and of $\\hat x_0$ ($\\nu$)", fontsize=9)
    figure.colorbar(picture).ax.tick_params(labelsize=8)
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


def curves_figure(rows: Sequence[Mapping[str, Any]], score: str = "fid", title: str = "FID") -> Figure:
    """A score, on a logarithmic axis, against the number of network calls, one line a sampler: the mean over seeds.

    The band goes from the lowest to the highest seed. Learned samplers are bold, solvers pale. Of a single number of
    calls there are no lines: the samplers stand below each other, the lowest score first.

    Args:
        rows: each with `sampler`, `nfe`, `spacing` (`learned`, or that of a solver), `seed` and the score, None for no
            point. Learned samplers without a label, named `learned (...)`, are one line if there is one for each number
            of calls. A sampler that has no score with one of the seeds has no point at that number of calls.
        score: its name in the rows.
        title: of its axis.
    """
    from matplotlib.figure import Figure

    # As in the table: there is no mean where one of the seeds has no score.
    without = {(row["sampler"], row["nfe"]) for row in rows if row[score] is None}
    rows = [row for row in rows if (row["sampler"], row["nfe"]) not in without]
    if len({row["nfe"] for row in rows}) == 1:
        return _dots_figure(rows, score, title)
    names = _names_of_lines(rows)
    bold = {name for row, name in zip(rows, names, strict=True) if row["spacing"] == "learned"}
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    counts = {True: 0, False: 0}
    for name in dict.fromkeys(names):
        mine = [row for row, other in zip(rows, names, strict=True) if other == name]
        nfes = sorted({row["nfe"] for row in mine})
        values = [[row[score] for row in mine if row["nfe"] == nfe] for nfe in nfes]
        low, mean, high = ([f(v) for v in values] for f in (min, np.mean, max))
        style = _style(counts[name in bold], name in bold)
        counts[name in bold] += 1
        axes.plot(nfes, mean, label=name, **style)
        axes.fill_between(nfes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        # A band has no width at a single number of calls.
        axes.vlines(nfes, low, high, color=style["color"], linewidth=1)
    _log_ticks(axes, "y", min((row[score] for row in rows), default=1.0))
    _label_curves(axes, sorted({row["nfe"] for row in rows}), title)
    _tell_seeds(axes, rows)
    if rows:
        figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def _dots_figure(rows: Sequence[Mapping[str, Any]], score: str, title: str) -> Figure:
    """A sampler a line: the mean over seeds, and a bar from the lowest to the highest."""
    from matplotlib.figure import Figure

    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["sampler"], []).append(row[score])
    bold = {row["sampler"] for row in rows if row["spacing"] == "learned"}
    names = sorted(values, key=lambda name: np.mean(values[name]))
    figure = Figure(figsize=(7.5, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        mean, style = float(np.mean(values[name])), _style(0, name in bold)
        axes.plot(mean, place, **style)
        axes.hlines(place, min(values[name]), max(values[name]), color=style["color"], linewidth=1)
        axes.annotate(
            f"{mean:.3g}", (max(values[name]), place), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    _log_ticks(axes, "x", min(row[score] for row in rows))
    axes.margins(x=0.12)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 60) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{title}, {rows[0]['nfe']} network calls")
    axes.grid(alpha=0.3)
    _tell_seeds(axes, rows)
    return figure


def _tell_seeds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    num_seeds = len({row["seed"] for row in rows})
    if num_seeds > 1:
        axes.set_title(f"mean, lowest and highest of {num_seeds} seeds", fontsize=8)


def _names_of_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row the name of its line."""
    unlabelled = {(row["nfe"], row["sampler"]) for row in rows if row["sampler"].startswith("learned (")}
    one_line = len({nfe for nfe, _ in unlabelled}) == len(unlabelled)
    return ["learned" if one_line and row["sampler"].startswith("learned (") else row["sampler"] for row in rows]


def _style(index: int, bold: bool) -> dict[str, Any]:
    """How line number `index` of its kind is drawn: ten colours, which come again with other markers."""
    from matplotlib import colormaps

    # Red first among the bold: the first learned sampler is what one looks for.
    colour = colormaps["tab10"]((index + 3 * bold) % 10)[:3]
    if bold:
        return {"color": colour, "marker": "o", "linewidth": 3.0, "markersize": 7, "zorder": 3}
    pale = tuple(0.45 * part + 0.45 for part in colour)
    return {"color": pale, "marker": "sv^DxP*"[index % 7], "linewidth": 1.2, "markersize": 4, "zorder": 2}


def _log_ticks(axes: Axes, name: Literal["x", "y"], lowest: float) -> None:
    """A logarithmic axis with numbers as one writes them, unless there are some that it does not have."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if lowest <= 0:
        return
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_curves(axes: Axes, nfes: Sequence[int], title: str) -> None:
    axes.set_xticks(nfes)
    axes.set_xlabel("network calls")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)


def comparison_figure(grids: Sequence[tuple[str, Tensor]], title: str) -> Figure:
    """Grids of images side by side, at most six in a row.

    Args:
        grids: (title, images of shape (N, C, H, W) in [-1, 1], shown as `thumbnails`); long lines of titles are broken.
        title: of the whole, broken likewise.
    """
    from matplotlib.figure import Figure

    rows = -(-len(grids) // 6)
    columns = -(-len(grids) // rows)
    figure = Figure(figsize=(3 * columns, 3.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, images) in zip(panels, grids, strict=False):
        small = thumbnails(images)
        # Here pixels are seen anyway; enlarged further, the gaps between images would be too fine.
        grid = image_grid(small, columns=8, scale=min(4, enlargement(small.shape[-2]))).permute(1, 2, 0).numpy()
        axes.imshow(np.broadcast_to(grid, (*grid.shape[:2], 3)))
        axes.set_title("\n".join(textwrap.fill(line, 30) for line in name.splitlines()), fontsize=11)
    figure.suptitle(_broken(title, figure, 12), fontsize=12)
    return figure


def caption(figure: Figure, text: str) -> None:
    """Small print below a figure, in as many lines as its width needs."""
    figure.supxlabel(_broken(text, figure, 6), fontsize=6)


def _broken(text: str, figure: Figure, fontsize: float) -> str:
    """Text in lines that fit the width of a figure: a character is 0.65 of the font's size wide, or less."""
    return textwrap.fill(text, int(figure.get_figwidth() * 72 / (0.65 * fontsize)))
