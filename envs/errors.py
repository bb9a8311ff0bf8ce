"""The error that bad input raises, and helpers that word its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ServegymError(ValueError):
    """Bad input from the user: its message is one line that says what, where and what is valid.

    Examples
    --------
    >>> from servegym.envs import ClusterConfig
    >>> ClusterConfig(clients=0)
    Traceback (most recent call last):
        ...
    servegym.envs.errors.ServegymError: cluster.clients must be a whole number in 1 … 1000000, got 0
    """

    def __init__(self, message: str, key: str | tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.key: tuple[str, ...] = tuple(key.split(".")) if isinstance(key, str) else key
        """The configuration key at fault, as ``("decode", "base")``; empty if unknown."""


_MAX_CHARACTERS = 120


def shown(value: object) -> str:
    """Return a value as a message shows it: its ``repr`` on one line, cut in the middle if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4300 digits
        return f"a value of type {type(value).__name__} that is too long to be shown"
    if "\n" in text:  # the repr of an array, for example
        text = " ".join(text.split())
    if len(text) <= _MAX_CHARACTERS:
        return text
    return (
        f"{text[: _MAX_CHARACTERS // 2]} … {text[-_MAX_CHARACTERS // 4 :]} ({len(text)} characters)"
    )


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the option closest to ``name``, else the list of options."""
    known = [str(option) for option in options]
    if len(name) <= _MAX_CHARACTERS:  # the comparison takes the product of the lengths
        matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if matches:
            return f"; did you mean {matches[0]!r}?"
    return f"; choose from {', '.join(known)}"


def unknown(kind: str, name: object, options: Iterable[str]) -> ServegymError:
    """Build the error for a name that is not among ``options``."""
    return ServegymError(f"unknown {kind} {shown(str(name))}{nearest(str(name), options)}")


_IN_A_CHECKOUT = {"train": "make setup", "tune": "make setup", "engine": "make engine"}


def not_installed(module: str, extra: str) -> ServegymError:
    """Build the error for a package of an extra that is not there."""
    how = f"`pip install 'servegym[{extra}]'`"
    if extra in _IN_A_CHECKOUT:
        how += f", in a checkout by `{_IN_A_CHECKOUT[extra]}`"
    return ServegymError(f"{module} is not installed; get it by {how}")
