"""What learning costs, in network calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddss_lightning.features import DenoiserFeatures, FeatureExtractor
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.losses import InFeatures, KIDLoss, SampleLoss
from ddss_lightning.losses.base import every_loss
from ddss_lightning.module import DDSSModule
from ddss_lightning.replay import Replay


def calls_per_step(module: DDSSModule) -> int:
    """Evaluations of the network for one optimiser step on one process, each on one image.

    A call counts as one, with classifier-free guidance as two (`Denoiser.evaluations_per_call`), and so does a gradient
    with respect to its input; a call that is made again in the backward pass (`remat`, `microbatch_size`) is not
    counted again. For B = `batch_size` images and K steps an Adam step is B (2 K - 1) calls: the first call of a chain
    needs no gradient, unless its start noise moves (`relax_radius`); and for each loss of the network's own features
    (`DenoiserFeatures`) 2 B of generated images, and B each of minibatches of real ones and of the teacher's. For a
    Gauss-Newton step see `difference_calls`, besides `residual_images` and, for the present sampler and each damping,
    `trial_images`.
    """
    each = module.denoiser.evaluations_per_call
    num_steps, batch_size, method = module.sampler.num_steps, module.batch_size, module.gauss_newton
    if method is None:
        relaxed = module.teacher is not None and module.needs_teacher and module.teacher.relax_radius > 0
        seen = [(module.features, module.loss.needs)]
        seen += [(part.features, part.loss.needs) for part in module.loss.modules() if isinstance(part, InFeatures)]
        own = sum(
            2 * ("features" in needs) + ("real" in needs) + ("target_features" in needs)
            for network, needs in seen
            if isinstance(network, DenoiserFeatures)
        )
        return batch_size * ((2 * num_steps - (0 if relaxed else 1)) * each + own)
    images = method.residual_images + (1 + len(method.dampings)) * method.trial_images
    return (difference_calls(module.sampler) * batch_size + images * num_steps) * each


def teacher_calls(module: DDSSModule) -> int:
    """Evaluations of the network that make the teacher's images; 0 where nothing is compared with them.

    Those of its own features of them, for a `KIDLoss` with a control variate, too.
    """
    teacher = module.teacher if module.needs_teacher else None
    if teacher is None:
        return 0
    own = sum(
        isinstance(network, DenoiserFeatures) and isinstance(loss, KIDLoss) and loss.control_variate
        for network, loss in _spaces(module)
    )
    return teacher.num_pairs * (teacher.num_steps * module.denoiser.evaluations_per_call + own)


def _spaces(module: DDSSModule) -> Iterator[tuple[FeatureExtractor, SampleLoss]]:
    """Every loss, with the feature network of its space."""
    elsewhere = {
        loss: part.features
        for part in module.loss.modules()
        if isinstance(part, InFeatures)
        for loss in every_loss(part.loss).values()
    }
    for loss in every_loss(module.loss).values():
        yield elsewhere.get(loss, module.features), loss


@torch.no_grad()
def difference_calls(sampler: GGDMSampler) -> int:
    """Calls of the differences of all numbers that a sampler learns, the undisturbed chain included; by `Replay`."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    noise = zero.expand(sampler.num_steps - 1, 1, 1)
    replay = Replay(lambda x, _timestep: x, sampler.coefficients(), zero, noise)
    for value in sampler.learned.values():
        for index in range(value.numel()):
            entry = value.view(-1)[index]
            before = entry.clone()
            entry += 1e-3
            replay(sampler.coefficients())
            # Not -= 1e-3, which rounds.
            entry.copy_(before)
    return replay.num_calls
