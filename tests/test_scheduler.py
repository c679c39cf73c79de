"""GGDMScheduler: the sampler's own images in diffusers' pipelines, and diffusers' contract for schedulers."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.commands import export
from ddss_lightning.denoisers import DiffusersDenoiser
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.scheduler import GGDMScheduler
from tests.conftest import DDPM, ROOT
from tests.test_ggdm import move


def random_sampler(schedule, num_steps=4, noisy=False, **kwargs):
    learn = ("mu", "nu", "std", "pred", "time", "logsnr") if noisy else ("mu", "nu", "time", "logsnr")
    return move(GGDMSampler(schedule, num_steps, learn=learn, **kwargs), 0.05)


@pytest.fixture(params=[False, True], ids=["deterministic", "stochastic"])
def sampler(request, schedule):
    return random_sampler(schedule, noisy=request.param)


# ------------------------------------------------------------------------------------------------- the same images


def test_ddpm_pipeline_makes_the_sampler_s_images(sampler, denoiser):
    """One generator gives the same first state and the same noise in both."""
    pipeline = DDPMPipeline.from_pretrained(DDPM)
    pipeline.scheduler = GGDMScheduler.from_sampler(sampler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(8, torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x_0 = sampler(denoiser, torch.randn(8, 1, 8, 8, generator=generator), generator=generator)
    ours = (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(ours - theirs).max() < 1e-5
    assert theirs.std() > 0.1


def test_ddim_pipeline_takes_it_after_construction_and_never_turns_it_into_ddim(sampler, denoiser):
    scheduler = GGDMScheduler.from_sampler(sampler)
    with pytest.raises(NotImplementedError, match="ggdm is not implemented"):
        DDIMPipeline(denoiser.unet, scheduler)
    pipeline = DDIMPipeline(denoiser.unet, DDIMScheduler())
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(4, torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x_0 = sampler(denoiser, torch.randn(4, 1, 8, 8, generator=generator), generator=generator)
    assert abs((x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - images).max() < 1e-5
    with pytest.raises(ValueError, match=r"no eta and no clipping, got eta=0\.5"):
        pipeline(4, num_inference_steps=4, eta=0.5)


def loop(scheduler, network, x_T, generator=None):
    scheduler.set_timesteps(scheduler.num_steps)
    x = x_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize(
    "imported",
    [
        EulerDiscreteScheduler(),
        EDMEulerScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_imported_then_exported_is_the_sampler_in_float64(imported, tmp_path):
    """Schedulers that scale the first state (Euler 0.99998, EDM 2.0), or the schedule (flow matching), or add noise."""
    sampler = GGDMSampler.from_scheduler(imported, 5)
    x_T, *noise = torch.randn(5, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        return torch.tanh(x + torch.as_tensor(t).double().reshape(-1)[0] / 500)

    sampler.save_pretrained(tmp_path / "s")
    expected = sampler(network, x_T, noise=torch.stack(noise))
    for exported in (GGDMScheduler.from_sampler(sampler), GGDMScheduler.from_pretrained(tmp_path / "s")):
        exported.set_timesteps(5)
        x = x_T
        for t, z in zip(exported.timesteps, [*noise, None], strict=True):
            output = network(exported.scale_model_input(x, t), t)
            x = exported.step(output, t, x, variance_noise=z).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------- save and load


def test_save_and_load_is_exact(sampler, tmp_path):
    scheduler = GGDMScheduler.from_sampler(sampler, base_model="digits")
    scheduler.save_pretrained(tmp_path / "a")
    again = GGDMScheduler.from_pretrained(tmp_path / "a")
    assert again.config == scheduler.config
    coefficients = sampler.coefficients().detach()
    for name in ("mu", "nu", "std", "pred", "timesteps"):
        assert torch.equal(torch.tensor(again.config[name], dtype=torch.float64), getattr(coefficients, name))
    x_T = torch.randn(2, 1, 4, 4)
    images = [loop(s, lambda x, t: x.tanh(), x_T, torch.Generator().manual_seed(0)) for s in (scheduler, again)]
    assert torch.equal(*images)


def test_a_saved_sampler_loads_as_a_scheduler(sampler, tmp_path):
    sampler.save_pretrained(tmp_path / "s", base_model={"name": "digits"})
    scheduler = GGDMScheduler.from_pretrained(tmp_path / "s")
    assert scheduler.config == GGDMScheduler.from_sampler(sampler, base_model="digits").config
    (tmp_path / "s" / "sampler.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        GGDMScheduler.from_pretrained(tmp_path / "s")


@pytest.mark.filterwarnings("error:.*no good sampler")
@pytest.mark.parametrize("name", ["digits-ggdm-5", "glyphs-ggdm-10"])
def test_a_learned_scheduler_is_imported_as_the_sampler_that_it_was(name):
    """With its own pairs: those of Theorem 1 would give its image a wrong scale, and a warning."""
    sampler = GGDMSampler.from_pretrained(ROOT / "checkpoints" / name)
    scheduler = GGDMScheduler.from_pretrained(ROOT / "checkpoints" / name)
    again = GGDMSampler.from_scheduler(scheduler, sampler.num_steps)
    for number, value in vars(sampler.coefficients().detach()).items():
        torch.testing.assert_close(getattr(again.coefficients().detach(), number), value, rtol=0, atol=1e-8)
    _, anchor, *table = str(again).splitlines()
    assert anchor == f"anchor: GGDMScheduler of a sampler for checkpoints/{name.split('-')[0]}-ddpm"
    assert not [line for line in table if "warning" in line]
    with pytest.raises(ValueError, match="got num_inference_steps=7"):
        GGDMSampler.from_scheduler(scheduler, 7)
    with pytest.raises(ValueError, match="A learned sampler has neither eta nor"):
        GGDMSampler.from_scheduler(scheduler, sampler.num_steps, step={"eta": 1.0})


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_shipped_samplers_load_as_schedulers(num_steps):
    scheduler = GGDMScheduler.from_pretrained(ROOT / "checkpoints" / f"digits-ggdm-{num_steps}")
    assert (scheduler.num_steps, len(scheduler)) == (num_steps, 1000)


def test_export_travels_with_a_pipeline_and_runs_without_this_package(sampler, tmp_path):
    sampler.save_pretrained(tmp_path / "sampler", base_model={"name": "digits"}, scores={"fid": 1.5})
    export(str(tmp_path / "sampler"), str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scheduler_config.json",
        "scheduler.py",
        "README.md",
        "sampler.json",
        "sampler.safetensors",
    }
    assert "num_inference_steps=4" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="already holds scheduler_config"):
        export(str(tmp_path / "sampler"), str(tmp_path / "out"))

    model = tmp_path / "model"
    shutil.copytree(DDPM, model)
    shutil.rmtree(model / "scheduler")
    shutil.copytree(tmp_path / "out", model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "scheduler": ["scheduler", "GGDMScheduler"]}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(model)
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline;"
        f"p = DiffusionPipeline.from_pretrained({str(model)!r}, trust_remote_code=True);"
        "images = p(2, torch.Generator().manual_seed(3), num_inference_steps=4, output_type='np').images;"
        "print(type(p.scheduler).__name__, [m for m in sys.modules if m.startswith(('ddss', 'lightning'))]);"
        f"torch.save(torch.tensor(images), {str(tmp_path / 'images.pt')!r})"
    )
    # As for someone who does not have the package: neither the checkout nor its editable installation is found.
    hide = "import sys; sys.modules['ddss_lightning'] = None; "
    env = {"HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "cache" / "modules")}
    command = [sys.executable, "-c", hide + code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert run.returncode == 0, run.stderr
    assert "GGDMScheduler" in run.stdout
    assert "lightning" not in run.stdout.replace("ddss_lightning", "")
    pipeline = DDPMPipeline.from_pretrained(DDPM)
    pipeline.scheduler = GGDMScheduler.from_sampler(sampler)
    images = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), torch.tensor(images), rtol=0, atol=1e-5)


def test_a_pipeline_with_it_can_be_saved_and_loaded(sampler, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(DDPM)
    pipeline.scheduler = GGDMScheduler.from_sampler(sampler)
    pipeline.save_pretrained(tmp_path / "p")
    again = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert again.scheduler.config.mu == pipeline.scheduler.config.mu


def test_importing_it_imports_neither_lightning_nor_torchmetrics():
    code = (
        "import sys; from ddss_lightning import GGDMScheduler;"
        "print([m for m in ('lightning', 'pytorch_lightning', 'torchmetrics') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------- pipelines with tiny networks


def tiny_vae(latent_channels=4):
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=[8, 8],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_unet(**kwargs):
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        **kwargs,
    )


SD = NoiseSchedule.from_scheduler(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def latents_of(pipeline, generator_seed=0, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        num_inference_steps=4, generator=torch.Generator().manual_seed(generator_seed), output_type="latent", **kwargs
    )
    return out.images


def latents_of_pooled_prompts(pipeline):
    """Random prompts, pooled ones too, and what the pipeline makes of them with guidance 3."""
    g = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 1, 3, 16, generator=g)
    pooled, negative_pooled = torch.randn(2, 1, 16, generator=g)
    latents = latents_of(
        pipeline, height=16, width=16, prompt_embeds=prompt, negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled, guidance_scale=3.0,
    )  # fmt: skip
    return prompt, negative, pooled, negative_pooled, latents


@pytest.mark.parametrize("noisy", [False, True])
def test_stable_diffusion_with_guidance(noisy):
    sampler = random_sampler(SD, noisy=noisy)
    unet = tiny_unet()
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=GGDMScheduler.from_sampler(sampler),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    prompt, negative = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(1))
    conditions = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": 3.0}
    latents = latents_of(pipeline, height=16, width=16, **conditions)

    def guided(x, t):
        out = unet(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=torch.cat([negative, prompt])).sample
        return out[:1] + 3.0 * (out[1:] - out[:1])

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x_0 = sampler(guided, torch.randn(1, 4, 8, 8, generator=generator), generator=generator)
    torch.testing.assert_close(latents, x_0, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="learned for 4 network calls, got num_inference_steps=50"):
        pipeline(**conditions)
    with pytest.raises(ValueError, match="does not support custom timestep schedules"):
        pipeline(timesteps=[900, 500, 100, 1], **conditions)


def test_image_to_image_and_inpainting_are_refused():
    """A start in the middle, and, at strength 1, the known part of the image pasted in between the steps."""
    parts = {
        "vae": tiny_vae(), "text_encoder": None, "tokenizer": None, "unet": tiny_unet(), "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    prompt, negative = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(1))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    arguments = {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "image": image, "num_inference_steps": 4,
        "generator": torch.Generator().manual_seed(0), "output_type": "latent",
    }  # fmt: skip
    scheduler = GGDMScheduler.from_sampler(random_sampler(SD))
    pipeline = StableDiffusionImg2ImgPipeline(scheduler=scheduler, **parts)
    with pytest.raises(ValueError, match=r"starts from noise: it cannot begin at step 2"):
        pipeline(strength=0.5, **arguments)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    pipeline = StableDiffusionInpaintPipeline(scheduler=scheduler, **parts)
    with pytest.raises(ValueError, match=r"is not what step 0 returned"):
        pipeline(strength=1.0, mask_image=mask, height=16, width=16, **arguments)


def test_stable_diffusion_xl_with_guidance():
    sampler = random_sampler(SD, noisy=True)
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
    )
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=GGDMScheduler.from_sampler(sampler),
    )  # fmt: skip
    prompt, negative, pooled, negative_pooled, latents = latents_of_pooled_prompts(pipeline)
    added = {
        "text_embeds": torch.cat([negative_pooled, pooled]),
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2),
    }

    def guided(x, t):
        condition = torch.cat([negative, prompt])
        pair = torch.cat([x, x])
        out = unet(pair, torch.cat([t, t]), encoder_hidden_states=condition, added_cond_kwargs=added).sample
        return out[:1] + 3.0 * (out[1:] - out[:1])

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x_0 = sampler(guided, torch.randn(1, 4, 8, 8, generator=generator), generator=generator)
    torch.testing.assert_close(latents, x_0, rtol=1e-4, atol=1e-5)


def test_dit_with_guidance_and_a_learned_variance():
    sampler = random_sampler(SD)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    pipeline = DiTPipeline(transformer, tiny_vae(), GGDMScheduler.from_sampler(sampler))
    seen = []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, **kwargs: (seen.append(step(*args, **kwargs)), seen[-1])[1]
    pipeline.set_progress_bar_config(disable=True)
    pipeline([7], guidance_scale=3.0, num_inference_steps=4, generator=torch.Generator().manual_seed(0))

    def guided(x, t):
        out = transformer(torch.cat([x, x]), timestep=torch.cat([t, t]), class_labels=torch.tensor([7, 1000])).sample
        conditional, unconditional = out[:, :4]
        return (unconditional + 3.0 * (conditional - unconditional))[None]

    with torch.no_grad():
        x_0 = sampler(guided, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(seen[-1].prev_sample[:1], x_0, rtol=1e-4, atol=1e-5)


def test_stable_diffusion_3_with_a_flow_sampler():
    sampler = move(GGDMSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, learn=("mu", "nu")), 0.02)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=GGDMScheduler.from_sampler(sampler), vae=tiny_vae(), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    prompt, negative, pooled, negative_pooled, latents = latents_of_pooled_prompts(pipeline)

    def guided(x, t):
        out = transformer(
            torch.cat([x, x]),
            timestep=torch.cat([t, t]),
            encoder_hidden_states=torch.cat([negative, prompt]),
            pooled_projections=torch.cat([negative_pooled, pooled]),
        ).sample
        return out[:1] + 3.0 * (out[1:] - out[:1])

    with torch.no_grad():
        x_0 = sampler(guided, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(latents, x_0, rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_left_out(schedule):
    """`DDPMPipeline` gives the scheduler all channels of the network."""
    torch.manual_seed(0)
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, 3, 6, norm_num_groups=4, layers_per_block=1, **small)
    sampler = random_sampler(schedule)
    pipeline = DDPMPipeline(unet, DDIMScheduler(beta_schedule="linear"))
    pipeline.scheduler = GGDMScheduler.from_sampler(sampler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    with torch.no_grad():
        x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        ours = sampler(DiffusersDenoiser(unet, schedule), x_T)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    # A random network magnifies rounding, which depends on the layout in memory and the processor: 2e-5 was seen.
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------- what diffusers' own scheduler tests ask for


def sample_and_residual(scheduler):
    sample = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4) / 96
    return 0.1 * sample, sample, scheduler.timesteps[0]


def test_step_shape_and_type(sampler):
    scheduler = GGDMScheduler.from_sampler(sampler)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        scheduler.set_timesteps(4)
        residual, sample, t = sample_and_residual(scheduler)
        out = scheduler.step(residual.to(dtype), t, sample.to(dtype))
        assert out.prev_sample.shape == out.pred_original_sample.shape == sample.shape
        assert out.prev_sample.dtype == dtype


def test_tuple_and_dictionary_outputs_are_equal(sampler):
    scheduler = GGDMScheduler.from_sampler(sampler)
    outputs = []
    for return_dict in (True, False):
        scheduler.set_timesteps(4)
        residual, sample, t = sample_and_residual(scheduler)
        generator = torch.Generator().manual_seed(0)
        outputs.append(scheduler.step(residual, t, sample, generator=generator, return_dict=return_dict))
    assert isinstance(outputs[1], tuple)
    for theirs, ours in zip(outputs[0].to_tuple(), outputs[1], strict=True):
        assert torch.equal(theirs, ours)


def test_public_api(sampler):
    scheduler = GGDMScheduler.from_sampler(sampler)
    assert isinstance(scheduler.init_noise_sigma, float)
    assert scheduler.order == 1
    for name in ("scale_model_input", "step", "set_timesteps", "add_noise"):
        assert callable(getattr(scheduler, name))
    assert {"generator", "eta", "variance_noise", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)
    assert scheduler.timesteps.is_floating_point()
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 4
    assert scheduler.config.num_train_timesteps == len(scheduler) == 1000
    _, sample, t = sample_and_residual(scheduler)
    assert scheduler.scale_model_input(sample, t).shape == sample.shape


@pytest.mark.parametrize("device", ["meta"])
def test_timesteps_go_to_the_device(sampler, device):
    scheduler = GGDMScheduler.from_sampler(sampler)
    scheduler.set_timesteps(4, device=device)
    assert scheduler.timesteps.device.type == device


def test_noise_by_generator_by_hand_and_by_list(schedule):
    scheduler = GGDMScheduler.from_sampler(random_sampler(schedule, noisy=True))
    residual, sample, t = sample_and_residual(scheduler)
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(5))

    def first(**kwargs):
        scheduler.set_timesteps(4)
        return scheduler.step(residual, t, sample, **kwargs).prev_sample

    assert torch.equal(first(variance_noise=noise), first(generator=torch.Generator().manual_seed(5)))
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    rows = [torch.randn(1, *sample.shape[1:], generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    assert torch.equal(first(generator=generators), first(variance_noise=torch.cat(rows)))
    std = scheduler.config.std[0]
    torch.testing.assert_close(first(variance_noise=noise) - first(variance_noise=0 * noise), std * noise)


def test_add_noise_is_the_schedulers(schedule):
    theirs = DDIMScheduler(beta_schedule="linear")
    x_0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 999])
    ours = GGDMScheduler.from_sampler(random_sampler(schedule)).add_noise(x_0, noise, t)
    torch.testing.assert_close(ours, theirs.add_noise(x_0, noise, t), rtol=1e-4, atol=1e-5)
    flow = GGDMScheduler.from_sampler(GGDMSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(), 3))
    t = torch.tensor([1.0, 250.5, 999.0])
    s = (t / 1000).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(flow.add_noise(x_0, noise, t), (1 - s) * x_0 + s * noise, rtol=1e-4, atol=1e-5)
    assert flow.config.num_train_timesteps == 1000


# -------------------------------------------------------------------------------------------------------- wrong use


def test_wrong_use_is_told(sampler):
    scheduler = GGDMScheduler.from_sampler(sampler)
    with pytest.raises(ValueError, match="got num_inference_steps=10; call the pipeline with num_inference_steps=4"):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="starts from noise: it cannot begin at step 2"):
        scheduler.set_begin_index(2)
    scheduler.set_begin_index(0)
    residual, sample, _ = sample_and_residual(scheduler)
    with pytest.raises(ValueError, match=r"Step 0 of this sampler is at timestep 999, got .*image-to-image"):
        scheduler.step(residual, scheduler.timesteps[1], sample)
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 5, 4, 4\)"):
        scheduler.step(torch.cat([residual, residual[:, :2]], 1), scheduler.timesteps[0], sample)
    with pytest.raises(ValueError, match=r"variance_noise has shape \(1, 1, 4, 4\), sample \(2, "):
        scheduler.step(residual, scheduler.timesteps[0], sample, variance_noise=torch.zeros(1, 1, 4, 4))
    x = sample
    for t in scheduler.timesteps:
        x = scheduler.step(residual, t, x).prev_sample
    assert scheduler.step_index == 4
    # A pipeline keeps its scheduler: on a GPU these would be gigabytes.
    assert not [
        name for name, value in vars(scheduler).items() if value is sample or (isinstance(value, list) and value)
    ]
    with pytest.raises(ValueError, match="All 4 steps were taken; call `set_timesteps`"):
        scheduler.step(residual, scheduler.timesteps[0], sample)
    scheduler.set_timesteps()
    scheduler.step(residual, scheduler.timesteps[0], sample)
    with pytest.raises(ValueError, match=r"is not what step 0 returned.*as inpainting does"):
        scheduler.step(residual, scheduler.timesteps[1], sample)
    with pytest.raises(ValueError, match="The sample changed"):
        scheduler.step(residual[:1], scheduler.timesteps[1], sample[:1])


def test_a_first_state_that_is_not_scaled_is_told():
    """DDPMPipeline does not call `scale_model_input`: harmless where the scale is 0.99998, wrong where it is 2."""
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    euler = GGDMScheduler.from_sampler(GGDMSampler.from_scheduler(EulerDiscreteScheduler(), 3))
    edm = GGDMScheduler.from_sampler(GGDMSampler.from_scheduler(EDMEulerScheduler(sigma_max=3.0), 3))
    DDPMPipeline(unet, euler)(1, num_inference_steps=3)
    with pytest.raises(ValueError, match="does not call `scale_model_input`"):
        DDPMPipeline(unet, edm)(1, num_inference_steps=3)


def test_bad_numbers():
    good = {"mu": [[1.0]], "nu": [1.0], "std": [0.0], "pred": [[0.0, 1.0]], "timesteps": [999.0]}
    assert GGDMScheduler(**good).num_steps == 1
    with pytest.raises(ValueError, match="must have shapes"):
        GGDMScheduler(**{**good, "nu": [1.0, 2.0]})
    with pytest.raises(ValueError, match="not finite"):
        GGDMScheduler(**{**good, "nu": [float("nan")]})
    with pytest.raises(ValueError, match="has no `logsnrs`"):
        GGDMScheduler(**good).add_noise(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert Coefficients.from_lists({**good, "prior": [0.0, 1.0]}).num_steps == 1


def test_autocast_does_not_round_the_states(sampler):
    """As the unrolled chain: half precision is the network's, which here is given."""
    outputs = [torch.randn(3, 1, 8, 8) for _ in range(sampler.num_steps)]
    images = []
    for enabled in (False, True):
        scheduler = GGDMScheduler.from_sampler(sampler)
        x = torch.randn(3, 1, 8, 8, generator=torch.manual_seed(0))
        generator = torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for t, output in zip(scheduler.timesteps, outputs, strict=True):
                x = scheduler.step(output, t, x, generator=generator).prev_sample
        images.append(x)
    assert torch.equal(*images)


