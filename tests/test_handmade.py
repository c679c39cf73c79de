"""Hand-made solvers for all kinds of models: each placement is another sampler, and a good one."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ddss_lightning import GGDMSampler
from ddss_lightning.handmade import EDM_SOLVERS, FLOW_SOLVERS, SOLVERS, NoSuchCallsError, placements, solver_samplers
from ddss_lightning.schedule import NoiseSchedule

KINDS = {
    "whole times": (DDIMScheduler(), "epsilon", SOLVERS),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow_prediction", FLOW_SOLVERS),
    "edm": (EDMEulerScheduler(), "edm_epsilon", EDM_SOLVERS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_makes_five_calls_for_every_kind_of_model(kind):
    scheduler, prediction_type, solvers = KINDS[kind]
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for name in SOLVERS:
        if name not in solvers:
            with pytest.raises(
                NoSuchCallsError, match=f"is not for {'flow matching' if kind == 'flow' else 'EDM'} mod"
            ):
                solver_samplers(name, schedule, prediction_type, 5)
            continue
        found = solver_samplers(name, schedule, prediction_type, 5)
        planned = placements(name, schedule, prediction_type, 5)
        assert [spacing for spacing, _ in found] == [each.spacing for each in planned]
        assert len(dict(found)) == len(found)
        numbers = [sampler.coefficients() for _, sampler in found]
        # No two are the same sampler under two names.
        for i, one in enumerate(numbers):
            for other in numbers[:i]:
                assert not all(
                    torch.allclose(getattr(one, each), getattr(other, each), atol=1e-3)
                    for each in ("mu", "nu", "std", "timesteps")
                )
        if kind != "whole times":
            # Of those of betas some add or lose noise, in diffusers too; these end at an image.
            ends = [[float(each[-1]) for each in coefficients.marginals()] for coefficients in numbers]
            assert all(abs(a - 1) < 2e-3 and v < 2e-3 for a, v in ends), (name, ends)


def test_ddim_of_shifted_times_is_eulers_method_of_the_pipelines():
    """Which give their scheduler the sigmas 1, ..., 1 / K."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = GGDMSampler.from_scheduler(scheduler, 4, set_timesteps={"sigmas": [1.0, 0.75, 0.5, 0.25]})
    ours = dict(solver_samplers("DDIM", NoiseSchedule.from_scheduler(scheduler), "flow_prediction", 4))["shift 3"]
    for name, value in vars(ours.coefficients()).items():
        torch.testing.assert_close(value, getattr(theirs.coefficients(), name), rtol=1e-4, atol=1e-4)


def test_a_scheduler_steps_along_the_flow_of_the_model():
    """Without being told so; one that knows betas alone, or is told to step along them, is refused."""
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())

    def anchored(name, **init_args):
        anchor = {"class_path": f"diffusers.{name}", "init_args": init_args}
        return GGDMSampler(schedule, 4, anchor=anchor, prediction_type="flow_prediction", learn=())

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    expected = GGDMSampler.from_scheduler(scheduler, 4).coefficients()
    torch.testing.assert_close(anchored("UniPCMultistepScheduler", flow_shift=3.0).coefficients().mu, expected.mu)
    with pytest.raises(
        ValueError, match=r"UniPCMultistepScheduler with these init_args has another noise schedule .*leave"
    ):
        anchored("UniPCMultistepScheduler", use_flow_sigmas=False)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler steps along betas, the model is one of flow matching"):
        anchored("HeunDiscreteScheduler")
    # It does not make its last step there.
    with pytest.warns(UserWarning, match=r"DEISMultistepScheduler .* no good sampler: noise of std 0\.2\d* is left"):
        anchored("DEISMultistepScheduler")


