"""The compiled simulator against tests/reference_simulator.py, decision by decision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from servegym.envs import Requests, ServingEnv
from servegym.envs.simulator.admission import ADMISSION_RULES
from servegym.envs.simulator.state import FINISHED, FUTURE, RUNNING, WAITING
from tests.helpers import (
    inside,
    instance,
    make_env,
    random_costs,
    random_queues,
    random_requests,
    start,
)
from tests.reference_simulator import RULES, ReferenceSimulator, make_reference

Times = NDArray[np.float64]

GROUPS = 16
CASES_PER_GROUP = 25
PHASES = {FUTURE: "future", WAITING: "waiting", RUNNING: "running", FINISHED: "finished"}


def same_times(ours: Sequence[float] | Times, theirs: Sequence[float | None]) -> bool:
    """Equal but for rounding: one adds up rounds, the other uses a closed form. None is NaN."""
    expected = np.array([np.nan if second is None else second for second in theirs])
    return bool(np.allclose(ours, expected, rtol=1e-9, atol=1e-12, equal_nan=True))


def random_case(rng: np.random.Generator) -> tuple[ServingEnv, ReferenceSimulator]:
    """The same instance under the same settings, in both simulators, at the first decision."""
    dyadic = bool(rng.random() < 0.5)
    clients = int(rng.integers(1, 13))
    requests = random_requests(rng, dyadic=dyadic)
    rules = [str(rule) for rule in rng.permutation(RULES)[: int(rng.integers(1, 7))]]
    if rng.random() < 0.2:
        clients, requests, rules = crowd(rng)
    costs = random_costs(rng, clients, dyadic=dyadic)
    queues = random_queues(rng, requests, clients)
    budget = int(rng.choice([0, 0, 1, 30, 100]))
    every_round = bool(rng.random() < 0.4)
    env = make_env(
        clients,
        costs,
        budget,
        rules=tuple(rules),
        decisions="rounds" if every_round else "events",
        reward=str(rng.choice(["gap", "latency"])),
    )
    start(env, requests, queues)
    return env, make_reference(requests, clients, costs, queues, rules, budget, every_round)


def crowd(rng: np.random.Generator) -> tuple[int, Requests, list[str]]:
    """Many short requests on a few clients, so that several finish together: what aligned needs."""
    rows = zip(rng.integers(1, 9, 60), rng.integers(1, 14, 60), strict=True)
    requests = instance(*((int(prompt), int(output)) for prompt, output in rows))
    return int(rng.integers(4, 10)), requests, ["aligned", "fcfs"]


def compare(env: ServingEnv, reference: ReferenceSimulator) -> None:
    """Everything that both know, at a decision point or at the end."""
    state = inside(env)
    assert env.action_masks().tolist() == reference.legal_actions()
    assert state.decisions == reference.decisions
    assert env.view().round == reference.round
    assert state.stages == reference.stages
    assert state.cached_tokens == reference.cached_tokens()
    assert [PHASES[phase] for phase in state.phases] == [r.phase for r in reference.requests]
    clients = [-1 if request.client is None else request.client for request in reference.requests]
    assert state.clients == clients
    queued = [sum(request.rounds for request in queue) for queue in reference.queues]
    assert state.queue_rounds == queued
    totals = list(state.totals_s)
    assert same_times(list(state.totals_s.values()), [getattr(reference, name) for name in totals])
    log = env.records()
    for name in ("admitted_s", "first_token_s", "finished_s"):
        theirs = [getattr(request, name) for request in reference.requests]
        assert same_times(getattr(log, name), theirs), name


def compare_view(env: ServingEnv, reference: ReferenceSimulator) -> None:
    """What rules are shown of a decision point; its costs are in tests/test_observation.py."""
    now = env.view()
    left = [request.rounds_left for request in reference.running()]
    assert now.clients == reference.clients
    assert now.active == len(left)
    assert now.idle == len(reference.idle_clients())
    assert now.waiting == len(reference.waiting())
    assert now.arrived == sum(request.phase != "future" for request in reference.requests)
    assert now.rounds_to_finish == min(left, default=0)


def play_both(env: ServingEnv, reference: ReferenceSimulator, rng: np.random.Generator) -> float:
    """Take the same random legal actions in both and compare after each; return the return."""
    total, over = 0.0, False
    compare(env, reference)
    while not over:
        compare_view(env, reference)
        # Also rules that seldom differ are taken often; decoding is taken half of the time.
        legal = np.flatnonzero(env.action_masks())
        action = int(legal[0] if rng.random() < 0.5 else rng.choice(legal))
        _, reward, over, truncated, info = env.step(np.int64(action))
        assert not truncated
        assert "illegal_action" not in info
        reference.step(action)
        assert over == reference.finished()
        compare(env, reference)
        total += float(reward)
    return total


def expected_return(env: ServingEnv, reference: ReferenceSimulator) -> float:
    """Minus the gap in percent, or minus the mean latency."""
    if env.task.process.reward == "gap":
        return -100 * (reference.clock_s / inside(env).bound_s - 1)
    done = [(request.finished_s or 0.0) - request.arrival_s for request in reference.requests]
    return -sum(done) / len(done)


@pytest.mark.parametrize("group", range(GROUPS))
def test_same_episode_as_the_reference(group: int) -> None:
    rng = np.random.default_rng([2502, 15763, group])
    for _ in range(CASES_PER_GROUP):
        env, reference = random_case(rng)
        total = play_both(env, reference, rng)
        assert total == pytest.approx(expected_return(env, reference), rel=1e-9, abs=1e-9)


def test_rules_are_those_of_the_reference() -> None:
    assert RULES == ADMISSION_RULES
