"""What policies observe: every entry of the observation and of the view, against plain formulas.

The formulas are written from ``FEATURES``, entry by entry, over the reference simulator's requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from servegym.envs import ServingEnv
from servegym.envs.machine.costs import AffinePrefill, LevelledPrefill, StageCosts
from servegym.envs.process.observation import FEATURES
from tests.helpers import (
    UNIT_COSTS,
    instance,
    make_env,
    random_costs,
    random_legal_action,
    random_queues,
    random_requests,
    start,
)
from tests.reference_simulator import ReferenceSimulator, decode_round_s, make_reference, prefill_s

GROUPS = 10
CASES_PER_GROUP = 12

BUCKETS = [0, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048]
STAGE_COSTS = [0.25, 0.5, 1.0, 2.0, 4.0]
SHARES = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0]


# ---- the reference ---------------------------------------------------------------------------


def stage_if_filled_now(reference: ReferenceSimulator) -> tuple[float, float]:
    """Seconds of a stage that fills the idle clients with waiting prompts of mean length, and the
    part of it that its tokens and requests do not explain.
    """
    waiting = reference.waiting()
    if not waiting:
        return 0.0, 0.0
    admitted = min(len(reference.idle_clients()), len(waiting))
    tokens = sum(request.prompt for request in waiting) * admitted // len(waiting)
    squares = sum(request.prompt**2 for request in waiting) * (admitted / len(waiting))
    seconds = prefill_s(reference.costs, tokens, squares, admitted)
    explained = explained_s(reference.costs, tokens, squares)
    explained += reference.costs.engine_overhead.per_client * admitted
    return seconds, max(seconds - explained, 0.0)


def explained_s(costs: StageCosts, tokens: int, squares: float) -> float:
    """What the tokens cost at the margin; with levels, where a level is best filled."""
    prefill = costs.prefill
    if isinstance(prefill, LevelledPrefill):
        levels = zip(prefill.level_seconds, prefill.level_tokens, strict=True)
        return tokens * min(seconds / holds for seconds, holds in levels)
    return prefill.per_token * tokens + prefill.per_token_squared * squares


def rounds_ahead_s(reference: ReferenceSimulator, rounds: int) -> float:
    """Seconds of the next rounds, if no request is admitted or finishes."""
    active, cached = len(reference.running()), reference.cached_tokens()
    return sum(decode_round_s(reference.costs, active, cached + k * active) for k in range(rounds))


def share(a: float, b: float) -> float:
    """a / (a + b), 0 if both are 0."""
    return a / (a + b) if a + b > 0 else 0.0


def log(x: float, doublings: int) -> float:
    """log₂(1 + x) / doublings, with a straight line between powers of two, at most 1."""
    power = 0
    while 2 ** (power + 1) <= 1 + x:
        power += 1
    return min((power + (1 + x) / 2**power - 1) / doublings, 1.0)


def log_rounds(rounds: float) -> float:
    return log(rounds, 14)


def histogram(lengths: Sequence[int], divisor: int) -> list[float]:
    """How many lengths lie in each bucket; the last is open."""
    ends = [*BUCKETS[1:], math.inf]
    return [
        sum(low <= length < high for length in lengths) / max(divisor, 1)
        for low, high in zip(BUCKETS, ends, strict=True)
    ]


def rounds_until(left: list[int], done_share: float, clients: int) -> float:
    """Rounds until this share of all clients is idle, but at least until the next one finishes."""
    finishing = max(math.ceil(done_share * clients) - (clients - len(left)), 1)
    return log_rounds(left[finishing - 1]) if finishing <= len(left) else 0.0


def waiting_on(left: list[int], clients: int, limit: float) -> tuple[float, float]:
    """Idle clients, and rounds gone, when idling from now on has taken ``limit`` client-rounds.

    A round that would exceed it is gone in part.
    """
    spent = 0
    for rounds in range(max(left, default=0)):
        idle = clients - sum(ends > rounds for ends in left)
        if spent + idle > limit:
            return idle, rounds + (limit - spent) / idle
        spent += idle
    return clients, max(left, default=0)


def expected_observation(reference: ReferenceSimulator) -> list[float]:
    clients = reference.clients
    left = sorted(request.rounds_left for request in reference.running())
    waiting = sorted(request.rounds for request in reference.waiting())
    active, idle = len(left), len(reference.idle_clients())
    arrived = [request for request in reference.requests if request.phase != "future"]
    all_rounds = max(sum(request.rounds for request in arrived), 1)
    finished = sum(request.phase == "finished" for request in arrived)
    next_round_s = decode_round_s_or_idle(reference)
    decode = reference.costs.decode
    token_s = decode.per_kv_token + decode.per_client_kv_token * active
    cached_s = token_s * reference.cached_tokens()
    stage_s, fixed_s = stage_if_filled_now(reference)
    to_finish_s = rounds_ahead_s(reference, left[0]) if left else 0.0
    middle = (len(waiting) - 1) // 2
    stage_rounds = active * fixed_s / next_round_s
    futures = [waiting_on(left, clients, cost * stage_rounds) for cost in STAGE_COSTS]
    return [
        active / clients,
        min(idle, len(waiting)) / clients,
        len(waiting) / len(arrived),
        log(len(waiting) / clients, 8),
        finished / len(arrived),
        cached_s / next_round_s,
        sum(waiting) / all_rounds,
        sum(left) / all_rounds,
        share(stage_s, to_finish_s),
        share(reference.idle_wait_s, active * fixed_s),
        share(idle * to_finish_s, active * fixed_s),
        share(reference.idle_wait_s + idle * to_finish_s, active * stage_s),
        fixed_s / stage_s if stage_s > 0 else 0.0,
        share(stage_s, next_round_s),
        *([log_rounds(waiting[k]) for k in (-1, middle, 0)] if waiting else [0.0] * 3),
        *[rounds_until(left, done_share, clients) for done_share in SHARES],
        *histogram(left, clients),
        *histogram(waiting, len(waiting)),
        *[idle / clients for idle, _ in futures],
        *[log_rounds(rounds) for _, rounds in futures],
    ]


def decode_round_s_or_idle(reference: ReferenceSimulator) -> float:
    """Seconds of the next round; with no active client, the tables' entry for 0 clients."""
    active = len(reference.running())
    if active > 0:
        return decode_round_s(reference.costs, active, reference.cached_tokens())
    tables = reference.costs.tables(reference.clients)
    return float(tables.decode_base_s[0, 0])


