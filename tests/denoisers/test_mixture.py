import pytest
import torch

from ddss_lightning.denoisers import MixtureDenoiser


def test_noise_prediction_is_the_score(mixture):
    """eps = -sigma grad log p(x_t), by autograd on the density written out."""
    t = torch.tensor([20.0, 300.0, 900.0])
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    alpha, sigma = (v[:, None, None, None, None] for v in mixture.schedule.alpha_sigma(t))
    variance = alpha**2 * 0.1**2 + sigma**2
    density = (-((x[:, None] - alpha * mixture.means) ** 2) / (2 * variance)).sum((2, 3, 4)).logsumexp(1)
    score = torch.autograd.grad(density.sum(), x)[0]
    torch.testing.assert_close(mixture(x, t), -sigma[:, 0] * score, rtol=1e-9, atol=1e-12)


def test_negative_std(schedule):
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"std must be a number of at least 0, got {std}"):
            MixtureDenoiser(torch.zeros(1, 1, 2, 2), std, schedule)


def test_the_fingerprint_knows_the_width(schedule):
    means = torch.zeros(1, 1, 2, 2)
    prints = {MixtureDenoiser(means, std, schedule).fingerprint() for std in (0.1, 0.1, 0.2)}
    assert len(prints) == 2
