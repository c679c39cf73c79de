import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

from ddss_lightning.data import GlyphsDataModule, glyphs
from ddss_lightning.data.glyphs import load_glyphs
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.glyphs import draw_scene, render
from ddss_lightning.losses import KIDLoss
from ddss_lightning.module import DDSSModule


def test_the_cache_is_whole_or_not_there(tmp_path, monkeypatch):
    first = load_glyphs("train", 16, tmp_path, num_images=70)
    (path,) = tmp_path.iterdir()
    assert path.name == "glyphs-1-train-16-70.safetensors"
    assert first.pixels.dtype == torch.uint8
    assert first.labels[:63].tolist() == [*range(62), 0]
    assert first.faces[[0, 62]].tolist() == [0, 1]
    expected = render(draw_scene("train", 69), 16)
    assert np.array_equal(first.pixels[69].numpy(), expected)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, "render_split", fail)
    again = load_glyphs("train", 16, tmp_path, num_images=70)  # nothing is drawn again
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(KeyboardInterrupt):
        load_glyphs("train", 32, tmp_path, num_images=70)
    monkeypatch.undo()
    monkeypatch.setattr(glyphs, "save_file", lambda *_, **__: (_[1].write_bytes(b"half"), fail()))
    with pytest.raises(KeyboardInterrupt):
        load_glyphs("held_out", 32, tmp_path, num_images=70)
    assert list(tmp_path.iterdir()) == [path]


def test_another_recipe_or_fonts_and_damage_are_refused(tmp_path, monkeypatch):
    load_glyphs("train", 16, tmp_path, num_images=2)
    (path,) = tmp_path.iterdir()
    arrays = load_file(path)
    save_file(arrays, path, metadata={**glyphs.cache_key("train", 16, 2), "fonts": "others"})
    with pytest.raises(ValueError, match=r"have fonts others instead of \w{16}; delete the file"):
        load_glyphs("train", 16, tmp_path, num_images=2)
    save_file(arrays, path)
    with pytest.raises(ValueError, match="recipe None instead of 1"):
        load_glyphs("train", 16, tmp_path, num_images=2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="are damaged"):
        load_glyphs("train", 16, tmp_path, num_images=2)
    with pytest.raises(ValueError, match="Unknown split 'test'; choose one of train, held_out"):
        load_glyphs("test", 16, tmp_path)
    with pytest.raises(ValueError, match="size must be a divisor of 256, such as 16 or 32, got 20"):
        load_glyphs("train", 20, tmp_path)
    # A new recipe gets a file of its own.
    monkeypatch.setattr(glyphs, "RECIPE", 2)
    load_glyphs("train", 16, tmp_path, num_images=2)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, path.name.replace("glyphs-1", "glyphs-2")}


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_glyphs("train", 16, num_images=2)
    assert (tmp_path / "ddss_lightning" / "glyphs-1-train-16-2.safetensors").is_file()


def test_a_trainer_learns_with_it(tmp_path, schedule):
    """Images in [-1, 1] of the right shape reach the loss, the bank and the metrics."""
    from diffusers import UNet2DModel

    from ddss_lightning.denoisers import DiffusersDenoiser
    from ddss_lightning.features import ResidualFeatures

    data = GlyphsDataModule(
        size=16,
        cache_dir=str(tmp_path / "cache"),
        num_images=64,
        batch_size=8,
        steps_per_epoch=2,
        num_val_images=4,
        eval_batch_size=32,
    )
    data.prepare_data()
    images = torch.cat(list(data.real_dataloader()))
    assert images.shape == (64, 3, 16, 16)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.9
    assert 0.9 < images.max() <= 1
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=3,
        **small,
    )
    sampler = GGDMSampler(schedule, 2)
    before = [p.detach().clone() for p in sampler.parameters()]
    module = DDSSModule(
        DiffusersDenoiser(unet, schedule, null_label=2), sampler, ResidualFeatures(3, 16, 8).freeze(), loss=KIDLoss()
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=2, default_root_dir=tmp_path, **options).fit(module, data)
    assert any(not torch.equal(a, b) for a, b in zip(before, sampler.parameters(), strict=True))
