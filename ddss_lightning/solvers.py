r"""Known solvers as differentiable formulas: the anchors from which a sampler is learned.

A solver with log-SNRs lambda_0 < ... < lambda_{K-1} and lambda_K = infinity (the image) reads

    x_{k+1} = c_k x_k + sum_{j <= k} B_kj x0_hat_j + std_k z_k.

`ggdm_form` turns (c, B) into the GGDM's (mu, nu, past_noise), `solver_form` turns them back.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ddss_lightning.coefficients import Coefficients, without_rounding
from ddss_lightning.schedule import NoiseSchedule

Solver = Literal["ddim", "dpmpp_2m"]
Stride = Literal["linear", "quadratic", "logsnr"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
STRIDES: tuple[Stride, ...] = get_args(Stride)
# What rounding makes of the shares of first and earlier noise in the states of an SDE, at most (25 calls: 7e-4).
MISFIT = 1e-2
# Half log-SNR from which on a predicted noise is good for an image: `lambda_min_clipped` of diffusers' DPM-Solver.
LOWEST_LOGSNR = -5.1


def first_timestep(schedule: NoiseSchedule, prediction_type: str) -> float:
    r"""Where the first network call belongs: the last trained timestep, or, where noise is predicted, an earlier one.

    Its predicted image is (x_t - sigma_t eps) / alpha_t, with the error of eps over alpha_t. Linear betas end at
    lambda = -5.06; cosine ones at -9.9, where alpha is 5e-5 and the rounding of half precision fills the image. There
    the first call is at lambda = -5.1.

    References:
        Lu et al., DPM-Solver, https://github.com/LuChengTHU/dpm-solver, on cosine schedules.
    """
    if prediction_type != "epsilon" or schedule.scaling != "vp" or schedule.table[-1] >= LOWEST_LOGSNR:
        return float(schedule.grid[-1])
    return float(schedule.timestep(schedule.table.new_tensor(LOWEST_LOGSNR)))


def stride_timesteps(schedule: NoiseSchedule, num_steps: int, stride: Stride, first: float | None = None) -> Tensor:
    r"""Real-valued timesteps t_0 > ... > t_{K-1} of the K network calls, starting at `first`.

    With T = `first`, by default the last trained timestep, 0 the first trained one and u = k / K: `linear` is
    T (1 - u), `quadratic` is T (1 - u)^2 (more calls at low noise), `logsnr` spaces the half log-SNR uniformly from
    t = T to t = 0, both included.

    Returns:
        Shape (K,), float64.

    Raises:
        ValueError: an unknown stride, one that the schedule's timesteps do not allow, or `num_steps` outside
            1 ... num_train_timesteps.
    """
    if stride not in STRIDES:
        raise ValueError(f"Unknown stride '{stride}'; choose one of {', '.join(STRIDES)}.")
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise ValueError(
            f"num_steps must be between 1 and the {schedule.num_train_timesteps} steps of the noise schedule, "
            f"got {num_steps}."
        )
    last = float(schedule.grid[-1]) if first is None else first
    if stride == "logsnr":
        ends = schedule.logsnr(schedule.table.new_tensor(last)), schedule.table[0]
        logsnrs = torch.linspace(float(ends[0]), float(ends[1]), num_steps, dtype=torch.float64)
        return schedule.timestep(logsnrs.to(schedule.table.device)).cpu()
    if schedule.grid[0] != 0:
        raise ValueError(
            f"The stride '{stride}' is for timesteps from 0 on, these begin at {float(schedule.grid[0]):.4g}; "
            "use stride='logsnr' or give timesteps."
        )
    remaining = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    return last * remaining ** (1 if stride == "linear" else 2)


def ddim_noise_angles(logsnrs: Tensor, eta: float) -> Tensor:
    r"""Angles theta_k with sin(theta_k) = std_k / sigma_{k+1} of DDIM(eta); eta = 1 is DDPM.

    .. math::
        std_k = \eta \frac{\sigma_{k+1}}{\sigma_k} \sqrt{1 - \frac{\alpha_k^2}{\alpha_{k+1}^2}}
        = \eta \sigma_{k+1} \sqrt{1 - e^{2 (\lambda_k - \lambda_{k+1})}}

    The second form is the same for a variance preserving schedule, and serves every other.

    Args:
        logsnrs: lambda_k, shape (K,).
        eta: at least 0 (deterministic), at most 1.

    Returns:
        Shape (K - 1,): the last step, to the image, adds no noise.

    References:
        Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021, https://arxiv.org/abs/2010.02502, eq. 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), got {eta}.")
    return torch.asin(eta * (-torch.expm1(-2 * logsnrs.diff())).sqrt())


