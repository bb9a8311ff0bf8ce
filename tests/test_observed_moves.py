"""The entries of the observation that tell of moves, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs import ServingEnv, load_task, make_requests
from servegym.envs.simulator.seconds import prefill_seconds
from servegym.envs.task.config import with_overrides
from servegym.envs.workload.plan import plan_from_queues


def test_moves_by_hand() -> None:
    """Replica 0 of 4 clients runs two requests of 10 and 11 tokens; replica 1 may steal into 4 clients.

    Copying the mean of 10 tokens takes 1 s and half a second a token.
    """
    cluster = {
        "replicas": 2,
        "clients": 4,
        "link": {"latency_s": 1.0, "bytes_per_s": 2.0},
        "kv_bytes_per_token": 1,
        "router": "plan",
    }
    process = {"steals": ["running"], "observe": ["cluster"]}
    task = with_overrides(load_task("Tiny-v0"), {"cluster": cluster, "process": process})
    env = ServingEnv(task)
    plan = plan_from_queues([[0], [1], *([] for _ in range(6))])
    env.reset(options={"requests": make_requests([9, 10], [50, 90]), "plan": plan})
    env.step(np.int64(task.actions.index("prefill:plan")))
    again_s = float(prefill_seconds(env.costs, 1, 10, 100.0, 1))
    assert list(env.rows.observations[0, -3:]) == pytest.approx([1.0, 0.0, 6.0 / (6.0 + again_s)])
    env.step(np.int64(task.actions.index("steal:running")))
    assert env.state is not None
    assert int(env.state.replicas[0, 1].incoming) + int(env.records().moves.sum()) == 1
