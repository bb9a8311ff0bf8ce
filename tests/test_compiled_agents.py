"""Agents in the compiled loop and as the base of rollouts: the same actions as their policy object takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from servegym.agents.card import AgentCard
from servegym.agents.network import Network
from servegym.agents.policy import LearnedPolicy, load_agent
from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.registry import base_of
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import TASKS, Situation, make_case, play
from servegym.envs.playing.policy import asked_task
from servegym.envs.process.blocks import features_of
from servegym.envs.process.metrics import METRICS, episode_metrics, gap_of
from servegym.envs.process.network import make_layers, run_agent, run_layers
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.envs.vocabulary import OBSERVATION_BLOCKS
from servegym.studies.policies import AGENTS, agent_folder, make_policy, planner_of, weights_of
from tests.helpers import changed, refused

TINY = TASKS["servegym/Tiny-v0"]
MIXING = changed(
    TINY,
    cluster={"replicas": 3, "clients": 2, "chunk_tokens": 16, "kv_capacity_tokens": 48},
    workload={"requests": 14},
    process={"steals": ["waiting", "running"], "observe": OBSERVATION_BLOCKS},
)
TASKS_PLAYED = {
    "one-replica": TINY,
    "every-round": changed(TINY, process={"decisions": "rounds"}),
    "arrivals": changed(TINY, workload={"requests": 20, "arrival_rate_per_s": 0.7}),
    "predicted": changed(TINY, information={"output_lengths": "predicted"}),
    "mixing": MIXING,
    "pool": changed(MIXING, cluster={"router": "pool"}, process={"steals": []}),
    "capped": changed(TINY, process={"max_decisions": 4}),
    "late": changed(MIXING, process={"max_seconds": 9.0}),
}


def random_agent(task: TaskConfig, seed: int, hidden: tuple[int, ...] = (9, 17)) -> LearnedPolicy:
    """An agent of all that a task observes and offers; its weights make each action the best at times."""
    rng = np.random.default_rng(seed)
    features = features_of(task.process.observe)
    sizes = (len(features), *hidden, len(task.actions))
    layers = [
        (
            rng.normal(0, 2 / np.sqrt(n), (m, n)).astype(np.float32),
            rng.normal(0, 0.3, m).astype(np.float32),
        )
        for n, m in pairwise(sizes)
    ]
    decisions = task.process.decisions
    card = AgentCard(task.actions, decisions, sizes, "", features=features)
    return LearnedPolicy(Network(layers), card)


def reference_scores(network: Network, observation: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same in double precision by matrix products."""
    signal = observation.astype(float)
    for k, (weights, biases) in enumerate(network.layers):
        signal = np.tanh(signal) if k else signal
        signal = weights.astype(float) @ signal + biases
    return signal


class Checked(LearnedPolicy):
    """Compares each action with the best by double precision, where that is clear; counts those compared."""

    compared = 0

    def act(self, situation: Situation) -> int:
        action = super().act(situation)
        network = self.network
        inputs = network.lowered.signals[0, : network.sizes[0]]
        scores = np.full(situation.mask.size, -np.inf)
        scores[self.places] = reference_scores(network, inputs)
        scores[~situation.mask] = -np.inf
        if np.diff(np.sort(scores)[-2:])[0] > 1e-4:
            assert action == scores.argmax()
            self.compared += 1
        return action

    @property
    def places(self) -> NDArray[np.int64]:
        return self._choice.actions


def same(row: dict[str, Any], metrics: dict[str, float]) -> None:
    for name in METRICS:
        assert np.array_equal(row[name], metrics[name], equal_nan=True), name


@pytest.mark.parametrize("name", ["Tiny-v0", "GSM8K-v0", "GSM8KPredicted-v0", "Paper-v0"])
def test_shipped_agents_act_alike_in_compiled_code(name: str) -> None:
    """Equal records to the last bit; every clear decision is the best by double precision."""
    task = TASKS[f"servegym/{name}"]
    agent = load_agent(AGENTS / name, planner_of)
    policy, case = Checked(agent.network, agent.card, agent.planner), make_case(task, 1_000_000)
    episode = play(task, name, policy, case, seed=0)
    same(episode.row, play_compiled(task, agent, case))
    assert policy.compared > 0.98 * episode.row["decisions"] > 0


@pytest.mark.parametrize("name", TASKS_PLAYED)
def test_random_networks_act_alike_in_compiled_code(name: str) -> None:
    task = TASKS_PLAYED[name]
    for seed in range(4):
        agent, case = random_agent(task, seed), make_case(task, seed)
        policy = Checked(agent.network, agent.card)
        row = play(task, name, policy, case, seed).row
        metrics = play_compiled(task, agent, case)
        same(row, metrics)
        assert policy.compared > 0
        assert (row["unfinished_requests"] > 0) == (name in ("capped", "late"))


def test_an_agent_of_fewer_actions_and_features_acts_alike() -> None:
    """They are found by name; where none of its actions is legal, the first legal one is taken."""
    agent = random_agent(TINY, 5)
    features, actions = agent.card.features[::-2], ("prefill:longest", "decode")
    layers = [(agent.network.layers[0][0][:2, ::-2].copy(), np.zeros(2, np.float32))]
    card = replace(agent.card, features=features, actions=actions, layers=(len(features), 2))
    few = LearnedPolicy(Network(layers), card)
    for task in (TINY, MIXING):
        case = make_case(task, 2)
        same(play(task, "few", few, case, 2).row, play_compiled(task, few, case))


