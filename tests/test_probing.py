"""Every explicit, linear diffusers scheduler is a GGDM, and what is not gets told why."""

import inspect
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ddss_lightning.anchors import import_anchor
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.noise import draw_noise
from ddss_lightning.probing import NotAGGDMError, build_scheduler, probe, rollout_error, run_scheduler, scheduler_steps
from ddss_lightning.schedule import NoiseSchedule, scheduler_prediction_type
from ddss_lightning.scheduler import GGDMScheduler
from ddss_lightning.unroll import noises_used

# Processors round float32 differently: 5.2e-7 was seen, elsewhere 4e-7.
EXACT, FLOAT32 = 1e-10, 1e-6
NO_CLIP = {"clip_sample": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}

# Name -> (largest error, options to try). Whoever computes in float32 inside says so here.
SUPPORTED = {
    "CogVideoXDDIMScheduler": (EXACT, [NO_CLIP, {**NO_CLIP, **ZERO_SNR}]),
    "DDIMParallelScheduler": (EXACT, [NO_CLIP]),
    "DDIMScheduler": (
        EXACT,
        [
            *({**NO_CLIP, "timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")),
            *({**NO_CLIP, "prediction_type": predicts} for predicts in ("sample", "v_prediction")),
            {**NO_CLIP, **ZERO_SNR},
            {**NO_CLIP, "beta_schedule": "squaredcos_cap_v2"},
        ],
    ),
    "DDPMParallelScheduler": (EXACT, [NO_CLIP]),
    "DDPMScheduler": (
        EXACT,
        [NO_CLIP, *({**NO_CLIP, "prediction_type": predicts} for predicts in ("sample", "v_prediction"))],
    ),
    "DEISMultistepScheduler": (
        EXACT,
        [
            *({"solver_order": n} for n in (1, 2, 3)),
            {"use_karras_sigmas": True},
            {"prediction_type": "v_prediction"},
            FLOW,
        ],
    ),
    "DPMSolverMultistepScheduler": (
        FLOAT32,
        [
            *({"solver_order": n} for n in (1, 2, 3)),
            *({f"use_{kind}": True} for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")),
            *({"timestep_spacing": spacing} for spacing in ("leading", "trailing")),
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            *({"algorithm_type": "sde-dpmsolver++", "solver_order": n} for n in (1, 2, 3)),
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_type": "heun"},
            {"euler_at_final": True, "solver_type": "heun"},
            {"prediction_type": "sample"},
            {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
            ZERO_SNR,
            FLOW,
        ],
    ),
    "DPMSolverSinglestepScheduler": (
        EXACT,
        [
            *({"solver_order": n} for n in (1, 2, 3)),
            {"use_exponential_sigmas": True},
            {"prediction_type": "sample"},
            FLOW,
        ],
    ),
    "EDMDPMSolverMultistepScheduler": (
        EXACT,
        [*({"solver_order": n} for n in (1, 2, 3)), {"sigma_schedule": "exponential"}],
    ),
    "EDMEulerScheduler": (FLOAT32, [{}, {"prediction_type": "v_prediction"}]),
    "EulerAncestralDiscreteScheduler": (FLOAT32, [{}, {"timestep_spacing": "trailing"}]),
    "EulerDiscreteScheduler": (
        FLOAT32,
        [
            *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")),
            *({"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")),
            {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
            {"final_sigmas_type": "sigma_min"},
            ZERO_SNR,
        ],
    ),
    "FlowMapEulerDiscreteScheduler": (EXACT, [{}]),
    "FlowMatchEulerDiscreteScheduler": (
        FLOAT32,
        [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"stochastic_sampling": True}, {"invert_sigmas": False}],
    ),
    "FlowMatchHeunDiscreteScheduler": (FLOAT32, [{}, {"shift": 3.0}]),
    "FlowMatchLCMScheduler": (FLOAT32, [{}]),
    "HeunDiscreteScheduler": (EXACT, [{}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}]),
    "KDPM2AncestralDiscreteScheduler": (EXACT, [{}, {"use_karras_sigmas": True}]),
    "KDPM2DiscreteScheduler": (EXACT, [{}, {"use_exponential_sigmas": True}]),
    "LCMScheduler": (EXACT, [NO_CLIP, {**NO_CLIP, "prediction_type": "v_prediction"}]),
    "LMSDiscreteScheduler": (EXACT, [{}, {"use_karras_sigmas": True}]),
    "PNDMScheduler": (EXACT, [{"skip_prk_steps": True}, {"skip_prk_steps": False}]),
    "TCDScheduler": (EXACT, [NO_CLIP]),
    # Its noise ends below t = 200: with few and equally spaced steps the last one would add some.
    "SASolverScheduler": (EXACT, [{"use_karras_sigmas": True}, {"use_karras_sigmas": True, "predictor_order": 3}]),
    "UniPCMultistepScheduler": (
        EXACT,
        [
            *({"solver_order": n} for n in (1, 2, 3)),
            {"use_karras_sigmas": True},
            {"solver_type": "bh1", "predict_x0": False, "final_sigmas_type": "sigma_min"},
            {"disable_corrector": [0, 1], **ZERO_SNR},
            {"prediction_type": "sample"},
            FLOW,
        ],
    ),
}

OTHER_LOOP, TOKENS = "does not run in the loop of a pipeline", "does not run in the loop of a pipeline"
# Name -> (options, the reason that is given).
REFUSED = {
    "AmusedScheduler": ({"mask_token_id": 3}, TOKENS),
    "BlockRefinementScheduler": ({}, TOKENS),
    "CMStochasticIterativeScheduler": ({}, "clip_denoised=True is not linear"),
    "CogVideoXDPMScheduler": (NO_CLIP, OTHER_LOOP),
    "DDIMInverseScheduler": (NO_CLIP, "from the image to noise"),
    "DDPMWuerstchenScheduler": ({}, OTHER_LOOP),
    "DPMSolverMultistepInverseScheduler": ({}, "from the image to noise"),
    "DiscreteDDIMScheduler": ({}, "from the image to noise"),
    "EntropyBoundScheduler": ({}, "does not return samples of the shape and kind"),
    "HeliosDMDScheduler": ({}, "cannot be set to 5 steps"),
    "HeliosScheduler": ({}, "cannot be set to 5 steps"),
    "IPNDMScheduler": ({}, "the newest network output has no weight"),
    "KarrasVeScheduler": ({}, OTHER_LOOP),
    "LTXEulerAncestralRFScheduler": ({}, "neither a flow matching nor an EDM scheduler"),
    "MiniMaxH3Scheduler": ({}, "from the image to noise"),
    "PiflowScheduler": ({}, OTHER_LOOP),
    "RFD4ProteinaScheduler": (
        {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
        "cannot be set to 5 steps",
    ),
    "RePaintScheduler": (NO_CLIP, OTHER_LOOP),
    "SCMScheduler": ({}, "cannot be set to 5 steps"),
    "ScoreSdeVeScheduler": ({}, "lacks set_timesteps or step"),
    # Its step needs the previous timestep, which the loop of other pipelines does not give.
    "UnCLIPScheduler": (NO_CLIP, "needs prev_timestep at every step"),
    "VQDiffusionScheduler": ({"num_vec_classes": 7}, TOKENS),
}
# Schedulers of packages that are not installed: diffusers exports a class that cannot be made.
NEED_A_PACKAGE = {"DPMSolverSDEScheduler": "torchsde", "CosineDPMSolverMultistepScheduler": "torchsde"}


def exported():
    names = diffusers._import_structure["schedulers"] + list(NEED_A_PACKAGE)
    classes = {name: getattr(diffusers, name, None) for name in names}
    return {name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, SchedulerMixin)} - {
        "SchedulerMixin"
    }


def test_every_scheduler_of_diffusers_is_either_supported_or_refused():
    assert exported() - set(NEED_A_PACKAGE) <= set(SUPPORTED) | set(REFUSED), "sort the new scheduler"
    assert not set(SUPPORTED) & set(REFUSED)


def name_of(value):
    return type(value).__name__ if isinstance(value, SchedulerMixin) else str(value)


CASES = [(name, options) for name, (_, many) in SUPPORTED.items() for options in many]


def case_id(value):
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "default"


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_rollout_of_the_coefficients_is_the_scheduler_s_own_loop(name, options):
    """Same noise, float64, a nonlinear stand-in for the network, at 3, 5, 10 and 20 steps."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    scheduler = getattr(diffusers, name)(**options)
    smallest = 4 if name == "PNDMScheduler" and not options["skip_prk_steps"] else 3
    for num_steps in (smallest, 5, 10, 20):
        coefficients = probe(scheduler, num_steps)
        assert rollout_error(coefficients, scheduler, num_steps) <= SUPPORTED[name][0], num_steps


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_ggdm_is_refused_with_the_reason(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        probe(getattr(diffusers, name)(**options), 5)


@pytest.mark.parametrize(
    ("scheduler", "num_steps", "more"),
    [
        (DDIMScheduler(**NO_CLIP), 5, {"step": {"eta": 1.0}}),
        (DDIMScheduler(**NO_CLIP), 5, {"step": {"eta": 0.3}}),
        (EulerDiscreteScheduler(), 3, {"set_timesteps": {"sigmas": [14.0, 3.0, 0.5, 0.0]}}),
        (EulerDiscreteScheduler(), 3, {"set_timesteps": {"timesteps": [900, 500, 20]}}),
        (HeunDiscreteScheduler(), 3, {"set_timesteps": {"timesteps": [900, 500, 20]}}),
        (DPMSolverMultistepScheduler(), 3, {"set_timesteps": {"timesteps": [900, 500, 20]}}),
        (diffusers.FlowMatchEulerDiscreteScheduler(), 3, {"set_timesteps": {"sigmas": [1.0, 0.7, 0.2]}}),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 3, {"set_timesteps": {"mu": 0.7}}),
        (diffusers.LCMScheduler(**NO_CLIP), 3, {"set_timesteps": {"timesteps": [999, 499, 19]}}),
    ],
    ids=name_of,
)
def test_arguments_of_set_timesteps_and_step(scheduler, num_steps, more):
    coefficients = probe(scheduler, num_steps, **more)
    assert rollout_error(coefficients, scheduler, num_steps, **more) <= FLOAT32
    assert bool(coefficients.std.any()) == (
        more.get("step") is not None or isinstance(scheduler, diffusers.LCMScheduler)
    )


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.UniPCMultistepScheduler(), DPMSolverMultistepScheduler(), EulerDiscreteScheduler()],
    ids=name_of,
)
@pytest.mark.parametrize(
    "timesteps", [[999, 500, 1000], [999, 500, -5], [999, 500, 500], [20, 500, 999], [999, float("nan")], []], ids=str
)
def test_wrong_timesteps_are_told(scheduler, timesteps):
    with pytest.raises(ValueError, match=r"timesteps must be strictly decreasing numbers from 999 to 0, got \["):
        probe(scheduler, len(timesteps) or 3, {"timesteps": timesteps})


def test_timesteps_between_those_of_training_where_sigmas_are_looked_up():
    with pytest.raises(ValueError, match="timesteps of a UniPCMultistepScheduler must be whole numbers"):
        probe(diffusers.UniPCMultistepScheduler(), 2, {"timesteps": [999.5 - 0.6, 3]})


def test_nfe_is_what_the_network_is_called():
    assert probe(HeunDiscreteScheduler(), 5).num_steps == 9
    assert probe(diffusers.PNDMScheduler(skip_prk_steps=True), 5).num_steps == 6
    assert probe(diffusers.KDPM2DiscreteScheduler(), 5).num_steps == 9
    assert scheduler_steps(HeunDiscreteScheduler(), 9) == 5
    with pytest.raises(ValueError, match=r"HeunDiscreteScheduler cannot make 10 network calls, only 1, 3, 5, 7, 9, "):
        scheduler_steps(HeunDiscreteScheduler(), 10)


# DDIM steps by T // K, whatever the distance of its timesteps; DEIS with flow sigmas ends before the image.
INCONSISTENT = {("DDIMScheduler", "linspace", None), ("DEISMultistepScheduler", None, True)}


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_marginals_of_imported_solvers_are_those_of_the_schedule(name, options):
    """Solvers are exact for constant predictions: Theorem 1 gives the schedule's log-SNR at the network's times."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    if (name, options.get("timestep_spacing"), options.get("use_flow_sigmas")) in INCONSISTENT:
        pytest.skip("diffusers' own sampler is not consistent there")
    sampler = GGDMSampler.from_scheduler(getattr(diffusers, name)(**options), 5)
    c = sampler.coefficients()
    a, std = c.marginals()
    # Rounded timesteps, and DDIM's trailing spacing where 1000 is no multiple, move it a little.
    logsnrs = (a / std).log()[:-1]
    inner = (sampler.logsnrs() > -6) & (sampler.logsnrs() < 3)
    torch.testing.assert_close(logsnrs[inner], sampler.logsnrs()[inner], rtol=0, atol=0.1)
    assert a[-1].item() == pytest.approx(1, abs=0.02)
    assert std[-1].item() < 0.05


@pytest.mark.parametrize(
    ("scheduler", "step"),
    [
        (UniPCMultistepScheduler(beta_schedule="linear"), {}),
        (EulerDiscreteScheduler(beta_schedule="linear"), {}),
        (diffusers.DEISMultistepScheduler(beta_schedule="linear"), {}),
        (DDIMScheduler(**NO_CLIP, beta_schedule="linear"), {"eta": 1.0}),
        (HeunDiscreteScheduler(beta_schedule="linear", use_karras_sigmas=True), {}),
        (DPMSolverMultistepScheduler(beta_schedule="linear", algorithm_type="sde-dpmsolver++"), {}),
    ],
    ids=name_of,
)
def test_imported_samplers_make_the_scheduler_s_images_on_the_shipped_model(denoiser, scheduler, step):
    scheduler = type(scheduler).from_config(scheduler.config, beta_start=1e-4, beta_end=0.02)
    sampler = GGDMSampler.from_scheduler(scheduler, 5, step=step)
    x_T, noise = draw_noise((16, 1, 8, 8), sampler.num_steps, torch.Generator().manual_seed(0))
    with torch.no_grad():
        states, _ = run_scheduler(
            scheduler, lambda k, x, t: denoiser(x, t.expand(len(x)).float()), x_T, [*noise, noise[0]], 5, step=step
        )
        torch.testing.assert_close(sampler(denoiser, x_T, noise=noise), states[-1], rtol=0, atol=1e-4)


def test_a_sampler_that_does_not_reach_the_image_is_warned_of():
    with pytest.warns(
        UserWarning, match="DDIMScheduler with these options is no good sampler: x_3: the image is at 0.3"
    ):
        probe(DDIMScheduler(**NO_CLIP, timestep_spacing="linspace"), 3)


def test_the_scheduler_is_not_changed():
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(7)
    before = {key: str(value) for key, value in vars(scheduler).items()}
    probe(scheduler, 5)
    assert {key: str(value) for key, value in vars(scheduler).items()} == before


@pytest.mark.parametrize(
    ("scheduler", "more", "message"),
    [
        (DDIMScheduler(), {}, "DDIMScheduler with clip_sample=True is not linear"),
        (UniPCMultistepScheduler(thresholding=True), {}, "thresholding=True is not linear"),
        (DDIMScheduler(**NO_CLIP, **{**ZERO_SNR, "prediction_type": "epsilon"}), {}, "zero terminal SNR"),
        (
            DDIMScheduler(**NO_CLIP, set_alpha_to_one=False, steps_offset=1),
            {"step": {"eta": 1.0}},
            "adds noise of standard deviation 0.00.* in its last step",
        ),
        (EulerDiscreteScheduler(), {"set_timesteps": {"sigmas": [9.0, 3.0, 0.0]}}, "num_steps is 5, but 3 sigmas"),
        (EulerDiscreteScheduler(), {"set_timesteps": {"nothing": 1}}, "cannot be set to 5 steps: TypeError"),
        (EulerDiscreteScheduler(), {"step": {"nothing": 1}}, "has no option nothing of `step`"),
    ],
    ids=name_of,
)
def test_refusals_say_why(scheduler, more, message):
    with pytest.raises(ValueError, match=message):
        probe(scheduler, 5, **more)


@pytest.mark.parametrize("num_steps", [25, 30])
def test_weights_that_float32_cannot_bear_are_refused(num_steps):
    """The noise of SDE steps hides the past predictions; with 25 calls images were off by 300 times their size."""
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    with pytest.raises(NotAGGDMError, match=f"with {num_steps} calls .* Use fewer calls or a lower solver_order"):
        probe(scheduler, num_steps)
    few = probe(scheduler, 15)
    assert rollout_error(few, scheduler, 15, dtype=torch.float32) < 1e-4


@pytest.mark.parametrize(
    ("scheduler", "step"),
    [(DDIMScheduler(**NO_CLIP), {"eta": 1.0}), (EulerAncestralDiscreteScheduler(), {})],
    ids=["DDIMScheduler", "EulerAncestralDiscreteScheduler"],
)
def test_one_step_samplers_look_at_their_own_noise_alone(scheduler, step):
    """What rounding left made them look at all noises before."""
    coefficients = probe(scheduler, 6, step=step)
    assert not coefficients.past_noise.any()
    assert noises_used(coefficients) == [slice(min(k, 5), min(k + 1, 5)) for k in range(6)]


@pytest.mark.parametrize(
    "cls",
    [
        UniPCMultistepScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, DEISMultistepScheduler,
        DPMSolverSinglestepScheduler,
    ],
)  # fmt: skip
def test_what_a_scheduler_carries_of_another_configuration_is_not_its_own(cls, tmp_path):
    """`from_config` of a saved pipeline's scheduler keeps `clip_sample`, which its class does not know."""
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path)
    scheduler = cls.from_config(DDPMScheduler.from_pretrained(tmp_path).config)
    assert scheduler.config["clip_sample"]
    expected = cls(**{name: scheduler.config[name] for name in inspect.signature(cls).parameters})
    assert probe(scheduler, 5).to_lists() == probe(expected, 5).to_lists()
    sampler = GGDMSampler.from_scheduler(scheduler, 5)
    assert "clip_sample" not in sampler.config["anchor"].get("init_args", {})
    # Its own option counts.
    with pytest.raises(NotAGGDMError, match="clip_sample=True is not linear"):
        probe(DDIMScheduler.from_config(scheduler.config), 5)


