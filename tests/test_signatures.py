"""Signs of failure: each is told of a case that shows it, and not of one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from servegym.baselines.registry import make_policy
from servegym.envs import TaskConfig, make_requests, play
from servegym.envs.playing.signatures import SIGNATURES, warnings
from servegym.envs.process.metrics import episode_metrics
from servegym.envs.simulator.booking import book
from servegym.envs.simulator.state import PREFILL
from servegym.envs.task.config import with_overrides
from servegym.envs.task.lowering import bound_case, load_case, lower, make_task_state
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import evaluate as command

TINY = TASKS["servegym/Tiny-v0"]


def episode(policy: str, outputs: list[int] | None = None, **cluster: Any) -> dict[str, Any]:
    """The row of an episode of many short prompts and long outputs, all there at the start."""
    task: TaskConfig = with_overrides(TINY, {"cluster": {"clients": 8, **cluster}})
    rng, count = np.random.default_rng(1), 24
    requests = make_requests(rng.integers(2, 9, count), outputs or rng.integers(10, 40, count))
    return play(task, policy, make_policy(policy), bound_case(lower(task), requests), 0).row


def told(*rows: dict[str, Any]) -> list[str]:
    """The metrics that are warned of."""
    lines = warnings(pd.DataFrame(rows))
    assert all(line.startswith("Warning: ") and line.count("\n") == 0 for line in lines)
    return [sign.metric for sign in SIGNATURES for line in lines if _of(sign.text, line)]


def _of(text: str, line: str) -> bool:
    return text.rpartition(";")[2].rpartition(":")[2] in line


def test_clients_that_idle_while_requests_wait() -> None:
    """A policy that waits until all clients are idle idles; one that fills them at once does not."""
    outputs = [2, 40] * 12
    assert "idle_wait_share" in told(episode("threshold-8", outputs))
    assert "idle_wait_share" not in told(episode("threshold-1", outputs))


def test_thrash_and_slow_preempted_requests() -> None:
    """Memory for two of eight outputs: they evict each other all the time. A guard keeps them out."""
    thrashing = episode("fcfs", kv_capacity_tokens=60)
    assert thrashing["recompute_tax"] > 0.3
    assert "recompute_tax" in told(thrashing)
    guarded = episode("fcfs", kv_capacity_tokens=60, admission_guard="full")
    assert guarded["recompute_tax"] == 0
    assert told(guarded) == told(guarded | {"preempted_slowdown": np.nan})
    assert "recompute_tax" not in told(guarded)


def test_latency_that_rises_with_preemptions() -> None:
    row = episode("fcfs", kv_capacity_tokens=60)
    assert row["preemptions"] > 0
    assert "preempted_slowdown" in told(row | {"preempted_slowdown": 2.01})
    assert "preempted_slowdown" not in told(row | {"preempted_slowdown": 2.0})
    few = row | {"preempted_slowdown": 9.0, "requests": 1000, "preemptions": 9}
    assert "preempted_slowdown" not in told(few)
    assert "preempted_slowdown" in told(few | {"preemptions": 10})


def test_memory_that_overruns_is_told_of_one_episode() -> None:
    row = episode("fcfs", kv_capacity_tokens=60)
    assert row["memory_overrun_blocks"] == 0
    assert "memory_overrun_blocks" not in told(row)
    assert "memory_overrun_blocks" in told(row, row | {"memory_overrun_blocks": 1})


def test_the_core_counts_an_overrun() -> None:
    """More blocks in use at the end of a stage than there are, which no rule allows."""
    task = with_overrides(TINY, {"cluster": {"kv_capacity_tokens": 10}})
    state = make_task_state(task, 1, 1)
    load_case(task, state, 0, bound_case(lower(task), make_requests([3], [4])))
    for used, overrun in ((10, 0), (25, 15), (12, 15)):
        state.replicas[0, 0].used_blocks = used
        state.replicas[0, 0].stage = PREFILL
        book(state, 0, 0, 1.0)
        assert episode_metrics(state, 0)["memory_overrun_blocks"] == overrun


def test_what_was_not_measured_is_not_told() -> None:
    row = episode("threshold-8") | {sign.metric: np.nan for sign in SIGNATURES}
    assert told(row) == []


def test_every_threshold_says_why() -> None:
    for sign in SIGNATURES:
        assert sign.why.endswith(".")
        assert sign.text.format(found=1.0, most=sign.most)


def test_the_summary_warns(tmp_path: Path) -> None:
    words = ["--task", "Tiny-v0", "--policies", "threshold-3,fcfs", "--seeds", "0:2", "--jobs", "1"]
    words += ["--output", str(tmp_path), "--optimum-limit", "0"]
    assert command.main(words) == 0
    text = (tmp_path / "summary.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("Warning")]
    rows = pd.read_csv(tmp_path / "episodes.csv")
    assert lines == warnings(rows)
