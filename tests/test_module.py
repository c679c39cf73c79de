import copy
import os
import signal
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from ddss_lightning import (
    ConvFeatures,
    DDSSModule,
    Denoiser,
    DiffusersDenoiser,
    DigitsDataModule,
    FeatureExtractor,
    FrechetLoss,
    GaussNewton,
    GGDMSampler,
    InFeatures,
    Interruption,
    KIDLoss,
    ModuleFeatures,
    NoiseSchedule,
    RandomFeatures,
    SampleLoss,
    SampleQuality,
    TeacherLoss,
    TeacherPairs,
    WeightedSum,
)
from ddss_lightning.data.digits import TensorImages, load_digits_tensors
from ddss_lightning.ggdm import DEGREES
from ddss_lightning.losses import Samples, kid
from ddss_lightning.noise import generator_for
from ddss_lightning.sampling import _differing
from tests.conftest import DDPM, FEATURES

warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def make(seed=0, **options):
    denoiser = DiffusersDenoiser.from_pretrained(DDPM)
    sampler = GGDMSampler(denoiser.schedule, num_steps=3, **options.pop("sampler", {}))
    features = ConvFeatures.from_pretrained(FEATURES)
    return DDSSModule(denoiser, sampler, features, batch_size=16, seed=seed, **options)


def data(steps=2):
    return DigitsDataModule(batch_size=16, steps_per_epoch=steps, num_val_images=24, num_test_images=20)


def trainer(tmp_path, epochs, **options):
    return Trainer(
        max_epochs=epochs,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def test_learning_moves_the_sampler_and_nothing_else(tmp_path):
    module = make()
    before = {name: value.clone() for name, value in module.named_parameters() if "sampler" not in name}
    frozen = (module.denoiser.fingerprint(), module.features.fingerprint())
    trainer(tmp_path, 1, enable_checkpointing=False).fit(module, data())
    assert (module.denoiser.fingerprint(), module.features.fingerprint()) == frozen
    for name, value in module.named_parameters():
        if name in before and not name.startswith("averaged"):
            assert torch.equal(value, before[name]), name
    assert all((value != 0).any() for value in module.sampler.corrections.values())
    assert not module.denoiser.training


def test_learning_lowers_the_loss(tmp_path):
    """Twelve steps from DDIM at three calls, a poor start: KID on held-out noise must fall well below it."""
    module = make(sampler={"anchor": "ddim"}, lr=1e-2, time_lr=3e-2, warmup_steps=1)
    quality = SampleQuality("kid", dirpath=str(tmp_path / "s"))
    trainer(tmp_path, 1, enable_checkpointing=False, callbacks=[quality]).fit(module, data(steps=12))
    assert quality.best["kid"] < 0.9 * quality.initial["kid"]


@pytest.mark.parametrize(("real", "full_matrix"), [("bank", False), ("batch", False), ("bank", True)])
def test_two_epochs_and_resume_are_four_epochs_bit_for_bit(tmp_path, real, full_matrix):
    def fit(folder, epochs, ckpt_path=None, stop=None):
        module = DDSSModule(
            denoiser := DiffusersDenoiser.from_pretrained(DDPM),
            GGDMSampler(denoiser.schedule, 3),
            ConvFeatures.from_pretrained(FEATURES),
            KIDLoss(real=real),
            batch_size=16,
            full_matrix=full_matrix,
        )
        keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        quality = SampleQuality(dirpath=str(tmp_path / folder / "s"))
        runner = trainer(tmp_path, epochs, callbacks=[keep, quality])
        runner.fit(module, data(), ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / f"epoch={epochs - 1}.ckpt", weights_only=True), quality

    whole, quality = fit("whole", 4)
    again, resumed = fit("again", 4, ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
    moments = [c["optimizer_states"][0]["state"] for c in (whole, again)]
    assert moments[0]
    for key in moments[0]:
        for name in ("mean", "matrix") if full_matrix else ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[0][key][name], moments[1][key][name])
    assert quality.state_dict()["best"] == resumed.state_dict()["best"]
    assert quality.state_dict()["initial"] == resumed.state_dict()["initial"]


def test_checkpoint_is_small_and_holds_no_frozen_weights(tmp_path):
    module = make()
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, 1, callbacks=[keep, SampleQuality(dirpath=str(tmp_path / "s"))]).fit(module, data())
    path = tmp_path / "last.ckpt"
    assert path.stat().st_size < 100_000
    checkpoint = torch.load(path, weights_only=True)
    assert all(key.startswith(("sampler.", "averaged.")) for key in checkpoint["state_dict"])
    make().load_state_dict(checkpoint["state_dict"], strict=True)


def test_another_model_s_checkpoint_is_refused(tmp_path):
    module = make()
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, 1, callbacks=[keep]).fit(module, data())
    other = make()
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="The checkpoint belongs to the denoiser"):
        trainer(tmp_path, 2).fit(other, data(), ckpt_path=tmp_path / "last.ckpt")
    longer = make(sampler={"learn": ("mu",)})
    with pytest.raises(ValueError, match=r"holds another sampler \(learn: \['mu', .* instead of \['mu'\]\)"):
        trainer(tmp_path, 2).fit(longer, data(), ckpt_path=tmp_path / "last.ckpt")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    module = make()
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    del checkpoint["sampler_format"]
    with pytest.raises(ValueError, match="The checkpoint is of format 1, this package resumes format 2"):
        module.on_load_checkpoint(checkpoint)


def test_imported_numbers_may_differ_by_rounding_in_a_checkpoint(schedule):
    """Another machine computes a scheduler's betas with other last digits; another solver is another sampler."""
    anchor = {"class_path": "diffusers.UniPCMultistepScheduler"}
    config = GGDMSampler(schedule, 3, anchor=anchor).config
    rounded = copy.deepcopy(config)
    rounded["anchor"]["coefficients"]["mu"][1][1] += 1e-7
    assert _differing(config, rounded) == {}
    rounded["anchor"]["coefficients"]["mu"][1][1] += 1e-2
    assert set(_differing(config, rounded)) == {"anchor.coefficients.mu"}
    other = GGDMSampler(schedule, 3).config
    assert {"anchor.class_path", "anchor.name", "learn"} <= set(_differing(config, other))
    # So do the times at which strides begin for cosine betas.
    times = {**other, "timesteps": [995.0773, 500.0, 10.0]}
    assert _differing(times, {**times, "timesteps": [995.0775, 500.0, 10.0]}) == {}
    for others in ([995.1, 500.0, 10.0], [995.0773, 500.0], None):
        assert set(_differing(times, {**times, "timesteps": others})) == {"timesteps"}


