"""Files that appear whole or not at all, and where what can be made again is kept."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not there on Windows
    fcntl = None  # type: ignore[assignment]


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


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Other processes that ask for the same folder wait until the block ends; nothing is left behind.

    Where the file system knows no locks (Windows, some network drives) nobody waits.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Which also unlocks it.
        os.close(descriptor)


def why_no_folder(path: str | Path) -> str:
    """Why files cannot be put into a folder that need not be there yet; empty if they can. Nothing is made."""
    path = Path(path)
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        return f"'{path}' is no folder, for '{there}' is a file; give another"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"'{path}' cannot be written to, for you may not write to '{there}'; give another"
    return ""


def make_folder(path: str | Path, option: str) -> Path:
    """The folder, made with its parents if need be.

    Args:
        path: of the folder.
        option: where the path was given, for the message.

    Raises:
        ValueError: it cannot be made.
    """
    path = Path(path)
    if problem := why_no_folder(path):
        raise ValueError(f"{option}: {problem}.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: '{path}' cannot be made ({error.strerror}); give another.") from error
    return path


def not_here() -> str:
    """Why a folder that a recipe names may not have been found."""
    return f"there is no such folder, seen from '{Path.cwd()}'; a recipe's paths begin where the command was started"


def is_hub_name(path: str | Path) -> bool:
    """Whether this can name a model on the Hugging Face hub: one slash, and no place in a folder that is here."""
    return not Path(path).exists() and str(path).count("/") == 1 and not Path(path).parent.is_dir()


def fetch_from_hub(name: str, files: Sequence[str]) -> Path:
    """The folder with these files of a model on the Hugging Face hub, in the hub's cache.

    Raises:
        ValueError: no such model or file, no access, no connection and not in the cache.
    """
    from huggingface_hub import hf_hub_download

    try:
        folders = [Path(hf_hub_download(name, file)).parent for file in files]
    # Of a dozen kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"'{name}' could not be fetched from the hub, which was asked, for {not_here()}: {reason}"
        ) from error
    return folders[-1]


def default_cache_dir() -> Path:
    """`ddss_lightning` in `$XDG_CACHE_HOME`, else (as where it is empty) in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddss_lightning"
