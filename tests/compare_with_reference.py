"""Any number of random episodes in the compiled simulator and in the slow references.

    python -m tests.compare_with_reference --episodes 50000
    python -m tests.compare_with_reference --clusters 100000
    python -m tests.compare_with_reference --orders 14000
    python -m tests.compare_with_reference --rules 20000

from the project's root folder. `make test` plays a few hundred of the same episodes.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: the imports below take seconds
    from servegym.studies.terminal import begin

    begin()

import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.parallel import USUAL_JOBS, check_jobs, run_parallel
from servegym.envs.vocabulary import ORDERS
from servegym.studies.cli import check_number, parse, run
from tests.against_cluster import compare_cluster, compare_or_nearly
from tests.against_reference import INFORMATION, play_one
from tests.cluster_helpers import (
    balancing_case,
    interval_case,
    ordered_case,
    planned_case,
    shared_case,
)
from tests.random_clusters import ClusterCase, in_step
from tests.reference_planned import PLANNED_RULES

CHUNK = 100  # episodes of a job
SHOWN = 10  # differences told of

MAX_EPISODES = 10**9

WHAT = (
    "Random episodes (1 … 12 clients, up to 60 requests, arrivals, any cost model, plans, token budgets,\n"
    "decisions at events or rounds) under the same random actions in the compiled simulator and in the\n"
    "slow reference of `tests/`: masks, view, phases, queues, expected finishes and times are compared at\n"
    "every decision. quantile and mean-sd: predicted lengths compared by that; unknown: the workload's "
    "mean and spread."
)

TIES = (
    "seconds are no multiples of powers of two, a move ends within a rounding of a round's end, and either\n"
    "may come first: equal if the reference's moves take 1e-12 more or less."
)

CLUSTERS = (
    "Random clusters (1 … 4 replicas, equal or not; up to 30 requests; every router, victim, guard and\n"
    "block length; watermarks, stale routers, token budgets, requests that are rejected) under the first-\n"
    "come rule, prefill-first, chunked or under SGLang's guard, in the compiled simulator and in the slow\n"
    "reference of `tests/`: replica, client, admission, first token, finish, preemptions, recomputed tokens\n"
    "and moves of every request, and the stages of every replica. Integers are equal, times to 1e-9. exact:\n"
    "seconds are multiples of powers of two, so that ties are ties for both. moving: prefill-first or\n"
    "chunked, and replicas steal, prefill for others or evict to the host. in step: prefill-first or\n"
    "chunked, at least 3 replicas of different memory, every round 1 s, so that most events coincide.\n"
    "balancing: replicas steal half of an imbalance, migrate by free memory, wait between thefts, and\n"
    "requests that come too late are shed. \n"
    f"ties: {TIES}"
)

KINDS = (  # the place of each is part of its generator's key
    "prefill-first",
    "prefill-first, exact",
    "chunked",
    "chunked, exact",
    "sglang",
    "sglang, exact",
    "moving",
    "moving, exact",
    "in step",
    "moving, in step",
    "balancing",
    "balancing, exact",
    "balancing, in step",
)


ORDERED = (
    "The random clusters of clusters.md, also moving ones, under the rule `shortest`, by each order;\n"
    "every victim, with patience or without. intervals: a scheduler knows one end of an interval for each\n"
    "output, which may be far from it, and packs by that, as A_min does; by expected outputs or in batches.\n"
    f"ties: {TIES}"
)

RULED = (
    "The random clusters of clusters.md under the other rules, in which clients have planned queues and\n"
    "steal from each other: a quarter still, half moving, a quarter balancing; some with the router `plan`,\n"
    "some in step. Every other one is exact. Where memory is limited `steal` and `aligned` are asked at\n"
    "every round.\n"
    f"ties: {TIES}"
)

INTERVALS = "intervals"
ORDER_KINDS = (*ORDERS, INTERVALS)


@dataclass(frozen=True)
class Args:
    """Play random episodes in the simulator and in the reference; status 1 if any two differ."""

    episodes: int = 50_000
    """How many, shared evenly by the kinds of information on output lengths."""
    clusters: int = 0
    """Play so many random clusters instead, shared evenly by their kinds."""
    orders: int = 0
    """Play so many random clusters under the rule ``shortest`` instead, shared evenly by its orders."""
    rules: int = 0
    """Play so many random clusters under the rules that go by length or by a plan instead."""
    seed: int = 0
    """Episode k of a kind is drawn from (seed, kind, k)."""
    output: Path = Path("results/checks/reference")
    """Folder for reference.md, clusters.md, orders.md or rules.md."""
    jobs: int = USUAL_JOBS
    """Processes."""

    def __post_init__(self) -> None:
        check_number("--episodes", self.episodes, 1, MAX_EPISODES)
        asked = []
        for name in ("clusters", "orders", "rules"):
            check_number(f"--{name}", getattr(self, name), 0, MAX_EPISODES)
            asked += [f"--{name}"] * (getattr(self, name) > 0)
        if len(asked) > 1:
            raise ServegymError(f"{' and '.join(asked)} are {len(asked)} comparisons; give one")
        check_number("--seed", self.seed, 0, 2**62)
        check_jobs(self.jobs)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and the page that tells of it."""

    amount: str  # the argument that says how many
    file: str
    title: str
    what: str
    first: str  # column
    kinds: Sequence[str]