# ---- the comparison --------------------------------------------------------------------------


def assert_observed(
    env: ServingEnv, reference: ReferenceSimulator, observation: np.ndarray
) -> None:
    expected = expected_observation(reference)
    wrong = [
        (name, float(ours), theirs)
        for name, ours, theirs in zip(FEATURES, observation, expected, strict=True)
        if not math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-7)
    ]
    assert wrong == []


def assert_viewed(env: ServingEnv, reference: ReferenceSimulator) -> None:
    now = env.view()
    left = [request.rounds_left for request in reference.running()]
    stage_s, fixed_s = stage_if_filled_now(reference)
    assert now.rounds_to_finish == min(left, default=0)
    assert now.seconds_to_finish == pytest.approx(rounds_ahead_s(reference, min(left, default=0)))
    assert now.round_s == pytest.approx(decode_round_s_or_idle(reference))
    assert now.prefill_s == pytest.approx(stage_s)
    assert now.prefill_fixed_s == pytest.approx(fixed_s, abs=1e-12)


@pytest.mark.filterwarnings("ignore:decode table ends")
@pytest.mark.parametrize("group", range(GROUPS))
def test_every_entry(group: int) -> None:
    """At every decision of random episodes, with some outputs in every bucket."""
    rng = np.random.default_rng([11, group])
    for case in range(CASES_PER_GROUP):
        clients = int(rng.integers(1, 40))
        costs = random_costs(rng, clients, dyadic=False)
        requests = random_requests(rng, dyadic=False)
        if case == 0:
            requests = instance(*((5, int(rng.integers(1, 3000))) for _ in range(20)))
        queues = random_queues(rng, requests, clients)
        env = make_env(clients, costs)
        observation, _ = start(env, requests, queues)
        reference = make_reference(requests, clients, costs, queues)
        over = reference.finished()
        while not over:
            assert_observed(env, reference, observation)
            assert_viewed(env, reference)
            action = random_legal_action(env, rng)
            observation, _, over, _, _ = env.step(np.int64(action))
            reference.step(action)
        assert_observed(env, reference, observation)


# ---- by hand ---------------------------------------------------------------------------------


def seen(env: ServingEnv, observation: np.ndarray) -> dict[str, float]:
    """Entries by name, without the zeros."""
    pairs = zip(env.features, observation, strict=True)
    return {name: round(float(value), 6) for name, value in pairs if value != 0}


