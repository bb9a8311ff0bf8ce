"""scripts/plan.py and what all scripts share in scripts/studies/cli.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.planning.planner import load_kernels
from servegym.envs.errors import ServegymError
from servegym.envs.workload.plan import plan_from_queues
from servegym.envs.workload.traces import read_requests
from servegym.studies.cli import SCRIPTS, UNEXPLAINED, parse, run
from servegym.studies.commands import plan
from servegym.studies.robustness import wrong_arguments
from tests.helpers import make_env

SCRIPT = SCRIPTS / "plan.py"
CSV = "prompt_tokens,output_tokens\n9,6\n9,5\n9,4\n9,4\n9,4\n"
"""Decode rounds 5, 4, 3, 3 and 3: on two clients 5 + 4 and 3 + 3 + 3."""


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a main in this process, as ``python scripts/….py`` would."""

    def end(main: Callable[[Sequence[str] | None], int], *options: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            run(main, list(options))
        shown = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, shown.out, shown.err)

    return end


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "work.csv"
    path.write_text(CSV)
    return path


@pytest.mark.parametrize("solver", ["rebalance", "milp", "milp-cold"])
def test_writes_the_plan(ended: Callable[..., Outcome], workload: Path, solver: str) -> None:
    output = workload.with_name("plan.json")
    options = ["--workload", str(workload), "--clients", "2", "--output", str(output)]
    outcome = ended(plan.main, *options, "--solver", solver)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("load 9 rounds, lower bound 9, optimal")
    written = json.loads(output.read_text())
    seconds = written.pop("seconds")
    assert 0 <= seconds < 60
    assert sorted(written.pop("queues")) == [[0, 1], [2, 3, 4]]
    assert written == {
        "clients": 2,
        "load": 9,
        "lower_bound": 9,
        "status": "optimal",
        "solver": solver,
        "later_requests": 0,
    }
    assert sorted(path.name for path in output.parent.iterdir()) == ["plan.json", "work.csv"]


@pytest.mark.parametrize(
    ("arrivals", "queues"),
    [
        ((0, 0, 0), [[0], [1, 2]]),
        ((0, 0, 1), [[0], [1]]),
        ((2, 0, 3), [[], [0]]),  # ids count by arrival: the row that is there first is request 0
        ((3, 3, 3), [[], []]),
    ],
)
@pytest.mark.parametrize("solver", ["rebalance", "lpt", "milp", "milp-cold"])
def test_plans_who_is_there(
    ended: Callable[..., Outcome],
    workload: Path,
    arrivals: tuple[int, ...],
    queues: list[list[int]],
    solver: str,
) -> None:
    """What arrives later is left out, and the environment takes the plan."""
    rows = [f"9,{rounds + 1},{at}\n" for rounds, at in zip((8, 4, 3), arrivals, strict=True)]
    workload.write_text("prompt_tokens,output_tokens,arrival_s\n" + "".join(rows))
    output = workload.with_name("plan.json")
    options = ["--workload", str(workload), "--clients", "2", "--output", str(output)]
    outcome = ended(plan.main, *options, "--solver", solver)
    assert (outcome.status, outcome.err) == (0, "")
    later = sum(at > 0 for at in arrivals)
    assert ("arrive later and are left out" in outcome.out) == (later > 0)
    written = json.loads(output.read_text())
    assert written["later_requests"] == later
    assert sorted(sorted(queue) for queue in written["queues"]) == queues
    plan_made = plan_from_queues(written["queues"])
    make_env(2).reset(options={"requests": read_requests(workload), "plan": plan_made})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "missing.csv"], "missing.csv: no such workload file"),
        (["--clients", "0"], "clients must lie in 1 … 1000000, got 0"),
        (["--clients", "-3"], "got -3"),
        (["--clients", "1000001"], "got 1000001"),
        (["--clients", "two"], "--clients: not a whole number: 'two'"),
        (["--clients", "2.0"], "not a whole number: '2.0'"),
        (["--clients", "nan"], "not a whole number: 'nan'"),
        (["--clients"], "--clients"),  # no value
        (["--time-limit", "0"], "time limit must be > 0 seconds, got 0.0"),
        (["--time-limit", "-1"], "got -1.0"),
        (["--time-limit", "nan"], "got nan"),
        (["--time-limit", "inf"], "got inf"),
        (["--time-limit", "long"], "--time-limit: not a number: 'long'"),
        (["--solver", "rebalnce"], "unknown solver 'rebalnce'; did you mean 'rebalance'?"),
        (["--solver", "xyz"], "choose from rebalance, lpt, milp, milp-cold"),
        (["--seed", "-1"], "seed must be ≥ 0"),
        (["--worklod", "x"], "unknown option '--worklod'; did you mean '--workload'?"),
        (["--no-clients"], "unknown option '--no-clients'"),
        (["surplus"], "surplus"),
    ],
)
def test_refuses(
    ended: Callable[..., Outcome], workload: Path, options: list[str], message: str
) -> None:
    output = workload.with_name("plan.json")
    good = ["--workload", str(workload), "--clients", "2", "--output", str(output)]
    outcome = ended(plan.main, *good, *options)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("missing", ["--workload", "--clients", "--output"])
