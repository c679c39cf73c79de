"""The Trainer's precision: what works learns the same, what does not is refused before any work starts."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision

from ddss_lightning import DDSSModule, DiffusersDenoiser, ResidualFeatures, SampleQuality
from tests.conftest import DDPM
from tests.test_module import data, make

warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def trainer(tmp_path, **options):
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **{"max_steps": 1, **options},
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


def test_weights_in_half_precision_are_not_cast_to_float64(tmp_path):
    """The sampler would belong to a model that nobody can load."""
    denoiser, like = DiffusersDenoiser.from_pretrained(DDPM, weights="bfloat16"), make()
    module = DDSSModule(denoiser, like.sampler, like.features, batch_size=8)
    with pytest.raises(
        ValueError, match=r"'64-true', and the model '.*' holds its weights in bfloat16; use precision="
    ):
        trainer(tmp_path, precision="64-true").fit(module, data(steps=1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_in_half_precision_learn(tmp_path, precision):
    """In all precisions of the Trainer; rematerialised, too, for which the chain is computed twice."""
    gradients = []
    for weights, options in (("float32", {}), ("bfloat16", {}), ("bfloat16", {"remat": "denoiser"})):
        denoiser = DiffusersDenoiser.from_pretrained(DDPM, weights=weights)
        like = make()
        module = DDSSModule(denoiser, like.sampler, like.features, batch_size=8, seed=0, **options)
        module.on_before_optimizer_step = lambda _, module=module: gradients.append(
            torch.cat([value.grad.flatten() for value in module.sampler.parameters()])
        )
        trainer(tmp_path, precision=precision).fit(module, data(steps=1))
    exact, half, again = gradients
    assert (half - exact).norm() <= 0.2 * exact.norm()
    torch.testing.assert_close(again, half, rtol=1e-5, atol=1e-6 * float(half.abs().max()))


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


@pytest.mark.parametrize("way", ["none", "old", "new", "new global"])
def test_full_precision_is_taken_up_and_put_back(way):
    """PyTorch has two ways of setting it and refuses to mix them, for the rest of the process: each in its own."""
    code = (
        "import torch; from ddss_lightning.precision import full_precision\n"
        "b, way = torch.backends, sys.argv[1]\n"
        "if not hasattr(b.cudnn, 'conv'): sys.exit()\n"
        "if way == 'old': torch.set_float32_matmul_precision('high'); b.cudnn.allow_tf32 = False\n"
        "if way == 'new': b.cuda.matmul.fp32_precision = b.cudnn.conv.fp32_precision = 'tf32'\n"
        "if way == 'new global': b.fp32_precision = 'tf32'\n"
        "old = way in ('none', 'old')\n"
        "def now():\n"
        "    product = torch.get_float32_matmul_precision() if old else b.cuda.matmul.fp32_precision\n"
        "    return product, b.cudnn.conv.fp32_precision, b.cudnn.allow_tf32, torch.is_autocast_enabled('cpu')\n"
        "with torch.autocast('cpu'):\n"
        "    before = now()\n"
        "    assert before[3]\n"
        "    with full_precision('cpu'): inside = now()\n"
        "    assert inside == ('highest' if old else 'ieee', 'ieee', False, False), inside\n"
        "    assert now() == before, (now(), before)\n"
    )
    subprocess.run([sys.executable, "-c", f"import sys\n{code}", way], check=True)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="of PyTorch 2.9 and newer")
def test_convolutions_of_scores_and_of_gauss_newton_are_not_rounded(tmp_path):
    """TF32, cuDNN's default, drowns differences of a thousandth."""
    module = make(gauss_newton={"residual_images": 8, "trial_images": 8, "dampings": [1.0]})
    seen = {"network": set(), "features": set()}
    for name, part in (("network", module.denoiser), ("features", module.features)):
        part.register_forward_pre_hook(lambda *_, name=name: seen[name].add(torch.backends.cudnn.conv.fp32_precision))
    trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=data())
    assert seen == {"network": {"ieee"}, "features": {"ieee"}}
    seen["network"].clear()
    trainer(tmp_path, callbacks=[SampleQuality()]).validate(module, datamodule=data())
    assert seen == {"network": {"tf32"}, "features": {"ieee"}}


def test_a_fit_in_float64_can_be_resumed(tmp_path):
    """The network is cast after its checkpoint was looked at: it is the same network."""
    runner = trainer(tmp_path, precision="64-true", max_steps=1)
    runner.fit(make(), data())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    resumed = trainer(tmp_path, precision="64-true", max_steps=2)
    resumed.fit(make(), data(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert resumed.global_step == 2
