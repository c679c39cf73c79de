import pytest
import torch

from ddss_lightning.features import ConvFeatures, ResidualFeatures, load_any


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    network = ResidualFeatures(image_channels=3, image_size=16, width=8)
    network.save_pretrained(tmp_path)
    again = ResidualFeatures.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(images), network(images))
    assert again(images).shape == (2, again.num_features) == (2, 32)
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(NotImplementedError, match="has no classification head"):
        again.logits(again(images))
    with pytest.raises(ValueError, match="its class is ResidualFeatures, not ConvFeatures"):
        ConvFeatures.from_pretrained(tmp_path)


def test_a_folder_says_of_what_class_its_network_is(tmp_path):
    for network in (ResidualFeatures(1, 8, 8), ConvFeatures(1, 8, 8)):
        network.save_pretrained(tmp_path)
        again = load_any(tmp_path)
        assert (type(again), again.fingerprint()) == (type(network), network.fingerprint())
        assert not any(p.requires_grad for p in again.parameters())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("ConvFeatures", "Inception"))
    with pytest.raises(ValueError, match="its class is Inception, not ConvFeatures or ResidualFeatures"):
        load_any(tmp_path)
    with pytest.raises(ValueError, match="Give the folder written by `save_pretrained` of ConvFeatures or Residual"):
        load_any(tmp_path / "nothing")


def test_without_its_convolutions_a_block_is_its_short_way():
    network = ResidualFeatures(3, 8, 8)
    block = network.body[1]
    torch.nn.init.zeros_(block.conv_2.weight)
    torch.nn.init.zeros_(block.conv_2.bias)
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(block(x), x)


def test_features_are_differentiable_in_the_images():
    torch.manual_seed(0)
    network = ResidualFeatures(1, 8, 8).double().freeze()
    images = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (images,), atol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="image_size must be a multiple of 8, got 20"):
        ResidualFeatures(image_size=20)
    with pytest.raises(ValueError, match="width must be a multiple of 8, got 12"):
        ResidualFeatures(width=12)
    with pytest.raises(ValueError, match=r"takes images of shape \(3, 32, 32\)"):
        ResidualFeatures()(torch.zeros(1, 3, 16, 16))
