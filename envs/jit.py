"""``@kernel``: numba's ``njit`` with a cache of its own (``kernel_cache``).

With ``NUMBA_DISABLE_JIT=1`` kernels stay plain Python functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numba
from numba.core import config

from servegym.envs.errors import ServegymError
from servegym.envs.kernel_cache import KernelCache

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile ``function`` on first call (no Python objects) and cache the machine code on disk.

    A kernel makes and returns no array or list, so references are not counted. It is inlined into its
    callers: a call would copy the hundred words of ``State`` and ``CostTables``. Counting (two atomic
    additions for each array) and copying took three quarters of a step's time.
    """
    return _cached(function, _nrt=False, forceinline=True)


def rare_kernel(function: Function) -> Function:
    """Do as ``kernel``, not inlined: for code that few tasks run, so that its callers stay small."""
    return _cached(function, _nrt=False)


def allocating_kernel(function: Function) -> Function:
    """Do as ``kernel``, not inlined, for a function that makes arrays or draws random numbers."""
    return _cached(function, _nrt=True)


def parallel_kernel(function: Function) -> Function:
    """Do as ``allocating_kernel``, and run ``prange`` loops on numba's threads.

    For calls from Python only. A call raises ``ServegymError`` in a process that was forked after its
    parent had started GNU OpenMP's threads: a fork loses them, and the library would end the process.
    """
    compiled = _cached(function, _nrt=True, parallel=True)

    @wraps(function)
    def call(*args: Any) -> Any:
        if _lost_threads:
            raise ServegymError(
                "this process was forked after numba had started threads, which a fork does not "
                "copy; start processes by 'spawn' or 'forkserver', or use one thread"
            )
        return compiled(*args)

    return cast(Function, call)


def _cached(function: Function, **options: bool) -> Function:
    if config.DISABLE_JIT:
        return function
    dispatcher: Any = numba.njit(function, **options)
    dispatcher._cache = KernelCache(function)  # as enable_caching does, with another class
    return cast(Function, dispatcher)


_lost_threads: list[str] = []
"""The threading layer that this process was forked from, if its threads are lost."""


def _note_lost_threads() -> None:
    try:
        layer = numba.threading_layer()
    except ValueError:
        return  # no threads had been started
    if layer == "omp":
        _lost_threads.append(layer)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_lost_threads)
