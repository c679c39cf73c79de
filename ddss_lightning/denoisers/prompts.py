"""Prompts of text-to-image models: read from a file, and encoded as the pipelines of diffusers do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddss_lightning.denoisers.calls import Conditions

BATCH = 32


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a text file, or as they are.

    Raises:
        ValueError: no such file, or no prompt.
    """
    if isinstance(prompts, str):
        try:
            # Editors of Windows mark such files at their beginning.
            texts = Path(prompts).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompts in '{prompts}' are not a text in UTF-8 ({error}).") from error
        except OSError as error:
            raise ValueError(
                f"No prompts could be read from '{prompts}' ({error.strerror}); give a text file with one in each "
                "line, or a list."
            ) from error
    else:
        if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"Prompts are a text file with one in each line, or a list of texts, got {prompts!r}.")
        texts = list(prompts)
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise ValueError(f"There is no prompt in {prompts!r}; give at least one.")
    return found


@torch.no_grad()
def encode_prompts(
    pipeline: Any,  # noqa: ANN401 - one of diffusers' classes
    prompts: Sequence[str],
    negative_prompt: str | None = None,
) -> tuple[Conditions, Conditions]:
    """What the network of a pipeline is shown for these texts, and for none.

    Args:
        pipeline: one of `ENCODERS`, in float32.
        prompts: at least one.
        negative_prompt: None: what the pipeline shows when it is given none.

    Returns:
        By the names of `TextDenoiser`: a row for each prompt, and one row.
    """
    from rich.progress import track

    encode = ENCODERS[type(pipeline).__name__]
    starts = range(0, len(prompts), BATCH)
    shown: list[Conditions] = []
    negative: Conditions = {}
    for start in track(starts, f"encoding {len(prompts)} prompts", disable=len(starts) == 1):
        rows, negative = encode(pipeline, list(prompts[start : start + BATCH]), negative_prompt)
        shown.append(rows)
    together = {name: torch.cat([rows[name] for rows in shown]) for name in negative}
    return together, {name: rows[:1].clone() for name, rows in negative.items()}


def _both(pipeline: Any, texts: list[str], negative_prompt: str | None, **others: None) -> list[Tensor]:  # noqa: ANN401
    """Of Stable Diffusion: prompt, negative, and for the larger ones pooled prompt, pooled negative."""
    found: tuple[Tensor, ...] = pipeline.encode_prompt(
        prompt=texts,
        **others,
        device=torch.device("cpu"),
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(texts),
    )
    return list(found)


def _stable_diffusion(pipeline: Any, texts: list[str], negative_prompt: str | None) -> tuple[Conditions, Conditions]:  # noqa: ANN401
    rows, none = _both(pipeline, texts, negative_prompt)
    return {"encoder_hidden_states": rows}, {"encoder_hidden_states": none}


def _xl(pipeline: Any, texts: list[str], negative_prompt: str | None) -> tuple[Conditions, Conditions]:  # noqa: ANN401
    rows, none, pooled, pooled_none = _both(pipeline, texts, negative_prompt)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    # Height and width of the original, where it was cut, height and width asked for.
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=pooled.dtype).expand(len(texts), -1)
    return (
        {"encoder_hidden_states": rows, "text_embeds": pooled, "time_ids": ids},
        {"encoder_hidden_states": none, "text_embeds": pooled_none, "time_ids": ids},
    )


def _third(pipeline: Any, texts: list[str], negative_prompt: str | None) -> tuple[Conditions, Conditions]:  # noqa: ANN401
    rows, none, pooled, pooled_none = _both(pipeline, texts, negative_prompt, prompt_2=None, prompt_3=None)
    return (
        {"encoder_hidden_states": rows, "pooled_projections": pooled},
        {"encoder_hidden_states": none, "pooled_projections": pooled_none},
    )


def _pixart(pipeline: Any, texts: list[str], negative_prompt: str | None) -> tuple[Conditions, Conditions]:  # noqa: ANN401
    rows, mask, none, none_mask = pipeline.encode_prompt(
        texts, negative_prompt=negative_prompt or "", device=torch.device("cpu"), clean_caption=True
    )
    sizes: Conditions = {}
    if pipeline.transformer.use_additional_conditions:
        size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        sizes = {"resolution": rows.new_full((len(rows), 2), size), "aspect_ratio": rows.new_ones(len(rows), 1)}
    return (
        {"encoder_hidden_states": rows, "encoder_attention_mask": mask, **sizes},
        {"encoder_hidden_states": none, "encoder_attention_mask": none_mask, **sizes},
    )


def _flux(pipeline: Any, texts: list[str], negative_prompt: str | None) -> tuple[Conditions, Conditions]:  # noqa: ANN401
    def encode(prompts: list[str]) -> Conditions:
        rows, pooled, _ = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
        return {"encoder_hidden_states": rows, "pooled_projections": pooled}

    return encode(texts), encode([negative_prompt or ""])


# By the name of a pipeline.
ENCODERS: dict[str, Callable[[Any, list[str], str | None], tuple[Conditions, Conditions]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _xl,
    "StableDiffusion3Pipeline": _third,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "FluxPipeline": _flux,
}
