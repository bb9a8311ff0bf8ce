"""The largest and the smallest numbers: nothing wraps, bounds hold, limits are named."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from servegym.baselines.calendar.planner import plan_jointly
from servegym.baselines.rules.plans import plan_at_risk
from servegym.envs import Requests, ServegymError, ServingEnv, load_task, make_requests
from servegym.envs.bounds.batch import dual_vertices, lower_bound, lower_hull
from servegym.envs.bounds.padding import least_padding
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    CostTables,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.playing.evaluation import brief
from servegym.envs.simulator.seconds import decode_seconds, prefill_seconds
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.estimates import noisy, scaled
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.workload.requests import MAX_ARRIVAL_S, MAX_REQUESTS, MAX_TOKENS
from servegym.envs.workload.sources import make_workload
from tests.helpers import UNIT_COSTS, instance, make_env, start

# ---- products beyond 64 bits ----------------------------------------------------------------


def longest(requests: int) -> Requests:
    return make_requests(np.full(requests, MAX_TOKENS), np.full(requests, MAX_TOKENS))


def test_rounds_times_cached_tokens_do_not_wrap() -> None:
    # 100,000 clients with the longest request each: one stage of a second a token, then all decode.
    clients, rounds = 100_000, MAX_TOKENS - 1
    costs = StageCosts(AffineDecode(1.0, per_kv_token=1e-9), AffinePrefill(0.0, 1.0))
    env = make_env(clients, costs, rules=("fcfs",))
    start(env, longest(clients))
    info = env.step(np.int64(0))[4]
    cached = clients * (rounds * MAX_TOKENS + rounds * (rounds + 1) // 2)
    assert info["makespan_s"] == clients * MAX_TOKENS + rounds + 1e-9 * cached == 1015009998499.0
    assert info["gap"] == 0.0


@pytest.mark.parametrize("active", [1, 200, 1_000_000])
@pytest.mark.parametrize("prompt", [1, MAX_TOKENS])
@pytest.mark.parametrize("rounds", [1, 1000, MAX_TOKENS - 1])
def test_decode_time_of_any_instance(active: int, prompt: int, rounds: int) -> None:
    decode = AffineDecode(1.0, per_kv_token=1.0, per_client_kv_token=2.0)
    costs = StageCosts(decode, AffinePrefill(1.0, 0.0)).tables(active)
    cached = rounds * active * (prompt + 1) + active * rounds * (rounds - 1) // 2
    seconds = decode_seconds(costs, 0, active, active * (prompt + 1), rounds)
    assert seconds == pytest.approx(float(Fraction(rounds + (1 + 2 * active) * cached)), rel=1e-15)


def test_squares_and_mean_tokens_of_the_waiting_do_not_wrap() -> None:
    # 200,000 longest prompts wait: Σp² = 2·10¹⁹; Σp · idle clients = 4·10²².
    n = 200_000
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.0, 1e-3, 1e-9))
    env = make_env(n // 2, costs, rules=("fcfs", "longest"))
    start(env, longest(n))
    tokens = n // 2 * MAX_TOKENS
    expected_s = 1e-3 * tokens + 1e-9 * (n // 2) * MAX_TOKENS**2
    assert env.view().prefill_s == pytest.approx(expected_s, rel=1e-14)


def test_squares_of_small_prompts_stay_exact_beside_large_ones() -> None:
    # The squares of 100,000 longest prompts come and go; what is left waiting has prompts of 3 tokens.
    n = 100_000
    prompts = np.r_[np.full(n, MAX_TOKENS), [3, 3]]
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(1.0, 0.0, 1e-9))
    env = make_env(n, costs, rules=("fcfs", "longest"))
    start(env, make_requests(prompts, np.r_[np.full(n - 1, 3), [2, 2, 2]]))
    env.step(np.int64(1))  # all of the long prompts; one of them finishes after a round
    assert (env.view().waiting, env.view().idle) == (2, 1)
    assert env.view().prefill_s == 1.0 + 9e-9


def padding_by_hand(lengths: list[int], counts: list[int], clusters: int) -> int:
    """Least padding of sorted lengths in so many clusters, by dynamic programming in Python's integers."""
    least: list[float | int] = [0] + [float("inf")] * len(lengths)
    for _ in range(clusters):
        then = least[:]
        for last in range(1, len(lengths) + 1):
            cost = 0
            for first in range(last - 1, -1, -1):
                cost += counts[first] * (lengths[last - 1] - lengths[first])
                then[last] = min(then[last], least[first] + cost)
        least = then
    return int(least[-1])


