import dataclasses
import warnings
import weakref
from collections import Counter

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from ddss_lightning.ggdm import DEGREES, GGDMSampler
from ddss_lightning.losses import kid
from ddss_lightning.remat import KeepAll, MemoryBudget, RecomputeEvery, Remat, measured_call
from ddss_lightning.replay import Replay
from ddss_lightning.unroll import noises_used, unroll


def moved_sampler(schedule, **options):
    """A sampler away from its anchor, so that no derivative is special."""
    sampler = GGDMSampler(schedule, **{"num_steps": 4, "learn": DEGREES, "stride": "quadratic", **options})
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
        {"parametrization": "ggdm", "anchor": "dpmpp_2m", "eta": 0.5, "learn": ("mu", "nu", "std", "time")},
        "noise again",
    ],
)
def test_autograd_through_the_chain_is_finite_differences(mixture, options):
    if options == "noise again":
        # Given numbers whose past predictions see the noise: no noise of earlier steps now, some when std moves.
        given = moved_sampler(mixture.schedule, anchor="dpmpp_2m", eta=0.5).coefficients().detach()
        given = dataclasses.replace(given, past_noise=torch.zeros_like(given.mu))
        sampler = GGDMSampler.from_coefficients(mixture.schedule, given, learn=("mu", "std"))
    else:
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


@pytest.mark.parametrize("anchor", ["ddim", EulerAncestralDiscreteScheduler()])
def test_a_step_of_a_one_step_sampler_looks_at_its_own_noise(schedule, anchor):
    if anchor == "ddim":
        sampler = GGDMSampler(schedule, 5, anchor, eta=0.5, learn=("std", "logsnr"))
    else:
        sampler = GGDMSampler.from_scheduler(anchor, 5, learn=("std",))
    assert sampler.coefficients().std.requires_grad
    assert noises_used(sampler.coefficients()) == [slice(k, min(k + 1, 4)) for k in range(5)]


POLICIES = ["none", "denoiser", "every(2)", "budget(1)", "budget(1GiB)", "none+offload", "denoiser+offload"]


@pytest.mark.parametrize("remat", POLICIES)
def test_rematerialisation_changes_nothing(denoiser, remat):
    sampler = moved_sampler(denoiser.schedule)
    generator = torch.Generator().manual_seed(0)
    x_T, noise = torch.randn(8, 1, 8, 8, generator=generator), torch.randn(3, 8, 1, 8, 8, generator=generator)

    def gradients(remat):
        sampler.zero_grad()
        image = sampler(denoiser, x_T, noise=noise, remat=remat)
        image.square().mean().backward()
        return [image.detach()] + [value.grad.clone() for value in sampler.corrections.values()]

    for kept, again in zip(gradients("none"), gradients(remat), strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6)


class Counted(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x, t):
        self.calls += 1
        return self.network(x, t)


@pytest.mark.parametrize(
    ("remat", "calls"),
    [("none", 4), ("denoiser", 6), ("every(2)", 5), ("every(3)", 4), ("budget(1GB)", 4), ("budget(1B)", 7)],
)
def test_the_network_calls_of_a_policy(mixture, remat, calls):
    """The first call has no input that needs a gradient: it is never computed again, and serves to measure.

    The last is computed again by a budget below one call alone.
    """
    network, x_T = Counted(mixture), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    sampler = moved_sampler(mixture.schedule)
    sampler(network, x_T, noise=torch.zeros(3, *x_T.shape, dtype=torch.float64), remat=remat).sum().backward()
    assert network.calls == calls


