import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from ddss_lightning.metrics import FrechetDistance, InceptionScore, KernelDistance, frechet_distance, gaussian_moments


def draw(num, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(num, d, dtype=torch.float64, generator=generator) @ mix + seed * 0.3


def updated(metric, x, sizes):
    for part in x.split(sizes):
        metric.update(part)
    return metric.compute()


def test_fid_is_torchmetrics_and_torch_fidelity():
    real, x = draw(300), draw(200, seed=1)
    value = updated(FrechetDistance(real), x, 64).item()
    moments = (*gaussian_moments(real), *gaussian_moments(x))
    assert value == pytest.approx(_compute_fid(*moments).item(), rel=1e-5)
    statistics = [fid_features_to_statistics(features) for features in (real, x)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(theirs, rel=1e-5)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Diagonal covariances: sum of (m1 - m2)^2 + (s1 - s2)^2; a rank-deficient one too."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.zeros(3).double()
    value = frechet_distance(m1, s1.square().diag(), m2, s2.square().diag())
    torch.testing.assert_close(value, ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    x = draw(5)
    same = frechet_distance(*gaussian_moments(x), *gaussian_moments(x))
    assert abs(same) < 1e-6 * gaussian_moments(x)[1].trace()


def test_kid_is_torchmetrics_and_torch_fidelity():
    real, x = draw(100), draw(100, seed=1)
    value = updated(KernelDistance(real), x, 33).item()
    assert value == pytest.approx(poly_mmd(x, real, 3, None, 1.0).item(), rel=1e-5)
    theirs = kernel_mmd(x.numpy(), real.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
    assert value == pytest.approx(float(theirs), rel=1e-5)


def test_inception_score_in_closed_form_and_as_torchmetrics():
    sure = 50.0 * torch.eye(4).repeat(3, 1)
    assert updated(InceptionScore(4), sure, 5).item() == pytest.approx(4.0, rel=1e-6)
    assert updated(InceptionScore(4), sure[:1].repeat(6, 1), 5).item() == pytest.approx(1.0, rel=1e-6)
    logits = draw(80, 6)
    p = logits.softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert updated(InceptionScore(6), logits, 7).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("make", [FrechetDistance, KernelDistance], ids=["fid", "kid"])
def test_result_does_not_depend_on_batch_size_and_order(make):
    real, x = draw(90), draw(70, seed=2)
    whole = updated(make(real), x, 70)
    for order in (torch.arange(70), torch.randperm(70)):
        torch.testing.assert_close(updated(make(real), x[order], 11), whole, rtol=1e-10, atol=0)
    metric = make(real)
    metric.update(x)
    metric.reset()
    torch.testing.assert_close(updated(metric, x, 70), whole, rtol=0, atol=0)


@pytest.mark.parametrize("make", [FrechetDistance, KernelDistance], ids=["fid", "kid"])
def test_autocast_changes_nothing(make):
    real, x = draw(90), draw(70, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        value = updated(make(real), x, 70)
    torch.testing.assert_close(value, updated(make(real), x, 70), rtol=1e-12, atol=0)


def test_features_that_are_not_finite_give_nan():
    x = draw(20)
    x[3, 2] = torch.nan
    assert updated(FrechetDistance(draw(30)), x, 7).isnan()
    assert updated(KernelDistance(draw(30)), x, 7).isnan()


def test_too_few_images():
    with pytest.raises(ValueError, match="FID needs at least two generated images, got 1"):
        updated(FrechetDistance(draw(9)), draw(1), 1)
    with pytest.raises(ValueError, match="KID needs at least two generated images, got 1"):
        updated(KernelDistance(draw(9)), draw(1), 1)
