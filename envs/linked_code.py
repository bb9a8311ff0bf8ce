"""Kernels as other kernels call them: as code to inline, or as machine code that all callers share.

Numba copies a callee's code into every caller, optimises it there again, and emits machine code for all of
these copies and for the callee. Here a callee is one of two kinds. What is inlined has no machine code of
its own (``LinkedCompiler``). What is shared is compiled once, and callers know no more of it than a symbol
(``shared_entry``): compiling every kernel takes a third of the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import copy
from importlib import import_module
from typing import Any, Final, NamedTuple

import llvmlite.binding as llvm
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, compile_result


class LinkedCompiler(Compiler):  # type: ignore[misc]
    """Numba's compiler with a ``LinkedLibrary`` for the code."""

    def define_pipelines(self) -> Any:
        """Return numba's passes."""
        codegen = self.state.targetctx.codegen()
        self.state.library = LinkedLibrary(codegen, self.state.func_id.func_qualname)
        return super().define_pipelines()


class LinkedLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that the execution engine never gets. It is its own ``codegen`` towards ``get_executable``."""

    def get_pointer_to_function(self, name: str) -> int:
        """Return the null pointer: nothing here can be called from Python."""
        return 0

    @property
    def codegen(self) -> Any:
        """What sets environments; a kernel's callers have their own."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Do nothing: the engine holds no variable for it."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


_PREFIX: Final = "servegym:"
"""Of the symbols of shared machine code."""

Callee = tuple[str, str, tuple[Any, ...]]
"""A kernel whose machine code is called: module, name and types of the arguments."""


class _Entry(NamedTuple):
    function: Callable[..., Any]
    key: object  # what numba's calls are linked to
    callee: Callee


_ENTRIES: Final[dict[str, _Entry]] = {}
"""By symbol. A module that is loaded anew has new functions, and its symbols then stand for these."""


def shared_entry(function: Callable[..., Any], compiled: Any) -> Any:
    """Return what calls to a kernel's machine code are linked to."""
    arguments = compiled.signature.args
    digest = hashlib.sha256(repr(arguments).encode()).hexdigest()[:8]
    symbol = f"{_PREFIX}{function.__module__}.{function.__qualname__}:{digest}"
    known = _ENTRIES.get(symbol)
    if known is not None and known.function is function:
        return known.key
    llvm.add_symbol(
        symbol, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    )
    description = copy(compiled.fndesc)
    description.mangled_name = symbol
    key = object()
    compiled.target_context.insert_user_function(key, description, ())
    callee = function.__module__, function.__qualname__, arguments
    _ENTRIES[symbol] = _Entry(function, key, callee)
    return key


def shared_callees(module: llvm.ModuleRef) -> list[Callee]:
    """Return the kernels whose machine code a module calls."""
    symbols = (each.name for each in module.functions if each.is_declaration)
    return [_ENTRIES[symbol].callee for symbol in symbols if symbol.startswith(_PREFIX)]


def prepare_callees(callees: list[Callee]) -> None:
    """Load or compile these kernels, so that code which calls them can be loaded."""
    for module, name, arguments in callees:
        dispatcher = getattr(import_module(module), name)
        dispatcher.compile(arguments)
        shared_entry(dispatcher.py_func, dispatcher.overloads[arguments])


def to_payload(compiled: Any) -> tuple[Any, ...]:
    """Return what ``from_payload`` makes the same code of, in another process."""
    library = compiled.library
    compiled.fndesc.typemap = compiled.fndesc.calltypes = None  # as numba does: they may not pickle
    bitcode = library._final_module.as_bitcode()
    return library.name, bitcode, compiled.fndesc, compiled.environment, compiled.signature


def from_payload(target_context: Any, payload: tuple[Any, ...]) -> Any:
    """Return numba's result of a compilation."""
    name, bitcode, description, environment, signature = payload
    library = LinkedLibrary(target_context.codegen(), name)
    library._final_module = llvm.parse_bitcode(bitcode)
    library._finalize_final_module()
    return compile_result(
        target_context=target_context,
        typing_context=target_context.typing_context,
        library=library,
        environment=environment,
        entry_point=target_context.get_executable(library, description, environment),
        fndesc=description,
        signature=signature,
        objectmode=False,
        lifted=(),
        reload_init=(),
        referenced_envs=(),
    )
