"""Agents find their features by name, in longer observations and in another order, or are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from servegym.agents.card import CARD_FILE, AgentCard
from servegym.agents.checkpoints import load_checkpoint, save_checkpoint
from servegym.agents.export import export_agent
from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.network import Network
from servegym.agents.policy import LearnedPolicy, load_agent
from servegym.agents.record import identity
from servegym.agents.sb3_vec_env import ServingSB3VecEnv
from servegym.agents.training import make_model
from servegym.envs import ServegymError, ServingEnv, load_task
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.policy import Situation
from servegym.envs.process import blocks
from servegym.envs.process.metrics import METRICS
from servegym.envs.process.observation import FEATURES
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.vocabulary import OBSERVATION_BLOCKS
from servegym.studies.policies import planner_of
from tests.helpers import refused

TINY = load_task("Tiny-v0")
SMALL = Hyperparameters(environments=2, steps=16, batch_size=16, epochs=1, width=4, timesteps=32)
AGENTS = Path(__file__).parents[1] / "results" / "agents"
SHIPPED = [
    pytest.param(card.parent, id=str(card.parent.relative_to(AGENTS)))
    for card in sorted(AGENTS.rglob(CARD_FILE))
]
LATER = "weather"
"""A feature of a later version."""
ENTRIES = list(range(len(FEATURES) + 1))
ORDERS = {
    "added behind": ENTRIES,
    "turned": ENTRIES[::-1],
    "shuffled": np.random.default_rng(1).permutation(ENTRIES).tolist(),
}
"""Orders of a later version: places of its entries among today's and the later one."""


class WithLaterObservations(LearnedPolicy):
    """An agent in a version whose observations have one more entry, in a given order."""

    order: list[int]

    def act(self, situation: Situation) -> int:
        entries = np.append(situation.observation[: len(FEATURES)], np.float32(0.7))
        return super().act(replace(situation, observation=entries[self.order]))


def asked(agent: LearnedPolicy) -> NDArray[np.float32]:
    """What the network was last asked about, in the order of its inputs."""
    network = agent.network
    return network.lowered.signals[0, : network.sizes[0]]


