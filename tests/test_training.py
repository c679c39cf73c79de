"""The training scripts of `checkpoints/`: what is interrupted and resumed is what was never interrupted."""

import argparse
import sys

import pytest
import torch
from safetensors.torch import load_file

from ddss_lightning.data.glyphs import load_glyphs
from ddss_lightning.denoisers import DiffusersDenoiser
from tests.conftest import ROOT


@pytest.fixture
def scripts(monkeypatch):
    """The modules `training` and `make_glyphs`, as `python checkpoints/make_glyphs.py` finds them."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "checkpoints"), *sys.path])
    import make_glyphs
    import training

    return training, make_glyphs


@pytest.fixture
def settings(scripts):
    return scripts[1].Settings(
        size=8, encoder_width=8, encoder_iterations=5, encoder_batch=4, channels=(8,), attention=(), iterations=(2, 3),
        batch_size=4, num_images=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_glyphs("train", 8, tmp_path_factory.mktemp("cache"), num_images=62)


def test_ddpm_resumes_bit_for_bit(scripts, settings, data, tmp_path, monkeypatch):
    _, make_glyphs = scripts
    save_png, pictures = make_glyphs.save_png, []

    def interrupt(image, path):
        save_png(image, path)
        pictures.append(path.name)
        if len(pictures) == 3:
            raise KeyboardInterrupt

    make_glyphs.make_ddpm(tmp_path / "whole", data, settings, "cpu")
    monkeypatch.setattr(make_glyphs, "save_png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_glyphs.make_ddpm(tmp_path / "parts", data, settings, "cpu", save_minutes=0)
    assert not (tmp_path / "parts").exists()
    resumed, _ = make_glyphs.make_ddpm(tmp_path / "parts", data, settings, "cpu", save_minutes=0)
    assert pictures == [f"samples-{done:06d}.png" for done in (1, 2, 3, 4, 5)]  # no iteration twice, none left out
    whole, parts = (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()

    loaded = DiffusersDenoiser.from_pretrained(str(tmp_path / "parts"))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t), resumed(x, t), rtol=1e-4, atol=1e-5)
        # It has learned: not the network that training started from.
        torch.manual_seed(settings.seed)
        fresh = DiffusersDenoiser(make_glyphs.make_unet(settings), loaded.schedule, null_label=62)
        assert not torch.allclose(loaded(x, t), fresh(x, t), atol=1e-5)


def test_another_run_s_state_is_refused(scripts, settings, data, tmp_path):
    _, make_glyphs = scripts
    make_glyphs.make_features(tmp_path / "f", data, settings, "cpu")
    settings.seed = 1
    with pytest.raises(SystemExit, match="holds another run"):
        make_glyphs.make_features(tmp_path / "f", data, settings, "cpu")


@pytest.mark.parametrize("maker", ["make_features", "make_judge"])
def test_encoders_resume_bit_for_bit(scripts, settings, data, tmp_path, monkeypatch, maker):
    training, make_glyphs = scripts
    make = getattr(make_glyphs, maker)
    make(tmp_path / "whole", data, settings, "cpu")
    monkeypatch.setattr(training, "save_atomically", interrupted_after(2, training.save_atomically))
    monkeypatch.setattr(make_glyphs, "train", with_save_minutes(0, training.train))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", data, settings, "cpu")
    make(tmp_path / "parts", data, settings, "cpu")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def interrupted_after(calls, function):
    """`function`, but its call number `calls` raises KeyboardInterrupt when it is done."""
    done = []

    def wrapped(*args):
        function(*args)
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt

    return wrapped


def with_save_minutes(minutes, train):
    return lambda *args, **kwargs: train(*args, **{**kwargs, "save_minutes": minutes})


def test_classifier_learns(scripts, settings, data, tmp_path):
    """62 images of 62 classes are known by heart after some passes."""
    _, make_glyphs = scripts
    settings.encoder_iterations, settings.encoder_batch = 250, 62
    features, _ = make_glyphs.make_features(tmp_path / "f", data, settings, "cpu")
    images = make_glyphs.images_at(data, torch.arange(62))
    assert (features.logits(features(images)).argmax(1) == data.labels).float().mean() > 0.9


def test_sampling_is_kept_and_repeatable(scripts, settings, data, tmp_path, mixture, monkeypatch):
    """From an exact denoiser of one image, 1000 steps make that image; a finished batch is not made again."""
    from ddss_lightning.denoisers import MixtureDenoiser

    _, make_glyphs = scripts
    monkeypatch.setattr(make_glyphs, "SAMPLE_BATCH", 2)
    settings.num_images = 3
    image = make_glyphs.images_at(data, torch.tensor([5]))
    denoiser = MixtureDenoiser(image, 1e-3, mixture.schedule)
    made = make_glyphs.sample_ddpm(denoiser, tmp_path, settings, "cpu")
    assert made.shape == (3, 3, 8, 8)
    torch.testing.assert_close(made, image.expand(3, -1, -1, -1), atol=2e-2, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-0.pt", "images-2.pt"]
    (tmp_path / "images-2.pt").unlink()
    assert torch.equal(make_glyphs.sample_ddpm(denoiser, tmp_path, settings, "cpu"), made)
    fast = make_glyphs.sample_ddim(denoiser, 3, 10, settings, "cpu")
    torch.testing.assert_close(fast, made, atol=2e-2, rtol=0)


def test_only_the_ddpm(scripts, settings, tmp_path, data, monkeypatch, capsys):
    """With the encoders that are there, which stay as they are; refused before any work where they do not fit."""
    _, make_glyphs = scripts
    make_glyphs.make_features(tmp_path / "glyphs-features", data, settings, "cpu")
    command = ["make_glyphs.py", "--only_ddpm", "--output", str(tmp_path), "--size", "8", "--num_images", "130"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        make_glyphs.parse()
    assert "there is no" in capsys.readouterr().err
    make_glyphs.make_judge(tmp_path / "glyphs-judge", data, settings, "cpu")
    monkeypatch.setattr(sys, "argv", [*command[:-4], "--size", "16"])
    with pytest.raises(SystemExit):
        make_glyphs.parse()
    assert "images of 8 pixels, not 16" in capsys.readouterr().err

    weights = [tmp_path / f"glyphs-{name}" / "model.safetensors" for name in ("features", "judge")]
    before = [path.read_bytes() for path in weights]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(make_glyphs, "load_glyphs", lambda *_: data)
    monkeypatch.setattr(make_glyphs, "parse", lambda: (make_glyphs_args(tmp_path), settings))
    settings.num_images = 130
    monkeypatch.setattr(make_glyphs, "sample_ddpm", lambda d, p, s, v: make_glyphs.sample_ddim(d, 130, 2, s, v))
    make_glyphs.main()
    assert "2 + 3 iterations of 4 images" in (tmp_path / "glyphs-ddpm" / "README.md").read_text()
    assert [path.read_bytes() for path in weights] == before
    assert not list(tmp_path.glob("glyphs-ddpm.partial"))


def make_glyphs_args(folder):
    return argparse.Namespace(preset="cpu", output=folder, device="cpu", cache_dir=None, only_ddpm=True)
