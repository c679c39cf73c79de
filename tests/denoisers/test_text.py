"""Text-to-image models: the images of diffusers' own pipelines, and a sampler that learns for them."""

import copy
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from lightning.pytorch import LightningDataModule, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ddss_lightning import DDSSModule, GGDMSampler, RandomFeatures, TeacherLoss, TeacherPairs
from ddss_lightning.denoisers import DiffusersDenoiser, TextDenoiser
from ddss_lightning.denoisers.prompts import digest_of_texts, encode_prompts, read_prompts
from ddss_lightning.denoisers.text_pipelines import TextPipeline
from ddss_lightning.noise import take_turns
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.scheduler import GGDMScheduler
from tests.test_scheduler import tiny_unet, tiny_vae

PLAYS_NO_PART = "^.* guidance: the negative_prompt 'b' would play no part"
PROMPTS = ["abc", "a b", "cab"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder):
    """Of three letters."""
    tokens = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def text_encoder(kind, hidden_size=16):
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=hidden_size, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, bos_token_id=6, eos_token_id=7, pad_token_id=7,
    )  # fmt: skip
    return kind(config).eval()


def t5():
    """Tokenizer and encoder."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "abc": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(3)
    config = T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return (
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        T5EncoderModel(config).eval(),
    )


def pixart(kind, scheduler, **options):
    """The pipeline of a transformer that predicts its variance, too."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_layers=1, patch_size=2, attention_head_dim=12, num_attention_heads=2, in_channels=4, out_channels=8,
        cross_attention_dim=24, caption_channels=16, norm_num_groups=1, **options,
    ).eval()  # fmt: skip
    # They start at zero, and would not see the texts' lengths or the image's.
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    words, encoder = t5()
    return kind(tokenizer=words, text_encoder=encoder, vae=tiny_vae(), transformer=transformer, scheduler=scheduler)


def sana():
    """The pipeline, whose decoder has another number of levels than its encoder's channels would tell."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=8, timestep_scale=0.5,
    ).eval()  # fmt: skip
    levels = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1),
        }.items()
    }  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41407, **levels,
    ).eval()  # fmt: skip
    words, _ = t5()
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(words, Gemma2Model(config).eval(), vae, transformer, scheduler)


def flux(folder, *, told):
    """The pipeline, with images of 16 pixels unless another size is asked for."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=told,
    ).eval()  # fmt: skip
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    words, encoder = t5()
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, text_encoder(CLIPTextModel),
        tokenizer(folder / "words"), encoder, words, transformer,
    )  # fmt: skip


