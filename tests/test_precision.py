"""The Trainer's precision: what works learns the same, what does not is refused before any work starts."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision

from ddss_lightning import ResidualFeatures, SampleQuality
from tests.test_module import data, make

warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def trainer(tmp_path, **options):
    return Trainer(
        max_steps=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-true"])
def test_half_precision_is_refused_with_the_remedy(tmp_path, precision, stage):
    # Lightning itself turns precision="16-mixed" on the CPU into bf16-mixed.
    mixed = {"plugins": MixedPrecision("16-mixed", "cpu")} if precision == "16-mixed" else {"precision": precision}
    module = make()
    module.denoiser.forward = lambda *_: pytest.fail("the network was called")
    message = f"precision is '{precision}', in which a sampler cannot be learned; use precision='bf16-mixed' .* or '32-"
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path, **mixed), stage)(module, datamodule=data())


def test_precisions_that_work_have_the_same_gradient(tmp_path):
    gradients = {}
    for precision in ("32-true", "64-true", "bf16-mixed"):
        module = make()
        sampler = module.sampler
        module.on_before_optimizer_step = lambda _, sampler=sampler, precision=precision: gradients.update(
            {precision: torch.cat([value.grad.flatten() for value in sampler.parameters()])}
        )
        trainer(tmp_path, precision=precision).fit(module, data(steps=1))
        assert all(value.dtype == torch.float64 and (value != 0).all() for value in sampler.parameters())
    expected = gradients["32-true"]
    for precision, tolerance in (("64-true", 1e-4), ("bf16-mixed", 0.2)):
        assert (gradients[precision] - expected).norm() <= tolerance * expected.norm(), precision


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_the_initial_sampler_is_scored_as_any_other(tmp_path, precision):
    def quality(folder):
        torch.manual_seed(0)
        return SampleQuality(judge=ResidualFeatures(1, 8, 8), dirpath=str(tmp_path / folder))

    fitted, validated = quality("fitted"), quality("validated")
    trainer(tmp_path, precision=precision, callbacks=[fitted]).fit(make(), data(steps=1))
    trainer(tmp_path, precision=precision, callbacks=[validated]).validate(make(), data(steps=1), verbose=False)
    assert fitted.initial == validated.scores
    assert {"fid", "judge_fid"} < fitted.initial.keys()
    assert all(math.isfinite(value) for value in fitted.initial.values())
