import contextlib
import logging
import math
import os
import signal
import types
import warnings

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddss_lightning import (
    ConvFeatures,
    DigitsDataModule,
    GGDMSampler,
    Interruption,
    ResidualFeatures,
    SampleQuality,
    SamplerPictures,
    SamplingModule,
)
from ddss_lightning.images import to_pixels
from ddss_lightning.metrics import frechet_distance, gaussian_moments
from ddss_lightning.noise import held_out_noise
from ddss_lightning.pictures import image_grid
from ddss_lightning.saved import read_card
from tests.conftest import FEATURES
from tests.test_module import data, make, trainer


def logged(tmp_path, callbacks):
    runner = trainer(tmp_path, 2, callbacks=callbacks, enable_checkpointing=False, log_every_n_steps=1)
    logger = TensorBoardLogger(tmp_path, name="tb", default_hp_metric=False)
    runner.loggers = [logger]
    module = make()
    runner.fit(module, data())
    return runner, module, EventAccumulator(logger.log_dir).Reload()


def test_scores_and_pictures_reach_tensorboard(tmp_path):
    quality = SampleQuality()
    _, module, events = logged(tmp_path, [quality, SamplerPictures(num_images=8, columns=4, scale=2)])
    tags = events.Tags()
    assert {"val/fid", "val/kid", "val/is", "val/best_fid", "train/kid", "train/grad_norm"} <= set(tags["scalars"])
    assert {"samples", "mu", "times"} <= set(tags["images"])
    # The table of hyperparameters shows the scores of the sampler that was kept.
    assert events.Scalars("best/fid")[-1].value == pytest.approx(quality.best["fid"], rel=1e-6)
    # At the number of steps, as the pictures are; first the start.
    found = {event.step: event.value for event in events.Scalars("val/fid")}
    assert list(found) == [event.step for event in events.Scalars("val/best_fid")] == [0, 2, 4]
    assert [event.step for event in events.Images("mu")] == [2, 4]
    assert found[0] == pytest.approx(quality.initial["fid"], rel=1e-6)
    assert found[quality.best_step] == min(found.values()) == pytest.approx(quality.best["fid"], rel=1e-6)
    folder = tmp_path / "tb" / "version_0"
    with Image.open(folder / "pictures" / "samples.png") as picture:
        assert picture.size == (4 * 17, 2 * 17)
    assert (folder / "pictures" / "mu.png").is_file()
    card = read_card(folder / "sampler")
    assert card["scores"]["validation"] == quality.best
    assert card["base_model"]["fingerprint"] == module.denoiser.fingerprint()
    saved = GGDMSampler.from_pretrained(folder / "sampler")
    assert torch.equal(saved.corrections["mu"], module.sampler.corrections["mu"])


def test_the_last_steps_are_drawn_too(tmp_path):
    """Three steps in epochs of two, or of ten: what is drawn in the end is what the fit ended with."""
    for steps_per_epoch in (2, 10):
        pictures = SamplerPictures(num_images=8, columns=4, scale=2)
        options = {"callbacks": [pictures], "enable_checkpointing": False, "max_steps": 3}
        runner, module = trainer(tmp_path / str(steps_per_epoch), -1, **options), make()
        images = data(steps_per_epoch)
        # Never more at once than in a validation.
        images.eval_batch_size, sizes, samples = 5, [], module.samples
        module.samples = lambda split, indices, samples=samples, sizes=sizes: (
            sizes.append(len(indices)) or samples(split, indices)
        )
        runner.fit(module, images)
        assert max(sizes) == 5
        assert pictures.steps == ([0, 2, 3] if steps_per_epoch == 2 else [0, 3])
        assert pictures.times[-1] == module.averaged.timesteps().tolist()
        with torch.no_grad():
            parts = torch.arange(8).split(runner.datamodule.eval_batch_size)
            images = torch.cat([module.samples("validation", part) for part in parts])
            expected = image_grid(images, 4, 2)
        folder = tmp_path / str(steps_per_epoch) / "pictures"
        assert torch.equal(pictures._grid, expected)
        assert {path.name for path in folder.iterdir()} == {"samples.png", "mu.png", "times.png"}