KINDS = ["sd", "sdxl", "sd3", "pixart", "pixart sizes", "sana", "flux", "flux told"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A pipeline with tiny networks, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param.startswith(("pixart", "sana", "flux")):
        scheduler = DDIMScheduler(clip_sample=False, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
        if request.param == "pixart":
            pipeline = pixart(PixArtSigmaPipeline, scheduler, sample_size=8)
        elif request.param == "pixart sizes":
            pipeline = pixart(PixArtAlphaPipeline, scheduler, sample_size=128)
        elif request.param == "sana":
            pipeline = sana()
        else:
            pipeline = flux(path, told=request.param == "flux told")
        pipeline.save_pretrained(path / "pipeline")
        return str(path / "pipeline")
    second = {
        "tokenizer_2": tokenizer(path / "more words"),
        "text_encoder_2": text_encoder(CLIPTextModelWithProjection, 8),
    }
    parts = {"vae": tiny_vae(), "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1, **BETAS)}
    first = {"tokenizer": tokenizer(path / "words"), "text_encoder": text_encoder(CLIPTextModel)}
    if request.param == "sd":
        pipeline = StableDiffusionPipeline(
            unet=tiny_unet(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            **parts, **first,
        )  # fmt: skip
    elif request.param == "sd3":
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        ).eval()  # fmt: skip
        parts["vae"].register_to_config(shift_factor=0.1)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
        first["text_encoder"] = text_encoder(CLIPTextModelWithProjection, 8)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, text_encoder_3=None, tokenizer_3=None, **parts, **first, **second
        )
    else:
        unet = tiny_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
        )
        # Both encoders' states are put side by side.
        first["text_encoder"] = text_encoder(CLIPTextModel, 8)
        pipeline = StableDiffusionXLPipeline(unet=unet, add_watermarker=False, **parts, **first, **second)
    pipeline.save_pretrained(path / "pipeline")
    return str(path / "pipeline")


def is_large(folder):
    """Flux does not say how large its images are, 128 pixels of latents; this size of PixArt is told the size."""
    return "flux" in folder or "sizes" in folder


def loaded(folder, prompts=PROMPTS, **options):
    """The model, for images of 16 pixels."""
    options |= {"image_size": 16} if is_large(folder) else {}
    return TextDenoiser.from_pretrained(folder, prompts, **options)


@pytest.mark.parametrize("negative", [None, "b"])
def test_the_images_are_those_of_the_pipeline(folder, negative):
    if negative and "flux-told" in folder:
        with pytest.raises(ValueError, match="is told its guidance: the negative_prompt 'b' would play no part"):
            loaded(folder, guidance_scale=3.0, negative_prompt=negative)
        return
    denoiser = loaded(folder, guidance_scale=3.0, negative_prompt=negative)
    assert denoiser.evaluations_per_call == (1 if "flux-told" in folder else 2)
    assert denoiser.settings()["guidance_scale"] == 3.0
    assert "null_label" not in denoiser.settings()
    assert (denoiser.state_shape, denoiser.image_shape, denoiser.num_conditions) == ((4, 8, 8), (3, 16, 16), 3)
    # No view of the rows of all prompts.
    kept = denoiser._negative["encoder_hidden_states"]
    assert kept.untyped_storage().nbytes() == kept.nbytes
    sampler = GGDMSampler(denoiser.schedule, 4, prediction_type=denoiser.prediction_type)
    third = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in folder else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **third)
    pipeline.scheduler = GGDMScheduler.from_sampler(sampler)
    pipeline.set_progress_bar_config(disable=True)
    indices = [4, 0, 7, 5]
    texts = [PROMPTS[i] for i in take_turns("test/0", indices, 3)]
    x_T = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    own = {"negative_prompt": None if negative is None else [negative] * 4}
    latents = x_T
    if "pixart" in folder or "sana" in folder:
        own = {"negative_prompt": negative or "", "use_resolution_binning": False}
    if "sana" in folder:
        # It takes multiples of 32, as its own decoder, which enlarges so much, needs them.
        pipeline.check_inputs = lambda *_: None
    if "flux" in folder:
        latents = pipeline._pack_latents(x_T, 4, 4, 8, 8)
        own = {} if "told" in folder else {"negative_prompt": [negative or ""] * 4, "true_cfg_scale": 3.0}
    images = pipeline(
        texts, guidance_scale=3.0, num_inference_steps=4, latents=latents, output_type="np", height=16, width=16, **own
    ).images
    with torch.no_grad():
        ours = denoiser.decode(sampler(denoiser.for_samples("test/0", indices), x_T))
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.from_numpy(images), rtol=1e-4, atol=1e-4)
    # The prompts are seen.
    assert (ours[0] - ours[1]).abs().max() > 1e-4


class Noise(LightningDataModule):
    """Real images that are none."""

    def real_dataloader(self):
        return torch.utils.data.DataLoader(torch.rand(12, 3, 16, 16) * 2 - 1, batch_size=6)

    def train_dataloader(self):
        return self.real_dataloader()


