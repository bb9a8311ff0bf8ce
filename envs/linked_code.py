"""Kernels as other kernels call them: optimised code to inline or link, without machine code of its own.

Numba emits machine code for every function, with a wrapper for Python, though a caller has a copy of its
own and never runs that code. Emitting it for the entry points alone takes 56 instead of 74 CPU-s for all
kernels.
"""

from __future__ import annotations

from typing import Any

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
