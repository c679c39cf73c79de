"""The scores of a comparison on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddss_lightning.files import alone_in, replacing

# Scores by name; None, and the number of images under `not_finite`, where a sampler made images that are not finite.
Cell = dict[str, float | None]


class Scores:
    """Scores on disk, so that what is finished is never computed again. Each write replaces the file at once.

    `cells` are those that were there at the start, and what this comparison has added: of several processes all have
    the same, whatever another comparison puts into the file meanwhile.

    Args:
        path: the file; there need not be one yet.
        protocol: see `protocol_of`.

    Raises:
        ValueError: a damaged file, or scores of another protocol.
    """

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        # As it comes back from the file: without tuples.
        self.path, self.protocol = path, json.loads(json.dumps(protocol))
        self.cells: dict[str, Cell] = self._stored()

    def _stored(self) -> dict[str, Cell]:
        if not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_text())
            known, cells = dict(stored["protocol"]), dict(stored["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The scores in '{self.path}' are damaged ({error}); delete the file, or give another --output."
            ) from error
        if known != self.protocol:
            keys = dict.fromkeys([*self.protocol, *known])
            changed = [key for key in keys if known.get(key) != self.protocol.get(key)]
            raise ValueError(
                f"'{self.path}' holds scores of another protocol (different: {', '.join(changed)}); give another "
                "--output."
            )
        return cells

    def put(self, key: str, cell: Cell) -> None:
        """Keep one cell, beside those that another comparison has put there meanwhile.

        Raises:
            ValueError: the file was damaged meanwhile, or is of another protocol.
        """
        self.cells[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(self.path.parent), replacing(self.path) as partial:
            cells = {**self._stored(), **self.cells}
            partial.write_text(json.dumps({"protocol": self.protocol, "cells": dict(sorted(cells.items()))}, indent=1))
