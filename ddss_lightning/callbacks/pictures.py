"""What the sampler makes and what it is, in TensorBoard and as PNG."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ddss_lightning.callbacks.folder import run_folder
from ddss_lightning.pictures import enlargement, image_grid, mu_figure, save_figure, save_png, times_figure
from ddss_lightning.sampling import SamplingModule


class SamplerPictures(Callback):
    """At each validation and at the end: samples from fixed noise, the heat map of mu, and the times over training.

    To TensorBoard as `samples`, `mu` and `times`; the last of each also as PNG in `<log folder>/pictures`.

    Args:
        num_images: samples of the grid, taken from the first validation batch
            (at the end without one: the first of the validation noise).
        columns: samples per row, at most.
        scale: enlargement of the pixels; default: see `enlargement`.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, num_images: int = 64, columns: int = 16, scale: int | None = None) -> None:
        for name, value in {"num_images": num_images, "columns": columns, "scale": scale}.items():
            if value is not None and value < 1:
                raise ValueError(f"pictures: {name} must be at least 1, got {value}.")
        self.num_images, self.columns, self.scale = num_images, columns, scale
        self.steps: list[int] = []
        self.logsnrs: list[list[float]] = []
        self.times: list[list[float]] = []
        self._grid: Tensor | None = None

    def on_validation_batch_end(  # noqa: D102 - Lightning's hook
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        if batch_idx == 0 and trainer.is_global_zero:
            scale = self.scale or enlargement(outputs.shape[-2])
            self._grid = image_grid(outputs[: self.num_images], self.columns, scale)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The times of the initial sampler; curves of an earlier fit are not those of this one."""
        if trainer.ckpt_path is None and not trainer.global_step:
            self.steps, self.logsnrs, self.times = [], [], []
        if not self.steps:
            self._record(trainer.global_step, pl_module)

    def _record(self, step: int, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SamplingModule)
        self.steps.append(step)
        self.logsnrs.append(pl_module.averaged.logsnrs().tolist())
        self.times.append(pl_module.averaged.timesteps().tolist())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        assert isinstance(pl_module, SamplingModule)
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False) or trainer.state.fn != "fit":
            return
        self._draw(trainer, pl_module)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the last steps made, if they were not validated: `max_steps` may end the first epoch early."""
        assert isinstance(pl_module, SamplingModule)
        if getattr(trainer, "fast_dev_run", False) or not self.steps or self.steps[-1] >= trainer.global_step:
            return
        if trainer.is_global_zero:
            # As many at once as in a validation.
            size = getattr(getattr(trainer, "datamodule", None), "eval_batch_size", self.num_images)
            parts = torch.arange(self.num_images).split(size)
            with trainer.precision_plugin.val_step_context():
                images = torch.cat([pl_module.samples("validation", part) for part in parts])
            self._grid = image_grid(images, self.columns, self.scale or enlargement(images.shape[-2]))
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: SamplingModule) -> None:
        self._record(trainer.global_step, pl_module)
        folder = run_folder(trainer) / "pictures"
        if not trainer.is_global_zero or self._grid is None:
            return
        figures = {
            "mu": mu_figure(pl_module.averaged.coefficients()),
            "times": times_figure(self.steps, self.logsnrs, self.times),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_png(self._grid, folder / "samples.png")
        for name, figure in figures.items():
            save_figure(figure, folder / f"{name}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", self._grid, trainer.global_step)
                for name, figure in figures.items():
                    logger.experiment.add_figure(name, figure, trainer.global_step, close=False)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"steps": self.steps, "logsnrs": self.logsnrs, "times": self.times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves."""
        self.steps, self.logsnrs, self.times = (list(state_dict[name]) for name in ("steps", "logsnrs", "times"))
