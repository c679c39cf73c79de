"""Pipelines of text-to-image models: what their configurations say, before anything large is loaded, and loading."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ddss_lightning.denoisers.pipelines import decoder_factor, load_network, read_config
from ddss_lightning.denoisers.prompts import ENCODERS

# What is not needed of a pipeline.
LEFT_OUT: dict[str, dict[str, Any]] = {
    # The checker looks at finished images; learning needs those that it would black out, too.
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    },
    "StableDiffusion3Pipeline": {"feature_extractor": None, "image_encoder": None},
    "FluxPipeline": {"feature_extractor": None, "image_encoder": None},
}


def check_scale(guidance_scale: float | None, *, told: bool) -> None:
    """Make sure that this is a guidance scale of a network that is told it, or that is evaluated twice.

    Raises:
        ValueError: it is not.
    """
    least = 0 if told else 1
    if guidance_scale is None or not least <= guidance_scale < float("inf"):
        why = "" if told else "; 1 is no guidance, which the pipelines of diffusers take all below for"
        raise ValueError(f"guidance_scale must be a number of at least {least}, got {guidance_scale}{why}.")


@dataclass(frozen=True)
class TextPipeline:
    """What the configurations of a saved pipeline say.

    Attributes:
        name: of its class in diffusers.
        index: its `model_index.json`.
        network: configuration of the network.
        decoder: configuration of the decoder.
    """

    name: str
    index: dict[str, Any]
    network: dict[str, Any]
    decoder: dict[str, Any]

    @classmethod
    def read(cls, path: str, kwargs: dict[str, str]) -> TextPipeline:
        """Of a folder, or of a model on the hub.

        Raises:
            ValueError: another kind of pipeline, or one without its text encoders.
            OSError: a part is missing or damaged.
        """
        import diffusers

        index = read_config(diffusers.DiffusionPipeline, path, **kwargs) or {}
        name = index.get("_class_name", "")
        if name not in ENCODERS:
            raise ValueError(
                f"it is a '{name}', not one of {', '.join(ENCODERS)}; a model of another kind becomes usable by "
                "subclassing ddss_lightning.Denoiser"
            )
        for part in ("text_encoder", "tokenizer"):
            if index.get(part, (None, None))[1] is None:
                raise ValueError(f"it was saved without its {part}, which the prompts need")
        parts = {}
        for part in ("transformer" if "transformer" in index else "unet", "vae"):
            # Any class with a `config.json` reads it.
            config = read_config(diffusers.UNet2DModel, path, part, **kwargs)
            if config is None:
                raise OSError(f"it has no '{part}/config.json'")
            parts[part] = config
        network, decoder = parts.values()
        return cls(name, index, network, decoder)

    @property
    def told(self) -> bool:
        """Whether the network is told its guidance scale, and evaluated once."""
        return bool(self.network.get("guidance_embeds"))

    def scale(self, guidance_scale: float | None, negative_prompt: str | None) -> float:
        """The guidance scale; where none is given, that of the pipeline.

        Raises:
            ValueError: none that the network can be shown, or a negative prompt that would play no part.
        """
        if guidance_scale is None and self.name == "FluxPipeline" and not self.told:
            guidance_scale = 1.0
        if guidance_scale is None:
            import diffusers

            call = inspect.signature(getattr(diffusers, self.name).__call__)
            guidance_scale = float(call.parameters["guidance_scale"].default)
        check_scale(guidance_scale, told=self.told)
        if negative_prompt is not None and (self.told or guidance_scale == 1):
            why = "The network is told its guidance" if self.told else "A guidance_scale of 1 is no guidance"
            raise ValueError(f"{why}: the negative_prompt '{negative_prompt}' would play no part; leave it out.")
        return guidance_scale

    def latent_size(self, image_size: int) -> int:
        """Height and width of the latents of such images.

        Raises:
            ValueError: a size that they cannot have.
        """
        factor = decoder_factor(self.decoder)
        # Flux puts patches of 2x2 into a sequence before its network sees them.
        patch = 2 if self.name == "FluxPipeline" else self.network.get("patch_size") or 1
        largest = self.network.get("pos_embed_max_size")
        limit = "" if largest is None else f" up to {largest * patch * factor}"
        is_whole = isinstance(image_size, int) and image_size > 0 and image_size % (factor * patch) == 0
        if not is_whole or (largest is not None and image_size > largest * patch * factor):
            raise ValueError(
                f"image_size must be a multiple of {factor * patch}{limit} for this model, got {image_size}."
            )
        return image_size // factor

    def load(self, path: str, kwargs: dict[str, str], dtype: torch.dtype) -> Any:  # noqa: ANN401 - one of diffusers' classes
        """The pipeline, in float32, but for its network, in `dtype`."""
        import diffusers

        left_out = LEFT_OUT.get(self.name, {})
        if self.name == "StableDiffusion3Pipeline" and self.index.get("text_encoder_3", (None, None))[1] is None:
            # Its largest text encoder can be left out when it is saved, and has to be when it is loaded.
            left_out = {**left_out, "text_encoder_3": None, "tokenizer_3": None}
        # transformers would keep the text encoders in the type that they were saved in.
        options: dict[str, Any] = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, **left_out, **kwargs}
        if dtype != torch.float32:
            part = "transformer" if "transformer" in self.index else "unet"
            where = {"subfolder": part, **kwargs}
            options[part] = load_network(self.network["_class_name"], path, dtype, where)
        return getattr(diffusers, self.name).from_pretrained(path, **options)
