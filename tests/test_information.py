"""Expected output lengths, their revision, and the gap that better predictions save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_ndtr

from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import Requests, ServingEnv, load_task
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.process.metrics import METRICS
from servegym.envs.simulator.beliefs import expected_output_tokens
from servegym.envs.simulator.state import FINISHED, FUTURE, RUNNING, WAITING
from servegym.envs.task.cases import sample_requests
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.vector_env import ServingVectorEnv
from servegym.envs.workload.predictors import expect_alike
from servegym.envs.workload.requests import MAX_TOKENS
from tests.helpers import instance, make_env, random_legal_action, start
from tests.information_helpers import KNOWN, ROWS, SMALL, UNKNOWN, informed, make

# ---- revised expectations -----------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("emitted", [1, 90, 100, 200, 2_000, 100_000])
def test_the_conditional_mean(spread: float, emitted: int) -> None:
    """Against scipy's logarithms of the normal distribution, which do not underflow."""
    log_median = np.log(100.0)
    z = (np.log(emitted) - log_median) / spread
    log_mean = log_median + spread**2 / 2 + log_ndtr(spread - z) - log_ndtr(-z)
    expected = np.clip(np.exp(log_mean), emitted + 1, MAX_TOKENS)
    # The asymptote of far tails is off by 1 / z² of the distance.
    error = 1.0 + 0.02 * (expected - emitted)
    assert expected_output_tokens(log_median, spread, emitted) == pytest.approx(expected, abs=error)


def test_a_certain_prediction_is_revised_by_one_round() -> None:
    assert expected_output_tokens(np.log(100.0), 0.0, 250) == 251


def test_an_outlived_prediction_by_hand() -> None:
    """Two clients. Request 0 is predicted 3 tokens and takes 9, request 1 both 6 and 7."""
    requests = replace(
        instance((5, 9), (5, 6), (5, 5), predicted=[3, 7, 7]),
        predicted_spread=np.array([0.5, 0.5, 0.5]),
    )
    env = make_env(2, lengths="predicted", decisions="rounds")
    start(env, requests)
    env.step(1 + env.task.process.rules.index("fcfs"))
    # The stage emits a token, the finish of request 1 after five rounds is the first choice.
    assert env.view().round == 5
    assert env.view().active == 1
    log_median = np.log(3) - 0.5**2 / 2
    expected = expected_output_tokens(log_median, 0.5, 6)  # six tokens are out
    assert env.view().rounds_to_finish == expected - 6 > 0
    assert env.observation_space.contains(env.rows.observations[0])
    while env.view().round < expected - 1:  # rounds = tokens − 1
        assert env.view().rounds_to_finish == expected - 1 - env.view().round
        env.step(0)
    assert (
        env.view().rounds_to_finish == expected_output_tokens(log_median, 0.5, expected) - expected
    )


