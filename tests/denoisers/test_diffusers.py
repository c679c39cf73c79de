import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    LDMPipeline,
    UNet2DModel,
)
from huggingface_hub import errors
from lightning.pytorch import Trainer
from torch._dynamo.testing import CompileCounter

from ddss_lightning import DDSSModule, DigitsDataModule, SamplingModule, TeacherPairs
from ddss_lightning.compare import Comparison
from ddss_lightning.compare.candidates import Candidate
from ddss_lightning.compare.scorer import Scorer
from ddss_lightning.compare.scores import Scores
from ddss_lightning.denoisers import DiffusersDenoiser
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.noise import held_out_noise
from ddss_lightning.remat import measured_call
from ddss_lightning.replay import Replay
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type
from ddss_lightning.scheduler import GGDMScheduler
from tests.conftest import DDPM


def test_output_is_the_network_s_and_time_is_real_valued(denoiser):
    unet = UNet2DModel.from_pretrained(DDPM, subfolder="unet")
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([10.0, 500.25, 999.0])
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, t), unet(x, t).sample, rtol=1e-4, atol=1e-5)
    t.requires_grad_()
    slope = torch.autograd.grad(denoiser(x, t).sum(), t)[0]
    assert slope.isfinite().all()
    assert (slope != 0).all()


def test_weights_in_half_precision(denoiser):
    """States stay in float32; the images are nearly the same, and it counts as another model."""
    half = DiffusersDenoiser.from_pretrained(DDPM, weights="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.fingerprint() != denoiser.fingerprint()
    sampler = GGDMSampler(denoiser.schedule, 5)
    x_T = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rounded = (sampler(each, x_T) for each in (denoiser, half))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.02
    # One that was cast by hand.
    double = DiffusersDenoiser(UNet2DModel.from_pretrained(DDPM, subfolder="unet").double(), denoiser.schedule)
    with torch.no_grad():
        torch.testing.assert_close(sampler(double, x_T), exact, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="'mine' has weights in float16, in which small gradients are lost; load it"):
        DiffusersDenoiser(UNet2DModel.from_pretrained(DDPM, subfolder="unet").half(), denoiser.schedule, name="mine")
    with pytest.raises(ValueError, match="Unknown precision 'half' of weights; choose one of float32, bfloat16"):
        DiffusersDenoiser.from_pretrained(DDPM, weights="half")


def test_plain_diffusers_runs_the_shipped_model():
    pipeline = DDPMPipeline.from_pretrained(DDPM)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=5, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape[:3] == (2, 8, 8)
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    assert 0.6e6 < sum(p.numel() for p in pipeline.unet.parameters()) < 0.8e6


def test_missing_and_damaged_folders(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="No diffusion model in '/no/such/folder'"):
        DiffusersDenoiser.from_pretrained("/no/such/folder")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="No diffusion model in 'checkpoints/none'"):
        DiffusersDenoiser.from_pretrained("checkpoints/none")
    with pytest.raises(ValueError, match=r"'checkpoints' could not be loaded"):
        DiffusersDenoiser.from_pretrained("checkpoints")
    shutil.copytree(DDPM, tmp_path / "m")
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"could not be loaded"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))
    shutil.copytree(DDPM, tmp_path / "n")
    (tmp_path / "n" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"could not be loaded: 'model_index\.json' could not be read: Expecting"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "n"))


def small_unet(in_channels, out_channels):
    torch.manual_seed(0)
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(8, in_channels, out_channels, norm_num_groups=4, layers_per_block=1, **small)


def test_wrong_size_and_channels(denoiser):
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\) \(channels, height, width\), got \(3, 8, 8\)"):
        denoiser(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="maps 3 channels to 5; it must be to as many, or"):
        DiffusersDenoiser(small_unet(3, 5), denoiser.schedule)


def test_times_in_a_table_are_refused(schedule):
    unet = UNet2DModel(
        8, 1, 1, norm_num_groups=4, layers_per_block=1, time_embedding_type="learned", num_train_timesteps=1000, **SMALL
    )
    with pytest.raises(ValueError, match="looks its times up in a table"):
        DiffusersDenoiser(unet, schedule)


def test_a_dit_without_out_channels_has_as_many_as_in(schedule):
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    assert DiffusersDenoiser(dit, schedule).state_shape == (4, 8, 8)


