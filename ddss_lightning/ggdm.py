"""GGDMSampler: what is learned, and the coefficients that it stands for."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ddss_lightning.anchors import FormulaAnchor, ImportedAnchor, given_options, import_anchor
from ddss_lightning.coefficients import ROUNDING, Coefficients, PredictionType, prediction_pair
from ddss_lightning.probing import is_learned, probe
from ddss_lightning.remat import Remat
from ddss_lightning.saved import CARD_NAME, WEIGHTS_NAME, read_card, read_numbers, saved_sampler, write
from ddss_lightning.schedule import NoiseSchedule, check_schedule, own_config, scheduler_prediction_type
from ddss_lightning.solvers import Solver, Stride, first_timestep, magnitude, stride_timesteps
from ddss_lightning.unroll import Network, unroll

Degree = Literal["mu", "nu", "std", "pred", "time", "logsnr"]
Parametrization = Literal["anchored", "ggdm"]
DEGREES: tuple[Degree, ...] = get_args(Degree)
Generators = torch.Generator | Sequence[torch.Generator] | None


class GGDMSampler(nn.Module):
    r"""A K-step sampler of the GGDM family whose numbers can be learned.

    Everything that is learned starts at zero, so that an untrained sampler *is* its anchor. `learn` chooses among

    - `mu`, shape (K(K+1)/2,): corrections to the weights of the states;
    - `nu`, shape (K,): corrections to the weights of the predicted images;
    - `std`, shape (K - 1,): anchored: change of the noise angle theta_k, where std_k = sigma_{k+1} |sin theta_k|, with
      the solver's marginals kept; ggdm: change of std_k itself;
    - `pred`, shape (K, 2): corrections to the pair that turns (x_k, output) into x0_hat (+PRED);
    - `time`, shape (K - 1,): offsets, in half log-SNR, of the times shown to the network (+TIME), for `ddim` and
      `dpmpp_2m` monotone by a running maximum. The first call stays where it is: its input is pure noise, the end of
      the schedule;
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
        anchor: `ddim` or `dpmpp_2m`; or a mapping that names a diffusers scheduler by `class_path` and `init_args`
            (and, if needed, `set_timesteps` and `step`, the further arguments of these methods), which is read by
            `probe` and whose coefficients stay while corrections move; or `{"coefficients": ...}`, the numbers
            themselves. See also `from_scheduler` and `from_coefficients`.
        eta: noise of `ddim` or `dpmpp_2m`, 0 (deterministic) to 1 (with `ddim`: DDPM).
        stride: initial placement of their network calls: `linear`, `quadratic` or `logsnr` (see `stride_timesteps`),
            from `first_timestep` on.
        timesteps: explicit initial timesteps, strictly decreasing, instead of `stride`.
        learn: what is learned; everything else stays at the anchor's value. Default: all that exists but `pred`.
        parametrization: `anchored` or `ggdm`.
        prediction_type: what the network predicts, see `prediction_pair`.

    Raises:
        ValueError: an argument outside its range, a schedule that is no `NoiseSchedule`, `learn` of something that does
            not exist, a scheduler that is not a GGDM.

    References:
        Watson et al., ICLR 2022, https://arxiv.org/abs/2202.05830, section 4.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        num_steps: int,
        anchor: Solver | dict[str, Any] = "dpmpp_2m",
        eta: float = 0.0,
        stride: Stride = "linear",
        timesteps: Sequence[float] | None = None,
        learn: Sequence[Degree] | None = None,
        parametrization: Parametrization = "anchored",
        prediction_type: PredictionType = "epsilon",
    ) -> None:
        super().__init__()
        check_schedule(schedule)
        if parametrization not in get_args(Parametrization):
            raise ValueError(
                f"Unknown parametrization '{parametrization}'; choose one of {', '.join(get_args(Parametrization))}."
            )
        num_steps = _whole(num_steps)
        if hasattr(anchor, "set_timesteps"):
            raise ValueError(
                f"anchor: to start from a {type(anchor).__name__} use GGDMSampler.from_scheduler(scheduler, num_steps)."
            )
        imported = isinstance(anchor, Mapping)
        if isinstance(learn, str):
            raise ValueError(f"learn must be a list of names, such as ['{learn}'], got '{learn}'.")
        known = [name for name in DEGREES if name != "logsnr" or (parametrization == "anchored" and not imported)]
        for name in learn or ():
            if name not in known:
                raise ValueError(
                    f"learn: '{name}' does not exist in the {parametrization} parametrisation"
                    f"{' of an imported anchor' if imported else ''}; choose any of {', '.join(known)}."
                )
        learned = [name for name in known if (name != "pred" if learn is None else name in learn)]
        # A copy: the denoiser's may be cast or moved with the network.
        self.schedule = copy.deepcopy(schedule).cpu()
        self.config: dict[str, Any] = {
            "num_steps": num_steps,
            "anchor": anchor,
            "eta": float(eta),
            "stride": stride,
            "timesteps": None if timesteps is None else [float(t) for t in timesteps],
            "learn": learned,
            "parametrization": parametrization,
            "prediction_type": prediction_type,
        }
        self.anchor = self._import_anchor(anchor) if isinstance(anchor, Mapping) else self._formula_anchor(anchor)
        shapes: dict[Degree, tuple[int, ...]] = {
            "mu": (num_steps * (num_steps + 1) // 2,),
            "nu": (num_steps,),
            "std": (num_steps - 1,),
            "pred": (num_steps, 2),
            "time": (num_steps - 1,),
            "logsnr": (num_steps - 1,),
        }
        self._known: tuple[Tensor, Coefficients] | None = None
        # In a tuple: what is checked is no part of this module.
        self._checked: tuple[NoiseSchedule, ...] = ()
        # One step has no gaps and no noise: what has no numbers has no gradient, and is no parameter.
        self.corrections = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(shapes[name], dtype=torch.float64))
                for name in learned
                if all(shapes[name])
            }
        )

    def _formula_anchor(self, solver: Solver) -> FormulaAnchor:
        config, grid = self.config, self.schedule.grid
        if config["timesteps"] is None:
            first = first_timestep(self.schedule, config["prediction_type"])
            initial = stride_timesteps(self.schedule, config["num_steps"], config["stride"], first)
            if first < grid[-1]:
                # Written down: see `_with_timesteps`.
                config["timesteps"] = initial.tolist()
        else:
            initial = torch.tensor(config["timesteps"], dtype=torch.float64)
            outside = not ((initial >= grid[0]) & (initial <= grid[-1])).all()
            if len(initial) != config["num_steps"] or not (initial.diff() < 0).all() or outside:
                raise ValueError(
                    f"timesteps must be {config['num_steps']} strictly decreasing numbers in "
                    f"[{float(grid[0]):g}, {float(grid[-1]):g}], got {config['timesteps']}."
                )
        return FormulaAnchor(solver, self.schedule, initial, config["eta"], config["prediction_type"])

    def _import_anchor(self, anchor: Mapping[str, Any]) -> ImportedAnchor:
        config = self.config
        for name, default in {"eta": 0.0, "timesteps": None, "stride": "linear"}.items():
            if config[name] != default:
                raise ValueError(
                    f"`{name}` belongs to the anchors 'ddim' and 'dpmpp_2m', got {config[name]} with another one: "
                    f"leave it at {default}; the options of a diffusers scheduler go to the anchor's init_args, "
                    "set_timesteps and step."
                )
        anchor = given_options(anchor)
        coefficients = import_anchor(anchor, self.schedule, config["num_steps"], config["prediction_type"])
        config["anchor"] = {**_plain(anchor), "coefficients": coefficients.to_lists()}
        if config["parametrization"] == "ggdm" and "pred" not in config["learn"]:
            # There the pair follows from Theorem 1: the same sampler, written with that pair.
            coefficients = coefficients.with_marginal_pair(config["prediction_type"], self.schedule.sigma_data)
            coefficients.validate()
        return ImportedAnchor(coefficients, self.schedule)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,  # noqa: ANN401 - diffusers has no common base for schedulers that can sample
        num_steps: int,
        learn: Sequence[Degree] | None = None,
        parametrization: Parametrization = "anchored",
        set_timesteps: Mapping[str, Any] | None = None,
        step: Mapping[str, Any] | None = None,
    ) -> GGDMSampler:
        """The sampler that a diffusers scheduler is, exactly, as a start for learning. It is not changed.

        Args:
            scheduler: an instance of any explicit, linear scheduler, with any of its linear options.
            num_steps: what its `set_timesteps` gets. `num_steps` of the result is the number of network calls, which
                can be larger: 2 n - 1 for Heun's method.
            learn: as in the constructor.
            parametrization: as in the constructor.
            set_timesteps: further arguments of `set_timesteps`, such as `sigmas` or `timesteps`.
            step: further arguments of `step`, such as `eta`.

        Raises:
            ValueError: a scheduler that is not a GGDM, see `probe`.
        """
        if isinstance(scheduler, type):
            raise ValueError(f"Give an instance of the scheduler, {scheduler.__name__}(...), not the class.")
        coefficients = probe(scheduler, _whole(num_steps), set_timesteps, step)
        options = {"set_timesteps": set_timesteps, "step": step}
        anchor = _source(scheduler) | {name: _plain(dict(value)) for name, value in options.items() if value}
        return cls.from_coefficients(
            NoiseSchedule.from_scheduler(scheduler),
            coefficients,
            learn,
            parametrization,
            cast(PredictionType, scheduler_prediction_type(scheduler)),
            anchor,
        )

    @classmethod
    def from_coefficients(
        cls,
        schedule: NoiseSchedule,
        coefficients: Coefficients,
        learn: Sequence[Degree] | None = None,
        parametrization: Parametrization = "anchored",
        prediction_type: PredictionType = "epsilon",
        source: Mapping[str, Any] | None = None,
    ) -> GGDMSampler:
        """The sampler with these numbers, as a start for learning.

        Args:
            schedule: the noise schedule of the pretrained network.
            coefficients: of K steps.
            learn: as in the constructor.
            parametrization: as in the constructor.
            prediction_type: what the network predicts.
            source: where the numbers came from: JSON data for the card.

        Raises:
            ValueError: numbers that are no sampler, see `Coefficients.validate`.
        """
        return cls(
            schedule,
            coefficients.num_steps,
            anchor={**(source or {}), "coefficients": coefficients.to_lists()},
            learn=learn,
            parametrization=parametrization,
            prediction_type=prediction_type,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GGDMSampler:
        """Follow a module to another device, but stay float64 when it is cast."""
        moved: GGDMSampler = super()._apply(lambda value: value.to(fn(value).device), recurse)  # type: ignore[no-untyped-call]
        return moved

    @property
    def num_steps(self) -> int:
        """K, the number of network calls."""
        return int(self.config["num_steps"])

    def __str__(self) -> str:
        """What the sampler is, at a glance: its anchor, what is learned, a table of its steps, and what looks wrong."""
        config, coefficients = self.config, self.coefficients().detach()
        sizes = ", ".join(f"{name} ({value.numel()})" for name, value in self.corrections.items())
        nothing = f"nothing{' further' * self.is_fixed} (fixed numbers)"
        lines = [
            f"GGDMSampler: {self.num_steps} network calls, {config['prediction_type']}, {config['parametrization']}",
            f"anchor: {self._anchor_name()}",
            f"learned: {sizes or nothing}",
            "",
            coefficients.table(),
        ]
        return "\n".join([*lines, *(f"warning: {problem}" for problem in coefficients.problems())])

    @property
    def is_fixed(self) -> bool:
        """Whether the numbers are those of a sampler that was learned before: no class is named by their source."""
        anchor = self.config["anchor"]
        return isinstance(anchor, Mapping) and " " in anchor.get("class_path", "given coefficients")

    def _anchor_name(self) -> str:
        config = self.config
        if not isinstance(config["anchor"], Mapping):
            where = "given timesteps" if config["timesteps"] else f"{config['stride']} stride"
            return f"{config['anchor']}, eta {config['eta']:g}, {where}"
        source = config["anchor"].get("class_path", "given coefficients")
        if self.is_fixed:
            return str(source)
        options = {name: config["anchor"].get(name) for name in ("init_args", "set_timesteps", "step")}
        options["init_args"] = {k: v for k, v in (options["init_args"] or {}).items() if k != "trained_betas"}
        shown = json.dumps({name: value for name, value in options.items() if value})
        return f"{source}{' ' + shown if shown != '{}' else ''} (imported)"

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The corrections that learning moves, by name: all but those that are held (`requires_grad_(False)`)."""
        return {name: value for name, value in self.corrections.items() if value.requires_grad}

    def _correction(self, name: Degree) -> Tensor:
        # A zero without dimensions stands for what is not learned.
        return self.corrections[name] if name in self.corrections else torch.zeros((), dtype=torch.float64)

    def logsnrs(self) -> Tensor:
        """Half log-SNRs of the states, shape (K,), increasing but for the stages of Runge-Kutta steps."""
        return self.anchor.logsnrs(self._correction("logsnr"))

    def timesteps(self) -> Tensor:
        """Times shown to the network, shape (K,), real-valued."""
        return self.anchor.timesteps(self._correction("logsnr"), self._correction("time"))

    def coefficients(self) -> Coefficients:
        """The sampler's numbers, float64, differentiable with respect to everything that is learned."""
        anchored = self.config["parametrization"] == "anchored"
        angles = self._correction("std") if anchored else torch.zeros((), dtype=torch.float64)
        start = self.anchor.coefficients(self._correction("logsnr"), angles, self._correction("time"))
        mu, std, pred = start.mu, start.std, start.pred
        if "mu" in self.corrections:
            rows, columns = torch.tril_indices(self.num_steps, self.num_steps, device=mu.device)
            mu = mu.index_put((rows, columns), self.corrections["mu"], accumulate=True)
        nu = start.nu + self._correction("nu")
        if not anchored and "std" in self.corrections:
            std = torch.nn.functional.pad(magnitude(std[:-1] + self.corrections["std"]), (0, 1))
        # Freely learned noise stays in: only what the solver itself takes out of past predictions is taken out.
        past_noise = start.past_noise if anchored else start.past_noise * (start.std != 0)
        moved = dataclasses.replace(start, mu=mu, nu=nu, std=std, past_noise=past_noise)
        if not anchored and "pred" not in self.corrections:
            a, marginal_std = moved.marginals()
            pred = prediction_pair(self.config["prediction_type"], a[:-1], marginal_std[:-1], self.schedule.sigma_data)
        pred = pred + self._correction("pred")
        return dataclasses.replace(moved, pred=pred)

    def _constant_coefficients(self) -> Coefficients:
        """`coefficients()` without a gradient; those of the last time if what is learned has the same values.

        Computing them is a few hundred operations on a few numbers: as much time as all else besides the network.
        """
        learned = torch.cat([self.schedule.table[:0], *(value.detach().flatten() for value in self.parameters())])
        known = self._known
        if known is None or known[0].device != learned.device or not torch.equal(known[0], learned):
            self._known = known = learned, self.coefficients()
        return known[1]

    @property
    @torch.no_grad()
    def uses_noise(self) -> bool:
        """Whether its steps add noise, or may learn to."""
        return "std" in self.learned or bool((self._constant_coefficients().std != 0).any())

    def check_denoiser(self, denoiser: Network) -> None:
        """Whether the sampler can be one of this network, as far as a `Denoiser` says what it is.

        Raises:
            ValueError: it predicts something else, or has another noise schedule, than the sampler was made for.
        """
        name, wanted = getattr(denoiser, "name", "denoiser"), self.config["prediction_type"]
        predicts, schedule = getattr(denoiser, "prediction_type", wanted), getattr(denoiser, "schedule", None)
        if predicts != wanted:
            raise ValueError(
                f"The denoiser '{name}' predicts '{predicts}', the sampler was made for '{wanted}'; give the sampler "
                "that prediction_type."
            )
        if not isinstance(schedule, NoiseSchedule) or any(schedule is known for known in self._checked):
            return
        if not self.schedule.matches(schedule):
            raise ValueError(
                f"The sampler was made for another noise schedule than that of '{name}'; make it with "
                "GGDMSampler(denoiser.schedule, ...)."
            )
        self._checked = (schedule,)

    def forward(
        self,
        denoiser: Network,
        x_T: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        remat: str | Remat = "none",
    ) -> Tensor:
        """Images x_0 from noise x_T in K network calls. Differentiable; callers choose `torch.no_grad`.

        Args:
            denoiser: (x_k, timestep) -> output of `prediction_type`; a `Denoiser` or any function.
            x_T: standard normal, shape (N, C, H, W).
            generator: draws the noise of the steps where `noise` is not given; a list, as in diffusers: one an image.
            noise: noise of the steps, shape (K - 1, N, C, H, W).
            remat: what is kept for the backward pass, see `unroll`.

        Returns:
            x_0, shape (N, C, H, W), not clamped.

        Raises:
            ValueError: the sampler was not made for such a denoiser, see `check_denoiser`; it returns no tensor; wrong
                noise, generators or remat.
        """
        self.check_denoiser(denoiser)
        coefficients = self.coefficients() if torch.is_grad_enabled() else self._constant_coefficients()
        # Where `std` is being learned, it has a slope at 0, too.
        drawn = self.uses_noise if torch.is_grad_enabled() else bool((coefficients.std != 0).any())
        if noise is None and drawn:
            # One draw a step, as diffusers' pipelines do: the same generator gives the same images there.
            draws = [randn_like(x_T, generator) for _ in range(self.num_steps - 1)]
            noise = torch.stack(draws) if draws else None
        return unroll(denoiser, coefficients, x_T, noise, remat)

    def save_pretrained(
        self,
        save_directory: str | Path,
        base_model: Mapping[str, Any] | None = None,
        scores: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the sampler: `sampler.safetensors` (numbers) and `sampler.json` (the card).

        The safetensors file holds what was learned, the schedule and, for readers without this package, the final
        coefficients, all float64. No half-written file, nor one that does not belong to the other, is ever taken for a
        sampler, see `saved.write`.

        Args:
            save_directory: a folder; created, parents included.
            base_model: name, fingerprint and settings of the denoiser that it was learned for.
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
        tensors |= {"schedule.logsnrs": self.schedule.table, "schedule.timesteps": self.schedule.grid}
        card = {
            "nfe": self.num_steps,
            "base_model": dict(base_model or {}),
            "schedule": {
                "num_train_timesteps": self.schedule.num_train_timesteps,
                "scaling": self.schedule.scaling,
                "sigma_data": self.schedule.sigma_data,
            },
            "config": self.config,
            "num_learned": sum(value.numel() for value in self.corrections.values()),
            "timesteps": coefficients.timesteps.tolist(),
            "scores": dict(scores or {}),
        }
        write(folder, type(self).__name__, card, tensors)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path) -> GGDMSampler:
        """Read what `save_pretrained` wrote.

        Args:
            pretrained_path: a local folder, the log folder of a fit, or a hub name `owner/model`.

        Returns:
            The sampler. One of format 1 that adds noise to a multistep solver, whose past predictions saw the noise
            again, has no anchor and nothing learned: it is given by its coefficients, so that it stays what it was.

        Raises:
            ValueError: a file is missing, damaged, of another sampler than the other, or written by a newer format.
        """
        folder = saved_sampler(pretrained_path)
        card = read_card(folder)
        try:
            tensors = read_numbers(folder, card)
            kind = {name: card["schedule"][name] for name in ("scaling", "sigma_data") if name in card["schedule"]}
            schedule = NoiseSchedule(tensors["schedule.logsnrs"], tensors.get("schedule.timesteps"), **kind)
            sampler = cls(schedule, **_with_timesteps(card["config"], schedule))
            # Files of older versions hold what has no numbers, too.
            learned = {k: value for k, value in tensors.items() if k.startswith("learned.") and value.numel()}
            sampler.load_state_dict({f"corrections.{name.removeprefix('learned.')}": v for name, v in learned.items()})
            if card["format_version"] == 1 and sampler.coefficients().noise_weights().tril(-1).abs().max() > ROUNDING:
                saved = {
                    k.removeprefix("coefficients."): v for k, v in tensors.items() if k.startswith("coefficients.")
                }
                sampler = cls.from_coefficients(
                    schedule,
                    Coefficients(**saved),
                    learn=(),
                    prediction_type=sampler.config["prediction_type"],
                    source={"class_path": f"learned from {sampler._anchor_name()}"},
                )
            sampler.coefficients().detach().validate()
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"The sampler in '{folder}' is damaged: {error}") from error
        return sampler


