"""`ddss compare`: the same figures as `ddss test`, kept, gone on with after a kill, and the same on two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from ddss_lightning.cli import main
from ddss_lightning.metrics import FrechetDistance
from ddss_lightning.noise import held_out_noise
from tests.conftest import ROOT

RECIPE = str(ROOT / "recipes" / "digits_5.yaml")
SAMPLER = str(ROOT / "checkpoints" / "digits-ggdm-5")
SMALL = ["--num_images=60", "--selection_images=20", "--data.eval_batch_size=32"]

pytestmark = pytest.mark.usefixtures("at_root")


def command(output, *flags):
    return ["compare", "-c", RECIPE, *SMALL, "--output", str(output), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three samplers at two numbers of calls, two seeds, in one process."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        flags = ["--steps", "2", "5", "--solvers", "DDIM", "Heun", "--samplers", SAMPLER, "--seeds", "3", "4"]
        main(command(folder, *flags))
    finally:
        os.chdir(here)
    return folder, flags


def test_what_it_writes(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "scores.json", "table.md", "table.json", "fid.png", "samples-2.png", "samples-5.png", "tensorboard"
    }  # fmt: skip
    table = json.loads((folder / "table.json").read_text())
    rows = {(row["sampler"], row["nfe"], row["seed"]) for row in table["rows"]}
    # Heun's method makes odd numbers of calls; the learned sampler makes 5.
    expected = {("DDIM", 2), ("DDIM", 5), ("Heun", 5), (f"learned ({SAMPLER})", 5)}
    assert rows == {(*each, seed) for each in expected for seed in (3, 4)}
    assert table["protocol"]["images"] == 60
    assert "ConvFeatures (" in table["protocol"]["features"]
    text = (folder / "table.md").read_text()
    assert f"| 5 | learned ({SAMPLER}) | learned |" in text
    assert "- pixels: clamped to [-1, 1], rounded to 256 levels" in text


def test_scores_are_the_metric_on_the_test_noise(finished, denoiser, features):
    from ddss_lightning.data import DigitsDataModule
    from ddss_lightning.ggdm import GGDMSampler
    from ddss_lightning.images import to_pixels

    rows = json.loads((finished[0] / "table.json").read_text())["rows"]
    (row,) = [row for row in rows if row["sampler"].startswith("learned") and row["seed"] == 4]
    x_T, noise = held_out_noise("test/4", list(range(60)), (1, 8, 8), 5)
    with torch.no_grad():
        metric = FrechetDistance(features(torch.cat(list(DigitsDataModule().real_dataloader()))))
        metric.update(features(to_pixels(GGDMSampler.from_pretrained(SAMPLER)(denoiser, x_T, noise=noise))))
    assert row["fid"] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_finished_cells_are_not_computed_again(finished, monkeypatch, tmp_path):
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "again")
    before = (folder / "table.json").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("lightning.pytorch.Trainer.test", never)
    monkeypatch.setattr("lightning.pytorch.Trainer.validate", never)
    main(command(tmp_path / "again", *flags))
    assert (tmp_path / "again" / "table.json").read_bytes() == before


def test_killed_and_started_again_it_ends_with_the_same_bytes(finished, tmp_path):
    folder, flags = finished
    arguments = [sys.executable, "-m", "ddss_lightning.cli", *command(tmp_path / "killed", *flags)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    run = subprocess.Popen(arguments, cwd=ROOT, **quiet)
    scores, deadline = tmp_path / "killed" / "scores.json", time.time() + 200
    while time.time() < deadline and not (scores.exists() and len(json.loads(scores.read_text())["cells"]) >= 3):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (
        3
        <= len(json.loads(scores.read_text())["cells"])
        < len(json.loads((folder / "scores.json").read_text())["cells"])
    )
    main(command(tmp_path / "killed", *flags))
    assert (tmp_path / "killed" / "table.json").read_bytes() == (folder / "table.json").read_bytes()


@pytest.mark.parametrize(
    "launcher", [[], ["torch.distributed.run", "--nproc_per_node=2", "-m"]], ids=["ddss", "torchrun"]
)
def test_two_processes_find_the_same_scores(finished, tmp_path, launcher):
    folder, _ = finished
    flags = ["--steps", "5", "--solvers", "DDIM", "--seeds", "3", "--trainer.devices=2", "--trainer.strategy=ddp"]
    arguments = [sys.executable, "-m", *launcher, "ddss_lightning.cli", *command(tmp_path / "two", *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (row,) = json.loads((tmp_path / "two" / "table.json").read_text())["rows"]
    rows = json.loads((folder / "table.json").read_text())["rows"]
    (expected,) = [r for r in rows if (r["sampler"], r["nfe"], r["seed"]) == ("DDIM", 5, 3)]
    assert row["spacing"] == expected["spacing"]
    for name in ("fid", "kid", "is"):
        # The features are float32; batches of other sizes round them differently.
        assert row[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--solvers", "RK4"], "Unknown solver 'RK4'; choose any of DDPM, DDIM"),
        (["--num_images=1"], "--num_images must be at least 2, got 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--samplers", "nowhere"], "There is no folder 'nowhere'"),
        (["--solvers", "--samplers", SAMPLER, "--steps", "7"], "Nothing to compare at [7] network calls"),
        (["--solvers", "Heun", "--steps", "2"], "Nothing to compare: no solver makes [2] network calls"),
        (["--samplers", SAMPLER, SAMPLER], "is given 2 times; give every sampler once"),
        (
            ["--steps", "5", "--trainer.limit_test_batches=1", "--solvers", "--samplers", SAMPLER],
            "32 images were scored",
        ),
        (["--data.eval_batch_size=0"], "eval_batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "out", *flags))
    assert stop.value.code == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    assert not (tmp_path / "out" / "table.md").exists()


def test_another_protocol_is_not_mixed_in(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "out")
    with pytest.raises(SystemExit):
        main(command(tmp_path / "out", "--num_images=61"))
    assert "holds scores of another protocol (different: images, " in capsys.readouterr().err


def test_curves_of_two_samplers_of_one_size_are_two_lines():
    from ddss_lightning.pictures import curves_figure

    row = {"seed": 0, "fid": 1.0}
    one = [{**row, "sampler": f"learned ({nfe})", "nfe": nfe} for nfe in (5, 10)]
    two = [*one, {**row, "sampler": "learned (other)", "nfe": 5}]
    for rows, lines in ((one, ["learned"]), (two, ["learned (5)", "learned (10)", "learned (other)"])):
        (axes,) = curves_figure(rows).axes
        assert [line.get_label() for line in axes.lines] == lines
