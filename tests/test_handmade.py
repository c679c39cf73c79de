"""Hand-made solvers for all kinds of models: each placement is another sampler, and a good one."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

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
        assert [spacing for spacing, _ in found] == [each.spacing for each in placements(name, schedule, 5)]
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
    for name, options in {"UniPCMultistepScheduler": {"use_flow_sigmas": False}, "HeunDiscreteScheduler": {}}.items():
        with pytest.raises(ValueError, match=f"{name} with these init_args has another noise schedule than the model"):
            anchored(name, **options)