def test_a_solver_made_from_a_learned_scheduler_s_configuration_is_the_solver(schedule):
    learned_sampler = GGDMSampler(schedule, 5)
    learned = GGDMScheduler.from_sampler(learned_sampler)
    scheduler = EulerDiscreteScheduler.from_config({**learned.config, "beta_schedule": "linear"})
    assert scheduler.config["logsnrs"]
    assert probe(scheduler, 5).to_lists() == probe(EulerDiscreteScheduler(), 5).to_lists()
    assert torch.equal(probe(GGDMScheduler.from_config(learned.config), 5).mu, learned_sampler.coefficients().mu)


def test_a_sampler_that_is_not_linear_does_not_pass():
    class Squares(DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            return super().step(model_output + 1e-3 * model_output**2, timestep, sample, **kwargs)

    with pytest.raises(NotAGGDMError, match="Squares is not linear, or keeps a state"):
        probe(Squares(**NO_CLIP), 5)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        probe(DDIMScheduler(**NO_CLIP), 0)


# --------------------------------------------------------------------------------------------------- anchors by name


def test_an_anchor_by_name_takes_the_model_s_betas_and_prediction_type(schedule):
    anchor = {"class_path": "diffusers.UniPCMultistepScheduler", "init_args": {"solver_order": 3}}
    scheduler = build_scheduler(anchor, schedule, "v_prediction")
    assert scheduler.config.prediction_type == "v_prediction"
    theirs = UniPCMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    torch.testing.assert_close(scheduler.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    c = import_anchor(anchor, schedule, 6, "epsilon")
    expected = probe(UniPCMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, solver_order=3), 6)
    torch.testing.assert_close(c.mu, expected.mu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ({"class_path": "diffusers.NoScheduler"}, "there is no scheduler 'diffusers.NoScheduler'"),
        ({"class_path": "nowhere.X"}, "there is no scheduler 'nowhere.X'"),
        ({"init_args": {}}, "a scheduler is named by class_path"),
        ({"class_path": "diffusers.DDIMScheduler", "args": {}}, "got class_path, args"),
        ({"class_path": "diffusers.DDIMScheduler", "init_args": {"order": 2}}, "has no argument 'order'; it has num_t"),
        ({"class_path": "diffusers.DDIMScheduler", "init_args": {"beta_schedule": "boo"}}, "could not be made: boo"),
        (
            {"class_path": "diffusers.DDIMScheduler", "init_args": {"beta_schedule": "scaled_linear"}},
            "another noise sch",
        ),
        ({"class_path": "diffusers.DDIMScheduler"}, "clip_sample=True is not linear"),
        ({"class_path": "diffusers.HeunDiscreteScheduler"}, "cannot make 6 network calls"),
        (
            {"class_path": "diffusers.UniPCMultistepScheduler", "init_args": {"prediction_type": "v_prediction"}},
            "is for networks that predict 'v_prediction', the model predicts 'epsilon'",
        ),
        ({"coefficients": {"mu": [[1.0]]}}, re.escape("The numbers of a sampler are ['init_noise_sigma', 'mu'")),
    ],
    ids=name_of,
)
def test_bad_anchors(schedule, anchor, message):
    with pytest.raises(ValueError, match=message):
        import_anchor(anchor, schedule, 6, "epsilon")


