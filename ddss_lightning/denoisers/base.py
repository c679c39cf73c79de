"""What every pretrained denoiser offers to a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ddss_lightning.coefficients import PredictionType
from ddss_lightning.frozen import Frozen, check_tensor
from ddss_lightning.schedule import NoiseSchedule, check_schedule

# What a subclass sets in its __init__.
ATTRIBUTES = ("name", "schedule", "prediction_type", "image_shape")


class Denoiser(Frozen, ABC):
    """A frozen diffusion network (x_t, t) -> output, with the schedule it was trained with.

    Attributes:
        schedule: its noise schedule.
        prediction_type: what the output is, one of `PredictionType`: `epsilon`, `sample`, `v_prediction`, ...; see
            `prediction_pair`.
        image_shape: (channels, height, width) of the images.
        name: where it came from, for cards and messages.
    """

    schedule: NoiseSchedule
    prediction_type: str
    image_shape: tuple[int, int, int]
    name: str

    @abstractmethod
    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The network's output.

        Args:
            x_t: shape (N, *state_shape).
            timestep: real-valued, in the units of `schedule` (of betas: in [0, num_train_timesteps - 1]), shape (N,).

        Returns:
            Shape of x_t.
        """

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the states x_t: those of the images, but for latent models."""
        return self.image_shape

    @property
    def evaluations_per_call(self) -> int:
        """How often the network is evaluated for one call on one image: twice with classifier-free guidance."""
        return 1

    def for_samples(self, key: str, indices: Sequence[int]) -> Denoiser:  # noqa: ARG002 - there is nothing to show
        """This denoiser for one batch: a conditional network is shown the condition of each sample.

        Args:
            key: what the samples are for, such as `validation/0`.
            indices: of the samples in the batch, in order, from 0 on: condition and noise of a sample follow from (key,
                index). A training step without teacher pairs gives random ones below 2^40, for its conditions alone.
        """
        return self

    def settings(self) -> dict[str, Any]:
        """What else than its weights its images depend on, in values of JSON; `fingerprint` is of the weights alone."""
        return {}

    def decode(self, x_0: Tensor) -> Tensor:
        """Images, shape (N, *image_shape), around [-1, 1], of last states, shape (N, *state_shape)."""
        return x_0

    def decode_in_parts(self, x_0: Tensor, size: int | None) -> Tensor:
        """`decode`, `size` images at once (None: all): a decoder takes many times the memory of its latents.

        Raises:
            ValueError: `decode` makes no tensor, or images of another shape than `image_shape`.
        """
        parts = [check_tensor(self.decode(part), self, "decode") for part in x_0.split(size or max(len(x_0), 1))]
        made = tuple(parts[0].shape[1:])
        if made != tuple(self.image_shape):
            raise ValueError(
                f"`decode` of the denoiser '{self.name}' makes images of shape {made} from states of shape "
                f"{tuple(x_0.shape[1:])}, its image_shape is {tuple(self.image_shape)}; a latent model overrides both "
                "`state_shape` and `decode`."
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_complete(denoiser: Denoiser) -> None:
    """Make sure that a denoiser of one's own has set what it must.

    Raises:
        ValueError: an attribute that is not there, a schedule that is no `NoiseSchedule`, an unknown prediction type.
    """
    kind = type(denoiser).__name__
    for name in ATTRIBUTES:
        if not hasattr(denoiser, name):
            raise ValueError(
                f"{kind} has no attribute `{name}`; a Denoiser sets {', '.join(ATTRIBUTES)} in its __init__."
            )
    check_schedule(denoiser.schedule, f"{kind}.schedule")
    if denoiser.prediction_type not in get_args(PredictionType):
        raise ValueError(
            f"{kind}.prediction_type must be one of {', '.join(get_args(PredictionType))}, got "
            f"{denoiser.prediction_type!r}."
        )


def check_takes_turns(denoiser: Denoiser) -> None:
    """Make sure that each sample is shown the condition of its index (`for_samples`), not one that was set before.

    Raises:
        ValueError: a denoiser with labels.
    """
    if getattr(denoiser, "shown", None) is not None:
        raise ValueError(
            f"The labels that '{denoiser.name}' was given would not be shown: fits, scores and teacher pairs are of "
            "all classes. Use the denoiser without `with_labels`, with a `guidance_scale`."
        )
