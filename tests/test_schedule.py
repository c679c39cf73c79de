import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ddss_lightning.schedule import NoiseSchedule, alpha_sigma_of_logsnr


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


def test_scales_at_extreme_logsnr():
    alpha, sigma = alpha_sigma_of_logsnr(torch.tensor([-20.0, 0.0, 20.0, torch.inf]))
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
    assert not schedule.matches(NoiseSchedule(schedule.table[:-1]))


def test_a_cast_keeps_the_table(schedule):
    again = NoiseSchedule(schedule.table).to(torch.bfloat16)
    assert torch.equal(again.table, schedule.table)


def test_bad_schedules():
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler has no `alphas_cumprod`"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="zero terminal SNR"):
        NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="decrease strictly"):
        NoiseSchedule(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        NoiseSchedule(torch.zeros(1))