def test_a_sampler_learns(folder, tmp_path):
    """From a teacher of twelve calls; every part of a batch is shown its own prompts."""
    gradients = []
    teacher = TeacherPairs(8, 12, cache_dir=str(tmp_path))
    for options in ({}, {"microbatch_size": 4, "remat": "denoiser"}):
        denoiser = loaded(folder, guidance_scale=3.0)
        sampler = GGDMSampler(denoiser.schedule, 3, prediction_type=denoiser.prediction_type)
        module = DDSSModule(
            denoiser, sampler, RandomFeatures(3, 16), loss=TeacherLoss(), batch_size=6, teacher=teacher, **options
        )
        before = module.sampler.corrections["mu"].detach().clone()
        module.on_before_optimizer_step = lambda _, module=module: gradients.append(
            module.sampler.corrections["mu"].grad
        )
        Trainer(
            max_steps=1, accelerator="cpu", limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(module, Noise())  # fmt: skip
        assert not torch.equal(module.sampler.corrections["mu"].detach(), before)
        # What the prompts are is part of what the sampler was learned for, and no part of the weights.
        assert set(module.base_model["settings"]) >= {"guidance_scale", "prompts"}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))
    other = loaded(folder, PROMPTS[:2], guidance_scale=3.0)
    assert other.fingerprint() == module.denoiser.fingerprint()
    assert teacher.folder(other) != teacher.folder(module.denoiser)


def test_what_prompts_are_is_told_by_texts_and_encoders_not_by_rounding(folder, tmp_path):
    """Encoded ones differ in their last digits between processors: a fit could not be resumed on another."""
    saved = TextPipeline.read(folder, {})
    pipeline = saved.load(folder, {}, torch.float32)
    first = digest_of_texts(pipeline, PROMPTS, None)
    assert first == digest_of_texts(saved.load(folder, {}, torch.float32), PROMPTS, None)
    assert loaded(folder, PROMPTS).settings()["prompts"] == first
    others = [digest_of_texts(pipeline, PROMPTS[:2], None), digest_of_texts(pipeline, PROMPTS, "b")]
    with torch.no_grad():
        list(pipeline.text_encoder.parameters())[-1].add_(0.01)
    others.append(digest_of_texts(pipeline, PROMPTS, None))
    assert len({first, *others}) == 4


def test_prompts_from_a_file_and_wrong_ones(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("abc\n\n  a b \ncab\n")
    assert TextDenoiser.from_pretrained(folder, "prompts.txt").settings() == (
        TextDenoiser.from_pretrained(folder, PROMPTS).settings()
    )
    # As an editor of Windows writes it.
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfabc\r\n a b\r\ncab")
    assert read_prompts("marked.txt") == PROMPTS
    # Of the web: what some editors show as a new line is part of a caption.
    (tmp_path / "web.txt").write_text("abc\u2028def\nx\x0cy\x85z\n", encoding="utf-8")
    assert read_prompts("web.txt") == ["abc\u2028def", "x\x0cy\x85z"]
    for name, reason in {"none.txt": "No such file", "ab " * 100: "File name too long", ".": "Is a directory"}.items():
        with pytest.raises(ValueError, match=f"{reason}.*; give a text file with one in each line, or a list"):
            TextDenoiser.from_pretrained(folder, name)
    for prompts in (None, [1, 2], 3):
        with pytest.raises(ValueError, match="Prompts are a text file with one in each line, or a list of texts, got"):
            TextDenoiser.from_pretrained(folder, prompts)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"There is no prompt in 'empty\.txt'"):
        TextDenoiser.from_pretrained(folder, "empty.txt")
    least = "0" if "flux-told" in folder else "1"
    for scale in (-1.0, float("inf"), float("nan"), *([] if least == "0" else [0.0, 0.5])):
        with pytest.raises(ValueError, match=f"guidance_scale must be a number of at least {least}, got {scale}"):
            TextDenoiser.from_pretrained(folder, PROMPTS, guidance_scale=scale)
    with pytest.raises(ValueError, match="torch_dtype: a model is loaded in float32"):
        TextDenoiser.from_pretrained(folder, PROMPTS, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"Model, which is shown texts; use ddss_lightning\.TextDenoiser"):
        DiffusersDenoiser.from_pretrained(folder)


