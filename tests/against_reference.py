"""One random episode in the compiled simulator and in a slow reference, decision by decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from servegym.envs import Requests, ServingEnv, make_requests
from servegym.envs.simulator.state import FINISHED, FUTURE, RUNNING, WAITING
from servegym.envs.workload.sources import output_lengths
from tests.helpers import (
    changed,
    inside,
    instance,
    make_env,
    random_costs,
    random_queues,
    random_requests,
    start,
)
from tests.reference_beliefs import (
    BelievingSimulator,
    Comparison,
    PredictedRequest,
    expected_finishes,
    predicted,
)
from tests.reference_scored import random_scoring
from tests.reference_simulator import ALL_RULES, ReferenceSimulator, make_reference

Times = NDArray[np.float64]

Information = Literal["known", "predicted", "quantile", "mean-sd", "unknown"]
"""What is known of output lengths: all, predictions and how they are compared, or the workload's."""

INFORMATION: tuple[Information, ...] = get_args(Information)

PHASES = {FUTURE: "future", WAITING: "waiting", RUNNING: "running", FINISHED: "finished"}


def same_times(ours: Sequence[float] | Times, theirs: Sequence[float | None]) -> bool:
    """Equal up to rounding: the reference adds up rounds, the kernel has a closed form. None is NaN."""
    values, expected = np.asarray(ours), np.array(theirs, dtype=float)
    near = np.abs(values - expected) <= 1e-12 + 1e-9 * np.abs(expected)
    return bool((near | (np.isnan(values) & np.isnan(expected))).all())


def random_case(
    rng: np.random.Generator, information: Information = "known"
) -> tuple[ServingEnv, ReferenceSimulator]:
    """The same instance under the same settings, in both simulators, at the first decision."""
    dyadic = bool(rng.random() < 0.5)
    clients = int(rng.integers(1, 13))
    requests = random_requests(rng, dyadic=dyadic)
    rules = [str(rule) for rule in rng.permutation(ALL_RULES)[: int(rng.integers(1, 8))]]
    if rng.random() < 0.2:
        clients, requests, rules = crowd(rng)
    costs = random_costs(rng, clients, dyadic=dyadic)
    own = rng.spawn(1)[0]  # so that a seed means what it meant
    if own.random() < 0.3:
        shared = float(own.integers(1, 5)) * 2.0**-14
        costs = replace(costs, decode=replace(costs.decode, per_client_kv_token=shared))
    queues = random_queues(rng, requests, clients)
    budget = int(rng.choice([0, 0, 1, 30, 100]))
    every_round = bool(rng.random() < 0.4)
    scoring = random_scoring(rng)
    env = make_env(
        clients,
        costs,
        budget,
        rules=tuple(rules),
        decisions="rounds" if every_round else "events",
        reward=str(rng.choice(["gap", "latency"])),
    )
    if information == "known":
        start(env, requests, queues, scoring)
        return env, make_reference(
            requests, clients, costs, queues, rules, budget, every_round, scoring=scoring
        )
    if information in ("quantile", "mean-sd"):  # aligned goes by expected rounds only
        rules = [rule for rule in rules if rule != "aligned"] or ["longest"]
    env, listed = informed(rng, env, requests, rules, information)
    start(env, with_predictions(requests, listed), queues, scoring)
    reference = make_reference(
        listed, clients, costs, queues, rules, budget, every_round, BelievingSimulator, scoring
    )
    return env, reference


