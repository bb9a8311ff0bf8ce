"""Agents find their actions by name, in tasks with more of them or in another order, or are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents import charts
from servegym.agents.callbacks import ServingCallback
from servegym.agents.card import CARD_FILE, AgentCard
from servegym.agents.hyperparameters import Options
from servegym.agents.network import Network
from servegym.agents.policy import LearnedPolicy, load_agent
from servegym.agents.training import train
from servegym.baselines.expert import Expert, make_rollout_expert, make_rule_expert
from servegym.envs import ServingEnv
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.policy import Briefing, Situation
from servegym.envs.process.blocks import features_of
from servegym.envs.process.metrics import METRICS
from servegym.envs.process.observation import FEATURES
from servegym.envs.task.config import TaskConfig
from servegym.envs.vocabulary import OBSERVATION_BLOCKS
from tests.helpers import changed, refused, weights
from tests.training_helpers import SMALL, TINY, StopAt

AGENTS = Path(__file__).parents[1] / "results" / "agents"
OLDER = [
    pytest.param(card.parent, id=str(card.parent.relative_to(AGENTS)))
    for card in sorted(AGENTS.rglob(CARD_FILE))
    if "rules" in json.loads(card.read_text())
]
CLUSTER = changed(
    TINY,
    cluster={
        "replicas": 3,
        "clients": 2,
        "chunk_tokens": 16,
        "kv_capacity_tokens": 48,
        "kv_block_tokens": 4,
    },
    workload={"requests": 14},
    process={"steals": ["waiting"], "observe": OBSERVATION_BLOCKS},
)
"""Three replicas that hold a few requests each, mix stages and steal from one another."""

RARE = "steal:waiting", "mixed:fcfs", "prefill:longest", "decode"
"""The actions of an agent of CLUSTER, the best first."""


def agent_of(actions: Sequence[str]) -> LearnedPolicy:
    """An agent that scores its actions by their order, the first highest, whatever it sees."""
    layer = (
        np.zeros((len(actions), len(FEATURES)), np.float32),
        -np.arange(len(actions), dtype=np.float32),
    )
    layers = (len(FEATURES), len(actions))
    return LearnedPolicy(Network([layer]), AgentCard(tuple(actions), "events", layers, ""))


def played(policy: LearnedPolicy, task: TaskConfig) -> tuple[list[str], dict[str, Any]]:
    """The names of the actions that a policy takes in an episode, and its metrics."""
    taken = []

    class Watched(LearnedPolicy):
        def act(self, situation: Situation) -> int:
            action = super().act(situation)
            assert situation.mask[action]
            taken.append(task.actions[action])
            return action

    row = play(task, "agent", Watched(policy.network, policy.card), make_case(task, 3), 3).row
    return taken, {name: row[name] for name in METRICS}


@pytest.mark.parametrize("folder", OLDER)
def test_older_cards_name_rules(folder: Path, tmp_path: Path) -> None:
    """They play as the card that an export would write today."""
    agent = load_agent(folder)
    card = json.loads((folder / CARD_FILE).read_text())
    expected = ["decode", *(f"prefill:{rule}" for rule in card.pop("rules"))]
    assert list(agent.card.actions) == expected == list(TINY.actions)
    shutil.copytree(folder, tmp_path / "new", ignore=shutil.ignore_patterns("seeds"))
    (tmp_path / "new" / CARD_FILE).write_text(json.dumps(card | {"actions": expected}))
    assert played(load_agent(tmp_path / "new"), TINY) == played(agent, TINY)


def test_actions_are_found_by_name() -> None:
    """In another order, and among more."""
    taken, metrics = played(agent_of(RARE), CLUSTER)
    assert {"steal:waiting", "mixed:fcfs"} <= set(taken) <= set(RARE)
    turned = changed(CLUSTER, process={"rules": CLUSTER.process.rules[::-1]})
    more = changed(
        CLUSTER,
        process={"mixed_rules": ["longest", "fcfs"], "steals": ["running", "waiting"]},
    )
    for task in (turned, more):
        assert task.actions != CLUSTER.actions
        assert played(agent_of(RARE), task)[0][:3] == taken[:3]
    assert played(agent_of(RARE), turned) == (taken, metrics)


@pytest.mark.parametrize("preferred", ["prefill:longest", "decode"])
def test_an_agent_of_prefills_plays_where_stages_mix_and_replicas_steal(preferred: str) -> None:
    other = {"prefill:longest": "decode", "decode": "prefill:longest"}[preferred]
    taken, metrics = played(agent_of([preferred, other]), CLUSTER)
    assert set(taken) == {"decode", "prefill:longest"}
    assert metrics["unfinished_requests"] == 0
    assert metrics["mixed_stages"] == metrics["moves"] == 0


@pytest.mark.parametrize(
    ("action", "task", "words"),
    [
        ("prefill:plan", {"rules": ["fcfs"]}, "process.rules of servegym/Tiny-v0 leaves out; add"),
        ("steal:running", {}, "which process.steals of servegym/Tiny-v0 leaves out; add 'running'"),
        ("mixed:longest", {}, "process.mixed_rules of servegym/Tiny-v0 leaves out; add 'longest'"),
        (
            "prefill:fcfs:cap=0.5",
            {},
            "process.caps and process.reserves of servegym/Tiny-v0 leave out",
        ),
    ],
)
def test_a_task_that_lacks_an_action_is_refused(
    action: str, task: dict[str, Any], words: str
) -> None:
    """Without this action it is played."""
    task_ = changed(CLUSTER, process=task)
    played(agent_of(["decode", "prefill:fcfs"]), task_)
    agent = agent_of(["decode", "prefill:fcfs", action])
    refused(partial(played, agent, task_), f"this agent may choose '{action}', ")
    refused(partial(played, agent, task_), words)


def test_a_task_without_mixed_stages_is_refused() -> None:
    task = changed(CLUSTER, cluster={"chunk_tokens": 0})
    words = "may choose 'mixed:fcfs', which servegym/Tiny-v0 has not: its cluster.chunk_tokens is 0"
    refused(partial(played, agent_of(["decode", "mixed:fcfs"]), task), words)


@pytest.mark.parametrize(
    ("legal", "chosen"),
    [
        (("decode", "steal:waiting"), "decode"),  # its own
        (("prefill:fcfs", "prefill:longest", "mixed:fcfs"), "prefill:longest"),  # its own
        (("prefill:fcfs", "mixed:fcfs", "steal:waiting"), "prefill:fcfs"),  # the first
        (("steal:waiting",), "steal:waiting"),
    ],
)
def test_it_chooses_among_its_own(legal: tuple[str, ...], chosen: str) -> None:
    agent = agent_of(["prefill:longest", "decode"])
    agent.prepare(Briefing(CLUSTER, None, np.random.default_rng(0)))
    env = ServingEnv(CLUSTER)
    observation, _ = env.reset(seed=0)
    mask = np.array([action in legal for action in CLUSTER.actions])
    assert CLUSTER.actions[agent.act(Situation(env.view(), observation, mask))] == chosen


def test_an_agent_that_never_decodes_waits_where_it_can_do_nothing_else() -> None:
    agent = agent_of(["prefill:longest"])
    agent.prepare(Briefing(CLUSTER, None, np.random.default_rng(0)))
    env = ServingEnv(CLUSTER)
    observation, _ = env.reset(seed=0)
    mask = np.isin(CLUSTER.actions, ["decode", "mixed:fcfs"])
    assert agent.act(Situation(env.view(), observation, mask)) == 0


# ---- training ------------------------------------------------------------------------------------

IMITATED = {
    "imitation_rounds": 2,
    "imitation_states": 20,
    "imitation_environments": 2,
    "imitation_batch_size": 16,
    "imitation_epochs": 1,
}
WAYS: dict[str, tuple[dict[str, Any], Callable[[TaskConfig], Expert] | None]] = {
    "ppo": ({}, None),
    "a rule": (IMITATED, partial(make_rule_expert, "vllm")),
    "a rule that mixes nothing": (IMITATED, partial(make_rule_expert, "fcfs")),
    "rollouts": (IMITATED, partial(make_rollout_expert, "fcfs")),
    "evolution": (
        {"evolution_updates": 1, "evolution_pairs": 2, "evolution_directions": 2},
        None,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_where_stages_mix_and_replicas_steal(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes in the same bits, charts all actions, and what it exports plays."""
    monkeypatch.setattr(charts, "to_image", lambda _: np.zeros((1, 1, 3), np.uint8))
    more, expert_of = WAYS[way]
    h = replace(SMALL, environments=2, batch_size=16, timesteps=96, **more)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def trained(folder: Path, *callbacks: Any, resume: bool = False) -> Any:
        return train(
            CLUSTER,
            h,
            folder,
            callbacks=callbacks,
            expert=None if expert_of is None else expert_of(CLUSTER),
            resume=resume,
            options=Options(checkpoint_every=1, progress=False),
        )

    model = trained(whole, ServingCallback(CLUSTER, range(900_000, 900_002), 48, {}, {}, whole))
    with pytest.raises(KeyboardInterrupt):
        trained(stopped, StopAt(50))
    assert weights(trained(stopped, resume=True)) == weights(model)
    agent = load_agent(whole / "final")
    assert agent.card.actions == CLUSTER.actions
    assert agent.card.features == features_of(OBSERVATION_BLOCKS)
    played(agent, CLUSTER)
    tags = EventAccumulator(str(whole / "tensorboard")).Reload().Tags()["scalars"]
    for name in ("decode", *CLUSTER.process.rules, "mixed:fcfs", "steal:waiting"):
        assert {f"shares/{name}", f"shares/train_{name}"} <= set(tags)
