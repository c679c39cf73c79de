"""Conditions by index: what is learned, scored and compared is shown the same classes as its noise is drawn for."""

import copy
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from lightning.pytorch import Trainer

from ddss_lightning import (
    DDSSModule,
    DigitsDataModule,
    GaussNewton,
    GGDMSampler,
    KIDLoss,
    TeacherLoss,
    TeacherPairs,
    WeightedSum,
)
from ddss_lightning.compare import Comparison
from ddss_lightning.compare.candidates import Candidate
from ddss_lightning.compare.protocol import protocol_of
from ddss_lightning.compare.scorer import Scorer
from ddss_lightning.compare.scores import Scores
from ddss_lightning.cost import calls_per_step, teacher_calls
from ddss_lightning.denoisers import DiffusersDenoiser
from ddss_lightning.images import to_pixels
from ddss_lightning.module import CHECKED_IMAGES
from ddss_lightning.noise import held_out_noise, independent_indices, take_turns
from ddss_lightning.scheduler import GGDMScheduler
from tests.test_scheduler import tiny_vae

SMALL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def network(num_labels=4, size=8):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1,
        num_class_embeds=num_labels, **SMALL,
    )  # fmt: skip


@pytest.fixture
def guided(schedule):
    """Classes 0, 1 and 3, at guidance scale 2; the null label is 1."""
    return DiffusersDenoiser(network(), schedule, null_label=1, guidance_scale=2.0)


def classes(key, indices):
    return torch.tensor([0, 2, 3])[take_turns(key, indices, 3)]


def test_turns_are_equal_numbers_in_an_order_of_the_key():
    found = take_turns("validation/0", range(7, 19), 3)
    assert torch.bincount(found).tolist() == [4, 4, 4]
    assert torch.equal(found[3:], take_turns("validation/0", range(10, 19), 3))
    assert torch.equal(take_turns("validation/0", [9, 7], 3), found[[2, 0]])
    starts = {int(take_turns(f"train/0/{step}", [0], 3)) for step in range(20)}
    assert starts == {0, 1, 2}


def test_few_samples_of_many_conditions_are_a_fair_sample_of_them():
    """Of sorted classes the neighbours are alike: 50 in a row would be images of one kind."""
    means = torch.stack([take_turns(f"train/0/{step}", range(50), 1000).double().mean() for step in range(200)])
    # The mean of n of the numbers below N, none twice, has the variance (N^2 - 1) / 12 / n (N - n) / (N - 1).
    expected = (999_999 / 12 / 50 * 950 / 999) ** 0.5
    assert abs(float(means.std()) / expected - 1) < 0.2
    assert abs(float(means.mean()) - 499.5) < 4 * expected / 200**0.5


def test_each_sample_is_shown_the_class_of_its_index(guided):
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([10.0, 500.25, 999.0, 3.0])
    shown = guided.for_samples("test/0", [5, 0, 1, 9])
    labels = classes("test/0", [5, 0, 1, 9])
    assert set(labels.tolist()) == {0, 2, 3}
    with torch.no_grad():
        null, given = (guided.unet(x, t, each).sample for each in (torch.ones(4, dtype=torch.long), labels))
        torch.testing.assert_close(shown(x, t), null + 2 * (given - null), rtol=1e-4, atol=1e-5)
        assert torch.equal(shown(x, t), guided.with_labels(labels, 2.0)(x, t))
    assert shown.fingerprint() == guided.fingerprint()
    assert (guided.evaluations_per_call, guided.with_labels(labels).evaluations_per_call) == (2, 1)
    plain = DiffusersDenoiser(guided.unet, guided.schedule, null_label=1)
    assert plain.for_samples("test/0", [5]) is plain


def test_a_network_without_a_null_label(schedule):
    conditional = DiffusersDenoiser(network(), schedule, guidance_scale=1.0)
    x, t = torch.randn(8, 1, 8, 8), torch.full((8,), 500.0)
    labels = take_turns("k", range(8), 4)
    with torch.no_grad():
        expected = conditional.unet(x, t, labels).sample
        torch.testing.assert_close(conditional.for_samples("k", range(8))(x, t), expected, rtol=1e-4, atol=1e-5)
    for scale in (None, 2.0):
        with pytest.raises(ValueError, match=r"4 classes; give the null_label .* or, .* guidance_scale=1"):
            DiffusersDenoiser(network(), schedule, guidance_scale=scale)
    with pytest.raises(ValueError, match="give the null_label"):
        conditional.with_labels(labels, 3.0)