def test_the_result_is_never_worse_than_the_start(tmp_path):
    """A learning rate that destroys the sampler: the best is candidate 0, and that is what fit leaves."""
    module = make(lr=5.0, time_lr=5.0, warmup_steps=0)
    quality = SampleQuality(dirpath=str(tmp_path / "s"))
    with pytest.warns(UserWarning, match=r"makes images that are not finite \(24 of 24\); lower the learning rate"):
        trainer(tmp_path, 2, callbacks=[quality], enable_checkpointing=False).fit(module, data())
    assert quality.best == quality.initial
    assert quality.best_step == 0
    assert all((value == 0).all() for value in module.sampler.corrections.values())
    saved = GGDMSampler.from_pretrained(tmp_path / "s")
    assert all((value == 0).all() for value in saved.corrections.values())


def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path):
    module = make()
    original = module.loss.forward
    calls = []

    def loss(samples):
        calls.append(samples)
        return original(samples) * (torch.nan if len(calls) == 2 else 1.0)

    module.loss.forward = loss
    with pytest.warns(UserWarning, match=r"Step 1: the gradient is not finite; skipped \(1 so far\)"):
        trainer(tmp_path, 2, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    assert (module.num_skipped, module.num_skipped_in_a_row) == (1, 0)
    assert all(value.isfinite().all() for value in module.sampler.parameters())


def test_the_loss_is_computed_in_full_precision(tmp_path):
    """Matrix products without TF32 and autocast, in both passes, whatever the Trainer and the user chose."""
    module, seen = make(), []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), x.dtype))
            return x.clone()

        @staticmethod
        def backward(_, gradient):
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), gradient.dtype))
            return gradient

    original = module.loss.forward
    module.loss.forward = lambda samples: original(Samples(Product.apply(samples.features.float())))
    torch.set_float32_matmul_precision("medium")
    try:
        runner = trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0, precision="bf16-mixed")
        runner.fit(module, data(steps=1))
        assert seen == [("highest", False, torch.float32)] * 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_networks_inside_losses_have_the_trainer_s_precision(tmp_path):
    """As the module's own feature network; the loss of what they give is in float32."""
    seen = []

    class Look(RandomFeatures):
        def forward(self, images):
            features = super().forward(images)
            # One image is that of the check before the first step.
            if images.requires_grad and len(images) > 1:
                seen.append(torch.is_autocast_enabled("cpu"))
            return features

    class Watched(KIDLoss):
        def forward(self, samples):
            seen.append((torch.is_autocast_enabled("cpu"), super().forward(samples).dtype))
            return super().forward(samples)

    module = make(loss=InFeatures(Look(1, 8), Watched(standardize=True)))
    seen.clear()
    runner = trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0, precision="bf16-mixed")
    runner.fit(module, data(steps=1))
    assert seen == [True, (False, torch.float32)]


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_but_the_schedule(tmp_path, place):
    """Sampler, running average, Adam's moments and its counter, for a bad loss with a good gradient and for NaN."""
    states, rates = [], []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            (optimizer,) = trainer.optimizers
            states.append(copy.deepcopy([pl_module.state_dict(), optimizer.state_dict()["state"]]))
            rates.append(optimizer.param_groups[0]["lr"])

    module = make(sampler={"learn": ("mu",)})
    original = module.loss.forward

    def forward(samples):
        value = original(samples)
        if len(states) != 2:
            return value
        return value + torch.tensor(torch.inf) if place == "loss" else value * torch.nan

    module.loss.forward = forward
    with pytest.warns(UserWarning, match="Step 2: the gradient is not finite; skipped"):
        trainer(tmp_path, 2, enable_checkpointing=False, limit_val_batches=0, callbacks=[Look()]).fit(module, data())
    for before, after, equal in ((0, 1, False), (1, 2, True), (2, 3, False)):
        for key in ("sampler.corrections.mu", "averaged.corrections.mu"):
            assert torch.equal(states[before][0][key], states[after][0][key]) == equal, key
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(states[before][1][0][key], states[after][1][0][key]) == equal, key
    assert len(set(rates)) == 4


def test_too_many_skipped_steps_in_a_row_end_the_fit_with_the_best_sampler(tmp_path):
    """Good steps 0 and 1 and 4, bad ones from 5 on: at the third in a row it validates, saves, and says why it ends."""
    module = make(max_skipped_steps=3, lr=1e-2)
    original = module.loss.forward
    bad = {2, 3, *range(5, 100)}
    module.loss.forward = lambda *inputs: original(*inputs) * (torch.nan if module.global_step in bad else 1.0)
    quality, interruption = SampleQuality(dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))
    runner = trainer(tmp_path, 4, callbacks=[quality, interruption])
    with pytest.raises(FloatingPointError, match=r"after step 8: 3 steps in a row .* lower the learning rate"):
        runner.fit(module, data(steps=20))
    assert module.num_skipped == 5
    assert quality.scores["fid"] != quality.initial["fid"]
    saved = GGDMSampler.from_pretrained(tmp_path / "s")
    for name, value in quality.best_sampler.items():
        assert value.isfinite().all()
        assert torch.equal(saved.state_dict()[name], value)
        assert torch.equal(module.sampler.state_dict()[name], value)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (checkpoint["num_skipped"], checkpoint["num_skipped_in_a_row"], checkpoint["global_step"]) == (5, 3, 8)


def test_a_resumed_fit_in_another_folder_has_its_best_sampler_there(tmp_path):
    module = make(lr=5.0, time_lr=5.0, warmup_steps=0)
    parts = [SampleQuality(dirpath=str(tmp_path / "one")), Interruption(dirpath=str(tmp_path))]
    trainer(tmp_path, 1, callbacks=parts).fit(module, data())
    quality = SampleQuality(dirpath=str(tmp_path / "two"))
    again = make(lr=5.0, time_lr=5.0, warmup_steps=0)
    trainer(tmp_path, 2, callbacks=[quality]).fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    assert quality.best_step == 0
    for name in ("sampler.json", "sampler.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_noise_is_a_function_of_seed_step_and_index(tmp_path, monkeypatch):
    keys = []

    def remember(*key):
        keys.append(key)
        return generator_for(*key)

    monkeypatch.setattr("ddss_lightning.noise.generator_for", remember)
    results = []
    for seed in (7, 7, 1):
        module = make(seed=seed)
        trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
        results.append(module.sampler.corrections["mu"].detach().clone())
    drawn = [("train", 7, 0, 0), ("train", 7, 0, "conditions", 0), ("train", 7, 1, 0)]
    assert [key for key in keys if key[0] == "train"][:3] == drawn
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_degree_of_freedom_has_a_gradient(tmp_path):
    module = make(sampler={"learn": DEGREES})
    seen = {}

    def keep_gradients(_):
        seen.update({name: value.grad.clone() for name, value in module.sampler.corrections.items()})

    module.on_before_optimizer_step = keep_gradients
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data(steps=1))
    assert all((gradient != 0).all() for gradient in seen.values()), seen