def test_half_precision_is_the_trainer_s(tmp_path):
    with pytest.raises(ValueError, match=r"torch_dtype: a model is loaded in float32; .* precision='bf16-mixed'"):
        DiffusersDenoiser.from_pretrained(DDPM, torch_dtype=torch.bfloat16)
    assert DiffusersDenoiser.from_pretrained(Path(DDPM)).name == str(DDPM)
    with pytest.raises(ValueError, match="No diffusion model in"):
        DiffusersDenoiser.from_pretrained(tmp_path / "none")


def test_a_learned_variance_is_left_out(schedule):
    """Against DDIM in diffusers, which is given the half that predicts noise."""
    unet = small_unet(3, 6)
    denoiser = DiffusersDenoiser(unet, schedule)
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert denoiser(x_T, torch.full((2,), 500.0)).shape == x_T.shape
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    theirs.set_timesteps(4)
    x = x_T
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(unet(x, t).sample[:, :3], t, x).prev_sample
        ours = GGDMSampler.from_scheduler(theirs, 4)(denoiser, x_T)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_flat_layout_of_old_hub_models(tmp_path, denoiser):
    """As google/ddpm-cifar10-32: network and scheduler at the top, the scheduler under its old name."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(f"{DDPM}/unet/{name}", tmp_path / name)
    config = json.loads(Path(DDPM, "scheduler", "scheduler_config.json").read_text())
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**config, "_class_name": "GaussianDDPMScheduler"}))
    flat = DiffusersDenoiser.from_pretrained(str(tmp_path))
    assert flat.fingerprint() == denoiser.fingerprint()
    assert flat.schedule.matches(denoiser.schedule)


def test_foreign_parts_are_refused(tmp_path):
    shutil.copytree(DDPM, tmp_path / "m")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "m" / "scheduler")
    flow = DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))
    assert (flow.prediction_type, flow.schedule.scaling) == ("flow_prediction", "flow")
    KarrasVeScheduler().save_pretrained(tmp_path / "m" / "scheduler")
    with pytest.raises(ValueError, match="KarrasVeScheduler has no `alphas_cumprod`"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))
    path = tmp_path / "m" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_embed_type": "timestep"}))
    with pytest.raises(ValueError, match="only a UNet2DModel without, or with class labels, and a DiT are"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))


@pytest.fixture
def labelled(schedule):
    """A small network of three labels; the last is the null label."""
    torch.manual_seed(0)
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1, num_class_embeds=3, **small
    )
    return DiffusersDenoiser(unet, schedule, null_label=2)


def test_a_network_with_classes_is_unconditional_by_its_null_label(labelled):
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([10.0, 500.25, 999.0])
    with torch.no_grad():
        expected = labelled.unet(x, t, torch.tensor([2, 2, 2])).sample
        torch.testing.assert_close(labelled(x, t), expected, rtol=1e-4, atol=1e-5)
        labels = torch.tensor([0, 1, 0])
        torch.testing.assert_close(labelled.with_labels(labels, 0.0)(x, t), expected, rtol=1e-4, atol=1e-5)


def test_labels_and_guidance(labelled):
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([10.0, 500.25, 999.0]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        null, given = labelled(x, t), labelled.unet(x, t, labels).sample
        torch.testing.assert_close(labelled.with_labels(labels)(x, t), given, rtol=1e-4, atol=1e-5)
        guided = labelled.with_labels(labels, 3.0)(x, t)
        torch.testing.assert_close(guided, null + 3 * (given - null), rtol=1e-4, atol=1e-5)
        # Guidance changes nothing where the label is the null label; elsewhere it does.
        torch.testing.assert_close(guided[2], null[2], rtol=1e-4, atol=1e-5)
        assert (guided[:2] - null[:2]).abs().max() > 1e-2
    # The given one is as it was, and both are the same network.
    assert labelled.shown is None
    assert labelled.with_labels(labels).fingerprint() == labelled.fingerprint()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_budget_of_memory_with_labels(labelled, guidance_scale):
    """A network that takes no batch but that of its labels is measured on it. Guidance doubles what is kept, and the
    doubled state is kept too.
    """
    network = labelled.with_labels(torch.tensor([0, 1, 2, 0]), guidance_scale)
    x_T, noise = torch.randn(4, 1, 4, 4), torch.randn(3, 4, 1, 4, 4)
    size = measured_call(network, x_T, torch.full((4,), 500.0))[1]
    plain = measured_call(labelled, x_T, torch.full((4,), 500.0))[1]
    assert size == (plain if guidance_scale == 1 else 2 * plain + 2 * x_T.nbytes)
    gradients, calls = [], []
    hook = labelled.unet.register_forward_hook(lambda *_: calls.append(1))
    for remat in ("none", f"budget({2 * size}B)"):
        sampler = GGDMSampler(labelled.schedule, 4)
        sampler(network, x_T, noise=noise, remat=remat).square().sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in sampler.parameters()]))
    hook.remove()
    # Of the three calls that have a gradient, two are kept.
    assert len(calls) == 4 + 4 + 1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_labelled_networks_are_saved_and_read(labelled, tmp_path):
    labelled.unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler(1000).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="The network has 3 classes; give the null_label"):
        DiffusersDenoiser.from_pretrained(str(tmp_path))
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([10.0, 500.25, 999.0])
    given = DiffusersDenoiser.from_pretrained(str(tmp_path), null_label=2)
    (tmp_path / "classes.json").write_text('{"null_label": 2}')
    read = DiffusersDenoiser.from_pretrained(str(tmp_path))
    with torch.no_grad():
        for again in (given, read):
            torch.testing.assert_close(again(x, t), labelled(x, t), rtol=1e-4, atol=1e-5)
    for content in ('{"null": 2}', "2", "{"):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(ValueError, match=r"classes\.json' must hold {\"null_label\": N}"):
            DiffusersDenoiser.from_pretrained(str(tmp_path))
        assert DiffusersDenoiser.from_pretrained(str(tmp_path), null_label=2).null_label == 2


def test_bad_labels(labelled, denoiser, schedule):
    with pytest.raises(ValueError, match="null_label must be one of the network's 3 labels, got 3"):
        DiffusersDenoiser(labelled.unet, schedule, null_label=3)
    with pytest.raises(ValueError, match="The network has no classes; leave null_label out, got 1"):
        DiffusersDenoiser(denoiser.unet, schedule, null_label=1)
    with pytest.raises(ValueError, match="has no classes, so it cannot be given labels"):
        denoiser.with_labels(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"integers from 0 to 2, shape \(N,\), got torch.int64 .* from 0 to 3"):
        labelled.with_labels(torch.tensor([0, 3]))
    assert torch.equal(labelled.with_labels([1, 2]).shown["class_labels"], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="conditions of 2 images were given for a batch of 3"):
        labelled.with_labels(torch.tensor([0, 1]))(torch.zeros(3, 1, 4, 4), torch.zeros(3))


SMALL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory):
    """A latent diffusion pipeline as the hub holds them, with random weights: latents 2x4x4, images 1x8x8."""
    torch.manual_seed(0)
    decoder = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    # Not a VQModel: it takes the nearest code, and the last digit can make that another one.
    vae = AutoencoderKL(
        1, 1, block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4, scaling_factor=0.5, **decoder
    )
    unet = UNet2DModel(sample_size=4, in_channels=2, out_channels=2, norm_num_groups=4, **SMALL)
    scheduler = DDIMScheduler(1000, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    folder = tmp_path_factory.mktemp("latent")
    LDMPipeline(vae, unet, scheduler).save_pretrained(folder)
    return str(folder)


def test_a_decoder_that_no_index_names_is_not_left_out(latent_folder, tmp_path):
    """The sampler would be scored by latents."""
    shutil.copytree(latent_folder, tmp_path / "m")
    (tmp_path / "m" / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"it has a decoder, 'vqvae', but no model_index\.json that says so"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))


def test_a_latent_model_makes_the_images_of_its_pipeline(latent_folder):
    pipeline = LDMPipeline.from_pretrained(latent_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(3, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
    denoiser = DiffusersDenoiser.from_pretrained(latent_folder)
    assert (denoiser.state_shape, denoiser.image_shape) == ((2, 4, 4), (1, 8, 8))
    x_T = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = denoiser.decode(GGDMSampler.from_scheduler(pipeline.scheduler, 4)(denoiser, x_T))
    ours = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-3, atol=1e-3)


def test_a_sampler_of_a_latent_model_learns(latent_folder, features, tmp_path):
    """Through the decoder, whole and in parts; the loss sees images, the noise is that of latents."""
    gradients = []
    for options in ({}, {"microbatch_size": 3, "features_batch_size": 2, "remat": "denoiser"}):
        denoiser = DiffusersDenoiser.from_pretrained(latent_folder)
        sampler = GGDMSampler(denoiser.schedule, 3)
        module = DDSSModule(denoiser, sampler, features, batch_size=6, **options)
        assert module.generate(torch.randn(2, 2, 4, 4), torch.zeros(2, 2, 2, 4, 4)).shape == (2, 1, 8, 8)
        module.on_before_optimizer_step = lambda _, sampler=sampler: gradients.append(sampler.corrections["mu"].grad)
        Trainer(
            max_steps=1, accelerator="cpu", limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(module, DigitsDataModule(batch_size=6, steps_per_epoch=1))  # fmt: skip
    assert (gradients[0] != 0).all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_the_grid_of_a_latent_model_is_of_images(latent_folder, features, tmp_path):
    denoiser = DiffusersDenoiser.from_pretrained(latent_folder)
    module = SamplingModule(denoiser, GGDMSampler(denoiser.schedule, 3), features)
    scores = Scores(tmp_path / "scores.json", {})
    data, settings = DigitsDataModule(), Comparison(num_images=20)
    scorer = Scorer(module, data, Trainer(logger=False), scores, settings, None, lambda _: None)
    found = scorer.images(Candidate("ours", 3, "learned", module.sampler), seed=1)
    x_T, noise = held_out_noise("test/1", list(range(len(found))), denoiser.state_shape, 3)
    assert torch.equal(found, module.generate(x_T, noise))
    sizes, decode = [], denoiser.decode
    denoiser.decode = lambda x_0: sizes.append(len(x_0)) or decode(x_0)
    parts = SamplingModule(denoiser, module.sampler, features, features_batch_size=24)
    torch.testing.assert_close(parts.generate(x_T, noise), found, rtol=0, atol=1e-2)  # a rounded grey level
    assert sizes == [24, 24, 16]
    assert found.shape[1:] == (1, 8, 8)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The models in `tmp_path` as those of the hub; `faults`: what it answers to the names of files instead."""
    faults = {}

    def download(repo_id, filename, subfolder=None, **_):
        name = f"{subfolder}/{filename}" if subfolder else filename
        path = tmp_path / repo_id / name
        if error := faults.get(name, None if path.is_file() else NOT_THERE):
            raise error
        return str(path)

    for module in ("configuration_utils", "utils.hub_utils"):
        monkeypatch.setattr(f"diffusers.{module}.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return faults


def answer(kind, status, text):
    """An error of the hub; its class of responses differs between versions of the library."""
    response = SimpleNamespace(headers={}, status_code=status, request=None)
    return kind(text, response=response)


NOT_THERE = answer(errors.RemoteEntryNotFoundError, 404, "404 Client Error.\n\nEntry Not Found")
NO_CONNECTION = errors.LocalEntryNotFoundError("Please check your connection")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NO_CONNECTION, "Please check your connection"),
        (answer(errors.GatedRepoError, 401, "401 Client Error.\n\nGated"), "401 Client Error. Gated"),
        (answer(errors.HfHubHTTPError, 503, "503 Server Error"), "503 Server Error"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_a_hub_that_does_not_answer_makes_no_pixel_model(hub, latent_folder, tmp_path, name, error, reason):
    shutil.copytree(latent_folder, tmp_path / "owner" / "model")
    assert DiffusersDenoiser.from_pretrained("owner/model").image_shape == (1, 8, 8)
    hub[name] = error
    with pytest.raises(
        ValueError, match=f"^The diffusion model in 'owner/model' .* '{name}' could not be read: {reason}"
    ):
        DiffusersDenoiser.from_pretrained("owner/model")


def test_a_model_of_the_hub_without_a_pipeline(hub, tmp_path, denoiser):
    """It has no `model_index.json`, which is also known offline to a cache that was told so."""
    shutil.copytree(DDPM, tmp_path / "owner" / "model")
    (tmp_path / "owner" / "model" / "model_index.json").unlink()
    assert DiffusersDenoiser.from_pretrained("owner/model").fingerprint() == denoiser.fingerprint()
    hub["model_index.json"] = NO_CONNECTION
    with pytest.raises(ValueError, match=r"'model_index\.json' could not be read"):
        DiffusersDenoiser.from_pretrained("owner/model")
    cache = tmp_path / "cache" / "models--owner--model"
    for path, text in (("refs/main", "abc"), (".no_exist/abc/model_index.json", "")):
        (cache / path).parent.mkdir(parents=True)
        (cache / path).write_text(text)
    assert DiffusersDenoiser.from_pretrained("owner/model").vae is None


def test_what_a_decoder_gets_and_gives():
    vae = AutoencoderKL(1, 1, block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)  # fmt: skip
    unet = UNet2DModel(sample_size=4, in_channels=2, out_channels=2, norm_num_groups=4, **SMALL)
    denoiser = DiffusersDenoiser(unet, DiffusersDenoiser.from_pretrained(DDPM).schedule, vae=vae)
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(denoiser.decode(latents), vae.decode(2 * latents + 0.25).sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert denoiser.decode(latents).dtype == torch.float32
    assert denoiser.decode(torch.zeros(2, 2, 4, 4)).shape[1:] == denoiser.image_shape == (1, 16, 16)


def test_a_teacher_of_other_settings_has_other_images(labelled, latent_folder, denoiser):
    """Null label, scale and shift are no weights: the fingerprint, which cards hold, is the same."""
    pairs = TeacherPairs(num_steps=4)
    assert pairs.key(denoiser)["denoiser"] == denoiser.fingerprint()
    latent = [DiffusersDenoiser.from_pretrained(latent_folder) for _ in range(3)]
    latent[1].vae.register_to_config(scaling_factor=0.25)
    latent[2].vae.register_to_config(shift_factor=0.25)
    other = DiffusersDenoiser(labelled.unet, labelled.schedule, null_label=1)
    for models in ([labelled, other], latent):
        assert len({model.fingerprint() for model in models}) == 1
        assert len({pairs.folder(model) for model in models}) == len(models)


def test_a_compiled_network_is_not_compiled_again_at_each_step(schedule):
    """Four calls at real-valued times, twice, with gradient: the first has an input without one, the others with."""
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, **SMALL)
    denoiser, plain = DiffusersDenoiser(unet, schedule), GGDMSampler(schedule, 4, learn=("time", "mu"))
    x_T, counter = torch.randn(2, 1, 8, 8), CompileCounter()
    expected = plain(denoiser, x_T)
    torch._dynamo.reset()
    unet.compile(backend=counter)
    counts = []
    for shift in (0.0, 0.1, 0.2):
        plain.corrections["time"].data.fill_(shift)
        x_0 = plain(denoiser, x_T)
        x_0.sum().backward()
        counts.append(counter.frame_count)
        if not shift:
            torch.testing.assert_close(x_0, expected)
    assert counts[0] == counts[1] == counts[2] > 0


def test_unknown_compile_mode():
    with pytest.raises(ValueError, match="Unknown compile_mode 'fast'; choose one of default, max-autotune-no-"):
        DiffusersDenoiser.from_pretrained(DDPM, compile_mode="fast")
    assert DiffusersDenoiser.from_pretrained(DDPM, compile_mode="default").unet._compiled_call_impl is not None


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_outputs_that_the_next_call_overwrites(mode):
    """As those of a CUDA graph: calls without gradient share their memory."""
    plain, denoiser = (
        DiffusersDenoiser.from_pretrained(DDPM),
        DiffusersDenoiser.from_pretrained(DDPM, compile_mode=mode),
    )
    memory = torch.empty(3, 1, 8, 8)

    def overwriting(*args, **kwargs):
        (output,) = denoiser.unet.forward(*args, **kwargs)
        return (output if output.requires_grad else memory.copy_(output),)

    denoiser.unet._compiled_call_impl = overwriting
    sampler = GGDMSampler(plain.schedule, 3, learn=("mu", "nu", "time"))
    x_T, noise = torch.randn(3, 1, 8, 8), torch.zeros(2, 3, 1, 8, 8)
    gradients = [
        torch.autograd.grad(sampler(each, x_T, noise=noise).square().mean(), list(sampler.parameters()))
        for each in (plain, denoiser)
    ]
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    ours, theirs = (Replay(each, sampler.coefficients(), x_T, noise) for each in (denoiser, plain))
    torch.testing.assert_close(torch.stack(ours._outputs), torch.stack(theirs._outputs))


def test_a_schedule_that_nobody_knows_is_not_taken_for_linear_betas(tmp_path):
    shutil.copytree(DDPM, tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "MyCosineScheduler", "s": 0.008, "num_train_timesteps": 1000}))
    with pytest.raises(ValueError, match="its scheduler is a MyCosineScheduler, which diffusers does not have"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False), EDMEulerScheduler()]
)
def test_a_pipeline_that_was_saved_with_a_learned_sampler(tmp_path, scheduler):
    shutil.copytree(DDPM, tmp_path / "m")
    GGDMScheduler.from_sampler(GGDMSampler.from_scheduler(scheduler, 3)).save_pretrained(tmp_path / "m" / "scheduler")
    found, wanted = DiffusersDenoiser.from_pretrained(str(tmp_path / "m")), NoiseSchedule.from_scheduler(scheduler)
    assert found.schedule.matches(wanted)
    assert found.prediction_type == scheduler_prediction_type(scheduler)