def test_a_sampler_of_another_guidance_is_warned_of(guided, features, tmp_path):
    sampler = GGDMSampler(guided.schedule, 2)
    module = DDSSModule(guided, sampler, features)
    sampler.save_pretrained(tmp_path, base_model=module.base_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_sampler(tmp_path)
    other = DDSSModule(
        DiffusersDenoiser(guided.unet, guided.schedule, null_label=1, name=guided.name, guidance_scale=3.0),
        GGDMSampler(guided.schedule, 2),
        features,
    )
    with pytest.warns(UserWarning, match=r"learned with other settings of the model: guidance_scale 2\.0, now 3\.0\."):
        other.load_sampler(tmp_path)


def test_scores_say_how_conditions_are_ordered(guided, features, tmp_path):
    """Those of a model that shows none stay what they were."""
    settings, trainer = Comparison(steps=[2], output=tmp_path), Trainer(accelerator="cpu", logger=False)

    def protocol(denoiser):
        module = DDSSModule(denoiser, GGDMSampler(guided.schedule, 2), features)
        return protocol_of(module, DigitsDataModule(), trainer, settings)

    found = protocol(guided)
    assert "random order" in found.pop("conditions")
    alone = protocol(DiffusersDenoiser(guided.unet, guided.schedule, null_label=1, name=guided.name))
    assert {**found, "model_settings": {"null_label": 1}} == alone


def test_wrong_guidance(guided, denoiser):
    with pytest.raises(ValueError, match="has no classes, so there is nothing to guide it to"):
        DiffusersDenoiser(network(1), guided.schedule, null_label=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="has no classes, so there is nothing to guide it to"):
        DiffusersDenoiser(denoiser.unet, denoiser.schedule, guidance_scale=1.0)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance_scale must be a number of at least 0"):
            DiffusersDenoiser(guided.unet, guided.schedule, null_label=1, guidance_scale=scale)
    with pytest.raises(ValueError, match="call what `for_samples"):
        guided(torch.zeros(2, 1, 8, 8), torch.zeros(2))


def fitted(module, tmp_path, batches=1):
    gradients = []
    module.on_before_optimizer_step = lambda _: gradients.append(
        torch.cat([value.grad.flatten() for value in module.sampler.parameters()])
    )
    Trainer(
        max_steps=batches, accelerator="cpu", limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, DigitsDataModule(batch_size=6, steps_per_epoch=1))  # fmt: skip
    return gradients


def test_the_gradient_is_that_of_the_classes_whole_and_in_parts(guided, features, tmp_path):
    """Against a denoiser that is shown the labels of the batch, and with the batch in parts of 4 and 2.

    The labels are independent of each other: in turn they would be two of each class.
    """
    drawn = independent_indices(("train", 0, 0), 0, 6)
    assert sorted(classes("train/0/0", drawn).tolist()) != [0, 0, 2, 2, 3, 3]
    fixed = copy.copy(guided)
    of_drawn = dict(zip(drawn, classes("train/0/0", drawn).tolist(), strict=True))
    fixed.for_samples = lambda _, indices: guided.with_labels([of_drawn.get(index, 0) for index in indices], 2.0)
    gradients = []
    for denoiser, options in ((fixed, {}), (guided, {}), (guided, {"microbatch_size": 4, "remat": "denoiser"})):
        module = DDSSModule(denoiser, GGDMSampler(guided.schedule, 3), features, batch_size=6, **options)
        gradients += fitted(module, tmp_path)
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_a_gauss_newton_step_with_classes(guided, features, tmp_path):
    method = GaussNewton(residual_images=40, trial_images=20, dampings=(0.1,))
    sampler = GGDMSampler(guided.schedule, 2, learn=("time",))
    module = DDSSModule(guided, sampler, features, batch_size=8, gauss_newton=method)
    seen = []
    guided.unet.register_forward_hook(lambda _module, arguments, _output: seen.append(len(arguments[0])))
    fitted(module, tmp_path)
    # Two calls, each of them two evaluations, for the images whose range is looked at.
    assert sum(seen) == calls_per_step(module) + 2 * 2 * CHECKED_IMAGES


def test_held_out_images_and_the_grid_are_of_the_classes_of_their_indices(guided, features, tmp_path):
    module = DDSSModule(guided, GGDMSampler(guided.schedule, 3), features, seed=4)
    x_T, noise = held_out_noise("validation/4", [3, 8], (1, 8, 8), 3)
    with torch.no_grad():
        expected = to_pixels(module.sampler(guided.with_labels(classes("validation/4", [3, 8]), 2.0), x_T, noise=noise))
        assert torch.equal(module.validation_step(torch.tensor([3, 8]), 0), expected)
    scores, settings = Scores(tmp_path / "scores.json", {}), Comparison(num_images=20)
    scorer = Scorer(module, DigitsDataModule(), Trainer(logger=False), scores, settings, None, lambda _: None)
    grid = scorer.images(Candidate("ours", 3, "learned", module.sampler), seed=4)
    with torch.no_grad():
        assert torch.equal(grid[:10], module.test_step(torch.arange(len(grid)), 0)[:10])


def test_the_teacher_s_images_are_of_the_classes_of_their_pairs(guided, features, tmp_path):
    pairs = TeacherPairs(num_pairs=10, num_steps=6, chunk_size=4, cache_dir=str(tmp_path))
    pairs.make(guided)
    indices = [9, 0, 4]
    x_T = pairs.noise(indices, (1, 8, 8))
    with torch.no_grad():
        labelled = guided.with_labels(classes("teacher/0", indices), 2.0)
        expected = to_pixels(GGDMSampler(guided.schedule, 6, stride="quadratic")(labelled, x_T))
    torch.testing.assert_close(pairs.load(guided)[indices], expected, rtol=0, atol=1.01 / 127.5)
    other = DiffusersDenoiser(guided.unet, guided.schedule, null_label=1, guidance_scale=3.0)
    plain = DiffusersDenoiser(guided.unet, guided.schedule, null_label=1)
    assert len({pairs.folder(each) for each in (guided, other, plain)}) == 3
    refused = pytest.raises(ValueError, match="Use the denoiser without `with_labels`, with a `guidance_scale`")
    with refused:
        pairs.make(labelled)
    with refused:
        DDSSModule(labelled, GGDMSampler(guided.schedule, 2), features)
    # A sampler that is the teacher hits its images: each pair is shown its own class in the fit, too.
    loss = WeightedSum({"kid": KIDLoss(), "teacher": TeacherLoss(distance="l2")}, {"kid": 0.0})
    module = DDSSModule(
        guided, GGDMSampler(guided.schedule, 6, stride="quadratic"), features, loss=loss, batch_size=5, teacher=pairs
    )
    fitted(module, tmp_path)
    assert float(module.loss.terms["teacher"]) < 1e-4
    assert teacher_calls(module) == 2 * 10 * 6
    assert calls_per_step(module) == 2 * 5 * (2 * 6 - 1)


def test_a_fit_is_not_gone_on_with_at_another_guidance(guided, features, tmp_path):
    def fit(denoiser, steps, path=None):
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 3), features, batch_size=6)
        trainer.fit(module, DigitsDataModule(batch_size=6, steps_per_epoch=1), ckpt_path=path)
        return trainer

    fit(guided, 1).save_checkpoint(tmp_path / "a.ckpt")
    other = DiffusersDenoiser(guided.unet, guided.schedule, null_label=1)
    with pytest.raises(ValueError, match=r"optimiser \(denoiser.guidance_scale: 2.0 instead of None\)"):
        fit(other, 2, tmp_path / "a.ckpt")
    assert fit(guided, 2, tmp_path / "a.ckpt").global_step == 2


def test_a_dit_makes_the_images_of_its_pipeline(tmp_path):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False, steps_offset=1)).save_pretrained(tmp_path)
    denoiser = DiffusersDenoiser.from_pretrained(str(tmp_path), guidance_scale=3.0)
    assert (denoiser.null_label, denoiser.num_conditions, denoiser.state_shape) == (1000, 1000, (4, 8, 8))
    assert denoiser.image_shape == (3, 16, 16)
    sampler = GGDMSampler(denoiser.schedule, 4)
    pipeline = DiTPipeline.from_pretrained(tmp_path)
    pipeline.scheduler = GGDMScheduler.from_sampler(sampler)
    pipeline.set_progress_bar_config(disable=True)
    labels = take_turns("test/0", range(3), 1000)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        labels.tolist(), guidance_scale=3.0, num_inference_steps=4, generator=generator, output_type="np"
    ).images
    x_T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = denoiser.decode(sampler(denoiser.for_samples("test/0", range(3)), x_T))
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, rtol=1e-4, atol=1e-4)
