import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ddss_lightning.coefficients import Coefficients, marginals, without_rounding
from ddss_lightning.denoisers import MixtureDenoiser
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.solvers import (
    STRIDES,
    anchor_formula,
    ddim_noise_angles,
    first_timestep,
    ggdm_form,
    solver_form,
    stride_timesteps,
)


def their_images(scheduler, denoiser, x_T, num_steps, noise=None, eta=0.0):
    scheduler.set_timesteps(num_steps)
    x = x_T
    for k, t in enumerate(scheduler.timesteps):
        extra = {} if noise is None else {"eta": eta, "variance_noise": noise[k]}
        x = scheduler.step(denoiser(x, t.expand(len(x))), t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [5, 10, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_untrained_ddim_is_diffusers_ddim_on_the_shipped_model(denoiser, num_steps, spacing):
    scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing=spacing)
    x_T = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = their_images(scheduler, denoiser, x_T, num_steps)
        sampler = GGDMSampler(denoiser.schedule, num_steps, anchor="ddim", timesteps=scheduler.timesteps.tolist())
        torch.testing.assert_close(sampler(denoiser, x_T), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [2, 5, 10, 20])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_untrained_2m_is_diffusers_dpm_solver_on_the_shipped_model(denoiser, num_steps, spacing):
    scheduler = DPMSolverMultistepScheduler(
        1000, timestep_spacing=spacing, solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    x_T = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = their_images(scheduler, denoiser, x_T, num_steps)
        sampler = GGDMSampler(denoiser.schedule, num_steps, anchor="dpmpp_2m", timesteps=scheduler.timesteps.tolist())
        torch.testing.assert_close(sampler(denoiser, x_T), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_untrained_noisy_ddim_is_diffusers_ddim_with_eta(denoiser, eta):
    scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing="leading")
    generator = torch.Generator().manual_seed(0)
    x_T, noise = (torch.randn(*n, 16, 1, 8, 8, generator=generator) for n in ((), (5,)))
    # In its last step, to the image, diffusers' variance is 0 too.
    with torch.no_grad():
        expected = their_images(scheduler, denoiser, x_T, 5, noise, eta)
        timesteps = scheduler.timesteps.tolist()
        sampler = GGDMSampler(denoiser.schedule, 5, anchor="ddim", eta=eta, timesteps=timesteps)
        images = sampler(denoiser, x_T, noise=noise[:-1])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("anchor", ["ddim", "dpmpp_2m"])
def test_anchors_keep_the_marginals_of_the_schedule(schedule, anchor):
    """Theorem 1 of a consistent solver: a_k = alpha_k, v_k = sigma_k^2 at every state, and the image is (1, 0)."""
    logsnrs = schedule.logsnr(stride_timesteps(schedule, 6, "quadratic"))
    alpha, sigma = schedule.scales(logsnrs)
    angles = torch.linspace(-0.5, 1.2, 5).double()
    mu, nu, std, past_noise = anchor_formula(anchor, schedule, logsnrs, angles)
    a, marginal_std = marginals(mu, nu, (torch.eye(6) + past_noise) * std, torch.stack([alpha[0], sigma[0]]))
    torch.testing.assert_close(a, torch.nn.functional.pad(alpha, (0, 1), value=1.0), rtol=0, atol=1e-10)
    torch.testing.assert_close(marginal_std, torch.nn.functional.pad(sigma, (0, 1)), rtol=0, atol=1e-10)


def solver(num_steps=6):
    """C, B, Q and std of a solver with a history of predictions and noise in every step but the last."""
    generator = torch.Generator().manual_seed(0)
    current = torch.diag(torch.rand(num_steps, dtype=torch.float64, generator=generator))
    predictions = torch.randn(num_steps, num_steps, dtype=torch.float64, generator=generator).tril()
    past_noise = torch.randn(num_steps, num_steps, dtype=torch.float64, generator=generator).tril(-1)
    std = torch.rand(num_steps, dtype=torch.float64, generator=generator) + 0.1
    std[-1] = 0
    return current, predictions + 2 * torch.eye(num_steps), past_noise, std


@pytest.mark.parametrize("own_noise", [True, False])
def test_ggdm_form_is_the_solver_with_a_history_of_predictions(own_noise):
    current, predictions, past_noise, std = solver()
    num_steps = len(std)
    past_noise = None if own_noise else past_noise
    mu, nu, past = ggdm_form(current, predictions, past_noise)
    added = std * torch.randn(num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.eye(num_steps, dtype=torch.float64) + (0 if past_noise is None else past_noise)
    x = y = torch.tensor(0.5, dtype=torch.float64)
    states, guesses = [y], []
    for k in range(num_steps):
        guesses.append(torch.sin(3 * x + k))
        x = current[k, k] * x + sum(predictions[k, j] * guesses[j] for j in range(k + 1)) + weights[k] @ added
        y = sum(mu[k, j] * states[j] for j in range(k + 1)) + nu[k] * torch.sin(3 * states[k] + k)
        y = y + added[k] + past[k] @ added
        states.append(y)
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


def test_solver_form_is_the_inverse_of_ggdm_form():
    current, predictions, past_noise, std = solver()
    prior = torch.tensor([0.1, 1.0], dtype=torch.float64)
    pred, timesteps = torch.ones(6, 2).double(), torch.arange(6).flip(0).double()

    def sampler(std, past_noise=None):
        mu, nu, past = ggdm_form(current, predictions, past_noise)
        return Coefficients(mu, nu, std, pred, timesteps, prior, past_noise=past)

    # With noise, and without, where the first noise alone says what C is.
    for found in (solver_form(sampler(std)), solver_form(sampler(0 * std))):
        torch.testing.assert_close(found[0], current, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found[1], predictions, rtol=1e-8, atol=1e-8)
        assert not found[2].any()
    # Noise that goes on otherwise.
    past_noise[:, -1] = 0
    for ours, theirs in zip(solver_form(sampler(std, past_noise)), (current, predictions, past_noise), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_what_rounding_leaves_of_imported_numbers_is_no_weight():
    weights = torch.tensor([[80.0, 0.0], [2e-6, 0.5]], dtype=torch.float64)
    assert without_rounding(weights).tolist() == [[80.0, 0.0], [2e-6, 0.5]]
    assert without_rounding(weights, torch.tensor([[80.0], [3.0]])).tolist() == [[80.0, 0.0], [0.0, 0.5]]


def test_a_prediction_that_is_never_used_needs_no_weight():
    """nu_1 = 0: a division by it made mu NaN."""
    current, predictions, _, _ = solver()
    predictions[:, 1] = 0
    mu, nu, past = ggdm_form(current, predictions)
    assert nu[1] == 0
    assert mu.isfinite().all()
    assert past.isfinite().all()
    assert not past[:, 1].any()


def test_2m_converges_at_second_order(schedule):
    """One Gaussian: the exact flow is known, x_0 = mean + s (x_T - alpha_T mean) / sqrt(alpha_T^2 s^2 + sigma_T^2)."""
    from ddss_lightning.denoisers import MixtureDenoiser

    mean, s = 0.4, 0.3
    oracle = MixtureDenoiser(torch.full((1, 1, 1, 1), mean, dtype=torch.float64), s, schedule)
    x_T = torch.tensor([1.3], dtype=torch.float64).reshape(1, 1, 1, 1)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(999.0))
    exact = mean + s * (x_T - alpha * mean) / (alpha**2 * s**2 + sigma**2).sqrt()

    def error(anchor, num_steps):
        return (GGDMSampler(schedule, num_steps, anchor=anchor, stride="logsnr")(oracle, x_T) - exact).abs().item()

    assert 1.7 < error("ddim", 40) / error("ddim", 80) < 2.3
    assert error("dpmpp_2m", 40) / error("dpmpp_2m", 80) > 3.3


def test_noise_angle_at_zero_can_be_learned(schedule):
    logsnrs = schedule.logsnr(stride_timesteps(schedule, 3, "linear"))
    angles = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    std = anchor_formula("ddim", schedule, logsnrs, angles)[2]
    std.sum().backward()
    assert (std == 0).all()
    torch.testing.assert_close(angles.grad, schedule.scales(logsnrs)[1][1:])


def test_strides(schedule):
    for stride in STRIDES:
        t = stride_timesteps(schedule, 7, stride)
        assert t[0] == 999
        assert (t.diff() < 0).all()
    assert schedule.logsnr(stride_timesteps(schedule, 7, "logsnr")).diff().std() < 1e-9
    assert stride_timesteps(schedule, 2, "quadratic").tolist() == [999, 999 / 4]


@pytest.fixture
def cosine():
    return NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"))


def test_where_noise_is_predicted_no_call_is_made_at_hardly_any_signal(schedule, cosine):
    assert first_timestep(schedule, "epsilon") == 999
    assert first_timestep(cosine, "v_prediction") == 999
    for stride in STRIDES:
        sampler = GGDMSampler(cosine, 6, stride=stride)
        assert sampler.logsnrs()[0].item() == pytest.approx(-5.1)
        assert sampler.config["timesteps"] == pytest.approx(sampler.timesteps().tolist())
        assert GGDMSampler(cosine, 6, stride=stride, prediction_type="v_prediction").timesteps()[0] == 999
        assert GGDMSampler(schedule, 6, stride=stride).config["timesteps"] is None
    unipc = {"class_path": "diffusers.UniPCMultistepScheduler", "set_timesteps": {"timesteps": "quadratic"}}
    assert GGDMSampler(cosine, 6, anchor=unipc).timesteps()[0] == round(first_timestep(cosine, "epsilon"))


@pytest.mark.parametrize("stride", ["linear", "quadratic"])
def test_an_error_of_the_network_does_not_fill_the_image(cosine, stride):
    """At the last timestep of cosine betas alpha is 5e-5, and the predicted image has 20,000 times the error."""
    means = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    exact = MixtureDenoiser(means, 0.0, cosine)
    x_T = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @torch.no_grad()
    def difference(**options):
        sampler = GGDMSampler(cosine, 10, **options)
        return (sampler(lambda x, t: 1.01 * exact(x, t), x_T) - sampler(exact, x_T)).abs().mean()

    last = stride_timesteps(cosine, 10, stride).tolist()
    assert difference(stride=stride) < 0.2
    assert difference(timesteps=last) > 0.7


def test_bad_arguments(schedule):
    with pytest.raises(ValueError, match="num_steps must be between 1 and the 1000 steps"):
        stride_timesteps(schedule, 0, "linear")
    with pytest.raises(ValueError, match="Unknown stride 'cubic'; choose one of linear"):
        stride_timesteps(schedule, 5, "cubic")
    with pytest.raises(ValueError, match="Unknown anchor 'heun'; choose one of ddim, dpmpp_2m"):
        anchor_formula("heun", schedule, torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="eta must be between 0"):
        ddim_noise_angles(torch.zeros(2), 1.5)
