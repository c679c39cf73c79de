import dataclasses

import pytest
import torch

from ddss_lightning.coefficients import Coefficients, marginals


def random_numbers(num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu = (torch.randn(num_steps, num_steps, dtype=torch.float64, generator=generator) / num_steps).tril()
    nu = torch.randn(num_steps, dtype=torch.float64, generator=generator)
    std = torch.rand(num_steps, dtype=torch.float64, generator=generator)
    prior = torch.tensor([0.3, 0.8], dtype=torch.float64)
    return mu, nu, std, prior


def papers_recursion(mu, nu, std, prior):
    """Theorem 1 as the paper writes it, with its indices: t = T, ..., 0 and mu_tu for u in {0*, t+1, ..., T}.

    The image as a *condition* (the paper's x_0 in S_t) is written u = "x0"; the state index 0 is the last state.
    """
    T = len(nu)
    states = range(T + 1)
    state_of = {t: T - t for t in states}  # paper's t -> our k
    m = {t: {} for t in states}
    n, s = {}, {}
    for t in states:
        k = state_of[t]
        n[t], s[t] = (prior[0], prior[1]) if k == 0 else (nu[k - 1], std[k - 1])
        for u in range(t + 1, T + 1):
            m[t][u] = mu[k - 1, state_of[u]]
    a_out, v_out = {}, {}
    for t in states:
        weights = {u: m[t][u] for u in range(t + 1, T + 1)}
        a0, v = n[t], s[t] ** 2
        for i in range(1, T - t + 1):
            pivot = weights[t + i]
            v = v + (pivot * s[t + i]) ** 2
            a0 = pivot * n[t + i] + a0
            for u in range(t + i + 1, T + 1):
                weights[u] = pivot * m[t + i][u] + weights[u]
        a_out[state_of[t]], v_out[state_of[t]] = a0, v
    return torch.stack([a_out[k] for k in states]), torch.stack([v_out[k] for k in states])


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
def test_triangular_solve_is_the_papers_recursion(num_steps):
    numbers = random_numbers(num_steps, seed=num_steps)
    mu, nu, std, prior = numbers
    a, std = marginals(mu, nu, torch.diag(std), prior)
    expected_a, expected_v = papers_recursion(*numbers)
    torch.testing.assert_close(a, expected_a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std**2, expected_v, rtol=1e-12, atol=1e-12)


def test_triangular_solve_is_monte_carlo():
    mu, nu, std, prior = random_numbers(4, seed=3)
    weights = torch.diag(std) + torch.randn(4, 4, dtype=torch.float64).tril(-1)
    num, x_0 = 400_000, 0.7
    noise = torch.randn(5, num, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = [prior[0] * x_0 + prior[1] * noise[0]]
    for k in range(4):
        mean = sum(mu[k, j] * states[j] for j in range(k + 1)) + nu[k] * x_0
        states.append(mean + weights[k] @ noise[1:])
    a, marginal_std = marginals(mu, nu, weights, prior)
    drawn = torch.stack(states)
    # Within five standard errors of the mean and of the standard deviation.
    assert ((drawn.mean(1) - a * x_0).abs() < 5 * marginal_std / num**0.5).all()
    assert ((drawn.std(1) - marginal_std).abs() < 5 * marginal_std / (2 * num) ** 0.5).all()


def test_marginals_are_differentiable():
    mu, nu, std, prior = random_numbers(3, seed=5)
    numbers = [value.detach().requires_grad_() for value in (mu, nu, torch.diag(std), prior)]
    assert torch.autograd.gradcheck(marginals, numbers)


def test_validation_names_what_is_wrong():
    mu, nu, std, prior = random_numbers(3)
    pred, timesteps = torch.ones(3, 2), torch.tensor([900.0, 500, 100])
    std[-1] = 0
    good = Coefficients(mu, nu, std, pred, timesteps, prior)
    assert good.validate() is good
    for change, message in [
        ({"pred": torch.ones(2, 2)}, r"pred must have shape \(3, 2\)"),
        ({"nu": nu * torch.nan}, "nu holds numbers that are not finite"),
        ({"mu": torch.ones(3, 3)}, "lower triangular"),
        ({"past_noise": torch.eye(3)}, "strictly lower triangular"),
        ({"std": -std}, "at least 0"),
        ({"std": std + 1}, "The last step makes the image and adds no noise"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **change).validate()