def test_curves_of_an_earlier_fit_are_not_those_of_the_next(tmp_path):
    """But a resumed fit goes on with its own."""
    pictures = SamplerPictures(num_images=8)
    for folder in ("first", "second"):
        runner = trainer(tmp_path / folder, 1, callbacks=[pictures])
        runner.fit(make(), data(1))
        assert pictures.steps == [0, 1]
    path = runner.checkpoint_callback.best_model_path
    again = SamplerPictures(num_images=8)
    trainer(tmp_path / "again", 2, callbacks=[again], enable_checkpointing=False).fit(make(), data(1), ckpt_path=path)
    assert again.steps == [0, 1, 2]


class Scripted(SampleQuality):
    """Samplers have these scores, whatever they are."""

    def __init__(self, fids, **options):
        super().__init__(**options)
        self.fids = list(fids)

    def _compute(self, trainer):
        self.scores = {"fid": self.fids.pop(0)}
        return self.scores


@pytest.mark.parametrize(
    ("tolerance", "fids", "kept"),
    [
        (0.0, [10, 8, 8.1, 8.5, 8.05], 1),
        (0.02, [10, 8, 8.1, 8.5, 8.05], 4),
        # Of the lowest ever, not of the one that is kept: no drift.
        (0.02, [10, 8, 8.1, 8.2, 8.3], 2),
        (0.02, [10, 10.1, 10.2, 10.1, 10.1], 0),
        (0.02, [10, 9.9, 10.05, math.nan, 12], 1),
        # A KID may be below zero.
        (0.1, [3, -1, -0.8, -0.95, 2], 3),
    ],
)
def test_the_last_of_about_the_best_is_kept(tmp_path, tolerance, fids, kept):
    quality = Scripted(fids, tolerance=tolerance, dirpath=str(tmp_path / "sampler"))
    trainer(tmp_path, 4, callbacks=[quality], enable_checkpointing=False).fit(make(), data(1))
    assert (quality.best_step, quality.best["fid"]) == (kept, fids[kept])
    assert read_card(tmp_path / "sampler")["scores"]["training_step"] == kept
    # A resumed fit knows the lowest, too.
    resumed = SampleQuality(tolerance=tolerance)
    resumed.load_state_dict(quality.state_dict())
    assert resumed._lowest == min(fid for fid in fids if not math.isnan(fid))


def test_what_does_not_learn_has_the_same_scores(tmp_path):
    learner, scores = make(seed=3), []
    for module in (learner, SamplingModule(learner.denoiser, learner.sampler, learner.features, seed=3)):
        callbacks = [SampleQuality(), SamplerPictures()]
        trainer(tmp_path, 1, callbacks=callbacks, enable_checkpointing=False).validate(module, data(), verbose=False)
        scores.append(callbacks[0].scores)
    assert scores[0] == scores[1]
    assert scores[0]["fid"] > 0


def test_the_score_is_the_formula_on_the_held_out_noise(tmp_path):
    quality = SampleQuality()
    module = make()
    runner = trainer(tmp_path, 1, callbacks=[quality], enable_checkpointing=False)
    (result,) = runner.test(module, data(), verbose=False)
    with torch.no_grad():
        x_T, noise = held_out_noise("test/0", list(range(20)), (1, 8, 8), 3)
        made = module.features(to_pixels(module.sampler(module.denoiser, x_T, noise=noise)))
        expected = frechet_distance(*gaussian_moments(made), *gaussian_moments(module.real_features()))
    assert result["test/fid"] == pytest.approx(expected.item(), rel=1e-4)


def test_scores_follow_the_feature_network(tmp_path):
    """Replaced, and changed in place; they stayed those of the one before."""
    module, datamodule = make(), data()
    other = ConvFeatures.from_pretrained(FEATURES)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)

    def fid(each):
        runner = trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False)
        return runner.validate(each, datamodule, verbose=False)[0]["val/fid"]

    first, expected = fid(module), fid(SamplingModule(module.denoiser, module.sampler, other))
    module.features.load_state_dict(other.state_dict())
    assert fid(module) == expected != first
    module.features = ConvFeatures.from_pretrained(FEATURES).freeze()
    assert fid(module) == first


