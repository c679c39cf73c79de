"""The Inception network of FID, KID and Inception Score."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.resize import Resize, check_resize, resize_images

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INPUT_SIZE = 299


def find_weights(weights: str | Path | None, download: bool) -> Path:
    """Where the weights are: the given path, or torch's cache, into which they are downloaded if that is asked for.

    Raises:
        ValueError: there is no such file, or it cannot be fetched.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if weights is not None:
        if not Path(weights).is_file():
            raise ValueError(
                f"No Inception weights at '{weights}'; give the path of a copy of {URL_INCEPTION_V3}, or no path and "
                "download=True."
            )
        return Path(weights)
    cached: Path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not cached.is_file():
        if not download:
            raise ValueError(
                f"No Inception weights in torch's cache: looked for '{cached}'. Give download=True to fetch them "
                f"(95 MB) from {URL_INCEPTION_V3}, or weights=<path of a copy>."
            )
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), hash_prefix=WEIGHTS_SHA256)
        except (OSError, RuntimeError) as error:  # no connection; another hash
            raise ValueError(
                f"The Inception weights cannot be fetched from {URL_INCEPTION_V3} ({error}); fetch them by other means "
                f"and put them at '{cached}', or give weights=<path of a copy>."
            ) from error
    return cached


def load_network(path: Path, sha256: str | None) -> nn.Module:
    """torch-fidelity's network with the weights in `path`.

    Raises:
        ValueError: the file has another hash, or holds something else than these weights.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(sha256):
            raise ValueError(
                f"'{path}' has SHA-256 {found}, not {sha256}: it is damaged, or holds other weights. Delete it and "
                "fetch it again with download=True; for weights of your own give their hash, or sha256=None."
            )
    try:
        # torch-fidelity unpickles whatever the file holds; this refuses all but tensors.
        torch.load(path, weights_only=True, map_location="cpu")
        network: nn.Module = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' holds no weights of the FID Inception network: {error}") from error
    return network


class InceptionFeatures(FeatureExtractor):
    """The 2048 features of the Inception network that FID, KID and Inception Score are defined by; frozen.

    It is torch-fidelity's network, differentiable in float images: 127.5 (x + 1), resized to 299 x 299, minus 128,
    over 128. With `tf1` its features of images of 256 levels are those of torch-fidelity up to rounding.
    Gradients cost 99 MB of saved activations an image: score a training batch in small parts.

    The weights are read from `weights`, else from torch's cache (`torch.hub.get_dir()`); nothing is ever downloaded
    unless `download` says so.

    Args:
        image_shape: (channels, height, width) of the images, 1 channel (grey) or 3.
        weights: file with the weights.
        download: fetch them (95 MB) into torch's cache if they are not there.
        resize: `tf1` (the original, pytorch-fid, torch-fidelity), `bilinear`, `bilinear-antialias`, or
            `bicubic-antialias` (clean-fid). It belongs to the figure.
        sha256: hash of the weights, or its first digits; None to accept any weights.

    Raises:
        ValueError: weights that are missing, damaged or others; an unknown `resize`; other than 1 or 3 channels.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, https://arxiv.org/abs/1706.08500;
        Obukhov et al., torch-fidelity, 2020, https://github.com/toshas/torch-fidelity.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        weights: str | Path | None = None,
        download: bool = False,
        resize: Resize = "tf1",
        sha256: str | None = WEIGHTS_SHA256,
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or image_shape[0] not in (1, 3):
            raise ValueError(f"image_shape must be (1 or 3, height, width), got {image_shape}.")
        self.image_shape, self.num_features = (image_shape[0], image_shape[1], image_shape[2]), 2048
        self._resize: Resize = check_resize(resize)
        self.resize = resize
        network = load_network(find_weights(weights, download), sha256)
        layers = OrderedDict(network.named_children())
        head = layers.pop("fc")
        assert isinstance(head, nn.Linear)
        self.head = head
        # Its own forward takes bytes only; the layers were made in the order in which it runs them.
        self.body = nn.Sequential(layers)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, 2048), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        pixels = resize_images(127.5 * (images + 1), INPUT_SIZE, self._resize)
        features: Tensor = self.body((pixels.expand(-1, 3, -1, -1) - 128) / 128)
        return features.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """Class logits, shape (N, 1008), without the bias of the last layer, as the Inception Score takes them."""
        logits: Tensor = features @ self.head.weight.T
        return logits
