"""Text-to-image models saved by the diffusers library: Stable Diffusion, SDXL, Stable Diffusion 3."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddss_lightning.denoisers.diffusers import Conditions, DiffusersDenoiser, check_mode
from ddss_lightning.denoisers.pipelines import check_path, loading, read_config
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type

PIPELINES: dict[str, dict[str, Any]] = {
    # The checker looks at finished images; learning needs those that it would black out, too.
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {},
    "StableDiffusion3Pipeline": {"feature_extractor": None, "image_encoder": None},
}
BATCH = 32
# What a `UNet2DConditionModel` takes by `added_cond_kwargs`.
ADDED = ("text_embeds", "time_ids")


class TextDenoiser(DiffusersDenoiser):
    r"""A diffusers network that is shown texts, with classifier-free guidance, and its schedule, frozen.

    .. math:: output = output_{negative} + w (output_{prompt} - output_{negative})

    The prompts take turns over the samples (see `for_samples`): the sampler is learned for all of them at once. They
    are encoded once, on the CPU, by the pipeline's own text encoders, which are not kept; the encoded ones stay in
    main memory (Stable Diffusion 1: 0.2 MB a prompt, XL: 0.6, 3: 5.5), from which those of a batch are fetched. A call
    costs two evaluations of the network, or one at a scale of 1, which is no guidance (diffusers takes anything below
    for 1, too).

    Args:
        unet: a `UNet2DConditionModel` or `SD3Transformer2DModel`.
        schedule: the noise schedule it was trained with.
        prompts: what it is shown, by the names `encoder_hidden_states`, shape (P, L, D), for SDXL `text_embeds`,
            shape (P, D'), and `time_ids`, shape (P, 6), for Stable Diffusion 3 `pooled_projections`, shape (P, D').
        negative: the same for no prompt, one row each.
        prediction_type: see `ddss_lightning.coefficients.prediction_pair`.
        name: where it came from.
        vae: decoder of the latents.
        guidance_scale: w, at least 1.

    Raises:
        ValueError: as `DiffusersDenoiser`; no prompts, names with different numbers of them, or a negative one of
            another shape; a guidance scale below 1; a network that is told its guidance scale (of a consistency model).
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        prompts: Conditions,
        negative: Conditions,
        prediction_type: str = "epsilon",
        name: str = "unet",
        vae: nn.Module | None = None,
        guidance_scale: float = 7.5,
    ) -> None:
        if {key: rows.shape[1:] for key, rows in prompts.items()} != {
            k: rows.shape[1:] for k, rows in negative.items()
        }:
            raise ValueError("The negative prompt must be encoded as the prompts are: the same names and shapes.")
        numbers = {key: len(rows) for key, rows in prompts.items()}
        if not numbers.get("encoder_hidden_states") or len(set(numbers.values())) > 1:
            raise ValueError(
                "There must be at least one prompt, encoded as `encoder_hidden_states`, and as many rows of each name, "
                f"got {numbers}."
            )
        if guidance_scale is None or not 1 <= guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale must be a number of at least 1, got {guidance_scale}; 1 is no guidance, which the "
                "pipelines of diffusers take all below for."
            )
        config: Any = unet.config
        if config.get("time_cond_proj_dim"):
            raise ValueError(
                "The network is told its guidance scale (time_cond_proj_dim), as a latent consistency model is; that "
                "is not supported. Use the model that it was distilled from."
            )
        super().__init__(unet, schedule, prediction_type, name, vae=vae)
        # No buffers: thousands of prompts stay in main memory, and are not part of the fingerprint.
        self._prompts = {key: rows.detach().cpu() for key, rows in prompts.items()}
        # A copy: a view would keep the rows of all prompts.
        self._negative = {key: rows.detach()[:1].cpu().clone() for key, rows in negative.items()}
        self._prompts_digest = self._digest_of_prompts()
        self.guidance_scale = guidance_scale

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_path: str,
        prompts: str | Sequence[str],
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        compile_mode: str | None = None,
        **kwargs: str,
    ) -> TextDenoiser:
        """Load a Stable Diffusion pipeline from a folder or the Hugging Face hub, and encode the prompts.

        Args:
            pretrained_path: a local folder, or a hub name `owner/model`.
            prompts: a text file with a prompt in each line (empty lines are left out), or the prompts.
            guidance_scale: w, at least 1.
            negative_prompt: what to guide away from; default: nothing, as the pipeline encodes it.
            compile_mode: as in `DiffusersDenoiser.from_pretrained`.
            **kwargs: passed to diffusers, such as `revision` or `variant`.

        Raises:
            ValueError: nothing there, a damaged folder, another kind of pipeline, no prompts, an unknown mode.
        """
        pretrained_path = check_path(pretrained_path, kwargs)
        check_mode(compile_mode)
        texts = _read_prompts(prompts)
        with loading(pretrained_path):
            pipeline = _load_pipeline(pretrained_path, kwargs)
            shown, negative = encode_prompts(pipeline, texts, negative_prompt)
        denoiser = cls(
            _network_of(pipeline),
            NoiseSchedule.from_scheduler(pipeline.scheduler),
            shown,
            negative,
            scheduler_prediction_type(pipeline.scheduler),
            pretrained_path,
            pipeline.vae,
            guidance_scale,
        )
        denoiser.compiled(compile_mode)
        return denoiser

    @property
    def num_conditions(self) -> int:
        """How many prompts there are."""
        return len(self._prompts["encoder_hidden_states"])

    def settings(self) -> dict[str, Any]:
        """Besides those of any latent model: the guidance scale, and a digest of what the prompts were encoded to."""
        return {**super().settings(), "prompts": self._prompts_digest}

    def _digest_of_prompts(self) -> str:
        digest = hashlib.sha256()
        for name in self._prompts:
            for part, rows in (("prompt", self._prompts), ("negative", self._negative)):
                value = rows[name].float().contiguous()
                digest.update(f"{part}_{name}{tuple(value.shape)}".encode())
                digest.update(value.flatten().numpy().data)
        return digest.hexdigest()[:16]

    def _conditions(self, which: Tensor) -> Conditions:
        return {name: rows[which] for name, rows in self._prompts.items()}

    def _nothing(self, x_t: Tensor) -> Conditions:
        return {name: rows.to(x_t).expand(len(x_t), *rows.shape[1:]) for name, rows in self._negative.items()}

    def _evaluate(self, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        own = {name: rows for name, rows in conditions.items() if name in ADDED}
        rest: dict[str, Any] = {name: rows for name, rows in conditions.items() if name not in ADDED}
        if own:
            rest["added_cond_kwargs"] = own
        output: Tensor = self.unet(x_t, timestep=timestep, return_dict=False, **rest)[0]
        return output


def _read_prompts(prompts: str | Sequence[str]) -> list[str]:
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


def _network_of(pipeline: Any) -> Any:  # noqa: ANN401 - one of diffusers' classes
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def _load_pipeline(path: str, kwargs: dict[str, str]) -> Any:  # noqa: ANN401 - one of diffusers' classes
    import diffusers

    index = read_config(diffusers.DiffusionPipeline, path, **kwargs) or {}
    name = index.get("_class_name", "")
    if name not in PIPELINES:
        raise ValueError(
            f"it is a '{name}', not one of {', '.join(PIPELINES)}; a model of another kind becomes usable by "
            "subclassing ddss_lightning.Denoiser"
        )
    left_out = PIPELINES[name]
    if index.get("text_encoder_3", (None, None))[1] is None and name == "StableDiffusion3Pipeline":
        # Its largest text encoder can be left out when it is saved, and has to be when it is loaded.
        left_out = {**left_out, "text_encoder_3": None, "tokenizer_3": None}
    return getattr(diffusers, name).from_pretrained(path, low_cpu_mem_usage=False, **left_out, **kwargs)


@torch.no_grad()
def encode_prompts(
    pipeline: Any,  # noqa: ANN401 - one of diffusers' classes
    prompts: Sequence[str],
    negative_prompt: str | None = None,
) -> tuple[Conditions, Conditions]:
    """What the network of a pipeline is shown for these texts, and for none.

    Args:
        pipeline: one of `PIPELINES`, in float32.
        prompts: at least one.
        negative_prompt: None: what the pipeline shows when it is given none.

    Returns:
        By the names of the network's arguments: a row for each prompt, and one row; see `TextDenoiser`.
    """
    from rich.progress import track

    is_third = hasattr(pipeline, "text_encoder_3")
    others = {"prompt_2": None, "prompt_3": None} if is_third else {}
    parts: list[tuple[Tensor, ...]] = []
    starts = range(0, len(prompts), BATCH)
    for start in track(starts, f"encoding {len(prompts)} prompts", disable=len(starts) == 1):
        texts = list(prompts[start : start + BATCH])
        parts.append(
            pipeline.encode_prompt(
                prompt=texts,
                **others,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(texts),
            )
        )
    # (prompt, negative), or (prompt, negative, pooled prompt, pooled negative).
    encoded = [torch.cat(each) for each in zip(*parts, strict=True)]
    names = ("encoder_hidden_states", "pooled_projections" if is_third else "text_embeds")
    shown, negative = dict(zip(names, encoded[0::2], strict=False)), dict(zip(names, encoded[1::2], strict=False))
    if "text_embeds" in shown:
        size = _network_of(pipeline).config.sample_size * pipeline.vae_scale_factor
        # Height and width of the original, where it was cut, height and width asked for.
        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=shown["text_embeds"].dtype)
        shown["time_ids"] = ids.expand(len(prompts), -1)
        negative["time_ids"] = ids
    return shown, {name: rows[:1].clone() for name, rows in negative.items()}
