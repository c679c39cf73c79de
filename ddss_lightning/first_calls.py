"""What would fail at the first step of a fit, or be learned from wrongly: found by a call of each network before it."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.features.base import FeatureExtractor, finite
from ddss_lightning.features.denoiser import DenoiserFeatures
from ddss_lightning.frozen import check_gradient, check_tensor
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.losses.base import SampleLoss

# Of the values of images; of a good model's hardly one is outside [-2, 2].
MOST_OUTSIDE = 0.1


def check_denoiser(denoiser: Denoiser, sampler: GGDMSampler, device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that a denoiser returns a state, and has the gradients that the sampler is learned through.

    Raises:
        ValueError: another shape, no tensor, or no gradient with respect to the state, or to the time where the sampler
            learns times; likewise of the images that it decodes.
    """
    denoiser = denoiser.for_samples("check", [0])
    state = torch.zeros(1, *denoiser.state_shape).to(device, dtype).requires_grad_()
    time = sampler.timesteps().detach()[:1].to(state).clone().requires_grad_()
    moved = {"state": state}
    if not {"time", "logsnr"}.isdisjoint(sampler.corrections):
        moved["timestep (for `time` and `logsnr` in `learn`)"] = time
    output = check_tensor(denoiser(state, time), denoiser)
    if output.shape != state.shape:
        raise ValueError(
            f"The denoiser '{denoiser.name}' returns shape {tuple(output.shape)} for states of shape "
            f"{tuple(state.shape)}; they must be equal."
        )
    check_gradient(output, f"the denoiser '{denoiser.name}'", moved)
    last = torch.zeros_like(state, requires_grad=True)
    check_gradient(
        denoiser.decode_in_parts(last, None), f"`decode` of the denoiser '{denoiser.name}'", {"last state": last}
    )


def check_features(network: FeatureExtractor, device: torch.device) -> None:
    """Make sure that a feature network returns a tensor, with a gradient with respect to the images.

    Raises:
        ValueError: it does not.
    """
    images = torch.zeros(1, *network.image_shape, device=device, dtype=network.dtype, requires_grad=True)
    check_gradient(check_tensor(network(images), network), type(network).__name__, {"images": images})


def check_same_model(denoiser: Denoiser, loss: SampleLoss) -> None:
    """Say so where the loss sees with the network of another model: a path can be changed in one place alone."""
    for part in loss.modules():
        if isinstance(part, DenoiserFeatures) and part.denoiser.name != denoiser.name:
            rank_zero_warn(
                f"The model is '{denoiser.name}', the DenoiserFeatures of the loss are those of "
                f"'{part.denoiser.name}'. If they are to be of one model, give both the same path."
            )


def check_finite(images: Tensor, denoiser: Denoiser) -> None:
    """Make sure that a denoiser makes numbers.

    Args:
        images: of the initial sampler, shape (N, C, H, W).
        denoiser: that made them.

    Raises:
        ValueError: none of them is finite.
    """
    if not finite(images).any():
        raise ValueError(
            f"Of {len(images)} images of the initial sampler none is finite: look for NaN in the weights and in the "
            f"output of the model '{denoiser.name}', or begin with another anchor."
        )


def check_range(images: Tensor) -> None:
    """Say so where images leave the range of pixels by far: their pixels are all clamped, and mean little."""
    outside = float((images.abs() > 2).float().mean())
    if outside > MOST_OUTSIDE:
        rank_zero_warn(
            f"{outside:.0%} of the values of the sampler's images are outside [-2, 2]; pixels end at -1 and 1. "
            "Little can be learned from them: look at the model's betas, its prediction type and its weights, or "
            "begin with another solver."
        )
