"""Wrong arguments, damaged files and odd terminals: a sample of scripts/check_robustness.py.

And what the generators themselves would hide: that they see a traceback, a hang and what is left.
"""

from __future__ import annotations

import ast
import codecs
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from servegym.envs.errors import ServegymError
from servegym.studies import cli, terminal
from servegym.studies.cli import SCRIPTS
from servegym.studies.commands import check_robustness
from servegym.studies.robustness import damaged_files, odd_terminals, wrong_arguments
from servegym.studies.robustness.outcomes import (
    FINE,
    HANG,
    ONE_LINE,
    STATUS,
    TRACEBACK,
    Ended,
    call,
    scripts,
)

CSV = "prompt_tokens,output_tokens\n5,3\n7,2\n"
QUICK_BENCHES = ("workload", "task", "agent", "readme")


def test_wrong_arguments_are_refused() -> None:
    """Of every script, with another seed than the results have."""
    outcomes = [wrong_arguments.try_one(trial) for trial in wrong_arguments.trials(84, 11)]
    assert [outcome for outcome in outcomes if outcome.verdict != ONE_LINE] == []


def test_damaged_files_are_refused() -> None:
    trials = damaged_files.trials(36, 12, QUICK_BENCHES)
    outcomes = [damaged_files.try_one(trial) for trial in trials]
    assert [outcome for outcome in outcomes if outcome.verdict not in (ONE_LINE, FINE)] == []
    assert {outcome.verdict for outcome in outcomes} == {ONE_LINE, FINE}


@pytest.mark.parametrize(
    "trial",
    [
        odd_terminals.Trial("the C locale", "listing"),
        odd_terminals.Trial("1 column", "help"),
        odd_terminals.Trial("a full stdout", "help"),
        odd_terminals.Trial("python -P", "refusal"),
    ],
)
def test_odd_terminals(trial: odd_terminals.Trial) -> None:
    outcome = odd_terminals.try_one(trial)
    assert outcome.verdict in (ONE_LINE, FINE), outcome


def test_trials_are_the_same_for_a_seed() -> None:
    for room in (wrong_arguments, odd_terminals):
        assert list(room.trials(50, 3)) == list(room.trials(50, 3))
        assert list(room.trials(50, 3)) != list(room.trials(50, 4))