COMPARISONS = (
    Comparison(
        "clusters",
        "clusters.md",
        "# The cluster against the reference",
        CLUSTERS,
        "policy",
        KINDS,
    ),
    Comparison(
        "orders",
        "orders.md",
        "# Orders of the rule shortest against the reference",
        ORDERED,
        "by",
        ORDER_KINDS,
    ),
    Comparison(
        "rules",
        "rules.md",
        "# Rules by length and by plan in clusters against the reference",
        RULED,
        "rule",
        PLANNED_RULES,
    ),
    Comparison(
        "episodes",
        "reference.md",
        "# The simulator against the reference",
        WHAT,
        "lengths",
        INFORMATION,
    ),
)


@dataclass
class Count:
    """Totals over episodes."""

    episodes: int = 0
    requests: int = 0
    decisions: int = 0
    different: int = 0


@dataclass
class ClusterCount:
    """Totals over random clusters."""

    clusters: int = 0
    requests: int = 0
    stages: int = 0
    preemptions: int = 0
    rejected: int = 0
    shed: int = 0
    moves: int = 0
    ties: int = 0
    different: int = 0


Counts = Count | ClusterCount
Chunk = tuple[str, range]


def play_chunk(seed: int, chunk: Chunk) -> tuple[str, Counts, list[str]]:
    """Play a chunk of episodes; return its totals and a line for each episode that differs."""
    kind, numbers = chunk
    return (_play_episodes if kind in INFORMATION else _play_clusters)(seed, kind, numbers)


def _play_episodes(seed: int, kind: str, numbers: range) -> tuple[str, Counts, list[str]]:
    information = next(name for name in INFORMATION if name == kind)
    count, differences = Count(), list[str]()
    for number in numbers:
        key = [seed, INFORMATION.index(information), number]
        count.episodes += 1
        try:
            requests, decisions = play_one(np.random.default_rng(key), information)
        except AssertionError as error:
            count.different += 1
            differences.append(f"{information}, generator {key}: {str(error).splitlines()[:1]}")
        else:
            count.requests += requests
            count.decisions += decisions
    return information, count, differences


