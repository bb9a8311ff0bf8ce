"""How a command starts: signals and streams first, then its imports, which take seconds."""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import get_data, iter_modules
from types import ModuleType
from typing import Final, NoReturn

from servegym.studies import commands
from servegym.studies.terminal import BAD_INPUT, PROGRAMS, begin, say

STUDIES: Final = ("answer", "check", "study")
"""First words of commands that make a page of ``results/``; they are listed apart."""

SHELLS: Final = ("bash", "zsh", "tcsh")
"""Shells that the options can be completed in."""


def run_command(name: str) -> NoReturn:
    """Run ``servegym.studies.commands.<name>`` on this process's arguments; leave with its status."""
    begin()
    _run(name)


def run_servegym() -> NoReturn:
    """Run ``servegym COMMAND …``; leave with its status."""
    begin()
    program = PROGRAMS[sys.argv[0].endswith("__main__.py")]
    first, *others = sys.argv[1:] or ["--help"]
    name = first.replace("-", "_")
    if name in names():
        # What is said on the way, usage lines and notes on how a result was made name the command so.
        sys.argv = [f"{program} {first.replace('_', '-')}", *others]
        _run(name)
    sys.argv[0] = program
    if first in ("-h", "--help"):
        print(overview(program))
    elif first == "--version":
        from importlib.metadata import version

        print(f"servegym {version('servegym')}")
    elif first == "--completion" and len(others) == 1 and others[0] in SHELLS:
        print_completion(others[0])
    else:
        _refuse(first, program)
    sys.exit(0)


def names() -> list[str]:
    """Return the commands, which are the modules of ``servegym.studies.commands``."""
    return sorted(module.name for module in iter_modules(commands.__path__))


def overview(program: str) -> str:
    """Return what there is: a line a command, from its docstring."""
    width = max(map(len, names()))
    usual: list[str] = []
    studies: list[str] = []
    for name in names():
        line = f"  {name.replace('_', '-'):{width}}  {_first_line(name)}"
        (studies if name.partition("_")[0] in STUDIES else usual).append(line)
    return "\n".join(
        (
            f"usage: {program} COMMAND [OPTIONS]    ({program} COMMAND --help lists the options)",
            f"       {program} --version",
            f"       {program} --completion {{{','.join(SHELLS)}}}",
            "",
            "Simulate, schedule, train and compare: serving of large language models.",
            "",
            *usual,
            "",
            "studies and checks, each a page of results/:",
            *studies,
        )
    )


def print_completion(shell: str) -> None:
    """Print what completes commands and options in a shell, as tyro writes it."""
    import tyro

    tyro.extras.subcommand_cli_from_dict(
        {name.replace("_", "-"): _module(name).Args for name in names()},
        prog=PROGRAMS[0],
        args=["--tyro-print-completion", shell],
    )


def _run(name: str) -> NoReturn:
    from servegym.studies.cli import run  # takes long to import, as does the command

    run(lambda argv: int(_module(name).main(argv)))


def _refuse(word: str, program: str) -> NoReturn:
    from servegym.envs.errors import shown, unknown  # takes a second to import

    known = [name.replace("_", "-") for name in names()]
    if word == "--completion":
        say(f"--completion needs one of {', '.join(SHELLS)}")
    elif word.startswith("-"):
        say(f"unexpected {shown(word)}: a command comes first; see {program} --help")
    else:
        say(str(unknown("command", word, known)))
    sys.exit(BAD_INPUT)


def _first_line(name: str) -> str:
    """Return the first line of a command's docstring, from its source: importing it takes seconds."""
    source = get_data(commands.__name__, f"{name}.py")
    assert source is not None
    return source.decode().split('"""')[1].splitlines()[0]


def _module(name: str) -> ModuleType:
    return import_module(f"servegym.studies.commands.{name}")
