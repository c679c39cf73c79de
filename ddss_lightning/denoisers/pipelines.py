"""The parts of a pipeline that diffusers saved, in a folder or on the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddss_lightning.files import is_hub_name, not_here

SHOWN_TEXTS = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "FluxTransformer2DModel",
)
# Transformer2DModel: what older pipelines call a DiT.
NETWORKS = ("UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel")


def read_config(base: Any, path: str, subfolder: str = "", **kwargs: str) -> dict[str, Any] | None:  # noqa: ANN401
    """A configuration file, as `base` names it, of a local folder or of a model on the hub; None if it has none.

    Raises:
        OSError: it is damaged, or the hub did not say whether there is one: no connection, no access, a fault there.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = f"{subfolder}/{base.config_name}" if subfolder else base.config_name
    if Path(path).is_dir() and not Path(path, name).is_file():
        return None
    try:
        config: dict[str, Any] = base.load_config(path, subfolder=subfolder or None, **kwargs)
    except OSError as error:
        # The texts of diffusers say of most causes that there is no such file.
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, LocalEntryNotFoundError):
            where = {option: kwargs[option] for option in ("cache_dir", "revision") if option in kwargs}
            if try_to_load_from_cache(path, name, **where) is _CACHED_NO_EXIST:
                return None
        elif isinstance(cause, EntryNotFoundError):
            return None
        raise OSError(f"'{name}' could not be read: {cause}") from error
    return config


def check_path(pretrained_path: str | Path, kwargs: Mapping[str, Any]) -> str:
    """Make sure that this is a folder, or can be a name on the hub; returns it as a text.

    Raises:
        ValueError: it is neither; or the arguments for diffusers ask for weights of half precision.
    """
    pretrained_path = str(pretrained_path)
    if given := {"torch_dtype", "dtype"} & kwargs.keys():
        raise ValueError(
            f"{given.pop()}: a model is loaded in float32; leave it out, and for half precision give "
            "weights='bfloat16', or the Trainer precision='bf16-mixed'."
        )
    if not Path(pretrained_path).is_dir() and not is_hub_name(pretrained_path):
        raise ValueError(
            f"No diffusion model in '{pretrained_path}': {not_here()}. Give a folder written by a diffusers "
            "pipeline's `save_pretrained`, such as 'checkpoints/digits-ddpm', or a hub name owner/model."
        )
    return pretrained_path


@contextlib.contextmanager
def loading(pretrained_path: str) -> Iterator[None]:
    """What diffusers, transformers, safetensors, json and the hub raise, each its own, as one error.

    Raises:
        ValueError: any of them.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        asked = "" if Path(pretrained_path).is_dir() else f" (The hub was asked, for {not_here()}.)"
        raise ValueError(f"The diffusion model in '{pretrained_path}' could not be loaded: {reason}{asked}") from error


def load_parts(path: str, kwargs: dict[str, str], dtype: torch.dtype) -> tuple[nn.Module, Any, nn.Module | None]:
    """The network with weights of `dtype`, the scheduler of its configuration's class, a latent model's decoder."""
    import diffusers

    def config_of(base: Any, *subfolders: str | None) -> tuple[dict[str, Any], dict[str, str]]:  # noqa: ANN401
        problem: OSError | None = None
        for subfolder in subfolders:
            where = kwargs if subfolder is None else {"subfolder": subfolder, **kwargs}
            try:
                config = read_config(base, path, **where)
            except OSError as error:
                # Of a hub out of reach, the other one may be in the cache.
                problem = problem or error
            else:
                if config is not None:
                    return config, where
        raise problem or OSError(f"it has no '{base.config_name}', neither in '{subfolders[0]}' nor at the top")

    network_config, where = config_of(diffusers.UNet2DModel, "unet", None, "transformer")
    name = network_config.get("_class_name", "UNet2DModel")
    _refuse_texts(name)
    if name not in NETWORKS or network_config.get("class_embed_type"):
        raise ValueError(
            f"its network is a {name} with conditions; only a UNet2DModel without, or with class labels, and a DiT are "
            "supported."
        )
    network = load_network(name, path, dtype, where)
    # Older configurations of PixArt name the class that a DiT had, too, and diffusers tells them apart.
    _refuse_texts(type(network).__name__)
    scheduler_config, where = config_of(diffusers.DDPMScheduler, "scheduler", None)
    scheduler_class = _scheduler_class(scheduler_config.get("_class_name", "DDPMScheduler"))
    return network, scheduler_class.from_pretrained(path, **where), _load_decoder(path, kwargs)


def load_network(name: str, path: str, dtype: torch.dtype, where: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers, with weights of `dtype`."""
    import diffusers

    # Loading in one go needs no further package (accelerate) and no warning of its absence.
    options: dict[str, Any] = {"torch_dtype": dtype, "low_cpu_mem_usage": False, **where}
    network: nn.Module = getattr(diffusers, name).from_pretrained(path, **options)
    # diffusers keeps some parts in float32 on purpose; of SD3Transformer2DModel it leaves all.
    if not any(parameter.dtype == dtype for parameter in network.parameters()):
        network.to(dtype)
    return network


def _refuse_texts(name: str) -> None:
    if name in SHOWN_TEXTS:
        raise ValueError(
            f"its network is a {name}, which is shown texts; use ddss_lightning.TextDenoiser with prompts."
        )


def _scheduler_class(name: str) -> Any:  # noqa: ANN401 - diffusers has no common base for this
    """A scheduler's class by its name.

    Raises:
        ValueError: it is none of diffusers': which noise schedule the network was trained with is not known then.
    """
    import diffusers

    if name == "GGDMScheduler":
        from ddss_lightning.scheduler import GGDMScheduler

        return GGDMScheduler
    # What the oldest models call DDPMScheduler.
    found = getattr(diffusers, name.replace("GaussianDDPM", "DDPM"), None)
    if found is None:
        raise ValueError(
            f"its scheduler is a {name}, which diffusers does not have, so that its noise schedule is not known; put "
            "the configuration of one with the same betas there, such as a DDPMScheduler with `trained_betas`"
        )
    return found


def _load_decoder(path: str, kwargs: dict[str, str]) -> nn.Module | None:
    """The first-stage model that the pipeline's `model_index.json` names, if any."""
    import diffusers

    # Without the file: a network and a scheduler without a pipeline.
    index = read_config(diffusers.DiffusionPipeline, path, **kwargs) or {}
    for part in ("vqvae", "vae"):
        if index.get(part, (None, None))[1] is not None:
            decoder: nn.Module = getattr(diffusers, index[part][1]).from_pretrained(
                path, subfolder=part, low_cpu_mem_usage=False, **kwargs
            )
            return decoder
        if not index and Path(path, part).is_dir():
            raise ValueError(
                f"it has a decoder, '{part}', but no model_index.json that says so; save the pipeline as a whole."
            )
    return None


def decoder_factor(config: Any) -> int:  # noqa: ANN401 - a dictionary, or one of diffusers'
    """How much larger images are than latents: each level of a decoder but one doubles height and width."""
    # An `AutoencoderDC` (of Sana) has levels of its own in the decoder.
    return int(2 ** (len(config.get("block_out_channels") or config["decoder_block_out_channels"]) - 1))
