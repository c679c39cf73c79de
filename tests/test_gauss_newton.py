"""Gauss-Newton on the Frechet distance: the metric to second order, exact steps, one process = two."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from ddss_lightning.data import DigitsDataModule
from ddss_lightning.gauss_newton import GaussNewton
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.losses.frechet import FrechetResidual
from ddss_lightning.metrics import FrechetDistance
from ddss_lightning.module import DDSSModule


def real_features(n=4000, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, dtype=torch.float64, generator=g)
    return torch.randn(n, d, dtype=torch.float64, generator=g) @ mix + 1


@pytest.mark.parametrize("size", [0.02, 0.005])
def test_the_sum_of_squares_is_the_frechet_distance_to_second_order(size):
    real = real_features()
    g = torch.Generator().manual_seed(1)
    moved = real @ (torch.eye(6) + size * torch.randn(6, 6, generator=g)).double() + size * torch.randn(6, generator=g)
    residual = FrechetResidual(real)
    r = residual.residual(residual.moments(moved))
    metric = FrechetDistance(real)
    metric.update(moved)
    # Population covariance here, sample covariance there: 1/n of the covariance's share.
    exact = float(metric.compute()) / residual.scale**2
    assert float(r @ r) == pytest.approx(exact, rel=8 * size + 0.02)


def test_moments_of_equal_batches_average_to_those_of_the_whole():
    x = real_features()
    residual = FrechetResidual(x, rank=3)
    parts = torch.stack([residual.moments(part) for part in x.split(1000)])
    torch.testing.assert_close(parts.mean(0), residual.moments(x))
    assert residual.residual(residual.moments(x)).shape == (3 + 6,)
    assert residual.residual(residual.moments(x)).norm() < 1e-2


def test_a_linear_model_is_solved_in_one_step():
    """Features z + theta: the mean is theta, the covariance does not move; damping shortens by 1 / (1 + lambda)."""
    real = torch.randn(5000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distance = FrechetResidual(real)
    theta = {"mu": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)}

    def moments():
        return distance.moments(real + theta["mu"])

    delta, found = GaussNewton(dampings=(1e-9,), difference=1e-6).step(theta, distance, moments, moments, moments)
    torch.testing.assert_close(delta["mu"], -theta["mu"], rtol=1e-4, atol=1e-6)
    assert found["damping"] == 1e-9
    assert found["expected_distance"] < 1e-6 < found["distance"]
    assert theta["mu"].tolist() == [0.3, -0.2, 0.1]
    delta, _ = GaussNewton(dampings=(1.0,), difference=1e-6).step(theta, distance, moments, moments, moments)
    # J^T J = 1 / scale^2 for a shift of features that are divided by scale.
    share = 1 / (1 + distance.scale**2)
    torch.testing.assert_close(delta["mu"], -share * theta["mu"], rtol=1e-3, atol=1e-5)


def test_no_step_is_taken_that_does_not_help():
    """A distance that the differences misjudge: it is flat where they look and rises beyond."""
    real = real_features(d=2)
    distance = FrechetResidual(real)
    theta = {"mu": torch.zeros(2, dtype=torch.float64)}

    def moments():
        return distance.moments(real + 0.1 + theta["mu"].clamp(max=1e-3) + 100 * theta["mu"].abs().clamp(min=1e-3))

    delta, found = GaussNewton(dampings=(1e-6,), difference=1e-4).step(theta, distance, moments, moments, moments)
    assert found["damping"] == 0
    assert found["expected_distance"] == found["distance"]
    assert (delta["mu"] == 0).all()


@pytest.mark.parametrize("bad", [1, 2])
def test_samples_that_are_not_finite_give_no_step(bad):
    distance = FrechetResidual(real_features(d=2))
    theta = {"mu": torch.ones(2, dtype=torch.float64)}
    delta, found = GaussNewton().step(
        theta, distance, *(lambda: torch.zeros(6).double(),) * bad, *(lambda: torch.full((6,), torch.nan),) * (3 - bad)
    )
    assert found["distance"] != found["distance"]
    assert (delta["mu"] == 0).all()
    assert theta["mu"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual_images": 1}, "residual_images must be at least 2, got 1"),
        ({"trial_images": 0}, "trial_images must be at least 2, got 0"),
        ({"dampings": ()}, "dampings must be positive"),
        ({"dampings": (0.1, 0.0)}, "dampings must be positive"),
        ({"dampings": (0.1, math.nan)}, "dampings must be positive"),
        ({"difference": 0.0}, "Differences must be positive"),
        ({"time_difference": math.nan}, "Differences must be positive"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussNewton(**arguments)


def test_bad_features():
    with pytest.raises(ValueError, match="At least two real feature vectors"):
        FrechetResidual(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        FrechetResidual(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        FrechetResidual(real_features(), rank=0)


# ------------------------------------------------------------------------------------------------------- in a fit


def fit(denoiser, features, max_steps, tmp_path, features_batch_size=None, **kwargs):
    sampler = GGDMSampler(denoiser.schedule, 3, stride="quadratic", learn=("logsnr", "nu"))
    method = GaussNewton(residual_images=512, trial_images=512)
    module = DDSSModule(
        denoiser, sampler, features, batch_size=256, ema_decay=0, gauss_newton=method,
        features_batch_size=features_batch_size,
    )  # fmt: skip
    trainer = Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, log_every_n_steps=1, enable_checkpointing=kwargs.pop("enable_checkpointing", False),
    )  # fmt: skip
    trainer.fit(module, DigitsDataModule(steps_per_epoch=1, num_val_images=64), **kwargs)
    return module, trainer


def test_two_steps_lower_the_distance_and_resume_to_the_last_bit(denoiser, features, tmp_path):
    whole, trainer = fit(denoiser, features, 2, tmp_path)
    assert trainer.logged_metrics["train/distance"] > trainer.logged_metrics["train/expected_distance"]
    start = GGDMSampler(denoiser.schedule, 3, stride="quadratic", learn=())
    distance = FrechetResidual(whole.real_features())
    x_T = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(9))

    def score(sampler):
        with torch.no_grad():
            return distance.residual(distance.moments(features(sampler(denoiser, x_T).clamp(-1, 1)))).norm()

    sampler = GGDMSampler.from_coefficients(denoiser.schedule, whole.sampler.coefficients().detach(), learn=())
    assert score(sampler) < 0.7 * score(start)

    _, first = fit(denoiser, features, 1, tmp_path / "first", enable_checkpointing=True)
    path = tmp_path / "one.ckpt"
    first.save_checkpoint(path)
    resumed, _ = fit(denoiser, features, 2, tmp_path / "second", ckpt_path=path)
    for ours, theirs in zip(resumed.sampler.parameters(), whole.sampler.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_feature_network_takes_its_images_in_parts(denoiser, features, tmp_path, monkeypatch):
    """No more than `features_batch_size` at once in a step, which is that of whole batches."""
    step, sizes = DDSSModule.training_step, []

    def recorded(module, *arguments):
        hook = features.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
        try:
            return step(module, *arguments)
        finally:
            hook.remove()

    whole, _ = fit(denoiser, features, 1, tmp_path / "whole")
    monkeypatch.setattr(DDSSModule, "training_step", recorded)
    parts, _ = fit(denoiser, features, 1, tmp_path / "parts", features_batch_size=100)
    assert set(sizes) == {100, 56}
    for ours, theirs in zip(parts.sampler.parameters(), whole.sampler.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_correction_that_is_held_stays_and_the_others_step_as_if_it_were_not_there(denoiser, features, tmp_path):
    def one_step(learn, held=()):
        sampler = GGDMSampler(denoiser.schedule, 3, stride="quadratic", learn=learn)
        for name in held:
            sampler.corrections[name].requires_grad_(False)
        method = GaussNewton(residual_images=64, trial_images=64, dampings=(0.1,))
        module = DDSSModule(denoiser, sampler, features, batch_size=64, ema_decay=0, gauss_newton=method)
        Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0,
        ).fit(module, DigitsDataModule(steps_per_epoch=1, num_val_images=64))  # fmt: skip
        return module.sampler.corrections

    without, held = one_step(("nu",)), one_step(("nu", "mu"), held=("mu",))
    assert without["nu"].any()
    assert not held["mu"].any()
    assert torch.equal(held["nu"], without["nu"])
