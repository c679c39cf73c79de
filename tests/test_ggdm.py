import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, UniPCMultistepScheduler
from safetensors.torch import load, load_file, save, save_file

from ddss_lightning.coefficients import prediction_pair
from ddss_lightning.ggdm import DEGREES, GGDMSampler
from ddss_lightning.saved import read_card
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.solvers import stride_timesteps


def move(sampler, scale=0.1):
    generator = torch.Generator().manual_seed(0)
    for value in sampler.corrections.values():
        value.data = scale * torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return sampler


def test_degrees_of_freedom_are_the_papers_counts(schedule):
    sampler = GGDMSampler(schedule, 7, learn=DEGREES)
    sizes = {name: value.numel() for name, value in sampler.corrections.items()}
    assert sizes == {"mu": 28, "nu": 7, "std": 6, "pred": 14, "time": 6, "logsnr": 6}
    assert dict(GGDMSampler(schedule, 7, learn=("std", "mu")).named_parameters()).keys() == {
        "corrections.mu",
        "corrections.std",
    }


@pytest.mark.parametrize("anchor", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_both_parametrisations_start_at_the_anchor(schedule, anchor, eta):
    plain = GGDMSampler(schedule, 5, anchor=anchor, eta=eta, learn=()).coefficients()
    free = [name for name in DEGREES if name != "logsnr"]
    others = [
        GGDMSampler(schedule, 5, anchor=anchor, eta=eta, learn=DEGREES),
        GGDMSampler(schedule, 5, anchor=anchor, eta=eta, learn=free, parametrization="ggdm"),
    ]
    for other in others:
        c = other.coefficients()
        for name in set(vars(plain)) - {"past_noise"}:
            torch.testing.assert_close(getattr(c, name), getattr(plain, name), rtol=0, atol=0)
        torch.testing.assert_close(c.noise_weights(), plain.noise_weights(), rtol=0, atol=0)


def test_free_noise_is_the_paper_s_however_the_solver_is_given(schedule):
    """The formula of DPM-Solver++ 2M knows how to take noise out; a free sampler that learns noise must not."""
    options = {"learn": ("mu", "nu", "std", "time"), "parametrization": "ggdm"}
    formula = GGDMSampler(schedule, 5, anchor="dpmpp_2m", **options)
    numbers = GGDMSampler.from_coefficients(schedule, formula.coefficients().detach(), **options)
    for sampler in (formula, numbers):
        sampler.corrections["std"].data += 0.1
        assert not sampler.coefficients().noise_weights().tril(-1).any()


def test_free_ggdm_takes_the_pair_from_theorem_1(schedule):
    """With mu, nu, std moved, x0_hat = (x - v^(1/2) eps) / a at every state."""
    sampler = move(GGDMSampler(schedule, 5, anchor="ddim", learn=("mu", "nu", "std"), parametrization="ggdm"))
    c = sampler.coefficients()
    a, std = c.marginals()
    torch.testing.assert_close(c.pred, torch.stack([1 / a[:-1], -std[:-1] / a[:-1]], 1))
    assert (c.std[:-1] > 0).all()


def test_pred_adds_no_expressiveness_to_mu_and_nu(mixture):
    """Moving the pair is moving mu_kk and nu_k: the two samplers make the same images."""
    learned = move(GGDMSampler(mixture.schedule, 4, learn=("pred",)))
    c, start = learned.coefficients(), GGDMSampler(mixture.schedule, 4, learn=()).coefficients()
    other = GGDMSampler(mixture.schedule, 4, learn=("mu", "nu"))
    nu = c.nu * c.pred[:, 1] / start.pred[:, 1]
    diagonal = c.nu * c.pred[:, 0] - nu * start.pred[:, 0]
    rows, columns = torch.tril_indices(4, 4)
    other.corrections["nu"].data = (nu - start.nu).detach()
    other.corrections["mu"].data[rows == columns] = diagonal.detach()
    x_T = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(other(mixture, x_T), learned(mixture, x_T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_prediction_pairs_recover_the_image(kind):
    x_0, eps, alpha, sigma = (torch.tensor([v], dtype=torch.float64) for v in (0.3, -1.1, 0.6, 0.8))
    output = {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0}[kind]
    pair = prediction_pair(kind, alpha, sigma)[0]
    torch.testing.assert_close(pair[0] * (alpha * x_0 + sigma * eps) + pair[1] * output, x_0)


def test_times_stay_monotone_whatever_is_learned(schedule):
    sampler = move(GGDMSampler(schedule, 12, learn=DEGREES), scale=5.0)
    assert (sampler.logsnrs().diff() > 0).all()
    times = sampler.timesteps()
    assert (times.diff() <= 0).all()
    assert times.min() >= 0
    assert times.max() <= 999


@pytest.mark.parametrize("parametrization", ["anchored", "ggdm"])
def test_save_and_load_are_exact(tmp_path, mixture, parametrization):
    learn = [name for name in DEGREES if parametrization == "anchored" or name != "logsnr"]
    sampler = move(GGDMSampler(mixture.schedule, 5, anchor="ddim", learn=learn, parametrization=parametrization))
    sampler.save_pretrained(tmp_path / "s", {"name": "oracle", "fingerprint": "12"}, {"fid": 1.5})
    again = GGDMSampler.from_pretrained(tmp_path / "s")
    assert again.config == sampler.config
    for name, value in vars(again.coefficients()).items():
        assert torch.equal(value, getattr(sampler.coefficients(), name)), name
    card = read_card(tmp_path / "s")
    assert card["nfe"] == 5
    assert card["base_model"]["name"] == "oracle"
    assert card["scores"] == {"fid": 1.5}
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["sampler.json", "sampler.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_nothing_is_overwritten_by_chance(tmp_path, schedule):
    GGDMSampler(schedule, 3).save_pretrained(tmp_path)
    before = (tmp_path / "sampler.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a sampler"):
        GGDMSampler(schedule, 4).save_pretrained(tmp_path)
    assert (tmp_path / "sampler.json").read_bytes() == before
    GGDMSampler(schedule, 4).save_pretrained(tmp_path, overwrite=True)
    assert GGDMSampler.from_pretrained(tmp_path).num_steps == 4


def test_a_sampler_that_is_not_finite_is_not_saved(tmp_path, schedule):
    sampler = GGDMSampler(schedule, 3)
    sampler.corrections["mu"].data[0] = torch.nan
    with pytest.raises(ValueError, match="mu holds numbers that are not finite"):
        sampler.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_noisy_sampler_of_format_1_stays_what_it_was(tmp_path, schedule):
    """Its past predictions saw the noise again; with the formula of today the same numbers are another sampler."""
    sampler = GGDMSampler(schedule, 4, anchor="dpmpp_2m", eta=0.3)
    sampler.save_pretrained(tmp_path)
    numbers = load_file(tmp_path / "sampler.safetensors")
    del numbers["coefficients.past_noise"]
    save_file(numbers, tmp_path / "sampler.safetensors")
    card = json.loads((tmp_path / "sampler.json").read_text())
    del card["weights_sha256"]
    (tmp_path / "sampler.json").write_text(json.dumps({**card, "format_version": 1}))
    loaded = GGDMSampler.from_pretrained(tmp_path)
    assert "anchor: learned from dpmpp_2m, eta 0.3, linear stride\n" in str(loaded)
    old = loaded.coefficients()
    assert sampler.coefficients().past_noise.any()
    assert not old.past_noise.any()
    for name in ("mu", "nu", "std", "timesteps"):
        torch.testing.assert_close(getattr(old, name), getattr(sampler.coefficients(), name), rtol=0, atol=0)
    quiet = GGDMSampler(schedule, 4, anchor="dpmpp_2m")
    quiet.save_pretrained(tmp_path, overwrite=True)
    card = json.loads((tmp_path / "sampler.json").read_text())
    (tmp_path / "sampler.json").write_text(json.dumps({**card, "format_version": 1}))
    assert GGDMSampler.from_pretrained(tmp_path).config == quiet.config


def test_damaged_folders(tmp_path, schedule):
    with pytest.raises(ValueError, match=r"neither 'sampler.json' nor"):
        GGDMSampler.from_pretrained(tmp_path)
    GGDMSampler(schedule, 3).save_pretrained(tmp_path)
    (tmp_path / "sampler.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        GGDMSampler.from_pretrained(tmp_path)
    card = json.loads((tmp_path / "sampler.json").read_text())
    (tmp_path / "sampler.json").write_text(json.dumps({**card, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        GGDMSampler.from_pretrained(tmp_path)
    (tmp_path / "sampler.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        GGDMSampler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be between 1 and the 1000 steps of the noise schedule, got 0"),
        ({"num_steps": 1001}, "got 1001"),
        ({"num_steps": 2.5}, "num_steps must be a whole number, got 2.5"),
        ({"num_steps": "3"}, "num_steps must be a whole number, got '3'"),
        (
            {"anchor": UniPCMultistepScheduler()},
            r"to start from a UniPCMultistepScheduler use GGDMSampler.from_scheduler\(scheduler",
        ),
        ({"anchor": "heun"}, "Unknown anchor 'heun'"),
        ({"learn": ("mu", "sigma")}, "learn: 'sigma' does not exist in the anchored parametrisation"),
        ({"learn": "mu"}, r"learn must be a list of names, such as \['mu'\], got 'mu'"),
        (
            {"schedule": DDIMScheduler()},
            r"schedule must be a NoiseSchedule, got DDIMScheduler; use NoiseSchedule\.from",
        ),
        ({"schedule": torch.rand(9)}, "schedule must be a NoiseSchedule, got Tensor"),
        ({"learn": ("logsnr",), "parametrization": "ggdm"}, "'logsnr' does not exist in the ggdm"),
        ({"parametrization": "free"}, "Unknown parametrization 'free'"),
        ({"timesteps": [10, 20, 5, 1, 0]}, "timesteps must be 5 strictly decreasing numbers"),
        ({"timesteps": [900, 500, float("nan"), 1, 0]}, "timesteps must be 5 strictly decreasing numbers"),
        ({"timesteps": [10, 5]}, "timesteps must be 5"),
        ({"prediction_type": "score"}, "Unknown prediction_type 'score'"),
        ({"eta": -1.0}, "eta must be between"),
    ],
)
def test_bad_arguments(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        GGDMSampler(**{"schedule": schedule, "num_steps": 5, **options})


@pytest.mark.parametrize("learn", [DEGREES, ()])
def test_samples_without_a_gradient_are_those_of_the_present_numbers(mixture, learn, monkeypatch):
    """However these were changed; the coefficients are not computed again for the same ones."""
    sampler, computed = GGDMSampler(mixture.schedule, 4, learn=learn), []
    coefficients = GGDMSampler.coefficients
    monkeypatch.setattr(GGDMSampler, "coefficients", lambda self: computed.append(1) or coefficients(self))
    x_T, noise = torch.randn(2, 1, 2, 2).double(), torch.randn(3, 2, 1, 2, 2).double()

    def images(sampler):
        with torch.no_grad():
            return sampler(mixture, x_T, noise=noise)

    def step():
        sampler(mixture, x_T, noise=noise).square().sum().backward()
        torch.optim.SGD(sampler.parameters(), 1e-4).step()

    other = move(GGDMSampler(mixture.schedule, 4, learn=learn), scale=0.05)
    changes = [lambda: move(sampler), step, lambda: sampler.load_state_dict(other.state_dict())] if learn else []
    found = [images(sampler)]
    for change in changes:
        change()
        found.append(images(sampler))
        count = len(computed)
        assert torch.equal(images(sampler), found[-1])
        assert torch.equal(images(copy.deepcopy(sampler).float()), found[-1])
        assert len(computed) == count
        fresh = GGDMSampler(mixture.schedule, 4, learn=learn)
        fresh.load_state_dict(sampler.state_dict())
        assert torch.equal(images(fresh), found[-1])
        assert not any(torch.equal(found[-1], before) for before in found[:-1])
    assert torch.equal(images(sampler.to("cpu")), found[-1])


def test_another_prediction_type_is_refused(denoiser):
    sampler = GGDMSampler(denoiser.schedule, 3, prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'epsilon', the sampler was made for 'sample'"):
        sampler(denoiser, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_a_model_of_another_schedule_is_refused(denoiser, beta_schedule):
    """Its images would be noise; a plain function is taken as it is."""
    sampler = GGDMSampler(NoiseSchedule.from_scheduler(DDPMScheduler(beta_schedule=beta_schedule)), 3)
    x_T = torch.zeros(1, 1, 8, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"another noise schedule than that of '{denoiser.name}'"):
            sampler(denoiser, x_T)
    sampler(lambda x, t: denoiser(x, t), x_T)


def test_one_step_sampler_works(mixture):
    x_T = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    sampler = GGDMSampler(mixture.schedule, 1, learn=DEGREES)
    alpha, sigma = mixture.schedule.alpha_sigma(torch.tensor(999.0))
    expected = (x_T - sigma * mixture(x_T, torch.full((2,), 999.0))) / alpha
    torch.testing.assert_close(sampler(mixture, x_T), expected)


def test_one_step_has_no_noise_and_no_gaps_to_learn(tmp_path, mixture):
    """Degrees without numbers are no parameters; files of earlier versions, which hold them, are still read."""
    sampler = move(GGDMSampler(mixture.schedule, 1, learn=DEGREES))
    assert {name: value.numel() for name, value in sampler.named_parameters()} == {
        "corrections.mu": 1, "corrections.nu": 1, "corrections.pred": 2
    }  # fmt: skip
    sampler.save_pretrained(tmp_path)
    numbers = load((tmp_path / "sampler.safetensors").read_bytes())
    empty = {f"learned.{name}": torch.zeros(0, dtype=torch.float64) for name in ("std", "time", "logsnr")}
    for old in (numbers, numbers | empty):
        (tmp_path / "sampler.safetensors").write_bytes(save(old))
        card = json.loads((tmp_path / "sampler.json").read_text())
        (tmp_path / "sampler.json").write_text(json.dumps({**card, "weights_sha256": None}))
        again = GGDMSampler.from_pretrained(tmp_path)
        assert again.config == sampler.config
        for name, value in vars(again.coefficients()).items():
            assert torch.equal(value, getattr(sampler.coefficients(), name)), name


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.3])
def test_the_pair_of_karras_at_any_scale(kind, scale):
    """x_0 = c_skip x + c_out F(c_in x) for x = x_0 + sigma eps, where the state is c_in x times any scale."""
    x_0, eps, sigma, data = (torch.tensor([v], dtype=torch.float64) for v in (0.3, -1.1, 2.0, 0.5))
    c_in = (sigma**2 + data**2).rsqrt()
    c_skip, c_out = data**2 * c_in**2, sigma * data * c_in * (1 if kind == "epsilon" else -1)
    x = x_0 + sigma * eps
    pair = prediction_pair(f"edm_{kind}", scale * c_in, scale * c_in * sigma, sigma_data=0.5)[0]
    torch.testing.assert_close(pair[0] * scale * c_in * x + pair[1] * (x_0 - c_skip * x) / c_out, x_0)


@pytest.mark.parametrize("num_steps", [5, 20])
def test_a_free_sampler_of_an_edm_model_bears_a_step(num_steps):
    """Its first states have a signal of a hundredth: a pair from 1 - sigma^2 would be the root of a negative number."""
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    sampler = GGDMSampler(
        schedule, num_steps, anchor="ddim", stride="logsnr", parametrization="ggdm", prediction_type="edm_epsilon"
    )
    start = sampler.coefficients().pred
    sampler.corrections["mu"].data += 6e-3
    pred = sampler.coefficients().validate().pred
    torch.testing.assert_close(pred[:2], start[:2], rtol=0.5, atol=0)


@pytest.mark.parametrize(
    ("content", "problem"), [("[]", "is no JSON object"), ("{", "Expecting"), ({}, "'base_model'")]
)
def test_a_damaged_card_is_told(tmp_path, schedule, content, problem):
    GGDMSampler(schedule, 2).save_pretrained(tmp_path)
    card = json.loads((tmp_path / "sampler.json").read_text())
    del card["base_model"]
    (tmp_path / "sampler.json").write_text(content or json.dumps(card))
    with pytest.raises(ValueError, match=f"The card '.*sampler.json' is damaged: .*{problem}"):
        read_card(tmp_path)


def test_a_saved_sampler_with_nan_is_named(tmp_path, schedule):
    sampler = GGDMSampler(schedule, 3)
    sampler.save_pretrained(tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "sampler.safetensors")
    tensors["learned.mu"][0] = float("nan")
    save_file(tensors, tmp_path / "s" / "sampler.safetensors")
    card = json.loads((tmp_path / "s" / "sampler.json").read_text())
    del card["weights_sha256"]
    (tmp_path / "s" / "sampler.json").write_text(json.dumps(card))
    with pytest.raises(
        ValueError, match=r"The sampler in '.*s' is damaged: mu holds numbers that are not finite, 1 of 9\."
    ):
        GGDMSampler.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("stride", ["linear", "logsnr"])
def test_saved_samplers_from_before_strides_began_earlier_stay_what_they_were(tmp_path, stride):
    cosine = NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"))
    timesteps = stride_timesteps(cosine, 4, stride).tolist()
    before = GGDMSampler(cosine, 4, timesteps=timesteps, stride=stride)
    with torch.no_grad():
        before.corrections["mu"] += 0.01
    before.save_pretrained(tmp_path)
    path = tmp_path / "sampler.json"
    card = json.loads(path.read_text())
    card["config"]["timesteps"] = None
    path.write_text(json.dumps(card))
    again = GGDMSampler.from_pretrained(tmp_path)
    assert torch.equal(again.coefficients().mu, before.coefficients().mu)
    assert again.timesteps()[0] == 999


def test_a_generator_for_each_image(schedule):
    """As diffusers' pipelines take them: each image is that of its generator alone."""
    sampler, x_T = GGDMSampler(schedule, 3, anchor="ddim", eta=1.0), torch.ones(2, 1, 3, 3)

    def images(x, generator):
        with torch.no_grad():
            return sampler(lambda x, _: 0.1 * x.tanh(), x, generator=generator)

    both = images(x_T, [torch.Generator().manual_seed(seed) for seed in (3, 5)])
    for seed, image in zip((3, 5), both.split(1), strict=True):
        assert torch.equal(images(x_T[:1], torch.Generator().manual_seed(seed)), image)
    with pytest.raises(ValueError, match=r"1 generators were given for 2 images; give one, or one for each\."):
        images(x_T, [torch.Generator()])


def test_noise_that_is_being_learned_has_a_slope_at_zero(schedule):
    """A loop of one's own draws none itself: its `std` stayed at 0 for ever."""
    sampler, x_T = GGDMSampler(schedule, 4, learn=("std",)), torch.ones(2, 1, 3, 3)
    (slope,) = torch.autograd.grad(
        sampler(lambda x, _: 0.1 * x.tanh(), x_T, generator=torch.manual_seed(0)).square().sum(),
        [sampler.corrections["std"]],
    )
    assert (slope != 0).all()
    state = torch.manual_seed(0).get_state()
    with torch.no_grad():
        sampler(lambda x, _: 0.1 * x.tanh(), x_T, generator=(unused := torch.manual_seed(0)))
    assert torch.equal(unused.get_state(), state)
