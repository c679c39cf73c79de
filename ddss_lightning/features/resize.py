"""Resizing, by name: scores of one encoder with two resizings are two different scores."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn.functional import interpolate

Resize = Literal["tf1", "bilinear", "bilinear-antialias", "bicubic-antialias"]
RESIZES: tuple[Resize, ...] = get_args(Resize)


def check_resize(resize: Resize) -> Resize:
    """The name itself.

    Raises:
        ValueError: an unknown name.
    """
    if resize not in RESIZES:
        raise ValueError(f"Unknown resize '{resize}'; choose one of {', '.join(RESIZES)}.")
    return resize


def resize_images(images: Tensor, size: int, resize: Resize) -> Tensor:
    """Square images of `size` pixels, differentiable, never rounded or clamped.

    - `tf1`: bilinear as TensorFlow 1 did it, pixel corners aligned at the top left, no antialiasing: the original
      FID, pytorch-fid, torch-fidelity, EDM.
    - `bilinear`: with pixel centres aligned, no antialiasing.
    - `bilinear-antialias`: with a triangle as wide as the reduction, as PIL.
    - `bicubic-antialias`: as PIL's bicubic: clean-fid.

    Args:
        images: shape (N, C, H, W).
        size: height = width of the result, in pixels.
        resize: one of these names.

    Returns:
        Shape (N, C, size, size).

    Raises:
        ValueError: an unknown name.

    References:
        Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022,
        https://arxiv.org/abs/2104.11222.
    """
    check_resize(resize)
    if resize == "tf1":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images, size=(size, size), align_corners=False)
        return resized
    mode, _, antialias = resize.partition("-")
    return interpolate(images, (size, size), mode=mode, align_corners=False, antialias=bool(antialias))
