"""What a comparison leaves: tables, the best starts, curves, pictures, TensorBoard logs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from ddss_lightning.compare.candidates import Candidate
from ddss_lightning.compare.scorer import Scorer
from ddss_lightning.compare.settings import Comparison
from ddss_lightning.files import replacing
from ddss_lightning.pictures import comparison_figure, curves_figure, save_figure, thumbnails

# What a row of the table holds besides scores.
ABOUT = ("sampler", "nfe", "spacing", "folder", "seed", "not_finite")


def markdown(rows: list[dict[str, Any]], protocol: Mapping[str, Any]) -> str:
    """One line a sampler and number of calls, mean over seeds (and standard deviation), and the protocol."""
    metrics = [key for key in rows[0] if key not in ABOUT]
    lines = [f"| calls | sampler | spacing | {' | '.join(name.upper().replace('_', ' ') for name in metrics)} |"]
    lines.append("|---" * (3 + len(metrics)) + "|")
    digits = {name: _digits([row[name] for row in rows]) for name in metrics}
    for key in dict.fromkeys((row["nfe"], row["sampler"], row["spacing"]) for row in rows):
        mine = [row for row in rows if (row["nfe"], row["sampler"], row["spacing"]) == key]
        not_finite = sum(row.get("not_finite", 0) for row in mine)
        cells = [f"{not_finite} of {len(mine) * protocol['images']} images are not finite"] + [""] * len(metrics[1:])
        for column, name in enumerate([] if not_finite else metrics):
            # None stands for NaN, which JSON does not have.
            values = torch.tensor([math.nan if row[name] is None else row[name] for row in mine], dtype=torch.float64)
            spread = f" ± {float(values.std()):.{digits[name]}f}" if len(values) > 1 else ""
            cells[column] = f"{float(values.mean()):.{digits[name]}f}{spread}"
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    notes = [f"- {name.replace('_', ' ')}: {value}" for name, value in protocol.items()]
    seeds = ", ".join(map(str, dict.fromkeys(row["seed"] for row in rows)))
    return "\n".join([*lines, "", "Protocol:", "", *notes, f"- seeds: {seeds}", ""])


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
    """Write `table.md`, `table.json`, the pictures and TensorBoard's logs, and print the table.

    Args:
        rows: of the table, one a sampler, number of calls and seed: what it is (`ABOUT`), and its scores.
        candidates: the sampler of each row.
        scorer: makes the images of the grids.
        protocol: what the figures hold for.
        settings: what was compared, and where the results go.
    """
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(filter(None, [markdown(rows, protocol), starts(rows, candidates)]))
    with replacing(output / "table.md") as partial:
        partial.write_text(text)
    with replacing(output / "table.json") as partial:
        partial.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2) + "\n")
    figures = {"fid": curves_figure(rows)}
    if "judge" in protocol:
        figures["judge_fid"] = curves_figure(rows, "judge_fid", "FID of the judge")
    for nfe in settings.steps:
        seed = settings.seeds[0]
        mine = [(r, c) for r, c in zip(rows, candidates, strict=True) if (r["nfe"], r["seed"]) == (nfe, seed)]
        if mine:
            grids = [
                (f"{row['sampler']}\nFID {shown(row['fid'])}", thumbnails(scorer.images(each, seed)))
                for row, each in mine
            ]
            figures[f"samples-{nfe}"] = comparison_figure(grids, f"{nfe} network calls, same noise")
    with SummaryWriter(str(output / "tensorboard")) as writer:
        for name, figure in figures.items():
            space = protocol["judge"].partition(";")[0] if name == "judge_fid" else protocol["features"]
            figure.supxlabel(f"{protocol['images']} images, {space}, {protocol['pixels']}", fontsize=6)
            save_figure(figure, output / f"{name}.png", dpi=120)
            writer.add_figure(name, figure)
    print(text)
    curves = ", ".join(f"{name}.png" for name in figures if name.endswith("fid"))
    print(f"wrote table.md, table.json, {curves}, samples-*.png, scores.json and tensorboard/ to '{output}'")
