"""LPIPS, the learned perceptual distance, from the package `lpips`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddss_lightning.frozen import Frozen

Backbone = Literal["alex", "vgg", "squeeze"]
WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
# The linear layers were fitted to human judgements of patches of 64x64 pixels.
MIN_SIZE = 64


class PerceptualDistance(Frozen):
    r"""LPIPS 0.1 of pairs of images: d(x, y) = sum_l mean_hw w_l . (f_l(x) - f_l(y))^2, f_l normalised activations.

    The linear layers w_l come with the package. The backbone f is torchvision's classifier of ImageNet, whose weights
    must lie in torch's cache, `torch.hub.get_dir()/checkpoints`. All is frozen: the package leaves the w_l trainable.
    Grey images are shown as three equal channels, and images with a side below 64 pixels are enlarged, bilinearly,
    until the shorter side has 64 (ours).

    Args:
        backbone: `alex`, `vgg` or `squeeze`.
        download: let torchvision fetch the backbone's weights where they are missing.

    Raises:
        ValueError: an unknown backbone; its weights are missing, and `download` is not set.

    References:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
        https://arxiv.org/abs/1801.03924, eq. 1.
    """

    def __init__(self, backbone: Backbone = "alex", download: bool = False) -> None:
        super().__init__()
        if backbone not in get_args(Backbone):
            raise ValueError(f"Unknown backbone '{backbone}'; choose one of {', '.join(get_args(Backbone))}.")
        self.network = _load(backbone, download)
        self.freeze()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances, shape (N,), of images in [-1, 1], shapes (N, 1 or 3, H, W)."""
        distances: Tensor = self.network(self._fitting(x), self._fitting(y))
        # Under autocast in half precision, in which means are too coarse.
        return distances.flatten().to(torch.promote_types(distances.dtype, torch.float32))

    def _fitting(self, images: Tensor) -> Tensor:
        images = images.to(next(self.network.parameters()).dtype)
        factor = MIN_SIZE / min(images.shape[2:])
        if factor > 1:
            size = [max(MIN_SIZE, round(side * factor)) for side in images.shape[2:]]
            images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        return images.expand(-1, 3, -1, -1)


def _load(backbone: Backbone, download: bool) -> nn.Module:
    import lpips
    import torchvision

    url = getattr(torchvision.models, WEIGHTS[backbone]).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file() and not download:
        raise ValueError(
            f"LPIPS with the backbone '{backbone}' needs the file '{path.name}' in the folder '{path.parent}'; put it "
            f"there from {url}, or set download=True."
        )
    with warnings.catch_warnings():
        # The package calls torchvision by arguments of old.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network: nn.Module = lpips.LPIPS(net=backbone, verbose=False)
    return network
