"""What the generators of wrong inputs share: a trial, how it ended, and a script called in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Final

from servegym.studies.cli import SCRIPTS, run

_DATA_BYTES: Final = 8 * 2**30
"""Memory that a trial may take: what reads a device would take all of the machine's."""

ONE_LINE, FINE, TRACEBACK, HANG, STATUS = (
    "one line", "fine", "traceback", "hang", "wrong status",
)  # fmt: skip
VERDICTS: Final = (ONE_LINE, FINE, TRACEBACK, HANG, STATUS)
"""How a trial ends: refused in one line, done, or one of three faults. Wrong status is also a
refusal in several lines or one that has left something behind."""


@dataclass(frozen=True)
class Outcome:
    """How one trial ended."""

    part: str
    tried: str
    """What was tried, for a reader: the command or the damage and the command."""
    verdict: str
    detail: str = ""
    """What was said, or the end of the traceback."""

    @property
    def row(self) -> dict[str, Any]:
        """The outcome as a row of the table of faults."""
        return asdict(self)


class TooLong(BaseException):
    """A script has run beyond its time; no ``except Exception`` on the way catches this."""


@dataclass(frozen=True)
class Ended:
    """How a script ended that was called in this process."""

    status: int | None
    """None where an exception ended the script."""
    out: str
    err: str
    fault: str = ""
    """The traceback's last line and place, or why there is no status."""

    def verdict(self, statuses: Sequence[int]) -> tuple[str, str]:
        """Return the verdict where these statuses are right, and what a reader should see."""
        if self.fault:
            return (HANG if self.fault == "hang" else TRACEBACK), self.fault
        text = " ".join(self.err.split())[-300:]
        if self.status not in statuses:
            return STATUS, f"status {self.status}: {text}"
        if self.status == 0:
            return FINE, ""
        if "Traceback" in self.err:
            return TRACEBACK, text
        if "not enough memory" in self.err:
            return HANG, text
        if len(message_lines(self.err)) != 1:
            return STATUS, f"{len(message_lines(self.err))} lines: {text}"
        return ONE_LINE, text


def message_lines(err: str) -> list[str]:
    """Return the lines of a stderr without progress bars, which overwrite themselves."""
    return [line for line in err.split("\n") if line.strip() and "\r" not in line]


def scripts() -> list[str]:
    """Return the names of all scripts, without the ending."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py"))


def command(script: str) -> ModuleType:
    """Return the module of a script's command, which has ``main`` and mostly ``Args``."""
    return importlib.import_module(f"servegym.studies.commands.{script}")


def call(script: str, words: Sequence[str], limit_s: int) -> Ended:
    """Run a script in this process as a command line would, at most so many seconds."""
    main = command(script).main
    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    fault = ""
    resource.setrlimit(resource.RLIMIT_DATA, (_DATA_BYTES, resource.RLIM_INFINITY))
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(limit_s)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(main, list(words))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except TooLong:
        fault = "hang"
    except BaseException as error:  # whatever it is, it would be a traceback
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:200]
        fault = f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, before)
    return Ended(status, out.getvalue(), err.getvalue(), fault)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


@contextlib.contextmanager
def fresh_folder() -> Iterator[Path]:
    """Work in a new folder, which is removed afterwards."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="servegym-") as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def listing(folder: Path) -> set[str]:
    """Return what lies in a folder and below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