def test_accumulated_gradients_are_refused(tmp_path):
    runner = trainer(tmp_path, 1, enable_checkpointing=False, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        runner.fit(make(), data())


def test_a_start_that_is_not_finite_is_not_the_best(tmp_path):
    """It ends with an error, so that no script goes on."""
    quality = SampleQuality(dirpath=str(tmp_path / "s"))
    module = make()
    validation_step = module.validation_step
    module.validation_step = lambda *args: torch.nan * validation_step(*args)
    with (
        pytest.warns(UserWarning, match=r"makes images that are not finite \(24 of 24\)"),
        pytest.raises(FloatingPointError, match="No sampler is kept: none made images that are finite"),
    ):
        trainer(tmp_path, 1, callbacks=[quality], enable_checkpointing=False).fit(module, data())
    assert quality.best == {}
    assert not (tmp_path / "s").exists()


def test_scores_follow_the_data_module(tmp_path):
    class Half(DigitsDataModule):
        def real_images(self):
            return TensorImages(load_digits_tensors()[0][:900])

    module = make()
    runner = trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False)
    scores = [runner.test(module, kind(num_test_images=20), verbose=False)[0] for kind in (DigitsDataModule, Half)]
    assert scores[0]["test/fid"] != scores[1]["test/fid"]


def test_running_average(tmp_path):
    module = make(ema_decay=0.0)
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    for mean, value in zip(module.averaged.parameters(), module.sampler.parameters(), strict=True):
        assert torch.equal(mean, value)
    module = make(ema_decay=0.9)
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    mean, value = module.averaged.corrections["mu"], module.sampler.corrections["mu"]
    assert 0 < mean.norm() < value.norm()


def test_parts_that_do_not_fit(denoiser, features):
    sampler = GGDMSampler(denoiser.schedule, 3)
    with pytest.raises(ValueError, match=r"makes images of shape \(1, 8, 8\), the feature network takes \(3, 8, 8\)"):
        DDSSModule(denoiser, sampler, ConvFeatures(image_channels=3))
    other = NoiseSchedule(denoiser.schedule.table * 1.1)
    with pytest.raises(ValueError, match="another noise schedule"):
        DDSSModule(denoiser, GGDMSampler(other, 3), features)
    with pytest.raises(ValueError, match="predicts 'epsilon', the sampler was made for 'sample'"):
        DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 3, prediction_type="sample"), features)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        DDSSModule(denoiser, sampler, features, batch_size=1)
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1"):
        DDSSModule(denoiser, sampler, features, ema_decay=1.0)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        DDSSModule(denoiser, sampler, features, microbatch_size=0)
    with pytest.raises(ValueError, match="features_batch_size must be at least 1, got -1"):
        DDSSModule(denoiser, sampler, features, features_batch_size=-1)
    with pytest.raises(ValueError, match="max_skipped_steps must be at least 1, got 0"):
        DDSSModule(denoiser, sampler, features, max_skipped_steps=0)
    with pytest.raises(ValueError, match="Unknown remat 'some'"):
        DDSSModule(denoiser, sampler, features, remat="some")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.full((20, 1, 8, 8), torch.nan),
            "20 of 20 real images 0 to 19 hold NaN or infinite numbers; clean the",
        ),
        (torch.full((20, 1, 8, 8), 3.0), r"real images 0 to 19 must lie in \[-1, 1\], got values from 3 to 3"),
        (torch.zeros(20, 3, 8, 8), r"real images have shape \(3, 8, 8\), the model .* makes \(1, 8, 8\)"),
        (torch.zeros(20, 1, 9, 9), r"real images have shape \(1, 9, 9\)"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(tmp_path, images, message):
    class Bad(DigitsDataModule):
        def real_images(self):
            return TensorImages(images)

    module = make()
    module.training_step = lambda *_: pytest.fail("a step was taken")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(module, Bad())


def test_images_with_labels_and_none_at_all(tmp_path):
    class Own(DigitsDataModule):
        def __init__(self, dataset):
            super().__init__()
            self.dataset = dataset

        def real_images(self):
            return self.dataset

    images = torch.zeros(20, 1, 8, 8)
    with pytest.raises(ValueError, match="must be one tensor, got a batch of list; leave out labels"):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(make(), Own(TensorDataset(images, torch.zeros(20))))
    with pytest.raises(ValueError, match="at least two real images, got 0"):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(make(), Own(TensorImages(images[:0])))


def test_images_that_are_not_centred_are_warned_of(tmp_path):
    """As torchvision's ToTensor leaves them."""

    class Positive(DigitsDataModule):
        def real_images(self):
            return TensorImages(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)))

    with pytest.warns(UserWarning, match=r"must be scaled to \[-1, 1\], so if they are in \[0, 1\], use 2 x - 1"):
        trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False).validate(
            make(), Positive(num_val_images=8), verbose=False
        )


class NoGradient(DiffusersDenoiser):
    """As wrappers of other libraries often are."""

    @torch.no_grad()
    def forward(self, x_t, timestep):
        return super().forward(x_t, timestep)


class WholeTimes(DiffusersDenoiser):
    def forward(self, x_t, timestep):
        return super().forward(x_t, timestep.detach().long())


class TwiceAsWide(DiffusersDenoiser):
    def forward(self, x_t, timestep):
        return torch.cat([x_t, super().forward(x_t, timestep)], -1)


class AsDiffusers(DiffusersDenoiser):
    def forward(self, x_t, timestep):
        return self.unet(x_t, timestep)


class BlindDecoder(DiffusersDenoiser):
    @torch.no_grad()
    def decode(self, x_0):
        return 1.0 * x_0


