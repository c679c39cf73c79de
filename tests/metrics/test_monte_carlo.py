"""Estimates from random samples against what they estimate."""

import pytest
import torch

from ddss_lightning.metrics import FrechetDistance, KernelDistance

D = 3
GENERATOR = torch.Generator().manual_seed(7)
ROOTS = [torch.randn(D, D, dtype=torch.float64, generator=GENERATOR) for _ in range(2)]
MEANS = [torch.tensor([0.3, -0.2, 0.5]).double(), torch.tensor([-0.4, 0.1, 0.9]).double()]
COVS = [root @ root.T for root in ROOTS]


def expected_kernel(a, b, kernel):
    """E k(x, y) for independent x ~ N(m_a, C_a), y ~ N(m_b, C_b): with u = x . y / d, (u + 1)^3 expanded."""
    first, second, third = [], [], []
    for mean, cov in ((MEANS[a], COVS[a]), (MEANS[b], COVS[b])):
        first.append(mean)
        second.append(cov + torch.outer(mean, mean))
        cube = torch.einsum("i,j,k->ijk", mean, mean, mean)
        for term in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"):
            cube = cube + torch.einsum(term, cov, mean)
        third.append(cube)
    u1, u2, u3 = ((p * q).sum() / D**n for n, (p, q) in enumerate((first, second, third), start=1))
    return u3 + 3 * u2 + 3 * u1 + 1 if kernel == "cubic" else u1


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_kid_is_unbiased(kernel):
    generator = torch.Generator().manual_seed(11)

    def draw(which, num):
        noise = torch.randn(num, D, dtype=torch.float64, generator=generator)
        return MEANS[which] + noise @ ROOTS[which].T

    expected = sum(sign * expected_kernel(a, b, kernel) for sign, a, b in ((1, 0, 0), (1, 1, 1), (-2, 0, 1)))
    if kernel == "linear":
        torch.testing.assert_close(expected, (MEANS[0] - MEANS[1]).square().sum() / D)
    values = []
    for _ in range(600):
        metric = KernelDistance(draw(1, 12), kernel)
        metric.update(draw(0, 9))
        values.append(metric.compute())
    values = torch.stack(values)
    assert abs(values.mean() - expected) < 3 * values.std() / 600**0.5


def test_fid_of_gaussians_in_closed_form():
    """Samples with exactly these moments; the covariances have the same eigenvectors."""
    basis = torch.linalg.qr(ROOTS[0]).Q
    scales = [torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.7, 1.0, 3.0]).double()]
    sets = []
    for mean, scale in zip(MEANS, scales, strict=True):
        noise = torch.randn(40, D, dtype=torch.float64, generator=GENERATOR)
        noise = noise - noise.mean(0)
        white = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T.cov())).T
        sets.append(mean + (white * scale) @ basis.T)
    metric = FrechetDistance(sets[1])
    metric.update(sets[0])
    expected = (MEANS[0] - MEANS[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-9)


def test_fid_of_many_samples_comes_close_and_from_above():
    """Two samples of one Gaussian: the distance is bias alone, and falls as 1 / N."""
    values = []
    for num in (50, 500, 5000):
        noise = [torch.randn(num, D, dtype=torch.float64, generator=GENERATOR) @ ROOTS[0].T for _ in range(2)]
        metric = FrechetDistance(noise[0])
        metric.update(noise[1])
        values.append(metric.compute().item())
    assert values[0] > values[1] > values[2] > 0
    assert values[2] < values[0] / 10
