"""What every feature network offers to the losses and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ddss_lightning.frozen import Frozen, check_tensor


def finite(samples: Tensor) -> Tensor:
    """Which samples, along the first dimension of shape (n, ...), hold finite numbers only: shape (n,), bool."""
    return samples.flatten(1).isfinite().all(1)


def check_finite(samples: Tensor, what: str, remedy: str) -> None:
    """Make sure that no sample holds NaN or infinite numbers.

    Args:
        samples: shape (n, ...).
        what: their name in the message, plural.
        remedy: what to do.

    Raises:
        ValueError: some do, with their number.
    """
    broken = int((~finite(samples)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(samples)} {what} hold NaN or infinite numbers; {remedy}.")


def check_floats(images: Tensor, what: str = "images") -> None:
    """Make sure that images are not bytes.

    Raises:
        TypeError: they are not floats.
    """
    if not images.is_floating_point():
        raise TypeError(f"The {what} must be floats in [-1, 1], got {images.dtype}; convert bytes with x / 127.5 - 1.")


def check_images(images: Tensor, what: str = "images", remedy: str = "look at what made them") -> None:
    """Make sure that images are floats in [-1, 1].

    Args:
        images: shape (n, C, H, W).
        what: their name in the message, plural.
        remedy: what to do about NaN.

    Raises:
        TypeError: they are not floats.
        ValueError: values that are not finite, or outside [-1, 1].
    """
    check_floats(images, what)
    check_finite(images, what, remedy)
    # 1e-3 is a fifth of a grey level: rounding of half precision, not another range.
    if images.numel() and images.abs().max() > 1 + 1e-3:
        raise ValueError(
            f"The {what} must lie in [-1, 1], got values from {float(images.min()):.4g} to {float(images.max()):.4g}; "
            "clamp them, or rescale them."
        )


class FeatureExtractor(Frozen, ABC):
    """A frozen network phi from images to feature vectors, in which samples are compared with real images.

    Attributes:
        num_features: d, the length of a feature vector.
        image_shape: (channels, height, width) of the images it takes.
        resize: how it resizes them first, `none` if it does not.
    """

    num_features: int
    resize: str = "none"
    image_shape: tuple[int, int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features phi(x) of images x.

        Args:
            images: x, shape (N, *image_shape), values in [-1, 1].

        Returns:
            Shape (N, d).
        """

    @property
    def dtype(self) -> torch.dtype:
        """Of the images it takes: that of its first parameter, float32 where it has none."""
        return next((value.dtype for value in self.parameters()), torch.float32)

    def check_input(self, images: Tensor) -> None:
        """Make sure that images are floats of shape (N, *image_shape).

        The range is not looked at: training must not wait for the device at each step. `check_images` does it.

        Raises:
            TypeError: they are not floats.
            ValueError: they have another shape.
        """
        check_floats(images)
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            raise ValueError(
                f"This feature network takes images of shape {self.image_shape} (channels, height, width), "
                f"got {tuple(images.shape[1:])}; use a feature network made for such images."
            )

    def check_output(self, output: Tensor) -> Tensor:
        """What `forward` returned, if it is what it must be.

        Raises:
            ValueError: no tensor, or not of shape (N, num_features).
        """
        check_tensor(output, self)
        if output.ndim != 2 or output.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} returns features of shape {tuple(output.shape)}, its num_features is "
                f"{self.num_features}; they must have shape (N, num_features)."
            )
        return output

    def logits(self, features: Tensor) -> Tensor:
        """Unnormalised log-probabilities log p(y | x) of classes, for the Inception Score.

        Args:
            features: phi(x), shape (N, d), as returned by `forward`.

        Returns:
            Shape (N, number of classes).

        Raises:
            NotImplementedError: the network has no classification head.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no classification head, so it cannot serve the Inception Score; "
            "use a feature network with `logits`."
        )

    def protocol(self) -> dict[str, str | int]:
        """What must be equal for two scores to be comparable: class, weights, resizing, length of the vectors."""
        return {
            "name": type(self).__name__,
            "fingerprint": self.fingerprint(),
            "resize": self.resize,
            "num_features": self.num_features,
        }

    def identity(self) -> str:
        """The protocol in a line: `Class (fingerprint)`, and what else there is, as in `, resize tf1 299, layer x`."""
        protocol = self.protocol()
        others = [name for name in protocol if name not in ("name", "fingerprint", "num_features")]
        told = [f", {name} {protocol[name]}" for name in others if protocol[name] not in ("", "none")]
        return f"{protocol['name']} ({protocol['fingerprint']}){''.join(told)}"