@pytest.mark.parametrize(
    ("model", "class_name", "init_args"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        (DDIMScheduler(**ZERO_SNR), "DDIMScheduler", {**NO_CLIP, "rescale_betas_zero_snr": True}),
        (DDIMScheduler(**ZERO_SNR), "EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        (diffusers.EDMEulerScheduler(sigma_max=50.0), "EDMDPMSolverMultistepScheduler", {}),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "EDMEulerScheduler", {}),
    ],
    ids=name_of,
)
def test_an_anchor_by_name_for_models_of_every_kind(model, class_name, init_args):
    schedule = NoiseSchedule.from_scheduler(model)
    anchor = {"class_path": f"diffusers.{class_name}", "init_args": init_args}
    nfe = 5
    sampler = GGDMSampler(schedule, nfe, anchor=anchor, prediction_type=scheduler_prediction_type(model))
    a, std = sampler.coefficients().marginals()
    assert a[-1].item() == pytest.approx(1, abs=1e-3)
    assert std[-1].item() < 0.01


def test_an_option_that_step_does_not_take_is_named():
    with pytest.raises(ValueError, match="UniPCMultistepScheduler has no option eta of `step`; its options are none"):
        probe(UniPCMultistepScheduler(), 5, step={"eta": 1.0})
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no option eta of `step`; its options are s_churn"):
        probe(EulerDiscreteScheduler(), 5, step={"eta": 1.0})


def test_betas_as_an_array():
    betas = np.linspace(1e-4, 0.02, 1000)
    anchors = [DDIMScheduler(trained_betas=each, clip_sample=False) for each in (betas, betas.tolist())]
    one, other = (GGDMSampler.from_scheduler(each, 5).coefficients() for each in anchors)
    assert torch.equal(one.mu, other.mu)
