"""Rollout by samples: futures drawn from beliefs, played by kernels, judged against the base's own action."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

from servegym.agents.policy import load_agent
from servegym.baselines.expert import make_rollout_expert
from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.lookahead.sampled import Futures, draw_rounds
from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import compile_policy
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs import ServegymError, ServingEnv
from servegym.envs.playing.evaluation import brief, make_case, play
from servegym.envs.playing.policy import Situation
from servegym.envs.simulator.state import RUNNING, WAITING
from servegym.envs.task.config import with_overrides
from servegym.envs.vector_env import ServingVectorEnv
from servegym.studies.policies import AGENTS
from tests.information_helpers import KNOWN, SMALL
from tests.test_leakage import other_truth

SAMPLES = 400


def middle() -> ServingEnv:
    """An environment of predicted lengths in the middle of an episode, some clients idle."""
    env = ServingEnv(SMALL)
    env.reset(seed=3, options={"requests": make_case(SMALL, 3).requests})
    for _ in range(12):
        mask = env.action_masks()
        env.step(np.int64(0 if mask[0] and env.view().idle < 2 else 3))
    assert env.view().active > 2
    assert env.view().waiting > 2
    return env


def test_futures_follow_the_beliefs() -> None:
    """Waiting requests by their predictions, running ones beyond the tokens emitted so far."""
    env = middle()
    assert env.state is not None
    imagined = env.imagine()
    tokens = draw_rounds(imagined, SAMPLES, np.random.default_rng(0)) + 1
    rows, beliefs = env.state.requests[0], env.state.beliefs[0]
    spread = beliefs["spread"]
    waiting = rows["phase"] == WAITING
    logs = np.log(tokens[:, waiting])
    error = spread[waiting] / np.sqrt(SAMPLES)
    assert (np.abs(logs.mean(axis=0) - beliefs["log_median"][waiting]) < 5 * error + 0.02).all()
    assert logs.std(axis=0) == pytest.approx(spread[waiting], rel=0.2)
    replica = env.state.replicas[0, 0]
    running = rows["phase"] == RUNNING
    truth = env.state.finishes[0, 0, : replica["active"]]
    begun = np.zeros(len(rows), np.int64)
    begun[truth["request"]] = truth["due"] - rows["decode_rounds"][truth["request"]]
    emitted = replica["rounds"] - begun + 1
    assert running.sum() == replica["active"]
    assert (tokens[:, running] > emitted[running]).all()
    assert tokens[:, running].std(axis=0).min() > 0
    finished = ~(waiting | running)
    assert (tokens[:, finished] == rows["decode_rounds"][finished] + 1).all()


def test_futures_hold_no_true_length() -> None:
    """Other true lengths behind the same predictions draw the same futures."""
    requests = make_case(SMALL, 3).requests
    coarse = requests.predicted_output_tokens // 150 * 150 + 75
    requests = replace(requests, predicted_output_tokens=coarse)
    rounds = []
    for truth in (requests, other_truth(requests, np.random.default_rng(1))):
        env = ServingEnv(SMALL)
        env.reset(options={"requests": truth})
        rounds.append(draw_rounds(env.imagine(), 3, np.random.default_rng(2)))
    assert rounds[0].tolist() == rounds[1].tolist()
    assert rounds[0][0].tolist() != rounds[0][1].tolist()


def test_a_future_of_the_truth_ends_as_the_episode_does() -> None:
    """The kernels play what the environment plays: the scheduler knows no more in a future than in truth."""
    env = middle()
    assert env.state is not None
    base = make_trigger_policy("lookahead")  # decides by beliefs
    case = make_case(SMALL, 3)
    base.prepare(brief(SMALL, case, 3))
    truth = env.state.requests[0]["decode_rounds"].astype(np.int64)[None]
    futures = Futures(env.costs, env.settings, compile_policy(base, SMALL), 1)
    legal = np.flatnonzero(env.action_masks())
    ends_s = np.full((1, len(legal)), np.nan)
    playing = np.ones(len(legal), np.bool_)
    futures.play(env.imagine(), truth, legal, playing, ends_s, to_the_end=True)
    for action, end_s in zip(legal, ends_s[0], strict=True):
        real = deepcopy(env)
        observation, _, over, _, info = real.step(np.int64(action))
        while not over:
            situation = Situation(real.view(), observation, real.action_masks())
            observation, _, over, _, info = real.step(np.int64(base.act(situation)))
        assert end_s == pytest.approx(info["makespan_s"], rel=1e-9)


def test_only_what_is_beyond_chance_replaces_the_bases_action() -> None:
    case = make_case(SMALL, 0)
    rows = {
        name: play(SMALL, name, make_policy(name), case, 0).row["makespan_s"]
        for name in (
            "threshold-2",
            "rollout(samples=4, errors=100, base=threshold-2)",
            "rollout(samples=4, errors=0, base=threshold-2)",
            "rollout(samples=4, base=static)",
            "static",
        )
    }
    plain, sure, daring, better, static = rows.values()
    assert sure == plain
    assert daring != plain
    assert better < static  # which waits for everybody: that others gain is no chance


def test_with_known_lengths_samples_change_nothing() -> None:
    case = make_case(KNOWN, 0)
    names = ("rollout(variations=1, base=lpt)", "rollout(variations=1, samples=4, base=lpt)")
    first, second = (play(KNOWN, name, make_policy(name), case, 0).row for name in names)
    assert first["makespan_s"] == second["makespan_s"]


def test_an_expert_by_samples() -> None:
    """It values every legal action and no other, by futures alike for all; forced actions cost the least."""
    env = ServingVectorEnv(2, SMALL)
    env.reset(seed=4)
    for _ in range(6):
        env.step(np.where(env.action_masks()[:, 0], 0, 3))
    expert = make_rollout_expert("threshold-2", SMALL, samples=6)
    values, masks = expert(env), env.action_masks()
    assert (np.isfinite(values) == masks).all()
    assert (values[masks] < 0).all()
    assert np.ptp(values[0][masks[0]]) > 0
    again = make_rollout_expert("threshold-2", SMALL, samples=6)(env)
    assert values.tolist() == again.tolist()
    certain = make_rollout_expert("threshold-2", KNOWN, samples=6)
    rows = ServingVectorEnv(2, KNOWN)
    rows.reset(seed=4)
    assert certain(rows).tolist() == make_rollout_expert("threshold-2", KNOWN)(rows).tolist()
    with pytest.raises(ServegymError, match="samples must be ≥ 0, got -1"):
        make_rollout_expert("threshold-2", SMALL, samples=-1)


def test_names() -> None:
    policy = make_policy("rollout(samples=16)")
    assert isinstance(policy, RolloutPolicy)
    assert isinstance(policy.base, TriggerPolicy)
    assert (policy.samples, policy.errors, policy.base.parameter) == (16, 3.0, 12.0)
    named = make_policy("rollout(base=lpt, errors=1, samples=8)")
    assert isinstance(named, RolloutPolicy)
    assert isinstance(named.base, TriggerPolicy)
    assert (named.errors, named.base.rule, named.base.trigger) == (1.0, "longest", 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rollout(samples=-1)", "samples must be a whole number in 0 … 10000"),
        ("rollout(samples=1.5)", "samples must be a whole number"),
        ("rollout(samples=4, errors=-1)", "errors must lie in 0 … 100"),
        ("rollout(samples=4, errors=nan)", "errors must lie in"),
        ("rollout(samples=4, base=rollout)", "has no trigger"),
        ("threshold(idle=2, samples=4)", "parameter of threshold"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        make_policy(name)


def test_bad_numbers_and_tasks() -> None:
    base = make_trigger_policy("lpt")
    for numbers in ({"samples": -1}, {"errors": -1.0}, {"errors": float("inf")}):
        with pytest.raises(ServegymError, match="must be ≥ 0"):
            RolloutPolicy(base, **numbers)
    agent = load_agent(AGENTS / "GSM8KPredicted-v0")
    with pytest.raises(ServegymError, match="by samples needs a rule as its base, not an agent"):
        RolloutPolicy(agent, samples=2)
    two = with_overrides(SMALL, {"cluster": {"replicas": 2}})
    policy = make_policy("rollout(samples=2, base=threshold-2)")
    with pytest.raises(ServegymError, match=r"samples are for one replica, .* has 2"):
        play(two, "sampled", policy, make_case(two, 0), 0)
    one = make_policy("rollout(samples=2, base=threshold-2)")
    assert play(SMALL, "sampled", one, make_case(SMALL, 0), 0).row["gap"] > 0
