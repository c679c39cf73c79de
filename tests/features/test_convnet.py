import pytest
import torch

from ddss_lightning.data.digits import load_digits_tensors
from ddss_lightning.features import ConvFeatures, FeatureExtractor


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    network = ConvFeatures(image_channels=3, image_size=4, width=4, num_features=6, num_classes=3)
    network.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    again = ConvFeatures.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 4, 4)
    # Weights that lie channels last may be summed in another order.
    torch.testing.assert_close(again(images), network(images))
    assert again.logits(again(images)).shape == (2, 3)
    assert not any(p.requires_grad for p in again.parameters())


def test_the_shipped_network_knows_its_digits(features):
    images, labels = load_digits_tensors()
    accuracy = (features.logits(features(images)).argmax(1) == labels).float().mean()
    assert accuracy > 0.99


def test_bad_input(tmp_path, features):
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 8, 8\) .* got \(1, 9, 9\)"):
        features(torch.zeros(1, 1, 9, 9))
    with pytest.raises(TypeError, match=r"images must be floats in \[-1, 1\], got torch.uint8; convert bytes"):
        features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"'config.json' is missing"):
        ConvFeatures.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        ConvFeatures.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a multiple of 2 pixels for 2 stages, got 7"):
        ConvFeatures(image_size=7)
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        ConvFeatures(num_stages=0)


def test_each_stage_halves_the_resolution_and_doubles_the_channels():
    network = ConvFeatures(3, image_size=16, width=4, num_features=6, num_classes=3, num_stages=3)
    shapes = [tuple(p.shape) for p in network.parameters() if p.ndim > 1]
    assert shapes == [
        *((4, 3, 3, 3), (4, 4, 3, 3), (8, 4, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3)),
        *((6, 16 * 4 * 4), (3, 6)),
    ]
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 6)


def test_a_network_without_classes_says_so():
    class Plain(FeatureExtractor):
        def forward(self, images):
            return images.flatten(1)

    with pytest.raises(NotImplementedError, match="Plain has no classification head"):
        Plain().logits(torch.zeros(1, 2))
