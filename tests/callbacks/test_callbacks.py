import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddss_lightning import GGDMSampler, SampleQuality, SamplerPictures
from ddss_lightning.ggdm import read_card
from ddss_lightning.images import to_pixels
from ddss_lightning.metrics import frechet_distance, gaussian_moments
from ddss_lightning.noise import held_out_noise
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
    assert len(events.Scalars("val/fid")) == 2
    best = min([quality.initial["fid"], *(event.value for event in events.Scalars("val/fid"))])
    assert quality.best["fid"] == pytest.approx(best, rel=1e-6)
    folder = tmp_path / "tb" / "version_0"
    with Image.open(folder / "pictures" / "samples.png") as picture:
        assert picture.size == (4 * 17, 2 * 17)
    assert (folder / "pictures" / "mu.png").is_file()
    card = read_card(folder / "sampler")
    assert card["scores"]["validation"] == quality.best
    assert card["base_model"]["fingerprint"] == module.denoiser.fingerprint()
    saved = GGDMSampler.from_pretrained(folder / "sampler")
    assert torch.equal(saved.corrections["mu"], module.sampler.corrections["mu"])


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


def test_existing_sampler_is_not_overwritten(tmp_path):
    module = make()
    module.sampler.save_pretrained(tmp_path / "s")
    runner = trainer(tmp_path, 1, callbacks=[SampleQuality(dirpath=str(tmp_path / "s"))], enable_checkpointing=False)
    with pytest.raises(ValueError, match="already holds a sampler; give another dirpath"):
        runner.fit(module, data())
    with pytest.raises(ValueError, match="monitor must be 'fid' or 'kid', got 'is'"):
        SampleQuality("is")
