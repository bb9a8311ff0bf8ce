"""Any number of random episodes in the compiled simulator and in the slow references.

    python -m tests.compare_with_reference --episodes 50000

from the project's root folder. `make test` plays a few hundred of the same episodes.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: the imports below take seconds
    from servegym.studies.terminal import begin

    begin()

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.parallel import USUAL_JOBS, check_jobs, run_parallel
from servegym.studies.cli import check_number, parse, run
from tests.against_reference import INFORMATION, Information, play_one

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


@dataclass(frozen=True)
class Args:
    """Play random episodes in the simulator and in the reference; status 1 if any two differ."""

    episodes: int = 50_000
    """How many, shared evenly by the kinds of information on output lengths."""
    seed: int = 0
    """Episode k of a kind is drawn from (seed, kind, k)."""
    output: Path = Path("results/checks/reference")
    """Folder for reference.md."""
    jobs: int = USUAL_JOBS
    """Processes."""

    def __post_init__(self) -> None:
        check_number("--episodes", self.episodes, 1, MAX_EPISODES)
        check_number("--seed", self.seed, 0, 2**62)
        check_jobs(self.jobs)


@dataclass
class Count:
    """Totals over episodes."""

    episodes: int = 0
    requests: int = 0
    decisions: int = 0
    different: int = 0


Chunk = tuple[Information, range]


def play_chunk(seed: int, chunk: Chunk) -> tuple[Information, Count, list[str]]:
    """Play a chunk of episodes; return its totals and a line for each episode that differs."""
    information, numbers = chunk
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


def chunks_of(episodes: int) -> list[Chunk]:
    """Divide the episodes evenly among the kinds of information, in chunks."""
    chunks: list[Chunk] = []
    for kind, information in enumerate(INFORMATION):
        count = episodes // len(INFORMATION) + (kind < episodes % len(INFORMATION))
        chunks += [
            (information, range(first, min(first + CHUNK, count)))
            for first in range(0, count, CHUNK)
        ]
    return chunks


def report(args: Args, counts: dict[Information, Count], differences: Sequence[str]) -> str:
    """Return reference.md."""
    command = (
        f"python -m tests.compare_with_reference --episodes {args.episodes} --seed {args.seed}"
    )
    rows = [
        f"| {name} | {count.episodes} | {count.requests} | {count.decisions} | {count.different} |"
        for name, count in counts.items()
    ]
    total = sum(count.different for count in counts.values())
    table = [
        "| lengths | episodes | requests | decisions | different |",
        "|:--|--:|--:|--:|--:|",
        *rows,
    ]
    parts = ["# The simulator against the reference", f"`{command}`", WHAT, "\n".join(table)]
    parts += [f"Different: {total}.", *(f"- {difference}" for difference in differences[:SHOWN])]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Play, count and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    chunks = chunks_of(args.episodes)
    done = run_parallel(play_chunk, [(args.seed, chunk) for chunk in chunks], args.jobs)
    counts = {information: Count() for information in INFORMATION}
    differences: list[str] = []
    with closing(done):
        for information, count, lines in tqdm(done, desc="chunks", total=len(chunks)):
            for name, value in vars(count).items():
                setattr(counts[information], name, getattr(counts[information], name) + value)
            differences += lines
    text = report(args, counts, sorted(differences))
    write_file(args.output / "reference.md", text)
    print(text)
    return 1 if differences else 0


if __name__ == "__main__":
    run(main)