def test_required_options(ended: Callable[..., Outcome], workload: Path, missing: str) -> None:
    good = {"--workload": str(workload), "--clients": "2", "--output": "plan.json"}
    options = [word for pair in good.items() if pair[0] != missing for word in pair]
    outcome = ended(plan.main, *options)
    assert outcome.status == 2
    assert missing in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("prompt_tokens,output_tokens\n", "has a header but no request"),
        (CSV + "9,nan\n", "line 7: output_tokens"),
        (CSV + "9,0\n", "line 7: output_tokens"),
    ],
)
def test_refuses_workloads(
    ended: Callable[..., Outcome], workload: Path, content: str, message: str
) -> None:
    workload.write_text(content)
    output = workload.with_name("plan.json")
    options = ["--workload", str(workload), "--clients", "2", "--output", str(output)]
    outcome = ended(plan.main, *options)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/such/plan.json", "no such folder"),
        (".", "is a folder"),
        ("work.csv/plan.json", "no such folder"),  # a file where a folder should be
    ],
)
def test_refuses_outputs(
    ended: Callable[..., Outcome], workload: Path, output: str, message: str
) -> None:
    place = str(workload.parent / output)
    outcome = ended(plan.main, "--workload", str(workload), "--clients", "2", "--output", place)
    assert outcome.status == 2
    assert message in outcome.err


