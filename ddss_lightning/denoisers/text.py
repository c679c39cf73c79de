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
    are encoded once, on the CPU, by the pipeline's own text encoders, which are not kept; the encoded ones stay
    with the network, 0.2 MB a prompt, of SDXL 0.6 MB. A call costs two evaluations of the network, or one at
    a scale of 0 (the negative prompt alone) or 1.

    Args:
        unet: a `UNet2DConditionModel` or `SD3Transformer2DModel`.
        schedule: the noise schedule it was trained with.
        prompts: what it is shown, by the names `encoder_hidden_states`, shape (P, L, D), for SDXL `text_embeds`,
            shape (P, D'), and `time_ids`, shape (P, 6), for Stable Diffusion 3 `pooled_projections`, shape (P, D').
        negative: the same for no prompt, one row each.
        prediction_type: see `ddss_lightning.coefficients.prediction_pair`.
        name: where it came from.
        vae: decoder of the latents.
        guidance_scale: w.

    Raises:
        ValueError: as `DiffusersDenoiser`; no prompts, or a negative one of another shape.
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
        if "encoder_hidden_states" not in prompts or not len(prompts["encoder_hidden_states"]):
            raise ValueError("There must be at least one prompt, encoded as `encoder_hidden_states`.")
        super().__init__(unet, schedule, prediction_type, name, vae=vae)
        self._names = tuple(prompts)
        # Not part of the fingerprint, which is of the weights.
        for key in prompts:
            self.register_buffer(f"prompt_{key}", prompts[key].detach(), persistent=False)
            self.register_buffer(f"negative_{key}", negative[key].detach()[:1], persistent=False)
        self.guidance_scale = guidance_scale
        self._check_guidance(self.num_conditions, has_null=True)

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
            guidance_scale: w.
            negative_prompt: what to guide away from; default: nothing, as the pipeline encodes it.
            compile_mode: as in `DiffusersDenoiser.from_pretrained`.
            **kwargs: passed to diffusers, such as `revision` or `variant`.

        Raises:
            ValueError: nothing there, a damaged folder, another kind of pipeline, no prompts, an unknown mode.
        """
        check_path(pretrained_path)
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
        return len(self.get_buffer("prompt_encoder_hidden_states"))

    def settings(self) -> dict[str, Any]:
        """Besides those of any latent model: the guidance scale, and a digest of what the prompts were encoded to."""
        digest = hashlib.sha256()
        for name in self._names:
            for part in ("prompt", "negative"):
                value = self.get_buffer(f"{part}_{name}").float().cpu().contiguous()
                digest.update(f"{part}_{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
        return {**super().settings(), "prompts": digest.hexdigest()[:16]}

    def _conditions(self, which: Tensor) -> Conditions:
        rows = {name: self.get_buffer(f"prompt_{name}") for name in self._names}
        return {name: value[which.to(value.device)] for name, value in rows.items()}

    def _nothing(self, num: int, device: torch.device) -> Conditions:
        rows = {name: self.get_buffer(f"negative_{name}") for name in self._names}
        return {name: value.to(device).expand(num, *value.shape[1:]) for name, value in rows.items()}

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
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(f"There is no file '{prompts}'; give prompts as a text file with one in each line.")
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompts in '{prompts}' are not a text in UTF-8 ({error}).") from error
    else:
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
    return shown, {name: rows[:1] for name, rows in negative.items()}
