"""The picture of the headline: every panel is its sampler's, from the same noise."""

import sys

import pytest
import torch
from PIL import Image

from ddss_lightning import DiffusersDenoiser, GGDMSampler
from ddss_lightning.noise import held_out_noise
from tests.conftest import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    import same_noise

    return same_noise


def test_panels_are_those_of_their_samplers(script, monkeypatch, tmp_path, capsys):
    denoiser = DiffusersDenoiser.from_pretrained(str(ROOT / "checkpoints" / "glyphs-ddpm"))
    samplers = script.samplers_of(denoiser, 7)
    calls = [(name, each.num_steps) for name, each in samplers.items()]
    assert calls == [
        ("DDPM, 7 calls", 7), ("UniPC 3, 5 calls", 5), ("learned, 5 calls", 5), ("UniPC 3, 10 calls", 10),
        ("learned, 10 calls", 10),
    ]  # fmt: skip
    # The solvers are the starts of the learned ones.
    for number in (5, 10):
        config = samplers[f"learned, {number} calls"].config
        start = GGDMSampler(denoiser.schedule, **{**config, "learn": ()})
        solver = samplers[f"UniPC 3, {number} calls"]
        torch.testing.assert_close(solver.coefficients().mu, start.coefficients().mu, rtol=0, atol=1e-5)
    images = script.generate(denoiser, samplers["learned, 5 calls"], 2)
    x_T, noise = held_out_noise("test/0", [0, 1], denoiser.state_shape, 5)
    with torch.no_grad():
        expected = samplers["learned, 5 calls"](denoiser, x_T, noise=noise).clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1.01 / 255)
    output = tmp_path / "new" / "grid.png"
    monkeypatch.setattr(sys, "argv", ["x", f"--output={output}", "--num_images=2", "--ddpm_calls=3"])
    script.main()
    assert "DDPM, 3 calls" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.width > 3 * picture.height