def test_without_a_logger_nobody_asks_for_one(tmp_path):
    """As in `ddss compare`, which takes the loggers off."""
    for run in ("validate", "test"):
        runner = trainer(tmp_path, 1, callbacks=[SampleQuality()], enable_checkpointing=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*no logger configured.*")
            (result,) = getattr(runner, run)(make(), data(), verbose=False)
        assert {"validate": "val/fid", "test": "test/fid"}[run] in result


def test_scores_that_nobody_takes_are_told(tmp_path):
    for run in ("validate", "test"):
        with pytest.warns(UserWarning, match=r"No callback looks at the images: give the Trainer SampleQuality\(\)"):
            assert getattr(trainer(tmp_path, 1), run)(make(), data(), verbose=False) == [{}]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="No callback looks")
            assert getattr(trainer(tmp_path, 1, callbacks=[SampleQuality()]), run)(make(), data(), verbose=False)[0]


def test_a_judge_looks_on(tmp_path):
    """The same fit with it and without; its score is the formula in its own features; a wrong shape is refused."""
    judge = ResidualFeatures(1, 8, 8)
    alone, judged = SampleQuality(dirpath=str(tmp_path / "a")), SampleQuality(dirpath=str(tmp_path / "b"), judge=judge)
    for quality in (alone, judged):
        module = make()
        runner = trainer(tmp_path, 2, callbacks=[quality], enable_checkpointing=False)
        runner.fit(module, data())
    assert {"val/judge_fid", "val/judge_kid", "val/best_fid"} <= runner.callback_metrics.keys()
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert alone.best.items() <= judged.best.items()
    assert all(torch.equal(value, judged.best_sampler[name]) for name, value in alone.best_sampler.items())
    with torch.no_grad():
        x_T, noise = held_out_noise("validation/0", list(range(24)), (1, 8, 8), 3)
        made = judge(to_pixels(make().sampler(module.denoiser, x_T, noise=noise)))
        real = judge(torch.cat(list(data().real_dataloader())))
    expected = frechet_distance(*gaussian_moments(made), *gaussian_moments(real))
    assert judged.initial["judge_fid"] == pytest.approx(expected.item(), rel=1e-4)
    runner = trainer(tmp_path, 1, callbacks=[SampleQuality(judge=ResidualFeatures(3, 8, 8))])
    with pytest.raises(ValueError, match=r"judge takes images of shape \(3, 8, 8\), the model '.*' makes \(1, 8, 8\)"):
        runner.test(make(), data())


def test_without_a_logger_another_folder_for_the_whole_run_is_named(tmp_path):
    """The first remedy led from one refusal to the next."""

    def fit(folder, **options):
        callbacks = [SampleQuality(**options), Interruption()]
        trainer(folder, 1, callbacks=callbacks).fit(make(), data(1))

    fit(tmp_path)
    with pytest.raises(ValueError, match=r"overwrite=true\), or the whole run another --trainer\.default_root_dir\."):
        fit(tmp_path)
    with pytest.raises(ValueError, match=r"\(dirpath, or without a logger --trainer\.default_root_dir\)\."):
        fit(tmp_path, overwrite=True)
    fit(tmp_path / "other")


def test_existing_sampler_is_not_overwritten(tmp_path):
    module = make()
    module.sampler.save_pretrained(tmp_path / "s")
    runner = trainer(tmp_path, 1, callbacks=[SampleQuality(dirpath=str(tmp_path / "s"))], enable_checkpointing=False)
    with pytest.raises(ValueError, match="already holds a sampler; give another dirpath"):
        runner.fit(module, data())
    with pytest.raises(ValueError, match=r"tolerance must be a number of at least 0, got -0\.1"):
        SampleQuality(tolerance=-0.1)
    with pytest.raises(ValueError, match="monitor must be 'fid' or 'kid', got 'is'"):
        SampleQuality("is")


def test_a_fit_goes_on_in_its_own_folder(tmp_path):
    """With the folder named in both, as the line says that an interrupted fit ends with."""
    for epochs, checkpoint in ((1, None), (2, tmp_path / "last.ckpt")):
        quality = SampleQuality(dirpath=str(tmp_path / "s"))
        runner = trainer(tmp_path, epochs, callbacks=[quality, Interruption(dirpath=str(tmp_path))])
        module = make()
        runner.fit(module, data(), ckpt_path=checkpoint)
        assert module.global_step == 2 * epochs
    assert (tmp_path / "s" / "sampler.json").exists()


