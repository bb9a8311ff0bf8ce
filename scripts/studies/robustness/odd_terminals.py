"""Odd terminals, locales, environments and folders, each with several commands, as real processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import numpy as np

from servegym.studies.cli import SCRIPTS
from servegym.studies.robustness.outcomes import (
    FINE,
    HANG,
    ONE_LINE,
    STATUS,
    TRACEBACK,
    Outcome,
    fresh_folder,
    message_lines,
)

LIMIT_S: Final = 120
"""Seconds after which a process counts as hung: kernels may have to be loaded on a busy machine."""

_WORK: Final = "prompt_tokens,output_tokens\n5,3\n7,2\n4,9\n"


@dataclass(frozen=True)
class Surroundings:
    """The environment, interpreter and shell of a process."""

    environment: tuple[tuple[str, str | None], ...] = ()
    """Variables that are set, or removed where they are None."""
    python: str = ""
    """Options of the interpreter."""
    shell: str = "{}"
    """How a shell runs the command, ``{}``."""
    statuses: tuple[int, ...] = ()
    """Statuses that are right beside the command's usual one."""
    silent: bool = False
    """Whether nothing can be said on stderr."""


def _with(*pairs: str, **rest: object) -> Surroundings:
    """Return surroundings with variables ``NAME=value``, or ``NAME`` to be removed."""
    split = (pair.partition("=") for pair in pairs)
    environment = tuple((name, value if equals else None) for name, equals, value in split)
    return Surroundings(environment, **rest)  # type: ignore[arg-type]


_C: Final = ("LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")

