"""Learning starts from any sampler: zero corrections are the sampler itself, and what moves keeps what it should."""

import json
import warnings

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.probing import probe, rollout_error
from ddss_lightning.saved import read_card
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.unroll import unroll
from tests.test_ggdm import move

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCHEDULERS = [
    UniPCMultistepScheduler(**LINEAR),
    HeunDiscreteScheduler(**LINEAR),
    EulerAncestralDiscreteScheduler(**LINEAR),
    LCMScheduler(**LINEAR, clip_sample=False),
    FlowMatchHeunDiscreteScheduler(),
]
by_name = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)


@by_name
@pytest.mark.parametrize("parametrization", ["anchored", "ggdm"])
def test_zero_corrections_are_the_imported_sampler(scheduler, parametrization):
    start = probe(scheduler, 4)
    learned = GGDMSampler.from_scheduler(scheduler, 4, parametrization=parametrization)
    assert set(learned.corrections) == {"mu", "nu", "std", "time"}
    found = learned.coefficients()
    for name in ("mu", "nu", "pred", "timesteps", "prior", "init_noise_sigma"):
        torch.testing.assert_close(getattr(found, name), getattr(start, name), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.noise_weights(), start.noise_weights(), rtol=1e-6, atol=1e-9)
    assert rollout_error(learned.coefficients().detach(), scheduler, 4) < 1e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**LINEAR, clip_sample=False),
        EulerAncestralDiscreteScheduler(**LINEAR),
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(**LINEAR, solver_order=3),
        HeunDiscreteScheduler(**LINEAR),
        DPMSolverMultistepScheduler(**LINEAR, algorithm_type="sde-dpmsolver++"),
        # Of whose first noise nearly nothing is left.
        DPMSolverMultistepScheduler(**LINEAR, algorithm_type="sde-dpmsolver++", use_lu_lambdas=True),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("num_steps", [5, 25])
def test_noise_angles_keep_the_marginals(scheduler, num_steps):
    sampler = GGDMSampler.from_scheduler(scheduler, num_steps, learn=("std",))
    before = sampler.coefficients()
    after = move(sampler, 0.3).coefficients()
    assert (after.std[:-1] != before.std[:-1]).all()
    for ours, theirs in zip(after.marginals(), before.marginals(), strict=True):
        # diffusers computes some in float32.
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("anchor", ["ddim", "dpmpp_2m", "imported"])
def test_an_angle_beyond_half_a_turn_is_noise_all_the_same(schedule, anchor):
    """Of either sign: std = sigma |sin theta|; it was below 0, with which nothing can be saved."""
    given = {"class_path": "diffusers.DPMSolverMultistepScheduler"} if anchor == "imported" else anchor
    for angle in (-0.5, 4.0, -4.0, 5.0):
        sampler = GGDMSampler(schedule, 4, anchor=given, learn=("std",))
        with torch.no_grad():
            sampler.corrections["std"].fill_(angle)
        std = sampler.coefficients().validate().std
        sigma = schedule.scales(sampler.schedule.logsnr(sampler.timesteps()))[1]
        expected = sigma[1:] * abs(torch.tensor(angle, dtype=torch.float64).sin())
        # What is imported was probed in float32.
        torch.testing.assert_close(std[:-1], expected, rtol=1e-4, atol=1e-6)


@by_name
def test_every_degree_reaches_the_images(scheduler):
    sampler = GGDMSampler.from_scheduler(scheduler, 3, learn=("mu", "nu", "std", "pred", "time"))
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(sampler.num_steps - 1, *x_T.shape, dtype=torch.float64)

    def network(x, t):
        return torch.tanh(x * (1 + t.reshape(-1, 1, 1, 1).to(x) / 1000))

    sampler(network, x_T, noise=noise).square().sum().backward()
    for name, value in sampler.corrections.items():
        assert value.grad.isfinite().all(), name
        if not (name == "std" and isinstance(scheduler, LCMScheduler)):  # all noise: a stationary point
            assert value.grad.abs().sum() > 1e-6, name


def test_times_move_by_offsets_of_the_log_snr():
    sampler = GGDMSampler.from_scheduler(UniPCMultistepScheduler(**LINEAR), 4, learn=("time",))
    before = sampler.timesteps()
    sampler.corrections["time"].data[1] = 0.3
    after = sampler.timesteps()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    moved = sampler.schedule.logsnr(after[2]) - sampler.schedule.logsnr(before[2])
    assert moved.item() == pytest.approx(0.3, abs=1e-6)


