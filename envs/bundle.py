"""Arrays and numbers that kernels get by one pointer, whatever their number.

Numba passes a named tuple of arrays by value: twenty arrays are two hundred words. Each call from Python
unpacks them, 0.1 µs an array, and a call between kernels copies them. A ``Bundle`` is a frozen dataclass to
Python. To kernels it is the address of a table with the address and shape of each array
(``bundle_type``). The table never changes, so machine code may read it once.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Bundle:
    """Base class of frozen dataclasses of C-contiguous arrays, numbers and other bundles.

    Kernels read ``bundle.field`` and ``bundle.array[i]`` and write ``bundle.array[i] = x``.

    Examples
    --------
    >>> from dataclasses import dataclass, replace
    >>> @dataclass(frozen=True, eq=False)
    ... class Lengths(Bundle):
    ...     tokens: np.ndarray
    ...     limit: int
    >>> replace(Lengths(np.array([3, 4]), 5), limit=7).by_name()["limit"]
    7
    """

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        """Addresses, shapes and numbers in the order of the fields."""
        words: list[int] = []
        for value in self.by_name().values():
            if isinstance(value, np.ndarray):
                words += [value.ctypes.data, *value.shape]
            elif isinstance(value, Bundle):
                words.append(value._address)
            elif isinstance(value, float):
                words.append(int(np.float64(value).view(np.int64)))
            else:
                words.append(int(value))
        return np.array(words, np.int64)

    @cached_property
    def _address(self) -> int:
        return self._table.ctypes.data

    def by_name(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy, in this process or another, have a table of its own."""
        return type(self), tuple(self.by_name().values())