class NotANumber(DiffusersDenoiser):
    def forward(self, x_t, timestep):
        return torch.nan * super().forward(x_t, timestep)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoGradient, "digits-ddpm' has no gradient with respect to the state, through which the sampler is learned"),
        (WholeTimes, "digits-ddpm' has no gradient with respect to the timestep"),
        (TwiceAsWide, r"returns shape \(1, 1, 8, 16\) for states of shape \(1, 1, 8, 8\)"),
        (AsDiffusers, "digits-ddpm' returns UNet2DOutput, it must return a tensor: `.sample` of it"),
        (BlindDecoder, "output of `decode` of the denoiser .* has no gradient with respect to the last state"),
        (NotANumber, r"Of 8 images .* none is finite: look for NaN in the weights and in the output .*digits-ddpm'"),
    ],
)
def test_a_network_that_cannot_be_learned_through_is_refused_before_scoring(tmp_path, kind, message):
    """Learning went on with wrong gradients."""
    denoiser = kind.from_pretrained(str(DDPM))
    sampler = GGDMSampler(denoiser.schedule, 3, learn=("mu", "time"))
    module = DDSSModule(denoiser, sampler, ConvFeatures.from_pretrained(FEATURES), batch_size=8)
    module.validation_step = lambda *_: pytest.fail("a sampler was scored")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False).fit(module, data())


def test_features_without_a_gradient_are_refused(tmp_path):
    class Blind(ConvFeatures):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    module = make()
    module.features = Blind().freeze()
    # Of a loss, too: half of the sum would be learned from, silently.
    other = make(loss=WeightedSum({"kid": KIDLoss(), "blind": InFeatures(Blind(), KIDLoss())}))
    for each in (module, other):
        each.validation_step = lambda *_: pytest.fail("a sampler was scored")
        with pytest.raises(ValueError, match="output of Blind has no gradient with respect to the images"):
            trainer(tmp_path, 1, enable_checkpointing=False).fit(each, data())


@pytest.mark.parametrize(
    ("needs", "loss", "message"),
    [
        ({"features"}, lambda s: s["images"].mean(), "reads `images` of the samples, .*: add 'images' to its `needs`"),
        ({"images"}, lambda s: s["images"].mean(0), r"Own must return a scalar .* got shape \(1, 8, 8\)\."),
        ({"images"}, lambda s: s["images"].detach().mean(), r"must return a scalar .* \(\) without a gradient"),
    ],
)
def test_a_loss_of_one_s_own_is_told_what_it_lacks(tmp_path, needs, loss, message):
    class Own(SampleLoss):
        def forward(self, samples):
            return loss(samples)

    module = make(loss=Own())
    module.loss.needs = frozenset(needs)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(module, data())


@pytest.mark.parametrize(
    ("make_features", "message"),
    [
        (lambda x: x.flatten(1), r"Own returns features of shape \(500, 64\), its num_features is 10"),
        (lambda x: (x,), "Own r"),
    ],
)
def test_features_of_another_length_than_they_say_are_refused(make_features, message):
    class Own(FeatureExtractor):
        image_shape, num_features = (1, 8, 8), 10

        def forward(self, images):
            return make_features(images)

    module = make()
    module._trainer = SimpleNamespace(datamodule=DigitsDataModule(), is_global_zero=True)
    with pytest.raises(ValueError, match=message):
        module.encode_real(Own())


def test_a_sampler_of_another_model_is_refused_without_a_word_on_its_settings(tmp_path):
    module = make()
    base_model = {**module.base_model, "fingerprint": "0" * 16, "settings": {"guidance_scale": 2.0}}
    module.sampler.save_pretrained(tmp_path / "a", base_model=base_model)
    # What it predicts is that model's, too, and no advice.
    other = GGDMSampler(module.denoiser.schedule, 3, prediction_type="v_prediction")
    other.save_pretrained(tmp_path / "b", base_model=base_model)
    for name in ("a", "b"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=rf"{name}' was learned for '.*' \(fingerprint 0000"):
                module.load_sampler(tmp_path / name)


def test_batches_that_are_no_indices_are_told(tmp_path):
    """Images from a data module of one's own were taken for numbers of noise, and printed whole."""
    module = make()
    for batch, got in (
        (torch.zeros(4, 1, 8, 8), r"torch.float32 of shape \(4, 1, 8, 8\);"),
        (torch.zeros(4), r"torch.float32 of shape \(4,\);"),
        ([torch.arange(4)], "list;"),
    ):
        with pytest.raises(ValueError, match=f"of validation must be the indices of its noise, .* got {got}"):
            module.validation_step(batch, 0)


def test_parts_of_one_s_own_are_told_what_they_lack(denoiser, features):
    class Bare(FeatureExtractor):
        def forward(self, images):
            return images.flatten(1)

    sampler = GGDMSampler(denoiser.schedule, 3)
    with pytest.raises(ValueError, match="Bare has no attribute `image_shape`; a FeatureExtractor sets image"):
        DDSSModule(denoiser, sampler, Bare())

    class Half(Denoiser):
        def forward(self, x_t, timestep):
            return x_t

    with pytest.raises(ValueError, match="Half has no attribute `name`; a Denoiser sets name, schedule, prediction"):
        DDSSModule(Half(), sampler, features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"denoiser": torch.nn.Linear(2, 2)}, r"denoiser must be a Denoiser, got Linear; DiffusersDenoiser\.from_pre"),
        ({"sampler": DDIMScheduler()}, r"sampler must be a GGDMSampler, got DDIMScheduler; GGDMSampler\.from_sched"),
        ({"features": torch.nn.Linear(2, 2)}, "features must be a FeatureExtractor, got Linear; ModuleFeatures"),
        ({"loss": "kid"}, r"loss must be a SampleLoss, got str; give one such as KIDLoss\(\)"),
        ({"loss": KIDLoss}, "loss must be a SampleLoss, got the class KIDLoss"),
    ],
)
def test_parts_of_another_kind_are_refused(denoiser, features, wrong, message):
    parts = {"denoiser": denoiser, "sampler": GGDMSampler(denoiser.schedule, 3), "features": features}
    with pytest.raises(ValueError, match=message):
        DDSSModule(**{**parts, **wrong})


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"featurs"}, "Own.needs: unknown 'featurs'; choose any of features, images, real, target, target_features"),
        ({"real"}, "Sum.needs holds neither 'features' nor 'images', .*; got real"),
        ("features", "Own.needs must be a set of names, such as {'features'}, got 'features'"),
    ],
)
def test_a_loss_that_needs_what_is_not_there_is_refused(needs, message):
    """After the first scores it failed with an index out of range."""

    class Own(SampleLoss):
        def forward(self, samples):
            return samples["features"].mean()

    class Sum(WeightedSum):
        pass

    loss = Own()
    loss.needs = needs
    with pytest.raises(ValueError, match=message):
        make(loss=Sum({"own": loss}) if needs != "features" else loss)


