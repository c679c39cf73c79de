"""Run by test_ddp.py: the first gradient of a fit, for each way of computing it, on W processes; printed as JSON."""

import json
import logging
import sys
import warnings

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from ddss_lightning import (
    ConvFeatures,
    DDSSModule,
    DiffusersDenoiser,
    DigitsDataModule,
    FrechetLoss,
    GGDMSampler,
    InFeatures,
    KIDLoss,
    RandomFeatures,
    TeacherLoss,
    TeacherPairs,
    WeightedSum,
)
from ddss_lightning.data.digits import load_digits_tensors
from ddss_lightning.denoisers import MixtureDenoiser
from tests.conftest import DDPM, FEATURES
from tests.test_unroll import moved_sampler

GLOBAL_BATCH = 18
# Name -> precision of the oracle or of the network, arguments of the module.
WAYS = {
    "oracle": ("64-true", {}),
    "oracle, parts": ("64-true", {"microbatch_size": 4, "remat": "denoiser", "features_batch_size": 3}),
    "oracle, whole real batch": ("64-true", {"real": "batch"}),
    "oracle, real batch": ("64-true", {"microbatch_size": 4, "real": "batch"}),
    "oracle, local": ("64-true", {"gather_features": False}),
    "oracle, one call": ("64-true", {"num_steps": 1}),
    "oracle sum": ("64-true", {}),
    "oracle sum, parts": ("64-true", {"microbatch_size": 4, "remat": "denoiser", "features_batch_size": 3}),
    "oracle pixels": ("64-true", {}),
    "oracle pixels, parts": ("64-true", {"microbatch_size": 4}),
    "network": ("32-true", {}),
    "network in float64": ("64-true", {}),
    "network in float64, parts": ("64-true", {"microbatch_size": 4, "features_batch_size": 3}),
    "network, parts": ("32-true", {"microbatch_size": 4, "remat": "denoiser+offload", "features_batch_size": 3}),
}


def loss_of(way, real):
    """Of all kinds; of pixels alone, for which no feature network is called; or the KID."""
    if "sum" in way:
        kinds = {"kid": KIDLoss(), "frechet": FrechetLoss(), "x": TeacherLoss("l2"), "phi": TeacherLoss("features")}
        kinds["random"] = InFeatures(RandomFeatures(1, 8, 4, 2), KIDLoss(standardize=True), batch_size=5)
        kinds["controlled"] = KIDLoss(control_variate=True)
        kinds["elsewhere"] = InFeatures(RandomFeatures(1, 8, 4, 2), KIDLoss(control_variate=True), batch_size=5)
        return WeightedSum(kinds, {"frechet": 0.5, "x": 3.0})
    return TeacherLoss() if "pixels" in way else KIDLoss(real=real)


def gradient(way, world_size, folder, global_batch=GLOBAL_BATCH):
    """The first gradient of each degree of freedom."""
    precision, options = WAYS[way]
    options = dict(options)
    loss, num_steps = loss_of(way, options.pop("real", "bank")), options.pop("num_steps", 4)
    teacher = TeacherPairs(40, 6, chunk_size=8, cache_dir=folder, relax_radius=0.5) if "oracle " in way else None
    denoiser, oracle = DiffusersDenoiser.from_pretrained(DDPM), way.startswith("oracle")
    if oracle:
        denoiser = MixtureDenoiser(load_digits_tensors()[0][:30], 0.1, denoiser.schedule)
    # Unmoved where it is float32: chains of large corrections make more of the last digit.
    make = moved_sampler if oracle else GGDMSampler
    sampler = make(denoiser.schedule, num_steps=num_steps, stride="quadratic")
    features = ConvFeatures.from_pretrained(FEATURES)
    size = global_batch // world_size
    module = DDSSModule(denoiser, sampler, features, loss, batch_size=size, teacher=teacher, **options)
    # It is the second step that DDP refuses where a parameter had no gradient in the first.
    found, max_steps = {}, 2 if num_steps == 1 else 1

    def keep(_):
        ddp = module.trainer.model
        found["broadcast"] = len(getattr(ddp, "modules_buffers", []))
        for name, value in sampler.corrections.items():
            found.setdefault(name, value.grad.tolist())

    module.on_before_optimizer_step = keep
    trainer = Trainer(
        strategy=DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        devices=world_size, accelerator="cpu", precision=precision, max_steps=max_steps, limit_val_batches=0,
        default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DigitsDataModule(batch_size=size, steps_per_epoch=max_steps))
    if module.start_noise_offsets is not None:
        found["start noise"] = module.start_noise_offsets.tolist()
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    num, folder, ways = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    results = {way: gradient(way, num, folder) for way in ways}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print("RESULT", json.dumps(results))
