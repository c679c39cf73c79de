"""Write predicted images as PNG files and a grid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ddss_lightning.features.base import finite
from ddss_lightning.files import why_no_folder
from ddss_lightning.images import to_uint8
from ddss_lightning.pictures import enlargement, image_grid, save_png
from ddss_lightning.sampling import SamplingModule


class ImageWriter(Callback):
    """`predict` writes `00000.png`, `00001.png`, ... (named by the index of their noise) and `grid.png`.

    Args:
        output_dir: a folder that does not exist or is empty.
        columns: images per row of the grid, and rows, at most; at least 1.
        scale: enlargement of the grid's pixels, at least 1; default: see `enlargement`.
        overwrite: allow a folder that holds files; images of such names are deleted first, all others stay.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self, output_dir: str = "samples", columns: int = 8, scale: int | None = None, overwrite: bool = False
    ) -> None:
        for name, value in {"columns": columns, "scale": scale}.items():
            if value is not None and value < 1:
                raise ValueError(f"images.{name} must be at least 1, got {value}.")
        self.output_dir, self.columns, self.scale, self.overwrite = output_dir, columns, scale, overwrite
        self._grid: list[Tensor] = []
        self._written = self._not_finite = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, or refuse one that is in use, before any work starts.

        Raises:
            ValueError: on all processes: a folder that is in use, or a file; images that cannot be PNG files.
        """
        self._grid, self._written, self._not_finite = [], 0, 0
        if stage != "predict":
            return
        channels = cast(SamplingModule, pl_module).denoiser.image_shape[0]
        if channels not in (1, 3, 4):
            raise ValueError(
                f"The model's images have {channels} channels, PNG files 1, 3 or 4; use the sampler from Python."
            )
        folder = Path(self.output_dir)
        # The first process looks; the others would find what it has made, or wait for it.
        problem = trainer.strategy.broadcast(self._made(folder) if trainer.is_global_zero else "")
        if problem:
            raise ValueError(f"The output folder '{folder}' {problem}.")
        if not trainer.is_global_zero:
            return
        # Images of another sampler between those of this one would be taken for its own.
        for path in folder.iterdir():
            if re.fullmatch(r"\d{5,}\.png", path.name):
                path.unlink()

    def _made(self, folder: Path) -> str:
        """Make the folder; why it cannot be, or must not be used."""
        if folder.exists() and not folder.is_dir():
            return "is a file; give another output_dir (`--images.output_dir`)"
        if why_no_folder(folder):
            return "cannot be made or written to; give another output_dir (`--images.output_dir`)"
        if folder.exists() and any(folder.iterdir()) and not self.overwrite:
            options = "`--images.output_dir=FOLDER`, `--images.overwrite=true`"
            return f"is not empty; give another output_dir or overwrite=True (on the command line {options})"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"cannot be made ({error.strerror}); give another output_dir (`--images.output_dir`)"
        return ""

    def on_predict_batch_end(  # noqa: D102 - Lightning's hook
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Tensor,
        batch: Any,  # noqa: ANN401
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        good = finite(outputs)
        self._not_finite += int((~good).sum())
        for index, image in zip(batch[good].tolist(), outputs[good], strict=True):
            save_png(to_uint8(image).cpu(), Path(self.output_dir) / f"{index:05d}.png")
        missing = self.columns**2 - sum(len(images) for images in self._grid)
        self._grid.append(outputs[good][: max(0, missing)].cpu())
        self._written += int(good.sum())
        # As Lightning does where it validates and tests, but not here.
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The grid of the first images of the first process, and where everything is.

        Raises:
            ValueError: images that are not finite, of which no file is written.
        """
        written = torch.tensor([self._written, self._not_finite], device=pl_module.device)
        total, not_finite = trainer.strategy.reduce(written, reduce_op="sum").tolist()
        if trainer.is_global_zero and any(len(images) for images in self._grid):
            images = torch.cat(self._grid)
            scale = self.scale or enlargement(images.shape[-2])
            save_png(image_grid(images, self.columns, scale), Path(self.output_dir, "grid.png"))
            rank_zero_info(f"{total} images and grid.png are in '{self.output_dir}'")
        if not_finite:
            raise ValueError(
                f"{not_finite} of {total + not_finite} images are not finite, and were not written; look for "
                "NaN in the model's weights, and at the sampler with `ddss inspect` for states that grow out of scale."
            )
