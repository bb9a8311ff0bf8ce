"""Kills at random moments: nothing is lost, nothing is left, and a resume ends as if nothing had been.

Each scenario is a short run of a script. It is done once undisturbed, then killed again and again, at
random moments and by random signals, in folders of its own; what a resume makes of it is compared with
the undisturbed results, file by file, without what depends on the clock. In some rounds a second process
writes to the same folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from servegym.envs.errors import ServegymError
from servegym.envs.playing.locks import LOCK_FILE
from servegym.studies.cli import SCRIPTS, parse, read_list, run

SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE_S: Final = 10.0
"""How long processes may take to end after a kill."""

LIMIT_S: Final = 300.0
"""How long a run may take undisturbed."""

_TIMED: Final = re.compile(
    r"decision_ms|prepare_s|search_s|wall_s|training_s|decision p99|search \(s\)"
)
"""Columns that depend on the clock."""


@dataclass(frozen=True)
class Scenario:
    """A short run of a script."""

    name: str
    script: str
    options: Sequence[str]
    output: str = "--output"
    """The option that names the folder."""
    compared: Sequence[str] = ("**/*.csv", "**/*.json")
    """Files that a resume must give as the undisturbed run does."""
    resume: Sequence[str] = ()
    """Options of a resume, once there is something to go on with."""
    begun: str = "**/*"
    """Files that show that there is something to go on with."""


def scenarios() -> list[Scenario]:
    """Return the runs that are killed."""
    trained = ["--task", "Tiny-v0", "--timesteps", "1536", "--environments", "4", "--steps", "64"]
    trained += ["--batch-size", "128", "--epochs", "2", "--width", "8", "--depth", "1"]
    trained += ["--validation-cases", "2", "--evaluate-every", "512", "--checkpoint-every", "1"]
    study = ["--tasks", "Tiny-v0", "--variants", "main", "--seeds", "1", "--tiny-timesteps", "4096"]
    return [
        Scenario(
            "evaluate",
            "evaluate",
            ["--task", "GSM8K-v0", "--policies", "fcfs,lpt,random", "--seeds", "0:24"],
            compared=("episodes.csv", "task.json"),
        ),
        Scenario(
            "evaluate with optima",
            "evaluate",
            ["--task", "Tiny-v0", "--policies", "fcfs,hybrid", "--seeds", "0:40", "--jobs", "1"],
            compared=("episodes.csv", "optima.csv", "task.json"),
        ),
        Scenario(
            "best_known",
            "best_known",
            [
                "--task",
                "Tiny-v0",
                "--policies",
                "fcfs,lpt",
                "--seeds",
                "0:8",
                "--time-limit",
                "0.2",
            ],
            compared=("*.csv", "search.json"),
        ),
        Scenario("tune", "tune", ["--task", "Tiny-v0", "--cases", "60"], compared=("tuning.*",)),
        Scenario(
            "paper",
            "paper",
            ["--cases", "2", "--jobs", "1"],
            compared=("**/episodes.csv", "table.md"),
        ),
        Scenario(
            "check",
            "check_estimates",
            ["--tasks", "Tiny-v0", "--cases", "12", "--jobs", "1"],
            compared=("*.csv", "*.json", "*.md"),
        ),
        Scenario(
            "train",
            "train",
            trained,
            compared=(
                "checkpoints/*",
                "agent/*.safetensors",
                "final/*.safetensors",
                "evaluations.csv",
            ),
            resume=("--resume",),
            begun="run.json",
        ),
        Scenario(
            "study",
            "study_agents",
            [*study, "--parts", "train"],
            output="--runs",
            compared=("**/checkpoints/*", "**/agent/*.safetensors", "**/evaluations.csv"),
        ),
    ]


@dataclass
class Outcome:
    """The kills of one scenario and their faults."""

    scenario: str
    kills: int = 0
    """Signals that reached a running process."""
    second_writers: int = 0
    """Processes started in a folder that another one held."""
    refused: int = 0
    """Second processes that were refused with status 2."""
    faults: list[str] = field(default_factory=list)
    """Faults, one line each."""


def run_kills(
    count: int,
    seed: int,
    folder: Path,
    only: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Kill scripts at random moments; return an outcome a scenario.

    Parameters
    ----------
    count
        Kills in all, shared out evenly over the scenarios, ≥ 1.
    seed
        Of the moments and signals.
    folder
        An empty or missing folder for the runs.
    only
        Names of scenarios; None: all.
    say
        Told of each scenario in a line.
    """
    chosen = [scenario for scenario in scenarios() if only is None or scenario.name in only]
    share = -(-count // len(chosen))
    outcomes = []
    for place, scenario in enumerate(chosen):
        rng = random.Random(f"{seed} {scenario.name}")
        kills = min(share, count - share * place)
        outcome = _Trial(scenario, folder / scenario.name.replace(" ", "-"), rng).run(kills)
        outcomes.append(outcome)
        say(_line(outcome))
    return outcomes


def _line(outcome: Outcome) -> str:
    words = f"{outcome.scenario}: {outcome.kills} kills, {outcome.second_writers} second writers"
    return f"{words} ({outcome.refused} refused), {len(outcome.faults)} faults"


@dataclass
class _Trial:
    scenario: Scenario
    folder: Path
    rng: random.Random

    def run(self, kills: int) -> Outcome:
        """Run undisturbed, then kill and resume, in a new folder whenever a run came to its end."""
        self.outcome = Outcome(self.scenario.name)
        whole = self.folder / "whole"
        started = time.monotonic()
        with self._start(whole) as process:
            status = process.wait(LIMIT_S)
        seconds = time.monotonic() - started
        if status != 0:
            self.outcome.faults.append(f"undisturbed: status {status}; see {whole}.log")
            return self.outcome
        expected = self._contents(whole)
        attempt = 0
        while self.outcome.kills < kills and len(self.outcome.faults) < 5:
            output = self.folder / f"killed-{attempt}"
            left = kills - self.outcome.kills
            self._disturb(output, seconds, min(left, self.rng.randint(2, 6)))
            self._finish(output, expected)
            attempt += 1
        return self.outcome

    def _disturb(self, output: Path, seconds: float, kills: int) -> None:
        """Start and kill a run so many times, unless it comes to its end before."""
        for _ in range(kills):
            with self._start(output) as process:
                rival = self._rival(output, process) if self.rng.random() < 0.2 else None
                moment = time.monotonic() + self.rng.uniform(0.1, 0.9) * seconds
                while time.monotonic() < moment and process.poll() is None:
                    time.sleep(0.005)
                if process.poll() is None:
                    number = self.rng.choice(SIGNALS)
                    process.send_signal(number)
                    self.outcome.kills += 1
                    self._wait_for_all(process, number.name, output)
                else:
                    self._wait_for_all(process, "its end", output)
                done = process.returncode == 0
                if rival is not None:
                    done |= self._judge(rival)
            if done:
                return

    def _rival(
        self, output: Path, first: subprocess.Popen[bytes]
    ) -> subprocess.Popen[bytes] | None:
        """Start a second process once the first holds the folder; None if it never does."""
        while not (output / LOCK_FILE).exists():
            if first.poll() is not None:
                return None
            time.sleep(0.005)
        self.outcome.second_writers += 1
        return self._start(output, f"{output}-rival.log")

    def _judge(self, rival: subprocess.Popen[bytes]) -> bool:
        """Note whether the second process was refused; return whether it came when the first had gone."""
        with rival:
            status = rival.wait(LIMIT_S)
        self._wait_for_all(rival, "a second writer", self.folder)
        if status == 2:
            self.outcome.refused += 1
        elif status != 0:
            self.outcome.faults.append(f"second writer: status {status}")
        return status == 0

    def _finish(self, output: Path, expected: dict[str, str]) -> None:
        """Resume to the end and compare."""
        with self._start(output) as process:
            status = process.wait(LIMIT_S)
        if status != 0:
            self.outcome.faults.append(f"resumed: status {status}; see {output}.log")
            return
        contents = self._contents(output)
        for name in expected | contents:
            if contents.get(name) != expected.get(name):
                self.outcome.faults.append(f"{output}: {name} is not that of the undisturbed run")
        hidden = [path for path in output.rglob(".*") if path.name != ".gitignore"]
        self.outcome.faults += [f"{path}: left behind" for path in hidden]
        shutil.rmtree(output, ignore_errors=True)

    def _start(self, output: Path, log: str = "") -> subprocess.Popen[bytes]:
        """Start the script in a new session, by which all its processes are known."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scenario = self.scenario
        command = [sys.executable, str(SCRIPTS / f"{scenario.script}.py"), *scenario.options]
        command += [scenario.output, str(output)]
        if next(output.glob(scenario.begun), None):
            command += scenario.resume
        with Path(log or f"{output}.log").open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def _wait_for_all(self, process: subprocess.Popen[bytes], what: str, output: Path) -> None:
        """Note it as a fault if a process of the run is still there some seconds later."""
        left = left_of_session(process)
        if not left:
            return
        self.outcome.faults.append(f"{output}: after {what} {len(left)} processes are still there")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()

    def _contents(self, output: Path) -> dict[str, str]:
        """Return what must be equal, by name: tables less their columns of times, the rest as it is."""
        contents = {}
        for pattern in self.scenario.compared:
            for path in output.glob(pattern):
                text = path.read_bytes()
                name = str(path.relative_to(output))
                if path.suffix == ".csv":
                    contents[name] = _without_times(text.decode())
                elif path.suffix == ".safetensors":
                    contents[name] = _tensors(text)
                else:
                    contents[name] = text.decode().replace(str(output), "OUTPUT")
        return contents


def _without_times(text: str) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    kept = [place for place, name in enumerate(rows[0]) if not _TIMED.match(name)]
    return "\n".join(",".join(row[place] for place in kept) for row in rows)


def _tensors(data: bytes) -> str:
    """Return the numbers of a safetensors file in hexadecimal; its header tells of times and paths."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True) + data[8 + length :].hex()


def left_of_session(process: subprocess.Popen[Any]) -> list[int]:
    """Return which processes of a session are still there ``PATIENCE_S`` after its leader was to end."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None and not processes_of_session(process.pid):
            return []
        time.sleep(0.01)
    return processes_of_session(process.pid)


def processes_of_session(session: int) -> list[int]:
    """Return the ids of the live processes of a session, from Linux's /proc."""
    processes = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # ended meanwhile
                continue
            if int(group) == session and state != "Z":
                processes.append(int(folder.name))
    return processes


@dataclass(frozen=True)
class Args:
    """Kill scripts at random moments and compare what a resume makes of it."""

    output: Path
    """A new folder for the runs."""
    count: int = 50
    """Kills in all."""
    seed: int = 0
    """Of the moments and signals."""
    only: str = ""
    """Comma-separated scenarios; all if empty."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kills; status 1 if anything was not as it should be."""
    args = parse(Args, argv)
    if args.count < 1:
        raise ServegymError(f"--count must be ≥ 1, got {args.count}")
    if args.output.exists():
        raise ServegymError(f"{args.output}: is there already; --output names a new folder")
    known = [scenario.name for scenario in scenarios()]
    only = read_list("--only", args.only, known) if args.only else known
    outcomes = run_kills(args.count, args.seed, args.output, only)
    for outcome in outcomes:
        for fault in outcome.faults:
            print(f"{outcome.scenario}: {fault}", file=sys.stderr)
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    run(main)
