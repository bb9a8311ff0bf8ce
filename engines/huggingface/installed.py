"""Which transformers work here, and how to get one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from servegym.envs.errors import ServegymError, not_installed

TESTED: Final = ((5, 17), (5, 25))
"""Versions of transformers: from, and before."""


def check_installed() -> str:
    """Return the version of transformers that is installed.

    Raises
    ------
    ServegymError
        If it, or torch, is missing, or lies outside the versions that work here; says how to get it.
    """
    first, after = (".".join(map(str, each)) for each in TESTED)
    wanted = f"transformers>={first},<{after}"
    try:
        found = version("transformers")
        version("torch")
    except PackageNotFoundError as error:
        raise not_installed(str(error.name), "engine") from None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers < TESTED[1]:
        raise ServegymError(
            f"transformers is {found}, the engine needs {wanted}; get it by `pip install '{wanted}'`"
        )
    return found
