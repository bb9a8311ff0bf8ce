"""``@kernel``: numba's ``njit`` with a cache that notices every source change.

Numba keys its cache by the file a function is defined in, so a cached caller keeps an old callee
that lives in another file. Here the cache folder carries a hash of all sources of the package
folders that define kernels: change one and everything compiles anew. With ``NUMBA_DISABLE_JIT=1``
kernels stay plain Python functions.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config

_SIMULATOR = Path(__file__).resolve().parent

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile ``function`` on first call (no Python objects) and cache the machine code on disk.

    A kernel makes and returns no array or list, so it need not count references to those it is
    given, and it is compiled into its callers: ``State`` and ``CostTables`` are over a hundred words,
    which every call would copy, after two atomic additions for each array. Both together took three
    quarters of a step's time.
    """
    return _cached(function, _nrt=False, forceinline=True)


def rare_kernel(function: Function) -> Function:
    """Do as ``kernel`` for what only some tasks run; called as usual, so that callers stay small."""
    return _cached(function, _nrt=False)


def allocating_kernel(function: Function) -> Function:
    """Do as ``kernel`` for a function that makes arrays or draws random numbers; called as usual."""
    return _cached(function, _nrt=True)


def parallel_kernel(function: Function) -> Function:
    """Do as ``allocating_kernel``, and run ``prange`` loops on numba's threads."""
    return _cached(function, _nrt=True, parallel=True)


def _cached(function: Function, **options: bool) -> Function:
    if config.DISABLE_JIT:
        return function
    dispatcher: Any = numba.njit(function, **options)
    folder = Path(function.__code__.co_filename).resolve().parent
    previous = config.CACHE_DIR
    config.CACHE_DIR = str(_cache_folder(folder))
    try:
        dispatcher.enable_caching()
    finally:
        config.CACHE_DIR = previous
    return cast(Function, dispatcher)


@cache
def _cache_folder(folder: Path) -> Path:
    """Where machine code of kernels defined in ``folder`` is kept: beside the sources if possible."""
    digest = hashlib.sha256()
    for source in sorted({*folder.glob("*.py"), *_SIMULATOR.glob("*.py")}):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"]) / name
    beside = folder / "__pycache__"
    if os.access(beside if beside.exists() else folder, os.W_OK):
        return beside / name
    return Path(tempfile.gettempdir()) / f"servegym-{os.getuid()}" / name
