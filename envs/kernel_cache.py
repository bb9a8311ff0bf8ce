"""Compiled kernels on disk: in folders that only trusted users write, in files with a checked hash.

Numba keys its cache by the file that defines a function, so a cached caller would keep an old callee
of another file. Here the folder's name holds a hash of the kernel's module and of every module that
it imports from servegym or from its own folder, directly or not.

Numba unpickles the files, and unpickling can run code. A folder is used only if it belongs to this
user, to root or to the owner of the sources, and nobody else may write to it. A file is used only if
its content fits the hash in front of it; a damaged file is compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.misc.appdirs import AppDirs

from servegym.envs.compilation import NOTICE, Turn
from servegym.envs.linked_code import (
    from_payload,
    prepare_callees,
    shared_callees,
    to_payload,
)

_ROOT: Final = Path(__file__).resolve().parents[1]
"""The folder that holds ``envs`` and ``baselines``, in a checkout and in an installed package."""

_IMPORT: Final = re.compile(rb"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)

_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


class KernelCache(FunctionCache):
    """Numba's cache of one function, in the folders of ``cache_folders``.

    Parameters
    ----------
    function
        The kernel. Its machine code is read from the first folder that holds it and saved in the
        first that can be written.
    linked
        Keep the code that other kernels link (``LinkedLibrary``), not machine code.
    """

    def __init__(self, function: Callable[..., Any], linked: bool = False) -> None:
        self._name = repr(function)
        self._py_func = function
        self._impl = _LinkedImplementation(function) if linked else _Implementation(function)
        code = function.__code__
        source = _resolved(code.co_filename)
        base = f"{source.stem}.{function.__qualname__}-{code.co_firstlineno}"
        base = base.replace("<", "").replace(">", "")
        version = f"py{sys.version_info[0]}{sys.version_info[1]}{getattr(sys, 'abiflags', '')}"
        folders = cache_folders(source)
        base += "-linked" if linked else ""
        self._cache_file = _Files(folders, source, f"{base}.{version}")
        self._cache_path = str(folders[0])
        self._turn: Turn | None = None
        self.enable()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what is kept of a signature; None where this process is to compile it now.

        Another process that compiles the same kernel is waited for.
        """
        found = super().load_overload(sig, target_context)
        if found is not None or not self._enabled or self._turn is not None:
            return found
        turn = Turn(self._cache_file.lock_paths())
        if turn.take():
            found = super().load_overload(sig, target_context)  # who had the turn may have made it
        if found is None:
            self._turn = turn
            NOTICE.begin()
        else:
            turn.give_back()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled."""
        try:
            super().save_overload(sig, data)
        finally:
            turn, self._turn = self._turn, None
            if turn is not None:
                turn.give_back()
                NOTICE.end()


class _Implementation(CompileResultCacheImpl):
    """How numba turns compiled code into bytes and back, without its search for a folder."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._lineno = function.__code__.co_firstlineno
        # Numba asks the locator to make its folder before it saves; ``_Files`` does that.
        self._locator = SimpleNamespace(
            _py_file=function.__code__.co_filename, ensure_cache_path=lambda: None
        )

    def reduce(self, cres: Any) -> tuple[Any, ...]:
        return shared_callees(cres.library._final_module), self._reduce(cres)

    def rebuild(self, target_context: Any, payload: tuple[Any, ...]) -> Any:
        callees, code = payload
        prepare_callees(callees)
        return self._rebuild(target_context, code)

    def _reduce(self, cres: Any) -> tuple[Any, ...]:
        return super().reduce(cres)

    def _rebuild(self, target_context: Any, code: tuple[Any, ...]) -> Any:
        return super().rebuild(target_context, code)


class _LinkedImplementation(_Implementation):
    """How code that is only linked becomes bytes and comes back."""

    def _reduce(self, cres: Any) -> tuple[Any, ...]:
        return to_payload(cres)

    def _rebuild(self, target_context: Any, payload: tuple[Any, ...]) -> Any:
        return from_payload(target_context, payload)


