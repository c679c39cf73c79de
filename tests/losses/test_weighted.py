import pytest
import torch

from ddss_lightning import RandomFeatures
from ddss_lightning.losses import FrechetLoss, InFeatures, KIDLoss, Samples, TeacherLoss, WeightedSum
from ddss_lightning.losses.base import every_loss
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


def test_it_needs_what_its_losses_need_and_leaves_memory_to_them():
    total = WeightedSum({"a": KIDLoss(real="batch"), "b": FrechetLoss(), "c": TeacherLoss()})
    assert total.needs == {"features", "real", "images", "target"}
    nested = WeightedSum({"first": total, "other": InFeatures(RandomFeatures(1, 8, 4, 2), FrechetLoss())})
    names = [
        "",
        "losses.first",
        *(f"losses.first.losses.{name}" for name in "abc"),
        "losses.other",
        "losses.other.loss",
    ]
    assert list(every_loss(nested)) == names
    assert [name for name, part in every_loss(nested).items() if part.has_memory] == [names[3], names[6]]
    assert list(every_loss(KIDLoss())) == [""]


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one loss"):
        WeightedSum({})
    with pytest.raises(ValueError, match="must be a mapping from names to losses, got list"):
        WeightedSum([KIDLoss()])
    with pytest.raises(ValueError, match="weights: there is no loss 'fid'; the losses are kid"):
        WeightedSum({"kid": KIDLoss()}, {"fid": 1.0})
    with pytest.raises(ValueError, match="The weight of 'kid' must be a number of at least 0, got -1"):
        WeightedSum({"kid": KIDLoss()}, {"kid": -1})
    for name in ("loss", "a/b", "type", "keys"):
        with pytest.raises(ValueError, match=f"A loss cannot be called '{name}'"):
            WeightedSum({name: KIDLoss()})


def test_what_a_fit_is_resumed_with_names_all_that_changes_the_loss():
    """Defaults are left out: the losses of older checkpoints have these names."""
    for loss, name in (
        (KIDLoss(), "KIDLoss"),
        (KIDLoss(control_variate=True), "KIDLoss(control_variate)"),
        (KIDLoss("linear", "batch", standardize=True), "KIDLoss(linear, real=batch, standardize)"),
        (FrechetLoss(), "FrechetLoss"),
        (FrechetLoss(0.5), "FrechetLoss(decay=0.5)"),
        (TeacherLoss(), "TeacherLoss(l2)"),
        (WeightedSum({"a": KIDLoss(), "b": KIDLoss()}), "WeightedSum"),
        (WeightedSum({"a": KIDLoss(), "b": KIDLoss()}, {"b": 0.3}), "WeightedSum(b=0.3)"),
    ):
        assert loss.identity() == name
