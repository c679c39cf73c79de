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
    close = closest(asked, list(options))
    return f"; did you mean {'--' * bool(flag)}{close}?" if close else ""


def closest(asked: str, names: list[str]) -> str:
    """The name that is most like what was asked for, or nothing where none is.

    Of a key with many parts, such as `model.lrr`, the last decides among those beside it: what they share tells
    nothing. Where the first parts are none, the whole does.
    """
    part, _, last = asked.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == part}
    elsewhere = {name.rpartition(".")[2]: name for name in names}
    found = difflib.get_close_matches(last, beside, 1)
    if found:
        return beside[found[0]]
    if last in elsewhere:
        return elsewhere[last]
    return "" if beside else next(iter(difflib.get_close_matches(asked, names, 1)), "")
