"""Half of an imbalance, migration by free memory, shedding: by hand, against the reference, bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.record import check_run
from servegym.baselines import make_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import EAGER
from servegym.envs import TASKS, ServingEnv, TaskConfig, make_requests
from servegym.envs.pictures import draw_makespans
from servegym.envs.playing.evaluation import Episode, play
from servegym.envs.playing.policy import asked_task
from servegym.envs.task.cluster import ReplicaConfig
from servegym.envs.task.lowering import bound_case, lower
from tests.against_cluster import compare_cluster
from tests.cluster_helpers import balancing_case, play_any, requests_of, task_of
from tests.helpers import UNIT_COSTS, changed, refused
from tests.recount import recount

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]

TINY = replace(TASKS["servegym/Tiny-v0"], cost=UNIT_COSTS)  # a stage of 2 s, rounds of 1 s
INSTANT: dict[str, Any] = {"link": "nvlink", "kv_bytes_per_token": 0}


def served(task: TaskConfig, policy: str | TriggerPolicy, *rows: tuple[int, int, float]) -> Episode:
    """Rows are (prompt, output, arrival); compiled code plays the same."""
    player: Any = make_policy(policy) if isinstance(policy, str) else policy
    task = asked_task(task, player)
    case = bound_case(lower(task), make_requests(*(np.array(c) for c in zip(*rows, strict=True))))
    episode = play(task, "policy", player, case, seed=0)
    compiled = play_compiled(task, player, case)
    for name in ("makespan_s", "moves", "shed", "slo_attainment"):
        assert episode.row[name] == compiled[name], name
    return episode


# ---- the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 240, 60))
def test_the_compiled_core_equals_the_reference(first: int) -> None:
    records = []
    for seed in range(first, first + 60):
        case = balancing_case(np.random.default_rng([31, seed]), dyadic=bool(seed % 2))
        records += compare_cluster(case).records
    assert sum(record.moves for record in records) > 50
    assert sum(record.phase == "shed" for record in records) > 50


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_nobody_is_lost(seed: int) -> None:
    case = balancing_case(np.random.default_rng([32, seed]), dyadic=True)
    env = ServingEnv(task_of(replace(case.spec, shed_s=6.0)))
    env.reset(options={"requests": requests_of(case)})
    _, info = play_any(env, np.random.default_rng(seed), lambda: recount(env._state))
    log = env.records()
    assert info["unfinished_requests"] == 0
    assert np.isfinite(log.finished_s).sum() + info["rejected"] + info["shed"] == info["requests"]
    assert np.isnan(info["gap"]) == (info["shed"] > 0)
    assert log.rejected.sum() == info["rejected"] + info["shed"]
    assert np.isnan(log.admitted_s[log.rejected]).all()


# ---- half of an imbalance --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "admitted"), [("room", [0, 0, 0, 0, 0, 0]), ("half", [0, 2, 2, 2, 4, 6])]
)
def test_a_share_of_what_waits_by_hand(share: str, admitted: list[float]) -> None:
    """Requests are dealt in turn to a replica of one client and one of twelve, which soon has none.

    Of the six long ones one runs and five wait. The other replica has five of its own: nothing to even out.
    When they have finished, at 2 s, half of 5 is 3; of the 2 that are left 1, then the last.
    """
    parts = (ReplicaConfig(clients=1), ReplicaConfig(clients=12))
    cluster = {"replicas": 2, "replica": parts, "steal_order": "oldest", **INSTANT}
    task = changed(TINY, cluster=cluster | {"steal_share": share}, process={"steals": ("waiting",)})
    rows = [(5, 1 if k % 2 else 9, 0.0) for k in range(11)]
    log = served(task, "fcfs", *rows).records
    assert log.admitted_s[::2].tolist() == admitted
    assert log.moves.tolist() == [0, 0] + [1, 0] * 4 + [1]


# ---- free memory -----------------------------------------------------------------------------


def test_a_request_moves_to_where_memory_is_free_by_hand() -> None:
    """Two of prompt 12 at a replica of 40 tokens: (40 − 24 − 2k) / 2 < 3 free a request from k = 6 on."""
    keys = {"replicas": 2, "clients": 4, "kv_capacity_tokens": 40, "chunk_tokens": 64, **INSTANT}
    task = changed(TINY, cluster=keys, process={"steals": ("waiting", "running")})
    rows = [(12, 16, 0.0), (3, 1, 0.0), (12, 16, 0.0)]
    stays = served(task, "no-steal", *rows)
    assert (stays.row["moves"], stays.row["preemptions"]) == (0, 1)
    moves = served(task, "llumnix", *rows)
    assert (moves.records.moves.tolist(), moves.row["preemptions"]) == ([1, 0, 0], 0)
    assert moves.records.replica.tolist() == [1, 1, 0]
    never = served(
        task, "llumnix(steps=0)", *rows
    )  # nobody is short of that, until one is preempted
    assert never.row["preemptions"] == 1


# ---- shedding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttft_s", "shed"),
    [
        (5.0, [False, True, False]),  # at 4 s its own stage would end at 6 s
        (6.0, [False, False, False]),  # which is just in time
        (None, [False, False, False]),  # there is nothing to miss
    ],
)
def test_who_waits_in_vain_is_shed_by_hand(ttft_s: float | None, shed: list[bool]) -> None:
    task = changed(
        TINY, cluster={"clients": 1}, slo={"ttft_s": ttft_s}, process={"reward": "goodput"}
    )
    late = TriggerPolicy("fcfs", EAGER, cluster={"shed_at": 1.0})
    episode = served(task, late, (5, 3, 0.0), (5, 3, 0.0), (5, 3, 4.5))
    assert episode.records.rejected.tolist() == shed
    assert (episode.row["shed"], episode.row["rejected"]) == (sum(shed), 0)
    assert np.isnan(episode.row["gap"]) == any(shed)
    if any(shed):
        assert episode.row["makespan_s"] == 8.5
        assert episode.row["slo_attainment"] == 2 / 3


def test_the_last_may_be_shed() -> None:
    task = changed(TINY, cluster={"clients": 1}, slo={"ttft_s": 1.0})
    late = TriggerPolicy("fcfs", EAGER, cluster={"shed_at": 1.0})
    episode = served(task, late, (5, 3, 0.0), (5, 3, 2.0))
    assert episode.row["shed"] == 2
    assert episode.row["makespan_s"] == 0.0


# ---- names and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "bad", "words", "good"),
    [
        ("steal_share", "third", "cluster.steal_share", "half"),
        ("migrate", "freenes", "did you mean 'freeness'", "freeness"),
        ("steal_period_s", -1.0, "steal_period_s must lie in 0 … 1e9, got -1.0", 0.0),
        ("steal_period_s", float("nan"), "steal_period_s must lie in", 1e9),
        ("freeness_steps", -0.5, "freeness_steps must lie in", 0.0),
        ("shed_at", -0.1, "shed_at must lie in 0 … 1e6", 0.1),
        ("shed_at", float("inf"), "shed_at must lie in", 1e6),
    ],
)
def test_keys_that_cannot_be_are_refused(key: str, bad: Any, words: str, good: Any) -> None:
    refused(lambda: changed(TINY, cluster={key: bad}), words)
    assert getattr(changed(TINY, cluster={key: good}).cluster, key) == good


@pytest.mark.parametrize(
    ("name", "words", "good"),
    [
        ("steal-half(period=-1)", "period must lie in 0", "steal-half(period=0)"),
        ("llumnix(step=3)", "did you mean 'steps'", "llumnix(period=0.1, steps=5)"),
        ("shed-0", "x must be > 0", "shed-0.5"),
        ("no-steal(period=1)", "takes no parameters", "no-steal"),
        ("lagrangian(memory=-1)", "memory must lie in 0", "lagrangian(memory=0, slo=0)"),
        ("rollout(base=lagrangian)", "no prices", "rollout(base=lagrangian(memory=0, slo=0))"),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, words: str, good: str) -> None:
    refused(lambda: make_policy(name), words)
    make_policy(good)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"memory": -1.0}, "price of memory must be ≥ 0"),
        ({"slo": float("nan")}, "price of slo must be ≥ 0"),
        ({"slo": 1.0}, "only the Lagrangian trigger"),
        ({"steals": ("waitin",)}, "did you mean 'waiting'"),
    ],
)
def test_a_trigger_policy_that_cannot_be_is_refused(keys: dict[str, Any], words: str) -> None:
    refused(lambda: TriggerPolicy("fcfs", EAGER, **keys), words)


def test_an_agent_is_not_trained_where_requests_are_shed(tmp_path: Path) -> None:
    task = changed(TINY, cluster={"shed_at": 1.0})
    refused(lambda: check_run(task, Hyperparameters(), tmp_path, False), "set cluster.shed_at to 0")
    check_run(TINY, Hyperparameters(), tmp_path, False)


def test_a_picture_names_no_gap_of_who_sheds() -> None:
    rows = {"policy": ["a", "b"], "lower_bound_s": [1.0, 1.0], "makespan_s": [2.0, 2.0]}
    figure = draw_makespans(pd.DataFrame(rows | {"gap": [1.0, np.nan]}))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    words = [text.get_text() for text in legend.get_texts()]
    assert words[:2] == ["a (mean gap 100.0 %)", "b"]
