"""Files that appear whole or not at all, and where what can be made again is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; what was written takes the place of `path` when the block ends.

    A process that is killed, or an error in the block, leaves what was at `path` as it was. The name is in the same
    folder, hence on the same file system: only there is a rename one step. It is hidden and ends in `.partial`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def not_here() -> str:
    """Why a folder that a recipe names may not have been found."""
    return f"there is no such folder, seen from '{Path.cwd()}'; a recipe's paths begin where the command was started"


def default_cache_dir() -> Path:
    """`ddss_lightning` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ddss_lightning"