def test_a_resumed_fit_does_not_overwrite_the_sampler_of_another(tmp_path):
    """Asked to, it puts its own there at once, though it finds no better one."""
    parts = [SampleQuality(dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))]
    trainer(tmp_path, 1, callbacks=parts).fit(make(lr=5.0, time_lr=5.0, warmup_steps=0), data())
    assert parts[0].best_step == 0
    GGDMSampler(make().denoiser.schedule, 7).save_pretrained(tmp_path / "other")

    def resume(**options):
        quality = SampleQuality(dirpath=str(tmp_path / "other"), **options)
        runner = trainer(tmp_path, 2, callbacks=[quality], enable_checkpointing=False)
        runner.fit(make(lr=5.0, time_lr=5.0, warmup_steps=0), data(), ckpt_path=tmp_path / "last.ckpt")

    with pytest.raises(ValueError, match="other' already holds a sampler; give another dirpath or overwrite=True"):
        resume()
    assert read_card(tmp_path / "other")["nfe"] == 7
    resume(overwrite=True)
    for name in ("sampler.json", "sampler.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "s" / name).read_bytes()


def test_one_callback_for_two_fits(tmp_path):
    """The second one's scores and sampler are its own."""
    quality = SampleQuality(dirpath=str(tmp_path / "one"))
    trainer(tmp_path, 1, callbacks=[quality], enable_checkpointing=False).fit(make(), data())
    quality.dirpath = str(tmp_path / "two")
    second = make(lr=5.0, warmup_steps=0, seed=1)
    trainer(tmp_path, 1, callbacks=[quality], enable_checkpointing=False).fit(second, data())
    alone = SampleQuality(dirpath=str(tmp_path / "alone"))
    fresh = make(lr=5.0, warmup_steps=0, seed=1)
    trainer(tmp_path, 1, callbacks=[alone], enable_checkpointing=False).fit(fresh, data())
    assert (quality.initial, quality.best, quality.best_step) == (alone.initial, alone.best, alone.best_step)
    for name in ("sampler.json", "sampler.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_part_of_the_validation_images_is_the_same_part_for_every_sampler(tmp_path):
    """Half of three batches is one, for the initial sampler, too."""
    counts = []

    class Look(SampleQuality):
        def _select(self, trainer, module):
            super()._select(trainer, module)
            counts.append(self.num_images)

    images = DigitsDataModule(batch_size=16, steps_per_epoch=1, num_val_images=24, eval_batch_size=8)
    runner = trainer(tmp_path, 1, callbacks=[Look()], enable_checkpointing=False, limit_val_batches=0.5)
    runner.fit(make(), images)
    assert counts == [8, 8]


def test_the_last_steps_are_scored_and_the_sampler_is_where_it_is_said_to_be(tmp_path):
    """Three steps in epochs of two, and a finished fit that is resumed in another folder."""
    scored = []

    class Look(SampleQuality):
        def _select(self, trainer, module):
            super()._select(trainer, module)
            scored.append(trainer.global_step)

    def parts(name):
        return [Look(dirpath=str(tmp_path / name)), Interruption(dirpath=str(tmp_path))]

    runner = trainer(tmp_path, -1, callbacks=parts("s"), max_steps=3)
    runner.fit(make(), data())
    assert scored == [0, 2, 3]
    trainer(tmp_path, -1, callbacks=parts("other"), max_steps=3).fit(make(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "other" / "sampler.json").exists()


def test_a_finished_fit_that_is_resumed_has_its_last_score(tmp_path):
    """It was scored after the last checkpoint: resumed, the fit ended with the sampler before."""

    def part(fids):
        return [Scripted(fids, dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))]

    first, again = part([10, 9, 8]), part([])
    runner, module = trainer(tmp_path, -1, callbacks=first, max_steps=3), make()
    runner.fit(module, data())
    assert (first[0].best_step, first[0].best["fid"]) == (3, 8)
    resumed = make()
    trainer(tmp_path, -1, callbacks=again, max_steps=3).fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt")
    assert (again[0].best_step, again[0].best["fid"]) == (3, 8)
    for name, value in module.sampler.state_dict().items():
        assert torch.equal(value, resumed.sampler.state_dict()[name])
    assert module.sampler.state_dict()


def test_told_to_stop_while_the_last_sampler_is_scored(tmp_path, caplog):
    """Once; the last steps are in the checkpoint, and a line says where it is."""
    told = []

    class Told(SampleQuality):
        def _update(self, images, indices):
            if self._scored_step == 2 and not told:
                told.append(os.kill(os.getpid(), signal.SIGTERM))
            super()._update(images, indices)

    callbacks = [Told(dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))]
    runner, module = trainer(tmp_path, -1, callbacks=callbacks, max_steps=3), make()
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        runner.fit(module, data())
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"SIGTERM after step 3: saved '{tmp_path / 'last.ckpt'}'" in caplog.text
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 3
    assert callbacks[0].best_step < 3
    # The score that is missing is all that is left to do.
    again = [Told(dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))]
    trainer(tmp_path, -1, callbacks=again, max_steps=3).fit(make(), data(), ckpt_path=tmp_path / "last.ckpt")
    whole = SampleQuality(dirpath=str(tmp_path / "whole"))
    trainer(tmp_path, -1, callbacks=[whole], max_steps=3, enable_checkpointing=False).fit(make(), data())
    assert (again[0].best_step, again[0].best) == (whole.best_step, whole.best)
    assert again[0].scores == whole.scores


