"""Wrong arguments of every script, made from the fields of its ``Args``."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

import numpy as np

from servegym.studies.robustness.outcomes import (
    STATUS,
    Outcome,
    call,
    command,
    fresh_folder,
    listing,
    scripts,
)

LIMIT_S: Final = 30
"""Seconds after which a refusal counts as a hang: whatever is refused so late is refused too late."""

_LONG: Final = "x" * 5000
_ALIEN: Final = "caf\udce9"  # a name in Latin-1, as Python reads it in a terminal of UTF-8

POOLS: Final[dict[type, tuple[str, ...]]] = {
    int: (
        "", " ", "two", "nan", "inf", "1.5", "1e3", "0x10", "-1", "--1", "1,000", "½", "1\0", "9" * 5000,
        str(10**20), str(-(10**20)), "True", "None", "[1]", "-0x1",
    ),
    float: (
        "", " ", "many", "nan", "inf", "-inf", "-1", "-1e-9", "1e400", "1,5", "1e", "½", "1\0", "0x1p3",
        "None", "1_", "-" + "9" * 400,
    ),
    bool: ("yes", "maybe", "2", "-1", "", "nan"),
}  # fmt: skip
"""Texts that no option of a type may take. No number of the command lines may be below zero."""

_TEXTS: Final = (
    " ", ",", ",,", "no such thing", "nan", "-1", _LONG, _ALIEN, "a\0b", "ünïcödé", "日本", "../..", "/",
    "a/b/c", "'", "$HOME", "\x1b[31m", "fcfs;lpt", "GSM8K-v1",
)  # fmt: skip
_ANY_PATH: Final = (
    "",
    "a\0b",
    _LONG,
    _ALIEN,
    "file/below",
    "loop/below",
    "/proc/nobody/x",
    "file/a/b",
)
_INPUT_PATH: Final = (
    *_ANY_PATH,
    "missing",
    "loop",
    "dangling",
    "/dev/zero",
    "pipe",
    "empty.csv",
    "noise.csv",
)

_INPUTS: Final = ("workload", "readme", "run")
"""Options whose path is read."""

_EMPTY_IS_FINE: Final = {
    ("evaluate", "workload"),
    ("train", "reference"),
    *(("serve", name) for name in ("workload", "compare", "prompts")),
    *(("calibrate_engine", name) for name in ("log", "held_out_log", "policies")),
}
_ANY_TEXT: Final = {("evaluate", "reference")}
"""A reference that is not played: the first policy stands in."""

_POSITIVE: Final = (
    "ablation_seeds", "cases", "checkpoint_every", "clients", "evaluate_every", "jobs", "plans",
    "repeats", "samples", "seeds", "slow_cases", "threads", "time_limit", "timesteps", "transfer_cases",
)  # fmt: skip
"""Numbers of which 0 is wrong, too."""


@dataclass(frozen=True)
class Trial:
    """A script and a command line that it must refuse."""

    script: str
    words: tuple[str, ...]

    @property
    def tried(self) -> str:
        """The command as a reader sees it; long texts are cut."""
        return f"{self.script} " + " ".join(ascii(word)[1:-1][:60] or "''" for word in self.words)


def trials(count: int, seed: int) -> list[Trial]:
    """Return so many different wrong command lines of all scripts in turn, the same for the same seed."""
    rng = np.random.default_rng(seed)
    stacks = [[Trial(name, words) for words in _wrong(name, rng)] for name in scripts()]
    chosen = [[stack[k] for k in rng.permutation(len(stack))] for stack in stacks]
    longest = max(map(len, chosen))
    in_turn = [stack[k] for k in range(longest) for stack in chosen if k < len(stack)]
    return in_turn[:count]


def try_one(trial: Trial) -> Outcome:
    """Call the script in a new folder: it must refuse in one line and leave nothing behind."""
    with fresh_folder() as folder:
        _furnish(folder)
        before = listing(folder)
        ended = call(trial.script, trial.words, LIMIT_S)
        verdict, detail = ended.verdict([2])
        left = listing(folder) - before
    if ended.status == 2 and (left or ended.out):
        verdict, detail = STATUS, f"left behind: {', '.join(sorted(left)) or 'lines on stdout'}"
    return Outcome("arguments", trial.tried, verdict, detail)


def _furnish(folder: Path) -> None:
    """Put there what wrong paths lead to."""
    (folder / "work.csv").write_text("prompt_tokens,output_tokens\n5,3\n7,2\n", encoding="utf-8")
    (folder / "file").touch()
    (folder / "empty.csv").touch()
    (folder / "noise.csv").write_bytes(bytes(range(256)) * 4)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")


def _wrong(script: str, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Return the command lines of one script with one thing wrong in each."""
    options = command(script).Args
    hints = get_type_hints(options)
    good = {item.name: _good(item.name) for item in fields(options) if item.default is MISSING}
    if "output" in hints:
        good["output"] = "out.png" if script == "dashboard" else "out"
    lines: list[tuple[str, ...]] = []

    def add(name: str, *wrong: str) -> None:
        rest = [
            word
            for other, value in good.items()
            if other != name
            for word in (_option(other), value)
        ]
        lines.append((*rest, *wrong))

    for name, hint in hints.items():
        option = _option(name)
        for text in _pool(script, name, hint):
            if hint is bool or text.startswith("-"):
                add(name, f"{option}={text}")
            else:
                add(name, option, text)
        if hint is not bool:
            add(name, option)
        if name in good and name != "output":
            add(name)
        add("", _misspelt(option, rng), "1")
        if hint is int:
            add(name, option, "1", option, "two")
    for words in (
        ("surplus",),
        ("--no-such-option",),
        ("-x",),
        ("--", "x"),
        ("---",),
        ("--output-x=1",),
    ):
        add("", *words)
    return lines


def _good(name: str) -> str:
    return {"workload": "work.csv", "clients": "2", "output": "out"}[name]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _misspelt(option: str, rng: np.random.Generator) -> str:
    """Return the option with one letter doubled, which no other option is."""
    place = int(rng.integers(2, len(option)))
    return f"{option[:place]}{option[place]}{option[place:]}"


def _pool(script: str, name: str, hint: Any) -> tuple[str, ...]:
    """Return wrong values of an option."""
    if hint in POOLS:
        return (*POOLS[hint], "0") if name in _POSITIVE and hint is not bool else POOLS[hint]
    if hint is Path or name == "workload":
        paths = _INPUT_PATH if name in _INPUTS else _ANY_PATH
        return tuple(path for path in paths if path or (script, name) not in _EMPTY_IS_FINE)
    if (script, name) in _ANY_TEXT:
        return (_ALIEN, "a\0b")
    return _TEXTS if (script, name) in _EMPTY_IS_FINE else ("", *_TEXTS)
