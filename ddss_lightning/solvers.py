r"""Known solvers as differentiable formulas: the anchors from which a sampler is learned.

A solver with log-SNRs lambda_0 < ... < lambda_{K-1} and lambda_K = infinity (the image) reads

    x_{k+1} = c_k x_k + sum_{j <= k} B_kj x0_hat_j + std_k z_k.

`ggdm_form` turns (c, B) into the GGDM's (mu, nu).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ddss_lightning.schedule import NoiseSchedule

Solver = Literal["ddim", "dpmpp_2m"]
Stride = Literal["linear", "quadratic", "logsnr"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
STRIDES: tuple[Stride, ...] = get_args(Stride)


def stride_timesteps(schedule: NoiseSchedule, num_steps: int, stride: Stride) -> Tensor:
    r"""Real-valued timesteps t_0 > ... > t_{K-1} of the K network calls, starting at the last trained timestep.

    With T the last trained timestep, 0 the first and u = k / K: `linear` is T (1 - u), `quadratic` is T (1 - u)^2
    (more calls at low noise), `logsnr` spaces the half log-SNR uniformly from t = T to t = 0, both included.

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
    if stride == "logsnr":
        ends = schedule.table[-1], schedule.table[0]
        logsnrs = torch.linspace(float(ends[0]), float(ends[1]), num_steps, dtype=torch.float64)
        return schedule.timestep(logsnrs.to(schedule.table.device)).cpu()
    if schedule.grid[0] != 0:
        raise ValueError(
            f"The stride '{stride}' is for timesteps from 0 on, these begin at {float(schedule.grid[0]):.4g}; "
            "use stride='logsnr' or give timesteps."
        )
    remaining = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    return schedule.grid[-1].cpu() * remaining ** (1 if stride == "linear" else 2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Coefficients of a known solver at given log-SNRs, with noise of a given fraction in every step but the last.

    A noise angle theta_k splits the next marginal: std_k = sigma_{k+1} |sin theta_k| is added, and the solver's
    update aims at the rest, sigma' = sigma_{k+1} cos theta_k, so that the marginal is kept (exactly by `ddim`; by
    `dpmpp_2m` without noise, see `ggdm_form`):

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
        mu, shape (K, K); nu, shape (K,); std, shape (K,). Differentiable in both tensors.

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
    # |theta| whose derivative at 0 is 1, not 0: noise that starts at exactly zero can still be learned.
    angles = torch.where(angles >= 0, angles, -angles)
    state_weight = sigma_next * angles.cos() / sigma
    data_weight = alpha_next - alpha * state_weight
    if solver == "dpmpp_2m" and len(logsnrs) > 2:
        steps = logsnrs.diff()
        extrapolation = torch.nn.functional.pad(steps[1:] / (2 * steps[:-1]), (1, 1))
        past = data_weight * extrapolation
        predictions = torch.diag(data_weight + past) - torch.diag(past[1:], -1)
    else:
        predictions = torch.diag(data_weight)
    mu, nu = ggdm_form(state_weight, predictions)
    return mu, nu, sigma_next * angles.sin()


def ggdm_form(state_weight: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    r"""(mu, nu) of the sampler x_{k+1} = c_k x_k + sum_{j<=k} B_kj x0_hat_j.

    A past prediction is a combination of states: with S the shift x_{k+1} = (S x)_k and B = D + L (diagonal, strictly
    lower), x0_hat = B^-1 (S - diag(c)) x, so mu = diag(c) + L B^-1 (S - diag(c)) and nu = diag(D): one triangular
    solve. Noise that was added between is not removed from the states; to that extent a noisy multistep sampler is
    the GGDM's own.

    Args:
        state_weight: c, shape (K,).
        predictions: B, shape (K, K), lower triangular with a diagonal without zeros.

    Returns:
        mu, shape (K, K), lower triangular, and nu, shape (K,).
    """
    history = torch.linalg.solve_triangular(predictions, predictions.tril(-1), upper=False, left=False)
    shifted = torch.nn.functional.pad(history[:, :-1], (1, 0))  # L B^-1 S
    return (torch.diag(state_weight) + shifted - history * state_weight).tril(), predictions.diagonal()
