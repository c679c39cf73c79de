"""Rematerialisation: which network calls of the chain keep their activations, and which are computed again."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddss_lightning.frozen import check_tensor

UNITS = {"": 1, "B": 1, **{f"{k}B": 1000**i for i, k in enumerate("kMGT", 1)}}
UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", 1)}
CHOICES = "none, denoiser, every(n), budget(bytes), each with '+offload' or without"


@dataclass(frozen=True)
class Remat(ABC):
    """A policy: which of the K network calls are computed again in the backward pass.

    Args:
        offload: keep the states of the chain in main memory between the passes, not on the accelerator.
    """

    offload: bool = False

    @abstractmethod
    def recomputed(self, num_steps: int, bytes_per_call: Callable[[], int]) -> list[bool]:
        """For each of the K calls, whether it is computed again.

        Args:
            num_steps: K.
            bytes_per_call: measures what the activations of one call take.
        """

    @staticmethod
    def parse(policy: str | Remat) -> Remat:
        """The policy that a text names: `none`, `denoiser`, `every(2)`, `budget(4GiB)`, `denoiser+offload`.

        Raises:
            ValueError: an unknown policy, n below 1, or a size that is not one.
        """
        if isinstance(policy, Remat):
            return policy
        name, _, option = policy.replace(" ", "").partition("+")
        call = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", name)
        kind, argument = call.groups() if call else (name, None)
        offload = option == "offload"
        if option in ("", "offload"):
            if kind == "none" and argument is None:
                return KeepAll(offload)
            if kind == "denoiser" and argument is None:
                return RecomputeEvery(offload)
            if kind == "every" and (argument or "").isdecimal():
                return RecomputeEvery(offload, int(argument or ""))
            if kind == "budget" and argument:
                return MemoryBudget(offload, parse_bytes(argument))
        raise ValueError(f"Unknown remat '{policy}'; choose one of {CHOICES}.")


@dataclass(frozen=True)
class KeepAll(Remat):
    """`none`: the activations of all calls are kept; about 2 K forwards for a step, K times the memory of one call."""

    def recomputed(self, num_steps: int, bytes_per_call: Callable[[], int]) -> list[bool]:  # noqa: ARG002, D102
        return [False] * num_steps


@dataclass(frozen=True)
class RecomputeEvery(Remat):
    """`every(n)`: every n-th call, counted from the last, is computed again, but not the last; `denoiser` is n = 1.

    The backward pass begins with the last call: what it kept would be computed again at once. About (2 + 1/n) K - 1
    forwards for a step, and the memory of one call, or of (1 - 1/n) K, besides that of the feature network, which comes
    in between.

    Args:
        n: at least 1.
    """

    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"remat: every(n) needs n of at least 1, got {self.n}.")

    def recomputed(self, num_steps: int, bytes_per_call: Callable[[], int]) -> list[bool]:  # noqa: ARG002, D102
        return [k < num_steps - 1 and (num_steps - 1 - k) % self.n == 0 for k in range(num_steps)]


@dataclass(frozen=True)
class MemoryBudget(Remat):
    """`budget(bytes)`: as many calls keep their activations as fit, by the size of the first; the rest are recomputed.

    The last calls are kept: their activations are gone before the first recomputation takes its own. The memory of
    one call, which every policy needs, is part of the budget; feature network, weights and states are not. A budget
    below one call has all of them computed again, the last one too, after the feature network's part.

    Args:
        num_bytes: at least 1; texts take units, `500MB` or `4GiB`.
    """

    num_bytes: int = 1

    def __post_init__(self) -> None:
        if self.num_bytes < 1:
            raise ValueError(f"remat: budget(bytes) needs at least 1 byte, got {self.num_bytes}.")

    def recomputed(self, num_steps: int, bytes_per_call: Callable[[], int]) -> list[bool]:  # noqa: D102
        kept = self.num_bytes // max(1, bytes_per_call())
        return [k < num_steps - kept for k in range(num_steps)]


def parse_bytes(text: str) -> int:
    """Bytes of `500MB`, `4GiB` or `1e9`.

    Raises:
        ValueError: not a positive size in a known unit.
    """
    match = re.fullmatch(r"([0-9.]+(?:e\d+)?)([A-Za-z]*)", text.strip())
    try:
        number, unit = match.groups() if match else ("", "")
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"'{text}' is not a size in bytes; write it as 500MB, 4GiB or 1e9.") from error


def measured_call(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, timestep: Tensor) -> tuple[Tensor, int]:
    """One call of the network, and what its backward pass would keep.

    On the whole batch: a network may know of each image what it is to be, such as its label. What is kept is gone
    when this returns.

    Args:
        network: a module, whose weights are not counted, or any function, whose weights cannot be told. Under autocast
            every call that is kept holds its own copy of the weights in half precision, which is counted.
        x: a state, which the chain keeps, shape (N, C, H, W).
        timestep: shape (N,).

    Returns:
        The output without a graph, shape (N, C, H, W), and bytes of activations.
    """
    module = network if isinstance(network, nn.Module) else nn.Module()
    others = {value.untyped_storage().data_ptr() for value in (x, *module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        # The graph holds what is counted here, so that no address is that of two tensors.
        storage = value.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage.nbytes()
        # A graph that holds a tensor of its own graph is never freed.
        return value.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = check_tensor(network(x.detach().requires_grad_(), timestep.detach()), network)
    return output.detach(), sum(kept.values()) if output.requires_grad else 0


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Within this context, the backward pass finds the states that were given to `hold` in main memory.

    Every later step saves a state again; it is copied once.
    """

    def __init__(self) -> None:
        # Held until the context ends: while a state lives, no other tensor can have its address.
        self._held: dict[int, Tensor] = {}
        copies: dict[int, Tensor] = {}
        self._copies = copies

        def pack(value: Tensor) -> tuple[torch.device, Tensor]:
            state = self._held.get(value.data_ptr())
            if state is None or state.shape != value.shape or state.stride() != value.stride():
                return value.device, value
            address = value.data_ptr()
            if address not in copies:
                copies[address] = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda).copy_(state.detach())
            return value.device, copies[address]

        super().__init__(pack, lambda packed: packed[1].to(packed[0]))

    def hold(self, state: Tensor) -> Tensor:
        """Send this tensor to main memory when it is saved; returns it."""
        self._held[state.data_ptr()] = state
        return state

    def __exit__(self, *args: object) -> None:
        """Let the originals go."""
        super().__exit__(*args)
        self._held.clear()
        self._copies.clear()
