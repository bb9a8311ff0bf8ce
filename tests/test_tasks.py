"""The registered tasks of clusters: what their docstrings promise, and baselines of Elastic-v0."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.baselines import make_policy
from servegym.baselines.rules.limited import LimitedPolicy, held_tokens
from servegym.envs import (
    TASKS,
    ServegymError,
    ServingEnv,
    ServingVectorEnv,
    make_case,
    make_requests,
    play,
    with_overrides,
)
from servegym.envs.machine.links import LINKS
from servegym.envs.playing.evaluation import brief
from servegym.envs.task import served
from servegym.studies.checks.load import load_of

ELASTIC = TASKS["servegym/Elastic-v0"]


# ---- parameters --------------------------------------------------------------------------------


def test_memory_is_that_of_the_cards() -> None:
    """Nine tenths of 80 GB less 16-bit weights, whole blocks."""
    cards = (
        (served.MEMORY_7B, 1, 6.74, served.KV_7B, 2 * 32 * 4096 * 2),
        (served.MEMORY_8B, 1, 8.03, served.KV_8B, 2 * 32 * 8 * 128 * 2),
        (served.MEMORY_65B, 4, 65.3, served.KV_65B, 2 * 80 * 8192 * 2),
    )
    for memory, number, parameters, per_token, known in cards:
        assert per_token == known
        tokens = (0.9 * 80e9 * number - 2e9 * parameters) / per_token
        assert memory % 16 == 0
        assert memory == pytest.approx(tokens, rel=0.001)


def test_each_task_observes_what_it_has() -> None:
    for task in served.SERVED:
        blocks = {"replica", "memory"}
        if task.cluster.replicas > 1:
            blocks.add("cluster")
        if task.slo:
            blocks.add("latency")
        assert set(task.process.observe) == blocks
        assert (task.process.reward == "goodput") == bool(task.slo)
        assert task.workload.draws_arrivals == bool(task.slo)


def test_nobody_is_rejected() -> None:
    """Each memory holds the longest request that its workload may have."""
    longest = {"azure-conv": 14_050 + 1000, "servegen-deepseek-r1": 57_284 + 32_768}
    for task in served.SERVED:
        memory = min(table.kv_capacity_tokens for table in task.cluster.replica_tables())
        assert longest.get(task.workload.source, 191 + 1024) <= memory


def test_the_worst_case_of_elastic() -> None:
    most = served.MEMORY_65B // (191 + 1024)
    assert most == 49
    assert served.WORST_CASE_CAP * ELASTIC.cluster.clients == 48
    requests = make_case(ELASTIC, 1).requests
    assert requests.prompt_tokens.max() <= 191
    assert requests.output_tokens.max() <= 1024
    assert served.MEMORY_65B / held_tokens(requests)[0] == pytest.approx(204, rel=0.03)


def test_the_price_of_a_theft_in_cluster() -> None:
    latency_s, bytes_per_s, _ = LINKS["rdma1"]
    assert latency_s == 1e-3
    assert served.KV_7B / bytes_per_s == pytest.approx(13e-6, rel=0.01)


@pytest.mark.parametrize("task", [served.CHAT, served.CLUSTER, served.DISAGGREGATED])
def test_less_arrives_than_is_served(task: Any) -> None:
    load = load_of(task, "vllm", 2000, 0)
    assert 0.8 < task.workload.arrivals.rate_per_s / load.served < 1


# ---- environments ------------------------------------------------------------------------------

SMALLER = {"workload": {"requests": 60}}


@pytest.mark.parametrize("task", served.SERVED, ids=lambda task: task.name.partition("/")[2])
def test_vector_rows_equal_single_environments(task: Any) -> None:
    """Masks, observations and rewards of two rows, to the last bit."""
    task = with_overrides(task, SMALLER)
    vector, singles = ServingVectorEnv(2, task), [ServingEnv(task), ServingEnv(task)]
    rows, _ = vector.reset(seed=[5, 6])
    alone = [env.reset(seed=5 + e)[0] for e, env in enumerate(singles)]
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert np.array_equal(rows, np.stack(alone))
        masks = vector.action_masks()
        assert np.array_equal(masks, np.stack([env.action_masks() for env in singles]))
        actions = (rng.random(masks.shape) * masks).argmax(axis=1)
        rows, rewards, ended, _, _ = vector.step(actions)
        steps = [env.step(action) for env, action in zip(singles, actions, strict=True)]
        assert rewards.tolist() == [step[1] for step in steps]
        if ended.any():
            break
        alone = [step[0] for step in steps]


def test_masks_within_limits_are_those_of_each_action_alone() -> None:
    """What follows from another action's limits is what asking the action itself says."""
    env = ServingEnv(with_overrides(ELASTIC, SMALLER | {"cluster": {"kv_capacity_tokens": 2400}}))
    flipped = {"caps": ELASTIC.process.caps[::-1], "reserves": ELASTIC.process.reserves[::-1]}
    other = ServingEnv(with_overrides(env.task, {"process": flipped}))
    place = [other.task.actions.index(name) for name in env.task.actions]
    rng, ended = np.random.default_rng(0), False
    env.reset(seed=1)
    other.reset(seed=1)
    partly = 0
    while not ended:
        mask = env.action_masks()
        assert np.array_equal(mask, other.action_masks()[place])
        fcfs = [name.startswith("mixed:fcfs") for name in env.task.actions]
        partly += 0 < mask[fcfs].sum() < sum(fcfs)
        action = int(rng.choice(np.flatnonzero(mask)))
        *_, ended, _, _ = env.step(action)
        other.step(place[action])
    assert partly > 0


