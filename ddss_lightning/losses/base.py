"""What a loss sees of a training step, and what every loss offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from ddss_lightning.features.base import FeatureExtractor


def _own(values: Tensor) -> Tensor:
    return values


@dataclass
class Samples:
    """Generated images of one step on this process, and what they are compared with; only what the loss needs.

    Attributes:
        features: of the generated images, shape (n, d).
        images: their pixels in [-1, 1], clamped and rounded straight through, shape (n, C, H, W).
        real: features of a minibatch of real images, shape (m, d).
        target: the teacher's pixels from the same noise, shape (n, C, H, W).
        target_features: features of these, shape (n, d).
        gather: values of this process, shape (n, ...), to those of all W processes, shape (W n, ...). Its gradient by
            the own values is W times what it would be in one process, because DDP takes the mean of the gradients; so
            a loss of gathered values and a mean over own ones can be added.
        precision: the context in which networks are called, the Trainer's autocast; all else is in full precision.
    """

    features: Tensor | None = None
    images: Tensor | None = None
    real: Tensor | None = None
    target: Tensor | None = None
    target_features: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = _own
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __getitem__(self, name: str) -> Tensor:
        """What `name` is.

        Raises:
            ValueError: it is not there.
        """
        found = getattr(self, name)
        if found is None:
            raise ValueError(
                f"The loss reads `{name}` of the samples, which were made without: add '{name}' to its `needs`, or, "
                f"where they are made by hand, give Samples({name}=...)."
            )
        return found  # type: ignore[no-any-return]


# What a loss can need: all but what says how samples are gathered and networks called.
NEEDS = tuple(sorted({each.name for each in fields(Samples)} - {"gather", "precision"}))


class SampleLoss(nn.Module, ABC):
    """A differentiable measure of generated samples, to be minimised.

    It can have a memory, such as running moments. `forward` reads it; what it would become is kept by `advance`, which
    is called after each step that was taken, so that a skipped step changes nothing. Checkpoints hold the memory, and
    nothing else of a loss. A loss that is made of others, its submodules, leaves theirs to them, see `every_loss`.

    Attributes:
        name: of the value in logs, `train/<name>`.
        needs: names of the attributes of `Samples` that `forward` reads. Chains are differentiated through `features`
            and `images` only where these are needed; the feature network is not called where it is not.
        has_memory: whether it has one of its own.
        terms: further values to log, of the last `forward`, detached.
    """

    name = "loss"
    needs: frozenset[str] = frozenset({"features"})
    has_memory = False

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def __call__(self, samples: Samples, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of any module
        """As of any module.

        Raises:
            TypeError: something else than `Samples`.
        """
        if not isinstance(samples, Samples):
            needed = ", ".join(f"{name}=..." for name in sorted(self.needs))
            raise TypeError(f"{type(self).__name__} takes Samples({needed}), got {type(samples).__name__}.")
        return super().__call__(samples, *args, **kwargs)

    def fit_real(self, features: Tensor, encode_real: Callable[[FeatureExtractor], Tensor] | None = None) -> None:
        """Learn what is needed of all real images before the first step.

        Args:
            features: of the module's network, shape (m, d).
            encode_real: network -> its features of the same images, for losses that have one of their own.
        """

    def fit_target(self, encode_target: Callable[[FeatureExtractor | None], Tensor]) -> None:
        """Learn what is needed of all images of the teacher before the first step, after `fit_real`.

        Called where `needs` holds `target` or `target_features`.

        Args:
            encode_target: network (None: that of the module) -> its features of the images of all pairs, shape (p, d).
        """

    @abstractmethod
    def forward(self, samples: Samples) -> Tensor:
        """A scalar."""

    def advance(self) -> None:
        """The step of the last `forward` was taken: remember it."""

    def identity(self) -> str:
        """What must be the same for a fit to be resumed, in one line."""
        return type(self).__name__

    def memory(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on to the last bit."""
        return {}

    def restore(self, memory: dict[str, Tensor]) -> None:
        """Take back what `memory` gave."""


def every_loss(loss: SampleLoss) -> dict[str, SampleLoss]:
    """A loss, by the name `""`, and all losses that it is made of, by their names in `named_modules`."""
    return {name: part for name, part in loss.named_modules() if isinstance(part, SampleLoss)}


def check_needs(loss: SampleLoss) -> None:
    """Make sure that a loss of one's own, with all that it is made of, needs what there is.

    Raises:
        ValueError: one object in two places, of which the second would take the real features of the first; `needs` is
            no set of names, holds an unknown one, or neither `features` nor `images`, through which alone a loss
            depends on the samples.
    """
    seen: dict[SampleLoss, str] = {}
    for name, part in loss.named_modules(remove_duplicate=False):
        if isinstance(part, SampleLoss) and seen.setdefault(part, name) != name:
            raise ValueError(
                f"The loss has one and the same {type(part).__name__} as '{seen[part]}' and as '{name}', and each loss "
                f"remembers the real images of its own space; give each place its own {type(part).__name__}(...)."
            )
    # A sum needs what its parts do: the parts first.
    for part in reversed(every_loss(loss).values()):
        kind = type(part).__name__
        if not isinstance(part.needs, (set, frozenset)):
            raise ValueError(f"{kind}.needs must be a set of names, such as {{'features'}}, got {part.needs!r}.")
        for name in sorted(part.needs - set(NEEDS)):
            raise ValueError(f"{kind}.needs: unknown '{name}'; choose any of {', '.join(NEEDS)}.")
    if loss.needs.isdisjoint({"features", "images"}):
        raise ValueError(
            f"{type(loss).__name__}.needs holds neither 'features' nor 'images', through which alone a loss depends on "
            f"the samples; got {', '.join(sorted(loss.needs)) or 'nothing'}."
        )


def feature_scale(features: Tensor, name: str) -> float:
    """Root mean square of real features, shape (m, d): divided by it, features of any network have gradients of O(1).

    Raises:
        ValueError: fewer than two vectors, or numbers that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} needs at least two real feature vectors, got shape {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise ValueError("The real features hold numbers that are not finite; look for NaN in the real images.")
    return float(features.detach().double().square().mean().sqrt())
