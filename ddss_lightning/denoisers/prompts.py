"""Prompts of text-to-image models: read from a file, and encoded as the pipelines of diffusers do it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddss_lightning.denoisers.calls import Conditions

BATCH = 32
# Numbers of each weight by which text encoders are told apart.
FIRST = 64


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a text file, or as they are.

    Raises:
        ValueError: no such file, or no prompt.
    """
    if isinstance(prompts, str):
        try:
            # Editors of Windows mark such files at their beginning.
            # `splitlines` would split at characters within captions, too, such as U+2028.
            texts = Path(prompts).read_text(encoding="utf-8-sig").split("\n")
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
    parts = [
        encode(pipeline, list(prompts[start : start + BATCH]), False)
        for start in track(starts, f"encoding {len(prompts)} prompts", disable=len(starts) == 1)
    ]
    together = {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}
    return together, encode(pipeline, [negative_prompt], True)


def digest_of_texts(pipeline: Any, prompts: Sequence[str], negative_prompt: str | None) -> str:  # noqa: ANN401
    """Sixteen hexadecimal digits of the texts and of the beginnings of all weights that encode them.

    Not of what they are encoded to, which differs in its last digits between processors and numbers of threads.
    """
    digest = hashlib.sha256(json.dumps([list(prompts), negative_prompt]).encode())
    for name in sorted(name for name in pipeline.components if name.startswith("text_encoder")):
        encoder = getattr(pipeline, name)
        for key, value in sorted(encoder.state_dict().items()) if encoder is not None else ():
            digest.update(f"{name} {key}{tuple(value.shape)}".encode())
            digest.update(value.detach().flatten()[:FIRST].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# Each takes prompts, or, as such, the negative one, which can be None.
Texts = list[str] | list[str | None]


def _guided(pipeline: Any, texts: Texts, is_negative: bool, **others: None) -> list[Tensor]:  # noqa: ANN401
    """Of Stable Diffusion: encoded texts, and for the larger ones pooled."""
    negative = {"negative_prompt": texts} if is_negative and texts[0] is not None else {}
    found = pipeline.encode_prompt(
        prompt=[""] if is_negative else texts,
        **others,
        device=torch.device("cpu"),
        num_images_per_prompt=1,
        do_classifier_free_guidance=is_negative,
        **negative,
    )
    # Prompt, negative, pooled prompt, pooled negative.
    return list(found[1::2] if is_negative else found[0::2])


def _stable_diffusion(pipeline: Any, texts: Texts, is_negative: bool) -> Conditions:  # noqa: ANN401
    (rows,) = _guided(pipeline, texts, is_negative)
    return {"encoder_hidden_states": rows}


def _xl(pipeline: Any, texts: Texts, is_negative: bool) -> Conditions:  # noqa: ANN401
    rows, pooled = _guided(pipeline, texts, is_negative)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    # Height and width of the original, where it was cut, height and width asked for.
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=pooled.dtype)
    return {"encoder_hidden_states": rows, "text_embeds": pooled, "time_ids": ids.expand(len(texts), -1)}


def _third(pipeline: Any, texts: Texts, is_negative: bool) -> Conditions:  # noqa: ANN401
    rows, pooled = _guided(pipeline, texts, is_negative, prompt_2=None, prompt_3=None)
    return {"encoder_hidden_states": rows, "pooled_projections": pooled}


def _pixart(pipeline: Any, texts: Texts, is_negative: bool) -> Conditions:  # noqa: ANN401, ARG001
    rows, mask, *_ = pipeline.encode_prompt(
        [text or "" for text in texts], False, device=torch.device("cpu"), clean_caption=True
    )
    found = {"encoder_hidden_states": rows, "encoder_attention_mask": mask}
    if pipeline.transformer.use_additional_conditions:
        size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        found |= {"resolution": rows.new_full((len(rows), 2), size), "aspect_ratio": rows.new_ones(len(rows), 1)}
    return found


def _sana(pipeline: Any, texts: Texts, is_negative: bool) -> Conditions:  # noqa: ANN401
    # Prompts come after instructions to its language model, which the call of the pipeline has.
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    rows, mask, *_ = pipeline.encode_prompt(
        [text or "" for text in texts],
        False,
        device=torch.device("cpu"),
        complex_human_instruction=None if is_negative else instruction,
    )
    return {"encoder_hidden_states": rows, "encoder_attention_mask": mask}


def _flux(pipeline: Any, texts: Texts, is_negative: bool) -> Conditions:  # noqa: ANN401, ARG001
    # The second prompt has a default only in newer versions.
    rows, pooled, _ = pipeline.encode_prompt([text or "" for text in texts], None, device=torch.device("cpu"))
    return {"encoder_hidden_states": rows, "pooled_projections": pooled}


# By the name of a pipeline.
ENCODERS: dict[str, Callable[[Any, Texts, bool], Conditions]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _xl,
    "StableDiffusion3Pipeline": _third,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "SanaPipeline": _sana,
    "FluxPipeline": _flux,
}