def test_a_budget_keeps_what_fits(mixture):
    """Calls 1, 2 and 3 have a gradient; each takes what was measured of the first, and the last ones are kept."""
    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    size = measured_call(mixture, x_T, torch.full((2,), 500.0))[1]
    assert size > x_T.nbytes
    for kept, again in ((0, 3), (1, 3 - 1), (2, 3 - 2), (3, 0)):
        recomputed = MemoryBudget(num_bytes=kept * size + 1).recomputed(4, lambda: size)
        assert recomputed == [True] * (4 - kept) + [False] * kept
        network = Counted(mixture)
        sampler = moved_sampler(mixture.schedule)
        noise = torch.zeros(3, *x_T.shape, dtype=torch.float64)
        sampler(network, x_T, noise=noise, remat=f"budget({kept * size + 1}B)").sum().backward()
        assert network.calls == 4 + again


def test_what_a_call_keeps_grows_with_the_batch_and_holds_no_weights(denoiser):
    """The output is the network's; of another batch, the same bytes per image; and then they are gone."""
    x, t, alive = torch.randn(6, 1, 8, 8), torch.full((6,), 500.0), []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: alive.append(weakref.ref(output)))
        for module in denoiser.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    output, size = measured_call(denoiser, x, t)
    for hook in hooks:
        hook.remove()
    assert alive
    assert not any(each() is not None for each in alive)
    assert not output.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(output, denoiser(x, t))
    assert size == 3 * measured_call(denoiser, x[:2], t[:2])[1]


def test_a_start_with_a_gradient_has_it_under_a_budget(mixture):
    """The call that measures is then made again, with its graph."""
    slopes = []
    for remat in ("none", "budget(1GB)"):
        x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x_0 = moved_sampler(mixture.schedule)(mixture, x_T, noise=torch.zeros(3, *x_T.shape).double(), remat=remat)
        slopes.append(torch.autograd.grad(x_0.square().sum(), x_T)[0])
    assert torch.equal(*slopes)


def test_rematerialisation_keeps_the_states_and_the_last_call(denoiser):
    """What autograd holds after the forward pass: each state and its noise once, and the activations of one call."""

    def held(num_steps, remat):
        x_T, noise = torch.randn(8, 1, 8, 8), torch.randn(num_steps - 1, 8, 1, 8, 8)
        found = {}

        def pack(value):
            if value.requires_grad or value.numel() >= x_T.numel():
                found[value.data_ptr()] = value
            return value

        sampler = moved_sampler(denoiser.schedule, num_steps=num_steps)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            x_0 = sampler(denoiser, x_T, noise=noise, remat=remat)
        x_0.sum().backward()
        return Counter(tuple(value.shape) for value in found.values() if value.numel() >= x_T.numel())

    # The states, the noises, and the output of the first call, which is not computed again.
    for num_steps in (4, 6):
        assert held(num_steps, "budget(1B)") == {(8, 1, 8, 8): num_steps + num_steps - 1 + 1}
    few, many, all_kept = held(4, "denoiser"), held(6, "denoiser"), held(4, "none")
    assert many - few == {(8, 1, 8, 8): 2 + 2}
    assert few.total() > 4 + 3 + 1
    assert all_kept.total() > 2 * few.total()


def test_states_are_sent_to_main_memory_once(mixture, monkeypatch):
    copies = []
    empty_like = torch.empty_like

    def remember(value, **options):
        if options.get("device") == "cpu":
            copies.append(value.data_ptr())
        return empty_like(value, **options)

    monkeypatch.setattr(torch, "empty_like", remember)
    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    noise = torch.zeros(3, *x_T.shape, dtype=torch.float64)
    x_0 = moved_sampler(mixture.schedule)(mixture, x_T, noise=noise, remat="denoiser+offload")
    assert len(copies) == len(set(copies)) == 4 + 3
    x_0.sum().backward()


