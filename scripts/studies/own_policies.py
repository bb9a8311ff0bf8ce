"""Anybody's policy by name: ``package.module:Class`` or ``package.module:Class(key=value)``."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from servegym.baselines.catalogue import REGISTRY
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.playing.policy import Policy

_NAME: Final = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)(?:\((.*)\))?")

_NEEDED: Final = ("act", "prepare", "decisions", "comparison")
"""What ``play`` asks of a policy; ``servegym.envs.Policy`` has all but ``act``."""


def is_own_policy(name: str) -> bool:
    """Return whether a name is of the form ``module:Class``; ``rollout:BASE`` is a baseline."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] not in REGISTRY


def make_own_policy(name: str) -> Policy:
    """Return a new policy: what the class, or the function, of a module returns.

    The module is looked for in the folder that the shell stands in, then among installed packages.

    Raises
    ------
    ServegymError
        If the module cannot be imported, lacks the class, or its object is no policy.
    """
    _, attribute, text = _parts(name)
    module = _module(name)
    if not hasattr(module, attribute):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise unknown(f"name in {module.__name__}:", attribute, public)
    maker = getattr(module, attribute)
    if not callable(maker) or inspect.isabstract(maker):
        raise ServegymError(
            f"policy {name!r}: {attribute} is neither a class that can be built nor a function"
        )
    values = _values(name, text)
    try:
        inspect.signature(maker).bind(**values)
    except TypeError as error:
        raise ServegymError(f"policy {name!r}: {attribute}: {error}") from None
    policy = maker(**values)
    for member in _NEEDED:
        if not hasattr(policy, member):
            raise ServegymError(
                f"policy {name!r}: {shown(policy)} has no {member!r}; derive its class from "
                "servegym.envs.Policy"
            )
    return policy


def source_hash(name: str) -> str:
    """Return the SHA-256 of the source file of a policy's module, in hexadecimal.

    What the module imports is not covered.
    """
    source = getattr(_module(name), "__file__", None)
    return hashlib.sha256(Path(source).read_bytes() if source else b"").hexdigest()


def _parts(name: str) -> tuple[str, str, str]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return match[1], match[2], match[3] or ""


def _module(name: str) -> ModuleType:
    module = _parts(name)[0]
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # first: a script's own folder has modules such as train
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise ServegymError(
                f"policy {name!r}: no module {error.name!r} in {here} or among the installed packages"
            ) from None
        raise ServegymError(f"policy {name!r}: {module} cannot be imported: {error}") from None
    except Exception as error:  # whatever the module does while it is imported
        words = f"{type(error).__name__}: {error}"
        raise ServegymError(f"policy {name!r}: {module} cannot be imported: {words}") from None


def _values(name: str, text: str) -> dict[str, Any]:
    """Return the keyword arguments of a name: Python literals."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError
        keys = [word.arg for word in call.keywords]
        if None in keys:
            raise ValueError
        values = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, TypeError, ValueError):
        raise ServegymError(
            f"policy {name!r}: write key=value with numbers, 'texts', True, False or None, not "
            f"{text!r}"
        ) from None
    if len(values) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ServegymError(f"policy {name!r}: {twice} is given twice")
    return values