def test_one_loss_in_two_places_is_refused():
    """The second space gave its real features to the first one, too: the first term was 5.8 in place of 2.4."""
    kid = KIDLoss()
    loss = WeightedSum({"own": kid, "random": InFeatures(RandomFeatures(1, 8), kid)})
    said = "one and the same KIDLoss as 'losses.own' and as 'losses.random.loss', .* give each place its own KIDLoss"
    with pytest.raises(ValueError, match=said):
        make(loss=loss)
    make(loss=WeightedSum({"own": kid, "random": InFeatures(RandomFeatures(1, 8), KIDLoss())}))


def test_a_latent_model_without_decode_is_told_before_scoring(tmp_path):
    class Latent(DiffusersDenoiser):
        state_shape = (1, 4, 4)

    denoiser = Latent.from_pretrained(DDPM)
    denoiser.forward = lambda x_t, timestep: x_t * timestep.view(-1, 1, 1, 1)
    module = DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 3), ConvFeatures.from_pretrained(FEATURES))
    module.validation_step = lambda *_: pytest.fail("a sampler was scored")
    message = r"`decode` of .* makes images of shape \(1, 4, 4\) from states .*, its image_shape is \(1, 8, 8\); a l"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False).fit(module, data())
    denoiser.decode = lambda x_0: (x_0,)
    with pytest.raises(ValueError, match=r"`decode` of the denoiser .* returns tuple, it must return a tensor"):
        trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False).fit(module, data())


def test_too_few_teacher_pairs_are_told_before_scoring(tmp_path):
    module = make(loss=TeacherLoss(), teacher=TeacherPairs(num_pairs=4, cache_dir=str(tmp_path)))
    module.validation_step = lambda *_: pytest.fail("a sampler was scored")
    with pytest.raises(ValueError, match=r"A batch of 16 images.* there are 4; raise num_pairs or lower batch_size"):
        trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False).fit(module, data())


def test_a_teacher_that_cannot_be_is_told_before_scoring(tmp_path):
    noisy = {"class_path": "diffusers.DDPMScheduler", "init_args": {"clip_sample": False}}
    module = make(loss=TeacherLoss(), teacher=TeacherPairs(40, 5, anchor=noisy, cache_dir=str(tmp_path)))
    module.validation_step = lambda *_: pytest.fail("a sampler was scored")
    with pytest.raises(
        ValueError, match=r"^model\.teacher: A teacher must be deterministic, but this anchor adds noise"
    ):
        trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False).fit(module, data())


def test_fixed_numbers_can_be_learned_further(tmp_path, denoiser):
    module = make()
    fixed = GGDMSampler(denoiser.schedule, 3, "dpmpp_2m", learn=())
    fixed.save_pretrained(tmp_path / "fixed")
    module.load_sampler(tmp_path / "fixed")
    assert not module.sampler.corrections
    module.load_sampler(tmp_path / "fixed", ("mu", "logsnr", "time"))
    assert set(module.sampler.corrections) == {"mu", "time"}
    assert f"anchor: the sampler in '{tmp_path / 'fixed'}'\n" in str(module.sampler)
    for name in ("mu", "nu", "std", "pred", "timesteps"):
        ours, theirs = (getattr(each.coefficients(), name) for each in (module.sampler, fixed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_no_real_images(tmp_path):
    with pytest.raises(ValueError, match="give the Trainer a data module that has"):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(make(), [torch.zeros(4, 1, 8, 8)])


def test_nothing_to_learn(tmp_path):
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(make(sampler={"learn": ()}), data())


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(tmp_path):
    """But for rounding: images are kept in 8 bits, and the student's are x + (rounded - x)."""
    teacher = TeacherPairs(20, 3, stride="linear", cache_dir=str(tmp_path))
    loss, seen = WeightedSum({"x": TeacherLoss(), "phi": TeacherLoss("features")}), {}
    module = make(loss=loss, teacher=teacher)

    def keep(_):
        seen.update(loss.terms, norm=torch.stack([p.grad.norm() for p in module.sampler.parameters()]).norm())

    module.on_before_optimizer_step = keep
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data(steps=1))
    assert all(value < 1e-5 for value in seen.values()), seen
    module = make(loss=loss, teacher=TeacherPairs(20, 4, cache_dir=str(tmp_path)))
    module.on_before_optimizer_step = keep
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data(steps=1))
    assert all(value > 1e-3 for value in seen.values()), seen


def test_a_control_variate_is_of_all_of_the_teachers_images(tmp_path):
    """In the module's features: those of all pairs; the loss of the teacher itself is its KID, whatever the batch."""
    teacher = TeacherPairs(num_pairs=40, num_steps=3, chunk_size=16, cache_dir=str(tmp_path))
    student = {"anchor": "dpmpp_2m", "stride": "quadratic", "learn": ("mu",)}
    module = make(teacher=teacher, loss=KIDLoss(control_variate=True), sampler=student, lr=0.0, time_lr=0.0)
    values = []
    module.log = lambda name, value, **_: values.append(float(value)) if name == "train/kid" else None
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    bank = module.features(teacher.load(module.denoiser)[list(range(40))])
    torch.testing.assert_close(module.loss.teacher, (bank / module.loss.scale).float())
    assert values == pytest.approx([float(kid(module.loss.teacher.double(), module.loss.bank.double()))] * 2, rel=1e-4)


def test_teacher_and_real_images_are_encoded_few_at_a_time_too(tmp_path):
    sizes = set()
    loss = WeightedSum({"teacher": TeacherLoss(distance="features"), "kid": KIDLoss(real="batch")})
    module = make(
        teacher=TeacherPairs(num_pairs=40, num_steps=3, cache_dir=str(tmp_path)), loss=loss, features_batch_size=5
    )
    module.log = lambda *_, **__: None
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data(1))
    module.features.register_forward_pre_hook(lambda _, images: sizes.add(len(images[0])))
    module._loss_and_slopes(
        [module.features(torch.zeros(4, 1, 8, 8))], torch.zeros(16, 1, 8, 8), torch.zeros(4, 1, 8, 8)
    )
    assert sizes == {5, 4, 1}