def test_sampling_and_learning_give_the_same_bits(denoiser):
    """Micro-batches take the slope of the loss from images made without a graph."""
    sampler = moved_sampler(denoiser.schedule)
    x_T, noise = torch.randn(16, 1, 8, 8), torch.randn(3, 16, 1, 8, 8)
    learned = sampler(denoiser, x_T, noise=noise)
    with torch.no_grad():
        assert torch.equal(sampler(denoiser, x_T, noise=noise), learned)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("none", KeepAll()),
        ("denoiser", RecomputeEvery(n=1)),
        ("every( 3 )", RecomputeEvery(n=3)),
        ("budget(1.5GiB)", MemoryBudget(num_bytes=3 * 2**29)),
        ("budget(1e6) + offload", MemoryBudget(offload=True, num_bytes=10**6)),
        (KeepAll(offload=True), KeepAll(offload=True)),
    ],
)
def test_policies_by_name(text, policy):
    assert Remat.parse(text) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all", "Unknown remat 'all'; choose one of none, denoiser, every"),
        ("every", "Unknown remat 'every'"),
        ("denoiser+disk", "Unknown remat"),
        ("none(3)", "Unknown remat"),
        ("every(0)", "n of at least 1, got 0"),
        ("budget(lots)", "'lots' is not a size in bytes; write it as 500MB"),
        ("budget(1e400)", "'1e400' is not a size in bytes"),
        ("budget(5XB)", "'5XB' is not a size"),
        ("budget(0)", "at least 1 byte"),
    ],
)
def test_unknown_policies(text, message):
    with pytest.raises(ValueError, match=message):
        Remat.parse(text)


def test_states_stay_float32_under_autocast(denoiser):
    sampler, seen = moved_sampler(denoiser.schedule), []

    def network(x, t):
        seen.append(x.dtype)
        return denoiser(x, t)

    x_T, noise = torch.randn(4, 1, 8, 8), torch.randn(3, 4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        image = sampler(network, x_T, noise=noise)
    assert {*seen, image.dtype} == {torch.float32}


@pytest.mark.parametrize("grad", [True, False])
def test_the_chain_is_no_less_precise_under_autocast(schedule, grad):
    """All but the network: the same bits with it and without."""
    sampler, x_T, noise = moved_sampler(schedule), torch.randn(4, 3, 8, 8), torch.randn(3, 4, 3, 8, 8)
    with torch.set_grad_enabled(grad):
        expected = sampler(lambda x, _: x, x_T, noise=noise)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sampler(lambda x, _: x, x_T, noise=noise), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_reported(schedule, value):
    x_T = torch.randn(4, 1, 8, 8)
    x_T[2, 0, 3, 3] = value
    with torch.no_grad(), pytest.warns(UserWarning, match="made images that are not finite"):
        GGDMSampler(schedule, 2)(lambda x, _: x, x_T)
    # Its sum has no place in float16.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        x_0 = GGDMSampler(schedule, 1, prediction_type="sample")(
            lambda x, _: torch.full_like(x, 6e4), torch.randn(4, 1, 8, 8, dtype=torch.float16)
        )
    assert x_0.isfinite().all()


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


@pytest.mark.parametrize("remat", ["none", "denoiser", "budget(1GB)"])
def test_a_network_that_returns_no_tensor_is_told_what_it_should(mixture, remat):
    """As diffusers' networks do; with and without a gradient."""
    sampler, x_T = GGDMSampler(mixture.schedule, 3), torch.randn(2, 1, 2, 2, dtype=torch.float64)

    def network(x, timestep):
        return (mixture(x, timestep),)

    message = r"The network network returns tuple, it must return a tensor: `\[0\]` of it\."
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
            sampler(network, x_T, remat=remat)
    with torch.no_grad(), pytest.raises(ValueError, match="network returns tuple"):
        Replay(network, sampler.coefficients(), x_T, torch.zeros(2, *x_T.shape))


@pytest.mark.parametrize("learned", [True, False])
def test_the_network_is_shown_times_in_full_precision(mixture, learned):
    """In bfloat16 999 is 1000, which for a network of other times is another one."""
    seen = []

    def network(x, t):
        seen.append(t.dtype)
        return 0.1 * x

    with torch.set_grad_enabled(learned):
        unroll(network, GGDMSampler(mixture.schedule, 3).coefficients(), torch.randn(2, 1, 2, 2, dtype=torch.bfloat16))
    assert seen == [torch.float32] * 3
