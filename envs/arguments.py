"""Checks of what Python callers pass: numpy values become Python's own, wrong values are refused."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servegym.envs.errors import ServegymError, shown, unknown

_NO_NUMBERS: Final = {
    "b": "booleans",
    "c": "complex numbers",
    "M": "dates",
    "m": "durations",
    "S": "bytes",
    "U": "texts",
}
"""What arrays without numbers hold, by the kind of their dtype; for messages."""


def plain(value: Any) -> Any:
    """Return numpy numbers, texts and arrays as Python's own, a path as a text; other values unchanged."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        wide = value.astype(float) if value.dtype.kind == "f" else value
        return wide.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def field_types(cls: Any) -> dict[str, Any]:
    """Return the annotated type of each field of a dataclass; the dict is shared, not a copy."""
    return _resolved(cls)


_resolved = cache(get_type_hints)  # it takes longer than all checks of a dataclass


def as_annotated(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the annotated type; numpy values and paths become Python's own.

    Raises
    ------
    ServegymError
        If ``value`` is not of that type; the message calls it ``name``.
    """
    origin, value = get_origin(hint), plain(value)
    if origin is UnionType:  # with None: the key may be left out; or a name or a table
        if value is None and NoneType in get_args(hint):
            return None
        table = get_args(hint)[1]
        by_name = not is_dataclass(table) or isinstance(value, str)
        return as_annotated(name, value, get_args(hint)[0] if by_name else table)
    if is_dataclass(hint):
        return _as_dataclass(name, value, hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ServegymError(f"{name} must be a list, got {shown(value)}")
        return tuple(
            as_annotated(f"{name}[{k}]", item, get_args(hint)[0]) for k, item in enumerate(value)
        )
    if origin is Literal:  # of texts
        if not (isinstance(value, str) and value in get_args(hint)):
            raise unknown(f"value of {name}:", value, get_args(hint))
        return str.__str__(value)
    if isinstance(value, bool) or not isinstance(value, int | float if hint is float else hint):
        words = {int: "a whole number", float: "a number", str: "a text"}
        raise ServegymError(f"{name} must be {words[hint]}, got {shown(value)}")
    try:
        # An enumeration's text is its value; str() would write its name.
        return str.__str__(value) if hint is str else hint(value)
    except OverflowError:
        raise ServegymError(f"{name} is too large a number") from None


def _as_dataclass(name: str, value: Any, cls: Any) -> Any:
    """Return an instance of ``cls`` as it is, or one made from a table of its keys."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ServegymError(f"{name} must be a table of keys, got {shown(value)}")
    keys = [item.name for item in fields(cls)]
    for key in value:
        if key not in keys:
            raise unknown("key", f"{name}.{key}", [f"{name}.{known}" for known in keys])
    try:
        return cls(**value)
    except ServegymError as error:  # which names the section, not the item of a list
        section = name.partition("[")[0]
        raise ServegymError(str(error).replace(f"{section}.", f"{name}.", 1), error.key) from None


def check_fields(section: str, config: Any) -> None:
    """Refuse fields that do not fit their annotation; store the others as plain Python types."""
    hints = field_types(type(config))
    for item in fields(config):
        value = as_annotated(f"{section}.{item.name}", getattr(config, item.name), hints[item.name])
        object.__setattr__(config, item.name, value)  # the dataclass is frozen


def as_array(values: ArrayLike) -> NDArray[Any]:
    """Return ``values`` as an array; ragged lists become ``array(None)``, which is refused later."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError):
        return np.array(None)


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return ``value`` as an int; Python's and numpy's integers are accepted, booleans are not.

    Raises
    ------
    ServegymError
        If ``value`` is not a whole number in ``least`` … ``most``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ServegymError(f"{name} must be a whole number, got {shown(value)}")
    if number < least or (most is not None and number > most):
        within = f"be ≥ {least}" if most is None else f"lie in {least} … {most}"
        raise ServegymError(f"{name} must {within}, got {shown(number)}")
    return number


def whole_numbers(name: str, values: ArrayLike, least: int, most: int) -> NDArray[np.int64]:
    """Return ``values`` as int64, shape (entries,); an array that fits is not copied.

    Floats are accepted if they are whole.

    Raises
    ------
    ServegymError
        If ``values`` has another number of dimensions, or an entry is not a whole number in
        ``least`` … ``most``; the first such entry is named.
    """
    array = _row(name, values, "whole numbers")
    if array.dtype.kind == "f":
        _refuse_first(name, "be whole numbers", array, array != np.rint(array))
    if array.size and (array.min() < least or array.max() > most):
        outside = (array < least) | (array > most)
        _refuse_first(name, f"lie in {least} … {most}", array, outside)
    return array.astype(np.int64, copy=False)


def real_numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return ``values`` as float64, shape (entries,); an array that fits is not copied.

    Raises
    ------
    ServegymError
        If ``values`` has another number of dimensions or holds anything but numbers.
    """
    return _row(name, values, "numbers").astype(np.float64, copy=False)


def _row(name: str, values: ArrayLike, what: str) -> NDArray[Any]:
    """Return ``values`` as an array of one dimension, of integers or of float64."""
    array = as_array(values)
    if array.ndim != 1:
        got = f"an array of shape {array.shape}" if array.ndim else shown(values)
        raise ServegymError(f"{name} must be a list of {what}, got {got}")
    if np.ma.is_masked(values):
        raise ServegymError(f"{name} must be {what}, got masked entries; fill or drop them first")
    kind = array.dtype.kind
    if kind == "O":
        return np.array([_number(name, what, k, value) for k, value in enumerate(array.tolist())])
    if kind not in "iuf":
        got = _NO_NUMBERS.get(kind, str(array.dtype))
        raise ServegymError(f"{name} must be {what}, got {got}")
    if kind == "f":
        with np.errstate(over="ignore"):  # a number beyond float64 becomes inf
            return array.astype(np.float64, copy=False)
    return array


def _number(name: str, what: str, entry: int, value: Any) -> float:
    """Return an entry of an object array as a float, ±inf if it is beyond 64 bits."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise ServegymError(f"{name} must be {what}, got {shown(value)} (entry {entry})")
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _refuse_first(name: str, rule: str, array: NDArray[Any], bad: NDArray[np.bool_]) -> None:
    """Refuse an array with a bad entry; the message names the first."""
    if bad.any():
        entry = int(np.argmax(bad))
        raise ServegymError(f"{name} must {rule}, got {array[entry]} (entry {entry})")
