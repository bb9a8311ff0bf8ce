"""How calls and what they need come to a worker: pickled by value, with the files that they read.

A worker shares no folder with the driver. Workload files go along as bytes, and so do the modules that
lie in the folder of the driver's shell, such as those of users' policies.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from servegym.envs.files import make_folder, read_bytes, write_file
from servegym.envs.playing.policy import Policy
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.workload.cells import is_file


def packed(value: Any) -> bytes:
    """Return a value as bytes for :func:`unpacked` on another machine."""
    stream = io.BytesIO()
    with _by_value(_modules_here()):
        _Pickler(stream).dump(value)
    return stream.getvalue()


def unpacked(data: bytes) -> Any:
    """Return the value; files that came along lie in a folder of this process from now on."""
    return pickle.loads(data)


class Carried:
    """Policies that are made here, once, and played elsewhere, each time from their first state.

    Parameters
    ----------
    make_policy, names
        Makes a policy by its name; agents are read here, so no worker needs their folders.
    """

    def __init__(self, make_policy: Callable[[str], Policy], names: Iterable[str]) -> None:
        self._policies: Mapping[str, bytes] = {name: packed(make_policy(name)) for name in names}

    def __call__(self, name: str) -> Policy:
        """Return a new policy of that name."""
        policy: Policy = unpacked(self._policies[name])
        return policy


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Cloudpickle's, which also takes workload files along."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is WorkloadConfig and is_file(value.source):
            path = Path(value.source)
            # Built without the file: the receiver has none yet, and the configuration would refuse it.
            return _with_file, (dict(vars(value)), path.name, read_bytes(path))
        return super().reducer_override(value)


def _with_file(values: dict[str, Any], name: str, content: bytes) -> WorkloadConfig:
    folder = Path(_folder().name) / hashlib.sha256(content).hexdigest()[:16]
    make_folder(folder)
    path = folder / name
    if not path.exists():
        write_file(path, content)
    return WorkloadConfig(**values | {"source": str(path)})


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return this process's folder of files that came along; removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="servegym-")


def _modules_here() -> list[ModuleType]:
    """Return the modules that were imported from the shell's folder, which workers lack."""
    here = str(Path.cwd() / "_")[:-1]  # with the separator at its end
    found = []
    # Each batch looks at all modules, and an environment in the folder has thousands: by text, then.
    for name, module in list(sys.modules.items()):
        # Not by a module's own __getattr__, as some take long.
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and file.startswith(here):
            place = here + name.replace(".", os.sep)
            if file in (f"{place}.py", f"{place}{os.sep}__init__.py"):
                found.append(module)
    return found


@contextmanager
def _by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Have cloudpickle take what these modules define along, in place of their names."""
    known = cloudpickle.list_registry_pickle_by_value()
    registered = [module for module in modules if module.__name__ not in known]
    for module in registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)