def test_refuses_a_folder_it_may_not_write(
    ended: Callable[..., Outcome], workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's refusal is simulated."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    output = str(workload.with_name("plan.json"))
    outcome = ended(plan.main, "--workload", str(workload), "--clients", "2", "--output", output)
    assert outcome.status == 2
    assert "not writable" in outcome.err


def test_runs_from_any_folder(tmp_path: Path, workload: Path) -> None:
    """As users do: another working directory, relative paths."""
    options = ["--workload", "work.csv", "--clients", "2", "--output", "plan.json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert json.loads((tmp_path / "plan.json").read_text())["load"] == 9


@pytest.mark.parametrize("solver", ["rebalance", "milp", "milp-cold"])
def test_ctrl_c_writes_nothing(ended: Callable[..., Outcome], workload: Path, solver: str) -> None:
    """Interrupted in a search that does not end: status 130, one line, no file."""
    rounds = np.random.default_rng(18).integers(100, 1000, 28)  # one round short of a proof
    rows = "".join(f"9,{length + 1}\n" for length in rounds)
    workload.write_text("prompt_tokens,output_tokens\n" + rows)
    output = workload.with_name("plan.json")
    options = ["--workload", str(workload), "--clients", "8", "--output", str(output)]
    load_kernels()  # so that the signal comes in the search
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        outcome = ended(plan.main, *options, "--solver", solver, "--time-limit", "600")
    finally:
        timer.cancel()
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.endswith(": interrupted\n")
    assert [path.name for path in workload.parent.iterdir()] == ["work.csv"]


@dataclass(frozen=True)
class Sample:
    """Some options."""

    number: int = 1
    """A number, at most 9."""
    flag: bool = False
    """A switch."""
    ratio_x: float = 1.0
    """Another number."""
    name: str = ""
    """A text."""

    def __post_init__(self) -> None:
        if self.number > 9:
            raise ServegymError(f"--number must be ≤ 9, got {self.number}")


def refusal(tokens: list[str]) -> str:
    """The message that refuses these words; empty if they are legal."""
    try:
        parse(Sample, tokens)
    except ServegymError as error:
        return str(error)
    return ""


class TestParse:
    def test_defaults(self) -> None:
        assert parse(Sample, []) == Sample()

    @pytest.mark.parametrize(
        ("tokens", "expected"),
        [
            (["--number", "9"], Sample(9)),
            (["--number=-2"], Sample(-2)),
            (["--number", "1", "--number", "2"], Sample(2)),  # the last one counts
            (["--flag"], Sample(flag=True)),
            (["--no-flag"], Sample()),
            (["--ratio_x", "-1e-9"], Sample(ratio_x=-1e-9)),
            (["--name=--x"], Sample(name="--x")),
            (["--name", "-1"], Sample(name="-1")),
        ],
    )
    def test_reads(self, tokens: list[str], expected: Sample) -> None:
        assert parse(Sample, tokens) == expected

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (["--number", "10"], "--number must be ≤ 9, got 10"),  # the class itself refuses
            (["--nmber", "1"], "unknown option '--nmber'; did you mean '--number'?"),
            (["--no-flga"], "unknown option '--no-flga'; did you mean '--no-flag'?"),
            (["---x"], "unknown option '---x'; "),
            (["--no-number"], "unknown option '--no-number'; did you mean '--number'?"),
            (["--flag", "yes"], "--flag takes no value, got 'yes'"),
            (["--no-flag=1"], "--no-flag takes no value, got '1'"),
            (["--help=3"], "--help takes no value, got '3'"),
            (["--number"], "--number needs a value"),
            (["--number", "--flag"], "--number needs a value"),
            (["--name", "-x"], "--name needs a value"),
            (["--number", "x"], "--number: not a whole number: 'x'"),
            (["--number="], "--number: not a whole number: ''"),
            (["--number", "1.5"], "--number: not a whole number: '1.5'"),
            (["--number", "½"], "--number: not a whole number: '½'"),
            (["--number", "9" * 5000], "--number: too many digits: '999"),
            (["--ratio-x", "1,5"], "--ratio-x: not a number: '1,5'"),
            (["--number", "1", "2"], "unexpected '2'; options begin with --"),
            (["number", "1"], "unexpected 'number'; did you mean '--number'?"),
            (["-number", "1"], "unexpected '-number'; did you mean '--number'?"),
            ([""], "unexpected ''; options begin with --"),
        ],
    )
    def test_refuses(
        self, capsys: pytest.CaptureFixture[str], tokens: list[str], message: str
    ) -> None:
        with pytest.raises(ServegymError) as error:
            parse(Sample, tokens)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
        assert capsys.readouterr() == ("", "")

    def test_what_is_missing_is_named(self) -> None:
        with pytest.raises(ServegymError) as error:
            parse(plan.Args, ["--clients", "2"])
        assert str(error.value) == "--workload and --output are missing; see --help"

    @pytest.mark.parametrize("option", ["number", "ratio-x", "flag"])
    def test_every_refusal_is_explained(self, option: str) -> None:
        """Every refusal of tyro's has a message of our own; a new version of tyro may break this."""
        type_ = {"number": int, "ratio-x": float, "flag": bool}[option]
        for text in wrong_arguments.POOLS[type_]:
            assert refusal([f"--{option}", text]) != UNEXPLAINED, text
            assert refusal([f"--{option}={text}"]) != UNEXPLAINED, text

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            parse(Sample, ["--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr()
        assert "A number, at most 9." in shown.out
        assert shown.err == ""


class TestRun:
    @pytest.mark.parametrize(
        ("error", "status", "line"),
        [
            (ServegymError("no good"), 2, "no good"),
            (ServegymError("two\nlines"), 2, "two lines"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )
    def test_errors_become_a_line(
        self, ended: Callable[..., Outcome], error: BaseException, status: int, line: str
    ) -> None:
        def main(argv: Sequence[str] | None) -> int:
            raise error

        outcome = ended(main)
        assert (outcome.status, outcome.out) == (status, "")
        assert outcome.err.endswith(f": {line}\n")
        assert outcome.err.count("\n") == 1

    def test_the_status_is_passed_on(self, ended: Callable[..., Outcome]) -> None:
        assert ended(lambda argv: 3) == Outcome(3, "", "")

    def test_our_own_faults_are_not_hidden(self) -> None:
        def main(argv: Sequence[str] | None) -> int:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run(main)

    def test_a_closed_pipe_ends_silently(self, workload: Path) -> None:
        """As in ``plan.py … | true``."""
        options = f"--workload {workload} --clients 2 --output {workload.parent}/plan.json"
        command = f'"{sys.executable}" "{SCRIPT}" {options} | true; echo "${{PIPESTATUS[0]}}"'
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("141\n", "")
