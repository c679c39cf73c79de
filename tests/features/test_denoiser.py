import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel, VQModel
from lightning.pytorch import Trainer

from ddss_lightning import (
    DDSSModule,
    DenoiserFeatures,
    DiffusersDenoiser,
    DigitsDataModule,
    GGDMSampler,
    InFeatures,
    KIDLoss,
    PixelFeatures,
    WeightedSum,
)
from ddss_lightning.losses.base import Samples
from tests.conftest import ROOT


@pytest.fixture
def small(schedule):
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=down, up_block_types=up, attention_head_dim=4, num_class_embeds=3,
    )  # fmt: skip
    return DiffusersDenoiser(unet, schedule, null_label=2)


def test_features_are_statistics_of_the_network_s_own_blocks(small, schedule):
    """The way down, block by block, of alpha_t x at time t and the null label."""
    features, unet = DenoiserFeatures(small, logsnr=1.0), small.unet
    images = torch.rand(3, 2, 8, 8) * 2 - 1
    time = schedule.timestep(torch.tensor([1.0], dtype=torch.float64))
    alpha = schedule.alpha_sigma(time)[0].float()
    with torch.no_grad():
        emb = unet.time_embedding(unet.time_proj(time.float().expand(3))) + unet.class_embedding(torch.full((3,), 2))
        h, seen = unet.conv_in(alpha * images), []
        for block in unet.down_blocks:
            h = block(hidden_states=h, temb=emb)[0]
            seen.append(h)
        seen.append(unet.mid_block(h, emb))
        expected = [each for h in seen for each in (h.mean((2, 3)), (h.var((2, 3), correction=0) + 1e-4).sqrt())]
        found = features(images)
    assert features.num_features == found.shape[1] == 2 * (4 + 8 + 8)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    assert not any(block._forward_hooks for block in unet.down_blocks)


def test_the_null_label_is_shown_whatever_the_model_is_guided_to(small, schedule):
    images = torch.rand(3, 2, 8, 8) * 2 - 1
    guided = DiffusersDenoiser(small.unet, schedule, null_label=2, guidance_scale=2.0)
    with torch.no_grad():
        assert torch.equal(DenoiserFeatures(guided)(images), DenoiserFeatures(small)(images))
    assert guided.guidance_scale == 2


def test_gradients_reach_the_images(small):
    features = DenoiserFeatures(small).double()
    images = (torch.rand(2, 2, 8, 8) * 2 - 1).double()
    direction = torch.randn(images.shape, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(features(leaf).square().sum(), leaf)
    low, high = (features(images + step * direction).square().sum() for step in (-1e-5, 1e-5))
    torch.testing.assert_close((slope * direction).sum(), (high - low) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_time_is_part_of_the_fingerprint(small):
    first, same, other = (DenoiserFeatures(small, logsnr).fingerprint() for logsnr in (1.0, 1.0, 2.0))
    assert first == same != other


def test_a_shipped_model_from_its_folder(at_root, denoiser):
    """Of linear betas the default time is about timestep 50; the network is used, not changed."""
    features = DenoiserFeatures.from_pretrained("checkpoints/digits-ddpm")
    assert float(features.timestep) == pytest.approx(50, abs=1)
    assert features.denoiser.fingerprint() == denoiser.fingerprint()
    assert not any(value.requires_grad for value in features.parameters())
    loss = WeightedSum({"own": InFeatures(features, KIDLoss(standardize=True))})
    real = torch.rand(64, 1, 8, 8) * 2 - 1
    loss.fit_real(torch.zeros(64, 3), lambda network: network(real))
    near, far = (float(loss(Samples(images=images))) for images in (real[:32], real[:32] * 0.5))
    assert far > near + 0.01


def test_a_network_of_classes_is_read_with_its_null_label(small, tmp_path):
    """`classes.json` is not on the hub; the error names this part, not the model that was given its label already."""
    DDPMPipeline(small.unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"DenoiserFeatures of '.*the network has classes\. .*null_label"):
        DenoiserFeatures.from_pretrained(str(tmp_path))
    found = DenoiserFeatures.from_pretrained(str(tmp_path), null_label=2)
    assert found.fingerprint() == DenoiserFeatures(DiffusersDenoiser.from_pretrained(str(tmp_path), 2)).fingerprint()


def test_features_of_another_model_than_the_one_that_is_sampled_are_told(tmp_path, monkeypatch):
    """A path that is changed in one place of a recipe alone."""
    monkeypatch.chdir(ROOT)
    path = "checkpoints/digits-ddpm"
    denoiser, same = DiffusersDenoiser.from_pretrained(path), DenoiserFeatures.from_pretrained(path)
    other = DenoiserFeatures(DiffusersDenoiser(denoiser.unet, denoiser.schedule, name="another"))

    def fit(features):
        loss = InFeatures(features, KIDLoss())
        module = DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 1), PixelFeatures(1, 8), loss, 2)
        data = DigitsDataModule(steps_per_epoch=1, num_val_images=2)
        Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, logger=False,
                enable_checkpointing=False, enable_progress_bar=False).fit(module, data)  # fmt: skip

    with pytest.warns(UserWarning, match="The model is 'checkpoints/digits-ddpm', .* those of 'another'"):
        fit(other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*DenoiserFeatures of the loss")
        fit(same)


def test_what_has_no_features_of_images(small, schedule):
    vae = VQModel(
        in_channels=3, out_channels=3, block_out_channels=(4,), latent_channels=2, norm_num_groups=2,
        num_vq_embeddings=8, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="denoises latents, not images"):
        DenoiserFeatures(DiffusersDenoiser(small.unet, schedule, null_label=2, vae=vae))
    with pytest.raises(ValueError, match=r"the network has classes\. Give these features, too, the null_label"):
        DenoiserFeatures(DiffusersDenoiser(small.unet, schedule, guidance_scale=1.0))
    with pytest.raises(ValueError, match="logsnr must be a finite number, got nan"):
        DenoiserFeatures(small, float("nan"))
    other = torch.nn.Module()
    other.config = small.unet.config
    with pytest.raises(ValueError, match="a Module without `down_blocks`"):
        DenoiserFeatures(DiffusersDenoiser(other, schedule, null_label=2))
    with pytest.raises(ValueError, match="takes images of shape"):
        DenoiserFeatures(small)(torch.zeros(2, 3, 8, 8))
