"""Beyond 1,000 clients: what a plan and a decision cost, and how good schedules are, by size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from servegym.baselines.planning.planner import rebalanced_plan
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_loaded
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.pictures import to_png
from servegym.envs.playing.evaluation import brief, make_case
from servegym.envs.playing.policy import Situation
from servegym.envs.playing.summary import fixed, mean_interval, to_markdown, with_interval
from servegym.envs.process.metrics import episode_metrics
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.cases import Case
from servegym.envs.task.cluster import ClusterConfig, ReplicaConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lay_out, load_case, lower, make_task_state
from servegym.envs.task.registered import TASKS
from servegym.envs.task.sections import ProcessConfig, WorkloadConfig
from servegym.envs.workload.plan import Plan

CLIENTS: Final = (200, 1_000, 5_000, 20_000)
REPLICAS: Final = (1, 8, 64)
FEWEST: Final = 10
"""Clients of a replica; settings with fewer are left out."""
REQUESTS_PER_CLIENT: Final = 1319 / 200
DECISIONS: Final = 300
"""Decisions that are timed one by one."""

POLICIES: Final = {
    "fcfs": "least-tokens",
    "lookahead": "least-tokens",
    "offline-steal": "plan",
    "hybrid": "plan",
}
"""Policies, and who sends their requests to replicas."""

PLANNED: Final = "hybrid"
"""Of whose rows the planner's figures are shown."""


class Size(NamedTuple):
    """A cluster: clients of all replicas together, and the replicas that they are on."""

    clients: int
    replicas: int

    @property
    def requests(self) -> int:
        """As many for each client as on GSM8K-v0."""
        return round(REQUESTS_PER_CLIENT * self.clients)


def sizes(most_clients: int) -> Iterator[Size]:
    """Yield the sizes that are played."""
    for clients in CLIENTS:
        for replicas in REPLICAS:
            if clients <= most_clients and clients >= FEWEST * replicas:
                yield Size(clients, replicas)


TEXTS: Final = ("policy",)


def base_task(most_clients: int) -> TaskConfig:
    """Return the task that stands for all sizes up to so many clients."""
    return scale_task(Size(most_clients, 1), PLANNED)


def scale_task(size: Size, policy: str) -> TaskConfig:
    """Return the task of a size: GSM8K-v0's requests and costs, waiting requests may be stolen."""
    share, more = divmod(size.clients, size.replicas)
    tables = tuple(ReplicaConfig(share + (r < more)) for r in range(size.replicas))
    several = size.replicas > 1
    cluster = ClusterConfig(
        size.replicas,
        share,
        router=POLICIES[policy] if several else "round-robin",
        replica=tables if more else (),
    )
    process = ProcessConfig(steals=("waiting",) if several else ())
    workload = WorkloadConfig(requests=size.requests)
    return replace(TASKS["servegym/GSM8K-v0"], name="scale", cluster=cluster, process=process,
                   workload=workload)  # fmt: skip


def decision_ms(
    task: TaskConfig, policy: TriggerPolicy, case: Case, plan: Plan | None
) -> list[float]:
    """Return the milliseconds of the first decisions, view and mask included."""
    env = ServingEnv(task)
    options = {"requests": case.requests, "bound": case.bound, "plan": plan}
    observation, _ = env.reset(seed=0, options=options)
    spent, ended = list[float](), False
    while not ended and len(spent) < DECISIONS:
        started = time.process_time()
        action = policy.act(
            Situation(env.view(), observation, env.action_masks(), env.imagine, env.outlook)
        )
        spent.append(1e3 * (time.process_time() - started))
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
    return spent