@pytest.mark.parametrize("told", [True, False])
def test_a_checkpoint_of_the_last_step_has_its_score(tmp_path, told):
    """The third of three steps in epochs of two, without a validation; told to stop there, or saved each step."""

    class Tell(Callback):
        def on_train_batch_end(self, trainer, *_):
            if told and trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    quality = Scripted([10, 9, 8], dirpath=str(tmp_path / "s"))
    keep = Interruption(minutes=10 if told else 0, dirpath=str(tmp_path))
    runner = trainer(tmp_path, -1, callbacks=[Tell(), quality, keep], max_steps=3)
    with pytest.raises(SystemExit) if told else contextlib.nullcontext():
        runner.fit(make(), data())
    again = Scripted([], dirpath=str(tmp_path / "s"))
    parts = [again, Interruption(dirpath=str(tmp_path))]
    trainer(tmp_path, -1, callbacks=parts, max_steps=3).fit(make(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert (again.best_step, again.best["fid"], again._scored_step) == (3, 8, 3)


def test_a_trainer_that_takes_more_steps_goes_on_in_its_own_folder(tmp_path):
    quality = Scripted([10, 9, 8], dirpath=str(tmp_path / "s"))
    parts = [quality, Interruption(dirpath=str(tmp_path))]
    runner, module = trainer(tmp_path, -1, callbacks=parts, max_steps=2), make()
    runner.fit(module, data())
    runner.fit_loop.epoch_loop.max_steps = 4
    runner.fit(module, data())
    assert (runner.global_step, quality.best_step) == (4, 4)


def test_scores_of_fewer_images_are_not_compared(tmp_path):
    parts = [Scripted([10, 9], dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))]
    trainer(tmp_path, 1, callbacks=parts).fit(make(), data())

    def resume(**options):
        parts = [Scripted([8], dirpath=str(tmp_path / "s")), Interruption(dirpath=str(tmp_path))]
        runner = trainer(tmp_path, 2, callbacks=parts, **options)
        images = DigitsDataModule(batch_size=16, steps_per_epoch=2, num_val_images=24, eval_batch_size=8)
        runner.fit(make(), images, ckpt_path=tmp_path / "last.ckpt")

    with pytest.raises(ValueError, match=r"limit_val_batches: None instead of 1 batches of 8 images"):
        resume(limit_val_batches=1)
    resume(limit_val_batches=1.0)


def test_checkpoints_every_few_minutes_after_each_epoch_and_never_before_a_validation(tmp_path, monkeypatch):
    """Four steps an epoch, a validation after each second one, a minute a step, a checkpoint every minute."""
    saved, validated = [], []
    module = make()
    keep = Interruption(minutes=1, dirpath=str(tmp_path))
    clock = types.SimpleNamespace(monotonic=lambda: 60.0 * module.global_step)
    monkeypatch.setattr("ddss_lightning.callbacks.interruption.time", clock)

    class Look(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(trainer.global_step)

        def on_validation_start(self, trainer, pl_module):
            validated.append(trainer.global_step)
            assert saved[-1] < trainer.global_step

    runner = trainer(tmp_path, 2, callbacks=[Look(), keep], val_check_interval=2)
    runner.fit(module, data(steps=4))
    assert validated == [2, 4, 6, 8]
    assert saved == [1, 3, 4, 5, 7, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(ValueError, match="minutes must be at least 0, got -1"):
        Interruption(minutes=-1)


def test_the_trainer_s_own_checkpoint_plugin_stays(tmp_path):
    class Plugin(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *arguments, **options):
            Plugin.saved += 1
            super().save_checkpoint(*arguments, **options)

    runner = trainer(tmp_path, 1, callbacks=[Interruption(dirpath=str(tmp_path))], plugins=[Plugin()])
    runner.fit(make(), data())
    assert Plugin.saved == 1


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer(tmp_path, 1, callbacks=[Interruption(dirpath=str(tmp_path))]).fit(make(), data())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("others", [[], [Interruption]])
def test_told_to_stop_while_the_initial_sampler_is_scored(tmp_path, caplog, others):
    """After the batch that is under way: no score, no file, and a line that says how to go on."""
    module, batches = make(), []
    original = module.validation_step

    def validation_step(batch, batch_idx):
        batches.append(batch_idx)
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, batch_idx)

    module.validation_step = validation_step
    module.training_step = lambda *_: pytest.fail("a step was taken")
    before = signal.getsignal(signal.SIGTERM)
    callbacks = [SampleQuality(dirpath=str(tmp_path / "s")), *(each(dirpath=str(tmp_path)) for each in others)]
    runner = trainer(tmp_path, 1, callbacks=callbacks, enable_checkpointing=bool(others))
    samples = DigitsDataModule(batch_size=16, steps_per_epoch=2, num_val_images=24, eval_batch_size=4)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        runner.fit(module, samples)
    assert ended.value.code == 128 + signal.SIGTERM
    assert batches == [0, 1]
    assert not list(tmp_path.rglob("*"))
    assert "SIGTERM after step 0: nothing was learned since the start. To start again: the same command" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before


def test_images_that_are_not_finite_give_no_score_and_end_nothing(tmp_path):
    """One image of 24 at candidate 0 and at the first validation; the second validation is sound."""
    quality = SampleQuality(dirpath=str(tmp_path / "s"), precision_recall=True, judge=ResidualFeatures(1, 8, 8))
    module = make()
    original, seen = module.validation_step, []

    def validation_step(batch, batch_idx):
        images = original(batch, batch_idx)
        if quality._counts[0] == 0:
            seen.append(batch_idx)
        if len(seen) <= 2 and 5 in batch.tolist():
            images[batch.tolist().index(5), 0, 3, 3] = torch.nan
        return images

    module.validation_step = validation_step
    scores = []
    module.on_validation_epoch_end = lambda: scores.append((quality.num_not_finite, dict(quality.scores)))
    datamodule = data()
    datamodule.eval_batch_size = 10
    with (
        pytest.warns(UserWarning, match=r"Step 0: .* not finite \(1 of 24\); look for NaN in the model's weights"),
        pytest.warns(UserWarning, match=r"Step 2: .* not finite \(1 of 24\); lower the learning rate. It is not kept"),
    ):
        trainer(tmp_path, 2, callbacks=[quality], enable_checkpointing=False).fit(module, datamodule)
    both = {"fid", "kid", "precision", "recall", "density", "coverage"}
    names = both | {"is"} | {f"judge_{name}" for name in both}
    assert quality.initial.keys() == names
    assert all(math.isnan(value) for value in quality.initial.values())
    # Callbacks come before the module: each validation is seen right after its scores.
    (first_count, first), (second_count, second) = scores
    assert (first_count, second_count) == (1, 0)
    assert first.keys() == second.keys() == names
    assert all(math.isnan(value) for value in first.values())
    assert all(math.isfinite(value) for value in second.values())
    assert quality.best == second
    assert read_card(tmp_path / "s")["scores"]["validation"] == second


def test_a_test_run_says_what_is_not_finite(tmp_path):
    quality, module = SampleQuality(), make()
    module.averaged.corrections["mu"].data[0] = torch.inf
    runner = trainer(tmp_path, 1, callbacks=[quality], enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"No scores: .* not finite \(20 of 20\); look for NaN .*`print\(sampler\)`"):
        (result,) = runner.test(module, data(), verbose=False)
    assert math.isnan(result["test/fid"])
