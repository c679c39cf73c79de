import pytest
import torch

from ddss_lightning.losses import FrechetLoss, KIDLoss, Samples, TeacherLoss, WeightedSum
from tests.losses.test_kid import draw


def test_the_gradient_is_the_weighted_sum_of_the_gradients():
    real, y = draw(40, 8), draw(10, 8, seed=2)
    x, images = draw(10, 8, seed=1).requires_grad_(), draw(10, 1, 4, 4, seed=3).requires_grad_()
    parts = {
        "kid": KIDLoss(),
        "frechet": FrechetLoss(),
        "pixels": TeacherLoss("l2"),
        "teacher": TeacherLoss("features"),
    }
    weights = {"kid": 2.0, "frechet": 0.5, "pixels": 0.0}
    total = WeightedSum(parts, weights)
    total.fit_real(real)
    samples = Samples(x, images, target=draw(10, 1, 4, 4, seed=4), target_features=y)
    value = total(samples)
    gradients = torch.autograd.grad(value, [x, images])
    expected, parts_x = 0.0, torch.zeros_like(x)
    for name, loss in parts.items():
        part, weight = loss(samples), weights.get(name, 1.0)
        assert torch.equal(total.terms[name], part)
        expected = expected + weight * part
        if name != "pixels":
            parts_x += weight * torch.autograd.grad(part, x)[0]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients[0], parts_x)
    assert not gradients[1].any()


def test_it_needs_what_its_losses_need_and_remembers_what_they_do():
    total = WeightedSum({"a": KIDLoss(real="batch"), "b": FrechetLoss(), "c": TeacherLoss()})
    assert total.needs == {"features", "real", "images", "target"}
    assert total.has_memory
    assert not WeightedSum({"a": KIDLoss()}).has_memory
    total.fit_real(draw(9, 2))
    sample = Samples(draw(9, 2), draw(9, 1, 2, 2), draw(9, 2), draw(9, 1, 2, 2))
    total(sample)
    total.advance()
    assert total.memory().keys() == {"b.mean", "b.second", "b.squared_weights"}
    other = WeightedSum({"b": FrechetLoss(), "ab": FrechetLoss()})
    other.restore(total.memory())
    assert torch.equal(other.losses["b"].memory()["mean"], total.losses["b"].memory()["mean"])
    assert other.losses["ab"].memory() == {}


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one loss"):
        WeightedSum({})
    with pytest.raises(ValueError, match="weights: there is no loss 'fid'; the losses are kid"):
        WeightedSum({"kid": KIDLoss()}, {"fid": 1.0})
    with pytest.raises(ValueError, match="The weight of 'kid' must be a number of at least 0, got -1"):
        WeightedSum({"kid": KIDLoss()}, {"kid": -1})
    for name in ("loss", "a/b", "type", "keys"):
        with pytest.raises(ValueError, match=f"A loss cannot be called '{name}'"):
            WeightedSum({name: KIDLoss()})