@given(ROWS, st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_expectations_are_kept_in_order(
    rows: list[tuple[int, int, float, int, float]], clients: int, every_round: bool, seed: int
) -> None:
    requests = make(rows)
    env = make_env(clients, lengths="predicted", decisions="rounds" if every_round else "events")
    start(env, requests)
    rng = np.random.default_rng(seed)
    over = False
    while not over:
        check_expectations(env, requests)
        over = env.step(random_legal_action(env, rng))[2]
    check_expectations(env, requests)


def check_expectations(env: ServingEnv, requests: Requests) -> None:
    """The arrays of beliefs agree with each other, and with the truth where it is known."""
    assert env.state is not None
    state, replica = env.state, env.state.replicas[0, 0]
    rows, held = state.requests[0], state.clients[0, 0]
    n, now = int(replica["active"]), int(replica["rounds"])
    expected = state.expected[0, 0, :n]
    running = np.flatnonzero(rows["phase"] == RUNNING)
    assert sorted(expected["request"].tolist()) == running.tolist()
    keys = list(zip(expected["due"].tolist(), expected["request"].tolist(), strict=True))
    assert keys == sorted(keys, reverse=True)
    assert all(due > now for due, _ in keys)
    assert (
        expected["due"].tolist()
        == held["expected_end"][rows["client"][expected["request"]]].tolist()
    )
    assert replica["due_sum"] == expected["due"].sum()
    arrived = rows["phase"] != FUTURE
    assert state.episodes[0]["arrived_rounds"] == rows["expected_rounds"][arrived].sum()
    predicted = requests.predicted_output_tokens - 1
    waiting = rows["phase"] <= WAITING
    assert np.array_equal(rows["expected_rounds"][waiting], predicted[waiting])
    done = rows["phase"] == FINISHED
    assert np.array_equal(rows["expected_rounds"][done], requests.decode_rounds[done])
    truth = state.finishes[0, 0, :n]
    stage = truth["due"] - rows["decode_rounds"][truth["request"]]
    for i, began in zip(truth["request"].tolist(), stage.tolist(), strict=True):
        believed = int(held[rows["client"][i]]["expected_end"])
        assert believed == began + rows["expected_rounds"][i]
        assert believed == began + predicted[i] or predicted[i] <= now - began
    assert env.observation_space.contains(env.rows.observations[0])


@pytest.mark.parametrize("decisions", ["events", "rounds"])
def test_a_perfect_predictor_is_the_same_as_knowing(decisions: str) -> None:
    """To the last bit: every observation, mask and metric, under random actions."""
    task = with_overrides(informed(SMALL, kendall_tau=1.0), {"process": {"decisions": decisions}})
    envs = [ServingEnv(task), ServingEnv(informed(task, output_lengths="known"))]
    rng = np.random.default_rng(0)
    seen = [env.reset(seed=7)[0] for env in envs]
    over, infos = False, [dict[str, Any]()] * 2
    while not over:
        assert seen[0].tobytes() == seen[1].tobytes()
        assert envs[0].view() == envs[1].view()
        action = random_legal_action(envs[0], rng)
        steps = [env.step(action) for env in envs]
        assert steps[0][1:3] == steps[1][1:3]
        seen, over, infos = [step[0] for step in steps], steps[0][2], [step[4] for step in steps]
    assert {name: infos[0][name] for name in METRICS} == {name: infos[1][name] for name in METRICS}


# ---- the whole way ----------------------------------------------------------------------------------


def test_the_task() -> None:
    task = load_task("GSM8KPredicted-v0")
    base = load_task("GSM8K-v0")
    assert informed(task, output_lengths="known") == replace(base, name=task.name)
    assert task.information.kendall_tau == 0.55


@pytest.mark.parametrize("task", [SMALL, UNKNOWN])
@pytest.mark.parametrize("name", ["hybrid", "aligned-lookahead", "aligned"])
def test_compiled_and_object_play_agree(task: TaskConfig, name: str) -> None:
    case = make_case(task, 2)
    row = play(task, name, make_policy(name), case, 2).row
    compiled = play_compiled(task, make_trigger_policy(name), case)
    same = [metric for metric in METRICS if metric != "decisions"]
    assert str([row[metric] for metric in same]) == str([compiled[metric] for metric in same])


def test_the_vector_environment_knows_no_more() -> None:
    vector = ServingVectorEnv(2, SMALL)
    alone = [ServingEnv(SMALL) for _ in range(2)]
    first, _ = vector.reset(seed=4)
    seen = [env.reset(seed=4 + e)[0] for e, env in enumerate(alone)]
    assert np.array_equal(first, seen)
    rng = np.random.default_rng(0)
    for _ in range(15):
        actions = [random_legal_action(env, rng) for env in alone]
        together = vector.step(actions)[0]
        assert np.array_equal(
            together, [env.step(action)[0] for env, action in zip(alone, actions, strict=True)]
        )


def test_better_predictions_make_better_schedules() -> None:
    """Mean gap of a rule over ten cases: with no predictor, the task's and a perfect one."""
    gaps = [
        np.mean(
            [
                play_compiled(
                    (task := informed(SMALL, kendall_tau=tau)),
                    make_trigger_policy("threshold-1"),
                    make_case(task, seed),
                )["gap"]
                for seed in range(10)
            ]
        )
        for tau in (1.0, 0.55, 0.0)
    ]
    assert gaps == sorted(gaps)
    assert expect_alike(sample_requests(KNOWN, np.random.default_rng(0)), np.array([3])).first(1)
