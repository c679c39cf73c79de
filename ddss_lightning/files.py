"""Files that appear whole or not at all, and where what can be made again is kept."""

from __future__ import annotations

import os
import secrets
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
    # Processes on two machines can have one number, and one folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def made_folder(path: str | Path, name: str) -> Path:
    """A folder that can be written to later on, made now.

    Args:
        path: of the folder.
        name: of the option that gives it, for the message.

    Raises:
        ValueError: it is a file, or cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{name}: '{path}' is no folder and cannot be made ({error.strerror}); give another."
        ) from error
    return Path(path)


def not_here() -> str:
    """Why a folder that a recipe names may not have been found."""
    return f"there is no such folder, seen from '{Path.cwd()}'; a recipe's paths begin where the command was started"


def default_cache_dir() -> Path:
    """`ddss_lightning` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ddss_lightning"
