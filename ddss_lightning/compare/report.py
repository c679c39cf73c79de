"""What a comparison leaves: tables, the best starts, curves, pictures, TensorBoard logs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from ddss_lightning.compare.candidates import Candidate
from ddss_lightning.compare.scorer import Scorer
from ddss_lightning.compare.settings import Comparison
from ddss_lightning.files import replacing
from ddss_lightning.pictures import caption, comparison_figure, curves_figure, save_figure, score_title, thumbnails

# What a row of the table holds besides scores.
ABOUT = ("sampler", "nfe", "spacing", "folder", "seed", "not_finite")
# The scores that a terminal has room for.
SHORT = ("fid", "kid", "judge_fid")


def markdown(rows: list[dict[str, Any]], protocol: Mapping[str, Any]) -> str:
    """All scores, see `_cells`, and the protocol."""
    cells = _cells(rows, protocol["images"], [key for key in rows[0] if key not in ABOUT])
    head, *lines = [f"| {' | '.join(line)} |" for line in cells]
    rule = "|---" * len(cells[0]) + "|"
    notes = [f"- {name.replace('_', ' ')}: {value}" for name, value in protocol.items()]
    seeds = ", ".join(map(str, dict.fromkeys(row["seed"] for row in rows)))
    return "\n".join([head, rule, *lines, "", "Protocol:", "", *notes, f"- seeds: {seeds}", ""])


def short_table(rows: list[dict[str, Any]], num_images: int) -> str:
    """The scores of `SHORT` in columns, see `_cells`."""
    table = _cells(rows, num_images, [name for name in SHORT if name in rows[0]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)


def _cells(rows: list[dict[str, Any]], num_images: int, metrics: Sequence[str]) -> list[list[str]]:
    """The heads, and a line a sampler and number of calls: mean over seeds (and standard deviation)."""
    lines = [["calls", "sampler", "spacing", *map(score_title, metrics)]]
    digits = {name: _digits([row[name] for row in rows]) for name in metrics}
    for key in dict.fromkeys((row["nfe"], row["sampler"], row["spacing"]) for row in rows):
        mine = [row for row in rows if (row["nfe"], row["sampler"], row["spacing"]) == key]
        not_finite = sum(row.get("not_finite", 0) for row in mine)
        cells = [f"{not_finite} of {len(mine) * num_images} images are not finite"] + [""] * len(metrics[1:])
        for column, name in enumerate([] if not_finite else metrics):
            # None stands for NaN, which JSON does not have.
            values = torch.tensor([math.nan if row[name] is None else row[name] for row in mine], dtype=torch.float64)
            spread = f" ± {float(values.std()):.{digits[name]}f}" if len(values) > 1 else ""
            cells[column] = f"{float(values.mean()):.{digits[name]}f}{spread}"
        lines.append([*map(str, key), *cells])
    return lines


def not_in_table(cells: Collection[str], shown_cells: Collection[str]) -> str:
    """A line on the finished scores that are not rows of the table; "" if there are none.

    Args:
        cells: names of all finished scores, see `Scorer.key`.
        shown_cells: those in the table.
    """
    # What spacings were chosen by is no row.
    others = {key for key in cells if " | test/" in key} - set(shown_cells)
    if not others:
        return ""
    what = "1 more score in scores.json is" if len(others) == 1 else f"{len(others)} more scores in scores.json are"
    return f"{what} not in this table\n"


def starts(rows: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate]) -> str:
    """For each number of calls the solver of the lowest mean FID, as `sampler.init_args` of a recipe; "" without any.

    One that has no score with one of the seeds is none.

    Args:
        rows: of the table, one a sampler, number of calls and seed.
        candidates: the sampler of each row.
    """
    lines = []
    for nfe in dict.fromkeys(row["nfe"] for row in rows):
        fids: dict[str, list[float]] = {}
        solvers: dict[str, Candidate] = {}
        for row, candidate in zip(rows, candidates, strict=True):
            if row["nfe"] == nfe and not candidate.folder:
                fids.setdefault(candidate.name, []).append(math.inf if row["fid"] is None else row["fid"])
                solvers[candidate.name] = candidate
        totals = {name: math.fsum(values) for name, values in fids.items() if math.isfinite(math.fsum(values))}
        if not totals:
            continue
        best = solvers[min(totals, key=lambda name: totals[name])]
        config = best.sampler.config
        anchor = config["anchor"]
        if isinstance(anchor, dict):
            # What was read off the scheduler is read off it again.
            anchor = {name: value for name, value in anchor.items() if name != "coefficients"}
        # All of them, with what may be learned: laid over a recipe, what is left out would be the recipe's.
        placement = {name: config[name] for name in ("stride", "eta", "timesteps")}
        arguments = {"num_steps": nfe, "anchor": anchor, **placement, "learn": None}
        text = yaml.safe_dump(arguments, default_flow_style=True, sort_keys=False, width=math.inf).strip()
        lines.append(f"- {best.name}, {best.spacing}: `{text}`")
    title = (
        "The best solver for each number of calls, as `init_args` of a recipe's `sampler`, to learn from it (`learn: "
        "null`: all but `pred`):"
    )
    return "\n".join([title, "", *lines, ""]) if lines else ""


def _digits(values: Sequence[float | None]) -> int:
    """Decimals of a column: two, or three figures of its largest value (scores of small features are small)."""
    largest = max((abs(value) for value in values if value), default=1.0)
    return max(2, 2 - math.floor(math.log10(largest)))


def shown(fid: float | None) -> str:
    """A score in words; None is one that is not finite."""
    return "not finite" if fid is None else f"{fid:.{_digits([fid])}f}"


def write(
    rows: list[dict[str, Any]],
    candidates: list[Candidate],
    scorer: Scorer,
    protocol: dict[str, Any],
    settings: Comparison,
) -> None:
    """Write `table.md`, `table.json`, the pictures and TensorBoard's logs, and print the main scores.

    Args:
        rows: of the table, one a sampler, number of calls and seed: what it is (`ABOUT`), and its scores.
        candidates: the sampler of each row.
        scorer: makes the images of the grids.
        protocol: what the figures hold for.
        settings: what was compared, and where the results go.
    """
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    in_table = [scorer.key(each, row["seed"], "test") for row, each in zip(rows, candidates, strict=True)]
    others = not_in_table(scorer.scores.cells, in_table)
    ends = list(filter(None, [starts(rows, candidates), others]))
    text = "\n".join([markdown(rows, protocol), *ends])
    with replacing(output / "table.md") as partial:
        partial.write_text(text)
    with replacing(output / "table.json") as partial:
        partial.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2) + "\n")
    figures = {"fid": curves_figure(rows)}
    if "judge" in protocol:
        figures["judge_fid"] = curves_figure(rows, "judge_fid", "FID of the judge")
    seed = settings.seeds[0]
    which = f", seed {seed}" if len(settings.seeds) > 1 else ""
    for nfe in settings.steps:
        mine = [(r, c) for r, c in zip(rows, candidates, strict=True) if (r["nfe"], r["seed"]) == (nfe, seed)]
        if mine:
            grids = [
                (f"{row['sampler']}\nFID {shown(row['fid'])}", thumbnails(scorer.images(each, seed)))
                for row, each in mine
            ]
            figures[f"samples-{nfe}"] = comparison_figure(grids, f"{nfe} network calls, same noise{which}")
    with SummaryWriter(str(output / "tensorboard")) as writer:
        for name, figure in figures.items():
            space = protocol["judge"].partition(";")[0] if name == "judge_fid" else protocol["features"]
            caption(figure, f"{protocol['images']} images, {space}, {protocol['pixels']}")
            save_figure(figure, output / f"{name}.png", dpi=120)
            writer.add_figure(name, figure)
    print(short_table(rows, protocol["images"]), *ends, sep="\n\n", end="\n")
    print("the other scores and the protocol are in table.md")
    curves = ", ".join(f"{name}.png" for name in figures if name.endswith("fid"))
    print(f"wrote table.md, table.json, {curves}, samples-*.png, scores.json and tensorboard/ to '{output}'")