def test_running_moments_and_moved_start_noise_resume_bit_for_bit(tmp_path):
    """In the middle of the pairs' second epoch."""

    def fit(folder, epochs, ckpt_path=None):
        loss = WeightedSum({"frechet": FrechetLoss(), "x": TeacherLoss()})
        module = make(loss=loss, teacher=TeacherPairs(50, 4, cache_dir=str(tmp_path), relax_radius=0.5))
        keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        runner = trainer(tmp_path, epochs, callbacks=[keep], limit_val_batches=0)
        runner.fit(module, data(), ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / f"epoch={epochs - 1}.ckpt", weights_only=True)

    whole = fit("whole", 3)
    again = fit("again", 3, ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    memory = whole["loss_memory"]["losses.frechet"]
    assert memory.keys() == {"mean", "second", "squared_weights"}
    assert (whole["start_noise_offsets"].flatten(1).norm(dim=1) > 0).sum() > 48
    assert all(torch.equal(value, again["loss_memory"]["losses.frechet"][name]) for name, value in memory.items())
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert torch.equal(whole["start_noise_offsets"], again["start_noise_offsets"])


def test_a_checkpoint_of_another_loss_or_teacher(tmp_path):
    def another(num_pairs=20, loss=None, **teacher):
        losses = WeightedSum({"frechet": FrechetLoss(), "x": TeacherLoss()})
        pairs = TeacherPairs(num_pairs, 4, cache_dir=str(tmp_path), **{"relax_radius": 0.5, **teacher})
        return make(loss=loss or losses, teacher=pairs)

    def resume(module, path):
        trainer(tmp_path, 2, enable_checkpointing=False, limit_val_batches=0).fit(module, data(1), ckpt_path=path)

    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, 1, callbacks=[keep], limit_val_batches=0).fit(another(), data(1))
    path = tmp_path / "last.ckpt"
    kinds = "loss: WeightedSum instead of FrechetLoss, loss.losses.frechet: FrechetLoss instead of None"
    names = {"loss": WeightedSum({"f": FrechetLoss(), "x": TeacherLoss()})}
    for other, message in (
        ({"loss": FrechetLoss()}, kinds),
        (names, "loss.losses.frechet: FrechetLoss instead of None, loss.losses.f: None instead of FrechetLoss"),
        (
            {"loss": WeightedSum({"frechet": FrechetLoss(), "x": TeacherLoss("features")})},
            r"loss.losses.x: TeacherLoss\(l2\) instead of TeacherLoss\(features\)",
        ),
        (
            {"loss": WeightedSum({"frechet": FrechetLoss(0.5), "x": TeacherLoss()}, {"x": 3.0})},
            r"loss: WeightedSum instead of WeightedSum\(x=3\), "
            r"loss.losses.frechet: FrechetLoss instead of FrechetLoss\(decay=0.5\)",
        ),
        ({"seed": 1}, r"\(teacher.seed: 0 instead of 1\); resume with the recipe it was started with"),
        ({"num_pairs": 30, "anchor": "ddim"}, "teacher.num_pairs: 20 instead of 30, teacher.anchor: dpmpp_2m instead"),
    ):
        with pytest.raises(ValueError, match=f"of a fit with another loss, teacher, guidance or optimiser .*{message}"):
            resume(another(**other), path)
    # What only scores asks for the sampler alone.
    scored = make()
    trainer(tmp_path, 1, enable_checkpointing=False).validate(scored, data(), ckpt_path=path, verbose=False)
    assert scored.start_noise_offsets is None
    resume(another(chunk_size=7), path)
    old = torch.load(path, weights_only=True)
    del old["compared"]
    torch.save(old, path)
    resume(another(), path)
    with pytest.raises(ValueError, match="start noise is of 20 teacher pairs, num_pairs is 30"):
        resume(another(30), path)


def test_a_checkpoint_of_other_features(tmp_path):
    """The running moments in it are of theirs."""
    keep = ModelCheckpoint(tmp_path, filename="last")
    options = {"limit_val_batches": 0}
    trainer(tmp_path, 1, callbacks=[keep], **options).fit(make(loss=FrechetLoss()), data(1))
    path = tmp_path / "last.ckpt"
    module = make(loss=FrechetLoss())
    with torch.no_grad():
        for value in module.features.parameters():
            value.neg_()
    with pytest.raises(ValueError, match=r"\(features: ConvFeatures \(\w+\) instead of ConvFeatures \(\w+\)\)"):
        trainer(tmp_path, 2, enable_checkpointing=False, **options).fit(module, data(1), ckpt_path=path)
    old = torch.load(path, weights_only=True)
    del old["compared"]["features"]
    torch.save(old, path)
    again = trainer(tmp_path, 2, enable_checkpointing=False, **options)
    again.fit(make(loss=FrechetLoss()), data(1), ckpt_path=path)
    assert again.global_step == 2


def test_the_order_of_the_teacher_s_pairs_is_that_of_the_seed(tmp_path):
    """With another one a fit is another, and the pairs are not made again; they were the same to the last bit."""

    def fit(seed):
        pairs = TeacherPairs(40, 4, cache_dir=str(tmp_path))
        module = make(seed=seed, loss=TeacherLoss(), teacher=pairs, sampler={"learn": ("mu", "nu")})
        trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
        return torch.cat([value.detach().flatten() for value in module.sampler.corrections.values()])

    first = fit(0)
    assert torch.equal(fit(0), first)
    assert not torch.equal(fit(1), first)
    assert len(list(tmp_path.glob("teacher-*"))) == 1


def test_a_module_is_made_from_its_checkpoint(tmp_path):
    """With its settings, which are saved as plain values."""
    settings = {"teacher": TeacherPairs(20, 4, cache_dir=str(tmp_path)), "gauss_newton": GaussNewton(rank=5)}
    module = make(lr=0.5, **settings)
    runner = trainer(tmp_path, 1, enable_checkpointing=False)
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "x.ckpt")
    parts = {name: getattr(make(), name) for name in ("denoiser", "sampler", "features")}
    again = DDSSModule.load_from_checkpoint(tmp_path / "x.ckpt", **parts)
    assert {name: getattr(again, name) for name in settings} == settings
    assert again.lr == 0.5


