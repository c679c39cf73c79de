"""FID, KID and IS on held-out noise, and the best sampler, the initial one included."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ddss_lightning.callbacks.folder import run_folder
from ddss_lightning.features import load_any
from ddss_lightning.features.base import FeatureExtractor, finite
from ddss_lightning.files import why_no_folder
from ddss_lightning.metrics import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall
from ddss_lightning.precision import full_precision
from ddss_lightning.sampling import SamplingModule
from ddss_lightning.saved import CARD_NAME, read_card
from ddss_lightning.signals import NOTHING_LEARNED, agreed, noted, stop

Score = Literal["fid", "kid"]


class FeatureSpace:
    """Scores of generated images in the space of one feature network phi.

    FID and KID, IS if phi has a classification head, and, if asked for, precision, recall, density and coverage.

    Args:
        features: phi.
        real: phi of the real images, shape (m, d).
        precision_recall: give the last four.
        prefix: of the names of the scores, such as `judge_`.
        fid_only: give FID alone, whose cost does not grow with the number of real images.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        real: Tensor,
        precision_recall: bool = False,
        prefix: str = "",
        fid_only: bool = False,
    ) -> None:
        self.features, self.prefix = features, prefix
        metrics: dict[str, Metric | MetricCollection] = {"fid": FrechetDistance(real)}
        if not fid_only:
            metrics["kid"] = KernelDistance(real)
            if precision_recall:
                metrics["precision_recall"] = PrecisionRecall(real)
            with contextlib.suppress(NotImplementedError):
                metrics["is"] = InceptionScore(features.logits(real[:1]).shape[1])
        self.metrics = MetricCollection(metrics, compute_groups=False)

    @property
    def names(self) -> list[str]:
        """Of the scores that `compute` gives."""
        return [
            self.prefix + name
            for key, metric in self.metrics.items()
            for name in (metric.names if isinstance(metric, PrecisionRecall) else (key,))
        ]

    def update(self, images: Tensor, indices: Tensor) -> None:
        """Add generated images, pixels in [-1, 1], shape (N, C, H, W), and the indices of their noise, shape (N,).

        Raises:
            ValueError: images that are not finite.
        """
        with torch.no_grad(), full_precision(images.device.type):
            vectors = self.features(images.to(self.features.dtype))
            for name, metric in self.metrics.items():
                samples = self.features.logits(vectors) if name == "is" else vectors
                # FID is a sum over images; the others put them in the order of their indices.
                metric.update(samples, **({} if name == "fid" else {"indices": indices}))

    def compute(self) -> dict[str, float]:
        """The scores by name, of the images of all processes."""
        return {self.prefix + name: float(value) for name, value in self.metrics.compute().items()}


def check_judge(judge: FeatureExtractor, module: SamplingModule) -> None:
    """Make sure that a second feature network can judge the samples of a model.

    Raises:
        ValueError: it takes images of another shape than the model makes, or is the network of learning itself.
    """
    name, shape = module.denoiser.name, module.denoiser.image_shape
    if tuple(judge.image_shape) != tuple(shape):
        raise ValueError(
            f"The judge takes images of shape {judge.image_shape}, the model '{name}' makes {shape} (channels, height, "
            "width); give a feature network for such images."
        )
    if judge.fingerprint() == module.features.fingerprint():
        raise ValueError(
            f"The judge is the feature network of learning ({judge.fingerprint()}); give another one, or no judge."
        )


