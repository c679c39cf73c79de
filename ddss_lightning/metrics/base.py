"""What the metrics share: images or features in, and rows that several processes put together in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.features.base import check_finite, check_images
from ddss_lightning.precision import full_precision

DIVERGED = "a sampler that diverges makes such images: look at its coefficients, and score a sampler that does not"


def check_real(real: Tensor, minimum: int = 2) -> Tensor:
    """Features of real images in float64.

    Raises:
        ValueError: no tensor, not of shape (m, d) with m >= `minimum`, or numbers that are not finite.
    """
    if not isinstance(real, Tensor):
        raise ValueError(
            f"real must hold the features of real images, shape (m, d), got {type(real).__name__}; give what a "
            "FeatureExtractor makes of them, and the FeatureExtractor itself as `features=`."
        )
    if real.ndim != 2 or len(real) < minimum:
        raise ValueError(
            f"real must hold the features of at least {minimum} real images, shape (m, d), got {tuple(real.shape)}; "
            "give the output of a FeatureExtractor."
        )
    check_finite(real, "feature vectors of real images", "look for NaN in the real images")
    return real.detach().double()


class SampleMetric(Metric):
    """A metric of generated samples, given as feature vectors or, with a feature network, as images.

    Args:
        num_features: d, the length of a vector.
        features: the network that turns images into vectors; without it `update` takes vectors. It is not part of
            the metric's state dict and stays on its own device: images go to it, vectors to the metric.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, num_features: int, features: FeatureExtractor | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        # In a tuple, so that it is no submodule: checkpoints of the metric must not hold a frozen network.
        self._network = (features,)

    @torch.no_grad()
    def vectors(self, samples: Tensor) -> Tensor:
        """Rows of length d in float64: the samples themselves, or their features in full precision.

        Args:
            samples: vectors of shape (n, d), or images of shape (n, C, H, W) with float values in [-1, 1].

        Raises:
            TypeError: images that are not floats.
            ValueError: another shape, images outside [-1, 1], images or vectors that are not finite.
        """
        network = self._network[0]
        if network is not None:
            check_images(samples, remedy=DIVERGED)
            device = next(network.parameters(), samples).device
            with full_precision(device.type):
                samples = self.represent(network, samples.to(device, network.dtype))
        if samples.ndim != 2 or samples.shape[1] != self.num_features:
            remedy = "use the feature network of the real images" if network else "or give `features=` to take images"
            raise ValueError(
                f"{type(self).__name__} takes vectors of shape (n, {self.num_features}), got {tuple(samples.shape)}; "
                f"{remedy}."
            )
        check_finite(samples, "feature vectors", DIVERGED)
        return samples.to(self.device).double()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move, but never cast: a module in bfloat16 that owns the metric must not round states and real features."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)

    def represent(self, network: FeatureExtractor, images: Tensor) -> Tensor:
        """The vectors of images that this metric is about: their features."""
        vectors: Tensor = network(images)
        return vectors


class RowMetric(SampleMetric):
    """A metric that needs all vectors at once.

    Each process keeps its own until the metric is computed; then all processes hold all of them, in one order that
    does not depend on how they were batched or shared out: by `indices` if given, otherwise by content. Order
    matters where subsets are drawn, and where rounding decides between equal distances.
    """

    rows: list[Tensor]
    indices: list[Tensor]

    def __init__(self, num_features: int, features: FeatureExtractor | None = None) -> None:
        super().__init__(num_features, features)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("indices", [], dist_reduce_fx="cat")

    def update(self, samples: Tensor, indices: Tensor | None = None) -> None:
        """Add generated samples.

        Args:
            samples: vectors, shape (n, d); images, shape (n, C, H, W), if the metric has a feature network.
            indices: number of each sample in the whole set, shape (n,), int64, each used once over all processes.

        Raises:
            TypeError: images that are not floats.
            ValueError: wrong shapes, images outside [-1, 1], or numbers that are not finite.
        """
        rows = self.vectors(samples)
        if indices is None:
            indices = torch.full((len(rows),), -1, device=rows.device)
        elif indices.shape != (len(rows),) or indices.is_floating_point() or (indices < 0).any():
            raise ValueError(
                f"indices must be {len(rows)} integers of at least 0, one for each sample, got {indices.dtype} of "
                f"shape {tuple(indices.shape)}{', some below 0' * bool((indices < 0).any())}."
            )
        self.rows.append(rows)
        self.indices.append(indices.to(rows.device, torch.long))

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,  # noqa: ANN401 - torchmetrics' signature
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """As `torchmetrics.Metric.sync`; a process without samples takes part with no rows of the right shape.

        torchmetrics would gather from it a one-dimensional float32 tensor, and the others wait for another shape.
        """
        if not self.rows:
            self.rows = [torch.zeros(0, self.num_features, dtype=torch.float64, device=self.device)]
            self.indices = [torch.zeros(0, dtype=torch.long, device=self.device)]
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def all_rows(self, minimum: int) -> Tensor:
        """All vectors in the one order, shape (n, d), to be called from `compute`.

        Raises:
            ValueError: fewer than `minimum`, indices for some samples only, or an index used twice.
        """
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if len(rows) < minimum:
            raise ValueError(f"{type(self).__name__} needs at least {minimum} generated images, got {len(rows)}.")
        assert isinstance(rows, Tensor)
        indices = torch.cat(self.indices) if isinstance(self.indices, list) else self.indices
        if (indices < 0).all():
            return rows[content_keys(rows).argsort(stable=True)]
        if (indices < 0).any():
            raise ValueError("Some samples came with indices and some without; give `indices` at each update.")
        order = indices.argsort()
        twice = (indices[order].diff() == 0).sum()
        if twice:
            raise ValueError(
                f"{int(twice)} samples have an index that another sample has: they would be counted twice. Samplers of "
                "several processes repeat samples to make equal shares; use shares range(rank, N, world_size)."
            )
        return rows[order]


def content_keys(rows: Tensor, block: int = 4096) -> Tensor:
    """A 64-bit hash of each row, shape (n,), int64: sorting by it orders rows by content alone."""
    generator = torch.Generator().manual_seed(0)
    # Odd factors are invertible modulo 2^64: no single number can change without changing the key.
    factors = torch.randint(-(2**62), 2**62, rows.shape[1:], generator=generator) * 2 + 1
    factors = factors.to(rows.device)
    return torch.cat([(part.contiguous().view(torch.int64) * factors).sum(1) for part in rows.split(block)])
