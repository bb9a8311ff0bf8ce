"""Every name that a package exports has an example in its docstring, and the examples hold."""

from __future__ import annotations

import doctest
import importlib
import inspect
from typing import Any

import pytest

PACKAGES = ("servegym.envs", "servegym.baselines", "servegym.agents", "servegym.engines")


def exported(package: str) -> list[tuple[str, str]]:
    """Classes and functions that a package exports; constants have no docstring of their own."""
    module = importlib.import_module(package)
    things = {name: getattr(module, name) for name in module.__all__}
    return [(package, name) for name, thing in things.items() if callable(thing)]


def failures(thing: Any, name: str) -> tuple[int, list[str]]:
    """How many examples a docstring has, and what those printed that fail."""
    module = inspect.getmodule(thing)
    assert module is not None
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(thing) or "", dict(vars(module)), name, None, 0
    )
    count = len(test.examples)
    printed: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=printed.append)
    return count, printed


@pytest.mark.parametrize(
    ("package", "name"), [pair for package in PACKAGES for pair in exported(package)]
)
def test_an_exported_name_has_an_example_that_holds(package: str, name: str) -> None:
    count, printed = failures(getattr(importlib.import_module(package), name), name)
    assert count > 0, f"{package}.{name} has no example"
    assert printed == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_examples_of_a_package_hold(package: str) -> None:
    _, printed = failures(importlib.import_module(package), package)
    assert printed == []


def test_a_wrong_example_is_seen() -> None:
    def wrong() -> None:
        """>>> 1 + 1
        3
        """

    count, printed = failures(wrong, "wrong")
    assert count == 1
    assert "Expected:" in "".join(printed)
