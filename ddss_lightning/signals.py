"""Signals that tell a fit to stop, on one process and on several."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTHING_LEARNED = (
    "nothing was learned since the start. To start again: the same command, and --ckpt_path=last where it names a "
    "--trainer.logger.version"
)


@contextmanager
def noted(*numbers: signal.Signals) -> Iterator[list[signal.Signals]]:
    """In this context these signals only add themselves to the list; a second Ctrl+C stops at once.

    In place of Lightning's handler, which calls collectives of its own at whatever point a process is.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for each in numbers:
        before[each] = signal.signal(each, note) or signal.SIG_DFL
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def agreed(trainer: Trainer, wish: bool) -> bool:
    """Whether any process wishes it. To be called on all processes."""
    return trainer.strategy.reduce_boolean_decision(wish, all=False)


def stop(trainer: Trainer, number: signal.Signals, what: str) -> NoReturn:
    """End the process, with a line that says what was kept. To be called on all processes.

    Raises:
        SIGTERMException: always.
    """
    rank_zero_info(f"{number.name} after step {trainer.global_step}: {what}.")
    # One process speaks for all: its launcher kills the main process when another one ends with an error.
    raise SIGTERMException(128 + number if trainer.is_global_zero else 0)
