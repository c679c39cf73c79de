"""Any network as a feature extractor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.features.resize import Resize, check_resize, resize_images


class ModuleFeatures(FeatureExtractor):
    r"""Features of any image encoder, such as one of timm or torch.hub; frozen.

    Images x in [-1, 1] are resized to what the encoder takes and given to it as ((x + 1) / 2 - mean) / std. Feature
    maps, shape (N, d, h, w), are averaged over positions. So a second encoder can judge a sampler that was trained
    in the space of a first one.

    Args:
        module: the encoder. It is frozen and kept in evaluation mode.
        image_shape: (channels, height, width) of the images. Grey images are repeated for an encoder of 3 channels.
        size: height = width in pixels that the encoder takes; None to leave images as they are.
        resize: how, a name of `ddss_lightning.features.resize.resize_images`.
        mean: of pixels in [0, 1], one number for each channel of the encoder. The default leaves x in [-1, 1].
        std: likewise.
        layer: name of the submodule whose output is taken, as in `module.named_modules()`; None for the module's own.

    Raises:
        ValueError: lengths that do not fit, a layer that does not exist or does not run, an unknown `resize`.
        TypeError: the output is not one tensor of shape (N, d) or (N, d, h, w).

    Example:
        >>> encoder = timm.create_model("resnet50", pretrained=True, num_classes=0)  # doctest: +SKIP
        >>> imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        >>> features = ModuleFeatures(encoder, (3, 32, 32), size=224, **imagenet)  # doctest: +SKIP
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        image_shape: tuple[int, int, int],
        size: int | None = None,
        resize: Resize = "bicubic-antialias",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        layer: str | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        image_shape = (channels, height, width)
        if len(mean) != len(std) or image_shape[0] not in (1, len(mean)):
            raise ValueError(
                "mean and std must have one number for each channel of the encoder, and images 1 or as many channels; "
                f"got mean {tuple(mean)}, std {tuple(std)}, image_shape {image_shape}."
            )
        if layer is not None and layer not in dict(module.named_modules()):
            names = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"The encoder has no submodule '{layer}'; at its top level it has {names}.")
        self.module, self.image_shape, self.layer = module, image_shape, layer
        self.size = size
        self._resize: Resize = check_resize(resize)
        self.resize = "none" if size is None else f"{resize} {size}"
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.freeze()
        first = next(module.parameters(), self.mean)
        with torch.no_grad():
            self.to(first.device)
            self.num_features = self(torch.zeros(1, *image_shape, device=first.device)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, d), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        # Not all of this is there in half precision, nor as exact.
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.size is not None:
            images = resize_images(images, self.size, self._resize)
        output = self._output((((images + 1) / 2 - self.mean) / self.std).to(self.dtype))
        if not isinstance(output, Tensor) or output.ndim not in (2, 4):
            kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                "Features are one tensor of shape (N, d) or (N, d, h, w), the encoder's output is of "
                f"{kind}; name a `layer` with such an output, or wrap the encoder in a module that picks one."
            )
        return output.mean((2, 3)) if output.ndim == 4 else output

    def _output(self, x: Tensor) -> Any:  # noqa: ANN401 - whatever the encoder returns
        """The output of the encoder, or of the chosen submodule (the last one, if it runs several times)."""
        if self.layer is None:
            return self.module(x)
        outputs: list[Any] = []
        submodule = self.module.get_submodule(self.layer)
        handle = submodule.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            self.module(x)
        finally:
            handle.remove()
        if not outputs:
            raise ValueError(f"The submodule '{self.layer}' does not run in the encoder's forward; name another one.")
        return outputs[-1]

    def protocol(self) -> dict[str, str | int]:
        """As of any extractor, and the layer."""
        return {**super().protocol(), "layer": self.layer or ""}
