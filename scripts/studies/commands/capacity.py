"""The highest arrival rate at which a policy meets the limits of so many requests, by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import pandas as pd

from servegym.baselines.registry import make_trigger_policy
from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED, check_policies, make_case
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS
from servegym.envs.playing.policy import asked_task
from servegym.envs.playing.remarks import remarks
from servegym.envs.playing.service import Window, check_window
from servegym.envs.playing.summary import to_markdown
from servegym.envs.task.registered import load_task
from servegym.envs.task.slo import SloConfig
from servegym.studies.capacity import (
    Study,
    check_task,
    looks,
    table_of,
    with_requests,
    without_capacity,
)
from servegym.studies.cases import parse_policies, short_name
from servegym.studies.checks.load import load_of
from servegym.studies.cli import check_number, command_line, parse
from servegym.studies.policies import make_policy, note_agents, weights_of
from servegym.studies.workers import open_workers

LOAD_REQUESTS, LOAD_SEEDS = 3000, 5
"""Of the fluid capacity, as ``scripts/check_load.py`` takes them."""

TEXT = """# {task}: arrivals that are sustained

`{command}`

The highest rate at which {target:g} % of the requests meet their limits ({limits}).
{requests} requests an episode; those count that arrive after {warmup_s:g} s, and {cooldown_s:g} s before the
last at the latest. Episodes of seeds 1000000 and up are added to a rate, up to {episodes}, until the interval
of their mean lies on one side of {target:g} %; it is looked at {looks} times at most, at {confidence:.2f} %
each, so that a rate is misjudged with a chance of 5 % at most.

- **bracket**: the highest rate that is sustained … the lowest that is not; the capacity lies between;
- **undecided**: the rates between them at which {episodes} episodes did not tell;
- **rate**: where a line through the mean shares met in the bracket falls below {target:g} %;
- **rate / fluid**: `{reference}` serves {fluid:.3g} a second where all requests are present at once;
- **rate / μ**: μ = K / (b · E[g]) = {known} a second (both as in `scripts/check_load.py`).

{table}"""


@dataclass(frozen=True)
class Args:
    """Find how many arrivals a second policies sustain; goes on where it was interrupted."""

    task: str = "Chat-v0"
    """A registered task or a task TOML, with arrivals and an [slo]."""
    policies: str = "vllm,sglang,trt-no-evict,orca,fcfs,hybrid,lpt,shed"
    """Comma-separated names or folders of trained agents."""
    attainment: float = 0.9
    """Share of the requests that must meet their limits, 0 … 1."""
    requests: int = 2000
    """Of an episode. A workload file brings its own."""
    episodes: int = 640
    """Most held-out episodes of a rate, seeds 1000000 and up; fewer where fewer decide."""
    narrow: float = 0.02
    """A bracket is narrow enough where its ends differ by this share."""
    warmup_s: float = 60.0
    """Arrivals of the first seconds do not count."""
    cooldown_s: float = 30.0
    """Nor do those of so many seconds before the last arrival."""
    reference: str = "vllm"
    """Policy whose service of requests that are all present is the fluid capacity."""
    output: Path = Path("results/capacity")
    """Folder for a folder a task, with rows.csv and capacity.md."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""

    def __post_init__(self) -> None:
        check_number("--attainment", self.attainment, 0, 1)
        check_number("--requests", self.requests, 100, 1_000_000)
        check_number("--episodes", self.episodes, 2, 1_000_000)
        check_number("--narrow", self.narrow, 0.001, 1)
        check_window(Window(self.warmup_s, self.cooldown_s))


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    names = (
        *("task", "policies", "attainment", "requests", "episodes", "narrow"),
        *("warmup_s", "cooldown_s", "reference", "output"),
    )
    return command_line("capacity", **{name: getattr(args, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    """Search, tabulate and write."""
    args = parse(Args, argv)
    task = load_task(args.task)
    check_task(task)
    names, reference = parse_policies(args.policies, task.name), args.reference
    policy_of = partial(make_policy, task_name=task.name)
    check_policies(task, policy_of, names)
    for line in remarks(task, policy_of, names):
        print(line)
    try:
        asked_task(task, make_trigger_policy(reference))
    except ServegymError as error:
        raise ServegymError(f"--reference {reference}: {error}") from None
    task = with_requests(task, args.requests)
    requests = len(make_case(task, HELD_OUT_SEED).requests)
    loads = [load_of(task, reference, LOAD_REQUESTS, seed) for seed in range(LOAD_SEEDS)]
    fluid, known = mean(load.served for load in loads), mean(load.known for load in loads)
    window, folder = Window(args.warmup_s, args.cooldown_s), args.output / short_name(task)
    weights = weights_of(names, task.name)
    policy_of = partial(make_policy, task_name=task.name, weights=weights)
    with open_workers(args.jobs, args.cluster) as crew:
        study = Study(
            *(task, args.attainment, window, args.episodes, args.narrow, fluid, requests, crew),
            policy_of if isinstance(crew, int) else crew.carried(policy_of, names),
        )
        with locked(folder):
            note_agents(names, task.name, folder)
            episodes = study.open(folder)
            with episodes.table:
                rates = {name: study.search(episodes, name) for name in names}
            text = report(args, study, table_of(rates, args.attainment, fluid, known), known)
            write_file(folder / "capacity.md", text)
    print(text)
    for line in without_capacity(rates, args.attainment):
        raise ServegymError(line)
    return 0


def report(args: Args, study: Study, table: pd.DataFrame, known: float) -> str:
    """Return capacity.md."""
    return TEXT.format(
        task=study.task.name,
        command=command_of(args),
        target=100 * study.target,
        limits=limits_of(study.task.slo),
        requests=study.requests,
        warmup_s=args.warmup_s,
        cooldown_s=args.cooldown_s,
        episodes=args.episodes,
        looks=len(looks(args.episodes)),
        confidence=100 * study.confidence,
        known=f"{known:.3g}" if known > 0 else "∞ (no limit of memory)",
        reference=args.reference,
        fluid=study.start,
        table=to_markdown(table),
    )


def limits_of(slo: SloConfig) -> str:
    """Return the limits of all requests in words."""
    limits = {"first token": slo.ttft_s, "each further token, on average,": slo.tpot_s}
    words = [f"{what} within {1e3 * s:g} ms" for what, s in limits.items() if s is not None]
    return " and ".join(words + ["those of its class"] * bool(slo.classes))
