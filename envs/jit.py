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
from numba.core.registry import CPUDispatcher
from numba.core.types.misc import unliteral

from servegym.envs.errors import ServegymError
from servegym.envs.kernel_cache import KernelCache
from servegym.envs.linked_code import LinkedCompiler

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile ``function`` on first call (no Python objects) and cache the machine code on disk.

    A kernel makes and returns no array or list, so references are not counted. It is inlined into its
    callers: a call would copy the hundred words of ``State`` and ``CostTables``. Counting (two atomic
    additions for each array) and copying took three quarters of a step's time.
    """
    return _cached(function, _nrt=False, forceinline=True)


def rare_kernel(function: Function) -> Function:
    """Do as ``kernel``, not inlined: for what few tasks run or few stages need.

    Its callers stay small, so they compile sooner; a call takes about 50 ns.
    """
    return _cached(function, _nrt=False, forceinline=False)


def allocating_kernel(function: Function) -> Function:
    """Do as ``kernel``, not inlined, for a function that makes arrays or draws random numbers.

    Without the option a kernel would inherit it from the first caller that is compiled.
    """
    return _cached(function, _nrt=True, forceinline=False)


def threaded_kernel(function: Function) -> Function:
    """Do as ``kernel``, not inlined, for calls from several Python threads, which then run side by side.

    For calls that take milliseconds. Numba's threads start faster, but ``prange`` compiled the expert's
    rollouts three times more, for 22 CPU-s.
    """
    return _cached(function, _nrt=False, forceinline=False, nogil=True)


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
    options |= {"nopython": True, "no_cfunc_wrapper": True}  # nobody passes a kernel to C
    return cast(Function, _Dispatcher(function, {}, options))


class _Dispatcher(CPUDispatcher):  # type: ignore[misc]
    """A compiled function: machine code for calls from Python, linked code for calls from kernels.

    Numba compiles a callee again for each constant among its arguments. Here a constant counts as any
    number of its type: row 0 had a second copy of the whole simulator, and a cold start took 15 CPU-s more.
    """

    def __init__(
        self, function: Callable[..., Any], types_of_locals: Any, options: dict[str, Any]
    ) -> None:
        super().__init__(function, types_of_locals, options)
        self._cache = KernelCache(function)  # as enable_caching does, with another class
        options = options | {"no_cpython_wrapper": True}
        self._linked = CPUDispatcher(function, types_of_locals, options, LinkedCompiler)
        self._linked._cache = KernelCache(function, linked=True)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Compile for a call from a kernel."""
        return self._linked.get_call_template([unliteral(each) for each in args], kws)

    def get_overload(self, sig: Any) -> Any:
        """Return what a kernel's call is linked to."""
        return self._linked.get_overload(sig)


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