def test_numbers_of_another_sampler_beside_the_card_are_refused(tmp_path):
    shutil.copytree(ROOT / "checkpoints" / "digits-ggdm-5", tmp_path / "mixed")
    shutil.copy(ROOT / "checkpoints" / "digits-ggdm-10" / "sampler.safetensors", tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"'sampler.safetensors' and 'sampler.json' do not belong together"):
        GGDMScheduler.from_pretrained(tmp_path / "mixed")


def test_the_only_fit_in_a_folder_is_found_and_unused_arguments_come_back(sampler, tmp_path):
    sampler.save_pretrained(tmp_path / "version_0" / "sampler")
    loaded, unused = GGDMScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, other=1)
    assert loaded.num_steps == sampler.num_steps
    assert unused == {"other": 1}


def test_folders_without_a_learned_sampler_are_told(sampler, tmp_path):
    with pytest.raises(ValueError, match=r"scheduler_config\.json' is of DDPMScheduler, no learned sampler"):
        GGDMScheduler.from_pretrained(f"{DDPM}/scheduler")
    with pytest.raises(ValueError, match=r"digits-ddpm' holds no learned sampler: it needs sampler\.safetensors or"):
        GGDMScheduler.from_pretrained(DDPM)
    for version in range(2):
        sampler.save_pretrained(tmp_path / f"version_{version}" / "sampler")
    with pytest.raises(ValueError, match="holds 2 fits; give the folder of one of them"):
        GGDMScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"scheduler_config\.json' is damaged"):
        GGDMScheduler.from_pretrained(tmp_path)