@pytest.mark.parametrize("clusters", [1, 2, 7, 29])
@pytest.mark.parametrize("seed", range(4))
def test_padding_of_the_largest_instance(seed: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.unique(rng.integers(1, MAX_TOKENS, 30))
    counts = rng.multinomial(MAX_REQUESTS - len(lengths), rng.dirichlet(np.ones(len(lengths)))) + 1
    by_hand = padding_by_hand(lengths.tolist(), counts.tolist(), clusters)
    assert least_padding(lengths, counts, clusters) == by_hand


def test_a_plan_at_risk_of_the_longest_lengths() -> None:
    requests = make_requests([1, 1], [9, 9], predicted_output_tokens=[MAX_TOKENS, 5])
    requests = Requests(**vars(requests))
    task = TaskConfig("test", cluster=ClusterConfig(clients=2), cost=UNIT_COSTS)
    case = bound_case(lower(task), requests)
    briefing = brief(task, case, seed=0)
    assert plan_at_risk(requests.as_predicted(), briefing, deviations=100.0).clients == 2


# ---- bounds that hold -----------------------------------------------------------------------


def exact_hull(x: list[int], y: list[float]) -> list[int]:
    """The lower convex hull in rational numbers."""
    hull: list[int] = []
    for place in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2:]
            rise_b, rise = Fraction(y[b]) - Fraction(y[a]), Fraction(y[place]) - Fraction(y[a])
            if rise_b * (x[place] - x[a]) < rise * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(place)
    return hull


def excess(cost: NDArray[np.float64], *, exact: bool) -> Fraction:
    """The most, relative to the cost, that a vertex of the dual claims beyond it; in rational numbers."""
    vertices = dual_vertices(cost, np.arange(1.0, len(cost) + 1.0), exact=exact)
    return max(
        (n * Fraction(u) + Fraction(v)) / Fraction(seconds) - 1
        for u, v in vertices.tolist()
        for n, seconds in enumerate(cost.tolist(), 1)
    )


seconds = st.floats(1e-9, 1e3)


@given(
    base=seconds,
    slope=st.one_of(st.just(0.0), st.floats(1e-15, 1e3)),
    clients=st.integers(1, 80),
    bends=st.lists(st.floats(-1e-12, 1e-12), max_size=4),
    exact=st.booleans(),
)
def test_corners_of_a_nearly_straight_line(
    base: float, slope: float, clients: int, bends: list[float], exact: bool
) -> None:
    n = np.arange(1.0, clients + 1.0)
    cost = base + slope * n
    for k, bend in enumerate(bends):
        cost[k * clients // 5 :] *= 1.0 + bend
    places = lower_hull(n, cost).tolist()
    assert places == exact_hull(list(range(clients)), cost.tolist())
    assert excess(cost, exact=exact) <= 1e-13


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=12), st.booleans())
def test_no_vertex_claims_more_than_a_round_costs(costs: list[float], exact: bool) -> None:
    assert excess(np.array(costs), exact=exact) <= 1e-13


def tables_of(rng: np.random.Generator, clients: int) -> CostTables:
    """A random decode cost, mostly a straight line or nearly one, from 1 ns to 10 s."""
    base, slope = 10 ** rng.uniform(-9, 1), rng.choice([0, 10 ** rng.uniform(-12, 1)])
    decode: AffineDecode | TableDecode = AffineDecode(
        base, slope, float(rng.choice([0, 10 ** rng.uniform(-12, -5)]))
    )
    if rng.random() < 0.3:
        batch = np.unique(np.r_[1, clients, rng.integers(1, clients + 1, 8)])
        noise = 1.0 + rng.choice([0, 1e-15, 1e-12, 0.3]) * rng.uniform(-1, 1, len(batch))
        times = (base + slope * batch) * noise
        decode = TableDecode(tuple(batch.tolist()), tuple(times.tolist()))
    prefill = AffinePrefill(10 ** rng.uniform(-6, 0), 10 ** rng.uniform(-9, -3))
    return StageCosts(decode, prefill).tables(clients)


@pytest.mark.parametrize("most", [10**3] * 6 + [10**6])
def test_the_bound_is_not_above_a_schedule(most: int) -> None:
    """One stage, then all requests decode together: for a straight line no schedule is faster."""
    rng = np.random.default_rng([most, 10])
    for _ in range(30 if most < 10**4 else 5):
        clients = most if most > 10**4 else int(np.exp(rng.uniform(0, np.log(most))))
        costs = tables_of(rng, clients)
        held, rounds = int(rng.choice([1, clients, clients])), int(rng.choice([1, 10, 99_999]))
        requests = make_requests(np.full(held, 5), np.full(held, rounds + 1))
        bound_s = lower_bound(requests, clients, costs).seconds
        makespan_s = prefill_seconds(costs, 0, 5 * held, 25.0 * held, held)
        makespan_s += decode_seconds(costs, 0, held, 6 * held, rounds)
        assert bound_s <= makespan_s * (1 + 1e-12)
        line = costs.decode_base_s[0, 1:]
        if held == clients and np.abs(np.diff(line, 2)).max(initial=0.0) <= 1e-12 * line.max():
            assert bound_s >= makespan_s * (1 - 1e-10)


# ---- limits at the door ---------------------------------------------------------------------

TOO_LATE = np.nextafter(MAX_ARRIVAL_S, np.inf)

