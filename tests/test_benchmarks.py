"""The scripts of `benchmarks/` run on what they measure as it is now, and write what they say."""

import json
import runpy
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("at_root")

CHAIN = ["--batch_size", "8", "--rounds", "1", "--steps", "2", "4"]


def rows_of(monkeypatch, folder, name, *arguments):
    """Run a script as from the command line; the table it writes, by lines, and its JSON."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--results", str(folder)])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    (table,), (result,) = folder.glob("*.md"), folder.glob("*.json")
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    return rows[1:], json.loads(result.read_text())


def test_learning_step(monkeypatch, tmp_path):
    rows, result = rows_of(monkeypatch, tmp_path, "learning", *CHAIN)
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {k}", remat] for k in (2, 4) for remat in ("none", "denoiser")
    ]
    # What is timed is not asserted: other work on the machine would decide.
    assert all(row["to_bare"] == pytest.approx(row["step_ms"] / row["bare_ms"], abs=0.01) for row in result["rows"])


def test_memory_grows_with_calls_but_for_those_that_are_made_again(monkeypatch, tmp_path):
    _, result = rows_of(monkeypatch, tmp_path, "memory", *CHAIN)
    peak = result["peak_mib"]
    assert peak["none"]["4"] > 2 * peak["none"]["2"]
    assert peak["denoiser"]["4"] < 1.2 * peak["denoiser"]["2"]


def test_sampling(monkeypatch, tmp_path):
    rows, result = rows_of(monkeypatch, tmp_path, "sampling", *CHAIN)
    assert len(rows) == 2
    assert [row["calls"] for row in result["milliseconds"]] == [2, 4]
    assert all(
        {"network", "besides", "UniPCMultistepScheduler besides"} <= row.keys() for row in result["milliseconds"]
    )


def test_frechet_distance_is_torchmetrics_own(monkeypatch, tmp_path):
    _, result = rows_of(monkeypatch, tmp_path, "fid", "--num", "300", "--features", "16")
    assert result["relative_difference"] < 1e-6


@pytest.mark.slow
def test_compare(monkeypatch, tmp_path):
    arguments = ["--num_images", "20", "--selection_images", "10", "--output", str(tmp_path / "out")]
    rows, result = rows_of(monkeypatch, tmp_path / "results", "compare", *arguments)
    assert {"denoiser", "feature network"} <= {row.split(" | ")[0].removeprefix("| ") for row in rows}
    assert 0 < result["share_outside_the_networks"] < 1


@pytest.mark.slow
def test_precision(monkeypatch, tmp_path):
    arguments = ["--seeds", "0", "--max_steps", "1", "--output", str(tmp_path / "out")]
    rows, _ = rows_of(monkeypatch, tmp_path / "results", "precision", *arguments)
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["32-true", "bf16-mixed"]
