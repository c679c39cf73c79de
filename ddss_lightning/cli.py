"""`ddss fit | validate | test | predict`: LightningCLI over YAML recipes."""

from __future__ import annotations

import os
import sys
import warnings

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ddss_lightning.callbacks import ImageWriter, SampleQuality, SamplerPictures
from ddss_lightning.data import ImageDataModule
from ddss_lightning.denoisers import Denoiser
from ddss_lightning.features import FeatureExtractor
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.losses import KIDLoss
from ddss_lightning.module import DDSSModule
from ddss_lightning.schedule import NoiseSchedule


def _schedule(denoiser: Denoiser) -> NoiseSchedule:
    return denoiser.schedule


def _prediction_type(denoiser: Denoiser) -> str:
    return denoiser.prediction_type


class DDSSCommandLine(LightningCLI):
    """A recipe names a `denoiser`, a `sampler`, `features`, `loss`, `model` (how to learn), `data` and `trainer`.

    `denoiser`, `sampler` and `features` are `class_path` and `init_args`; the class path can be a class or a method
    that makes one, such as `ddss_lightning.GGDMSampler.from_pretrained`. The sampler gets the schedule and the
    prediction type of the denoiser. The callbacks `quality`, `pictures` and `images` are always there.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The parts of a recipe besides Lightning's own, and what links them."""
        parser.add_subclass_arguments(Denoiser, "denoiser", required=True, help="the frozen, pretrained model")
        parser.add_subclass_arguments(GGDMSampler, "sampler", required=True, help="the sampler to learn or use")
        parser.add_subclass_arguments(FeatureExtractor, "features", required=True, help="where images are compared")
        parser.add_class_arguments(KIDLoss, "loss")
        parser.add_lightning_class_args(SampleQuality, "quality")
        parser.add_lightning_class_args(SamplerPictures, "pictures")
        parser.add_lightning_class_args(ImageWriter, "images")
        parser.link_arguments("denoiser", "sampler.init_args.schedule", compute_fn=_schedule, apply_on="instantiate")
        parser.link_arguments(
            "denoiser", "sampler.init_args.prediction_type", compute_fn=_prediction_type, apply_on="instantiate"
        )
        for part in ("denoiser", "sampler", "features", "loss"):
            parser.link_arguments(part, f"model.{part}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Flags and recipe win over the hyperparameters of a checkpoint, which Lightning would let override them."""


def main(args: list[str] | None = None) -> None:
    """Console entry point. Bad input ends with one line on standard error and exit status 1 (2 for a wrong flag)."""
    # The digits are tiny: worker processes for their loader, which Lightning recommends, would only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        DDSSCommandLine(
            DDSSModule,
            ImageDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            args=args,
        )
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("DDSS_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        print(f"ddss: error: {message} (DDSS_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