def play_size(size: Size, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row a policy: one case, one plan, each policy's episode and its first decisions."""
    started = time.process_time()
    case = make_case(scale_task(size, PLANNED), seed)
    case_s = time.process_time() - started
    requests = case.requests
    tokens = requests.prompt_tokens + requests.output_tokens
    fleet = lay_out(scale_task(size, PLANNED)).fleet()
    started = time.process_time()
    found = rebalanced_plan(requests.decode_rounds, fleet, tokens=tokens)
    plan_s = time.process_time() - started
    for name in POLICIES:
        task, policy = scale_task(size, name), make_trigger_policy(name)
        plan = None if policy.planner is None else found.plan
        policy = replace(policy, planner=None)  # it is not to plan again
        policy.prepare(brief(task, case, seed))
        state = make_task_state(task, 1, len(requests))
        load_case(task, state, 0, case, plan)
        started = time.process_time()
        play_loaded(state, lower(task).costs, task, policy)
        episode_s = time.process_time() - started
        metrics = episode_metrics(state, 0)
        spent = decision_ms(task, policy, case, plan)
        p50, p99 = np.percentile(spent, [50, 99])
        yield {"seed": seed, "policy": name, **size._asdict(), "requests": size.requests} | {
            "case_s": case_s,
            "plan_s": plan_s,
            "plan_gap": found.load / found.lower_bound - 1,
            "gap": metrics["gap"],
            "makespan_s": metrics["makespan_s"],
            "bound_s": case.bound.seconds,
            "decisions": metrics["decisions"],
            "moves": metrics["moves"],
            "episode_s": episode_s,
            "decision_ms_p50": p50,
            "decision_ms_p99": p99,
        }


def play_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return the rows of all sizes up to that of ``task``."""
    for size in (Size(20, 1), Size(20, 2), Size(21, 2)):  # loads kernels, which is not to be timed
        list(play_size(size, 0))
    return [row for size in sizes(task.cluster.all_clients) for row in play_size(size, seed)]


def at(rows: pd.DataFrame, size: Size, policy: str) -> pd.DataFrame:
    """Return the cases of one size under one policy."""
    here = (rows["clients"] == size.clients) & (rows["replicas"] == size.replicas)
    return rows[here & (rows["policy"] == policy)].sort_values("seed")


def played_sizes(rows: pd.DataFrame) -> list[Size]:
    """Return the sizes of the rows, smallest first."""
    pairs = rows[["clients", "replicas"]].drop_duplicates().sort_values(["clients", "replicas"])
    return [Size(int(clients), int(replicas)) for clients, replicas in pairs.to_numpy()]


def column(rows: pd.DataFrame, size: Size, policy: str, name: str) -> NDArray[np.float64]:
    """Return one column of one size under one policy, by seed."""
    return at(rows, size, policy)[name].to_numpy(float)


def quality_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the gap of each policy to the proven bound, a row a size."""
    table = []
    for size in played_sizes(rows):
        cells = {
            "clients": f"{size.clients:,}",
            "replicas": f"{size.replicas}",
            "requests": f"{size.requests:,}",
            "n": f"{len(at(rows, size, PLANNED))}",
        }
        for policy in POLICIES:
            cells[f"`{policy}` (%)"] = with_interval(column(rows, size, policy, "gap"), 100)
        cells["plan above its bound (%)"] = with_interval(
            column(rows, size, PLANNED, "plan_gap"), 100, 3
        )
        cells["stolen across replicas, `hybrid` (%)"] = with_interval(
            column(rows, size, PLANNED, "moves") / size.requests, 100, 1
        )
        table.append(cells)
    return pd.DataFrame(table)


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what planning, deciding and playing take, a row a size: medians over cases."""
    table = []
    for size in played_sizes(rows):
        planned = at(rows, size, PLANNED)
        cells = {"clients": f"{size.clients:,}", "replicas": f"{size.replicas}"}
        cells["plan (s)"] = fixed(float(planned["plan_s"].median()), 3)
        cells["bound and case (s)"] = fixed(float(planned["case_s"].median()), 3)
        for policy in POLICIES:
            here = at(rows, size, policy)
            compiled_us = (1e6 * here["episode_s"] / here["decisions"]).median()
            cells[f"`{policy}`: decision p50 / p99 (µs)"] = " / ".join(
                fixed(1e3 * float(here[f"decision_ms_{name}"].median()), 0)
                for name in ("p50", "p99")
            )
            cells[f"`{policy}`: compiled (µs a decision)"] = fixed(float(compiled_us), 1)
        cells["episode, `hybrid` (s)"] = fixed(float(planned["episode_s"].median()), 3)
        table.append(cells)
    return pd.DataFrame(table)


def findings(rows: pd.DataFrame) -> str:
    """Return in words how quality and costs change from the smallest size to the largest."""
    every = played_sizes(rows)
    first, last = every[0], every[-1]
    lines = []
    for policy in POLICIES:
        gaps = [mean_interval(100 * column(rows, size, policy, "gap")) for size in (first, last)]
        (low, low_half), (high, high_half) = gaps
        lines.append(
            f"- `{policy}`: a gap of {fixed(low)} ± {fixed(low_half)} % with {first.clients:,} clients on "
            f"{first.replicas}, {fixed(high)} ± {fixed(high_half)} % with {last.clients:,} on "
            f"{last.replicas}."
        )
    plans = [float(np.median(column(rows, size, PLANNED, "plan_s"))) for size in every]
    slowest = every[int(np.argmax(plans))]
    gap = max(float(column(rows, size, PLANNED, "plan_gap").max()) for size in every)
    lines.append(
        f"- Planning takes {fixed(min(plans), 3)} to {fixed(max(plans), 2)} s, longest with "
        f"{slowest.clients:,} clients on {slowest.replicas}; no plan is more than {fixed(100 * gap, 3)} % "
        "above its proven bound."
    )
    medians, spent = (
        [
            1e3 * float(np.median(column(rows, size, policy, f"decision_ms_{name}")))
            for size in every
            for policy in POLICIES
        ]
        for name in ("p50", "p99")
    )
    lines.append(
        f"- A decision, asked from Python, takes {fixed(min(medians), 0)} to {fixed(max(medians), 0)} µs at "
        f"the median and {fixed(min(spent), 0)} to {fixed(max(spent), 0)} µs at the 99th percentile, view "
        "and mask included."
    )
    return "\n".join(lines) + "\n"


INTRODUCTION: Final = f"""\
GSM8K-v0's requests, {REQUESTS_PER_CLIENT:.1f} for each client, and its costs, all present at t = 0. Clients
are spread over the replicas as evenly as can be. `fcfs` and `lookahead` are routed by `least-tokens`, the
others by the offline plan over all clients; replicas steal waiting requests, the longest first. The costs are
linear and were measured up to 200 clients a replica: with more on one replica they are a what-if, and say how
methods scale, not how a machine would.

The gap is makespan / proven bound − 1: means over held-out cases with 95 % Student-t intervals. Times are
medians of processor time, of one process on the machine that ran it. A decision's percentiles are over the
first {DECISIONS} of an episode; *compiled*: time of a whole episode over its decisions.
"""


def report(rows: pd.DataFrame, command: str) -> str:
    """Return scale.md."""
    seeds = sorted(set(rows["seed"]))
    parts = [
        "# Beyond 1,000 clients\n",
        f"`{command}`\n",
        INTRODUCTION,
        f"{len(seeds)} cases of each size, seeds {seeds[0]} … {seeds[-1]}.\n",
        findings(rows),
        "![Quality and costs by clients](scale.png)\n",
        f"## Quality\n\n{to_markdown(quality_table(rows))}",
        f"## Costs\n\n{to_markdown(cost_table(rows))}",
    ]
    return "\n".join(parts)


def picture(rows: pd.DataFrame) -> bytes:
    """Return a PNG: gaps, seconds of a plan, and milliseconds of a decision, by clients."""
    every = played_sizes(rows)
    figure = Figure(figsize=(14.0, 4.8), dpi=110, layout="constrained")
    gaps, plans, decisions = figure.subplots(1, 3)
    styles = dict(zip(REPLICAS, ("o-", "s--", "^:"), strict=True))
    for k, policy in enumerate(POLICIES):
        for replicas, style in styles.items():
            here = [size for size in every if size.replicas == replicas]
            x = [size.clients for size in here]
            label = f"{policy}, {replicas} replica{'s' * (replicas > 1)}"
            values = [100 * column(rows, size, policy, "gap").mean() for size in here]
            gaps.plot(x, values, style, color=f"C{k}", label=label, linewidth=1.5, markersize=4)
            spent = [np.median(column(rows, size, policy, "decision_ms_p50")) for size in here]
            decisions.plot(x, spent, style, color=f"C{k}", linewidth=1.5, markersize=4)
            if policy == PLANNED:
                took = [np.median(column(rows, size, policy, "plan_s")) for size in here]
                plans.plot(x, took, style, color=f"C{k}", linewidth=1.5, markersize=4)
    for axes, title in (
        (gaps, "gap to the proven bound (%)"),
        (plans, "seconds of the offline plan"),
        (decisions, "milliseconds of a decision, median"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("clients")
        axes.grid(alpha=0.25)
    gaps.set_ylim(bottom=0.0)
    plans.set_yscale("log")
    decisions.set_ylim(bottom=0.0)
    handles, labels = gaps.get_legend_handles_labels()
    figure.legend(
        *(handles, labels), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return to_png(figure)