def test_guidance_that_is_not_said_is_that_of_the_pipeline(folder):
    expected = {
        "sd": 7.5,
        "sdxl": 5.0,
        "sd3": 7.0,
        "pixart": 4.5,
        "pixart-sizes": 4.5,
        "sana": 4.5,
        "flux": 1.0,
        "flux-told": 3.5,
    }
    denoiser = loaded(folder)
    kind = Path(folder).parent.name[:-1]
    assert denoiser.settings()["guidance_scale"] == expected[kind]


def test_images_of_another_size(folder):
    assert loaded(folder).image_shape == (3, 16, 16)
    other = TextDenoiser.from_pretrained(folder, PROMPTS, image_size=32)
    assert (other.state_shape, other.image_shape, other.settings()["image_size"]) == ((4, 16, 16), (3, 32, 32), 32)
    for wrong in (33, 0, -16, "32", 32.0):
        with pytest.raises(ValueError, match=rf"^image_size must be a multiple of \d .*for this model, got {wrong}\."):
            TextDenoiser.from_pretrained(folder, PROMPTS, image_size=wrong)
    if "sd3" in folder:
        # Its positions are a table.
        with pytest.raises(ValueError, match=r"a multiple of 2 up to 192 for this model, got 200\."):
            TextDenoiser.from_pretrained(folder, PROMPTS, image_size=200)
    as_trained = TextDenoiser.from_pretrained(folder, PROMPTS)
    # That which it has anyway is nothing to note.
    size = as_trained.image_shape[-1]
    for same in (as_trained, TextDenoiser.from_pretrained(folder, PROMPTS, image_size=size)):
        assert "image_size" not in same.settings()
    assert as_trained.image_shape == ((3, 256, 256) if is_large(folder) else (3, 16, 16))


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_a_size_that_the_configuration_has_as_a_list_is_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sample_size": [config["sample_size"]] * 2}))
    size = TextDenoiser.from_pretrained(folder, PROMPTS).image_shape[-1]
    assert "image_size" not in TextDenoiser.from_pretrained(str(tmp_path / "copy"), PROMPTS, image_size=size).settings()


