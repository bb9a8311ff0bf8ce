"""``@kernel``: numba's ``njit`` with a cache of its own (``kernel_cache``).

With ``NUMBA_DISABLE_JIT=1`` kernels stay plain Python functions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, Final, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.registry import CPUDispatcher
from numba.core.sigutils import normalize_signature
from numba.core.types.misc import unliteral
from numba.extending import intrinsic

import servegym.envs.bundle_type  # noqa: F401 (tells numba of bundles)
from servegym.envs.errors import ServegymError
from servegym.envs.kernel_cache import KernelCache
from servegym.envs.linked_code import LinkedCompiler, shared_entry

LINE_BYTES: Final = 64
"""Bytes of a line of the processor's cache."""

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile ``function`` on first call (no Python objects) and cache the machine code on disk.

    A kernel makes and returns no array or list, so references are not counted. It is inlined into its
    callers.
    """
    return _cached(function, _Inlined, _nrt=False, forceinline=True)


def shared_kernel(function: Function) -> Function:
    """Do as ``kernel``, but compile once: callers call the machine code, which takes some 5 ns.

    For what is long and has several callers, and for what few tasks run or few stages need.
    """
    return _cached(function, _Shared, _nrt=False, forceinline=False)


def allocating_kernel(function: Function) -> Function:
    """Do as ``shared_kernel`` for a function that makes arrays or draws random numbers.

    Without the option a kernel would inherit it from the first caller that is compiled.
    """
    return _cached(function, _Shared, _nrt=True, forceinline=False)


def threaded_kernel(function: Function) -> Function:
    """Do as ``shared_kernel`` for calls from several Python threads, which then run side by side.

    For calls that take milliseconds. Numba's threads start faster, but ``prange`` compiled the expert's
    rollouts three times more, for 22 CPU-s.
    """
    return _cached(function, _Shared, _nrt=False, forceinline=False, nogil=True)


def move_records(array: Any, target: int, source: int, count: int) -> None:
    """Copy ``count`` entries of a contiguous array from ``source`` on to ``target`` on; both may overlap."""
    array[target : target + count] = array[source : source + count].copy()


def fetch_ahead(array: Any, first: int, count: int) -> None:
    """Ask the processor for ``count`` entries of a contiguous array from ``first`` on, without waiting."""


def count_bits(word: int) -> int:
    """Return how many bits of a whole number ≥ 0 are set."""
    return int(word).bit_count()


def binary_parts(number: float) -> tuple[float, int]:
    """Return mantissa, ½ … 1, and exponent of a normal number > 0."""
    return math.frexp(number)


def lowest_bit(word: int) -> int:
    """Return the place of the lowest set bit of a whole number > 0."""
    return (int(word) & -int(word)).bit_length() - 1


def highest_bit(word: int) -> int:
    """Return the place of the highest set bit of a whole number > 0."""
    return int(word).bit_length() - 1


if not config.DISABLE_JIT:

    @intrinsic
    def move_records(_: Any, array: Any, target: Any, source: Any, count: Any) -> Any:
        """Do so by one call of ``memmove``: numba copies entries one by one."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values = context.make_array(array)(context, builder, arguments[0])
            to, start = (builder.gep(values.data, [place]) for place in arguments[1:3])
            cgutils.raw_memmove(builder, to, start, arguments[3], values.itemsize)
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp, types.intp), emit

    @intrinsic
    def fetch_ahead(_: Any, array: Any, first: Any, count: Any) -> Any:
        """Do so by one instruction a cache line."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values = context.make_array(array)(context, builder, arguments[0])
            size, number = values.itemsize, cgutils.int32_t
            takes = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
            fetch = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), takes)
            memory = builder.bitcast(values.data, cgutils.voidptr_t)
            start, more = (builder.mul(size, places) for places in arguments[1:])
            line = context.get_constant(types.intp, LINE_BYTES)
            with cgutils.for_range_slice(builder, start, builder.add(start, more), line) as (at, _):
                builder.call(fetch, [builder.gep(memory, [at]), number(0), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp), emit

    @intrinsic
    def count_bits(_: Any, word: Any) -> Any:
        """Do so by one instruction."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.ctpop(arguments[0])

        return types.int64(types.int64), emit

    @intrinsic
    def binary_parts(_: Any, number: Any) -> Any:
        """Do so by the number's bits: numba calls a library twice."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = context.get_value_type(types.int64)
            bits = builder.bitcast(arguments[0], word)
            exponent = builder.sub(builder.lshr(bits, word(52)), word(1022))
            half = builder.or_(builder.and_(bits, word((1 << 52) - 1)), word(1022 << 52))
            mantissa = builder.bitcast(half, context.get_value_type(types.float64))
            return context.make_tuple(builder, signature.return_type, (mantissa, exponent))

        return numba.typeof((0.0, 0))(types.float64), emit

    @intrinsic
    def lowest_bit(_: Any, word: Any) -> Any:
        """Do so by one instruction."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

        return types.int64(types.int64), emit

    @intrinsic
    def highest_bit(_: Any, word: Any) -> Any:
        """Do so by one instruction and a subtraction."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            above = builder.ctlz(arguments[0], context.get_constant(types.boolean, True))
            return builder.sub(context.get_constant(types.int64, 63), above)

        return types.int64(types.int64), emit


def parallel_kernel(function: Function) -> Function:
    """Do as ``allocating_kernel``, and run ``prange`` loops on numba's threads.

    For calls from Python only. A call raises ``ServegymError`` in a process that was forked after its
    parent had started GNU OpenMP's threads: a fork loses them, and the library would end the process.
    """
    compiled = _cached(function, _Shared, _nrt=True, parallel=True)

    @wraps(function)
    def call(*args: Any) -> Any:
        if _lost_threads:
            raise ServegymError(
                "this process was forked after numba had started threads, which a fork does not "
                "copy; start processes by 'spawn' or 'forkserver', or use one thread"
            )
        return compiled(*args)

    return cast(Function, call)


def _cached(function: Function, dispatcher: type[_Inlined | _Shared], **options: bool) -> Function:
    if config.DISABLE_JIT:
        return function
    options |= {"nopython": True, "no_cfunc_wrapper": True}  # nobody passes a kernel to C
    return cast(Function, dispatcher(function, {}, options))


class _Inlined(CPUDispatcher):  # type: ignore[misc]
    """A compiled function: machine code for calls from Python, linked code for calls from kernels.

    Numba compiles a callee again for each constant among its arguments. Here a constant counts as any
    number of its type: row 0 had a second copy of the whole simulator, and a cold start took 15 CPU-s more.
    What kernels link is made when one is first compiled: a process that finds all of them on disk needs none.
    """

    def __init__(
        self, function: Callable[..., Any], types_of_locals: Any, options: dict[str, Any]
    ) -> None:
        super().__init__(function, types_of_locals, options)
        self._cache = KernelCache(function)  # as enable_caching does, with another class

    @cached_property
    def _linked(self) -> CPUDispatcher:
        options = self.targetoptions | {"no_cpython_wrapper": True}
        linked = CPUDispatcher(self.py_func, self.locals, options, LinkedCompiler)
        linked._cache = KernelCache(self.py_func, linked=True)
        return linked

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Compile for a call from a kernel."""
        return self._linked.get_call_template([unliteral(each) for each in args], kws)

    def get_overload(self, sig: Any) -> Any:
        """Return what a kernel's call is linked to."""
        return self._linked.get_overload(sig)


class _Shared(CPUDispatcher):  # type: ignore[misc]
    """A compiled function whose machine code is called by kernels as well; see ``_Inlined``."""

    def __init__(
        self, function: Callable[..., Any], types_of_locals: Any, options: dict[str, Any]
    ) -> None:
        super().__init__(function, types_of_locals, options)
        self._cache = KernelCache(function)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Compile for a call from a kernel."""
        return super().get_call_template([unliteral(each) for each in args], kws)

    def get_overload(self, sig: Any) -> Any:
        """Return what a kernel's call goes to: a symbol that stands for the machine code."""
        compiled = self.overloads[tuple(normalize_signature(sig)[0])]
        return shared_entry(self.py_func, compiled)


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
