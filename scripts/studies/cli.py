"""What the command lines share: arguments as a dataclass, every error as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, TypeVar, get_type_hints

import tyro

from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.files import shortened
from servegym.studies.terminal import BAD_INPUT, STOP_SIGNALS, leave, say

CANNOT_WRITE: Final = 74  # EX_IOERR of sysexits.h
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE
_WRITING: Final = (errno.EBADF, errno.EFBIG, errno.EIO, errno.ENOSPC)

_PLAIN_WORDS = {
    r"^Error parsing (?!-)\S+: ": "",  # a value that the dataclass itself refused
    r"^Error parsing (-\S+): ": r"\1: ",
    r"invalid literal for int\(\) with base 10:": "not a whole number:",
    r"could not convert string to float:": "not a number:",
}

SCRIPTS: Final = Path(__file__).resolve().parents[1]
"""The scripts of the checkout."""

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
    ServegymError
        One line that says what is wrong and names the nearest option; also if a value is of its type
        but out of all bounds: NaN, infinite, beyond 2⁶², an empty path, a text that is not in the
        terminal's encoding.
    SystemExit
        Status 0 after ``--help``.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    _check_paths(kind, tokens)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                return _checked(tyro.cli(kind, args=tokens))
            return _checked(tyro.cli(kind, args=tokens, default=default))
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.stdout.flush()  # here, where an output that is full or closed becomes a line
            raise
    raise ServegymError(_unknown_option(kind, tokens) or _first_paragraph(box.getvalue()))


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


MAX_NUMBER: Final = 2**62
"""No whole number on a command line is larger: numpy's seeds and counts of 64 bits hold it."""


def _checked(args: Args) -> Args:
    """Return the options; refuse values that are of their type and still mean nothing anywhere."""
    for field in dataclasses.fields(args):  # type: ignore[arg-type]
        option, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        if isinstance(value, str | Path):
            _check_text(option, str(value))
        elif isinstance(value, float) and not math.isfinite(value):
            raise ServegymError(f"{option} must be a finite number, got {value}")
        elif isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise ServegymError(f"{option} must be at most {MAX_NUMBER}, got {shown(value)}")
    return args


def _check_text(option: str, text: str) -> None:
    """Refuse a text that no file can hold or be called, before hours are spent on it."""
    if "\0" in text:
        raise ServegymError(f"{option} {shown(text)} holds a NUL character")
    try:
        os.fsencode(text.encode().decode())
    except UnicodeEncodeError:
        raise ServegymError(
            f"{option} {shown(text)} is not in the encoding of this terminal; use plain letters, or "
            "set LC_ALL=C.UTF-8"
        ) from None


def _check_paths(kind: type, tokens: Sequence[str]) -> None:
    """Refuse an empty text as a path, which would be the folder that the shell stands in."""
    paths = [
        f"--{name.replace('_', '-')}" for name, hint in get_type_hints(kind).items() if hint is Path
    ]
    for token, following in zip(tokens, [*tokens[1:], "x"], strict=False):
        option, equals, value = token.replace("_", "-").partition("=")
        if option in paths and not (value if equals else following):
            raise ServegymError(f"{option} is empty; name a path")


def check_number(option: str, value: float, least: float, most: float) -> None:
    """Refuse a number outside its range, NaN included."""
    if not least <= value <= most:
        raise ServegymError(f"{option} must lie in {least} … {most}, got {shown(value)}")


def check_folder(path: Path) -> None:
    """Refuse a folder that could not be made or written to, before hours are spent on what it is to hold.

    Leaves nothing behind where another option is refused afterwards.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    try:
        Path(tempfile.mkdtemp(dir=nearest)).rmdir()
    except OSError as error:
        raise ServegymError(f"{shortened(path)}: cannot be made: {error.strerror}") from None


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before any time is spent on what it is to hold."""
    if path.is_dir():
        raise ServegymError(f"{path}: is a folder; --output names a file")
    if not path.parent.is_dir():
        raise ServegymError(f"{path.parent}: no such folder; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ServegymError(f"{path.parent}: not writable")


def command_line(script: str, **options: object) -> str:
    """Return the command that runs a script with options, quoted as a shell needs it.

    ``time_limit=0.5`` becomes ``--time-limit 0.5``; an empty text is left out.
    """
    words = ["python", f"scripts/{script}.py"]
    for name, value in options.items():
        if value != "":
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's ``main`` and leave with its status.

    Everything that is not the script's own fault is one line on stderr: bad input, and files that
    cannot be read or written, leave with status 2; an output that is closed or full with 74; Ctrl-C
    and the signals of ``kill`` and of a closed terminal with 130, 143 and 129, after all ``finally``
    (a ``KeyboardInterrupt`` may bring its own line). A reader that closes the pipe early (``| head``)
    ends the script silently with 141.
    """
    with _stopping() as stopped_by:
        try:
            status = main(argv)
            sys.stdout.flush()
        except ServegymError as error:
            say(str(error))
            status = BAD_INPUT
        except KeyboardInterrupt as stop:
            number = stopped_by[-1] if stopped_by else signal.SIGINT
            say(str(stop) or ("interrupted" if number == signal.SIGINT else "terminated"))
            status = 128 + number
        except BrokenPipeError:
            _give_up_stdout()
            status = BROKEN_PIPE
        except OSError as error:
            status = _refuse(error)
        except MemoryError as error:
            say(f"not enough memory {error}")
            status = BAD_INPUT
    sys.exit(status)


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """Turn signals that stop a process into ``KeyboardInterrupt``; yields which have come.

    A second one while the first is cleaned up ends the process at once. Signals that are ignored, as
    under ``nohup``, stay so.
    """
    come: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if come:
            leave(number, frame)
        come.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse(error: OSError) -> int:
    """Say what the system has refused; return the status to leave with."""
    words = error.strerror or str(error)
    if error.filename is not None:
        say(f"{shortened(Path(str(error.filename)))}: {words}")
        return BAD_INPUT
    # Without a name it is a stream that could not be written.
    say(f"standard output cannot be written: {words}" if error.errno in _WRITING else words)
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_stdout()
    return CANNOT_WRITE


def _give_up_stdout() -> None:
    """Send stdout to nowhere: Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