def test_a_skipped_step_leaves_memory_and_start_noise(tmp_path):
    loss = WeightedSum({"frechet": FrechetLoss(), "x": TeacherLoss()})
    module = make(loss=loss, teacher=TeacherPairs(16, 4, cache_dir=str(tmp_path), relax_radius=0.5))
    original, seen = loss.forward, []
    loss.forward = lambda samples: original(samples) * (torch.nan if module.global_step == 1 else 1.0)

    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.append((loss.losses["frechet"].memory()["mean"].clone(), module.start_noise_offsets.clone()))

    with pytest.warns(UserWarning, match="Step 1: the gradient is not finite; skipped"):
        trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0, callbacks=[Look()]).fit(module, data(3))
    for first, second, equal in ((0, 1, True), (1, 2, False)):
        for before, after in zip(seen[first], seen[second], strict=True):
            assert torch.equal(before, after) == equal


def test_a_second_fit_of_a_module_starts_afresh(tmp_path):
    """With a step that is skipped at the same place in both: moments, start noise and counters are those of one fit."""

    def fit(module):
        runner = trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0)
        with pytest.warns(UserWarning, match="Step 0: the gradient is not finite; skipped"):
            runner.fit(module, data(3))
        return module.loss.losses["frechet"].memory()["mean"], module.start_noise_offsets, module.num_skipped

    def fresh():
        loss = WeightedSum({"frechet": FrechetLoss(), "x": TeacherLoss()})
        # At rates of 0 the second fit starts where the first did.
        teacher = TeacherPairs(16, 4, cache_dir=str(tmp_path), relax_radius=0.5)
        module = make(loss=loss, teacher=teacher, lr=0.0, time_lr=0.0)
        original = loss.forward
        loss.forward = lambda samples: original(samples) * (torch.nan if module.global_step == 0 else 1.0)
        return module

    module = fresh()
    expected = [each.clone() if isinstance(each, torch.Tensor) else each for each in fit(module)]
    again = fit(module)
    assert expected[0].isfinite().all()
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])
    assert again[2] == expected[2] == 1


def test_a_fit_that_stopped_at_bad_steps_has_another_try(tmp_path):
    def fit(bad, max_steps, ckpt_path=None):
        module = make(max_skipped_steps=2)
        original = module.loss.forward
        module.loss.forward = lambda samples: original(samples) * (torch.nan if module.global_step in bad else 1.0)
        options = {"callbacks": [Interruption(dirpath=str(tmp_path))], "limit_val_batches": 0, "max_steps": max_steps}
        trainer(tmp_path, -1, **options).fit(module, data(4), ckpt_path=ckpt_path)
        return module

    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FloatingPointError, match="2 steps in a row"):
        fit((1, 2), 8)
    with pytest.warns(UserWarning, match="Step 3: .* skipped"):
        module = fit((3,), 8, tmp_path / "last.ckpt")
    assert (module.global_step, module.num_skipped, module.num_skipped_in_a_row) == (8, 3, 0)


def test_a_feature_network_of_the_loss_that_does_not_fit():
    loss = WeightedSum({"kid": KIDLoss(), "random": InFeatures(RandomFeatures(3, 16), KIDLoss())})
    with pytest.raises(ValueError, match=r"of shape \(1, 8, 8\), the loss's RandomFeatures takes \(3, 16, 16\)"):
        make(loss=loss)


def test_a_teacher_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"needs target of a teacher: give teacher=TeacherPairs\(...\)"):
        make(loss=TeacherLoss())
    module = make(loss=TeacherLoss(), teacher=TeacherPairs(15, 4, cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"A batch of 16 images.* there are 15"):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(module, data())
    assert list(tmp_path.glob("teacher-*")) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_told_to_stop_while_the_teachers_images_are_made(tmp_path, monkeypatch, name):
    """After the file that is under way; the next fit makes what is missing."""
    number, made = getattr(signal, name), []

    def save_and_tell(tensors, path, metadata):
        save_file(tensors, path, metadata)
        made.append(path)
        if len(made) == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("ddss_lightning.teacher.save_file", save_and_tell)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def fit():
        teacher = TeacherPairs(20, 4, chunk_size=8, cache_dir=str(tmp_path))
        runner = trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0)
        runner.fit(make(loss=TeacherLoss(), teacher=teacher), data(steps=1))
        return runner.global_step

    with pytest.raises(SystemExit) as stopped:
        fit()
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert len(made) == 1
    assert fit() == 1
    assert len(made) == 3


def test_each_process_with_moments_of_its_own_is_refused():
    module = make(loss=WeightedSum({"frechet": FrechetLoss()}), gather_features=False)
    module._trainer = SimpleNamespace(world_size=2, datamodule=None)
    module._real, module._real_source = torch.rand(9, 64), (None, module.features.identity())
    with pytest.raises(ValueError, match="a loss with running moments needs gather_features=True"):
        module.on_train_start()


def test_what_is_not_looked_at_is_not_made(tmp_path, monkeypatch):
    """Noise of the steps for a sampler without any, and minibatches of real images for a loss with a bank."""
    drawn, batches = [], []

    def noted(name, function):
        def wrapped(*args):
            drawn.append((name, args[-1]))
            return function(*args)

        return wrapped

    for name in ("batch_noise", "held_out_noise"):
        for module_name in ("module", "sampling"):
            target = sys.modules[f"ddss_lightning.{module_name}"]
            if hasattr(target, name):
                monkeypatch.setattr(target, name, noted(name, getattr(target, name)))

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch.dtype)

    quiet, noisy = {"learn": ("mu", "nu")}, {"learn": ("mu", "std")}
    for sampler, loss, draws, dtype in (
        (quiet, KIDLoss(), 1, torch.int64),
        (noisy, KIDLoss(real="batch"), 3, torch.float32),
    ):
        drawn.clear()
        batches.clear()
        module = make(sampler=sampler, loss=loss, microbatch_size=8)
        trainer(tmp_path, 1, callbacks=[Look()], enable_checkpointing=False).fit(module, data())
        assert {count for name, count in drawn if name == "batch_noise"} == {draws}
        assert set(batches) == {dtype}
    # A sampler without noise makes the same images with noise of no weight.
    x_T, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 2, 1, 8, 8)
    sampler = make(sampler=quiet).sampler
    with torch.no_grad():
        assert torch.equal(sampler(module.denoiser, x_T), sampler(module.denoiser, x_T, noise=noise))


