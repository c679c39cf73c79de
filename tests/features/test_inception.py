"""The network of torch-fidelity with random weights: the real ones are not shipped."""

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as theirs

from ddss_lightning.features import InceptionFeatures
from ddss_lightning.features import inception as inception_file
from ddss_lightning.features.inception import WEIGHTS_SHA256

SHAPE = (3, 24, 20)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights that keep the activations' size through the layers."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(nn.Conv2d, "reset_parameters", lambda self: None)
        network = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return InceptionFeatures(SHAPE, weights, sha256=None)


@pytest.fixture
def small(monkeypatch):
    """A ninth of the work, where the size does not matter."""
    monkeypatch.setattr(inception_file, "INPUT_SIZE", 99)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(256, (1, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_equal_to_the_uint8_path_of_torch_fidelity(inception, weights, pixels):
    reference = theirs.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    expected, logits = reference(pixels)
    features = inception(pixels / 127.5 - 1)
    scale = float(expected.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(inception.logits(features), logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert features.shape == (1, 2048)


def test_frozen_and_differentiable_in_the_images(inception, pixels, small):
    images = (pixels[:1] / 127.5 - 1).requires_grad_()
    inception.train()(images).square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().amax((0, 1)).gt(0).float().mean() > 0.9
    assert not any(p.requires_grad or p.grad is not None for p in inception.parameters())
    assert not inception.body.training


def test_other_resizes_and_grey_images(weights, pixels, small):
    grey = pixels[:1, :1] / 127.5 - 1
    of_grey = InceptionFeatures((1, *SHAPE[1:]), weights, resize="bicubic-antialias", sha256=None)
    of_colour = InceptionFeatures(SHAPE, weights, resize="bicubic-antialias", sha256=None)
    with torch.no_grad():
        torch.testing.assert_close(of_grey(grey), of_colour(grey.repeat(1, 3, 1, 1)))
    assert of_grey.protocol()["resize"] == "bicubic-antialias"
    assert of_grey.fingerprint() == of_colour.fingerprint()
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 24, 20\)"):
        of_grey(pixels / 127.5 - 1)
    with pytest.raises(ValueError, match="Unknown resize 'nearest'"):
        InceptionFeatures(SHAPE, weights, resize="nearest", sha256=None)
    with pytest.raises(ValueError, match=r"must be \(1 or 3, height, width\)"):
        InceptionFeatures((4, 8, 8), weights, sha256=None)


def test_hash(weights):
    with pytest.raises(ValueError, match=f"not {WEIGHTS_SHA256}: it is damaged, or holds other weights"):
        InceptionFeatures(SHAPE, weights)
    InceptionFeatures(SHAPE, weights, sha256=hashlib.sha256(weights.read_bytes()).hexdigest()[:8])


def test_missing_weights_and_explicit_download(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    calls = []

    def download(url, path, hash_prefix):
        calls.append((url, hash_prefix))
        Path(path).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError, match=rf"looked for '.*hub/checkpoints/{name}'. Give download=True"):
        InceptionFeatures(SHAPE)
    with pytest.raises(ValueError, match=r"No Inception weights at 'nowhere.pth'"):
        InceptionFeatures(SHAPE, "nowhere.pth", download=True)
    assert not calls
    InceptionFeatures(SHAPE, download=True, sha256=None)
    assert calls == [(theirs.URL_INCEPTION_V3, WEIGHTS_SHA256)]
    InceptionFeatures(SHAPE, sha256=None)
    assert len(calls) == 1

    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "hub" / "checkpoints" / name).unlink()
    with pytest.raises(ValueError, match=rf"cannot be fetched from http.*not known.*put them at '.*{name}', or give"):
        InceptionFeatures(SHAPE, download=True)


class Dangerous:
    def __reduce__(self):
        return (print, ("code of the file was run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_weights(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Dangerous()))
    torch.save({"a": Dangerous()}, tmp_path / "zip.pth")
    for name in ("text", "other", "code", "zip"):
        with pytest.raises(ValueError, match=f"{name}.pth' holds no weights of the FID Inception network"):
            InceptionFeatures(SHAPE, tmp_path / f"{name}.pth", sha256=None)
    assert "was run" not in capsys.readouterr().out
