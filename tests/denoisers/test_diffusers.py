import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, KarrasVeScheduler, UNet2DModel

from ddss_lightning.denoisers import DiffusersDenoiser
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


def test_wrong_size_and_learned_variance(denoiser):
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\) \(channels, height, width\), got \(3, 8, 8\)"):
        denoiser(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=2, norm_num_groups=4, **small)
    with pytest.raises(ValueError, match="learned variance"):
        DiffusersDenoiser(unet, denoiser.schedule)


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
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_class_embeds": 10}))
    with pytest.raises(ValueError, match="only an unconditional UNet2DModel is supported"):
        DiffusersDenoiser.from_pretrained(str(tmp_path / "m"))
