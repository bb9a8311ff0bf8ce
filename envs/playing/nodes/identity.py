"""What a worker must have in common with the driver, so that its results are the driver's to the last bit."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from servegym.envs.errors import ServegymError

_ROOMS: Final = ("envs", "baselines", "agents", "studies")
_PACKAGES: Final = ("numpy", "numba", "scipy", "highspy")  # what draws, compiles, plans and solves
_SOURCES: Final = "sources"


@cache
def identity() -> Mapping[str, str]:
    """Return versions by name: servegym and a hash of its sources, Python, what results depend on."""
    python = ".".join(platform.python_version_tuple()[:2])
    return versions(("servegym", *_PACKAGES)) | {"Python": python, _SOURCES: _sources()}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return versions by package; that of one which is not installed says so."""
    return {package: _version(package) for package in packages}


def check_same(worker: str, found: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse a worker of another version; the line names the worker and both versions."""
    for name, wanted in here.items():
        has = found.get(name, "none")
        if has == wanted:
            continue
        if name == _SOURCES:
            text = f"servegym {here['servegym']} of other sources ({has}, here {wanted})"
        else:
            text = f"{name} {has}, here {wanted}"
        raise ServegymError(f"worker {worker} has {text}; install the same there")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path, for example
        return "not installed"


def _sources() -> str:
    """Hash every module and every file of data: a version's number says little in a checkout."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        spec = find_spec(f"servegym.{room}")
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("data/*.json")]):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
