"""How the networks of text-to-image models are called, where it is not as a `UNet2DModel`.

Every call takes the states, shape (N, C, H, W), the times, shape (N,), and the conditions, a row an image, by the names
of `TextDenoiser`, and returns the output for the states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# What a network is shown besides state and time: by the name of its argument, one row an image.
Conditions = dict[str, Tensor]


def type_of(rows: Tensor, x_t: Tensor) -> torch.dtype:
    """Labels and masks stay integers; all else has the states' type."""
    return x_t.dtype if rows.is_floating_point() else rows.dtype


class Sizes(NamedTuple):
    """Of the states that a network maps: channels in and out, and height and width, None where it does not say."""

    in_channels: int
    out_channels: int
    sample_size: int | tuple[int, int] | None


def sizes_of(network: Any) -> Sizes:  # noqa: ANN401 - one of diffusers' networks
    """The sizes that the network's configuration states, before Flux puts the pixels of a 2x2 patch side by side."""
    config = network.config
    # A DiT without `out_channels` has as many.
    out_channels = config.get("out_channels") or config.in_channels
    if _kind(network) == "FluxTransformer2DModel":
        # As its pipeline does where it is not told a size: 1024 pixels.
        return Sizes(config.in_channels // 4, out_channels // 4, config.get("sample_size") or 128)
    return Sizes(config.in_channels, out_channels, config.get("sample_size"))


def call(network: nn.Module, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """The network's output for these states, as the pipelines of diffusers call it, shape (N, C', H, W)."""
    return CALLS.get(_kind(network), _call_unet)(network, x_t, timestep, conditions)


def _kind(network: nn.Module) -> str:
    """The name of its class, or of that which it is derived from, in `CALLS`."""
    return next((each.__name__ for each in type(network).__mro__ if each.__name__ in CALLS), "")


def _call_unet(network: nn.Module, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """Stable Diffusion; SDXL takes two of the conditions by another name."""
    added = {name: rows for name, rows in conditions.items() if name in ("text_embeds", "time_ids")}
    rest: dict[str, Any] = {name: rows for name, rows in conditions.items() if name not in added}
    if added:
        rest["added_cond_kwargs"] = added
    output: Tensor = network(x_t, timestep=timestep, return_dict=False, **rest)[0]
    return output


def _call_pixart(network: Any, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:  # noqa: ANN401
    """PixArt; the first one of 1024 pixels is told height and width, and their ratio."""
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.use_additional_conditions:
        added = {name: conditions[name] for name in added}
    rest = {name: rows for name, rows in conditions.items() if name not in added}
    output: Tensor = network(x_t, timestep=timestep, added_cond_kwargs=added, return_dict=False, **rest)[0]
    return output


def _call_sana(network: Any, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:  # noqa: ANN401
    """Sana, whose later networks take times of their own scale."""
    return _call_unet(network, x_t, timestep * network.config.timestep_scale, conditions)


def hear_exact_times(network: Any) -> None:  # noqa: ANN401 - one of diffusers' networks
    """Let Flux see real-valued times under autocast, too.

    It rounds them to the type of its hidden states: in half precision to steps of 4 in 1000.
    """
    if _kind(network) == "FluxTransformer2DModel" and not hasattr(network.time_text_embed, "exact_times"):
        network.time_text_embed.exact_times = None
        network.time_text_embed.register_forward_pre_hook(_exact_times)


def _exact_times(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401 - part of Flux
    return args if module.exact_times is None else (module.exact_times, *args[1:])


def _call_flux(network: Any, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:  # noqa: ANN401
    """Flux: 2x2 patches as a sequence, with their places; times from 0 to 1."""
    num, channels, height, width = x_t.shape
    patches = x_t.reshape(num, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x_t)
    network.time_text_embed.exact_times = timestep
    try:
        output: Tensor = network(
            hidden_states=patches.flatten(3).flatten(1, 2),
            timestep=timestep / 1000,
            img_ids=places,
            txt_ids=x_t.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **conditions,
        )[0]
    finally:
        # A pipeline may use the network, too.
        network.time_text_embed.exact_times = None
    output = output.reshape(num, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(num, -1, height, width)


CALLS: dict[str, Callable[[Any, Tensor, Tensor, Conditions], Tensor]] = {
    "FluxTransformer2DModel": _call_flux,
    "PixArtTransformer2DModel": _call_pixart,
    "SanaTransformer2DModel": _call_sana,
}
