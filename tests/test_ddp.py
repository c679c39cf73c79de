"""Two processes do what one does: the same scores on held-out noise, the gradient of the union of the batches."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT


def run(world_size, folder, method):
    command = [sys.executable, "-m", "tests.ddp_script", str(world_size), str(folder), method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_processes_agree_on_images_that_are_not_finite(tmp_path):
    """They are all on one process; none waits for the other, and training goes on to scores that are finite."""
    one, two = run(1, tmp_path / "one", "not finite"), run(2, tmp_path / "two", "not finite")
    for found in (one, two):
        assert all(math.isnan(value) for value in found["initial"].values())
        assert found["images"] == 25
    for name, value in one["final"].items():
        assert math.isfinite(value)
        assert two["final"][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("method", ["kid", "gauss_newton"])
def test_two_processes_are_one_process(tmp_path, method):
    one, two = run(1, tmp_path / "one", method), run(2, tmp_path / "two", method)
    assert len(list((tmp_path / "two").rglob("sampler.json"))) == 1
    assert len(list((tmp_path / "two").rglob("samples.png"))) == 1
    assert one["images"] == two["images"] == 25
    for name, value in one["initial"].items():
        assert abs(two["initial"][name] - value) <= 1e-5 * abs(value), name
    for name, value in one["gradients"].items():
        expected = torch.tensor(value)
        torch.testing.assert_close(
            torch.tensor(two["gradients"][name]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
