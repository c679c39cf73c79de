"""The README's Python runs as it stands."""

import re

import lightning.pytorch
import pytest

from tests.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def run(tmp_path, monkeypatch):
    """All blocks in order, in a folder where `checkpoints` is the shipped one and `runs` is new."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in BLOCKS:
        exec(block, scope)
    assert (tmp_path / "runs" / "my-sampler" / "sampler.json").is_file()
    assert scope["images"].shape == (64, 1, 8, 8)
    return scope


def test_python_examples_run(tmp_path, monkeypatch):
    """Every line as it stands, but the Trainer takes two steps instead of 300 and validates on two batches."""

    class ShortTrainer(lightning.pytorch.Trainer):
        def __init__(self, **options):
            super().__init__(**{**options, "max_steps": 2, "limit_val_batches": 1, "limit_train_batches": 2})

    monkeypatch.setattr(lightning.pytorch, "Trainer", ShortTrainer)
    assert len(BLOCKS) == 2
    run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_python_examples_run_whole(tmp_path, monkeypatch):
    scope = run(tmp_path, monkeypatch)
    (quality,) = [c for c in scope["module"].trainer.callbacks if isinstance(c, scope["SampleQuality"])]
    assert quality.best["fid"] < quality.initial["fid"]
