"""Write predicted images as PNG files and a grid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddss_lightning.images import to_uint8
from ddss_lightning.pictures import image_grid, save_png


class ImageWriter(Callback):
    """`predict` writes `00000.png`, `00001.png`, ... (named by the index of their noise) and `grid.png`.

    Args:
        output_dir: a folder that does not exist or is empty.
        columns: images per row of the grid, and rows, at most; at least 1.
        scale: enlargement of the grid's pixels, at least 1.
        overwrite: allow a folder that holds files; images of such names are deleted first, all others stay.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, output_dir: str = "samples", columns: int = 8, scale: int = 4, overwrite: bool = False) -> None:
        for name, value in {"columns": columns, "scale": scale}.items():
            if value < 1:
                raise ValueError(f"images.{name} must be at least 1, got {value}.")
        self.output_dir, self.columns, self.scale, self.overwrite = output_dir, columns, scale, overwrite
        self._grid: list[Tensor] = []
        self._written = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Make the folder, or refuse one that is in use, before any work starts."""
        self._grid, self._written = [], 0
        if stage != "predict" or not trainer.is_global_zero:
            return
        folder = Path(self.output_dir)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"The output folder '{folder}' is a file; give another output_dir.")
        if folder.exists() and any(folder.iterdir()) and not self.overwrite:
            raise ValueError(f"The output folder '{folder}' is not empty; give another output_dir or overwrite=True.")
        folder.mkdir(parents=True, exist_ok=True)
        # Images of another sampler between those of this one would be taken for its own.
        for path in folder.iterdir():
            if re.fullmatch(r"\d{5,}\.png", path.name):
                path.unlink()

    def on_predict_batch_end(  # noqa: D102 - Lightning's hook
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Tensor,
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        for index, image in zip(batch.tolist(), outputs, strict=True):
            save_png(to_uint8(image).cpu(), Path(self.output_dir) / f"{index:05d}.png")
        missing = self.columns**2 - sum(len(images) for images in self._grid)
        self._grid.append(outputs[: max(0, missing)].cpu())
        self._written += len(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The grid of the first images of the first process, and where everything is."""
        written = torch.tensor(self._written, device=pl_module.device)
        total = int(trainer.strategy.reduce(written, reduce_op="sum"))
        if trainer.is_global_zero and self._grid:
            save_png(image_grid(torch.cat(self._grid), self.columns, self.scale), Path(self.output_dir, "grid.png"))
            rank_zero_info(f"{total} images and grid.png are in '{self.output_dir}'")
