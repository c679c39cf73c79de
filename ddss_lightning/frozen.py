"""Networks that are used, differentiated through with respect to their input, and never changed."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

FrozenT = TypeVar("FrozenT", bound="Frozen")


class Frozen(nn.Module):
    """A module that, once frozen, has no trainable parameter and never leaves evaluation mode.

    Gradients still flow to its *inputs*: nothing here is wrapped in `torch.no_grad`.
    """

    _is_frozen = False
    # What the last fingerprint was computed from, and the fingerprint.
    _known: tuple[list[tuple[Any, ...]], str] | None = None

    def freeze(self: FrozenT) -> FrozenT:
        """Turn off the gradients of all parameters and fix evaluation mode; returns `self`."""
        self._is_frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self: FrozenT, mode: bool = True) -> FrozenT:
        """As `nn.Module.train`, but a frozen module stays in evaluation mode."""
        return super().train(mode and not self._is_frozen)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of all parameters and buffers, names and shapes included.

        Two modules have the same fingerprint if and only if (up to hash collisions) they hold the same numbers
        under the same names. It identifies the frozen network that a sampler or a checkpoint belongs to. Numbers in
        float64 count as those in float32 that they are rounded to: a Trainer of precision 64-true casts the network.

        It is computed again when a tensor was moved, replaced or changed in place (but through `.data`, of which
        autograd does not know): checkpoints of a network of gigabytes ask for it every time.
        """
        tensors = [*self.parameters(), *self.buffers()]
        state = [
            (id(each), each.data_ptr(), 0 if each.is_inference() else each._version, each.dtype, each.shape)
            for each in tensors
        ]
        if self._known is None or self._known[0] != state:
            self._known = state, self._digest()
        return self._known[1]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            if isinstance(value, Tensor):
                value = value.float() if value.dtype == torch.float64 else value
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def check_tensor(output: object, network: object, method: str = "") -> Tensor:
    """The output of a network of one's own, if it is a tensor, and not what diffusers' networks return.

    Args:
        output: what it returned.
        network: for the message; of a denoiser, the name.
        method: in the message, where it is not the call of the network.

    Raises:
        ValueError: it is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    kind = getattr(network, "__name__", type(network).__name__)
    who = f"denoiser '{network.name}'" if hasattr(network, "name") else f"network {kind}"
    part = ": `.sample` of it" if hasattr(output, "sample") else ": `[0]` of it" * isinstance(output, (tuple, list))
    raise ValueError(
        f"{f'`{method}` of the' if method else 'The'} {who} returns {type(output).__name__}, it must return a tensor"
        f"{part}."
    )


def check_gradient(output: Tensor, name: str, inputs: dict[str, Tensor]) -> None:
    """Make sure that a network of one's own can be differentiated through.

    Args:
        output: of any shape.
        name: of the network, in the message.
        inputs: from which it was computed, by their names in the message; all require a gradient.

    Raises:
        ValueError: it does not depend on one of them, as far as autograd knows.
    """
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if output.requires_grad:
        found = torch.autograd.grad(output.float().sum(), list(inputs.values()), allow_unused=True)
    for what, gradient in zip(inputs, found, strict=True):
        if gradient is None:
            raise ValueError(
                f"The output of {name} has no gradient with respect to the {what}, through which the sampler is "
                "learned: on its way there must be no torch.no_grad, no detach, and no rounded times (`long`, `round`)."
            )
