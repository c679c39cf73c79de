"""The option that was probably meant by one that does not exist."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from collections.abc import Iterable

# What jsonargparse says of an option on the command line, in a recipe, and of a class.
UNKNOWN = r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'|'([\w.]+)': Option '(\w+)' is not"


def suggestion(message: str, options: Iterable[str]) -> str:
    """What to add to a message about an unknown option: `; did you mean ...?`, or nothing.

    Args:
        message: of the parser.
        options: those of the parser, without dashes, such as `model.lr`. The arguments of a class are looked up.
    """
    found = re.search(UNKNOWN, message)
    if not found:
        return ""
    flag, key, class_path, argument = found.groups()
    asked = flag or key or argument
    if argument:
        try:
            options = inspect.signature(pydoc.locate(class_path)).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return ""
    names = list(options)
    # Of a key with many parts, such as `model.lrr`, the last decides among those beside it.
    part, _, _ = asked.rpartition(".")
    beside = [name for name in names if name.rpartition(".")[0] == part]
    close = difflib.get_close_matches(asked, beside, 1) or difflib.get_close_matches(asked, names, 1)
    return f"; did you mean {'--' * bool(flag)}{close[0]}?" if close else ""
