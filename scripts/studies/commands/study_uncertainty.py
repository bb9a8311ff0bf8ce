"""What schedulers can do where output lengths are uncertain: policies, pulls and plans compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from servegym.agents.card import CARD_FILE, read_card
from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS, Workers
from servegym.envs.task.registered import load_task
from servegym.studies.cases import held_out
from servegym.studies.checks.common import TAUS, Collection
from servegym.studies.cli import check_folder, command_line, parse, read_list
from servegym.studies.foresight import (
    SAMPLED,
    play_foresight,
    play_sampled,
    report_foresight,
    report_sampled,
    tuned_multipliers,
)
from servegym.studies.policies import AGENTS, SHIPPED, make_policy
from servegym.studies.tuned import TUNING_CASES, tuned_threshold
from servegym.studies.uncertainty import (
    CLAIRVOYANT_OF,
    MIXED,
    PREDICTED,
    PULLS,
    QUALITY,
    RISKS,
    SCENARIOS,
    SLOW,
    agents,
    draw_quality,
    judge_plans,
    play_mixed,
    play_quality,
    report_mixed,
    report_plans,
    report_quality,
    with_tau,
)
from servegym.studies.workers import open_workers

PARTS: Final = ("quality", "mixed", "plans", "foresight", "sampled")


@dataclass(frozen=True)
class Args:
    """Study policies under uncertain lengths; goes on where it was interrupted."""

    parts: str = ",".join(PARTS)
    """Comma-separated: quality (all policies by how good predictions are), mixed (pulls where some
    predictions are guesses), plans (what a plan by samples is worth on others), foresight (what it is worth
    to know the next finish), sampled (rollouts by samples of the lengths)."""
    cases: int = 100
    """Held-out cases, seeds 1000000 and up."""
    slow_cases: int = 10
    """Held-out cases of the policies that take a second an episode, and of the plans."""
    foresight_cases: int = 500
    """Held-out cases of the part foresight."""
    sampled_cases: int = 100
    """Held-out cases of the part sampled, which takes seconds an episode."""
    output: Path = Path("results/uncertainty")
    """Folder for CSV files, a table a part and quality.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def study_quality(args: Args, seeds: range, slow: range, crew: Workers) -> str:
    """Play every policy at every τ and draw the picture; return the report."""
    task = load_task(PREDICTED)
    thresholds = {tau: tuned_threshold(with_tau(task, tau), TUNING_CASES, crew) for tau in TAUS}
    asked: dict[str, Any] = {"thresholds": thresholds}
    for key, agent in {"agent": PREDICTED, "known_agent": CLAIRVOYANT_OF}.items():
        asked[key] = read_card(AGENTS / agent / CARD_FILE).weights_sha256
    collection = Collection(args.output, asked, parts=("quality", "slow"))
    collection.open([task])
    play = partial(play_quality, thresholds=thresholds, learned=agents())
    rows = collection.rows(task, seeds, partial(play, names=QUALITY), crew, "quality")
    slow_rows = collection.rows(task, slow, partial(play, names=SLOW), crew, "slow")
    write_file(args.output / "quality.png", draw_quality(rows))
    return report_quality(rows, slow_rows)


def study_mixed(args: Args, seeds: range, crew: Workers) -> str:
    """Play the pulls where some predictions are guesses; return the report."""
    task = load_task(MIXED)
    collection = Collection(args.output, {"policies": PULLS})
    collection.open([task])
    return report_mixed(collection.rows(task, seeds, play_mixed, crew))


def study_plans(args: Args, seeds: range, crew: Workers) -> str:
    """Judge plans by scenarios they have not seen; return the report."""
    tables = {}
    for name in (PREDICTED, MIXED):
        task = load_task(name)
        collection = Collection(args.output / "plans", {"scenarios": SCENARIOS, "risks": RISKS})
        collection.open([task])
        tables[name] = collection.rows(task, seeds, judge_plans, crew)
    return report_plans(tables)


def study_foresight(args: Args, seeds: range, crew: Workers) -> str:
    """Play rules that differ in what they know of the next finish; return the report."""
    task = load_task(PREDICTED)
    multipliers = tuned_multipliers(task, TUNING_CASES)
    collection = Collection(args.output / "foresight", {"multipliers": multipliers})
    collection.open([task])
    fast_play = partial(play_foresight, multipliers=multipliers)
    return report_foresight(collection.rows(task, seeds, fast_play, crew), multipliers)


def study_sampled(args: Args, seeds: range, crew: Workers) -> str:
    """Play rollouts by samples; return the report."""
    task = load_task(PREDICTED)
    collection = Collection(args.output / "sampled", {"policies": SAMPLED})
    collection.open([task])
    return report_sampled(collection.rows(task, seeds, play_sampled, crew))


TITLES: Final = {
    "quality": "Policies by the quality of predictions",
    "mixed": "Pulls where some predictions are guesses",
    "plans": "Plans by samples",
    "foresight": "What knowing the next finish is worth",
    "sampled": "Rollouts by samples",
}


CASES_OF: Final = {
    "cases": ("quality", "mixed"),
    "slow_cases": ("quality", "plans"),
    "foresight_cases": ("foresight",),
    "sampled_cases": ("sampled",),
}
"""The parts that each number of cases is of."""


def command_of(args: Args, part: str) -> str:
    """Return the command that does what ``args`` say of a part."""
    asked: dict[str, object] = {"parts": part}
    for key, parts in CASES_OF.items():
        if part in parts:
            asked[key] = getattr(args, key)
    return command_line("study_uncertainty", **asked, output=args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Play what is missing, tabulate and draw."""
    args = parse(Args, argv)
    parts = read_list("--parts", args.parts, PARTS)
    seeds, slow = held_out(args.cases), held_out(args.slow_cases, "--slow-cases")
    foreseen = held_out(args.foresight_cases, "--foresight-cases")
    sampled = held_out(args.sampled_cases, "--sampled-cases")
    check_folder(args.output)
    if "quality" in parts:
        make_policy(SHIPPED, PREDICTED)  # refuse before hours of play
    with open_workers(args.jobs, args.cluster) as crew:
        for part in parts:
            with locked(args.output):
                if part == "quality":
                    body = study_quality(args, seeds, slow, crew)
                elif part == "mixed":
                    body = study_mixed(args, seeds, crew)
                elif part == "plans":
                    body = study_plans(args, slow, crew)
                elif part == "foresight":
                    body = study_foresight(args, foreseen, crew)
                else:
                    body = study_sampled(args, sampled, crew)
                text = f"# {TITLES[part]}\n\n`{command_of(args, part)}`\n\n{body}"
                write_file(args.output / f"{part}.md", text)
            print(text)
    return 0