# ---- baselines of Elastic-v0 -------------------------------------------------------------------


def test_held_tokens_by_hand() -> None:
    """Prompt 10: rounds of 11; of 11, 12 and 13 tokens."""
    held = [11, 11, 12, 13]
    assert held_tokens(make_requests([10, 10], [1, 3])) == pytest.approx(
        (np.mean(held), np.std(held))
    )


def test_limits_of_the_policies() -> None:
    case = make_case(ELASTIC, 0)
    known = case.requests
    assert LimitedPolicy("worst").limits(ELASTIC, known) == (
        served.MEMORY_65B // (known.prompt_tokens.max() + known.output_tokens.max()) / 256,
        0.0,
    )
    mean, deviation = held_tokens(known)
    cap, none = LimitedPolicy("chance", 0.5).limits(ELASTIC, known)
    assert (cap * 256, none) == (served.MEMORY_65B // mean, 0.0)
    cap, none = LimitedPolicy("chance", 0.99).limits(ELASTIC, known)
    n = cap * 256
    assert n * mean + 2.3264 * deviation * np.sqrt(n) <= served.MEMORY_65B
    assert (n + 1) * mean + 2.3263 * deviation * np.sqrt(n + 1) > served.MEMORY_65B
    assert LimitedPolicy("reserve", 0.5).limits(ELASTIC, known) == (1.0, 0.0)
    one, share = LimitedPolicy("reserve", 0.9).limits(ELASTIC, known)
    assert one == 1.0
    assert 0.03 < share < 0.1


@pytest.mark.parametrize("by", ["worst", "chance", "reserve"])
def test_nothing_is_limited_without_memory_or_requests(by: Any) -> None:
    assert LimitedPolicy(by).limits(TASKS["servegym/GSM8K-v0"], None) == (1.0, 0.0)
    assert LimitedPolicy(by).limits(ELASTIC, None) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("fixed-count", "mixed:fcfs:cap=0.1875"),
        ("chance-count", "mixed:fcfs:cap=0.75"),
        ("chance-count(chance=0.5)", "mixed:fcfs:cap=0.75"),
        ("reserve", "mixed:fcfs:reserve=0.1"),
        ("reserve-0.9", "mixed:fcfs:reserve=0.05"),
        ("reserve-0.5", "mixed:fcfs"),
    ],
)
def test_what_is_on_offer_is_taken(name: str, action: str) -> None:
    policy: Any = make_policy(name)
    policy.prepare(brief(ELASTIC, make_case(ELASTIC, 0), 0))
    assert ELASTIC.actions[policy._action] == action


def test_fixed_count_never_runs_more_and_preempts_nobody() -> None:
    case = make_case(ELASTIC, 3)
    rows = {
        name: play(ELASTIC, name, make_policy(name), case, 3).row
        for name in ("fixed-count", "vllm", "reserve")
    }
    assert rows["fixed-count"]["client_utilization"] <= served.WORST_CASE_CAP
    assert rows["fixed-count"]["preemptions"] == 0
    assert rows["vllm"]["preemptions"] > 1000 > rows["reserve"]["preemptions"]
    assert rows["reserve"]["gap"] < rows["vllm"]["gap"] < rows["fixed-count"]["gap"]


@pytest.mark.parametrize("rule", ["fcfs", "longest"])
def test_a_task_without_the_rule_is_refused(rule: str) -> None:
    task = with_overrides(ELASTIC, SMALLER | {"process": {"mixed_rules": [rule]}})
    policy = make_policy("reserve")
    if rule == "fcfs":
        policy.prepare(brief(task, make_case(task, 0), 0))
        return
    words = "admits by 'fcfs', which process.mixed_rules of servegym/Elastic-v0 leaves out; add"
    with pytest.raises(ServegymError, match=words):
        policy.prepare(brief(task, make_case(task, 0), 0))


@pytest.mark.parametrize(("bad", "good"), [("0", "0.01"), ("1", "0.999"), ("nan", "0.5")])
def test_chances_that_are_none(bad: str, good: str) -> None:
    with pytest.raises(ServegymError, match="lie between 0 and 1"):
        make_policy(f"reserve(chance={bad})")
    make_policy(f"reserve(chance={good})")


def test_arguments_of_limited_policies() -> None:
    with pytest.raises(ServegymError, match="worst, chance or reserve"):
        LimitedPolicy("most")  # type: ignore[arg-type]
    with pytest.raises(ServegymError, match="between 0 and 1, got 1"):
        replace(LimitedPolicy("chance"), quantile=1)


def test_limited_policies_steal_as_rules_do() -> None:
    task = with_overrides(TASKS["servegym/Cluster-v0"], SMALLER)
    row = play(task, "reserve", make_policy("reserve"), make_case(task, 0), 0).row
    assert row["moves"] > 0


# ---- results -----------------------------------------------------------------------------------


def test_the_page_of_results_shows_what_the_summaries_say() -> None:
    """Every cell with an interval stands in the row of its policy in one of the summaries."""
    folder = Path(__file__).parents[1] / "results" / "tasks"
    cells = re.compile(r"\d+\.\d+ ± \d+\.\d+")
    told: dict[str, set[str]] = {}
    for summary in folder.glob("*/summary.md"):
        for line in summary.read_text("utf-8").splitlines():
            if line.startswith("| "):
                told.setdefault(line.split()[1], set()).update(cells.findall(line))
    rows = re.findall(r"^\| `(\S+)` \|(.*)$", (folder / "README.md").read_text("utf-8"), re.M)
    assert len(rows) > 20
    for policy, row in rows:
        assert set(cells.findall(row)) <= told[policy], policy