def _play_clusters(seed: int, kind: str, numbers: range) -> tuple[str, Counts, list[str]]:
    count, differences = ClusterCount(), list[str]()
    kinds = next(each.kinds for each in COMPARISONS if kind in each.kinds)
    usual = kinds is KINDS
    for number in numbers:
        key = [seed, kinds.index(kind), number, *([] if usual else [len(kind)])]
        rng = np.random.default_rng(key)
        ends: list[int] = []
        rule = "fcfs"
        exact = "exact" in kind or "in step" in kind if usual else bool(number % 2)
        if usual:
            case = _case_of(kind, rng)
        elif kind in PLANNED_RULES:
            case, rule = planned_case(rng, dyadic=exact), kind
        else:
            rule = "shortest"
            if kind == INTERVALS:
                case, ends = interval_case(rng, dyadic=exact)
            else:
                case = ordered_case(rng, kind, dyadic=exact)
        count.clusters += 1
        try:
            with warnings.catch_warnings():  # of decode tables shorter than the clients
                warnings.simplefilter("ignore")
                tied = False
                if exact:
                    outcome = compare_cluster(case, rule, ends)
                else:
                    outcome, tied = compare_or_nearly(case, rule, ends)
        except AssertionError as error:
            count.different += 1
            differences.append(f"{kind}, generator {key}: {str(error).splitlines()[:1]}")
        else:
            count.ties += tied
            count.requests += len(case.requests)
            count.stages += len(outcome.stages)
            count.preemptions += outcome.preemptions
            count.shed += sum(record.phase == "shed" for record in outcome.records)
            count.rejected += sum(record.phase == "rejected" for record in outcome.records)
            count.moves += sum(record.moves for record in outcome.records)
    return kind, count, differences


def _case_of(kind: str, rng: np.random.Generator) -> ClusterCase:
    """Draw a case of one of ``KINDS``."""
    sglang, moving, step = "sglang" in kind, "moving" in kind, "in step" in kind
    chunked = None if sglang or moving or step else "chunked" in kind
    exact = step or "exact" in kind
    if "balancing" in kind:
        case = balancing_case(rng, dyadic=exact)
    else:
        case = shared_case(rng, dyadic=exact, chunked=chunked, sglang=sglang, moving=moving)
    return in_step(rng, case) if step else case


def chunks_of(episodes: int, kinds: Sequence[str]) -> list[Chunk]:
    """Divide the episodes evenly among their kinds, in chunks."""
    chunks: list[Chunk] = []
    for place, kind in enumerate(kinds):
        count = episodes // len(kinds) + (place < episodes % len(kinds))
        chunks += [
            (kind, range(first, min(first + CHUNK, count))) for first in range(0, count, CHUNK)
        ]
    return chunks


def report(
    args: Args, comparison: Comparison, counts: dict[str, Counts], differences: Sequence[str]
) -> str:
    """Return the page of a comparison."""
    amount = getattr(args, comparison.amount)
    command = (
        f"python -m tests.compare_with_reference --{comparison.amount} {amount} --seed {args.seed}"
    )
    names = [item.name for item in fields(next(iter(counts.values())))]
    rows = [
        _row([name, *(str(getattr(count, column)) for column in names)])
        for name, count in counts.items()
    ]
    total = sum(count.different for count in counts.values())
    table = [_row([comparison.first, *names]), "|:--|" + "--:|" * len(names), *rows]
    parts = [comparison.title, f"`{command}`", comparison.what, "\n".join(table)]
    parts += [f"Different: {total}.", *(f"- {difference}" for difference in differences[:SHOWN])]
    return "\n\n".join(parts) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Play, count and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    comparison = next(each for each in COMPARISONS if getattr(args, each.amount))
    chunks = chunks_of(getattr(args, comparison.amount), comparison.kinds)
    count_class = Count if comparison.amount == "episodes" else ClusterCount
    counts: dict[str, Counts] = {kind: count_class() for kind in comparison.kinds}
    done = run_parallel(play_chunk, [(args.seed, chunk) for chunk in chunks], args.jobs)
    differences: list[str] = []
    with closing(done):
        for kind, count, lines in tqdm(done, desc="chunks", total=len(chunks)):
            for name, value in vars(count).items():
                setattr(counts[kind], name, getattr(counts[kind], name) + value)
            differences += lines
    text = report(args, comparison, counts, sorted(differences))
    write_file(args.output / comparison.file, text)
    print(text)
    return 1 if differences else 0


if __name__ == "__main__":
    run(main)