REFUSED: list[tuple[str, Callable[[], Any], str, Callable[[], Any]]] = [
    (
        "an arrival after the last",
        lambda: make_requests([1], [1], [TOO_LATE]),
        r"at most 1e\+09 seconds, got 1000000000\.0000001 for request 0",
        lambda: make_requests([1], [1], [MAX_ARRIVAL_S]),
    ),
    (
        "more tokens than 64 bits hold",
        lambda: make_requests([1e300], [1]),
        r"prompt_tokens must lie in 1 … 10000000, got 1e\+300",
        lambda: make_requests([1e7], [1]),
    ),
    (
        "infinitely many tokens",
        lambda: make_requests([1], [np.inf]),
        r"output_tokens must lie in 1 … 10000000, got inf",
        lambda: make_requests([1], [2.0]),
    ),
    (
        "a rate too low for its requests",
        lambda: WorkloadConfig(requests=1000, arrival_rate_per_s=1.3e-6),
        r"0 or lie in 1\.367e-06 … 1e\+09 for 1000 requests",
        lambda: WorkloadConfig(requests=1000, arrival_rate_per_s=1.367e-6),
    ),
    (
        "a rate that is no rate",
        lambda: make_workload("tiny", 5, 5e-324, np.random.default_rng(0)),
        r"arrival_rate_per_s must be 0 or lie in 7\.8e-08",
        lambda: make_workload("tiny", 5, 7.8e-8, np.random.default_rng(0)),
    ),
    (
        "rounds that a late clock does not see",
        lambda: started(AffineDecode(1e-9), MAX_ARRIVAL_S),
        r"stages of 1e-09 s would not advance a clock that shows 1e\+09 s.*steps of 1\.19e-07 s",
        lambda: started(AffineDecode(1.2e-7), MAX_ARRIVAL_S),
    ),
    (
        "rounds that vanish beside a stage",
        lambda: started(AffineDecode(1e-30), 0.0),
        "stages of 1e-30 s would not advance",
        lambda: started(AffineDecode(1e-15), 0.0),
    ),
    (
        "lengths a million times as long",
        lambda: scaled(longest(2), 1e308),
        "a factor of lengths must be > 0 and ≤ 10000000",
        lambda: scaled(longest(2), 1e7),
    ),
    (
        "an error beyond all lengths",
        lambda: noisy(longest(2), 1e200, np.random.default_rng(0)),
        "a deviation must be ≥ 0 and ≤ 5",
        lambda: noisy(longest(2), 5.0, np.random.default_rng(0)),
    ),
    (
        "a joint plan whose energies wrap",
        lambda: plan_jointly(longest(30_000), 20_000, UNIT_COSTS.tables(20_000), moves=0),
        "a joint plan can do 23058 requests of up to 9999999 decode rounds, got 30000",
        lambda: plan_jointly(longest(3), 2, UNIT_COSTS.tables(2), moves=0),
    ),
]


def started(decode: AffineDecode, arrival_s: float) -> ServingEnv:
    env = make_env(2, StageCosts(decode, AffinePrefill(1.0, 0.0)))
    start(env, instance((1, 3, arrival_s)))
    return env


@pytest.mark.parametrize(
    ("bad", "words", "legal"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
@pytest.mark.filterwarnings("error")
def test_refused_with_its_limit(
    bad: Callable[[], Any], words: str, legal: Callable[[], Any]
) -> None:
    with pytest.raises(ServegymError, match=words):
        bad()
    legal()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[workload]\nrequests = 5\narrival_rate_per_s = 5e-324\n", 3),
        ("[workload]\narrival_rate_per_s = 1e-9\nrequests = 5\n", 2),
        ('[workload]\nsource = "tiny"\n\narrival_rate_per_s = 1e-7\n', 4),
    ],
)
def test_a_rate_too_low_is_named_with_its_line(
    write: Callable[[str, str], Path], text: str, line: int
) -> None:
    path = write("slow.toml", text)
    with pytest.raises(ServegymError, match=f"line {line}: workload.arrival_rate_per_s must be 0"):
        load_task(str(path))


def test_a_low_rate_may_stand_before_its_few_requests(write: Callable[[str, str], Path]) -> None:
    path = write("slow.toml", "[workload]\narrival_rate_per_s = 1e-7\nrequests = 5\n")
    env = ServingEnv(str(path))
    for seed in range(20):
        env.reset(seed=seed)
        assert env.records().arrival_s[-1] <= MAX_ARRIVAL_S


@pytest.mark.parametrize("largest", [1e9, 1e-30])
def test_the_extreme_costs_give_finite_numbers(largest: float) -> None:
    """A million clients would only add six digits: everything stays far from what a float can hold."""
    decode = AffineDecode(largest, largest, largest)
    for prefill in (
        AffinePrefill(largest, largest, largest, largest),
        LevelledPrefill((MAX_TOKENS, 10**15), (largest, largest)),
    ):
        env = make_env(3, StageCosts(decode, prefill))
        start(env, longest(7))
        over, total = False, 0.0
        while not over:
            action = np.int64(np.flatnonzero(env.action_masks())[-1])
            observation, reward, over, _, info = env.step(action)
            assert np.isfinite(observation).all()
            total += float(reward)
        assert total == pytest.approx(-100 * info["gap"], abs=1e-9)
        without = {"gap_between_tokens_p50_s", "gap_between_tokens_p99_s", "preempted_slowdown"}
        assert np.isfinite([info[name] for name in info.keys() - without]).all()