def test_what_is_wrong_is_said_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    """A model of billions of weights takes minutes."""

    def load(*_):
        pytest.fail("it was loaded")

    monkeypatch.setattr(TextPipeline, "load", load)
    told = "flux-told" in folder
    wrong = {"guidance_scale": -0.5 if told else 0.5}, {"image_size": 33}
    for options in (*wrong, {"negative_prompt": "b", "guidance_scale": 1.0}):
        with pytest.raises(ValueError, match=f"^(guidance_scale|image_size) must be .*got|{PLAYS_NO_PART}"):
            TextDenoiser.from_pretrained(folder, PROMPTS, **options)
    # Saved without what reads the prompts.
    shutil.copytree(folder, tmp_path / "copy")
    index = json.loads(Path(folder, "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="it was saved without its text_encoder, which the prompts need"):
        TextDenoiser.from_pretrained(str(tmp_path / "copy"), PROMPTS)


def test_a_fit_is_not_resumed_at_another_size(folder):
    modules = []
    for size in (16, 32):
        denoiser = TextDenoiser.from_pretrained(folder, PROMPTS, image_size=size)
        sampler = GGDMSampler(denoiser.schedule, 3, prediction_type=denoiser.prediction_type)
        modules.append(DDSSModule(denoiser, sampler, RandomFeatures(3, size)))
    assert modules[0]._compared()["denoiser.prompts"]
    assert modules[0]._compared() != modules[1]._compared()


def test_pixart_as_it_was_published(tmp_path):
    """Its configuration names the class of a DiT; neither is taken for the other."""
    pixart(PixArtSigmaPipeline, DDIMScheduler(clip_sample=False), sample_size=8).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(path.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    assert TextDenoiser.from_pretrained(str(tmp_path), PROMPTS).image_shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"is a PixArtTransformer2DModel, which is shown texts; use .*TextDenoiser"):
        DiffusersDenoiser.from_pretrained(str(tmp_path))


def test_each_text_is_encoded_once(folder, monkeypatch):
    """The largest encoders have five billion weights, and run on the CPU."""
    rows, inside = [], []
    for kind in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, Gemma2Model):
        forward = kind.forward

        def counted(self, input_ids, *args, forward=forward, **kwargs):
            # One can hold another.
            rows.extend([] if inside else [len(input_ids)])
            inside.append(self)
            found = forward(self, input_ids, *args, **kwargs)
            inside.pop()
            return found

        monkeypatch.setattr(kind, "forward", counted)
    loaded(folder, ["a", "b"] * 32)
    per_prompt = 2 if any(name in folder for name in ("sdxl", "sd3", "flux")) else 1
    # Of the negative prompt one row; Stable Diffusion encodes an empty prompt beside it.
    assert 64 * per_prompt < sum(rows) <= 66 * per_prompt


def test_weights_in_half_precision_are_read_in_float32(folder, tmp_path):
    """So that prompts are the same whatever the versions of the libraries that read them."""
    third = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in folder else {}
    DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **third).save_pretrained(tmp_path / "half")
    denoiser = TextDenoiser.from_pretrained(str(tmp_path / "half"), PROMPTS)
    kinds = {rows.dtype for rows in denoiser._prompts.values()} | {value.dtype for value in denoiser.parameters()}
    assert kinds <= {torch.float32, torch.int64}


def test_a_network_in_half_precision(folder):
    """It alone is: its images are those in float32 but for rounding, and so is the gradient of a chain."""
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for weights in ("float32", "bfloat16"):
        denoiser = loaded(folder, guidance_scale=3.0, weights=weights)
        sampler = GGDMSampler(denoiser.schedule, 3, prediction_type=denoiser.prediction_type)
        images = denoiser.decode(sampler(denoiser.for_samples("test/0", [0, 1]), x_T))
        assert images.dtype == torch.float32
        images.square().mean().backward()
        found.append((images.detach(), sampler.corrections["time"].grad, sampler.corrections["nu"].grad))
    kinds = [{value.dtype for value in part.parameters()} for part in (denoiser.unet, denoiser.vae)]
    assert torch.bfloat16 in kinds[0]
    assert kinds[1] == {torch.float32}
    for exact, rounded in zip(*found, strict=True):
        error = (rounded - exact).norm() / exact.norm()
        # The tiny Flux is the worst: 0.20 on some processors.
        assert 0 < error < 0.3, error
    with pytest.raises(ValueError, match="Unknown precision 'float16' of weights; choose one of float32, bfloat16"):
        loaded(folder, weights="float16")