SURROUNDINGS: Final[dict[str, Surroundings]] = {
    "ASCII by PYTHONIOENCODING": _with("PYTHONIOENCODING=ascii"),
    "strict ASCII": _with("PYTHONIOENCODING=ascii:strict"),
    "Latin-1": _with("PYTHONIOENCODING=latin-1"),
    "cp1252, strict": _with("PYTHONIOENCODING=cp1252:strict"),
    "the C locale": _with(*_C),
    "the POSIX locale": _with("LC_ALL=POSIX", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0"),
    "no such locale": Surroundings(shell="env LC_ALL=xx_YY.UTF-8 LANG=xx_YY {}"),
    "no width": _with("COLUMNS=0"),
    "1 column": _with("COLUMNS=1"),
    "5 columns": _with("COLUMNS=5"),
    "a negative width": _with("COLUMNS=-7"),
    "a width of words": _with("COLUMNS=wide"),
    "a billion columns": _with("COLUMNS=1000000000"),
    "a dumb terminal": _with("TERM=dumb"),
    "no terminal at all": _with("TERM", "COLUMNS", "LINES"),
    "forced colours": _with("FORCE_COLOR=1", "CLICOLOR_FORCE=1", "PY_COLORS=1"),
    "no HOME": _with("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
    "a HOME that is not there": _with("HOME=/nonexistent/home"),
    "a TMPDIR that is not there": _with("TMPDIR=/nonexistent/tmp"),
    "an empty environment": Surroundings(shell="env -i {}"),
    "PYTHONSAFEPATH": _with("PYTHONSAFEPATH=1"),
    "python -P": Surroundings(python="-P"),
    "python -I": Surroundings(python="-I"),
    "python -E -s": Surroundings(python="-E -s"),
    "python -O": Surroundings(python="-O"),
    "PYTHONOPTIMIZE and no bytecode": _with("PYTHONOPTIMIZE=2", "PYTHONDONTWRITEBYTECODE=1"),
    "a closed stdin": Surroundings(shell="{} <&-"),
    "a closed stdout": Surroundings(shell="{} >&-", statuses=(74,)),
    "a closed stderr": Surroundings(shell="{} 2>&-", silent=True),
    "closed streams": Surroundings(shell="{} <&- >&- 2>&-", statuses=(74,), silent=True),
    "a full stdout": Surroundings(shell="{} >/dev/full", statuses=(74,)),
    "a full stderr": Surroundings(shell="{} 2>/dev/full", statuses=(74,), silent=True),
    "a reader that has gone": Surroundings(
        shell="{{ {}; echo $? >status; }} | true; exit $(cat status)", statuses=(141,)
    ),
    "a removed folder": Surroundings(shell="mkdir gone; cd gone; rmdir ../gone; {}", statuses=(2,)),
    "few open files": Surroundings(shell="ulimit -n 24; {}", statuses=(2, 74)),
    "a file size limit": Surroundings(shell="ulimit -f 0; {}", statuses=(2, 74), silent=True),
    "a real terminal of 3 columns": Surroundings(
        shell="script -qec 'stty cols 3; {}' /dev/null", silent=True
    ),
}

COMMANDS: Final[dict[str, tuple[str, int]]] = {
    "help": ("evaluate.py --help", 0),
    "listing": ("evaluate.py --list-policies --list-costs", 0),
    "work": ("plan.py --workload {0}/work.csv --clients 2 --output {0}/plan.json", 0),
    "refusal": ("evaluate.py --task Papr-v0", 2),
    "letters": ("plan.py --workload {0}/wörk.csv --clients 2 --output {0}/plän.json", 0),
    "alien letters": ("plan.py --workload {0}/work.csv --clients 2 --output {0}/caf\udce9.json", 2),
    "play": (
        "evaluate.py --task Tiny-v0 --policies fcfs --seeds 0:2 --jobs 1 --output {0}/out", 0,
    ),
}  # fmt: skip
"""Commands with the status that they end with in ordinary surroundings."""

_MAY_REFUSE: Final = ("letters", "alien letters")
"""Where the system's encoding lacks a name's letters, this is said in one line."""


@dataclass(frozen=True)
class Trial:
    """A command in some surroundings."""

    surroundings: str
    command: str

    @property
    def tried(self) -> str:
        """Both, as a reader sees them."""
        return f"{self.surroundings}: {self.command}"


def trials(count: int, seed: int) -> list[Trial]:
    """Return at most so many combinations, all surroundings in turn, the same for the same seed."""
    rng = np.random.default_rng(seed)
    places = {name: rng.permutation(len(COMMANDS)) for name in SURROUNDINGS}
    commands = list(COMMANDS)
    in_turn = [
        Trial(name, commands[place[k]])
        for k in range(len(COMMANDS))
        for name, place in places.items()
    ]
    return in_turn[:count]


def try_one(trial: Trial) -> Outcome:
    """Run the command in a new process and check its status and its messages."""
    around = SURROUNDINGS[trial.surroundings]
    template, usual = COMMANDS[trial.command]
    environment = dict(os.environ)
    for name, value in around.environment:
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    with fresh_folder() as folder:
        for name in ("work.csv", "wörk.csv"):
            (folder / name).write_text(_WORK, "utf-8")
        script, *words = template.format(folder).split()
        python = [sys.executable, *around.python.split(), str(SCRIPTS / script)]
        line = around.shell.format(shlex.join([*python, *words]))
        process = subprocess.Popen(
            ["bash", "-c", os.fsencode(line)],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return Outcome("terminals", trial.tried, HANG, line)
    statuses = {usual, *around.statuses, *((0, 2) if trial.command in _MAY_REFUSE else ())}
    return _judged(trial, process.returncode, out + b"\n" + err, err, statuses, around.silent)


def _judged(
    trial: Trial, status: int, everything: bytes, err: bytes, statuses: set[int], silent: bool
) -> Outcome:
    text = " ".join(err.decode("utf-8", "replace").split())[-300:]
    if b"Traceback" in everything or b"Exception ignored" in everything:
        return Outcome("terminals", trial.tried, TRACEBACK, text)
    if status not in statuses:
        return Outcome("terminals", trial.tried, STATUS, f"status {status}: {text}")
    lines = len(message_lines(err.decode("utf-8", "replace")))
    if status in (2, 74) and not silent and lines != 1:
        return Outcome("terminals", trial.tried, STATUS, f"{lines} lines: {text}")
    return Outcome("terminals", trial.tried, FINE if status in (0, 141) else ONE_LINE, text)
