"""No leakage: other true lengths under the same predictions change nothing before a finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from servegym.baselines.catalogue import MIXED, REGISTRY
from servegym.baselines.registry import make_policy
from servegym.envs import Requests, ServingEnv
from servegym.envs.playing.evaluation import brief, make_case
from servegym.envs.playing.policy import Situation, asked_task
from servegym.envs.task.cases import sample_requests
from tests.helpers import instance, make_env, random_legal_action, start
from tests.information_helpers import KNOWN, ROWS, SMALL, UNKNOWN, informed, make


def other_truth(requests: Requests, rng: np.random.Generator, most: int = 1000) -> Requests:
    """The same requests with true lengths permuted behind equal predictions, `most` of each."""
    outputs = requests.output_tokens.copy()
    assert requests.predicted_spread is not None
    keys = np.stack([requests.predicted_output_tokens, requests.predicted_spread])
    for key in np.unique(keys, axis=1).T:
        alike = rng.permutation(np.flatnonzero((key == keys.T).all(axis=1)))[:most]
        outputs[alike] = outputs[rng.permutation(alike)]
    return replace(requests, output_tokens=outputs)


def revealed(env: ServingEnv) -> list[tuple[int, float]]:
    """What finishes have revealed: which requests have finished, and when."""
    assert env.state is not None
    n = int(np.asarray(env.state.episodes)["requests"][0])
    finished_s = np.asarray(env.state.times)["finished_s"][0, :n]
    return [(int(i), float(finished_s[i])) for i in np.flatnonzero(np.isfinite(finished_s))]


def field_bytes(parts: Sequence[NDArray[Any]]) -> list[bytes]:
    """The bytes of every field, without what lies between fields."""
    return [
        np.ascontiguousarray(part[name]).tobytes()
        for part in map(np.asarray, parts)  # a record array's fields take ten times as long
        for name in part.dtype.names or (...,)
    ]


def imagined_bytes(env: ServingEnv) -> list[bytes]:
    """Everything that the imagined episode holds."""
    state = env.imagine()
    n = int(state.replicas[0, 0]["active"])
    idle = int(state.replicas[0, 0]["idle"])
    parts: list[NDArray[Any]] = [state.finishes[0, 0, :n], state.idle[0, 0, :idle]]
    names = ("episodes", "requests", "by_length", "lengths", "waiting_lengths", "waiting_tree")
    parts += [getattr(state, name) for name in (*names, "replicas", "clients")]
    return field_bytes(parts)


def in_step(envs: list[ServingEnv]) -> Iterator[list[Situation]]:
    """Pairs of situations of two environments, until a finish tells them apart."""
    while revealed(envs[0]) == revealed(envs[1]):
        yield [
            Situation(
                env.view(), env.rows.observations[0], env.action_masks(), env.imagine, env.outlook
            )
            for env in envs
        ]


def assert_alike(envs: list[ServingEnv], situations: list[Situation]) -> None:
    first, second = situations
    assert first.view == second.view
    assert first.observation.tobytes() == second.observation.tobytes()
    assert first.mask.tolist() == second.mask.tolist()
    assert imagined_bytes(envs[0]) == imagined_bytes(envs[1])


TRIALS = 6
NAMES = [
    {"threshold": "threshold-2", "rollout": "rollout-2"}.get(name, name)
    for name in REGISTRY
    if name not in MIXED
] + ["rollout(samples=3, errors=0.5, base=threshold-2)"]


@pytest.mark.parametrize("lengths", ["predicted", "unknown"])
@pytest.mark.parametrize("name", NAMES)
def test_no_policy_sees_true_lengths(name: str, lengths: str) -> None:
    """Other true lengths behind the same predictions: the same actions until a finish reveals one."""
    policies = [make_policy(name), make_policy(name)]
    task = informed(SMALL, output_lengths=lengths)
    task = asked_task(task, policies[0])
    compared = trials = 0
    for seed in range(TRIALS):
        rng = np.random.default_rng([seed, 9])
        requests = sample_requests(task, rng)
        if lengths == "predicted":  # predictions in steps of 150 tokens, so that many are equal
            coarse = requests.predicted_output_tokens // 150 * 150 + 75
            requests = replace(requests, predicted_output_tokens=coarse)
        # A swap of a few is told of late, one of many soon.
        altered = other_truth(requests, rng, most=(2, 5, 1000)[seed % 3])
        trials += not np.array_equal(altered.output_tokens, requests.output_tokens)
        envs = [ServingEnv(task), ServingEnv(task)]
        for env, policy, truth in zip(envs, policies, (requests, altered), strict=True):
            case = replace(make_case(task, seed), requests=truth)
            plan = policy.prepare(brief(task, case, seed))
            env.reset(seed=seed, options={"requests": truth, "plan": plan})
        for situations in in_step(envs):
            assert_alike(envs, situations)
            actions = [
                policy.act(situation)
                for policy, situation in zip(policies, situations, strict=True)
            ]
            assert actions[0] == actions[1]
            compared += 1
            ended = [env.step(action)[2] for env, action in zip(envs, actions, strict=True)]
            if any(ended):
                break
    assert trials >= TRIALS - 2
    assert compared >= 2 * TRIALS


def test_the_leak_test_would_notice() -> None:
    """With known lengths, other true lengths change the first observation."""
    requests = sample_requests(UNKNOWN, np.random.default_rng(0))
    altered = other_truth(requests, np.random.default_rng(1))
    half = np.arange(len(requests)) % 2 == 0
    longer = replace(altered, output_tokens=np.where(half, 700, 20))
    alike = [ServingEnv(UNKNOWN).reset(options={"requests": r})[0] for r in (requests, longer)]
    assert alike[0].tobytes() == alike[1].tobytes()
    observations = [ServingEnv(KNOWN).reset(options={"requests": r})[0] for r in (requests, longer)]
    assert observations[0].tobytes() != observations[1].tobytes()


@given(ROWS, st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_nothing_leaks_under_any_actions(
    rows: list[tuple[int, int, float, int, float]], clients: int, every_round: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mode = "rounds" if every_round else "events"
    truth = make(rows)
    envs = [make_env(clients, lengths="predicted", decisions=mode) for _ in range(2)]
    for env, requests in zip(envs, (truth, other_truth(truth, rng)), strict=True):
        start(env, requests)
    for situations in in_step(envs):
        assert_alike(envs, situations)
        action = random_legal_action(envs[0], rng)
        ended = [env.step(action)[2] for env in envs]
        if any(ended):
            break


def test_aligned_aims_at_expected_finishes() -> None:
    """Whether two running requests truly finish together does not change the rule's pick."""
    predicted = [3, 20, 20, *range(4, 9), *range(4, 9), 12, 13]
    envs = []
    for together in (9, 12):
        outputs = [2, 9, together, *predicted[3:]]
        rows = [(5, output) for output in outputs]
        env = make_env(3, lengths="predicted", decisions="rounds")
        start(env, instance(*rows, predicted=predicted))
        env.step(1 + env.task.process.rules.index("fcfs"))
        assert env.view().idle == 1
        env.step(1 + env.task.process.rules.index("aligned"))
        envs.append(env)
    admitted = [np.flatnonzero(np.isfinite(env.records().admitted_s)).tolist() for env in envs]
    assert admitted[0] == admitted[1] == [0, 1, 2, len(predicted) - 1]


def test_a_briefing_holds_predictions_only() -> None:
    case = make_case(SMALL, 0)
    briefed = brief(SMALL, case, 0).requests
    assert briefed is not None
    assert briefed.output_tokens.tolist() == case.requests.predicted_output_tokens.tolist()
    known = brief(KNOWN, make_case(KNOWN, 0), 0).requests
    assert known is not None
    assert known.output_tokens.tolist() == case.requests.output_tokens.tolist()
