"""The schedulers that people know on the five tasks beyond one batch machine: plays and table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import pandas as pd

from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.service import Window, service_rows
from servegym.envs.playing.summary import to_markdown, with_interval
from servegym.envs.playing.tables import Row, Schema
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import TASKS
from servegym.studies.policies import make_policy
from servegym.studies.quick import play_quickly

ROWS: Final = Schema(
    ("task", "policy", "seed", "within_limits", "gap"),
    key=("task", "policy", "seed"),
    whole=("seed",),
    texts=("task", "policy"),
    optional=("within_limits", "gap"),
    if_deleted="its episode is played again",
)
"""What ``rows.csv`` must be: a share of requests where the task has limits, else a gap."""

WHO: Final = {
    "vllm": "vLLM's and Sarathi-Serve's: mixed passes within a budget of tokens",
    "sglang": "SGLang's: prefill first, beside a falling reserve for outputs",
    "trt-no-evict": "TensorRT-LLM's: mixed passes, who fits at full length",
    "orca": "Orca's: the same, prompts whole",
    "fcfs": "prefill first, in order of arrival",
    "hybrid": "the paper's: plan, steal, Lagrangian rule",
    "lpt": "longest first, the same rule",
    "lagrangian": "`lpt` with prices of memory and of missed limits",
    "shed": "`vllm`, turns away who would come too late",
    "no-steal": "`vllm` without stealing",
    "fixed-count": "as many clients as fit for sure, the paper's number",
    "reserve-0.9": "leaves memory free by a quantile of outputs",
    "random": "any legal action",
}
"""The policies, in order of the table. ``sarathi`` is ``vllm`` at the same budget, which the task sets."""

SHORT: Final = ("vllm", "sglang", "trt-no-evict", "hybrid", "lagrangian", "no-steal")
"""Rows of the short table, which the README shows."""


class Entry(NamedTuple):
    """A task of the table."""

    name: str
    window: Window | None
    """Which arrivals count; None: the gap counts."""
    without: Sequence[str]
    """Policies that the task cannot have, or that differ in nothing from others there."""

    @property
    def task(self) -> TaskConfig:
        """The registered task."""
        return TASKS[f"servegym/{self.name}"]

    @property
    def policies(self) -> list[str]:
        """The policies that are played."""
        return [name for name in WHO if name not in self.without]


_COUNTS: Final = ("fixed-count", "reserve-0.9")

ENTRIES: Final = (
    Entry("Chat-v0", Window(60.0, 30.0), ("no-steal", *_COUNTS)),
    Entry("Cluster-v0", Window(10.0, 5.0), ("sglang", *_COUNTS)),
    Entry("Disaggregated-v0", Window(20.0, 10.0), ("sglang", "no-steal", *_COUNTS)),
    Entry("Elastic-v0", None, ("hybrid", "shed", "no-steal")),
    Entry("Rollout-v0", None, ("sglang", "shed", *_COUNTS)),
)
"""Windows as in ``results/tasks``."""


def play_case(entry: Entry, names: Sequence[str], seed: int) -> list[Row]:
    """Play policies on a case; return a row each."""
    task, rows = entry.task, []
    case = make_case(task, seed)
    for name in names:
        played = play_quickly(task, name, make_policy(name, task.name), case, seed)
        row = {"task": entry.name, "policy": name, "seed": seed}
        if entry.window is None:
            row |= {"within_limits": float("nan"), "gap": played.gap}
        else:
            figures = service_rows(played.log, case.requests, entry.window, played.elapsed_s)[0]
            row |= {"within_limits": figures["slo_attainment"], "gap": float("nan")}
        rows.append(row)
    return rows


def table_of(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return one row a policy, one column a task; empty where the task cannot have the policy."""
    table = []
    groups = dict(iter(rows.groupby(["task", "policy"])))
    for name in names:
        shown = "`vllm`, `sarathi`" if name == "vllm" else f"`{name}`"
        cells = {"policy": f"{shown} {WHO[name]}"}
        for entry in ENTRIES:
            column = "gap" if entry.window is None else "within_limits"
            words = "gap" if entry.window is None else "within limits"
            group = groups.get((entry.name, name))
            cells[f"{entry.name} {words} (%)"] = (
                "" if group is None else with_interval(group[column].to_numpy(float), 100, 1)
            )
        table.append(cells)
    return pd.DataFrame(table)


def cases_of(rows: pd.DataFrame) -> str:
    """Return which cases were played, in words."""
    seeds = rows["seed"]
    return f"{seeds.nunique()} held-out cases, seeds {seeds.min()} … {seeds.max()}"


def note(rows: pd.DataFrame) -> str:
    """Return what cells are."""
    return (
        f"Means over {cases_of(rows)}, with 95 % Student-t intervals: the share of\nrequests in steady "
        "state that meet their limits, and the gap to the bound. An empty cell: the task cannot have\n"
        "the policy, or it changes nothing there.\n"
    )


def report(rows: pd.DataFrame, command: str) -> str:
    """Return table.md."""
    return (
        f"# The schedulers that people know\n\n`{command}`\n\n{to_markdown(table_of(rows, list(WHO)))}\n"
        f"{note(rows)}"
    )


def short_report(rows: pd.DataFrame) -> str:
    """Return short.md: some rows of table.md, for the README."""
    return (
        f"{to_markdown(table_of(rows, SHORT))}\nShares of requests within their limits, in steady state, and "
        f"gaps to the bound: {cases_of(rows)}.\nAn empty cell: the task cannot have the policy, or it "
        "changes nothing there.\n"
    )
