"""Try wrong arguments, damaged files, odd terminals and kills on every script.

Whatever a user does, a script ends within its time, with the status that it should, and says what is
wrong in one line. Trials are drawn from the scripts' own options and files, so that new ones are tried
without being listed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
from tqdm import tqdm

from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.parallel import USUAL_JOBS, run_parallel
from servegym.envs.playing.summary import to_markdown
from servegym.studies.cli import SCRIPTS, check_number, command_line, parse, read_list
from servegym.studies.robustness import damaged_files, odd_terminals, wrong_arguments
from servegym.studies.robustness.kills import run_kills
from servegym.studies.robustness.outcomes import FINE, ONE_LINE, STATUS, VERDICTS, Outcome

PARTS: Final = ("arguments", "files", "terminals", "kills")
MAX_TRIALS: Final = 100_000


@dataclass(frozen=True)
class Args:
    """Try wrong inputs on every script; writes robustness.md, and robustness.csv if any fault is found."""

    parts: str = ",".join(PARTS)
    """Comma-separated: arguments, files, terminals, kills."""
    arguments: int = 1000
    """Wrong command lines."""
    files: int = 400
    """Damaged files."""
    terminals: int = 100
    """Combinations of terminal, locale and environment, at most as many as there are."""
    kills: int = 40
    """Processes killed in the middle."""
    seed: int = 0
    """Of what is drawn; the same seed tries the same."""
    output: Path = Path("results/robustness")
    """Folder for the results."""
    jobs: int = USUAL_JOBS
    """Worker processes."""


def outcomes_of(part: str, args: Args) -> Iterator[Outcome]:
    """Try a part, with a progress bar."""
    count = getattr(args, part)
    if part == "kills":
        yield from _killed(count, args.seed)
        return
    generators: dict[str, tuple[Callable[[int, int], Sequence[Any]], Callable[[Any], Outcome]]] = {
        "arguments": (wrong_arguments.trials, wrong_arguments.try_one),
        "files": (damaged_files.trials, damaged_files.try_one),
        "terminals": (odd_terminals.trials, odd_terminals.try_one),
    }
    draw, try_one = generators[part]
    trials = draw(count, args.seed)
    outcomes = run_parallel(try_one, [(trial,) for trial in trials], args.jobs)
    with closing(outcomes), tqdm(outcomes, total=len(trials), desc=part, unit="trial") as bar:
        yield from bar


def _killed(count: int, seed: int) -> Iterator[Outcome]:
    """Kill processes, one after another; every kill is fine or one of the faults of its scenario."""
    with tempfile.TemporaryDirectory(prefix="servegym-kills-") as folder:
        for scenario in run_kills(count, seed, Path(folder) / "runs", say=tqdm.write):
            for _ in range(scenario.kills - len(scenario.faults)):
                yield Outcome("kills", scenario.scenario, FINE)
            for fault in scenario.faults:
                yield Outcome("kills", scenario.scenario, STATUS, fault)


def report(outcomes: Sequence[Outcome], command: str) -> str:
    """Return robustness.md: how many trials of each part ended how."""
    table = pd.DataFrame([outcome.row for outcome in outcomes])
    counts = pd.crosstab(table["part"], table["verdict"]).reindex(
        columns=list(VERDICTS), fill_value=0
    )
    counts.insert(0, "tried", counts.sum(axis=1))
    shown = counts.loc[list(dict.fromkeys(table["part"]))].reset_index()
    return (
        f"# Wrong inputs\n\n`{command}`\n\nEvery trial must be refused in one line that says what is "
        "wrong, or be fine where nothing is.\nA traceback, a hang and a wrong status (also: several "
        f"lines, or something left behind) are faults.\n\n{to_markdown(shown)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Try everything and write the tables."""
    args = parse(Args, argv)
    parts = read_list("--parts", args.parts, PARTS)
    for name in PARTS:
        check_number(f"--{name}", getattr(args, name), 1, MAX_TRIALS)
    check_number("--seed", args.seed, 0, 2**62)
    if not (SCRIPTS / "check_robustness.py").is_file():
        raise ServegymError(
            "an installed package has no scripts to try; run scripts/check_robustness.py in a checkout"
        )
    make_folder(args.output)
    outcomes: list[Outcome] = []
    faults = args.output / "robustness.csv"
    faults.unlink(missing_ok=True)
    for part in parts:
        for outcome in outcomes_of(part, args):
            outcomes.append(outcome)
            if outcome.verdict not in (FINE, ONE_LINE):
                rows = sorted(
                    (fault.row for fault in outcomes if fault.verdict not in (FINE, ONE_LINE)),
                    key=lambda row: (PARTS.index(row["part"]), row["tried"]),
                )
                write_file(faults, pd.DataFrame(rows).to_csv(index=False))
    counts = {part: getattr(args, part) for part in parts}
    command = command_line(
        "check_robustness", parts=",".join(parts), **counts, seed=args.seed, output=args.output
    )
    text = report(outcomes, command)
    write_file(args.output / "robustness.md", text)
    print(text)
    return 1 if faults.exists() else 0
