import math

import pytest
import torch

from ddss_lightning.features import RandomFeatures


def test_features_are_means_and_deviations_of_every_layer():
    network = RandomFeatures(image_channels=2, image_size=8, width=5, num_stages=2, seed=3)
    images = torch.rand(4, 2, 8, 8) * 2 - 1
    first, second = network.layers

    def convolved(layer, x):
        return torch.nn.functional.silu(layer(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")))

    h = convolved(first, images)
    g = convolved(second, h.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))
    expected = []
    for x in (h, g):
        values = x.flatten(2)
        mean = values.mean(2)
        expected += [mean, ((values - mean[..., None]).square().mean(2) + 1e-4).sqrt()]
    features = network(images)
    assert features.shape == (4, network.num_features)
    torch.testing.assert_close(features, torch.cat(expected, 1))


def test_weights_are_a_function_of_the_seed_alone():
    before = torch.random.get_rng_state()
    one = RandomFeatures(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    again, other = RandomFeatures(seed=1), RandomFeatures(seed=2)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    assert not any(p.requires_grad for p in one.parameters())
    weights = one.layers[1].weight
    assert weights.std() == pytest.approx(math.sqrt(2 / (9 * 48)), rel=0.02)


def test_gradients_are_finite_on_a_constant_image():
    images = torch.zeros(2, 3, 16, 16, requires_grad=True)
    RandomFeatures(image_size=16)(images).sum().backward()
    assert images.grad.isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        RandomFeatures(width=0)
    with pytest.raises(ValueError, match="multiple of 4 and at least 8 pixels for 3 stages, got 6"):
        RandomFeatures(image_size=6)
    with pytest.raises(ValueError, match="takes images of shape"):
        RandomFeatures(image_size=16)(torch.zeros(2, 3, 8, 8))
