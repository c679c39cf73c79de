"""Text-to-image models saved by the diffusers library: Stable Diffusion 1 to 3 and XL, PixArt, Sana, Flux."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ddss_lightning.denoisers.calls import Conditions, call, hear_exact_times, sizes_of, type_of
from ddss_lightning.denoisers.diffusers import DiffusersDenoiser, Weights, check_mode, dtype_of
from ddss_lightning.denoisers.pipelines import check_path, loading
from ddss_lightning.denoisers.prompts import digest_of_texts, encode_prompts, read_prompts
from ddss_lightning.denoisers.text_pipelines import TextPipeline, check_scale
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type


class TextDenoiser(DiffusersDenoiser):
    r"""A diffusers network that is shown texts, with classifier-free guidance, and its schedule, frozen.

    .. math:: output = output_{negative} + w (output_{prompt} - output_{negative})

    The prompts take turns over the samples (see `for_samples`): the sampler is learned for all of them at once. They
    are encoded once, on the CPU, by the pipeline's own text encoders, which are not kept; the encoded ones stay in
    main memory (Stable Diffusion 1: 0.2 MB a prompt, XL: 0.6, PixArt and Sana: 2 to 5, 3: 5.5, Flux: 8.4), from which
    those of a batch are fetched. A call costs two evaluations of the network, or one at a scale of 1, which is no
    guidance (diffusers takes anything below for 1, too). A network that was distilled to be told its guidance, as the
    "dev" one of Flux was, is told w, and costs one evaluation.

    Args:
        unet: a `UNet2DConditionModel`, `SD3Transformer2DModel`, `PixArtTransformer2DModel`,
            `SanaTransformer2DModel` or `FluxTransformer2DModel`.
        schedule: the noise schedule it was trained with.
        prompts: what it is shown, by the names `encoder_hidden_states`, shape (P, L, D), for SDXL `text_embeds`,
            shape (P, D'), and `time_ids`, shape (P, 6), for Stable Diffusion 3 and Flux `pooled_projections`, shape
            (P, D'), for PixArt and Sana `encoder_attention_mask`, shape (P, L), and, if PixArt uses them, `resolution`,
            shape (P, 2), and `aspect_ratio`, shape (P, 1).
        negative: the same for no prompt, one row each.
        prediction_type: see `ddss_lightning.coefficients.prediction_pair`.
        name: where it came from.
        vae: decoder of the latents.
        guidance_scale: w, at least 1, or 0 where the network is told it.

    Raises:
        ValueError: as `DiffusersDenoiser`; no prompts, names with different numbers of them, or a negative one of
            another shape; a guidance scale below that; a network of a consistency model, which is told its scale in
            another way.
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
        config: Any = unet.config
        told = bool(config.get("guidance_embeds"))
        check_scale(guidance_scale, told=told)
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
        self._image_size: int | None = None
        # A network that is told its guidance needs no second evaluation.
        self._told = guidance_scale if told else None
        self.guidance_scale = 1.0 if told else guidance_scale
        hear_exact_times(unet)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_path: str,
        prompts: str | Sequence[str],
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        compile_mode: str | None = None,
        image_size: int | None = None,
        weights: Weights = "float32",
        **kwargs: str,
    ) -> TextDenoiser:
        """Load a text-to-image pipeline from a folder or the Hugging Face hub, and encode the prompts.

        Args:
            pretrained_path: a local folder, or a hub name `owner/model`.
            prompts: a text file with a prompt in each line (empty lines are left out), or the prompts.
            guidance_scale: w, at least 1, or 0 where the network is told it; default: that of the pipeline (Stable
                Diffusion 7.5, XL 5, 3 7, PixArt and Sana 4.5, Flux 3.5, or 1 where its network is not told).
            negative_prompt: what to guide away from; default: nothing, as the pipeline encodes it.
            compile_mode: as in `DiffusersDenoiser.from_pretrained`.
            image_size: height and width of the images; default: those that the model was trained for. Give the
                pipeline the same.
            weights: of the network, as in `DiffusersDenoiser.from_pretrained`.
            **kwargs: passed to diffusers, such as `revision` or `variant`.

        Raises:
            ValueError: nothing there, a damaged folder, another kind of pipeline, no prompts, an unknown mode or
                precision of the weights, a size that the latents cannot have, a negative prompt that would play no
                part.
        """
        pretrained_path = check_path(pretrained_path, kwargs)
        check_mode(compile_mode)
        dtype = dtype_of(weights)
        texts = read_prompts(prompts)
        with loading(pretrained_path):
            saved = TextPipeline.read(pretrained_path, kwargs)
        # Before billions of weights are loaded.
        scale = saved.scale(guidance_scale, negative_prompt)
        latent_size = None if image_size is None else saved.latent_size(image_size)
        with loading(pretrained_path):
            pipeline = saved.load(pretrained_path, kwargs, dtype)
            network = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
            size = sizes_of(network).sample_size
            # Of some configurations it is a list.
            known = (size, size) if isinstance(size, int) else tuple(size or ())
            is_other = latent_size is not None and (latent_size, latent_size) != known
            if is_other:
                network.register_to_config(sample_size=latent_size)
            shown, negative = encode_prompts(pipeline, texts, negative_prompt)
            told = digest_of_texts(pipeline, texts, negative_prompt)
        denoiser = cls(
            network,
            NoiseSchedule.from_scheduler(pipeline.scheduler),
            shown,
            negative,
            scheduler_prediction_type(pipeline.scheduler),
            pretrained_path,
            pipeline.vae,
            scale,
        )
        denoiser._image_size, denoiser._prompts_digest = image_size if is_other else None, told
        denoiser.compiled(compile_mode)
        return denoiser

    @property
    def num_conditions(self) -> int:
        """How many prompts there are."""
        return len(self._prompts["encoder_hidden_states"])

    def settings(self) -> dict[str, Any]:
        """Besides those of any latent model: the guidance scale, a digest of the prompts (of the texts and the text
        encoders; where encoded ones were given, of these), and the size of the images where it was chosen.
        """
        scale = self.guidance_scale if self._told is None else self._told
        found = {**super().settings(), "guidance_scale": scale, "prompts": self._prompts_digest}
        return found if self._image_size is None else {**found, "image_size": self._image_size}

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
        return {
            name: rows.to(x_t.device, type_of(rows, x_t)).expand(len(x_t), *rows.shape[1:])
            for name, rows in self._negative.items()
        }

    def _evaluate(self, x_t: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if self._told is not None:
            conditions = {**conditions, "guidance": x_t.new_full((len(x_t),), self._told)}
        return call(self.unet, x_t, timestep, conditions)
