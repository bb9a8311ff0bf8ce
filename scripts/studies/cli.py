"""What the command lines share: arguments as a dataclass, every error as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar, get_type_hints

import tyro

from servegym.envs.errors import ServegymError, nearest, not_installed, shown, unknown
from servegym.envs.files import shortened
from servegym.envs.playing.parallel import check_jobs
from servegym.studies.terminal import BAD_INPUT, STOP_SIGNALS, called, leave, say

CANNOT_WRITE: Final = 74  # EX_IOERR of sysexits.h
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE
_WRITING: Final = (errno.EBADF, errno.EFBIG, errno.EIO, errno.ENOSPC)

EXTRAS: Final = dict.fromkeys(("sb3_contrib", "stable_baselines3", "tensorboard", "torch"), "train")
"""By module, the extra that brings it, where no room says so itself."""

SCRIPTS: Final = Path(__file__).resolve().parents[1]
"""The scripts of the checkout."""

Args = TypeVar("Args")


def parse(cls: type[Args], argv: Sequence[str] | None = None, default: Args | None = None) -> Args:
    """Read the options of a flat dataclass, one ``--option`` per field.

    Parameters
    ----------
    cls
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
        terminal's encoding, more ``jobs`` than any script takes.
    SystemExit
        Status 0 after ``--help``.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    _check_paths(cls, tokens)
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro explains itself on many lines
            args = tyro.cli(cls, args=tokens, **defaults)
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.stdout.flush()  # here, where an output that is full or closed becomes a line
            raise
        refusal = _refusal_of(stop) or _explain(cls, tokens, default is None)
    else:
        return _checked(args)
    raise ServegymError(refusal)


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
    for field in _fields(type(args)):
        option, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        if isinstance(value, str | Path):
            _check_text(option, str(value))
        elif isinstance(value, float) and not math.isfinite(value):
            raise ServegymError(f"{option} must be a finite number, got {value}")
        elif field.name == "jobs":
            check_jobs(value)
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


def _check_paths(cls: type, tokens: Sequence[str]) -> None:
    """Refuse an empty text as a path, which would be the folder that the shell stands in."""
    paths = [
        f"--{name.replace('_', '-')}" for name, hint in get_type_hints(cls).items() if hint is Path
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


def command_line(script: str, *words: str, **options: object) -> str:
    """Return the command that runs a script with words and options, quoted as a shell needs it.

    It is called as this process was: ``python scripts/NAME.py`` or ``servegym NAME``.
    ``time_limit=0.5`` becomes ``--time-limit 0.5``; an option whose value is an empty text is left out.
    """
    command = [*called(script), *words]
    for name, value in options.items():
        if value != "":
            text = f"{value:g}" if isinstance(value, float) else str(value)
            command += [f"--{name.replace('_', '-')}", text]
    return shlex.join(command)


def options_of(command: str) -> list[str]:
    """Return the options of a command that ``command_line`` has made; ValueError if a quote is missing.

    Examples
    --------
    >>> options_of("python -m servegym train --seed 3"), options_of("servegym train --seed 3")
    (['--seed', '3'], ['--seed', '3'])
    """
    words = shlex.split(command)
    return words[4 if words[1:2] == ["-m"] else 2 :]


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's ``main`` and leave with its status.

    Everything that is not the script's own fault is one line on stderr: bad input, and files that
    cannot be read or written, leave with status 2; an output that is closed or full with 74; Ctrl-C
    and the signals of ``kill`` and of a closed terminal with 130, 143 and 129, after all ``finally``
    (a ``KeyboardInterrupt`` may bring what is to be said behind "interrupted" or "terminated"). A reader
    that closes the pipe early (``| head``) ends the script silently with 141.
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
            word = "interrupted" if number == signal.SIGINT else "terminated"
            say(f"{word}; {stop}" if str(stop) else word)
            status = 128 + number
        except BrokenPipeError:
            _give_up_stdout()
            status = BROKEN_PIPE
        except OSError as error:
            status = _refuse(error)
        except ModuleNotFoundError as error:
            module = str(error.name).partition(".")[0]
            if module not in EXTRAS:
                raise
            say(str(not_installed(module, EXTRAS[module])))
            status = BAD_INPUT
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


def _refusal_of(stop: SystemExit) -> str:
    """Return what the dataclass itself refused a value with, which tyro has turned into an exit."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, ServegymError):
        error = error.__cause__ or error.__context__
    return "" if error is None else str(error)


UNEXPLAINED: Final = "bad arguments; see --help"

_TYPES: Final[dict[type, str]] = {int: "a whole number", float: "a number"}


def _explain(cls: type, tokens: Sequence[str], needs_all: bool) -> str:
    """Return in one line what is wrong with command-line words that tyro has refused.

    tyro has no public interface that tells: its message is a drawing for a terminal.
    """
    hints = get_type_hints(cls)
    types = {f"--{field.name.replace('_', '-')}": hints[field.name] for field in _fields(cls)}
    switches = {name for name, type_ in types.items() if type_ is bool}
    switches |= {f"--no-{name.removeprefix('--')}" for name in switches} | {"--help"}
    known = [*types, *sorted(switches - set(types))]
    waiting, given, before = list(tokens), set[str](), ""
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        option = name.replace("_", "-")
        if option in switches:
            if equals:
                return f"{option} takes no value, got {shown(value)}"
        elif option in types:
            if not equals:
                if not waiting or _is_option(waiting[0], known):
                    return f"{option} needs a value"
                value = waiting.pop(0)
            if problem := _problem(types[option], value):
                return f"{option}: {problem}: {shown(value)}"
            given.add(option)
        elif option.startswith("--"):
            return str(unknown("option", option, known))
        elif before in switches:
            return f"{before} takes no value, got {shown(word)}"
        else:
            plain = word.lstrip("-")
            advice = nearest(f"--{plain}", known) if len(plain) > 2 else "; options begin with --"
            return f"unexpected {shown(word)}{advice}"
        before = option
    if missing := [name for name in _required(cls) if name not in given and needs_all]:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see --help"
    return UNEXPLAINED


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _required(cls: type) -> list[str]:
    """Return the options that have no default."""
    missing = dataclasses.MISSING
    return [
        f"--{field.name.replace('_', '-')}"
        for field in _fields(cls)
        if field.default is missing and field.default_factory is missing
    ]


def _is_option(word: str, known: Sequence[str]) -> bool:
    """Return whether a word cannot be the value of the option before it; a negative number can."""
    name = word.partition("=")[0].replace("_", "-")
    return name in known or (word.startswith("-") and name.lstrip("-")[:1].isalpha())


def _problem(type_: type, value: str) -> str:
    """Return why a text is no value of a type; empty if it is one."""
    if type_ not in _TYPES:
        return ""
    try:
        type_(value)
    except ValueError:
        digits = value.strip().removeprefix("-")
        return "too many digits" if digits.isdecimal() else f"not {_TYPES[type_]}"
    return ""
