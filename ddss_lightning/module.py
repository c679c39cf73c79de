"""DDSSModule: learn a sampler for a frozen denoiser by differentiating through the quality of its samples."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.features.base import FeatureExtractor
from ddss_lightning.first_calls import check_denoiser, check_features, check_finite, check_range, check_same_model
from ddss_lightning.full_matrix_adam import FullMatrixAdam
from ddss_lightning.gauss_newton import TIME_DEGREES, GaussNewton
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.images import to_pixels
from ddss_lightning.losses.base import SampleLoss, Samples, check_needs, every_loss
from ddss_lightning.losses.elsewhere import InFeatures
from ddss_lightning.losses.frechet import FrechetResidual
from ddss_lightning.losses.kid import KIDLoss
from ddss_lightning.losses.slope import slope_by_parts
from ddss_lightning.noise import batch_noise, independent_indices
from ddss_lightning.precision import full_precision
from ddss_lightning.sample_moments import SampleMoments
from ddss_lightning.sampling import LARGE, SamplingModule, check_kind
from ddss_lightning.signals import NOTHING_LEARNED, SIGNALS, agreed, noted, stop
from ddss_lightning.teacher import TeacherPairs
from ddss_lightning.teacher_batches import TeacherBatches

# What else than its weights a denoiser's images depend on, and a fit is not resumed with another of.
CONDITIONED = ("guidance_scale", "prompts", "image_size", "null_label")
# So many say whether images lie in the range of pixels.
CHECKED_IMAGES = 8
TARGETS = frozenset({"target", "target_features"})


class DDSSModule(SamplingModule):
    r"""Minimise L(phi(x_0(theta)), phi(real)) over the numbers theta of a sampler (DDSS, Watson et al. 2022).

    L is the KID, as in the paper, or any other `SampleLoss`, such as a weighted sum of several.

    One training step: draw noise from (seed, global step, index in the global batch), unroll the sampler with the
    frozen denoiser, clamp and round straight through, take the features of the frozen network phi, compare with real
    ones, and backpropagate through the whole chain. The slope of the loss with respect to the features (and images,
    where the loss sees them) is computed apart, in full precision: under DDP, of the features of all processes, so that
    the loss is the KID of the global batch; and with `microbatch_size` it then goes through the chain part by part,
    which is the same gradient on the memory of a part, for one more pass without gradient.

    With `gauss_newton`, a training step is instead one Gauss-Newton step on the Frechet distance of the same features,
    with derivatives by differences; `batch_size` images per difference. `loss`, the learning rates, `betas`,
    `full_matrix`, the schedule and clipping then play no part; `ema_decay` does, and is best 0 for a handful of steps.

    Where the loss compares with a teacher, a step takes its x_T from the teacher's pairs, which are made when training
    starts; noise that the sampler adds is drawn as ever.

    How it generates images for validation, test and prediction, and what its checkpoints hold: see `SamplingModule`.

    Args:
        denoiser: the pretrained model.
        sampler: what is learned; made with `denoiser.schedule`.
        features: phi.
        loss: what is minimised; None: `KIDLoss()`.
        batch_size: images generated per step and process, at least 2.
        lr: learning rate of the corrections (`mu`, `nu`, `std`, `pred`).
        time_lr: learning rate of `time` and `logsnr`.
        betas: of Adam.
        full_matrix: Adam with the whole matrix of second moments, see `FullMatrixAdam`; for at most several hundred
            numbers. It takes learning rates of two to eight times those of Adam.
        warmup_steps: steps of linear warm-up.
        final_lr_fraction: where the cosine decay ends, as a fraction of the learning rate.
        gradient_clip_norm: largest norm of the whole gradient, where the Trainer sets no `gradient_clip_val`; 0, as
            there, or infinity: no limit.
        ema_decay: decay of the running average of the sampler that is scored and saved; 0 turns it off.
        remat: what is kept for the backward pass: `none`, `denoiser`, `every(n)` or `budget(bytes)`, with `+offload` or
            without, see `unroll`.
        microbatch_size: images that go through chain and feature network at once; None: all of `batch_size`.
        features_batch_size: images that go through the feature network (of a latent model: through its decoder too, in
            validation, test and teacher as well) at once, computed again in the backward pass; None: all at once, and
            kept.
        gather_features: under DDP, the loss of the global batch; False: the mean over processes of the loss of each
            one's own, whose gradient is noisier for a KID.
        max_skipped_steps: a step with a loss or gradient that is not finite is skipped; after so many in a row the fit
            validates, keeps its best sampler, and ends with an error.
        gauss_newton: settings of Gauss-Newton steps; None: Adam on `loss`.
        teacher: whose images a `TeacherLoss` compares with.
        seed: of all noise but that of the teacher's pairs (`TeacherPairs.seed`), and of their order; training,
            validation, test and prediction noise are kept apart. None: 0, on the command line `seed_everything`.

    Raises:
        ValueError: parts that do not fit together, or an argument outside its range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: GGDMSampler,
        features: FeatureExtractor,
        loss: SampleLoss | None = None,
        batch_size: int = 256,
        lr: float = 3e-3,
        time_lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        full_matrix: bool = False,
        warmup_steps: int = 10,
        final_lr_fraction: float = 0.03,
        gradient_clip_norm: float = 1.0,
        ema_decay: float = 0.9,
        remat: str = "none",
        microbatch_size: int | None = None,
        features_batch_size: int | None = None,
        gather_features: bool = True,
        max_skipped_steps: int = 10,
        gauss_newton: GaussNewton | None = None,
        teacher: TeacherPairs | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(denoiser, sampler, features, remat, seed or 0, features_batch_size)
        # As `load_from_checkpoint` gives them.
        gauss_newton = GaussNewton(**gauss_newton) if isinstance(gauss_newton, dict) else gauss_newton
        teacher = TeacherPairs(**teacher) if isinstance(teacher, dict) else teacher
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 for an unbiased KID, got {batch_size}.")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}.")
        for name, size in (("microbatch_size", microbatch_size), ("features_batch_size", features_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        limits = {"lr": (lr, math.inf), "time_lr": (time_lr, math.inf), "final_lr_fraction": (final_lr_fraction, 1.0)}
        limits |= {"warmup_steps": (warmup_steps, math.inf), "gradient_clip_norm": (gradient_clip_norm, math.inf)}
        for name, (value, largest) in limits.items():
            if not 0 <= value <= largest or not (math.isfinite(value) or name == "gradient_clip_norm"):
                raise ValueError(
                    f"{name} must be a number of at least 0{' and at most 1' * (largest == 1)}, got {value}."
                )
        if max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {max_skipped_steps}.")
        settings = {"gauss_newton": gauss_newton, "teacher": teacher}
        self.save_hyperparameters(ignore=["denoiser", "sampler", "features", "loss", *settings])
        self.save_hyperparameters({name: dataclasses.asdict(each) for name, each in settings.items() if each})
        self.gauss_newton, self.teacher = gauss_newton, teacher
        self.loss = KIDLoss() if loss is None else loss
        check_kind("loss", self.loss, SampleLoss, "give one such as KIDLoss()")
        check_needs(self.loss)
        for part in self.loss.modules():
            if isinstance(part, FeatureExtractor) and tuple(part.image_shape) != tuple(denoiser.image_shape):
                raise ValueError(
                    f"The denoiser '{denoiser.name}' makes images of shape {denoiser.image_shape}, the loss's "
                    f"{type(part).__name__} takes {part.image_shape} (channels, height, width); use another."
                )
        if teacher is None and self.needs_teacher:
            raise ValueError(
                f"The loss needs {', '.join(sorted(TARGETS & self.loss.needs))} of a teacher: give "
                "teacher=TeacherPairs(...), in a recipe `model.teacher`."
            )
        self.batch_size = batch_size
        self.microbatch_size = microbatch_size
        self.gather_features = gather_features
        self.lr, self.time_lr, self.betas, self.full_matrix = lr, time_lr, betas, full_matrix
        self.warmup_steps, self.final_lr_fraction, self.ema_decay = warmup_steps, final_lr_fraction, ema_decay
        self.gradient_clip_norm = gradient_clip_norm
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = self.num_skipped_in_a_row = 0
        self._skipped_step = -1
        self._schedule: LambdaLR | None = None
        # Over which the learning rate decays; and in the fit of a checkpoint that was loaded.
        self._decay_steps: float | None = None
        self._loaded_decay_steps: float | None = None
        self._teacher_batches: TeacherBatches | None = None
        # Of a checkpoint, until training starts.
        self._loaded_offsets: Tensor | None = None

    # ------------------------------------------------------------------------------------------------- learning

    def setup(self, stage: str) -> None:
        """As `SamplingModule`; and tell DDP what to leave alone.

        Processes need to keep equal what is learned, nothing else: no broadcast of networks and buffers. Here, not when
        the module is made: the sampler can have been replaced, and its corrections held or freed.
        """
        super().setup(stage)
        learned = {name for name, value in self.named_parameters() if value.requires_grad}
        everything = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        self._ddp_params_and_buffers_to_ignore = [name for name in everything if name not in learned]

    def on_fit_start(self) -> None:
        """Find what would fail, or be learned from wrongly, at the first step, before the first sampler is scored.

        What an earlier fit of this module left (moments, start noise, skipped steps) plays no part in a new one.

        Raises:
            ValueError: too few teacher pairs, a teacher that cannot be; a network of one's own that lets no gradient
                through, or returns something else than it must; a start that makes no image that is finite.
        """
        self._skipped_step = -1
        fresh = self.trainer.ckpt_path is None and not self.global_step
        if fresh:
            self._teacher_batches = self._loaded_offsets = self._loaded_decay_steps = None
            self.num_skipped = self.num_skipped_in_a_row = 0
            for part in every_loss(self.loss).values():
                part.restore({})
        elif self.num_skipped_in_a_row >= self.max_skipped_steps:
            # It was stopped for that, and has another try.
            self.num_skipped_in_a_row = 0
        if self.needs_teacher and self.teacher is not None:
            self.teacher.batch(0, self.trainer.world_size * self.batch_size, self.seed)
            try:
                self.teacher.sampler(self.denoiser)
            except ValueError as error:
                raise ValueError(f"model.teacher: {error}") from error
        if self.gauss_newton is None:
            self._check_networks()
        # A compiled one would be compiled once more, for a few images.
        if getattr(self.denoiser, "compile_mode", None) is None:
            with torch.no_grad(), full_precision(self.device.type):
                images = self._unclamped("validation", torch.arange(CHECKED_IMAGES))
            # One that went wrong since its start has a best sampler.
            if fresh:
                check_finite(images, self.denoiser)
            check_range(images)

    def _check_networks(self) -> None:
        check_same_model(self.denoiser, self.loss)
        networks = [self.features] if "features" in self.loss.needs else []
        networks += [part.features for part in self.loss.modules() if isinstance(part, InFeatures)]
        with torch.enable_grad(), self.trainer.precision_plugin.train_step_context():
            if getattr(self.denoiser, "compile_mode", None) is None:
                check_denoiser(self.denoiser, self.sampler, self.device, self.image_dtype)
            for network in networks:
                check_features(network, self.device)

    def on_train_start(self) -> None:
        """Give the loss its real features, make the teacher's images that are missing, and set the learning rates.

        Raises:
            ValueError: a loss with a memory, on several processes that each see a loss of their own.
        """
        real = self.real_features()
        if self.gauss_newton is None:
            self.loss.fit_real(real, self.encode_real)
        has_memory = any(part.has_memory for part in every_loss(self.loss).values())
        if self.trainer.world_size > 1 and not self.gather_features and has_memory:
            raise ValueError(
                "gather_features=False gives each process a loss of its own, of which a checkpoint holds one; a loss "
                "with running moments needs gather_features=True."
            )
        self._teacher_batches = self._load_teacher() if self.needs_teacher else None
        if self._teacher_batches is not None:
            self.loss.fit_target(self._encode_target)
        self._renew_rates()

    @property
    def uses_real_batches(self) -> bool:
        """Whether a training step looks at the minibatch of real images."""
        return self.gauss_newton is None and "real" in self.loss.needs

    @property
    def needs_teacher(self) -> bool:
        """Whether a training step compares with the teacher's images."""
        return self.gauss_newton is None and not TARGETS.isdisjoint(self.loss.needs)

    @property
    def start_noise_offsets(self) -> Tensor | None:
        """x'_T - x_T of all teacher pairs, shape (num_pairs, *state_shape); None where none has moved."""
        return self._loaded_offsets if self._teacher_batches is None else self._teacher_batches.offsets

    def _load_teacher(self) -> TeacherBatches:
        assert self.teacher is not None
        rank, world_size = self.global_rank, self.trainer.world_size
        where = (self.device, self.image_dtype, rank, world_size)
        with noted(*SIGNALS) as received:
            self.teacher.make(self.denoiser, *where, self.features_batch_size, told_to_stop=lambda: bool(received))
        self.trainer.strategy.barrier("teacher")
        if agreed(self.trainer, bool(received)):
            stop(self.trainer, received[0] if received else SIGNALS[0], f"{NOTHING_LEARNED}; its images are kept")
        offsets = self.start_noise_offsets
        return TeacherBatches(self.teacher, self.denoiser, self.batch_size, rank, world_size, offsets, self.seed)

    @torch.no_grad()
    def _encode_target(self, network: FeatureExtractor | None = None) -> Tensor:
        """The output of a feature network for all of the teacher's images, shape (p, d)."""
        assert self._teacher_batches is not None
        images = self._teacher_batches.images
        network = self.features if network is None else network
        size = self.features_batch_size or self.microbatch_size or self.batch_size
        if len(images) >= LARGE:
            rank_zero_info(f"{type(network).__name__} of {len(images)} images of the teacher, which takes a while")
        parts = torch.arange(len(images)).split(size)
        with full_precision(self.device.type):
            return torch.cat([network(images[part.tolist()].to(self.device, network.dtype)) for part in parts])

    def generated(self, x_T: Tensor, noise: Tensor | None, denoiser: Denoiser | None = None) -> tuple[Tensor, ...]:
        """What the loss sees of samples from this noise: features, shape (N, d), or pixels, or both, in this order.

        `denoiser` is that of these samples, see `Denoiser.for_samples`.
        """
        denoiser = denoiser or self.denoiser
        x_0 = self.last_state(self.sampler, denoiser, x_T, noise)

        def outputs(part: Tensor) -> tuple[Tensor, ...]:
            images = to_pixels(denoiser.decode(part))
            seen = {"images": images}
            if "features" in self._outputs:
                seen["features"] = self.features(images.to(self.features.dtype))
            return tuple(seen[name] for name in self._outputs)

        return self.in_parts(outputs, x_0)

    @property
    def _outputs(self) -> list[str]:
        return [name for name in ("features", "images") if name in self.loss.needs]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """The loss of one batch of fresh samples, or a Gauss-Newton step."""
        if self.gauss_newton is not None:
            return self._gauss_newton_step(self.gauss_newton)
        key, samples, x_T, noise, target = self._start()

        def part(where: slice) -> tuple[Tensor, ...]:
            denoiser = self.denoiser.for_samples(key, samples[where])
            return self.generated(x_T[where], None if noise is None else noise[:, where], denoiser)

        def loss_and_slopes(outputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self._loss_and_slopes(outputs, batch, target)

        size = self.microbatch_size or self.batch_size
        parts = [slice(i, i + size) for i in range(0, self.batch_size, size)]
        learned: list[Tensor] = list(self.sampler.learned.values())
        leaves = [*learned, x_T] if x_T.requires_grad else learned
        loss, gradients = slope_by_parts(part, parts, loss_and_slopes, leaves)
        if self._teacher_batches is not None and x_T.requires_grad:
            self._teacher_batches.plan(self.global_step, gradients[-1])
        linear = torch.stack([(v * gradient).sum() for v, gradient in zip(learned, gradients, strict=False)]).sum()
        # A mean over own images differs between processes.
        self.log(f"train/{self.loss.name}", loss, prog_bar=True, sync_dist=True)
        for name, value in self.loss.terms.items():
            self.log(f"train/{name}", value, sync_dist=True)
        # The value of the loss, with the gradient of `linear`.
        return loss + (linear - linear.detach())

    def _start(self) -> tuple[str, Sequence[int], Tensor, Tensor | None, Tensor | None]:
        """What this process's batch starts from.

        Returns:
            Key and indices of the samples' conditions (`Denoiser.for_samples`), x_T, noise of the steps, and the
            teacher's images from x_T, where they are needed. x_T requires a gradient where it is to move.
        """
        start, stop = (rank * self.batch_size for rank in (self.global_rank, self.global_rank + 1))
        noisy = self.sampler.uses_noise
        draws = self.sampler.num_steps if noisy else 1
        key = ("train", self.seed, self.global_step)
        x_T, drawn = batch_noise(key, start, stop, self.denoiser.state_shape, draws)
        noise = drawn if noisy else None
        if self._teacher_batches is None:
            return "/".join(map(str, key)), independent_indices(key, start, stop), x_T, noise, None
        pairs, x_T, target = self._teacher_batches.start(self.global_step)
        key_of_pairs = self._teacher_batches.teacher.noise_key
        return key_of_pairs, pairs, x_T, noise, target.to(self.device, self.image_dtype)

    def _of_all(self, own: Tensor) -> Tensor:
        """What all processes have, concatenated."""
        return torch.cat(list(self.all_gather(own))) if self.trainer.world_size > 1 else own

    def _loss_and_slopes(
        self, outputs: Sequence[Tensor], batch: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and its derivatives by `outputs` of this process: W times, where it is of all W processes.

        DDP takes the mean of the gradients of the processes, which with the factor W is their sum.
        """
        references = {} if target is None else {"target": target}
        with torch.no_grad():
            if "real" in self.loss.needs:
                references["real"] = self._features_of(batch)
            if target is not None and "target_features" in self.loss.needs:
                references["target_features"] = self._features_of(target)
        precision = self.trainer.precision_plugin.train_step_context
        with torch.enable_grad(), full_precision(self.device.type):
            leaves = {name: value.requires_grad_() for name, value in zip(self._outputs, outputs, strict=True)}
            loss: Tensor = self.loss(Samples(**leaves, **references, gather=self._gather, precision=precision))
            if loss.ndim or not loss.requires_grad:
                raise ValueError(
                    f"{type(self.loss).__name__} must return a scalar that depends on the samples, got shape "
                    f"{tuple(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}."
                )
            slopes = torch.autograd.grad(loss, list(leaves.values()))
        return loss.detach(), slopes

    def _features_of(self, images: Tensor) -> Tensor:
        parts = images.to(self.features.dtype).split(self.features_batch_size or len(images))
        return torch.cat([self.features(part) for part in parts])

    def _gather(self, own: Tensor) -> Tensor:
        """See `Samples.gather`. Every process computes the same loss, so nothing is sent back for the gradient."""
        num = self.trainer.world_size
        if num == 1 or not self.gather_features:
            return own
        constant = own.detach()
        parts = list(self.all_gather(constant))
        parts[self.global_rank] = constant + num * (own - constant)
        return torch.cat(parts)

    def _gauss_newton_step(self, method: GaussNewton) -> Tensor:
        distance = FrechetResidual(self.real_features(), method.rank)
        moments = SampleMoments(self, distance, self.batch_size)
        delta, found = method.step(
            {name: value.data for name, value in self.sampler.learned.items()},
            distance,
            moments.of_one_batch("differences"),
            lambda: moments("residual", method.residual_images),
            lambda: moments("trial", method.trial_images),
            self._report_differences,
        )
        if not math.isfinite(found["distance"]):
            self._skip("the sampler makes images that are not finite")
        for name, value in found.items():
            self.log(f"train/{name}", value, prog_bar=name == "distance")
        # The gradient of this is -delta, and a step of plain gradient descent with rate 1 adds delta.
        linear = torch.stack([-(delta[name] * value).sum() for name, value in self.sampler.learned.items()]).sum()
        return found["distance"] + linear - linear.detach()

    def _skip(self, reason: str) -> None:
        if self._skipped_step == self.global_step:
            return
        self._skipped_step = self.global_step
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        warnings.warn(f"Step {self.global_step}: {reason}; skipped ({self.num_skipped} so far).", stacklevel=2)
        # The Trainer then validates, and callbacks keep what is good, before `on_fit_end` says why it stopped.
        self.trainer.should_stop |= self.num_skipped_in_a_row >= self.max_skipped_steps

    def on_fit_end(self) -> None:
        """Say so if the fit stopped because it could not go on.

        Raises:
            FloatingPointError: the last `max_skipped_steps` steps were skipped.
        """
        if self.num_skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"The fit stopped after step {self.global_step}: {self.num_skipped_in_a_row} steps in a row had a loss "
                "or gradient that is not finite. The sampler is the best one so far, if any was good; lower the "
                "learning rate, or look at the model's output where the first step failed."
            )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Backpropagate; a loss that is not finite has a gradient that is not, which reaches all processes by DDP."""
        super().backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan), *args, **kwargs)

    def _report_differences(self, done: int, total: int) -> None:
        # A step takes minutes: say at every tenth where it is.
        if done * 10 // total > (done - 1) * 10 // total:
            rank_zero_info(f"step {self.global_step}: {done} of {total} differences")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002 - Lightning's signature
        """Drop a gradient that is not finite: the step is counted and reported, and changes nothing.

        Neither the sampler, nor Adam's moments and counter, nor the running average. The schedule of the learning rate
        goes on: it ends with `max_steps`, which counts skipped steps too.
        """
        gradients = [p.grad for p in self.sampler.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm() if gradients else torch.zeros(())
        self.log("train/grad_norm", norm)
        if norm.isfinite():
            self.num_skipped_in_a_row = 0
        else:
            self._skip("the gradient is not finite")
            for parameter in self.sampler.parameters():
                parameter.grad = None
        self.log("train/skipped_steps", float(self.num_skipped))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the Trainer's settings, or to `gradient_clip_norm`. Gauss-Newton steps have a length of their own."""
        if self.gauss_newton is not None:
            return
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.gradient_clip_norm, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the step; then the loss remembers it, and so does the running average, in the first steps for less long.

        In one hook: checkpoints of `on_train_batch_end` hold both or neither.
        """
        super().optimizer_step(*args, **kwargs)
        if self.num_skipped_in_a_row:
            return
        for part in every_loss(self.loss).values():
            part.advance()
        if self._teacher_batches is not None:
            self._teacher_batches.advance(self._of_all)
        step = self.global_step + 1
        decay = min(self.ema_decay, step / (9 + step)) if self.ema_decay else 0.0
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.sampler.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union of a dozen types
        """Adam, one group for times and one for corrections; linear warm-up, cosine decay. Or Gauss-Newton."""
        named = list(self.sampler.corrections.items())
        groups = [
            {"params": [p for name, p in named if (name in TIME_DEGREES) == times], "lr": lr, "name": label}
            for times, lr, label in ((True, self.time_lr, "times"), (False, self.lr, "corrections"))
        ]
        groups = [group for group in groups if group["params"]]
        self._check_accumulation()
        if not groups:
            raise ValueError("The sampler has nothing to learn: give it `learn`, such as ('mu', 'std', 'time').")
        if not self.sampler.learned:
            raise ValueError(
                "The sampler has nothing to learn: all its corrections are held (`requires_grad_(False)`)."
            )
        if self.gauss_newton is not None:
            return SGD(self.sampler.parameters(), lr=1.0)
        optimizer = (FullMatrixAdam if self.full_matrix else Adam)(groups, betas=self.betas)
        total = self._decay_steps = max(1.0, float(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            decay = self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine
            return min(1.0, (step + 1) / (self.warmup_steps + 1)) * decay

        self._schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule, "interval": "step"}}

    def _check_accumulation(self) -> None:
        """The gradient of a step is that of one batch, whose noise is a function of the step.

        Raises:
            ValueError: a Trainer that accumulates gradients, now or in a later epoch.
        """
        numbers = {self.trainer.accumulate_grad_batches}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                numbers |= set(callback.scheduling.values())
        if numbers != {1}:
            raise ValueError(
                "accumulate_grad_batches must be 1: the KID of a large batch is not the mean over small ones; raise "
                "model.batch_size, with model.microbatch_size if memory is short."
            )

    def _renew_rates(self) -> None:
        """A checkpoint brings back the learning rates of its fit; those of this module hold."""
        schedule = self._schedule
        if schedule is None or schedule not in [config.scheduler for config in self.trainer.lr_scheduler_configs]:
            return
        if self._loaded_decay_steps not in (None, self._decay_steps):
            rank_zero_warn(
                f"The learning rates decay over {self._decay_steps:g} steps, in the fit that is resumed over "
                f"{self._loaded_decay_steps:g}: the result is not that of a fit without interruption; for that, keep "
                "max_steps."
            )
        groups = schedule.optimizer.param_groups
        before = schedule.base_lrs
        schedule.base_lrs = [self.time_lr if group["name"] == "times" else self.lr for group in groups]
        if before != schedule.base_lrs:
            rank_zero_info(f"learning rates: {schedule.base_lrs}, in the fit that is resumed {before}")
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group.update(initial_lr=rate, lr=rate * factor(schedule.last_epoch), betas=self.betas)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _compared(self) -> dict[str, Any]:
        """What each loss is, and the features that it sees; the teacher pairs where one needs them, but for how they
        are kept on disk; guidance, and the optimiser where it is not Adam, as in older checkpoints.
        """
        losses = every_loss(self.loss).items()
        found: dict[str, Any] = {f"loss.{name}".rstrip("."): part.identity() for name, part in losses}
        if "features" in self.loss.needs and self.gauss_newton is None:
            found["features"] = self.features.identity()
        if self.teacher is not None and self.needs_teacher:
            settings = dataclasses.asdict(self.teacher).items()
            found |= {f"teacher.{name}": each for name, each in settings if name not in ("cache_dir", "chunk_size")}
        if self.full_matrix and self.gauss_newton is None:
            found["full_matrix"] = True
        shown = self.denoiser.settings()
        return found | {f"denoiser.{name}": shown[name] for name in CONDITIONED if name in shown}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note, too, what the loss and the start noise became, and how many steps were skipped."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["compared"] = self._compared()
        memories = {name: part.memory() for name, part in every_loss(self.loss).items()}
        checkpoint["loss_memory"] = {name: memory for name, memory in memories.items() if memory}
        if (offsets := self.start_noise_offsets) is not None:
            checkpoint["start_noise_offsets"] = offsets
        checkpoint["decay_steps"] = self._decay_steps
        checkpoint["num_skipped"] = self.num_skipped
        checkpoint["num_skipped_in_a_row"] = self.num_skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another denoiser or of another sampler; take up what was noted.

        What a loss remembers and where start noise moved to mean nothing to another loss or teacher: a fit is refused,
        anything else goes on without them.

        Raises:
            ValueError: as `SamplingModule`; a fit that is resumed with another loss or teacher.
        """
        super().on_load_checkpoint(checkpoint)
        ours = self._compared()
        # Older checkpoints do not say, or not of the features.
        theirs = {"features": ours.get("features"), **checkpoint.get("compared", ours)}
        other = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
        if other and self._trainer is not None and self.trainer.state.fn == "fit":
            pairs = ", ".join(f"{key}: {theirs.get(key)} instead of {ours.get(key)}" for key in other)
            raise ValueError(
                f"The checkpoint is of a fit with another loss, teacher, guidance or optimiser ({pairs}); resume with "
                "the recipe it was started with."
            )
        if not other:
            losses, memories = every_loss(self.loss), checkpoint.get("loss_memory", {})
            if memories.keys() - losses.keys():
                raise ValueError(
                    "The checkpoint holds the memory of its loss in the form of an older version; start anew from its "
                    "sampler with --pretrained_sampler."
                )
            for name, part in losses.items():
                part.restore(memories.get(name, {}))
            self._teacher_batches, self._loaded_offsets = None, checkpoint.get("start_noise_offsets")
        self._loaded_decay_steps = checkpoint.get("decay_steps")
        self.num_skipped = checkpoint["num_skipped"]
        self.num_skipped_in_a_row = checkpoint.get("num_skipped_in_a_row", 0)