def _with_timesteps(config: dict[str, Any], schedule: NoiseSchedule) -> dict[str, Any]:
    """A saved configuration. Before `first_timestep` was, strides began at the last one, and none were written down."""
    is_formula = isinstance(config.get("anchor", ""), str) and config.get("timesteps") is None
    if not is_formula or first_timestep(schedule, config.get("prediction_type", "epsilon")) == schedule.grid[-1]:
        return config
    initial = stride_timesteps(schedule, config["num_steps"], config.get("stride", "linear"))
    return {**config, "timesteps": initial.tolist()}


def _whole(num_steps: object) -> int:
    try:
        return int(operator.index(num_steps))  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"num_steps must be a whole number, got {num_steps!r}.") from None


def randn_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal numbers of the shape of x, drawn on the generator's device.

    Raises:
        ValueError: several generators, and not one for each image.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"{len(generator)} generators were given for {len(x)} images; give one, or one for each.")
        return torch.cat([randn_like(image, each) for image, each in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _source(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    """Where imported numbers came from, for card and display: class and options; of a learned one the model."""
    name = type(scheduler).__name__
    if is_learned(scheduler):
        return {"class_path": f"{name} of a sampler for {scheduler.config['base_model'] or 'a model without a name'}"}
    return {
        "class_path": f"{type(scheduler).__module__.split('.')[0]}.{name}",
        "init_args": _plain(_changed_options(scheduler)),
    }


def _changed_options(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    """The options of a scheduler that are not its class's defaults."""
    defaults = {name: each.default for name, each in inspect.signature(type(scheduler).__init__).parameters.items()}
    config = own_config(scheduler)
    return {name: value for name, value in config.items() if _plain(value) != _plain(defaults.get(name))}


def _plain(value: Any) -> Any:  # noqa: ANN401
    """The same as lists, numbers and strings, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