class _Files:
    """The files of one kernel in several folders; folders that cannot be used are skipped."""

    def __init__(self, folders: Iterable[Path], source: Path, base: str) -> None:
        self._source, self._base = source, base
        self._places = [(folder, _CheckedFiles(str(folder), base, None)) for folder in folders]

    def load(self, key: Any) -> Any:
        """Return the machine code saved under ``key``; None if no folder has it."""
        for folder, files in self._places:
            if is_trusted(folder, self._source):
                machine_code = files.load(key)
                if machine_code is not None:
                    return machine_code
        return None

    def save(self, key: Any, data: Any) -> None:
        """Save in the first folder that can be written; warn once if none can."""
        for folder, files in self._places:
            try:
                make_private_folder(folder, _mode_of_new(folder, self._source))
                if is_trusted(folder, self._source):
                    files.save(key, data)
                    return
            except OSError:
                continue
        _warn_of_no_folder(self._places[-1][0].parent)

    def lock_paths(self) -> Iterator[Path]:
        """Yield where a lock may lie: in the folders that can be used, which are made."""
        for folder, _ in self._places:
            with contextlib.suppress(OSError):
                make_private_folder(folder, _mode_of_new(folder, self._source))
                if is_trusted(folder, self._source):
                    yield folder / f"{self._base}.lock"

    def flush(self) -> None:
        """Empty the index in every trusted folder."""
        for folder, files in self._places:
            if is_trusted(folder, self._source):
                files.flush()


class _CheckedFiles(IndexDataCacheFile):
    """Numba's index and data files, each behind the hash of its content.

    A file that is damaged, or that a concurrent process wrote for another key, counts as missing.
    """

    def load(self, key: Any) -> Any:
        name = self._load_index().get(key)
        content = None if name is None else _read_checked(self._data_path(name))
        if content is None:
            return None
        saved_key, data = pickle.loads(content)
        return data if saved_key == key else None

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def _load_index(self) -> dict[Any, str]:
        content = _read_checked(self._index_path)
        return {} if content is None else pickle.loads(content)

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write_checked(self._index_path, overloads)

    def _save_data(self, name: str, data: Any) -> None:
        self._write_checked(self._data_path(name), data)

    def _write_checked(self, path: str, content: Any) -> None:
        data = self._dump(content)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(data).digest() + data)


def _read_checked(path: str) -> bytes | None:
    """Return the content behind the hash; None if the file is missing or the hash does not fit."""
    file = Path(path)
    try:
        if not file.is_file():
            return None  # reading a pipe may never end
        content = file.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    digest, data = content[:size], content[size:]
    return data if hashlib.sha256(data).digest() == digest else None


def cache_folders(source: Path) -> tuple[Path, ...]:
    """Return the folders for the compiled kernels of a source file, the preferred one first.

    ``NUMBA_CACHE_DIR`` if it is set; else beside the sources, then the user's cache folder.
    """
    name = f"kernels-{_digest(source)}"
    if os.environ.get("NUMBA_CACHE_DIR"):
        return (Path(os.environ["NUMBA_CACHE_DIR"]) / name,)
    users = Path(AppDirs("servegym", appauthor=False).user_cache_dir)
    folders = (source.parent / "__pycache__" / name, users / name)
    return folders if users.is_absolute() else folders[:1]


@cache
def _resolved(path: str) -> Path:
    return Path(path).resolve()


@cache
def _digest(source: Path) -> str:
    """Hash the sources that a kernel's machine code depends on, and what compiles them."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(_imported_by(source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _imported_by(source: Path) -> set[Path]:
    """Return a file and its imports, direct or not, from servegym or from the importing file's folder."""
    sources: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in sources:
            sources.add(path)
            waiting.extend(_direct_imports(path))
    return sources


@cache
def _direct_imports(source: Path) -> tuple[Path, ...]:
    files = []
    for match in _IMPORT.findall(source.read_bytes()):
        package, *rest = match.decode().split(".")
        parts = rest if package == "servegym" else [package, *rest]
        folder = _ROOT if package == "servegym" else source.parent
        files.append(folder.joinpath(*parts).with_suffix(".py"))
    return tuple(path for path in files if path.is_file())


def is_trusted(folder: Path, source: Path) -> bool:
    """Return whether a folder exists and only this user, root or the sources' owner can write to it."""
    try:
        status = folder.stat()
        owners = {os.getuid(), 0, source.stat().st_uid} if hasattr(os, "getuid") else None
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return False
    # Windows knows neither owners nor modes of this kind; its user folders are private.
    return owners is None or (status.st_uid in owners and not status.st_mode & _WRITABLE_BY_OTHERS)


def make_private_folder(folder: Path, mode: int) -> None:
    """Make a folder and its missing parents, with the given mode."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(mode=mode, exist_ok=True)


def _mode_of_new(folder: Path, source: Path) -> int:
    """Return the mode of a new folder: beside the sources every user may read it, else only this one."""
    return 0o755 if folder.is_relative_to(source.parent) else 0o700


@cache
def _warn_of_no_folder(last: Path) -> None:
    """Warn once that no folder can be written; ``last`` was tried last."""
    warnings.warn(
        "compiled kernels cannot be kept, so every start compiles them for a minute or two: "
        f"{last} cannot be written, or another user may write there; set NUMBA_CACHE_DIR to a folder "
        "of your own",
        RuntimeWarning,
        stacklevel=2,
    )
