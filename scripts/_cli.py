"""What the command lines share: arguments as a dataclass, every error as one line.

Scripts say ``from _cli import parse, run``: the folder of a script that is run comes first on
Python's path, pytest adds it (``pythonpath``), mypy finds the name in ``.typing/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro

from servegym.envs.errors import ServegymError, unknown

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports of an interrupted command
BROKEN_PIPE = 141  # 128 + SIGPIPE

_PLAIN_WORDS = {
    r"^Error parsing (?!-)\S+: ": "",  # a value that the dataclass itself refused
    r"^Error parsing (-\S+): ": r"\1: ",
    r"invalid literal for int\(\) with base 10:": "not a whole number:",
    r"could not convert string to float:": "not a number:",
}

Args = TypeVar("Args")


def parse(kind: type[Args], argv: Sequence[str] | None = None, default: Args | None = None) -> Args:
    """Read the options of a flat dataclass, one ``--option`` per field.

    Parameters
    ----------
    kind
        A frozen dataclass; field docstrings are the help. It may refuse values with
        ``ServegymError`` in ``__post_init__``.
    argv
        Arguments without the program's name; None takes those of this process.
    default
        Values of the options that are not given; None takes the dataclass's own.

    Raises
    ------
    SystemExit
        Status 2 after one line on stderr that says what is wrong and names the nearest option;
        status 0 after ``--help``.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                return tyro.cli(kind, args=tokens)
            return tyro.cli(kind, args=tokens, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    _report(_unknown_option(kind, tokens) or _first_paragraph(box.getvalue()))
    raise SystemExit(BAD_INPUT)


def split_names(text: str) -> list[str]:
    """Return the names of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def read_list(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the names of a comma-separated list, each once; refuse unknown ones."""
    names = split_names(text)
    if not names:
        raise ServegymError(f"{option} names nothing; choose from {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(f"name in {option}:", name, known)
    return names


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's ``main`` and leave with its status.

    Bad input leaves with status 2 and Ctrl-C with 130, each after one line on stderr (a
    ``KeyboardInterrupt`` may bring its own); a reader
    that closes the pipe early (``| head``) ends the script silently.
    """
    try:
        status = main(argv)
        sys.stdout.flush()
    except ServegymError as error:
        _report(str(error))
        status = BAD_INPUT
    except KeyboardInterrupt as stop:
        _report(str(stop) or "interrupted")
        status = INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give that somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    sys.exit(status)


def _report(message: str) -> None:
    """Print one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)


def _unknown_option(kind: type, tokens: Sequence[str]) -> str | None:
    """Describe the first ``--option`` that no field of ``kind`` stands for."""
    fields = {field.name.replace("_", "-"): field.type for field in dataclasses.fields(kind)}
    switches = [f"no-{name}" for name, type_ in fields.items() if type_ in (bool, "bool")]
    known = [f"--{name}" for name in (*fields, *switches, "help")]
    for token in tokens:
        option = token.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            return str(unknown("option", option, known))
    return None


def _first_paragraph(box: str) -> str:
    """Take the words of tyro's message out of its box: all before the first rule, less the title."""
    body = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]
    lines = [line.strip("│╰╯─ ") for line in body]
    end = lines.index("") if "" in lines else len(lines)
    text = " ".join(lines[:end])
    for pattern, plain in _PLAIN_WORDS.items():
        text = re.sub(pattern, plain, text)
    return text or "bad arguments; see --help"