def test_flux_sees_real_valued_times_in_half_precision(tmp_path):
    """Its own rounding makes a staircase of them, on which nothing is learned, with steps of 4 in 1000."""
    flux(tmp_path, told=True).save_pretrained(tmp_path / "pipeline")
    denoiser = TextDenoiser.from_pretrained(str(tmp_path / "pipeline"), PROMPTS, image_size=16)
    shown = denoiser.for_samples("test/0", [0])
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for network in (shown, copy.deepcopy(shown)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs = [network(x_t, torch.tensor([time])) for time in (900.0, 900.5, 901.0, 901.5)]
        steps = [(b - a).abs().max().item() for a, b in itertools.pairwise(outputs)]
        # All about equal, none without a change.
        assert min(steps) > 0.2 * max(steps) > 0


def test_networks_and_encoded_prompts_that_do_not_fit(schedule):
    rows = {"encoder_hidden_states": torch.zeros(3, 8, 16), "text_embeds": torch.zeros(2, 16)}
    with pytest.raises(
        ValueError, match=r"as many rows of each name, got \{'encoder_hidden_states': 3, 'text_embeds': 2"
    ):
        TextDenoiser(tiny_unet(), schedule, rows, {name: value[:1] for name, value in rows.items()})
    rows.pop("text_embeds")
    with pytest.raises(ValueError, match="guidance_scale must be a number of at least 1, got None"):
        TextDenoiser(tiny_unet(), schedule, rows, rows, guidance_scale=None)
    with pytest.raises(ValueError, match="is told its guidance scale"):
        TextDenoiser(tiny_unet(time_cond_proj_dim=16), schedule, rows, rows)


def test_decoders_with_moments_of_their_latents(tmp_path):
    """As some models of the architecture of SDXL have them; its pipeline looks at both."""
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
    )
    vae = tiny_vae()
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(**BETAS))
    sampler = GGDMSampler(schedule, 3)
    words = {"tokenizer": tokenizer(tmp_path / "words"), "text_encoder": text_encoder(CLIPTextModel, 8)}
    pipeline = StableDiffusionXLPipeline(
        unet=unet, vae=vae, scheduler=GGDMScheduler.from_sampler(sampler), add_watermarker=False, **words,
        tokenizer_2=words["tokenizer"], text_encoder_2=text_encoder(CLIPTextModelWithProjection, 8),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    shown, negative = encode_prompts(pipeline, PROMPTS)
    denoiser = TextDenoiser(unet, schedule, shown, negative, vae=vae, guidance_scale=3.0)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = [PROMPTS[i] for i in take_turns("test/0", [0, 1], 3)]
    images = pipeline(
        texts, guidance_scale=3.0, num_inference_steps=3, latents=x_T, output_type="np", height=16, width=16
    ).images
    with torch.no_grad():
        last = sampler(denoiser.for_samples("test/0", [0, 1]), x_T)
        ours = (denoiser.decode(last) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        assert torch.equal(denoiser.decode_in_parts(last, 1), torch.cat([denoiser.decode(each[None]) for each in last]))
    torch.testing.assert_close(ours, torch.from_numpy(images), rtol=1e-4, atol=1e-4)
    # As a card has it again.
    settings = json.loads(json.dumps(denoiser.settings()))
    assert settings == denoiser.settings()
    assert settings["latents"] == [[0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]]
    assert "latents" not in TextDenoiser(unet, schedule, shown, negative, vae=tiny_vae()).settings()


def test_another_kind_of_pipeline(tmp_path, denoiser):
    with pytest.raises(ValueError, match="it is a 'DDPMPipeline', not one of StableDiffusionPipeline, StableDiff"):
        TextDenoiser.from_pretrained(denoiser.name, PROMPTS)
    DDPMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="could not be loaded: it is a ''"):
        TextDenoiser.from_pretrained(str(tmp_path), PROMPTS)


def test_flux_starts_where_its_pipeline_does(tmp_path):
    """As docs/diffusers.md has it, with the shift of images of 16 pixels."""
    pipeline = flux(tmp_path, told=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    denoiser = TextDenoiser.from_pretrained(str(tmp_path / "pipeline"), PROMPTS, guidance_scale=3.0, image_size=16)
    times = {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": calculate_shift(16)}
    sampler = GGDMSampler.from_scheduler(pipeline.scheduler, 4, set_timesteps=times)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(
        [PROMPTS[i] for i in take_turns("test/0", [0, 1], 3)], guidance_scale=3.0, num_inference_steps=4,
        latents=pipeline._pack_latents(x_T, 2, 4, 8, 8), output_type="np", height=16, width=16,
    ).images  # fmt: skip
    with torch.no_grad():
        ours = denoiser.decode(sampler(denoiser.for_samples("test/0", [0, 1]), x_T))
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.from_numpy(images), rtol=1e-4, atol=1e-4)
