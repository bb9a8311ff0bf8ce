"""How a script starts: signals and streams first, then the imports of its command."""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

from servegym.studies.terminal import begin


def run_command(name: str) -> NoReturn:
    """Run ``servegym.studies.commands.<name>`` on this process's arguments; leave with its status."""
    begin()
    from servegym.studies.cli import run  # takes long to import, as does the command

    run(import_module(f"servegym.studies.commands.{name}").main)
