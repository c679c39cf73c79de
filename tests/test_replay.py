"""A replayed chain is the unrolled one, with the network calls that it needs and no more."""

import dataclasses

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from ddss_lightning.ggdm import DEGREES, GGDMSampler
from ddss_lightning.replay import Replay
from ddss_lightning.unroll import unroll

K, N = 5, 6


@pytest.fixture
def noise():
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, 1, 2, 2, dtype=torch.float64, generator=g), torch.randn(
        K - 1, N, 1, 2, 2, dtype=torch.float64, generator=g
    )


def samplers(schedule):
    yield GGDMSampler(schedule, K, anchor="dpmpp_2m", eta=0.4, stride="quadratic", learn=DEGREES)
    yield GGDMSampler.from_scheduler(UniPCMultistepScheduler(1000, beta_schedule="linear"), K)
    learn = [name for name in DEGREES if name != "logsnr"]
    yield GGDMSampler(schedule, K, anchor="ddim", eta=1.0, parametrization="ggdm", learn=learn)


@pytest.mark.parametrize("which", range(3))
def test_every_number_moved_alone_gives_the_unrolled_chain_to_the_last_bit(schedule, mixture, noise, which):
    sampler = list(samplers(schedule))[which]
    replay = Replay(mixture, sampler.coefficients(), *noise)
    with torch.no_grad():
        assert torch.equal(replay.x_0, unroll(mixture, sampler.coefficients(), *noise))
        total = 0
        for value in sampler.parameters():
            total += value.numel()
            for index in range(value.numel()):
                value.view(-1)[index] += 0.05
                coefficients = sampler.coefficients()
                assert torch.equal(replay(coefficients), unroll(mixture, coefficients, *noise))
                assert not torch.equal(replay(coefficients), replay.x_0)
                value.view(-1)[index] -= 0.05
    # Twice each, above.
    assert (replay.num_calls - K) / 2 < 0.55 * total * K


@pytest.mark.parametrize(
    ("name", "index", "calls"),
    [("nu", 0, K - 1), ("nu", K - 1, 0), ("std", 1, K - 2), ("timesteps", 1, K - 1), ("timesteps", K - 1, 1)],
)
def test_calls_before_the_change_are_not_made(schedule, mixture, noise, name, index, calls):
    coefficients = GGDMSampler(schedule, K, eta=0.5).coefficients().detach()
    replay = Replay(mixture, coefficients, *noise)
    assert replay.num_calls == K
    moved = getattr(coefficients, name).clone()
    moved[index] *= 1.01
    changed = dataclasses.replace(coefficients, **{name: moved})
    assert torch.equal(replay(changed), unroll(mixture, changed, *noise))
    assert replay.num_calls == K + calls
    assert torch.equal(replay(coefficients), replay.x_0)
    assert replay.num_calls == K + calls


def test_the_first_chain_stays_as_it_was(schedule, mixture, noise):
    """States that a replay moves are its own."""
    coefficients = GGDMSampler(schedule, K).coefficients().detach()
    replay = Replay(mixture, coefficients, *noise)
    first, last = coefficients.nu.clone(), coefficients.nu.clone()
    first[0] += 0.3
    last[-1] += 0.3
    replay(dataclasses.replace(coefficients, nu=first))
    changed = dataclasses.replace(coefficients, nu=last)
    assert torch.equal(replay(changed), unroll(mixture, changed, *noise))
