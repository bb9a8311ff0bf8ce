"""What a command prints to and how it is stopped: made ready before the imports, which take seconds.

This module imports nothing that takes long itself, and importing it alone changes nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import signal
import sys
import unicodedata
from types import FrameType
from typing import Final

BAD_INPUT: Final = 2
STOP_SIGNALS: Final = tuple(
    number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")
)
"""Ctrl-C, a plain kill, a terminal that is closed; Windows lacks the last."""

PROGRAMS: Final = ("servegym", "python -m servegym")
"""How the command line is called where it is not a script; ``sys.argv[0]`` is then ``PROGRAM COMMAND``."""

_NARROWEST, _WIDEST = 20, 1000  # columns; tyro never ends below 6 and fills all that it is promised

_PLAIN: Final = str.maketrans(
    {
        **dict.fromkeys("│┃", "|"), **dict.fromkeys("─━", "-"), **dict.fromkeys("╭╮╰╯┌┐└┘├┤", "+"),
        **dict.fromkeys("–−—", "-"), **dict.fromkeys("‘’‚", "'"), **dict.fromkeys("“”„", '"'),
        "×": "x", "·": "*", "≤": "<=", "≥": ">=", "→": "->", "±": "+-", "≈": "~",
        "λ": "lambda", "τ": "tau", "μ": "mu", "µ": "mu", "σ": "sigma", "Σ": "sum",
    }
)  # fmt: skip


def begin() -> None:
    """Set up signals, standard streams and the terminal's width; refuse a working folder that is gone."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has set it
            signal.signal(number, leave)
    _open_streams()
    codecs.register_error("plain", plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    columns = shutil.get_terminal_size().columns
    if not _NARROWEST <= columns <= _WIDEST:
        os.environ["COLUMNS"] = str(min(max(columns, _NARROWEST), _WIDEST))
    try:
        os.getcwd()  # noqa: PTH109 (pathlib would take its time to import)
    except OSError:
        say("the folder that this shell stands in is gone; change into another")
        sys.exit(BAD_INPUT)


def leave(number: int, frame: FrameType | None) -> None:
    """End the process by a signal, in one line: nothing has begun yet, or all has been cleaned up."""
    say("interrupted" if number == signal.SIGINT else "terminated")
    os._exit(128 + number)


def say(message: str) -> None:
    """Print one line on stderr: line ends and what would steer a terminal are written out."""
    words = " ".join(message.splitlines())
    line = "".join(
        letter if letter.isprintable() or "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]
        for letter in words
    )
    with contextlib.suppress(OSError, ValueError):  # a stderr that is full or closed: nowhere to go
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)  # noqa: PTH119


def called(command: str) -> list[str]:
    """Return the words that run a command in the way in which this one was run.

    Examples
    --------
    >>> called("best_known")
    ['python', 'scripts/best_known.py']
    """
    program = sys.argv[0].rpartition(" ")[0]
    if program in PROGRAMS:
        return [*program.split(), command.replace("_", "-")]
    return ["python", f"scripts/{command}.py"]


def plainly(error: UnicodeError) -> tuple[str, int]:
    """Write letters that an output's encoding lacks in letters that it has: ``≥`` as ``>=``.

    An error handler of ``codecs``; what has no such form is escaped, as ``backslashreplace`` does.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = unicodedata.normalize("NFKD", lacking.translate(_PLAIN))
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return letters.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _open_streams() -> None:
    """Give a standard stream that the shell has closed (``>&-``) somewhere to go.

    Otherwise the next file that is opened would take its number, and what libraries print would
    land in that file. Writing to a closed stdout fails as it should; a closed stderr takes all.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