def test_by_hand() -> None:
    """Four clients, five requests of 3, 3, 5, 9 and 1 rounds; at 5 s two have finished.

    Left are 2 and 6 rounds; request 4 waits with one round. A stage takes 2 s, all of it fixed, a
    round 1 s; nothing is charged for cached tokens.
    """
    env = make_env(4)
    start(env, instance((5, 4), (5, 4), (5, 6), (5, 10), (5, 2)))
    observation, *_ = env.step(np.int64(5))
    logs = {1: round(1 / 14, 6), 2: round(1.5 / 14, 6), 6: round(2.75 / 14, 6)}
    assert seen(env, observation) == {
        "active clients / clients": 0.5,
        "clients a stage could fill now / clients": 0.25,
        "waiting / arrived": 0.2,
        "waiting per client, log-scaled": round(0.25 / 8, 6),
        "finished / arrived": 0.4,
        "expected rounds waiting / rounds of all arrived": round(1 / 21, 6),
        "expected rounds running / rounds of all arrived": round(8 / 21, 6),
        "stage seconds / (stage + seconds until the next finish)": 0.5,
        # two idle clients for two rounds, against two active ones for 2 s
        "idle time until the next finish against the fixed cost of a stage, a / (a + b)": 0.5,
        "both idle times against the whole cost of a stage, a / (a + b)": 0.5,
        "fixed share of a stage that fills the idle clients": 1.0,
        "stage seconds / (stage + decode round seconds)": round(2 / 3, 6),
        "longest waiting, log-scaled rounds": logs[1],
        "median waiting, log-scaled rounds": logs[1],
        "shortest waiting, log-scaled rounds": logs[1],
        **{f"rounds until {s:.0%} of clients are done, log-scaled": logs[2] for s in SHARES[:-1]},
        "rounds until 100% of clients are done, log-scaled": logs[6],
        "running with ≥ 2 rounds left / clients, in this bucket": 0.25,
        "running with ≥ 4 rounds left / clients, in this bucket": 0.25,
        "waiting with ≥ 0 rounds / waiting, in this bucket": 1.0,
        # a stage is worth 4 client-rounds: two rounds of two idle clients, four of three
        "idle / clients once idling on costs 0.25 stages": 0.5,
        "idle / clients once idling on costs 0.5 stages": 0.5,
        "idle / clients once idling on costs 1 stages": 0.75,
        "idle / clients once idling on costs 2 stages": 0.75,
        "idle / clients once idling on costs 4 stages": 1.0,
        "rounds until idling on costs 0.25 stages, log-scaled": round(0.5 / 14, 6),
        "rounds until idling on costs 0.5 stages, log-scaled": logs[1],
        "rounds until idling on costs 1 stages, log-scaled": logs[2],
        "rounds until idling on costs 2 stages, log-scaled": round(log_rounds(2 + 4 / 3), 6),
        "rounds until idling on costs 4 stages, log-scaled": logs[6],
    }


def test_names_are_unique() -> None:
    assert len(set(FEATURES)) == len(FEATURES)


def test_fixed_part_of_a_stage() -> None:
    """Three idle clients, prompts 4, 4 and 8: 16 tokens, Σp² = 96."""
    line = AffinePrefill(0.5, 0.25, 1 / 64, floor=1.0)
    levels = LevelledPrefill((8, 32), (1.0, 2.0))
    cases: list[tuple[AffinePrefill | LevelledPrefill, float, float]] = [
        (line, 0.5 + 4.0 + 1.5, 0.5),
        (AffinePrefill(0.5, 0.25, 0.0, floor=10.0), 10.0, 6.0),  # the floor explains the rest
        (levels, 2.0, 1.0),  # 16 tokens at the rate of the best level, 1/16 s each
    ]
    for prefill, stage_s, fixed_s in cases:
        env = make_env(3, StageCosts(UNIT_COSTS.decode, prefill))
        start(env, instance((4, 2), (4, 2), (8, 2)))
        assert (env.view().prefill_s, env.view().prefill_fixed_s) == (stage_s, fixed_s)


def test_a_stage_of_many_of_the_longest_prompts() -> None:
    """1,000 prompts of 10 million tokens: Σp² is 1e17, as many are admitted as wait."""
    n, most = 1000, 10**7
    env = make_env(n, StageCosts(UNIT_COSTS.decode, AffinePrefill(0.0, 0.0, 1e-9)))
    start(env, instance(*[(most, 2)] * n))
    assert env.view().prefill_s == pytest.approx(n * 1e-9 * most**2)


def test_the_docstring_tabulates_every_entry() -> None:
    text = ServingEnv.__doc__ or ""
    for entry, name in enumerate(FEATURES[:17]):
        assert f"| {entry} | {name} |" in text
    assert f"``Box(0, 1, ({len(FEATURES)},), float32)``" in text
    assert "begin at " + ", ".join(str(low) for low in BUCKETS) in text
    assert ", ".join(f"{share:.0%}" for share in SHARES) in text
    assert f"… {len(FEATURES) - 1} | rounds until then, log-scaled |" in text
