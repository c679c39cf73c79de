"""Moments of the features of a sampler's images, as Gauss-Newton steps measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddss_lightning.denoisers.base import Denoiser
from ddss_lightning.images import to_pixels
from ddss_lightning.losses.frechet import FrechetResidual
from ddss_lightning.noise import draw_noise, generator_for
from ddss_lightning.precision import full_precision
from ddss_lightning.replay import Replay
from ddss_lightning.sampling import SamplingModule


class SampleMoments:
    """`FrechetResidual.moments` of the sampler that a module learns, the mean over all processes.

    The noise is a function of the module's seed, the step, the process and the purpose.

    Args:
        module: whose sampler, denoiser and feature network are used, as they are when it is measured.
        distance: which moments.
        batch_size: images that go through the chain at once.
    """

    def __init__(self, module: SamplingModule, distance: FrechetResidual, batch_size: int) -> None:
        self.module, self.distance, self.batch_size = module, distance, batch_size

    def __call__(self, purpose: str, num_images: int) -> Tensor:
        """Of samples as they are scored, `num_images` on each process."""
        module = self.module
        total = torch.zeros((), dtype=torch.float64, device=module.device)
        for denoiser, x_T, noise in self._draws(purpose, num_images):
            with full_precision(module.device.type):
                x_0 = module.last_state(module.sampler, denoiser, x_T, noise)
                total = total + self._moments(x_0, to_pixels) * len(x_T)
        return self._everyone(total / num_images)

    def of_one_batch(self, purpose: str) -> Callable[[], Tensor]:
        """A function that measures one batch, of the same noise at each call: for differences.

        In full precision and not rounded to pixels: differences of a thousandth drown in either.
        """
        module = self.module
        ((denoiser, x_T, noise),) = self._draws(purpose, self.batch_size)
        x_T = x_T.to(device=module.device, dtype=module.image_dtype)
        with full_precision(module.device.type):
            replay = Replay(denoiser, module.sampler.coefficients(), x_T, noise)

        def measure() -> Tensor:
            with full_precision(module.device.type):
                x_0 = replay(module.sampler.coefficients())
                return self._everyone(self._moments(x_0, lambda images: images.clamp(-1, 1)))

        return measure

    def _moments(self, x_0: Tensor, pixels: Callable[[Tensor], Tensor]) -> Tensor:
        denoiser, network = self.module.denoiser, self.module.features

        def features(part: Tensor) -> tuple[Tensor]:
            return (network(pixels(denoiser.decode(part)).to(network.dtype)),)

        return self.distance.moments(*self.module.in_parts(features, x_0))

    def _draws(self, purpose: str, num_images: int) -> Iterator[tuple[Denoiser, Tensor, Tensor]]:
        """Denoiser and noise of this step and process, in batches."""
        module = self.module
        key = (f"gauss-newton {purpose}", module.seed, module.global_step, module.global_rank)
        generator = generator_for(*key)
        for part in torch.arange(num_images).split(self.batch_size):
            x_T, noise = draw_noise((len(part), *module.denoiser.state_shape), module.sampler.num_steps, generator)
            yield module.denoiser.for_samples("/".join(map(str, key)), part.tolist()), x_T, noise

    def _everyone(self, moments: Tensor) -> Tensor:
        several = self.module.trainer.world_size > 1
        return torch.stack(list(self.module.all_gather(moments))).mean(0) if several else moments
