"""The one error that bad input raises, and the words it uses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ServegymError(ValueError):
    """Bad input from the user: its message is one line that says what, where and what is valid."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key
        """The configuration key to blame, as ``decode.base``; empty where that is not known."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the option closest to ``name``, else the list of options."""
    known = [str(option) for option in options]
    matches = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; choose from {', '.join(known)}"


def unknown(kind: str, name: object, options: Iterable[str]) -> ServegymError:
    """Build the error for a name that is not among ``options``."""
    return ServegymError(f"unknown {kind} {str(name)!r}{nearest(str(name), options)}")