@by_name
def test_save_and_load(scheduler, tmp_path):
    sampler = move(GGDMSampler.from_scheduler(scheduler, 4), 0.05)
    sampler.save_pretrained(tmp_path / "s")
    again = GGDMSampler.from_pretrained(tmp_path / "s")
    assert read_card(tmp_path / "s")["config"]["anchor"]["class_path"] == f"diffusers.{type(scheduler).__name__}"
    for name, value in vars(again.coefficients()).items():
        assert torch.equal(value, getattr(sampler.coefficients(), name)), name
    assert again.schedule.matches(sampler.schedule)


class OpenDDIMScheduler(DDIMScheduler):
    """Of one's own, with further arguments for the one that it is made of."""

    def __init__(self, num_train_timesteps=1000, trained_betas=None, **kwargs):
        super().__init__(num_train_timesteps, trained_betas=trained_betas, **kwargs)


def test_a_scheduler_that_takes_any_argument(schedule):
    options = {"clip_sample": False, "timestep_spacing": "trailing"}
    own = GGDMSampler(schedule, 4, anchor={"class_path": f"{__name__}.OpenDDIMScheduler", "init_args": options})
    plain = GGDMSampler(schedule, 4, anchor={"class_path": "diffusers.DDIMScheduler", "init_args": options})
    assert torch.equal(own.coefficients().mu, plain.coefficients().mu)


def test_loading_needs_no_scheduler(tmp_path):
    """The card holds the numbers: neither diffusers nor its version matters any more."""
    sampler = GGDMSampler.from_scheduler(UniPCMultistepScheduler(), 3)
    sampler.save_pretrained(tmp_path / "s")
    card = json.loads((tmp_path / "s" / "sampler.json").read_text())
    card["config"]["anchor"]["class_path"] = "diffusers.ASchedulerThatIsGone"
    (tmp_path / "s" / "sampler.json").write_text(json.dumps(card))
    again = GGDMSampler.from_pretrained(tmp_path / "s")
    assert torch.equal(again.coefficients().mu, sampler.coefficients().mu)


def test_what_does_not_fit_an_imported_anchor_is_refused(schedule):
    anchor = {"class_path": "diffusers.UniPCMultistepScheduler"}
    with pytest.raises(ValueError, match=r"'logsnr' does not exist in the anchored .* of an imported anchor"):
        GGDMSampler(schedule, 4, anchor=anchor, learn=("logsnr",))
    with pytest.raises(ValueError, match=r"Give an instance of the scheduler, UniPCMultistepScheduler\(\.\.\.\)"):
        GGDMSampler.from_scheduler(UniPCMultistepScheduler, 4)
    with pytest.raises(
        ValueError, match=r"`stride` belongs to .* 'ddim' .* got quadratic with another one: leave it at l"
    ):
        GGDMSampler(schedule, 4, anchor=anchor, stride="quadratic")
    with pytest.raises(
        ValueError, match="UniPCMultistepScheduler has no argument 'solver_ordr'; did you mean solver_order"
    ):
        GGDMSampler(schedule, 4, anchor={**anchor, "init_args": {"solver_ordr": 3}})
    with pytest.raises(ValueError, match="num_steps must be a whole number, got '4'"):
        GGDMSampler.from_scheduler(UniPCMultistepScheduler(), "4")
    with pytest.raises(ValueError, match="coefficients of 4 steps, but num_steps is 5"):
        GGDMSampler(schedule, 5, anchor=GGDMSampler(schedule, 4, anchor=anchor).config["anchor"])
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        GGDMSampler(schedule, 0, anchor=anchor)


# -------------------------------------------------------------------------------------------------------- properties


@st.composite
def samplers(draw, size=1.5):
    """Any explicit linear sampler: K steps, weights of all earlier states, of the prediction and of noise."""
    num_steps = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = draw(st.floats(0.01, size))
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, dtype=torch.float64, generator=g)

    std = normal(num_steps).abs() * draw(st.booleans())
    std[-1] = 0
    timesteps = 999 * torch.rand(num_steps, dtype=torch.float64, generator=g).sort(descending=True).values
    prior = torch.tensor([0.01, 1.0], dtype=torch.float64)
    sigma = 1 + torch.rand((), dtype=torch.float64, generator=g)
    return Coefficients(
        normal(num_steps, num_steps).tril(), normal(num_steps), std, normal(num_steps, 2), timesteps, prior, sigma
    )


