"""Adam with a full matrix: one number is Adam, a rotation is seen through, a state goes on bit for bit."""

import copy
import math
import re

import pytest
import torch
from torch.optim import Adam

from ddss_lightning import FullMatrixAdam


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def descend(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_one_number_is_adam():
    ours, theirs = numbers(1.7), numbers(1.7)
    for each, kind, small in ((ours, FullMatrixAdam, {"damping": 1e-300}), (theirs, Adam, {"eps": 0.0})):
        descend(kind([each], lr=0.03, betas=(0.8, 0.95), **small), lambda each=each: each.pow(4).sum(), 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_first_step_is_along_the_gradient_and_of_the_learning_rate():
    x = numbers(0.0, 0.0)
    descend(FullMatrixAdam([x], lr=0.1, damping=1e-12), lambda: 3 * x[0] - 4 * x[1], 1)
    torch.testing.assert_close(x.detach(), torch.tensor([-0.06, 0.08]).double(), rtol=1e-6, atol=0)


def test_two_gradients_by_hand():
    """g_1 = (1, 0), g_2 = (0, 2), betas (0, 1/2): V is diag(1/3, 8/3), m is g_2."""
    x = numbers(0.0, 0.0)
    optimizer = FullMatrixAdam([x], lr=1.0, betas=(0.0, 0.5), damping=1e-12)
    for gradient in ((1.0, 0.0), (0.0, 2.0)):
        before = x.detach().clone()
        x.grad = torch.tensor(gradient).double()
        optimizer.step()
    torch.testing.assert_close(x.detach() - before, torch.tensor([0.0, -2 / math.sqrt(8 / 3)]).double())


def test_a_rotated_problem_has_the_rotated_path():
    """What Adam is not: it sees coordinates."""
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    curvature, start = torch.tensor([1.0, 1e-2, 1e-4]).double(), torch.ones(3, dtype=torch.float64)
    paths = {}
    for kind in (FullMatrixAdam, Adam):
        plain, turned = start.clone().requires_grad_(), (turn @ start).requires_grad_()
        descend(kind([plain], lr=0.05), lambda x=plain: (curvature * x**2).sum(), 30)
        descend(kind([turned], lr=0.05), lambda x=turned: (curvature * (turn.T @ x) ** 2).sum(), 30)
        paths[kind] = (turn @ plain - turned).detach().norm()
    assert paths[FullMatrixAdam] < 1e-9 < 1e-2 < paths[Adam]


def test_a_flat_direction_across_coordinates_is_gone_along():
    """Two coefficients whose sum matters a thousand times as much as their difference, as those of a sampler do."""
    ends = {}
    for kind, lr in ((FullMatrixAdam, 0.05), (Adam, 0.05), (Adam, 0.01)):
        x = numbers(1.0, -1.0)
        noise = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        steps = iter(noise)
        descend(kind([x], lr=lr), lambda x=x, s=steps: (x[0] + x[1] + next(s)) ** 2 + 1e-4 * (x[0] - x[1]) ** 2, 100)
        ends[kind, lr] = abs(float(x[0] - x[1]))
    assert ends[FullMatrixAdam, 0.05] < 0.5 * min(ends[Adam, 0.05], ends[Adam, 0.01])


def test_groups_are_in_units_of_their_learning_rates():
    """Rates (0.4, 0.1) on (a, b) are the rate 0.4 on (a, 4 b)."""

    def loss(a, b):
        return (a + 2 * b - 1) ** 2 + (a * b) ** 2

    a, b = numbers(0.5), numbers(0.3)
    descend(FullMatrixAdam([{"params": [a], "lr": 0.4}, {"params": [b], "lr": 0.1}]), lambda: loss(a, b).sum(), 10)
    c, d = numbers(0.5), numbers(1.2)
    # A group may be empty.
    descend(FullMatrixAdam([{"params": []}, {"params": [c, d]}], lr=0.4), lambda: loss(c, d / 4).sum(), 10)
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.cat([c, d / 4]).detach())


def test_damping_by_hand():
    """g = (1, 0): the mean of the diagonal is 1/2, with damping 2 the step is 1 / sqrt(1 + 1), in any unit of g."""
    for scale in (1.0, 1e6, 1e-6):
        x = numbers(0.0, 0.0)
        descend(FullMatrixAdam([x], lr=1.0, damping=2.0), lambda x=x, s=scale: s * x[0], 1)
        torch.testing.assert_close(x.detach(), torch.tensor([-math.sqrt(0.5), 0.0]).double())


def test_another_ratio_of_learning_rates_is_in_force_at_once():
    """The moments are of the gradients themselves: a fit that goes on with other rates steps as one that always had."""
    steps = []
    for first in (0.4, 0.1):
        a, b = numbers(0.0), numbers(0.0)
        optimizer = FullMatrixAdam([{"params": [a], "lr": first}, {"params": [b], "lr": 0.1}])
        for _ in range(5):
            a.grad, b.grad = torch.tensor([1.0]).double(), torch.tensor([-3.0]).double()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        before = torch.cat([a, b]).detach().clone()
        optimizer.step()
        steps.append(torch.cat([a, b]).detach() - before)
    torch.testing.assert_close(*steps)


def test_a_gradient_that_is_not_finite_changes_nothing():
    x = numbers(1.0, 2.0)
    optimizer = FullMatrixAdam([x], lr=0.1)
    descend(optimizer, lambda: x.sum(), 2)
    before, kept = x.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][0])
    x.grad = torch.tensor([torch.nan, 1.0]).double()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    assert torch.equal(x.detach(), before)
    assert all(torch.equal(value, kept[name]) for name, value in optimizer.state_dict()["state"][0].items())


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    def loss():
        return (x.sum() - 1) ** 2 + x.square().sum()

    x = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    optimizer = FullMatrixAdam([x], lr=0.01)
    descend(optimizer, loss, 3)
    kept = x.detach().clone()
    torch.save(copy.deepcopy(optimizer.state_dict()), tmp_path / "state.pt")
    descend(optimizer, loss, 3)
    end, x = x.detach(), kept.requires_grad_()
    again = FullMatrixAdam([x], lr=0.5)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    descend(again, loss, 3)
    assert torch.equal(end, x)


def test_no_gradient_and_none_but_zeros_move_nothing():
    x, held = numbers(1.0, 2.0), torch.ones(2, dtype=torch.float64)
    optimizer = FullMatrixAdam([x, held], lr=0.1)
    optimizer.step()
    assert not optimizer.state
    x.grad = torch.zeros_like(x)
    optimizer.step()
    assert x.tolist() == [1.0, 2.0]
    x.grad = torch.ones_like(x)
    optimizer.step()
    assert (x < torch.tensor([1.0, 2.0])).all()
    assert held.tolist() == [1.0, 1.0]


def test_wrong_numbers():
    x = numbers(1.0)
    for options in ({"lr": -1.0}, {"lr": math.nan}, {"damping": 0.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match=rf"must be .*{re.escape(str(next(iter(options.values()))))}"):
            FullMatrixAdam([x], **options)


def test_a_state_of_other_numbers_is_refused():
    x, y = numbers(1.0), numbers(1.0, 2.0)
    first, second = FullMatrixAdam([x]), FullMatrixAdam([y])
    descend(first, lambda: x.sum(), 1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="not of these 2 numbers"):
        descend(second, lambda: y.sum(), 1)