def test_compiled_agents_are_refused_where_their_policy_is() -> None:
    fewer = changed(TINY, process={"rules": ["longest", "fcfs"]})
    for task, agent, words in (
        (fewer, random_agent(TINY, 0), "this agent may choose 'prefill:plan'"),
        (TINY, random_agent(MIXING, 0), "observes blocks 'memory' and 'cluster' and 'latency'"),
    ):
        refused(partial(agent.compiled, task), words)
        refused(partial(play_compiled, task, agent, make_case(task, 0)), words)


def test_tanh_is_right_to_half_a_last_place() -> None:
    """Of float32, over all of its range, odd and never beyond 1."""
    inputs = np.concatenate([np.geomspace(1e-30, 9.5, 300), [0.0, 20.0, 1e30]]).astype(np.float32)
    inputs = np.concatenate([inputs, -inputs])
    n = len(inputs)
    eye, none = np.eye(n, dtype=np.float32), np.zeros(n, np.float32)
    layers = make_layers([(eye, none), (eye, none)])
    layers.signals[0] = inputs
    run_layers(layers)
    exact = np.tanh(inputs.astype(float))
    last_place = np.spacing(np.abs(exact).astype(np.float32)).astype(float)
    assert (np.abs(layers.signals[1] - exact) <= 0.53 * last_place).all()
    assert np.array_equal(layers.signals[1][: n // 2], -layers.signals[1][n // 2 :])
    assert np.abs(layers.signals[2]).max() <= 1


def test_the_gap_alone_is_that_of_the_metrics() -> None:
    for name, seed in (("one-replica", 0), ("capped", 0), ("mixing", 1)):
        task = TASKS_PLAYED[name]
        state = make_task_state(task, 1, 20)
        agent = random_agent(task, seed)
        load_case(task, state, 0, make_case(task, seed))
        run_agent(state, lower(task).costs, 0, agent.compiled(task))
        expected = episode_metrics(state, 0)["gap"]
        assert np.array_equal(gap_of(state, 0), expected, equal_nan=True)
        assert np.isnan(expected) == (name == "capped")


# ---- rollouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one-replica", "every-round", "mixing"])
def test_a_rollout_never_ends_later_than_its_agent(name: str) -> None:
    """Lengths are known and nothing arrives, so that what is imagined comes true."""
    task = TASKS_PLAYED[name]
    task = changed(task, process={"observe": ["replica", "memory", "cluster"]})
    better = 0
    for seed in range(3):
        agent, case = random_agent(task, seed), make_case(task, seed)
        base_s = play_compiled(task, agent, case)["makespan_s"]
        for variations in (0, 3):
            rollout = RolloutPolicy(agent, variations)
            row = play(asked_task(task, agent), "rollout", rollout, case, seed).row
            assert row["makespan_s"] <= base_s * (1 + 1e-9)
            better += row["makespan_s"] < base_s
            again = play(task, "rollout", RolloutPolicy(agent, variations), case, seed).row
            assert again["makespan_s"] == row["makespan_s"]
    assert better > 0


def test_a_rollout_plays_on_beyond_the_caps_of_its_task() -> None:
    """Imagined episodes run to their end; the real one is cut short."""
    task = changed(TINY, process={"max_decisions": 2})
    row = play(task, "rollout", RolloutPolicy(random_agent(task, 0), 1), make_case(task, 0), 0).row
    assert row["decisions"] == 2
    assert row["unfinished_requests"] > 0


def test_a_rollout_without_time_does_what_its_agent_does() -> None:
    agent, case = random_agent(TINY, 1), make_case(TINY, 1)
    rollout = RolloutPolicy(agent, variations=5, budget_s=0.0)
    expected = play_compiled(TINY, agent, case)
    same(play(TINY, "rollout", rollout, case, 1).row, expected)


def test_rollouts_over_agents_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = AGENTS / "Tiny-v0"
    monkeypatch.chdir(tmp_path)
    digest = load_agent(folder).card.weights_sha256
    names = ["rollout:ppo", "rollout-2:ppo", f"rollout(base={folder}, variations=2)"]
    for name, variations in zip(names, (6, 2, 2), strict=True):
        policy = make_policy(name, TINY.name)
        assert isinstance(policy, RolloutPolicy)
        assert isinstance(policy.base, LearnedPolicy)
        assert policy.variations == variations
        assert policy.base.card.weights_sha256 == digest
    assert weights_of([*names, "rollout", "rollout:hybrid"], TINY.name) == dict.fromkeys(
        names, digest
    )
    case = make_case(TINY, 4)
    ends = {
        play(TINY, name, make_policy(name, TINY.name), case, 4).row["gap"] for name in names[1:]
    }
    assert len(ends) == 1
    assert base_of("rollout-mine/run") is base_of("runs/rollout") is None
    assert agent_folder("rollout-mine/run", TINY.name) == Path("rollout-mine/run")


def test_bad_bases_are_refused() -> None:
    for name, words in (
        ("rollout:ppo", "policy 'ppo': no agent is shipped for Chat-v0"),
        ("rollout:runs/none", "runs/none"),
        ("rollout:random", "'random' has no trigger"),
        ("rollout:alined", "did you mean 'aligned'"),
    ):
        refused(partial(make_policy, name, "servegym/Chat-v0"), words)
    with pytest.raises(Exception, match="changed while it played"):
        make_policy("rollout:ppo", TINY.name, {"rollout:ppo": "another hash"})
    seeing_latency = random_agent(MIXING, 0)
    refused(partial(RolloutPolicy, seeing_latency), "a rollout's base observes no block 'latency'")
    rollout = make_policy("rollout:ppo", TINY.name)
    fewer = changed(TINY, process={"rules": ["longest", "fcfs"]})
    refused(
        lambda: play(fewer, "rollout:ppo", rollout, make_case(fewer, 0), 0),
        "may choose 'prefill:plan'",
    )
