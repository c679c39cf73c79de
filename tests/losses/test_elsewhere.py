import pytest
import torch
from torch import Tensor, nn

from ddss_lightning.features import ConvFeatures, FeatureExtractor
from ddss_lightning.losses import FrechetLoss, InFeatures, KIDLoss, Samples, TeacherLoss, WeightedSum
from tests.losses.test_kid import draw


class Projection(FeatureExtractor):
    """Three fixed combinations of four pixels, squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.image_shape, self.num_features = (1, 2, 2), 3
        self.weight = nn.Parameter(draw(4, 3, seed=9))
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.weight)


def fitted(loss, real, batch_size=256):
    """`loss` in the space of `Projection`, with the images `real`; and the network."""
    network = Projection()
    total = InFeatures(network, loss, batch_size)
    # The features of the module's own network mean nothing to it.
    total.fit_real(torch.full((3, 7), torch.nan), encode_real=lambda given: given(real))
    return total, network


@pytest.mark.parametrize("batch_size", [256, 3])
@pytest.mark.parametrize("kind", [KIDLoss, FrechetLoss])
def test_value_and_gradient_are_those_of_the_loss_of_the_networks_features(kind, batch_size):
    real, images = draw(30, 1, 2, 2), draw(8, 1, 2, 2, seed=1).requires_grad_()
    loss, network = fitted(kind(), real, batch_size)
    by_hand = kind()
    by_hand.fit_real(network(real))
    expected = by_hand(Samples(features=network(images)))
    value = loss(Samples(images=images))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, images), torch.autograd.grad(expected, images))


def test_a_control_variate_is_seen_through_the_same_network():
    real, images, target = draw(30, 1, 2, 2), draw(8, 1, 2, 2, seed=1), draw(8, 1, 2, 2, seed=2)
    loss, network = fitted(KIDLoss(control_variate=True), real)
    by_hand = KIDLoss(control_variate=True)
    by_hand.fit_real(network(real))
    # Nested, as a `WeightedSum` in a `WeightedSum` is.
    WeightedSum({"own": loss}).fit_target(lambda given: given(target))
    by_hand.fit_target(lambda _: network(target))
    expected = by_hand(Samples(features=network(images), target_features=network(target)))
    torch.testing.assert_close(loss(Samples(images=images, target=target)), expected)


def test_a_teacher_is_seen_through_the_same_network():
    images, target = draw(8, 1, 2, 2, seed=1), draw(8, 1, 2, 2, seed=2)
    loss, network = fitted(TeacherLoss("features"), draw(30, 1, 2, 2))
    assert loss.needs == {"images", "target"}
    scale = network(draw(30, 1, 2, 2)).square().mean()
    expected = (network(images) - network(target)).square().mean() / scale
    torch.testing.assert_close(loss(Samples(images=images, target=target)), expected)


def test_features_are_gathered_not_images():
    seen = []

    def gather(values: Tensor) -> Tensor:
        seen.append(values.shape)
        return values

    loss, _ = fitted(KIDLoss(), draw(30, 1, 2, 2))
    loss(Samples(images=draw(8, 1, 2, 2), gather=gather))
    assert seen == [(8, 3)]


def test_it_adds_to_a_loss_in_the_modules_own_features():
    real = draw(30, 1, 2, 2)
    total = WeightedSum({"own": KIDLoss(), "other": InFeatures(Projection(), FrechetLoss())})
    assert total.needs == {"features", "images"}
    total.fit_real(draw(30, 5), lambda network: network(real))
    total(Samples(features=draw(8, 5, seed=1), images=draw(8, 1, 2, 2, seed=1)))
    assert total.terms.keys() == {"own", "other"}


def test_the_network_is_frozen():
    network = ConvFeatures(1, 4, 4)
    loss = InFeatures(network, KIDLoss()).train()
    assert not network.training
    assert not any(p.requires_grad for p in loss.parameters())


def test_bad_arguments():
    with pytest.raises(ValueError, match="A loss that looks at images, target needs no features of its own"):
        InFeatures(Projection(), TeacherLoss("l2"))
    with pytest.raises(ValueError, match="set real='bank'"):
        InFeatures(Projection(), KIDLoss(real="batch"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        InFeatures(Projection(), KIDLoss(), batch_size=0)
    with pytest.raises(ValueError, match="give `fit_real` a function `encode_real`"):
        InFeatures(Projection(), KIDLoss()).fit_real(draw(3, 2))


def test_pixels_are_the_same_in_every_space():
    """A sum of which one part looks at features of its own, the other at pixels."""
    real, images, target = draw(30, 1, 2, 2), draw(8, 1, 2, 2, seed=1).requires_grad_(), draw(8, 1, 2, 2, seed=2)
    loss, network = fitted(WeightedSum({"kid": KIDLoss(), "l2": TeacherLoss("l2")}, {"l2": 2.0}), real)
    assert loss.needs == {"images", "target"}
    kid = KIDLoss()
    kid.fit_real(network(real))
    expected = kid(Samples(features=network(images))) + 2 * (images - target).square().mean()
    value = loss(Samples(images=images, target=target))
    torch.testing.assert_close(value, expected.double())
    torch.testing.assert_close(torch.autograd.grad(value, images), torch.autograd.grad(expected, images))