def test_learning_rates_of_a_resumed_fit_are_the_module_s(tmp_path):
    """Lower ones are the remedy for a fit that diverged; a checkpoint holds the old ones."""
    trainer(tmp_path, 1).fit(make(lr=1e-2, time_lr=1e-2), data())
    module, runner = make(lr=1e-4, time_lr=1e-3, betas=(0.8, 0.9)), trainer(tmp_path, 2)
    with pytest.warns(UserWarning, match="decay over 4 steps, in the fit that is resumed over 2: the result is not"):
        runner.fit(module, data(), ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=2.ckpt"))
    (optimizer,), (schedule,) = runner.optimizers, (each.scheduler for each in runner.lr_scheduler_configs)
    for group, rate in zip(optimizer.param_groups, (1e-3, 1e-4), strict=True):
        assert group["betas"] == (0.8, 0.9)
        assert group["lr"] == pytest.approx(rate * schedule.lr_lambdas[0](4))


def test_a_resumed_fit_with_another_layer_is_refused(tmp_path):
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh())

    def fit(layer, epochs, ckpt_path=None):
        module = make()
        module.features = ModuleFeatures(encoder, [1, 8, 8], mean=(0.5,), std=(0.5,), layer=layer)
        quality = SampleQuality(dirpath=str(tmp_path / "s"))
        runner = trainer(tmp_path, epochs, callbacks=[quality])
        runner.fit(module, data(), ckpt_path=ckpt_path)
        return runner.checkpoint_callback.best_model_path

    checkpoint = fit("1", 1)
    fit("1", 2, checkpoint)
    with pytest.raises(ValueError, match=r"another loss.*layer 1 instead of .*layer 2"):
        fit("2", 2, checkpoint)
    # Of a checkpoint that does not say what the loss saw, as older ones, the scores do.
    old = torch.load(checkpoint, weights_only=True)
    del old["compared"]["features"]
    torch.save(old, checkpoint)
    with pytest.raises(ValueError, match=r"not comparable.*layer 1 instead of .*layer 2"):
        fit("2", 2, checkpoint)


def test_real_images_in_float64_serve_batches_of_the_loss(tmp_path):
    class Double(DigitsDataModule):
        def real_images(self):
            return TensorImages(load_digits_tensors()[0].double())

    module = make(loss=KIDLoss(real="batch"))
    runner = trainer(tmp_path, 1, enable_checkpointing=False)
    runner.fit(module, Double(batch_size=16, steps_per_epoch=2, num_val_images=24))
    assert runner.global_step == 2


@pytest.mark.parametrize("gauss_newton", [None, GaussNewton(residual_images=24, trial_images=24, dampings=(0.1,))])
def test_features_in_float64_of_images_in_float32(tmp_path, gauss_newton):
    """The gradient is that of features in float32, to their rounding."""
    steps = []
    for dtype in (torch.float32, torch.float64):
        module = make(gauss_newton=gauss_newton, sampler={"learn": ["std"]}, ema_decay=0)
        module.features.to(dtype)
        trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data(1))
        steps.append(module.sampler.corrections["std"].detach())
    assert (steps[0] != 0).all()
    torch.testing.assert_close(*steps, rtol=1e-2, atol=1e-5)


def test_images_far_outside_the_range_of_pixels_are_told(tmp_path):
    """As of a model with other betas or another prediction type: all are clamped."""
    module = make()
    forward = module.denoiser.forward
    module.denoiser.forward = lambda x, t: forward(x, t) * 0.1
    runner = trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"[3-9]\d% of the values of the sampler's images are outside \[-2, 2\]"):
        runner.fit(module, data(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*outside.*")
        trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(make(), data(1))


def test_gradients_that_are_accumulated_later_are_refused(tmp_path):
    later = GradientAccumulationScheduler({0: 1, 4: 2})
    runner = trainer(tmp_path, 1, enable_checkpointing=False, callbacks=[later])
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        runner.fit(make(), data())


def test_a_device_without_float64_is_refused_with_the_remedy():
    module = make()
    strategy = SimpleNamespace(root_device=torch.device("mps"))
    module._trainer = SimpleNamespace(strategy=strategy, precision="32-true")
    with pytest.raises(ValueError, match=r"'mps', which has no float64.* use accelerator='cpu'"):
        module.setup("fit")


def test_another_optimiser_is_refused(tmp_path):
    """Its moments mean nothing to this one."""
    for one, other in ((False, True), (True, False)):
        runner = trainer(tmp_path / str(one), 1, limit_val_batches=0)
        runner.fit(make(full_matrix=one), data())
        with pytest.raises(ValueError, match=r"another loss, teacher, guidance or optimiser \(full_matrix"):
            trainer(tmp_path, 2).fit(
                make(full_matrix=other), data(), ckpt_path=runner.checkpoint_callback.best_model_path
            )


@pytest.mark.parametrize("full_matrix", [False, True])
def test_a_correction_that_is_held_stays(tmp_path, full_matrix):
    module = make(full_matrix=full_matrix)
    module.sampler.corrections["nu"].requires_grad_(False)
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    assert not module.sampler.corrections["nu"].any()
    assert module.sampler.corrections["mu"].any()


def test_processes_keep_equal_what_is_learned_when_the_fit_starts(tmp_path):
    """Held or freed after the module was made: it is what the sampler says then, of another sampler too."""
    module = make()
    module.sampler.corrections["nu"].requires_grad_(False)
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    kept = names - set(module._ddp_params_and_buffers_to_ignore)
    assert kept == {f"sampler.corrections.{name}" for name in module.sampler.corrections if name != "nu"}
    module.sampler.corrections["nu"].requires_grad_(True)
    trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=0).fit(module, data())
    assert "sampler.corrections.nu" not in module._ddp_params_and_buffers_to_ignore


def test_a_sampler_whose_corrections_are_all_held_has_nothing_to_learn(tmp_path):
    module = make()
    module.sampler.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn: all its corrections are held"):
        trainer(tmp_path, 1, enable_checkpointing=False).fit(module, data())


def test_memory_of_an_older_version_is_refused(tmp_path):
    make_it = lambda: make(loss=WeightedSum({"frechet": FrechetLoss()}))  # noqa: E731
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, 1, callbacks=[keep], limit_val_batches=0).fit(make_it(), data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["loss_memory"] = {f"frechet.{name}": value for name, value in saved["loss_memory"]["losses.frechet"].items()}
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="memory of its loss in the form of an older version"):
        trainer(tmp_path, 2).fit(make_it(), data(), ckpt_path=tmp_path / "old.ckpt")
