import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KarrasVeScheduler,
    UniPCMultistepScheduler,
)

from ddss_lightning.schedule import NoiseSchedule, own_config, scheduler_prediction_type


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alpha_sigma_are_the_scheduler_s_at_trained_timesteps(beta_schedule):
    scheduler = DDIMScheduler(1000, beta_schedule=beta_schedule)
    alpha, sigma = NoiseSchedule.from_scheduler(scheduler).alpha_sigma(torch.arange(1000))
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(alpha**2, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=1e-12, atol=0)


def test_time_and_logsnr_are_inverse_and_clamped(schedule):
    t = torch.tensor([0, 0.25, 1, 499.5, 998.999, 999], dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep(schedule.logsnr(t)), t, rtol=0, atol=1e-9)
    assert schedule.timestep(torch.tensor([100.0, -100.0])).tolist() == [0, 999]
    assert (schedule.logsnr(torch.linspace(0, 999, 5000)).diff() < 0).all()


def test_gradients_in_both_directions_are_finite_differences(schedule):
    t = torch.tensor([0.4, 300.3, 998.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(schedule.logsnr, t)
    logsnr = schedule.logsnr(t).detach().requires_grad_()
    assert torch.autograd.gradcheck(schedule.timestep, logsnr)


def test_scales_at_extreme_logsnr(schedule):
    alpha, sigma = schedule.scales(torch.tensor([-20.0, 0.0, 20.0, torch.inf]))
    small = math.exp(-20)
    torch.testing.assert_close(alpha[:3].log(), torch.tensor([-20, math.log(0.5) / 2, -(small**2) / 2]).double())
    assert sigma[2].item() == pytest.approx(small, rel=1e-12)
    assert (alpha[3], sigma[3]) == (1, 0)


def test_matches_tells_schedules_apart(schedule):
    other = NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="scaled_linear"))
    again = NoiseSchedule.from_scheduler(DDIMScheduler(1000, beta_schedule="linear"))
    assert schedule.matches(again)
    assert schedule.matches(NoiseSchedule(schedule.table + 1e-4))
    assert not schedule.matches(other)
    assert not schedule.matches(NoiseSchedule(schedule.table + 2e-2))
    assert not schedule.matches(NoiseSchedule(schedule.table[:-1]))


def test_a_cast_keeps_the_table(schedule):
    again = NoiseSchedule(schedule.table).to(torch.bfloat16)
    assert torch.equal(again.table, schedule.table)


def test_what_a_scheduler_carries_of_another_kind_says_nothing_of_its_own():
    flow = FlowMatchEulerDiscreteScheduler.from_config(DDPMScheduler(prediction_type="v_prediction").config)
    assert scheduler_prediction_type(flow) == "flow_prediction"
    assert NoiseSchedule.from_scheduler(flow).scaling == "flow"
    of_flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config
    with_betas = HeunDiscreteScheduler.from_config({**of_flow, "prediction_type": "epsilon"})
    assert NoiseSchedule.from_scheduler(with_betas).scaling == "vp"
    rescaled = DDIMScheduler(rescale_betas_zero_snr=True).config
    heun = HeunDiscreteScheduler.from_config(rescaled)  # knows no such option
    plain = HeunDiscreteScheduler()
    assert torch.equal(NoiseSchedule.from_scheduler(heun).table, NoiseSchedule.from_scheduler(plain).table)


def test_options_that_a_subclass_sets_are_its_own():
    class Velocity(DDIMScheduler):
        def __init__(self, num_train_timesteps=1000):
            super().__init__(num_train_timesteps, prediction_type="v_prediction", rescale_betas_zero_snr=True)

    class Flow(FlowMatchEulerDiscreteScheduler):
        def __init__(self):
            super().__init__(shift=3.0)

    class Any(DDIMScheduler):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    assert scheduler_prediction_type(Velocity()) == "v_prediction"
    expected = NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    assert torch.equal(NoiseSchedule.from_scheduler(Velocity()).table, expected.table)
    assert NoiseSchedule.from_scheduler(Flow()).scaling == scheduler_prediction_type(Flow()).partition("_")[0] == "flow"
    assert own_config(Any(clip_sample=False)).keys() == own_config(DDIMScheduler()).keys()


def test_flow_matching_is_alpha_plus_sigma_equal_to_1():
    flow = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    assert flow.grid[[0, -1]].tolist() == [0, 1000]
    t = torch.tensor([1.0, 250.0, 999.0], dtype=torch.float64)
    alpha, sigma = flow.alpha_sigma(t)
    torch.testing.assert_close(sigma, t / 1000)
    torch.testing.assert_close(alpha, 1 - t / 1000)
    torch.testing.assert_close(flow.timestep(flow.logsnr(t + 0.3)), t + 0.3)
    assert flow.matches(NoiseSchedule.from_scheduler(DPMSolverMultistepScheduler(use_flow_sigmas=True)))
    vp = NoiseSchedule(flow.table, flow.grid)
    assert not flow.matches(vp)


def test_edm_is_the_scaled_input_of_karras():
    """t = log(sigma) / 4, alpha = c_in = 1 / sqrt(sigma^2 + sigma_data^2), sigma = c_in sigma_edm."""
    edm = NoiseSchedule.from_scheduler(EDMEulerScheduler(sigma_data=0.5))
    sigma_edm = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    alpha, sigma = edm.alpha_sigma(sigma_edm.log() / 4)
    torch.testing.assert_close(alpha, (sigma_edm**2 + 0.25) ** -0.5)
    torch.testing.assert_close(sigma, sigma_edm * alpha)


def test_zero_terminal_snr_is_extrapolated():
    ddim = NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    assert ddim.table[-2] - ddim.table[-1] == pytest.approx(float(ddim.table[-3] - ddim.table[-2]))
    assert ddim.matches(NoiseSchedule.from_scheduler(EulerDiscreteScheduler(rescale_betas_zero_snr=True)))


def test_bad_schedules():
    with pytest.raises(ValueError, match=r"KarrasVeScheduler has no `alphas_cumprod` and is neither a flow matching"):
        NoiseSchedule.from_scheduler(KarrasVeScheduler())
    with pytest.raises(ValueError, match="decrease strictly"):
        NoiseSchedule(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        NoiseSchedule(torch.zeros(1))
    with pytest.raises(ValueError, match="must be finite"):
        NoiseSchedule(torch.tensor([0.0, -torch.inf]))
    cumulative = DDPMScheduler().alphas_cumprod
    with pytest.raises(ValueError, match=r"got 0\.9999 to 4\.036e-05\. Use .* of alphas_cumprod a, NoiseS"):
        NoiseSchedule(cumulative)
    with pytest.raises(ValueError, match=r"must begin near the image, well above 0, .* got -0\.0001 to -10\.12\."):
        NoiseSchedule(cumulative.log())
    # Of few timesteps even the last one is nearer to the image.
    assert NoiseSchedule.from_scheduler(DDPMScheduler(num_train_timesteps=10)).table[-1] > 0
    assert NoiseSchedule(cumulative.double().logit() / 2).matches(NoiseSchedule.from_scheduler(DDPMScheduler()))
    with pytest.raises(ValueError, match="timesteps must be 2 finite, strictly increasing"):
        NoiseSchedule(torch.tensor([1.0, -1.0]), timesteps=torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="Unknown scaling 've'"):
        NoiseSchedule(torch.tensor([1.0, -1.0]), scaling="ve")
    with pytest.raises(ValueError, match="sigma_data must be a positive number"):
        NoiseSchedule(torch.tensor([1.0, -1.0]), sigma_data=0.0)
