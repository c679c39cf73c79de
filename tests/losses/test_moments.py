import pytest
import torch

from ddss_lightning.losses import FrechetLoss, Samples
from ddss_lightning.metrics import FrechetDistance
from tests.losses.test_kid import draw


def fid(generated, real):
    metric = FrechetDistance(real)
    metric.update(generated)
    return metric.compute()


def fitted(real, **options):
    loss = FrechetLoss(**options)
    loss.fit_real(real)
    return loss


@pytest.mark.parametrize(("num", "rtol"), [(30, 1e-10), (5, 1e-6)])
def test_one_batch_without_memory_is_the_metric(num, rtol):
    """Of features divided by their scale; with five vectors in eight dimensions the covariance is rank-deficient."""
    real, x = 20 * draw(40, 8), 25 * draw(num, 8, seed=1) + 3
    scale = real.square().mean().sqrt()
    for decay in (0.0, 0.9):  # the first step has none
        value = fitted(real, decay=decay)(Samples(x))
        torch.testing.assert_close(value, fid(x / scale, real / scale), rtol=rtol, atol=0)


def test_gradient_is_right():
    """With equal eigenvalues, too: features on the corners of a cube, a multiple of the identity as covariance."""
    cube = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    for real, x in ((draw(20, 3), draw(9, 3, seed=1)), (cube, 1.5 * cube + 0.1)):
        loss = fitted(real)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(Samples(x)), x.clone().requires_grad_())


def test_a_rank_deficient_batch_has_the_gradient_of_the_nuclear_norm():
    """tr (A C A)^(1/2) = |X A|_* / (n - 1)^(1/2), X centred: by singular values, without a square root of 0."""
    real, x = draw(40, 8), draw(4, 8, seed=1).requires_grad_()
    loss = fitted(real)
    mean_real, cov_real, root = loss._real
    y = x / loss.scale
    centred = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    u, _, v = torch.linalg.svd((centred @ root).detach(), full_matrices=False)
    u, v = u[:, :3], v[:3]  # centred, hence of rank 3
    linear = ((u @ v) * (centred @ root)).sum()
    expected = (y.mean(0) - mean_real).square().sum() + centred.square().sum() + cov_real.trace() - 2 * linear
    value = loss(Samples(x))
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(each, x)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_running_moments_are_those_of_weighted_samples():
    """After three steps: mean and covariance of all samples, weighted b^2, b (1 - b) and 1 - b, unbiased."""
    real, b = draw(50, 3), 0.7
    batches = [draw(12, 3, seed=i) * (1 + 0.1 * i) + 0.2 * i for i in (1, 2, 3)]
    loss = fitted(real, decay=b)
    for x in batches:
        value = loss(Samples(x))
        loss.advance()
    weights = torch.tensor([b * b, b * (1 - b), 1 - b], dtype=torch.float64).repeat_interleave(12) / 12
    samples = torch.cat(batches) / loss.scale
    mean = weights @ samples
    cov = (weights[:, None] * (samples - mean)).T @ (samples - mean) / (1 - weights.square().sum())
    mean_real, cov_real, _ = loss._real
    trace = torch.linalg.eigvals(cov @ cov_real).real.sqrt().sum()
    expected = (mean - mean_real).square().sum() + cov.trace() + cov_real.trace() - 2 * trace
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


def test_the_gradient_is_of_the_batch_at_the_running_moments():
    """If all batches are the same, so are all gradients: neither the memory nor 1 - b is in them."""
    real, x = draw(50, 3), draw(200, 3, seed=1).requires_grad_()
    loss = fitted(real, decay=0.8)
    gradients = []
    for _ in range(3):
        gradients.append(torch.autograd.grad(loss(Samples(x)), x)[0])
        loss.advance()
    for gradient in gradients[1:]:
        # 1 / (1 - q) goes from n / (n - 1) towards 1.
        torch.testing.assert_close(gradient, gradients[0], rtol=0.02, atol=1e-2 * float(gradients[0].abs().max()))


def test_only_steps_that_were_taken_are_remembered():
    loss, x, bad = fitted(draw(20, 3)), draw(9, 3, seed=1), torch.full((9, 3), torch.nan).double()
    first = loss(Samples(x))
    assert loss.memory() == {}
    loss.advance()
    before = loss.memory()
    bad.requires_grad_()
    value = loss(Samples(bad))
    assert value.isnan()
    assert torch.autograd.grad(value, bad)[0].isnan().all()
    assert all(torch.equal(value, before[name]) for name, value in loss.memory().items())
    again = fitted(draw(20, 3))
    again.restore(before)
    torch.testing.assert_close(again(Samples(2 * x)), loss(Samples(2 * x)), rtol=0, atol=0)
    assert again(Samples(x)) != first


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        FrechetLoss(decay=1)
    with pytest.raises(ValueError, match="FrechetLoss has no real features: call `fit_real` first"):
        FrechetLoss()(Samples(draw(3, 2)))
    with pytest.raises(ValueError, match="at least two generated feature vectors, got 1"):
        fitted(draw(9, 2))(Samples(draw(1, 2)))
    with pytest.raises(ValueError, match=r"FrechetLoss needs at least two real feature vectors, got shape \(1, 2\)"):
        fitted(draw(1, 2))
    loss = FrechetLoss()
    loss.restore({"mean": torch.zeros(3), "second": torch.eye(3), "squared_weights": torch.tensor(0.1)})
    with pytest.raises(ValueError, match="running moments are of 3 features, the feature network has 2"):
        loss.fit_real(draw(9, 2))