def test_every_script_is_tried() -> None:
    tried = {trial.script for trial in wrong_arguments.trials(len(scripts()), 0)}
    assert tried == set(scripts())
    assert tried == {path.stem for path in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_runs_the_command_of_its_name(path: Path) -> None:
    """The imports of a command take seconds; a script makes signals and streams ready before them."""
    command = ast.get_docstring(
        ast.parse((SCRIPTS / "studies" / "commands" / path.name).read_text(encoding="utf-8"))
    )
    assert command is not None
    assert path.read_text(encoding="utf-8") == (
        f'"""{command.splitlines()[0]}"""\n\n'
        "from servegym.studies.start import run_command\n\n"
        'if __name__ == "__main__":\n'
        f'    run_command("{path.stem}")\n'
    )


@pytest.mark.parametrize(
    ("ended", "verdict"),
    [
        (Ended(2, "", "x.py: bad\n"), ONE_LINE),
        (Ended(2, "", "10%|#\r20%|##\nx.py: bad\n"), ONE_LINE),  # after a progress bar
        (Ended(2, "", "a\nb\n"), STATUS),
        (Ended(2, "", ""), STATUS),
        (Ended(1, "", "x.py: bad\n"), STATUS),
        (Ended(0, "", ""), FINE),
        (Ended(2, "", "Traceback (most recent call last):\n"), TRACEBACK),
        (Ended(None, "", "", "KeyError: 'x'"), TRACEBACK),
        (Ended(None, "", "", "hang"), HANG),
        (Ended(2, "", "x.py: not enough memory\n"), HANG),
    ],
)
def test_verdicts(ended: Ended, verdict: str) -> None:
    assert ended.verdict([0, 2])[0] == verdict


class TestCall:
    """A script in this process: exceptions and hangs are seen, whatever catches them on the way."""

    @staticmethod
    def ended(monkeypatch: pytest.MonkeyPatch, main: Callable[[Sequence[str]], int]) -> Ended:
        monkeypatch.setattr(
            "servegym.studies.robustness.outcomes.importlib.import_module",
            lambda name: Script(main),
        )
        return call("any", [], 1)

    def test_a_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended = self.ended(monkeypatch, lambda argv: dict[str, int]()["x"])
        assert ended.status is None
        assert ended.fault.startswith("KeyError: 'x' (test_robustness.py:")

    def test_a_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def main(argv: Sequence[str]) -> int:
            while True:
                try:
                    time.sleep(10)
                except Exception:
                    continue

        assert self.ended(monkeypatch, main).fault == "hang"
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@dataclass(frozen=True)
class Script:
    """Stands for a module."""

    main: Callable[[Sequence[str]], int]


def test_faults_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that does not refuse: counted in the table, named in the list, status 1."""
    monkeypatch.setattr(wrong_arguments, "call", lambda *_: Ended(0, "", ""))
    options = ["--parts", "arguments", "--arguments", "3", "--jobs", "1", "--output", str(tmp_path)]
    assert check_robustness.main(options) == 1
    cells = (tmp_path / "robustness.md").read_text().splitlines()[-1].replace(" ", "")
    assert cells == "|arguments|3|0|0|0|0|3|"
    assert (tmp_path / "robustness.csv").read_text().count("wrong status") == 3


@pytest.mark.parametrize(
    ("text", "encoding", "plain"),
    [
        ("a ≥ 1 … 3", "ascii", "a >= 1 ... 3"),
        ("λ × ½ – „ä“", "ascii", 'lambda x 1⁄2 - "a"'.replace("⁄", "\\u2044")),
        ("╭─ │ ╯", "ascii", "+- | +"),
        ("日\udce9", "ascii", "\\u65e5\\udce9"),
        ("ä ≥", "latin-1", "ä >="),
        ("ä ≥ 日", "utf-8", "ä ≥ 日"),
        ("a\udce9", "utf-8", "a\\udce9"),
    ],
)
def test_letters_that_an_output_lacks(text: str, encoding: str, plain: str) -> None:
    codecs.register_error("plain", terminal.plainly)
    assert text.encode(encoding, "plain").decode(encoding) == plain


def test_lines_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say("a\x1b[2Jb\nc\u2028d\x00\r\u202ee")
    assert capsys.readouterr().err.partition(": ")[2] == "a\\x1b[2Jb c d\\x00 \\u202ee\n"


def test_commands_in_notes_can_be_pasted() -> None:
    command = cli.command_line(
        "tune", task="a b.toml", policies="x,y", time_limit=0.5, workload="", jobs=2
    )
    assert (
        command
        == "python scripts/tune.py --task 'a b.toml' --policies x,y --time-limit 0.5 --jobs 2"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 11])
def test_numbers_out_of_range(value: float) -> None:
    with pytest.raises(ServegymError, match="--x must lie in 0 … 10, got "):
        cli.check_number("--x", value, 0, 10)


@pytest.mark.parametrize("place", ["file", "file/below", "loop/below", "/proc/none"])
def test_folders_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ServegymError, match="cannot be made"):
        cli.check_folder(tmp_path / place)
    cli.check_folder(tmp_path / "new" / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def started(*words: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_stopped_while_it_is_imported(number: int, status: int, word: str) -> None:
    """As soon as the first module beyond Python's own is looked for."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'numpy': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['plan.py', '--help']\nrunpy.run_path({str(SCRIPTS / 'plan.py')!r}, run_name='__main__')"
    )
    process = started("-c", code)
    assert process.communicate(timeout=60) == ("", f"plan.py: {word}\n")
    assert process.returncode == status


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")],
)
def test_stopped_in_the_middle(
    number: int, status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a script has begun is cleaned up, and the handlers are those of before."""
    cleaned = []

    def main(argv: Sequence[str] | None) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    assert (stop.value.code, cleaned) == (status, [True])
    assert capsys.readouterr().err.endswith(f": {word}\n")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(36, "File name too long", "x" * 5000), "(5000 characters): File name too long"),
        (OSError(24, "Too many open files"), ": Too many open files"),
        (MemoryError("Unable to allocate 8 TiB"), "not enough memory Unable to allocate 8 TiB"),
    ],
)
def test_what_the_system_refuses_is_a_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    assert stop.value.code in (2, 74)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.endswith(f"{line}\n")
