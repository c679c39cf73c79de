import pytest
import torch

from ddss_lightning.ggdm import DEGREES, GGDMSampler
from ddss_lightning.losses import kid
from ddss_lightning.unroll import unroll


def moved_sampler(schedule, **options):
    """A sampler away from its anchor, so that no derivative is special."""
    sampler = GGDMSampler(schedule, 4, **{"learn": DEGREES, "stride": "quadratic", **options})
    generator = torch.Generator().manual_seed(0)
    for value in sampler.corrections.values():
        value.data = 0.1 * torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return sampler


@pytest.mark.parametrize(
    "options",
    [
        {"anchor": "dpmpp_2m"},
        {"anchor": "ddim", "eta": 0.5},
        {"parametrization": "ggdm", "anchor": "ddim", "eta": 0.5, "learn": ("mu", "nu", "std", "time")},
        {"parametrization": "ggdm", "anchor": "dpmpp_2m", "learn": ("mu", "nu", "std", "pred", "time")},
    ],
)
def test_autograd_through_the_chain_is_finite_differences(mixture, options):
    sampler = moved_sampler(mixture.schedule, **options)
    generator = torch.Generator().manual_seed(1)
    x_T, noise, real = (
        torch.randn(*n, 1, 2, 2, dtype=torch.float64, generator=generator) for n in ((6,), (3, 6), (8,))
    )

    def loss():
        return kid(sampler(mixture, x_T, noise=noise).flatten(1), real.flatten(1))

    loss().backward()
    h = 1e-6
    for name, value in sampler.corrections.items():
        flat = value.data.view(-1)
        for index in range(len(flat)):
            start = flat[index].item()
            with torch.no_grad():
                flat[index] = start + h
                above = loss()
                flat[index] = start - h
                below = loss()
                flat[index] = start
            slope = ((above - below) / (2 * h)).item()
            assert value.grad.view(-1)[index].item() == pytest.approx(slope, rel=2e-5, abs=1e-7), (name, index)


def test_rematerialisation_changes_nothing(denoiser):
    sampler = moved_sampler(denoiser.schedule)
    generator = torch.Generator().manual_seed(0)
    x_T, noise = torch.randn(8, 1, 8, 8, generator=generator), torch.randn(3, 8, 1, 8, 8, generator=generator)
    gradients = {}
    for remat in ("none", "denoiser"):
        sampler.zero_grad()
        image = sampler(denoiser, x_T, noise=noise, remat=remat)
        image.square().mean().backward()
        gradients[remat] = [image.detach()] + [value.grad.clone() for value in sampler.corrections.values()]
    for kept, again in zip(gradients["none"], gradients["denoiser"], strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6)


def test_rematerialisation_calls_the_network_again(mixture):
    calls = []

    def network(x, t):
        calls.append(t)
        return mixture(x, t)

    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    for remat, expected in (("none", 4), ("denoiser", 7)):
        calls.clear()
        # The first call has no input that needs a gradient but its time, which is learned here only later.
        sampler = moved_sampler(mixture.schedule, learn=("mu",))
        sampler(network, x_T, noise=torch.zeros(3, *x_T.shape, dtype=torch.float64), remat=remat).sum().backward()
        assert len(calls) == expected, remat


def test_states_stay_float32_under_autocast(denoiser):
    sampler, seen = moved_sampler(denoiser.schedule), []

    def network(x, t):
        seen.append(x.dtype)
        return denoiser(x, t)

    x_T, noise = torch.randn(4, 1, 8, 8), torch.randn(3, 4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        image = sampler(network, x_T, noise=noise)
    assert {*seen, image.dtype} == {torch.float32}


def test_stochastic_sampler_draws_from_the_generator(mixture):
    sampler = GGDMSampler(mixture.schedule, 5, anchor="ddim", eta=1.0)
    x_T = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    draws = [sampler(mixture, x_T, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_bad_arguments(mixture):
    sampler = GGDMSampler(mixture.schedule, 3, anchor="ddim", eta=1.0)
    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="This sampler adds noise"):
        unroll(mixture, sampler.coefficients(), x_T)
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 2, 1, 2, 2\), got \(3, 2, 1, 2, 2\)"):
        sampler(mixture, x_T, noise=torch.zeros(3, 2, 1, 2, 2))
    with pytest.raises(ValueError, match="Unknown remat 'all'; choose one of none, denoiser"):
        sampler(mixture, x_T, remat="all")
