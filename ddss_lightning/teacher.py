"""Pairs of start noise and what a sampler of many steps makes of it, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddss_lightning.denoisers.base import Denoiser, check_takes_turns
from ddss_lightning.files import default_cache_dir, replacing
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.images import to_pixels, to_uint8
from ddss_lightning.noise import generator_for, held_out_noise
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.solvers import Solver, Stride

FORMAT_VERSION = 2
# Of kept images so many are made again, and may differ by so many of 255 levels on average, by rounding.
FEW, LARGEST_ERROR = 4, 4.0


@dataclass(frozen=True)
class TeacherPairs:
    r"""The teacher of a `TeacherLoss`: x_T, by index, and the image that a deterministic sampler makes of it.

    The images lie in a cache, in files of `chunk_size`, that are keyed by the denoiser, what the teacher's coefficients
    follow from (its arguments, an outline of the schedule, the version of diffusers), and the seed. A file is there
    whole or not at all: an interrupted run goes on with those that are missing, a larger `num_pairs` makes only the new
    ones (and again those of a last file that was not full), and several processes share the work. Four images are made
    again, and compared, before kept ones are used: the code of a denoiser may have changed. Noise is drawn again when
    it is needed, by (seed, index), apart from all other noise.

    A step takes its global batch from permutations of the pairs that are a function of the fit's own seed and the
    epoch, each pair at most once in an epoch: a fit is the same on any number of processes and however often it is
    resumed, and fits of other seeds can share the pairs.

    With `relax_radius` r > 0 the sampler need not hit the teacher's image from exactly x_T, but from somewhere near:

    .. math:: \min_\theta \, E \min_{|x'_T - x_T| \le r} d(\mathrm{sampler}_\theta(x'_T), \mathrm{teacher}(x_T))

    in units where x_T is standard normal, so that the ball has radius r sigma_T in those of the state. Each pair has
    its own x'_T, which begins at x_T, and moves by a projected gradient step whenever its turn comes, with the
    gradient that the step of theta has computed anyway:
    x'_T <- P(x'_T - s r g / |g|), P the projection onto the ball. The ball and the alternating steps are LD3's; the
    normalised step, of the same length for any distance, is ours, and so is that a step need not prove itself by a
    second evaluation. Where the loss has further terms, g is of the whole sum. Scores never see x'_T.

    Args:
        num_pairs: how many.
        num_steps: network calls of the teacher.
        anchor: as in `GGDMSampler`: `dpmpp_2m`, `ddim`, or a mapping that names a diffusers scheduler.
        stride: as in `GGDMSampler`, for `dpmpp_2m` and `ddim`.
        chunk_size: images that are made at once and kept in one file.
        relax_radius: r, in units of the standard normal x_T, whose length is about the square root of the number of its
            entries; 0: x_T stays. LD3's own runs on 3 x 32 x 32 images used 0.03.
        relax_step: s, length of a step as a fraction of r.
        cache_dir: folder of the cache; default `ddss_lightning` in `$XDG_CACHE_HOME`, else in `~/.cache`.
        seed: of the noise.

    Raises:
        ValueError: an argument outside its range.

    References:
        Tong et al., "Learning to Discretize Denoising Diffusion ODEs", ICLR 2025, https://arxiv.org/abs/2405.15506
        (LD3), section on the soft teacher; code: https://github.com/vinhsuhi/LD3.
    """

    num_pairs: int = 10_000
    num_steps: int = 50
    anchor: str | dict[str, Any] = "dpmpp_2m"
    # For models whose times do not begin at 0, `logsnr` stands for `quadratic`.
    stride: Stride = "quadratic"
    chunk_size: int = 256
    relax_radius: float = 0.0
    relax_step: float = 0.1
    cache_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_steps", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.relax_radius < float("inf"):
            raise ValueError(f"relax_radius must be a number of at least 0, got {self.relax_radius}.")
        if not 0 < self.relax_step <= 1:
            raise ValueError(f"relax_step must be above 0 and at most 1, got {self.relax_step}.")

    # ---------------------------------------------------------------------------------------------------- the cache

    def sampler(self, denoiser: Denoiser) -> GGDMSampler:
        """The teacher.

        Raises:
            ValueError: an anchor that adds noise, or that is not a GGDM.
        """
        has_other_times = denoiser.schedule.grid[0] != 0
        stride: Stride = "logsnr" if self.stride == "quadratic" and has_other_times else self.stride
        sampler = GGDMSampler(
            denoiser.schedule,
            self.num_steps,
            anchor=cast(Solver, self.anchor),
            # The stride belongs to the formulas; a scheduler has its own.
            stride="linear" if isinstance(self.anchor, dict) else stride,
            learn=(),
            prediction_type=cast(Any, denoiser.prediction_type),
        )
        if sampler.coefficients().std.any():
            raise ValueError("A teacher must be deterministic, but this anchor adds noise; use 'dpmpp_2m' or 'ddim'.")
        return sampler

    def key(self, denoiser: Denoiser) -> dict[str, str]:
        """What cached images must agree in.

        Raises:
            ValueError: a denoiser with labels.
        """
        check_takes_turns(denoiser)
        settings = denoiser.settings()
        identity = denoiser.fingerprint()
        if settings.get("guidance_scale") is not None:
            settings = {**settings, "order of conditions": 2}
        if settings:
            identity = f"{identity}-{_digest(settings)}"
        return {
            "format": str(FORMAT_VERSION),
            "denoiser": identity,
            "teacher": _digest([self._recipe(denoiser), _outline(denoiser.schedule)]),
            "seed": str(self.seed),
        }

    def _recipe(self, denoiser: Denoiser) -> dict[str, Any]:
        """What the coefficients follow from: they themselves differ in the last digits between machines."""
        sampler = self.sampler(denoiser)
        config = dict(sampler.config)
        anchor = config["anchor"]
        if config["timesteps"] is not None:
            config["timesteps"] = [round(timestep, 3) for timestep in config["timesteps"]]
        if isinstance(anchor, dict) and not sampler.is_fixed:
            import diffusers

            anchor = {name: value for name, value in anchor.items() if name != "coefficients"}
            config["anchor"] = {**anchor, "diffusers": diffusers.__version__}
        return config

    def folder(self, denoiser: Denoiser) -> Path:
        """Where the images lie."""
        root = default_cache_dir() if self.cache_dir is None else Path(self.cache_dir)
        return root / "teacher-{denoiser}-{teacher}-{seed}".format(**self.key(denoiser))

    def _files(self, folder: Path) -> dict[Path, range]:
        starts = range(0, self.num_pairs, self.chunk_size)
        chunks = [range(start, min(start + self.chunk_size, self.num_pairs)) for start in starts]
        return {folder / f"{chunk.start:08d}-{chunk.stop:08d}.safetensors": chunk for chunk in chunks}

    @torch.no_grad()
    def make(
        self,
        denoiser: Denoiser,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
        decode_size: int | None = None,
        told_to_stop: Callable[[], bool] = lambda: False,
    ) -> list[Path]:
        """Make the missing ones of every W-th file, W processes, with states of `dtype`. Returns what was made.

        `decode_size` of them are decoded at once. Before each file it asks whether it is `told_to_stop`; another call
        goes on with what is missing.

        Raises:
            ValueError: images that are not finite; some that were made by other code.
        """
        from rich.progress import track

        folder, sampler, made = self.folder(denoiser), self.sampler(denoiser), []
        files = self._files(folder)

        def images_of(pairs: Sequence[int]) -> Tensor:
            x_T = self.noise(pairs, denoiser.state_shape).to(device, dtype)
            shown = denoiser.for_samples(self.noise_key, pairs)
            return shown.decode_in_parts(sampler(shown, x_T), decode_size)

        # A compiled network would be compiled once more, for so few.
        if getattr(denoiser, "compile_mode", None) is None:
            self._check_kept(files, images_of)
        own = list(files.items())[rank::world_size]
        missing = [(path, chunk) for path, chunk in own if not path.is_file()]
        if not missing:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        steps = f"teacher: {self.num_steps} calls for each of {sum(len(chunk) for _, chunk in missing)} images"
        for path, chunk in track(missing, steps, disable=rank != 0):
            if told_to_stop():
                break
            images = images_of(chunk)
            _check_made(images, chunk)
            with replacing(path) as partial:
                save_file(
                    {"images": to_uint8(to_pixels(images)).cpu().contiguous()}, partial, metadata=self.key(denoiser)
                )
            made.append(path)
        return made

    def _check_kept(self, files: dict[Path, range], images_of: Callable[[Sequence[int]], Tensor]) -> None:
        """Make a few images again: of the code of a model, and of libraries, a fingerprint says nothing."""
        for path, chunk in files.items():
            try:
                with safe_open(path, "pt") as file:
                    kept = file.get_slice("images")[:FEW]
            except (SafetensorError, OSError):  # not made yet; what is damaged, `load` refuses
                continue
            images = images_of(chunk[: len(kept)])
            # The code of the model may have changed in this way, too; but then new ones would be no better.
            _check_made(images, chunk[: len(kept)])
            again = to_uint8(to_pixels(images)).cpu()
            error = float((again.float() - kept.float()).abs().mean()) if again.shape == kept.shape else 255.0
            if not error <= LARGEST_ERROR:
                raise ValueError(
                    f"The teacher's images in '{path.parent}' are not those that the model makes now: the first ones "
                    f"differ by {error:.0f} of 255 levels on average. Its code has changed, or that of a library; "
                    "delete the folder, and they are made anew."
                )
            return

    def load(self, denoiser: Denoiser) -> TeacherImages:
        """All images, memory-mapped.

        Raises:
            ValueError: a file that is missing, damaged, or of something else.
        """
        key, chunks = self.key(denoiser), []
        for path, chunk in self._files(self.folder(denoiser)).items():
            if not path.is_file():
                raise ValueError(
                    f"The teacher's images '{path}' are missing; make them first, and on several machines give a "
                    "cache_dir that all of them see."
                )
            try:
                with safe_open(path, "pt") as file:
                    found, images = file.metadata() or {}, file.get_tensor("images")
            except SafetensorError as error:
                raise ValueError(f"The teacher's images '{path}' are damaged ({error}); delete the file.") from error
            if found != key or images.shape != (len(chunk), *denoiser.image_shape):
                raise ValueError(f"The teacher's images '{path}' are of {found}, not of {key}; delete the file.")
            chunks.append(images)
        return TeacherImages(chunks)

    # ------------------------------------------------------------------------------------------------- in a fit

    @property
    def noise_key(self) -> str:
        """Of x_T and, by `Denoiser.for_samples`, of the condition of each pair."""
        return f"teacher/{self.seed}"

    def noise(self, indices: Sequence[int], state_shape: tuple[int, ...]) -> Tensor:
        """x_T of these pairs, shape (n, *state_shape)."""
        return held_out_noise(self.noise_key, list(indices), state_shape, 1)[0]

    def batch(self, step: int, global_batch: int, seed: int) -> list[int]:
        """The pairs of a step, of all processes together, in the order of this seed; never the same pair twice.

        Raises:
            ValueError: fewer pairs than a batch has.
        """
        if global_batch > self.num_pairs:
            raise ValueError(
                f"A batch of {global_batch} images, all processes together, needs as many teacher pairs, there are "
                f"{self.num_pairs}; raise num_pairs or lower batch_size."
            )
        epoch, position = divmod(step, self.num_pairs // global_batch)
        order = torch.randperm(self.num_pairs, generator=generator_for("teacher", seed, epoch))
        pairs: list[int] = order[position * global_batch : (position + 1) * global_batch].tolist()
        return pairs

    def moved(self, offsets: Tensor, gradients: Tensor) -> Tensor:
        """x'_T - x_T of some pairs after a projected gradient step, shape (n, *state_shape), float32.

        Args:
            offsets: before it, same shape.
            gradients: of each pair's loss by its x'_T, same shape, up to a positive factor.
        """
        flat, slopes = offsets.flatten(1).double(), gradients.flatten(1).to(offsets.device).double()
        norms = slopes.norm(dim=1, keepdim=True)
        # A gradient without a direction (0 / 0, infinite) moves nothing.
        directions = torch.where((norms > 0) & norms.isfinite(), slopes / norms, 0.0)
        flat = flat - self.relax_step * self.relax_radius * directions
        flat = flat * (self.relax_radius / flat.norm(dim=1, keepdim=True)).clamp(max=1.0)
        moved: Tensor = flat.view_as(offsets).to(offsets.dtype)
        return moved


class TeacherImages:
    """Images of pairs 0, 1, ... in equal chunks (the last can be smaller), uint8."""

    def __init__(self, chunks: list[Tensor]) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """Pixels in [-1, 1], shape (n, C, H, W), float32."""
        size = len(self.chunks[0])
        found = torch.stack([self.chunks[index // size][index % size] for index in indices])
        return found.float() / 127.5 - 1


def _check_made(images: Tensor, pairs: range) -> None:
    if not images.isfinite().all():
        raise ValueError(
            f"The teacher makes images that are not finite, of the pairs {pairs.start} to {pairs.stop - 1}; nothing "
            "was kept of them. Look for NaN in the model's weights, or take another teacher."
        )


def _digest(value: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _outline(schedule: NoiseSchedule) -> list[Any]:
    """What tells schedules apart, the same on every processor but for ties of rounding, which are rare.

    Few numbers, and none near the image, where what diffusers computes in float32 has the fewest right digits.
    """
    places = torch.tensor([0.1, 0.25, 0.5, 0.75, 1.0]).to(schedule.grid)
    logsnrs = schedule.logsnr(torch.lerp(schedule.grid[0], schedule.grid[-1], places)).tolist()
    return [len(schedule.grid), schedule.scaling, schedule.sigma_data, [round(value, 3) for value in logsnrs]]
