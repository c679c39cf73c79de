"""A frozen model, a sampler for it and a feature network: images from held-out noise, which callbacks score."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddss_lightning.denoisers.base import Denoiser, check_complete, check_takes_turns
from ddss_lightning.features.base import FeatureExtractor, check_images
from ddss_lightning.features.kept import KeptFeatures, agree
from ddss_lightning.ggdm import Degree, GGDMSampler
from ddss_lightning.images import to_pixels
from ddss_lightning.noise import held_out_noise
from ddss_lightning.precision import full_precision
from ddss_lightning.remat import Remat
from ddss_lightning.saved import FORMAT_VERSION, read_card

FROZEN = ("denoiser.", "features.", "loss.")
# Real images, from which on it is said that they are encoded.
LARGE = 5000
# Of these so many are encoded again where features are kept.
FEW = 16
PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class SamplingModule(LightningModule):
    """What `DDSSModule` does besides learning.

    Validation, test and prediction generate images from held-out noise given by index; callbacks score them. A
    checkpoint holds the sampler, never the frozen networks, and refuses to be loaded with another denoiser.

    Args:
        denoiser: the pretrained model; it is frozen.
        sampler: made with `denoiser.schedule`; `averaged`, a copy, is what is scored.
        features: the network of the scores; it is frozen.
        remat: what is kept for a backward pass, see `unroll`.
        seed: of all noise; validation, test and prediction noise are kept apart.
        features_batch_size: images that go through the decoder of a latent model at once; None: the whole batch.

    The Trainer's precision is 32-true, bf16-mixed or 64-true; others are refused. The sampler is float64 in all.

    Raises:
        ValueError: parts that do not fit together.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: GGDMSampler,
        features: FeatureExtractor,
        remat: str = "none",
        seed: int = 0,
        features_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._check_parts(denoiser, sampler, features)
        self.denoiser = denoiser.freeze()
        self.features = features.freeze()
        self.sampler = sampler
        self.averaged = copy.deepcopy(sampler).requires_grad_(False)
        self.remat, self.seed = Remat.parse(remat), seed
        self.features_batch_size = features_batch_size
        self._real: Tensor | None = None
        self._real_source: tuple[object, str] | None = None
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_no_frozen)  # type: ignore[no-untyped-call]

    @staticmethod
    def _check_parts(denoiser: Denoiser, sampler: GGDMSampler, features: FeatureExtractor) -> None:
        check_kind("denoiser", denoiser, Denoiser, "DiffusersDenoiser.from_pretrained(path) loads a model of diffusers")
        check_kind("sampler", sampler, GGDMSampler, "GGDMSampler.from_scheduler(scheduler, num_steps) reads one")
        check_kind("features", features, FeatureExtractor, "ModuleFeatures(network, image_shape) wraps a network")
        check_complete(denoiser)
        for name in ("image_shape", "num_features"):
            if not hasattr(features, name):
                raise ValueError(
                    f"{type(features).__name__} has no attribute `{name}`; a FeatureExtractor sets image_shape and "
                    "num_features in its __init__."
                )
        if tuple(denoiser.image_shape) != tuple(features.image_shape):
            raise ValueError(
                f"The denoiser '{denoiser.name}' makes images of shape {denoiser.image_shape}, the feature network "
                f"takes {features.image_shape} (channels, height, width); use a feature network for such images."
            )
        check_takes_turns(denoiser)
        sampler.check_denoiser(denoiser)

    def load_sampler(self, pretrained_path: str | Path, learn: Sequence[Degree] = ()) -> None:
        """Use a saved sampler instead of the one this module was made with.

        Args:
            pretrained_path: a local folder, the log folder of a fit, or a hub name `owner/model`.
            learn: what to learn of a sampler that was saved as fixed numbers, which do not follow log-SNRs: `logsnr` is
                left out. What another one learns is its own affair.

        Raises:
            ValueError: nothing there, or a sampler that was learned for another denoiser.
        """
        sampler, base_model = GGDMSampler.from_pretrained(pretrained_path), read_card(pretrained_path)["base_model"]
        # First: what follows from it, such as another prediction type, says less.
        if base_model.get("fingerprint", self.denoiser.fingerprint()) != self.denoiser.fingerprint():
            raise ValueError(
                f"The sampler in '{pretrained_path}' was learned for '{base_model.get('name')}' (fingerprint "
                f"{base_model['fingerprint']}), not for '{self.denoiser.name}' ({self.denoiser.fingerprint()})."
            )
        self._check_parts(self.denoiser, sampler, self.features)
        self._compare_settings(pretrained_path, base_model.get("settings"))
        degrees = [name for name in learn if name != "logsnr"]
        if degrees and not sampler.corrections:
            sampler = GGDMSampler.from_coefficients(
                sampler.schedule,
                sampler.coefficients().detach(),
                degrees,
                prediction_type=sampler.config["prediction_type"],
                source={"class_path": f"the sampler in '{pretrained_path}'"},
            )
        self.sampler, self.averaged = sampler, copy.deepcopy(sampler).requires_grad_(False)

    def _compare_settings(self, pretrained_path: str | Path, theirs: dict[str, Any] | None) -> None:
        # Cards of older versions say nothing of them.
        if theirs is None:
            return
        # As they come back from a card: without tuples.
        ours = json.loads(json.dumps(self.denoiser.settings()))
        changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if changed:
            rank_zero_warn(
                f"The sampler in '{pretrained_path}' was learned with other settings of the model: "
                + ", ".join(f"{name} {theirs.get(name)}, now {ours.get(name)}" for name in changed)
                + ". It is used as it is; a sampler is best with those that it was learned with."
            )

    def setup(self, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Refuse a Trainer in float16, whose range loses gradients and needs their scaling, or with half weights.

        Raises:
            ValueError: a precision other than 32-true, bf16-mixed and 64-true; 64-true with a network that holds its
                weights in half precision; a device without float64.
        """
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(
                "The Trainer's device is 'mps', which has no float64, and a sampler's numbers are float64; use "
                "accelerator='cpu'."
            )
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"The Trainer's precision is '{self.trainer.precision}', in which a sampler cannot be learned; use "
                "precision='bf16-mixed' (the networks in half precision, all else in float32) or '32-true'."
            )
        if self.trainer.precision == "64-true" and torch.bfloat16 in {
            value.dtype for value in self.denoiser.parameters()
        }:
            # The Trainer would turn them into float64, and the model into another one than that of the sampler's card.
            raise ValueError(
                f"The Trainer's precision is '64-true', and the model '{self.denoiser.name}' holds its weights in "
                "bfloat16; use precision='32-true', or the model with weights='float32'."
            )

    # ---------------------------------------------------------------------------------------------- real images

    def real_features(self) -> Tensor:
        """Features of all real images of the data module, shape (m, d), computed once for each of both.

        Raises:
            ValueError: no data module, fewer than two images, images of another shape than the model's, NaN, or values
                outside [-1, 1].
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        source = (datamodule, self.features.identity())
        if self._real is None or self._real_source != source:
            self._real, self._real_source = self.encode_real(self.features), source
        # The same data module, but now a Trainer on another device.
        self._real = self._real.to(self.device) if self._real.device != self.device else self._real
        return self._real

    @torch.no_grad()
    def encode_real(self, features: FeatureExtractor) -> Tensor:
        """The output of any feature network for all real images of the data module, shape (m, d).

        Many images of a data module that says what they are (`ImageDataModule.identity`) are encoded once, and kept on
        disk, see `KeptFeatures`.

        Raises:
            ValueError: as `real_features`.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "real_dataloader"):
            raise ValueError(
                "Scores and losses compare with real images: give the Trainer a data module that has "
                "`real_dataloader()`, such as DigitsDataModule or ImageFolderDataModule."
            )
        loader = datamodule.real_dataloader()
        if (number := _length(loader)) < LARGE:
            return self._encode(features, loader)
        about = f"{type(features).__name__} of {number} real images, which takes a while"
        identity = datamodule.identity() if getattr(datamodule, "keep_features", False) else None
        if identity is None:
            rank_zero_info(about)
            return self._encode(features, loader)
        kept = KeptFeatures(features, f"{type(datamodule).__name__}: {identity}", number)
        known = self._known(kept, loader, features)
        if known is None:
            rank_zero_info(f"{about}; they are kept in '{kept.path}'")
            known = self._encode(features, loader)
            if self.trainer.is_global_zero:
                kept.write(known)
        return known

    def _known(self, kept: KeptFeatures, loader: Any, features: FeatureExtractor) -> Tensor | None:  # noqa: ANN401
        """What is kept, if the network still makes the same of the first images."""
        known = kept.read()
        if known is None:
            return None
        images = next(iter(loader))[:FEW]
        self._check_images(images, 0)
        with full_precision(self.device.type):
            again = features(images.to(device=self.device, dtype=features.dtype))
        if agree(known[: len(images)], again):
            return known.to(self.device)
        rank_zero_warn(
            f"{type(features).__name__} no longer makes the features that are kept in '{kept.path}' (was its code "
            "changed?); all real images are encoded again."
        )
        return None

    def _encode(self, features: FeatureExtractor, loader: Any) -> Tensor:  # noqa: ANN401
        parts: list[Tensor] = []
        number, lowest, highest = 0, math.inf, -math.inf
        for images in loader:
            self._check_images(images, number)
            number += len(images)
            lowest, highest = min(lowest, float(images.min())), max(highest, float(images.max()))
            with full_precision(self.device.type):
                output = features(images.to(device=self.device, dtype=features.dtype))
            parts.append(features.check_output(output))
        if number < 2:
            raise ValueError(f"FID and KID need at least two real images, got {number}.")
        if lowest >= 0 and highest > 0.5:
            rank_zero_warn(
                f"All values of the {number} real images lie in [{lowest:.3g}, {highest:.3g}]; they must be scaled to "
                "[-1, 1], so if they are in [0, 1], use 2 x - 1."
            )
        return torch.cat(parts)

    @property
    def image_dtype(self) -> torch.dtype:
        """The type of states and images: float32, or float64 where the Trainer's precision is 64-true."""
        return torch.promote_types(cast(torch.dtype, self.dtype), torch.float32)

    def _check_images(self, images: Tensor, number: int) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(
                f"Each item of the real images must be one tensor, got a batch of {type(images).__name__}; leave out "
                "labels."
            )
        if tuple(images.shape[1:]) != tuple(self.denoiser.image_shape):
            raise ValueError(
                f"The real images have shape {tuple(images.shape[1:])}, the model '{self.denoiser.name}' makes "
                f"{self.denoiser.image_shape} (channels, height, width); use data of that shape (an image folder: "
                "image_channels and image_size)."
            )
        what = f"real images {number} to {number + len(images) - 1}"
        check_images(images, what, "clean the data set")

    # ----------------------------------------------------------------------------------------------- generating

    def generate(
        self,
        x_T: Tensor,
        noise: Tensor | None,
        sampler: GGDMSampler | None = None,
        denoiser: Denoiser | None = None,
    ) -> Tensor:
        """Pixels of `sampler` (default: the one being learned) from noise on any device, see `to_pixels`.

        `noise` is that of the steps, see `unroll`; `denoiser` is that of these samples, see `Denoiser.for_samples`.
        """
        return to_pixels(self._decoded(x_T, noise, sampler or self.sampler, denoiser or self.denoiser))

    def _decoded(self, x_T: Tensor, noise: Tensor | None, sampler: GGDMSampler, denoiser: Denoiser) -> Tensor:
        return denoiser.decode_in_parts(self.last_state(sampler, denoiser, x_T, noise), self.features_batch_size)

    def last_state(self, sampler: GGDMSampler, denoiser: Denoiser, x_T: Tensor, noise: Tensor | None) -> Tensor:
        """x_0 of `sampler` from noise on any device; of a latent model before its decoder."""
        x_T = x_T.to(device=self.device, dtype=self.image_dtype)
        return cast(Tensor, sampler(denoiser, x_T, noise=noise, remat=self.remat))

    def in_parts(self, outputs: Callable[[Tensor], tuple[Tensor, ...]], x_0: Tensor) -> tuple[Tensor, ...]:
        """Outputs of last states, `features_batch_size` at once, computed again in a backward pass."""
        if self.features_batch_size is None:
            return outputs(x_0)
        parts = [checkpoint(outputs, part, use_reentrant=False) for part in x_0.split(self.features_batch_size)]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    # --------------------------------------------------------------------------------------------- held-out noise

    def samples(self, split: str, indices: Tensor) -> Tensor:
        """Images, pixels in [-1, 1], of the averaged sampler from the noise of a split with these indices.

        Args:
            split: `validation`, `test` or `predict`.
            indices: integers, shape (N,).

        Raises:
            ValueError: something else.
        """
        if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.is_floating_point():
            is_tensor = isinstance(indices, Tensor)
            got = f"{indices.dtype} of shape {tuple(indices.shape)}" if is_tensor else type(indices).__name__
            raise ValueError(
                f"A batch of {split} must be the indices of its noise, integers of shape (N,), got {got}; take "
                "the loaders of ImageDataModule, which give them."
            )
        return to_pixels(self._unclamped(split, indices))

    def _unclamped(self, split: str, indices: Tensor) -> Tensor:
        noisy = self.averaged.uses_noise
        draws = self.averaged.num_steps if noisy else 1
        key, samples = f"{split}/{self.seed}", indices.tolist()
        x_T, noise = held_out_noise(key, samples, self.denoiser.state_shape, draws)
        return self._decoded(x_T, noise if noisy else None, self.averaged, self.denoiser.for_samples(key, samples))

    def on_validation_start(self) -> None:
        """Say so where `Trainer.validate` or `test` scores nothing: callbacks look at the images, not this module."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        others = [type(each) for each in callbacks if not isinstance(each, ProgressBar)]
        is_own = type(self).validation_step is SamplingModule.validation_step
        looks = any(each.on_validation_batch_end is not Callback.on_validation_batch_end for each in others)
        if self.trainer.state.fn != "fit" and is_own and not looks:
            rank_zero_warn("No callback looks at the images: give the Trainer SampleQuality() for scores of them.")

    on_test_start = on_validation_start

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Images, pixels in [-1, 1], of the averaged sampler from the validation noise of the given indices."""
        return self.samples("validation", batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Images from the test noise."""
        return self.samples("test", batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Images from the prediction noise."""
        return self.samples("predict", batch)

    # -------------------------------------------------------------------------------------------------- checkpoints

    @property
    def base_model(self) -> dict[str, Any]:
        """Which denoiser a sampler is for: its name, fingerprint and settings."""
        settings = self.denoiser.settings()
        found = {"name": self.denoiser.name, "fingerprint": self.denoiser.fingerprint()}
        return {**found, "settings": settings} if settings else found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which denoiser the sampler belongs to, and what sampler it is."""
        checkpoint["denoiser"] = self.base_model
        checkpoint["sampler_config"] = self.sampler.config
        checkpoint["sampler_format"] = FORMAT_VERSION

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another denoiser, of another sampler or of another version.

        Raises:
            ValueError: the fingerprints, the sampler's configurations or the formats differ.
        """
        if checkpoint.get("sampler_format", 1) != FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint is of format {checkpoint.get('sampler_format', 1)}, this package resumes format "
                f"{FORMAT_VERSION}, in which the same numbers can be another sampler; resume with the version of "
                "ddss_lightning that wrote it, or start again from the sampler that it saved."
            )
        saved = checkpoint.get("denoiser", {})
        if saved.get("fingerprint") != self.denoiser.fingerprint():
            raise ValueError(
                f"The checkpoint belongs to the denoiser '{saved.get('name')}' (fingerprint "
                f"{saved.get('fingerprint')}), not to '{self.denoiser.name}' ({self.denoiser.fingerprint()}); "
                "load it with the model it was learned for."
            )
        differing = _differing(checkpoint["sampler_config"], self.sampler.config)
        if differing:
            pairs = ", ".join(f"{key}: {theirs} instead of {ours}" for key, (theirs, ours) in differing.items())
            raise ValueError(
                f"The checkpoint holds another sampler ({pairs}); resume with the recipe it was started with."
            )


def check_kind(name: str, part: object, kind: type, remedy: str) -> None:
    """Make sure that an argument is what it is called.

    Raises:
        ValueError: it is no instance of `kind`; `remedy` says how to get one.
    """
    if not isinstance(part, kind):
        got = f"the class {part.__name__}" if isinstance(part, type) else type(part).__name__
        raise ValueError(f"{name} must be a {kind.__name__}, got {got}; {remedy}.")


def _length(loader: Any) -> int:  # noqa: ANN401
    """Of its data set; 0 where that has none."""
    try:
        return len(getattr(loader, "dataset", ()))
    except TypeError:
        return 0


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations of samplers; imported numbers may, by rounding, between machines."""

    def flat(config: dict[str, Any]) -> dict[str, Any]:
        anchor = config["anchor"] if isinstance(config["anchor"], dict) else {"name": config["anchor"]}
        rest = {f"anchor.{key}": value for key, value in anchor.items() if key != "coefficients"}
        return {**{key: value for key, value in config.items() if key != "anchor"}, **rest}

    def numbers(config: dict[str, Any]) -> dict[str, Any]:
        anchor = config["anchor"]
        return anchor.get("coefficients", {}) if isinstance(anchor, dict) else {}

    left, right = flat(theirs), flat(ours)
    found = {key: (left.get(key), right.get(key)) for key in left | right if left.get(key) != right.get(key)}
    before, now = found.get("timesteps", (None, None))
    if before and now and len(before) == len(now) and np.allclose(before, now, rtol=1e-5, atol=1e-3):
        del found["timesteps"]
    for name in numbers(theirs) | numbers(ours):
        a, b = (torch.tensor(numbers(config).get(name, math.nan), dtype=torch.float64) for config in (theirs, ours))
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            found[f"anchor.coefficients.{name}"] = ("other numbers", "these")
    return found


def _drop_frozen(module: SamplingModule, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:  # noqa: ANN401, ARG001
    for key in [key for key in state_dict if key.startswith(tuple(prefix + name for name in FROZEN))]:
        del state_dict[key]


def _expect_no_frozen(module: SamplingModule, incompatible_keys: Any) -> None:  # noqa: ANN401, ARG001
    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if not key.startswith(FROZEN)]