def network(x, t):
    return torch.tanh(x) + t.reshape(-1, 1, 1, 1).to(x) / 1000


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(coefficients=samplers())
def test_any_explicit_linear_sampler_survives_saving(coefficients, schedule, tmp_path_factory):
    sampler = GGDMSampler.from_coefficients(schedule, coefficients)
    free = GGDMSampler.from_coefficients(schedule, coefficients, parametrization="ggdm", learn=("mu",))
    folder = tmp_path_factory.mktemp("s") / "s"
    sampler.save_pretrained(folder)
    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = (
        torch.randn(coefficients.num_steps - 1, *x_T.shape, dtype=torch.float64) if coefficients.num_steps > 1 else None
    )
    expected = unroll(network, coefficients, x_T, noise)
    again = GGDMSampler.from_pretrained(folder)(network, x_T, noise=noise)
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)
    # The paper's parametrisation writes it with the pair of Theorem 1, which divides by a_k.
    torch.testing.assert_close(free(network, x_T, noise=noise), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(coefficients=samplers(size=1e12), dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_images_that_are_not_finite_come_with_a_warning(coefficients, dtype):
    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = torch.ones(coefficients.num_steps - 1, *x_T.shape, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x_0 = unroll(lambda x, t: x**3, coefficients, x_T, noise)
    assert bool(x_0.isfinite().all()) == (not [w for w in caught if "not finite" in str(w.message)])
    a, std = coefficients.marginals()
    if not a.isfinite().all() or a.abs().max() > 100 or std.max() > 100:
        assert coefficients.problems()


# --------------------------------------------------------------------------------------------------------- at a glance


def test_print_shows_what_the_sampler_is(schedule):
    text = str(GGDMSampler(schedule, 5, stride="quadratic"))
    assert "5 network calls, epsilon, anchored" in text
    assert "anchor: dpmpp_2m, eta 0, quadratic stride" in text
    assert "learned: logsnr (4), mu (15), nu (5), std (4), time (4)" in text
    assert " 0   999.000   -5.059   0.0064   1.0000       0.0000  +0.119  +0.992 x_0" in text
    assert " 5     image              1.0000   0.0000" in text
    assert "warning" not in text
    imported = str(GGDMSampler.from_scheduler(DDIMScheduler(clip_sample=False), 3, step={"eta": 1.0}, learn=()))
    assert '{"init_args": {"clip_sample": false}, "step": {"eta": 1.0}} (imported)' in imported
    assert "learned: nothing (fixed numbers)" in imported
    flow = GGDMSampler.from_scheduler(FlowMatchHeunDiscreteScheduler(), 3)
    assert NoiseSchedule.from_scheduler(FlowMatchHeunDiscreteScheduler()).matches(flow.schedule)


def test_print_warns_of_marginals_out_of_range(schedule):
    sampler = GGDMSampler(schedule, 4, learn=("mu", "nu"))
    sampler.corrections["nu"].data[1] = 30.0
    assert "warning: x_2: the state grows out of scale (a = 30.3" in str(sampler)
    sampler.corrections["nu"].data[:] = torch.tensor([0, 0, 0, -0.9])
    assert "warning: x_4: the image is at" in str(sampler)
    sampler.corrections["nu"].data[:] = 0
    sampler.corrections["mu"].data[-1] = 10.0
    assert "is left in the image" in str(sampler)


@by_name
def test_a_cast_leaves_the_numbers_alone(scheduler):
    sampler = move(GGDMSampler.from_scheduler(scheduler, 4), 0.05)
    before = sampler.coefficients()
    for cast in (sampler.half(), sampler.to(torch.bfloat16)):
        for name, value in vars(cast.coefficients()).items():
            assert torch.equal(value, getattr(before, name)), name


def test_a_state_without_noise_stays_finite(schedule):
    c = Coefficients(
        *(torch.zeros(3, 3), torch.ones(3), torch.zeros(3), torch.zeros(3, 2)), torch.zeros(3), torch.ones(2)
    )
    assert GGDMSampler.from_coefficients(schedule, c, learn=("std",)).coefficients().std.tolist() == [0, 0, 0]


def test_the_sampler_keeps_its_own_copy_of_the_anchor(schedule):
    anchor = {"class_path": "diffusers.UniPCMultistepScheduler", "init_args": {"solver_order": 3}}
    sampler = GGDMSampler(schedule, 4, anchor=anchor)
    anchor["init_args"]["solver_order"] = 1
    assert sampler.config["anchor"]["init_args"] == {"solver_order": 3}
    assert '{"init_args": {"solver_order": 3}} (imported)' in str(sampler)


def test_timesteps_by_the_name_of_a_stride(schedule):
    """As many as make the calls: five for a multistep solver, three for Heun's method."""

    def made(class_name, timesteps, **init_args):
        anchor = {"class_path": f"diffusers.{class_name}", "init_args": init_args}
        return GGDMSampler(schedule, 5, anchor={**anchor, "set_timesteps": {"timesteps": timesteps}}, learn=())

    for class_name, by_hand in (
        ("DPMSolverMultistepScheduler", [999, 639, 360, 160, 40]),
        ("HeunDiscreteScheduler", [999, 444, 111]),
    ):
        named, given = made(class_name, "quadratic"), made(class_name, by_hand)
        for ours, theirs in zip(vars(named.coefficients()).values(), vars(given.coefficients()).values(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="Unknown stride 'cubic'"):
        made("DPMSolverMultistepScheduler", "cubic")


@pytest.mark.parametrize("class_name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_timesteps_for_a_scheduler_that_takes_none(schedule, class_name, monkeypatch):
    """Placed on it they are the same sampler as where `set_timesteps` takes them."""

    def made():
        anchor = {"class_path": f"diffusers.{class_name}", "set_timesteps": {"timesteps": "quadratic"}}
        return GGDMSampler(schedule, 5, anchor=anchor, learn=()).coefficients()

    taken, cls = made(), getattr(diffusers, class_name)
    original = cls.set_timesteps

    def takes_none(self, num_inference_steps, device=None):
        original(self, num_inference_steps, device=device)

    monkeypatch.setattr(cls, "set_timesteps", takes_none)
    for ours, theirs in zip(vars(made()).values(), vars(taken).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "KDPM2DiscreteScheduler"])
def test_timesteps_that_cannot_be_placed(schedule, class_name):
    anchor = {"class_path": f"diffusers.{class_name}", "set_timesteps": {"timesteps": "quadratic"}}
    with pytest.raises(ValueError, match=f"{class_name} takes no timesteps"):
        GGDMSampler(schedule, 5, anchor=anchor)


def test_a_stride_of_more_timesteps_than_there_are(schedule):
    """Its first ones are closer than 1 from 78 steps on. Given numbers are tried once, whatever their number."""
    anchor = {"class_path": "diffusers.DPMSolverMultistepScheduler", "set_timesteps": {"timesteps": "quadratic"}}
    with pytest.raises(ValueError, match="the stride 'quadratic' has no 80 different ones; use fewer steps"):
        GGDMSampler(schedule, 80, anchor=anchor)
    anchor["set_timesteps"] = {"timesteps": [900, 500, 100]}
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler makes 3 network calls with these, not 5"):
        GGDMSampler(schedule, 5, anchor=anchor)


@pytest.mark.parametrize("class_name", ["UniPCMultistepScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler"])
def test_placed_timesteps_are_those_of_the_stride(schedule, class_name):
    anchor = {"class_path": f"diffusers.{class_name}", "set_timesteps": {"timesteps": "quadratic"}}
    coefficients = GGDMSampler(schedule, 5, anchor=anchor, learn=()).coefficients()
    assert coefficients.timesteps.tolist() == [999, 639, 360, 160, 40]
    # A consistent sampler: every state is the image and noise in the proportion of its time.
    a, std = coefficients.marginals()
    alpha, sigma = schedule.alpha_sigma(coefficients.timesteps)
    torch.testing.assert_close(a[:-1], alpha, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((std[:-1] ** 2)[0], (sigma**2)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("null", [None, "None"])
def test_null_options_of_an_anchor_are_as_good_as_none(schedule, null):
    """The second is what the command line makes of `--sampler.anchor.set_timesteps=null`."""
    anchor = {"class_path": "diffusers.UniPCMultistepScheduler"}
    sampler = GGDMSampler(schedule, 3, {**anchor, "set_timesteps": null, "init_args": null})
    assert sampler.config == GGDMSampler(schedule, 3, anchor).config
    with pytest.raises(ValueError, match=r"anchor: set_timesteps must be a mapping from arguments to .*, got 'linear'"):
        GGDMSampler(schedule, 3, {**anchor, "set_timesteps": "linear"})
