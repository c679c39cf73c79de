"""The loop that the scripts of this folder train with: it can be interrupted, and resumes to the same result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

LOG_EVERY = 50


def generator_at(*key: int, device: str = "cpu") -> torch.Generator:
    """A generator that is a function of the key alone, so that resumed work draws the same numbers."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return torch.Generator(device).manual_seed(seed)


def save_atomically(value: object, path: Path) -> None:
    """`torch.save` such that `path` holds the old or the new value, whenever the process ends."""
    new = path.with_name(path.name + ".new")
    torch.save(value, new)
    new.replace(path)


def train(
    name: str,
    partial: Path,
    run: Mapping[str, Any],
    parts: Mapping[str, Any],
    step: Callable[[int], Tensor],
    iterations: int,
    save_minutes: float = 3.0,
    on_save: Callable[[int], None] | None = None,
) -> float:
    """Call `step(iteration)` for every iteration, from where an interrupted run left off; returns seconds spent.

    All random numbers of a step must be functions of the iteration. Progress is a bar in a terminal, else a line at
    each saved state.

    Args:
        name: of the work, for the progress bar.
        partial: folder of `state.pt`, which is replaced every `save_minutes` and at the end.
        run: what the run is (seed, sizes, ...): numbers, strings; a state of another run is refused.
        parts: everything that changes, each with `state_dict` and `load_state_dict`.
        step: one iteration; returns the loss.
        iterations: how many in all.
        save_minutes: minutes between two states.
        on_save: called with the number of iterations done, after each state.

    Raises:
        SystemExit: `partial` holds a state of another run.
    """
    partial.mkdir(parents=True, exist_ok=True)
    path, run = partial / "state.pt", {**run, "iterations": iterations}
    first, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["run"] != run:
            raise SystemExit(f"'{partial}' holds another run: {state['run']} instead of {run}; remove it first.")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first, seconds = state["iteration"], state["seconds"]
    started = saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=iterations, completed=first)
        for iteration in range(first, iterations):
            loss = step(iteration)
            done, now = iteration + 1, time.monotonic()
            if done % LOG_EVERY == 0 or done == iterations:
                progress.update(bar, completed=done, description=f"{name} (loss {loss.item():.4f})")
            if now - saved < 60 * save_minutes and done < iterations:
                continue
            spent = seconds + now - started
            state = {key: part.state_dict() for key, part in parts.items()}
            save_atomically({**state, "run": run, "iteration": done, "seconds": spent}, path)
            saved = now
            if not progress.console.is_terminal:
                pace = 1000 * (now - started) / (done - first)
                print(f"{name}: {done}/{iterations}, loss {loss.item():.4f}, {pace:.0f} ms each", flush=True)
            if on_save:
                on_save(done)
    return seconds + time.monotonic() - started
