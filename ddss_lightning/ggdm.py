"""GGDMSampler: what is learned, and the coefficients that it stands for."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddss_lightning.coefficients import Coefficients, marginals
from ddss_lightning.schedule import NoiseSchedule, alpha_sigma_of_logsnr
from ddss_lightning.solvers import Anchor, Stride, anchor_formula, ddim_noise_angles, stride_timesteps
from ddss_lightning.unroll import Network, Remat, unroll

Degree = Literal["mu", "nu", "std", "pred", "time", "logsnr"]
Parametrization = Literal["anchored", "ggdm"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
DEGREES: tuple[Degree, ...] = get_args(Degree)

CARD_NAME = "sampler.json"
WEIGHTS_NAME = "sampler.safetensors"
FORMAT_VERSION = 1


def prediction_pair(prediction_type: PredictionType, alpha: Tensor, sigma: Tensor) -> Tensor:
    r"""The pair p with x0_hat = p_0 x + p_1 output, for x = alpha x_0 + sigma eps.

    `epsilon`: (1, -sigma) / alpha. `sample`: (0, 1). `v_prediction` (v = alpha eps - sigma x_0, Salimans & Ho 2022,
    https://arxiv.org/abs/2202.00512, appendix D): (alpha, -sigma) / (alpha^2 + sigma^2).

    Returns:
        Shape (K, 2) for alpha, sigma of shape (K,).

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return torch.stack([torch.ones_like(alpha), -sigma], 1) / alpha[:, None]
    if prediction_type == "sample":
        return torch.stack([torch.zeros_like(alpha), torch.ones_like(alpha)], 1)
    if prediction_type == "v_prediction":
        return torch.stack([alpha, -sigma], 1) / (alpha.square() + sigma.square())[:, None]
    raise ValueError(
        f"Unknown prediction_type '{prediction_type}'; choose one of {', '.join(get_args(PredictionType))}."
    )


class GGDMSampler(nn.Module):
    r"""A K-step sampler of the GGDM family whose numbers can be learned.

    Everything that is learned starts at zero, so that an untrained sampler *is* its anchor. `learn` chooses among

    - `mu`, shape (K(K+1)/2,): corrections to the weights of the states;
    - `nu`, shape (K,): corrections to the weights of the predicted images;
    - `std`, shape (K - 1,): anchored: change of the noise angle theta_k, where std_k = sigma_{k+1} |sin theta_k|;
      ggdm: change of std_k itself;
    - `pred`, shape (K, 2): corrections to the pair that turns (x_k, output) into x0_hat (+PRED);
    - `time`, shape (K - 1,): offsets, in half log-SNR, of the times shown to the network (+TIME), monotone by a
      running maximum. The first call stays where it is: its input is pure noise, the end of the schedule;
    - `logsnr`, shape (K - 1,), anchored only: logarithms of the factors by which the gaps between the anchor's
      half log-SNRs grow. The coefficients follow by the anchor's formula.

    `parametrization="anchored"` (ours, default): the anchor's formula at the learned log-SNRs, plus corrections.
    `parametrization="ggdm"` (the paper's): mu, nu and std are free numbers that start at the anchor's values, and
    without `pred` the pair follows from Theorem 1: x0_hat = (x_k - v_k^(1/2) eps) / a_k. The initial values, the
    time's parametrisation and the exact form of +PRED are ours: the paper does not give them.

    Parameters are float64, and so are the coefficients; the chain runs in the dtype of its first state.

    Args:
        schedule: the noise schedule of the pretrained network.
        num_steps: K, the number of network calls, 1 to `schedule.num_train_timesteps`.
        anchor: `ddim` or `dpmpp_2m`.
        eta: noise of the anchor, 0 (deterministic) to 1 (with `ddim`: DDPM).
        stride: initial placement of the network calls: `linear`, `quadratic` or `logsnr` (see `stride_timesteps`).
        timesteps: explicit initial timesteps, strictly decreasing, instead of `stride`.
        learn: what is learned; everything else stays at the anchor's value.
        parametrization: `anchored` or `ggdm`.
        prediction_type: what the network predicts, as in diffusers: `epsilon`, `sample` or `v_prediction`.

    Raises:
        ValueError: an argument outside its range, `learn` of something that does not exist.

    References:
        Watson et al., ICLR 2022, https://arxiv.org/abs/2202.05830, section 4.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        num_steps: int,
        anchor: Anchor = "dpmpp_2m",
        eta: float = 0.0,
        stride: Stride = "linear",
        timesteps: Sequence[float] | None = None,
        learn: Sequence[Degree] = ("logsnr", "time", "mu", "nu", "std"),
        parametrization: Parametrization = "anchored",
        prediction_type: PredictionType = "epsilon",
    ) -> None:
        super().__init__()
        if parametrization not in get_args(Parametrization):
            raise ValueError(
                f"Unknown parametrization '{parametrization}'; choose one of {', '.join(get_args(Parametrization))}."
            )
        known = DEGREES if parametrization == "anchored" else tuple(name for name in DEGREES if name != "logsnr")
        for name in learn:
            if name not in known:
                raise ValueError(
                    f"learn: '{name}' does not exist in the {parametrization} parametrisation; "
                    f"choose any of {', '.join(known)}."
                )
        # A copy: the denoiser's may be cast or moved with the network.
        self.schedule = schedule = NoiseSchedule(schedule.table)
        self.config: dict[str, Any] = {
            "num_steps": num_steps,
            "anchor": anchor,
            "eta": float(eta),
            "stride": stride,
            "timesteps": None if timesteps is None else [float(t) for t in timesteps],
            "learn": [name for name in DEGREES if name in learn],
            "parametrization": parametrization,
            "prediction_type": prediction_type,
        }
        initial = stride_timesteps(schedule, num_steps, stride)
        if timesteps is not None:
            initial = torch.tensor(self.config["timesteps"], dtype=torch.float64)
            last = schedule.num_train_timesteps - 1
            if len(initial) != num_steps or (initial.diff() >= 0).any() or initial.min() < 0 or initial.max() > last:
                raise ValueError(
                    f"timesteps must be {num_steps} strictly decreasing numbers in [0, {last}], got {list(timesteps)}."
                )
        self.logsnrs_0: Tensor
        self.angles_0: Tensor
        self.register_buffer("logsnrs_0", schedule.logsnr(initial), persistent=False)
        self.register_buffer("angles_0", ddim_noise_angles(self.logsnrs_0, eta), persistent=False)
        anchor_formula(anchor, self.logsnrs_0, self.angles_0)
        prediction_pair(prediction_type, *alpha_sigma_of_logsnr(self.logsnrs_0))
        shapes: dict[Degree, tuple[int, ...]] = {
            "mu": (num_steps * (num_steps + 1) // 2,),
            "nu": (num_steps,),
            "std": (num_steps - 1,),
            "pred": (num_steps, 2),
            "time": (num_steps - 1,),
            "logsnr": (num_steps - 1,),
        }
        self.corrections = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shapes[name], dtype=torch.float64)) for name in self.config["learn"]}
        )

    @property
    def num_steps(self) -> int:
        """K, the number of network calls."""
        return int(self.config["num_steps"])

    def _correction(self, name: Degree) -> Tensor | float:
        return self.corrections[name] if name in self.corrections else 0.0  # noqa: SIM401 - ParameterDict.get is untyped

    def logsnrs(self) -> Tensor:
        """Half log-SNRs of the states at which the anchor's formula is taken, shape (K,), increasing."""
        gaps = self.logsnrs_0.diff() * torch.as_tensor(self._correction("logsnr")).exp()
        return torch.cat([self.logsnrs_0[:1], self.logsnrs_0[:1] + gaps.cumsum(0)])

    def timesteps(self) -> Tensor:
        """Times shown to the network, shape (K,), real-valued, not increasing."""
        logsnrs = self.logsnrs()
        later = logsnrs[1:] + self._correction("time")
        return self.schedule.timestep(torch.cat([logsnrs[:1], later]).cummax(0).values)

    def coefficients(self) -> Coefficients:
        """The sampler's numbers, float64, differentiable with respect to everything that is learned."""
        anchored = self.config["parametrization"] == "anchored"
        logsnrs = self.logsnrs()
        alpha, sigma = alpha_sigma_of_logsnr(logsnrs)
        angles = self.angles_0 + (self._correction("std") if anchored else 0.0)
        mu, nu, std = anchor_formula(self.config["anchor"], logsnrs, angles)
        if "mu" in self.corrections:
            rows, columns = torch.tril_indices(self.num_steps, self.num_steps, device=mu.device)
            mu = mu.index_put((rows, columns), self.corrections["mu"], accumulate=True)
        nu = nu + self._correction("nu")
        if not anchored and "std" in self.corrections:
            free = std[:-1] + self.corrections["std"]
            std = torch.nn.functional.pad(torch.where(free >= 0, free, -free), (0, 1))
        prior = torch.stack([alpha[0], sigma[0]])
        if not anchored and "pred" not in self.corrections:
            a, marginal_std = marginals(mu, nu, std, prior)
            alpha, sigma = a[:-1], marginal_std[:-1]
        pred = prediction_pair(self.config["prediction_type"], alpha, sigma) + self._correction("pred")
        return Coefficients(mu=mu, nu=nu, std=std, pred=pred, timesteps=self.timesteps(), prior=prior)

    def forward(
        self,
        denoiser: Network,
        x_T: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        remat: Remat = "none",
    ) -> Tensor:
        """Images x_0 from noise x_T in K network calls. Differentiable; callers choose `torch.no_grad`.

        Args:
            denoiser: (x_k, timestep) -> output of `prediction_type`; a `Denoiser` or any function.
            x_T: standard normal, shape (N, C, H, W).
            generator: draws the noise of the steps where `noise` is not given.
            noise: noise of the steps, shape (K - 1, N, C, H, W).
            remat: `none` or `denoiser`, see `unroll`.

        Returns:
            x_0, shape (N, C, H, W), not clamped.

        Raises:
            ValueError: the denoiser predicts something else than the sampler was made for, wrong noise or remat.
        """
        predicts = getattr(denoiser, "prediction_type", self.config["prediction_type"])
        if predicts != self.config["prediction_type"]:
            raise ValueError(
                f"The denoiser predicts '{predicts}', the sampler was made for '{self.config['prediction_type']}'; "
                "give the sampler the denoiser's prediction_type."
            )
        coefficients = self.coefficients()
        if noise is None and (coefficients.std.detach() != 0).any():
            device = x_T.device if generator is None else generator.device
            shape = (self.num_steps - 1, *x_T.shape)
            noise = torch.randn(shape, generator=generator, dtype=x_T.dtype, device=device).to(x_T.device)
        return unroll(denoiser, coefficients, x_T, noise, remat)

    def save_pretrained(
        self,
        save_directory: str | Path,
        base_model: Mapping[str, str] | None = None,
        scores: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the sampler: `sampler.safetensors` (numbers) and `sampler.json` (the card).

        The safetensors file holds what was learned, the schedule and, for readers without this package, the final
        coefficients, all float64. Each file is replaced at once: no half-written file is left under its name.

        Args:
            save_directory: a folder; created, parents included.
            base_model: name and fingerprint of the denoiser that it was learned for.
            scores: any JSON data that says how good it is and how that was measured.
            overwrite: replace a sampler that is already there.

        Raises:
            ValueError: a sampler is there and `overwrite` is false, or the sampler's numbers are not finite.
        """
        folder = Path(save_directory)
        if not overwrite and any((folder / name).exists() for name in (CARD_NAME, WEIGHTS_NAME)):
            raise ValueError(f"'{folder}' already holds a sampler; give another folder or overwrite=True.")
        coefficients = self.coefficients().detach().validate()
        tensors = {f"learned.{name}": value.detach().contiguous() for name, value in self.corrections.items()}
        tensors |= {f"coefficients.{name}": value.contiguous() for name, value in vars(coefficients).items()}
        tensors["schedule.logsnrs"] = self.schedule.table
        card = {
            "_class_name": type(self).__name__,
            "format_version": FORMAT_VERSION,
            "nfe": self.num_steps,
            "base_model": dict(base_model or {}),
            "schedule": {"num_train_timesteps": self.schedule.num_train_timesteps},
            "config": self.config,
            "num_learned": sum(value.numel() for value in self.corrections.values()),
            "timesteps": coefficients.timesteps.tolist(),
            "scores": dict(scores or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            save_file({name: value.cpu() for name, value in tensors.items()}, Path(staging, WEIGHTS_NAME))
            Path(staging, CARD_NAME).write_text(json.dumps(card, indent=2) + "\n")
            for name in (WEIGHTS_NAME, CARD_NAME):
                shutil.copymode(Path(staging, CARD_NAME), Path(staging, name))
                os.replace(Path(staging, name), folder / name)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path) -> GGDMSampler:
        """Read what `save_pretrained` wrote.

        Args:
            pretrained_path: a local folder.

        Raises:
            ValueError: a file is missing, damaged, or written by a newer format.
        """
        folder = Path(pretrained_path)
        card = read_card(folder)
        try:
            tensors = load_file(folder / WEIGHTS_NAME)
            sampler = cls(NoiseSchedule(tensors["schedule.logsnrs"]), **card["config"])
            learned = {name: value for name, value in tensors.items() if name.startswith("learned.")}
            sampler.load_state_dict({f"corrections.{name.removeprefix('learned.')}": v for name, v in learned.items()})
        except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"The sampler in '{folder}' is damaged: {error}") from error
        return sampler


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card (`sampler.json`) of a saved sampler.

    Raises:
        ValueError: no sampler there, a card that is not JSON, or one of a newer format.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        raise ValueError(
            f"No sampler in '{folder}': '{CARD_NAME}' is missing. Give a folder written by "
            "`GGDMSampler.save_pretrained`, such as 'checkpoints/digits-ggdm-5'."
        )
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"The card '{path}' is damaged: {error}") from error
    if card.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format version {card.get('format_version')}, this package reads {FORMAT_VERSION}; "
            "install the version of ddss_lightning that wrote it."
        )
    return card
