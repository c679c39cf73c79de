"""The progress bar of `ddss fit`."""

from __future__ import annotations

import math

from lightning.pytorch.callbacks import RichProgressBar


class EpochProgressBar(RichProgressBar):
    """Lightning's, with the number of epochs where `max_steps` ends the fit, of which Lightning says `-2`."""

    def _get_train_description(self, current_epoch: int) -> str:
        description: str = super()._get_train_description(current_epoch)
        steps, batches = self.trainer.max_steps, self.trainer.num_training_batches
        if self.trainer.max_epochs != -1:
            return description
        known = steps > 0 and batches and math.isfinite(batches)
        return description.replace("/-2", f"/{math.ceil(steps / batches) - 1}" if known else "")