def anchor_formula(
    solver: Solver, schedule: NoiseSchedule, logsnrs: Tensor, noise_angles: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Coefficients of a known solver at given log-SNRs, with noise of a given fraction in every step but the last.

    A noise angle theta_k splits the next marginal: std_k = sigma_{k+1} |sin theta_k| is added, and the solver's
    update aims at the rest, sigma' = sigma_{k+1} cos theta_k, so that the marginal is kept:

    .. math::
        x_{k+1} = \frac{\sigma'}{\sigma_k} x_k + \left(\alpha_{k+1} - \alpha_k \frac{\sigma'}{\sigma_k}\right) D_k
        + std_k z_k

    `ddim`: D_k = x0_hat_k (Song et al. 2021, eq. 12). `dpmpp_2m`: D_k = (1 + 1/(2 r_k)) x0_hat_k - 1/(2 r_k)
    x0_hat_{k-1} with r_k = h_{k-1} / h_k, h_k = lambda_{k+1} - lambda_k (Lu et al., "DPM-Solver++", 2022,
    https://arxiv.org/abs/2211.01095, algorithm 2), first order in the first and the last step.

    Args:
        solver: `ddim` or `dpmpp_2m`.
        schedule: gives alpha and sigma at a half log-SNR.
        logsnrs: lambda_k of the network calls, shape (K,), increasing, float64.
        noise_angles: theta_k in radians, shape (K - 1,).

    Returns:
        mu, shape (K, K); nu, shape (K,); std, shape (K,); past_noise, shape (K, K), see `Coefficients`.
        Differentiable in both tensors.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(
            f"Unknown anchor '{solver}'; choose one of {', '.join(SOLVERS)}, or name a diffusers scheduler by "
            "class_path."
        )
    alpha, sigma = schedule.scales(logsnrs)
    alpha_next, sigma_next = torch.cat([alpha[1:], alpha.new_ones(1)]), torch.cat([sigma[1:], sigma.new_zeros(1)])
    angles = torch.nn.functional.pad(noise_angles, (0, 1))
    state_weight = sigma_next * angles.cos() / sigma
    data_weight = alpha_next - alpha * state_weight
    std, current = sigma_next * magnitude(angles.sin()), torch.diag(state_weight)
    if solver == "ddim" or len(logsnrs) <= 2:
        return current, data_weight, std, torch.zeros_like(current)
    steps = logsnrs.diff()
    extrapolation = torch.nn.functional.pad(steps[1:] / (2 * steps[:-1]), (1, 1))
    past = data_weight * extrapolation
    mu, nu, past_noise = ggdm_form(current, torch.diag(data_weight + past) - torch.diag(past[1:], -1))
    return mu, nu, std, past_noise


def magnitude(x: Tensor) -> Tensor:
    """|x| whose derivative at 0 is 1, not 0: noise that starts at exactly zero can still be learned."""
    return torch.where(x >= 0, x, -x)


def ggdm_form(
    state_weights: Tensor, predictions: Tensor, past_noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Coefficients of the sampler x_{k+1} = sum_{j<=k} (C_kj x_j + B_kj x0_hat_j) + n_k + sum_{j<k} Q_kj n_j.

    That is how solvers are written, with past predictions; n_k is the noise of step k. A GGDM has past predictions as
    combinations of the states: with S the shift x_{k+1} = (S x)_k and B = D + L (diagonal, strictly lower),

    .. math:: \hat x_0 = B^{-1} ((S - C) x - (1 + Q) n), \qquad H = L B^{-1},

    so mu = C + H (S - C), nu = diag(D), and the weights of past noise are Q - H (1 + Q): one triangular solve.

    Args:
        state_weights: C, shape (K, K), lower triangular; in most solvers a diagonal.
        predictions: B, shape (K, K), lower triangular; a prediction that its own step does not use (a zero on the
            diagonal) cannot be used later.
        past_noise: Q, shape (K, K), strictly lower triangular. Default: zeros.

    Returns:
        mu, shape (K, K), lower triangular; nu, shape (K,); past_noise, shape (K, K), strictly lower triangular.
    """
    past = predictions.tril(-1)[:, :-1]
    # Any number will do on the diagonal for a prediction that is not used.
    system = predictions[:-1, :-1] + torch.diag((predictions.diagonal()[:-1] == 0).to(predictions))
    history = torch.linalg.solve_triangular(system, past, upper=False, left=False)
    shifted = torch.nn.functional.pad(history, (1, 0))  # H S
    history = torch.nn.functional.pad(history, (0, 1))
    noise = -history if past_noise is None else past_noise - history - history @ past_noise
    mu = (state_weights + shifted - history @ state_weights).tril()
    return mu, predictions.diagonal(), noise.tril(-1)


def solver_form(coefficients: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    r"""The inverse of `ggdm_form`: C, B and Q of given coefficients.

    Each state is a combination of the first one, of the predictions and of the noises. B and Q are what is left of
    x_{k+1} when its share of the first state and of the noises before is taken off as a multiple of x_k (of the newest
    state with such a share, if x_k has none): C is the diagonal that a solver has, x_{k+1} = c_k x_k + ... . With Q the
    share of the first state decides alone: nothing else could give it. (Without, all do: of the first state next to
    nothing is left in an SDE's last states.) A step without noise does not say how it would go on: Q is then 0, as in a
    solver that sees noise in x_k alone. What is left of rounding is 0.

    Returns:
        C, B and Q, shape (K, K); see `ggdm_form`.
    """
    num_steps = coefficients.num_steps
    identity = torch.eye(num_steps, dtype=torch.float64, device=coefficients.mu.device)
    system = torch.eye(num_steps + 1).to(identity) - torch.nn.functional.pad(coefficients.mu, (0, 1, 1, 0))
    sources = torch.cat([torch.diag(coefficients.nu), identity + coefficients.past_noise], 1)
    parts = torch.block_diag(identity[:1, :1], sources)
    states = torch.linalg.solve_triangular(system, parts, upper=False, unitriangular=True)
    # Of the first noise, then of those of the steps, in the size in which they are there.
    share = torch.cat([states[:, :1] * coefficients.prior[1], states[:, num_steps + 1 :] * coefficients.std], 1)
    sizes = share.norm(dim=1)
    state_weights = torch.zeros_like(identity)
    newest = 0
    for k in range(num_steps):
        if sizes[k] > 1e-10 * sizes.max():
            newest = k
        before, after = share[newest, : k + 1], share[k + 1, : k + 1]
        c = after @ before / before.square().sum()
        if (after - c * before).norm() > MISFIT * sizes[k + 1] and before[0] != 0:
            c = after[0] / before[0]
        state_weights[k, newest] = c
    rest = states[1:, 1:] - state_weights @ states[:-1, 1:]
    predictions, noise = rest.split(num_steps, 1)
    noise = (noise * (coefficients.std != 0)).tril(-1)
    return (
        state_weights,
        without_rounding(predictions.tril(), predictions.abs().amax(1, keepdim=True)),
        without_rounding(noise),
    )