def informed(
    rng: np.random.Generator,
    env: ServingEnv,
    requests: Requests,
    rules: Sequence[str],
    information: Information,
) -> tuple[ServingEnv, list[PredictedRequest]]:
    """The environment with uncertain lengths, and the requests as the reference believes them to be."""
    n = len(requests)
    by: Comparison = "mean"
    if information == "quantile" or information == "mean-sd":
        by = information
    number = {"quantile": rng.choice([0.05, 0.5, 0.9, 0.99]), "mean-sd": rng.uniform(0, 5)}
    if information == "unknown":
        lengths = output_lengths("tiny")
        means = np.full(n, round(float(lengths.mean())))
        spreads = np.full(n, float(np.std(np.log(lengths))))
    else:
        noise = np.exp(rng.choice([0.0, 0.3, 1.0]) * rng.standard_normal(n))
        means = np.maximum(np.rint(requests.output_tokens * noise), 1).astype(int)
        spreads = rng.choice([0.0, 0.05, 0.3, 0.8, 2.0], n if rng.random() < 0.5 else 1)
        spreads = np.broadcast_to(spreads, n)
    task = changed(
        env.task,
        workload={"source": "tiny"},
        information={
            "output_lengths": "unknown" if information == "unknown" else "predicted",
            "compare_by": by,
            "quantile": float(number["quantile"]),
            "deviations": float(number["mean-sd"]),
        },
        process={"rules": tuple(rules)},
    )
    columns = (requests.arrival_s, requests.prompt_tokens, requests.output_tokens, means, spreads)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return ServingEnv(task), predicted(rows, by, float(number.get(by, 0.0)))


def with_predictions(requests: Requests, listed: Sequence[PredictedRequest]) -> Requests:
    """The same predictions for the environment, which overwrites them where lengths are unknown."""
    return make_requests(
        requests.prompt_tokens,
        requests.output_tokens,
        requests.arrival_s,
        np.array([request.mean for request in listed]),
        np.array([request.spread for request in listed]),
    )


def crowd(rng: np.random.Generator) -> tuple[int, Requests, list[str]]:
    """Many short requests on a few clients, so that several finish together: what aligned needs."""
    rows = zip(rng.integers(1, 9, 60), rng.integers(1, 14, 60), strict=True)
    requests = instance(*((int(prompt), int(output)) for prompt, output in rows))
    return int(rng.integers(4, 10)), requests, ["aligned", "scored", "fcfs"]


def compare(env: ServingEnv, reference: ReferenceSimulator) -> None:
    """Compare all state of both simulators, at a decision point or at the end."""
    state, now = inside(env), env.view()
    assert env.action_masks().tolist() == reference.legal_actions()
    assert state.decisions == reference.decisions
    assert now.round == reference.round
    assert state.stages == reference.stages
    assert state.cached_tokens == reference.cached_tokens()
    assert [PHASES[phase] for phase in state.phases] == [r.phase for r in reference.requests]
    clients = [-1 if request.client is None else request.client for request in reference.requests]
    assert state.clients == clients
    queued = [sum(request.expected_rounds for request in queue) for queue in reference.queues]
    assert state.queue_rounds == queued
    assert env.state is not None
    expected = env.state.expected[0, 0, : now.active]
    finishes = [(due - now.round, i) for due, i in expected.tolist()]
    assert finishes == expected_finishes(reference)
    totals = list(state.totals_s)
    assert same_times(list(state.totals_s.values()), [getattr(reference, name) for name in totals])
    log = env.records()
    for name in ("admitted_s", "first_token_s", "finished_s"):
        theirs = [getattr(request, name) for request in reference.requests]
        assert same_times(getattr(log, name), theirs), name


def compare_view(env: ServingEnv, reference: ReferenceSimulator) -> None:
    """Compare the view of rules; tests/test_observation.py checks its costs."""
    now = env.view()
    left = [request.expected_left for request in reference.running()]
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
        assert not info["illegal_action"]
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


def play_one(rng: np.random.Generator, information: Information) -> tuple[int, int]:
    """Play a random episode in both, AssertionError if they differ; return its requests and decisions."""
    env, reference = random_case(rng, information)
    total = play_both(env, reference, rng)
    assert np.isclose(total, expected_return(env, reference), rtol=1e-9, atol=1e-9)
    return len(reference.requests), reference.decisions
