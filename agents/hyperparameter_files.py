"""Hyper-parameters in a file, TOML or JSON, as ``tune_agent`` writes and ``train`` takes them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from servegym.agents.hyperparameters import Hyperparameters, check_value
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.files import beyond_limits, read_json, read_text, write_file

KIND: Final = "file of hyper-parameters"
NAMES: Final = tuple(item.name for item in fields(Hyperparameters))


def read_hyperparameters(path: Path) -> dict[str, Any]:
    r"""Return the hyper-parameters that a file sets: JSON where its name ends in ``.json``, else TOML.

    Each value is checked by itself; whether they fit together ``Hyperparameters`` says.

    Raises
    ------
    ServegymError
        If the file cannot be read or is damaged, a key is no hyper-parameter, or a value is of
        another type or out of range. One line: file, key, nearest valid value.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "best.toml"
    ...     _ = path.write_text("width = 64\nlearning_rate = 2e-3\n")
    ...     read_hyperparameters(path)
    {'width': 64, 'learning_rate': 0.002}
    """
    content = read_json(path, KIND) if path.suffix.lower() == ".json" else _read_toml(path)
    if not isinstance(content, dict):
        raise ServegymError(f"{path}: must hold a table of hyper-parameters, got {shown(content)}")
    kinds: dict[str, Any] = {item.name: type(item.default) for item in fields(Hyperparameters)}
    read: dict[str, Any] = {}
    for name, value in content.items():
        if name not in kinds:
            raise ServegymError(f"{path}: {unknown('hyper-parameter', name, NAMES)}")
        try:
            check_value(name, value)
        except ServegymError as error:
            raise ServegymError(f"{path}: {error}") from None
        read[name] = kinds[name](value)
    return read


def write_hyperparameters(path: Path, values: Mapping[str, Any], comment: str = "") -> None:
    """Write values as TOML, or as JSON where the name ends in ``.json``; TOML begins with the comment."""
    if path.suffix.lower() == ".json":
        write_file(path, json.dumps(dict(values), indent=1) + "\n")
        return
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
    write_file(path, "\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _read_toml(path: Path) -> dict[str, Any]:
    text = read_text(path, KIND)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ServegymError(f"{path}: not TOML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ServegymError(f"{path}: not TOML that can be read: {beyond_limits(error)}") from None