def with_features(patch: pytest.MonkeyPatch, features: Sequence[str]) -> None:
    """Let the block `replica` have these features, as in another version."""
    patch.setattr(blocks, "BLOCK_FEATURES", blocks.BLOCK_FEATURES | {"replica": tuple(features)})


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The order of a later version, whose features the agents meet."""
    places, names = ORDERS[request.param], [*FEATURES, LATER]
    with_features(monkeypatch, [names[place] for place in places])
    return places


def situation(observation: NDArray[np.float32]) -> Situation:
    """A situation in which every action is legal."""
    env = ServingEnv(TINY)
    env.reset(seed=0)
    return Situation(env.view(), observation, np.ones(7, np.bool_))


def metrics_of(policy: LearnedPolicy, task: TaskConfig = TINY) -> dict[str, Any]:
    row = play(task, "agent", policy, make_case(task, 3), 3).row
    return {name: row[name] for name in METRICS}


@pytest.mark.parametrize("folder", SHIPPED)
def test_shipped_agents_play_the_same(folder: Path, order: list[int]) -> None:
    agent = load_agent(folder, planner_of)
    later = WithLaterObservations(agent.network, agent.card, agent.planner)
    later.order = order
    with pytest.MonkeyPatch.context() as patch:
        with_features(patch, FEATURES)
        expected = metrics_of(load_agent(folder, planner_of))
    assert metrics_of(later) == expected


def test_the_network_is_given_its_features_in_its_order(
    order: list[int], rng: np.random.Generator
) -> None:
    agent = load_agent(AGENTS / "Tiny-v0")
    policy = WithLaterObservations(agent.network, agent.card)
    policy.order = order
    observation = rng.random(len(FEATURES), dtype=np.float32)
    policy.act(situation(observation))
    assert np.array_equal(asked(policy), observation)


@pytest.mark.parametrize("folder", SHIPPED)
def test_an_observation_that_lacks_a_feature_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_agent(folder)
    with_features(monkeypatch, (LATER, *FEATURES[1:]))
    count = len(blocks.features_of(OBSERVATION_BLOCKS))
    words = f"feature '{FEATURES[0]}' is not among the {count} of this version; train it again"
    with pytest.raises(ServegymError) as refusal:
        load_agent(folder)
    assert words in str(refusal.value)
    assert str(folder / CARD_FILE) in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---- blocks ----------------------------------------------------------------------------------


def observing(*names: str) -> TaskConfig:
    return with_overrides(TINY, {"process": {"observe": names}})


def test_a_shipped_agent_plays_the_same_where_more_is_observed() -> None:
    agent = load_agent(AGENTS / "Tiny-v0")
    assert agent.blocks == ("replica",)
    expected = metrics_of(agent)
    for task in (observing("memory", "replica"), observing(*OBSERVATION_BLOCKS), TINY):
        assert metrics_of(agent, task) == expected


def test_an_agent_of_more_blocks_is_exported_and_refuses_a_task_without_them(
    tmp_path: Path,
) -> None:
    """Found by name in any task that observes its blocks; the file names its features."""
    task = observing("memory", "cluster")
    model = make_model(task, SMALL).learn(1)
    export_agent(model, task, "train", tmp_path)
    agent = load_agent(tmp_path)
    assert agent.blocks == ("memory", "cluster")
    assert agent.card.features == blocks.features_of(task.process.observe)
    assert metrics_of(agent, task) == metrics_of(agent, observing(*OBSERVATION_BLOCKS))
    for lacking, words in (
        (TINY, "observes blocks 'memory' and 'cluster', which process.observe of servegym/Tiny-v0"),
        (
            observing("memory"),
            "observes block 'cluster', which process.observe of servegym/Tiny-v0",
        ),
    ):
        refused(partial(metrics_of, agent, lacking), words)
    refused(lambda: export_agent(model, TINY, "", tmp_path), f"has {len(FEATURES)} features")


def test_an_agent_of_some_features_of_two_blocks() -> None:
    """It is given just these, in its order."""
    network = Network([(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))])
    features = "1 / replicas", FEATURES[4], "memory is limited, 0 or 1"
    actions = "decode", "prefill:fcfs"
    agent = LearnedPolicy(network, AgentCard(actions, "events", (3, 2), "", features=features))
    assert agent.blocks == ("replica", "memory", "cluster")
    metrics_of(agent, observing(*OBSERVATION_BLOCKS))
    assert asked(agent)[[0, 2]].tolist() == [1.0, 0.0]
    assert 0 < asked(agent)[1] < 1


def test_a_run_goes_on_only_with_the_blocks_that_it_observes(tmp_path: Path) -> None:
    task = observing("replica", "memory")
    model, run = make_model(task, SMALL).learn(1), identity(task, SMALL)
    path = save_checkpoint(model, run, tmp_path)
    load_checkpoint(make_model(task, SMALL), run, path)
    other = observing("replica", "cluster")
    with pytest.raises(ServegymError, match=r"observe \['replica', 'memory'\], this one has"):
        load_checkpoint(make_model(other, SMALL), identity(other, SMALL), path)


def test_a_checkpoint_of_another_state_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a version in which a record of the simulator has got a field."""
    get_state = ServingSB3VecEnv.get_state

    def with_less(env: ServingSB3VecEnv) -> Any:
        arrays, rngs = get_state(env)
        return arrays | {"queues": arrays["queues"][:-8]}, rngs

    run = identity(TINY, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(ServingSB3VecEnv, "get_state", with_less)
        path = save_checkpoint(make_model(TINY, SMALL).learn(1), run, tmp_path)
    with pytest.raises(
        ServegymError, match="other environments, those of another version"
    ) as refusal:
        load_checkpoint(make_model(TINY, SMALL), run, path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "begin a run in another folder" in str(refusal.value)


def test_a_checkpoint_of_other_features_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights and observations go by position, not by name."""
    model, run = make_model(TINY, SMALL).learn(1), identity(TINY, SMALL)
    path = save_checkpoint(model, run, tmp_path)
    load_checkpoint(make_model(TINY, SMALL), run, path)
    with_features(monkeypatch, FEATURES[::-1])
    with pytest.raises(ServegymError, match="other features, or in another order") as refusal:
        load_checkpoint(make_model(TINY, SMALL), run, path)
    assert str(refusal.value).startswith(f"{path}: ")