class SampleQuality(Callback):
    """Score the sampler at the end of each validation epoch; keep and save the best.

    Before the first training step the initial sampler is scored in the same way: it is candidate 0, so that the
    result of a fit is never worse, on the held-out noise, than the solver it started from. SIGTERM ends that after the
    batch that is under way, and with it the process. The best sampler is written whenever it improves, and is the
    module's sampler when fit ends.

    A fit that is never validated ends with its last sampler in that folder, without scores.

    With a `tolerance` it is the last sampler whose score is about the best, which has had the most of what the score
    does not see: the other terms of the loss.

    It logs `val/fid`, `val/kid`, `val/is` (`test/...` in test), and `val/best_<monitor>`. A judge, a second feature
    network, sees the same images; its scores, `val/judge_fid` and so on, select nothing. If any image is not finite,
    on whatever process, all scores are NaN, a warning says how many there are (`num_not_finite`), and the sampler is
    not kept; training goes on.

    Args:
        monitor: the score that selects, `fid` or `kid`; lower is better.
        tolerance: how much worse than the best score so far that of a later sampler may be, as a part of it, for the
            later one to be kept, such as 0.02, about the noise of the FID of 1000 images; never worse than that of the
            initial sampler. 0: the best.
        dirpath: where the best sampler goes; default `<log folder>/sampler`.
        overwrite: allow `dirpath` to hold a sampler already.
        precision_recall: log precision, recall, density and coverage too.
        judge: a feature network that takes no part in learning, or the folder of one; None for no second opinion.
        fid_only: compute FID and nothing else, to choose among many samplers.

    Raises:
        ValueError: an unknown `monitor`, a tolerance below 0; when a run starts, a folder that holds a sampler already,
            or a judge that does not fit.
    """

    def __init__(
        self,
        monitor: Score = "fid",
        dirpath: str | None = None,
        overwrite: bool = False,
        precision_recall: bool = False,
        judge: FeatureExtractor | str | None = None,
        fid_only: bool = False,
        tolerance: float = 0.0,
    ) -> None:
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a number of at least 0, got {tolerance}.")
        if monitor not in ("fid", "kid"):
            raise ValueError(f"monitor must be 'fid' or 'kid', got '{monitor}'.")
        if fid_only and monitor != "fid":
            raise ValueError(f"fid_only leaves nothing but the FID, but monitor is '{monitor}'; use one or the other.")
        self.monitor, self.dirpath, self.overwrite, self.tolerance = monitor, dirpath, overwrite, tolerance
        # Allow the run's folder to hold the sampler that it starts from: it was cut off before its first checkpoint.
        self.overwrite_start = False
        self.precision_recall, self.fid_only = precision_recall, fid_only
        self.judge = load_any(judge) if isinstance(judge, (str, Path)) else judge
        if self.judge is not None:
            self.judge.freeze()
        self.scores: dict[str, float] = {}
        self.num_images = self.num_not_finite = 0
        self._forget()
        self._counts = [0, 0]
        self._spaces: list[FeatureSpace] = []
        self._real: Tensor | None = None

    def _forget(self) -> None:
        """What was learned by a fit, in which another one has no part."""
        self.initial: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.best_sampler: dict[str, Tensor] = {}
        # The lowest score so far, which with a tolerance need not be that of the sampler that is kept.
        self._lowest = math.inf
        # The step whose sampler was scored last, and what makes scores comparable.
        self._scored_step = -1
        self._protocol: dict[str, Any] = {}
        # Where the fit keeps its sampler, and whether what is there now is another's, which may be overwritten.
        self._place = ""
        self._is_of_another = False
        self._known = True

    def folder(self, trainer: Trainer) -> Path:
        """Where the best sampler is written. To be called on all processes, see `run_folder`."""
        return Path(self.dirpath) if self.dirpath else run_folder(trainer) / "sampler"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse a judge that does not fit, before any work starts."""
        assert isinstance(pl_module, SamplingModule)
        if self.judge is not None:
            check_judge(self.judge, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Refuse to overwrite a sampler, before any work starts; a resumed fit, known as such by now, finds its own.

        Raises:
            ValueError: the folder holds a sampler already, or is a file.
        """
        if trainer.ckpt_path is None and not trainer.global_step:
            self._forget()
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = self.folder(trainer)
        problem = why_no_folder(folder) if self.dirpath and trainer.is_global_zero else ""
        if problem := trainer.strategy.broadcast(problem):
            raise ValueError(f"quality.dirpath: {problem}.")
        # As seen from the folder of the logs: a run can be moved as a whole, and its checkpoints be compared.
        place = os.path.relpath(folder, run_folder(trainer))
        self._is_of_another = trainer.strategy.broadcast(self._holds_another(trainer, folder, place))
        if self._is_of_another and not self.overwrite:
            # Without a logger all runs have one folder.
            other = "" if trainer.loggers else ", or the whole run another --trainer.default_root_dir"
            raise ValueError(
                f"'{folder}' already holds a sampler; give another dirpath or overwrite=True (on the command line "
                f"--quality.dirpath or --quality.overwrite=true){other}."
            )
        self._place = place

    def _holds_another(self, trainer: Trainer, folder: Path, place: str) -> bool:
        """Whether there is a sampler that this fit has not written, as far as this process sees."""
        if not (folder / CARD_NAME).exists() or self._place == place:
            return False
        if trainer.ckpt_path is not None:
            # Checkpoints of older versions do not say.
            return bool(self._place)
        return not (self.overwrite_start and self.dirpath is None and _is_start(folder))

    def _begin(self, module: SamplingModule) -> None:
        real = module.real_features()
        if self._real is not real:
            self._real = real
            self._spaces = [FeatureSpace(module.features, real, self.precision_recall, "", self.fid_only)]
            if self.judge is not None:
                judge = self.judge.to(module.device)
                real = module.encode_real(judge)
                self._spaces.append(FeatureSpace(judge, real, self.precision_recall, "judge_", self.fid_only))
        for space in self._spaces:
            space.features.to(module.device)
            space.metrics.to(module.device).reset()
        self._counts = [0, 0]

    def _update(self, images: Tensor, indices: Tensor) -> None:
        not_finite = int((~finite(images)).sum())
        self._counts = [self._counts[0] + len(images), self._counts[1] + not_finite]
        # With one such image there is no score: the others need not be counted.
        if not not_finite:
            for space in self._spaces:
                space.update(images, indices)

    def _compute(self, trainer: Trainer) -> dict[str, float]:
        counts = torch.tensor(self._counts, device=trainer.strategy.root_device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        self.num_images, self.num_not_finite = counts.tolist()
        if not self.num_not_finite:
            scores = {name: value for space in self._spaces for name, value in space.compute().items()}
            for space in self._spaces:
                space.metrics.reset()  # the samples of all processes are a lot to hold until the next time
            # Unlike devices round differently, and all processes must keep the same sampler.
            self.scores = trainer.strategy.broadcast(scores)
            return self.scores
        # All processes know it from the sum, and none waits for the samples of the others.
        self.scores = dict.fromkeys((name for space in self._spaces for name in space.names), math.nan)
        found = f"the sampler makes images that are not finite ({self.num_not_finite} of {self.num_images})"
        if trainer.state.fn == "fit":
            remedy = "lower the learning rate" if trainer.global_step else "look for NaN in the model's weights"
            rank_zero_warn(f"Step {trainer.global_step}: {found}; {remedy}. It is not kept.")
        else:
            rank_zero_warn(
                f"No scores: {found}; look for NaN in the model's output, and at `print(sampler)` "
                "for states that grow out of scale."
            )
        return self.scores

    # --------------------------------------------------------------------------------------------- candidate 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the initial sampler; a resumed fit has its scores, and sees that its best sampler is in its folder.

        Raises:
            ValueError: a resumed fit whose scores so far are of other features, images or noise.
        """
        assert isinstance(pl_module, SamplingModule)
        folder = self.folder(trainer)
        if self.best and (self._is_of_another or not (folder / CARD_NAME).exists()):
            self._write(trainer, pl_module, folder)
        if not self._validates(trainer):
            return
        self._check_protocol(trainer, pl_module)
        if self.initial:
            return
        self.initial = self._score(trainer, pl_module, NOTHING_LEARNED) or {}
        rank_zero_info(f"initial sampler: {_line(self.initial)}")
        self._select(trainer, pl_module)
        self._log(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the last sampler of a fit that ends here, before the last checkpoint is written, which then has it."""
        limits = ((trainer.max_steps, trainer.global_step), (trainer.max_epochs, trainer.current_epoch + 1))
        if trainer.should_stop or any(limit is not None and 0 <= limit <= reached for limit, reached in limits):
            self._score_last(trainer, pl_module, None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the last sampler, where that was not done at the end of an epoch."""
        self._score_last(trainer, pl_module, "the last steps are not scored")

    def _is_unscored(self, trainer: Trainer) -> bool:
        return bool(self.initial) and self._scored_step < trainer.global_step and self._validates(trainer)

    def _score_last(self, trainer: Trainer, module: LightningModule, if_told_to_stop: str | None) -> None:
        assert isinstance(module, SamplingModule)
        if self._is_unscored(trainer) and self._score(trainer, module, if_told_to_stop) is not None:
            self._select(trainer, module)
            self._log(trainer)

    @staticmethod
    def _validates(trainer: Trainer) -> bool:
        return hasattr(getattr(trainer, "datamodule", None), "val_dataloader") and trainer.enable_validation

    def _check_protocol(self, trainer: Trainer, module: SamplingModule) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        protocol = {
            "features": module.features.identity(),
            "real images": len(module.real_features()),
            "num_val_images": getattr(datamodule, "num_val_images", None),
            "seed": module.seed,
        }
        limit = trainer.limit_val_batches
        if isinstance(limit, int) or limit != 1:
            size = getattr(datamodule, "eval_batch_size", "some")
            protocol["limit_val_batches"] = f"{limit:g} batches of {size} images"
        before, self._protocol = self._protocol or protocol, protocol
        other = [
            f"{name}: {before.get(name)} instead of {protocol.get(name)}"
            for name in before | protocol
            if before.get(name) != protocol.get(name)
        ]
        if other:
            raise ValueError(
                f"The scores in the checkpoint are not comparable with those to come ({', '.join(other)}); resume with "
                "the recipe it was started with, or start anew from its sampler with --pretrained_sampler."
            )

    @torch.no_grad()
    def _score(self, trainer: Trainer, module: SamplingModule, if_told_to_stop: str | None) -> dict[str, float] | None:
        """Scores of the sampler as it is, outside the Trainer's own validation.

        SIGTERM ends the process, with these last words; without any there are no scores, and the signal goes to whoever
        saves the checkpoint, and then stops.
        """
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        limit, batches = trainer.limit_val_batches, datamodule.val_dataloader()
        count = limit if isinstance(limit, int) else int(limit * len(batches))  # as Lightning does
        with noted(signal.SIGTERM) as received:
            self._begin(module)
            for index, (_, batch) in enumerate(zip(range(count), batches, strict=False)):
                if received:
                    break
                with trainer.precision_plugin.val_step_context():
                    images = module.validation_step(batch, index)
                self._update(images, batch)
        # Before the scores, for which all processes wait for each other.
        if agreed(trainer, bool(received)):
            if if_told_to_stop is not None:
                stop(trainer, signal.SIGTERM, if_told_to_stop)
            if received:
                signal.raise_signal(signal.SIGTERM)
            return None
        return self._compute(trainer)

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start from empty metrics."""
        assert isinstance(pl_module, SamplingModule)
        self._begin(pl_module)

    def on_validation_batch_end(  # noqa: D102 - Lightning's hook
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        self._update(outputs, batch)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log, and keep the sampler if it is the best so far."""
        assert isinstance(pl_module, SamplingModule)
        if trainer.sanity_checking:
            return
        fits = trainer.state.fn == "fit"
        # None, not True: Lightning warns of what asks for a logger where there is none.
        to_logger = False if fits else None
        for name, value in self._compute(trainer).items():
            pl_module.log(f"val/{name}", value, prog_bar=name == self.monitor, logger=to_logger, sync_dist=True)
        if fits:
            self._select(trainer, pl_module)
            if self.best:
                pl_module.log(f"val/best_{self.monitor}", self.best[self.monitor], logger=False, sync_dist=True)
            self._log(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log."""
        for name, value in self._compute(trainer).items():
            pl_module.log(f"test/{name}", value, sync_dist=True)

    def _log(self, trainer: Trainer) -> None:
        """Give the loggers the scores at the number of steps that they are of.

        Lightning counts validations after the step that is under way, one behind, and knows none before the first step.
        """
        scores = {f"val/{name}": value for name, value in self.scores.items()}
        if self.best:
            scores[f"val/best_{self.monitor}"] = self.best[self.monitor]
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)
            logger.save()

    # ------------------------------------------------------------------------------------------------ selection

    def _select(self, trainer: Trainer, module: SamplingModule) -> None:
        self._scored_step = trainer.global_step
        score = self.scores[self.monitor]
        if not self._is_kept(score):
            return
        self._lowest = min(self._lowest, score)
        folder = self.folder(trainer)
        self.best, self.best_step = dict(self.scores), trainer.global_step
        self.best_sampler = copy.deepcopy(module.averaged.state_dict())
        self._write(trainer, module, folder)

    def _is_kept(self, score: float) -> bool:
        if not math.isfinite(score) or score < self._lowest:
            return math.isfinite(score)
        limit = min(self._lowest + self.tolerance * abs(self._lowest), self.initial.get(self.monitor, math.inf))
        return self.tolerance > 0 and score <= limit

    def _write(self, trainer: Trainer, module: SamplingModule, folder: Path) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        scores = {
            "validation": self.best,
            "validation_of_initial_sampler": self.initial,
            "validation_images": self.num_images,
            "training_step": self.best_step,
            "seed": module.seed,
        }
        sampler = copy.deepcopy(module.averaged)
        sampler.load_state_dict(self.best_sampler)
        sampler.save_pretrained(folder, module.base_model, scores, overwrite=True)
        self._is_of_another = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its best sampler, and say what was reached and where it is.

        Raises:
            FloatingPointError: no sampler, the initial one neither, made images that are finite.
        """
        assert isinstance(pl_module, SamplingModule)
        # A resumed fit that had nothing left to do but this comes by here alone, without its device.
        if self._is_unscored(trainer):
            pl_module.to(trainer.strategy.root_device)
            self._score_last(trainer, pl_module, "the last steps are not scored")
            pl_module.cpu()
        folder = self.folder(trainer)
        if not self.best and self.initial:
            raise FloatingPointError(
                "No sampler is kept: none made images that are finite. Look for NaN in the model's output."
            )
        if not self.best:
            self._keep_unscored(trainer, pl_module, folder)
            return
        # A fit that had nothing left to do, resumed in another folder, has not come by `on_train_start`.
        if self._is_of_another or not (folder / CARD_NAME).exists():
            self._write(trainer, pl_module, folder)
        pl_module.averaged.load_state_dict(self.best_sampler)
        pl_module.sampler.load_state_dict(self.best_sampler)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(
                    dict(pl_module.hparams), {f"best/{name}": value for name, value in self.best.items()}
                )
        where = "" if getattr(trainer, "fast_dev_run", False) else f", saved in '{folder}'"
        rank_zero_info(
            f"best sampler: step {self.best_step}, {_line(self.best)} (initial: {_line(self.initial)}){where}"
        )
        if self.best_step == 0 and trainer.global_step:
            last = f" (last step: {_line(self.scores)})" if self.scores else ""
            rank_zero_warn(
                f"No step was better than the start: the sampler is the initial one, nothing was learned{last}. Try "
                "lower learning rates, more steps, or a larger `num_val_images`."
            )

    def _keep_unscored(self, trainer: Trainer, module: SamplingModule, folder: Path) -> None:
        """Without validation the last sampler is all there is."""
        if not trainer.global_step or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        # Of a fit that was begun before checkpoints said where its sampler is.
        if (folder / CARD_NAME).exists() and not (self.overwrite or self._known):
            rank_zero_warn(f"Nothing was validated, and '{folder}' holds a sampler already: the last one is not saved.")
        else:
            scores = {"training_step": trainer.global_step, "seed": module.seed}
            module.averaged.save_pretrained(folder, module.base_model, scores, overwrite=True)
            rank_zero_warn(f"Nothing was validated: the last sampler is saved in '{folder}', without scores.")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to know."""
        return {
            "initial": self.initial,
            "best": self.best,
            "best_step": self.best_step,
            "best_sampler": self.best_sampler,
            "num_images": self.num_images,
            "scored_step": self._scored_step,
            "lowest": self._lowest,
            "protocol": self._protocol,
            "place": self._place,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.initial, self.best = state_dict["initial"], state_dict["best"]
        self.best_step, self.best_sampler = state_dict["best_step"], state_dict["best_sampler"]
        self.num_images = state_dict.get("num_images", 0)
        self._scored_step = state_dict.get("scored_step", self.best_step)
        self._lowest = state_dict.get("lowest", self.best.get(self.monitor, math.inf))
        self._protocol = state_dict.get("protocol", {})
        self._place = state_dict.get("place", "")
        self._known = bool(self._place)


def _is_start(folder: Path) -> bool:
    """Whether the sampler there is the one that a fit started from."""
    return bool(read_card(folder)["scores"].get("training_step") == 0)


def _line(scores: dict[str, float]) -> str:
    return ", ".join(f"{name.upper().replace('_', ' ')} {value:.4g}" for name, value in scores.items())