def test_times_that_a_flow_scheduler_would_show_wrongly_are_refused():
    """diffusers shifts its noise levels, and not the timesteps that it is given."""
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = {"timesteps": [1000, 750, 500, 250]}
    for scheduler in (shifted, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)):
        with pytest.raises(ValueError, match="by a shift of its noise levels, and would show the network other times"):
            GGDMSampler.from_scheduler(scheduler, 4, set_timesteps=times)
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        anchor = {"class_path": f"diffusers.{name}", "init_args": {"shift": 3.0} if "Flow" in name else {}}
        anchor["set_timesteps"] = {"timesteps": "quadratic"}
        with pytest.raises(ValueError, match=f"{name} places its calls along the flow by a shift"):
            GGDMSampler(NoiseSchedule.from_scheduler(shifted), 4, anchor=anchor, prediction_type="flow_prediction")
    # With noise levels of their own they are shown as they are given.
    both = GGDMSampler.from_scheduler(shifted, 4, set_timesteps={**times, "sigmas": [1.0, 0.75, 0.5, 0.25]})
    assert both.timesteps().tolist() == times["timesteps"]
    plain = GGDMSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(), 4, set_timesteps=times)
    assert plain.timesteps().tolist() == times["timesteps"]


def test_the_first_reason_is_given():
    with pytest.raises(ValueError, match=r"cannot be set to 4 steps: .*`mu` must be passed"):
        GGDMSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_strides_of_an_edm_scheduler():
    anchor = {"class_path": "diffusers.EDMEulerScheduler", "set_timesteps": {"timesteps": "quadratic"}}
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"begin at -1\.554; .* `sigma_schedule: karras` or `exponential` places"):
        GGDMSampler(schedule, 4, anchor=anchor, prediction_type="edm_epsilon")


def test_times_of_another_kind_are_not_those_of_edm():
    """Of Euler's method with continuous times the own formulas are compared, and it is an anchor itself."""
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    scheduler = EulerDiscreteScheduler(**options)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for name in SOLVERS:
        if name in ("DDPM", "DDIM", "DPM-Solver++ 2M"):
            assert [each for each, _ in solver_samplers(name, schedule, "v_prediction", 5)] == ["logsnr"]
            continue
        with pytest.raises(NoSuchCallsError, match=r"is not for models whose times begin at -1\.151; those are DDPM"):
            solver_samplers(name, schedule, "v_prediction", 5)
    anchor = {"class_path": "diffusers.EulerDiscreteScheduler", "init_args": {}}
    ours = GGDMSampler(schedule, 5, anchor=anchor, prediction_type="v_prediction").coefficients()
    theirs = GGDMSampler.from_scheduler(scheduler, 5).coefficients()
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)
    # diffusers shows whole times to networks that predict noise.
    other = EulerDiscreteScheduler(timestep_type="continuous")
    assert NoiseSchedule.from_scheduler(other).grid[-1] == 999


def test_a_scheduler_that_shifts_its_snr_is_given_the_betas_of_the_model_as_they_are():
    options = {"snr_shift_scale": 4.0, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = CogVideoXDDIMScheduler(clip_sample=False, **options)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    expected = GGDMSampler.from_scheduler(scheduler, 4).coefficients().mu
    for shift in ({}, {"snr_shift_scale": 4.0}):
        init_args = {"clip_sample": False, "timestep_spacing": "trailing", **shift}
        anchor = {"class_path": "diffusers.CogVideoXDDIMScheduler", "init_args": init_args}
        ours = GGDMSampler(schedule, 4, anchor=anchor, prediction_type="v_prediction")
        torch.testing.assert_close(ours.coefficients().mu, expected, rtol=1e-4, atol=1e-5)


def test_the_image_is_not_the_difference_of_large_numbers():
    """Of a model that predicts noise, at a first step without any signal."""
    with pytest.warns(UserWarning, match=r"the first predicted image is 3\.\d*e\+04 times the state"):
        GGDMSampler.from_scheduler(UniPCMultistepScheduler(rescale_betas_zero_snr=True), 4)


def test_time_the_other_way_is_refused():
    with pytest.raises(ValueError, match="with invert_sigmas counts time from noise to image"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
