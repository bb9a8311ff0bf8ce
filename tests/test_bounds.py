"""The lower bound against exhaustive search, and each of its parts by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from servegym.envs import Requests, ServegymError, make_requests
from servegym.envs.bounds.batch import LowerBound, decode_bound, lower_bound, prefill_bound
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.bounds.totals import totals_of
from servegym.envs.machine.costs import (
    RATES,
    AffineDecode,
    AffinePrefill,
    CostTables,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from tests.helpers import UNIT_COSTS, instance, random_costs
from tests.reference_simulator import optimal_makespan

GROUPS = 16
CASES_PER_GROUP = 25


def bound_of(
    requests: Requests, clients: int, costs: StageCosts, max_prefill_tokens: int = 0
) -> LowerBound:
    """The bound of an instance, its costs lowered to tables."""
    return lower_bound(requests, clients, costs.tables(clients), max_prefill_tokens)


# ---- against exhaustive search ---------------------------------------------------------------


def random_case(rng: np.random.Generator) -> tuple[Requests, int, StageCosts, int]:
    """Up to four requests on up to three clients: every schedule can be tried."""
    clients = int(rng.integers(1, 4))
    n = int(rng.integers(1, 5))
    arrivals = np.where(rng.random(n) < rng.random(), 0.0, rng.uniform(0, 8, n))
    requests = make_requests(rng.integers(1, 30, n), rng.integers(1, 5, n), arrivals)
    costs = random_costs(rng, clients, dyadic=False)
    if rng.random() < 0.4:  # a table with a dip, or a mountain
        table = TableDecode(tuple(range(1, clients + 1)), tuple(rng.uniform(0.1, 2, clients)), 0.01)
        costs = replace(costs, decode=table)
    return requests, clients, costs, int(rng.choice([0, 0, 10, 30]))


@pytest.mark.filterwarnings("ignore:decode table ends")
@pytest.mark.parametrize("group", range(GROUPS))
def test_bound_is_at_most_the_optimum(group: int) -> None:
    rng = np.random.default_rng([77, group])
    for _ in range(CASES_PER_GROUP):
        requests, clients, costs, budget = random_case(rng)
        bound = bound_of(requests, clients, costs, budget).seconds
        optimum = optimal_makespan(requests, clients, costs, budget)
        assert 0 < bound <= optimum * (1 + 1e-12)


LINE = StageCosts(AffineDecode(1.0, 0.5, 0.01), AffinePrefill(2.0, 0.1, 0.01))
FLOOR = StageCosts(AffineDecode(1.0), AffinePrefill(0.0, 0.01, floor=2.0))
LEVELS = StageCosts(AffineDecode(1.0), LevelledPrefill((4, 8), (1.0, 1.5)))
DIP = StageCosts(TableDecode((1, 2, 3), (4.0, 1.0, 3.0)), AffinePrefill(2.0, 0.0))

TIGHT = [
    # one request, whatever the model
    (instance((7, 5)), 1, LINE, 0),
    (instance((8, 5)), 1, LEVELS, 0),
    # … on more clients than it needs, and without a round
    (instance((7, 5)), 3, LINE, 0),
    (instance((7, 1)), 3, LINE, 0),
    # … that arrives late
    (instance((7, 5, 3.25)), 2, LINE, 0),
    # as many equal requests as clients: one stage, full rounds
    (instance((7, 4), (7, 4), (7, 4)), 3, LINE, 0),
    # twice as many
    (instance((7, 2), (7, 2), (7, 2), (7, 2)), 2, LINE, 0),
    # one client: the sum of everything
    (instance((7, 2), (3, 4), (5, 1)), 1, LINE, 0),
    # stages so short that the floor holds
    (instance((7, 2), (3, 2), (5, 2)), 1, FLOOR, 0),
    # levels that are filled exactly, each alone or both together
    (instance((8, 2), (4, 2)), 1, LEVELS, 0),
    (instance((4, 2), (4, 2)), 2, LEVELS, 0),
    # whole top levels
    (instance((24, 2)), 1, LEVELS, 0),
    # a dip: two at once are faster than one
    (instance((7, 4), (7, 4)), 2, DIP, 0),
    # pigeonhole: three equal requests on two clients take two turns, more than the area of 1.5
    (instance((7, 4), (7, 4), (7, 4)), 2, UNIT_COSTS, 0),
    # a token budget that makes a stage for each
    (instance((6, 2), (6, 2)), 1, UNIT_COSTS, 10),
    (instance((6, 1), (10, 1), (4, 1)), 3, UNIT_COSTS, 10),
    # the later of two requests decides
    (instance((7, 1), (7, 3, 50.0)), 2, LINE, 0),
]


@pytest.mark.parametrize(("requests", "clients", "costs", "budget"), TIGHT)
def test_bound_is_the_optimum(
    requests: Requests, clients: int, costs: StageCosts, budget: int
) -> None:
    bound = bound_of(requests, clients, costs, budget).seconds
    assert bound == pytest.approx(optimal_makespan(requests, clients, costs, budget), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e9])
def test_bound_scales_with_the_costs(scale: float) -> None:
    """No tolerance of the solver enters, however small or large the seconds are."""
    requests = instance((7, 9), (3, 5), (12, 7), (5, 2), (9, 4), (6, 6))
    levels = (0.3, 0.55, 0.9)
    seconds = []
    for factor in (1.0, scale):
        decode = TableDecode((1, 2, 3), (0.5 * factor, 0.9 * factor, 0.8 * factor))
        prefill = LevelledPrefill((5, 11, 17), tuple(level * factor for level in levels))
        seconds.append(bound_of(requests, 3, StageCosts(decode, prefill)).seconds)
    assert seconds[1] == pytest.approx(seconds[0] * scale, rel=1e-9)


# ---- each part by hand -----------------------------------------------------------------------

# Rounds of the requests, clients, b(1), b(2), …; least rounds and seconds of decoding.
DECODE_PARTS = [
    # constant: the rounds count, ⌈3/2⌉ of them
    ((2, 1), 2, (1.0, 1.0), 2, 2.0),
    # full rounds are cheaper a token: one with two, one with one
    ((2, 1), 2, (2.0, 3.0), 2, 5.0),
    ((2, 2), 2, (2.0, 3.0), 2, 6.0),
    # one at a time is cheaper a token than two: the program runs them one after another
    ((2, 2), 2, (1.0, 3.0), 2, 4.0),
    # the longest request decides the number of rounds: 5 rounds hold 6 tokens, one with two
    ((5, 1), 2, (1.0, 1.5), 5, 5.5),
    # pigeonhole: three of 2 on two clients take 4 rounds; 6 tokens in them, two with two
    ((2, 2, 2), 2, (1.0, 1.5), 4, 5.0),
    # nothing to decode
    ((0, 0), 2, (1.0, 1.5), 0, 0.0),
]


@pytest.mark.parametrize(("rounds", "clients", "times", "least", "seconds"), DECODE_PARTS)
def test_decode_part(
    rounds: tuple[int, ...], clients: int, times: tuple[float, ...], least: int, seconds: float
) -> None:
    table = TableDecode(tuple(range(1, clients + 1)), times)
    requests = instance(*((5, 1 + count) for count in rounds))
    bound = bound_of(requests, clients, StageCosts(table, AffinePrefill(2.0, 0.0)))
    assert bound.decode_rounds == least
    assert bound.decode_s == pytest.approx(seconds, rel=1e-12, abs=1e-12)


def test_cache_part() -> None:
    """Prompts 3 and 5, rounds 2 and 3: the cache is 4 + 5, and 6 + 7 + 8, in any schedule."""
    costs = StageCosts(AffineDecode(1.0, 0.0, 0.125), AffinePrefill(2.0, 0.0))
    bound = bound_of(instance((3, 3), (5, 4)), 2, costs)
    assert bound.decode_s == pytest.approx(3 * 1.0 + 30 * 0.125)


# Prompts, clients, token budget; least stages.
STAGES = [
    ((1, 1, 1), 3, 0, 1),
    ((1, 1, 1, 1), 3, 0, 2),
    ((1, 1, 1), 1, 0, 3),
    ((4, 4, 2), 3, 10, 1),  # exactly full
    ((4, 4, 3), 3, 10, 2),
    ((99, 1), 2, 10, 2),  # a prompt beyond the budget has a stage for itself: 10 + 1
    ((99, 99, 99), 3, 10, 3),
    ((1, 1, 1, 1), 2, 100, 2),  # the clients decide
]


@pytest.mark.parametrize(("prompts", "clients", "budget", "stages"), STAGES)
def test_least_stages(prompts: tuple[int, ...], clients: int, budget: int, stages: int) -> None:
    requests = instance(*((prompt, 2) for prompt in prompts))
    bound = bound_of(requests, clients, UNIT_COSTS, budget)
    assert bound.prefill_stages == stages
    assert bound.prefill_s == 2.0 * stages


# Prompts, clients; seconds of prefilling.
AFFINE_PARTS = [
    ((8,), 1, 0.5 + 8 * 0.125 + 64 / 1024),
    ((8, 4), 2, 0.5 + 12 * 0.125 + 80 / 1024),
    ((8, 4), 1, 2 * 0.5 + 12 * 0.125 + 80 / 1024),
    ((1, 1, 1), 1, 3 * 1.0),  # the floor of each: 3 > 1.5 + 3/8 + 3/1024
]


@pytest.mark.parametrize(("prompts", "clients", "seconds"), AFFINE_PARTS)
def test_affine_prefill_part(prompts: tuple[int, ...], clients: int, seconds: float) -> None:
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.5, 0.125, 1 / 1024, floor=1.0))
    requests = instance(*((prompt, 2) for prompt in prompts))
    assert bound_of(requests, clients, costs).prefill_s == pytest.approx(seconds)


# Levels of 4 tokens (1 s) and 8 tokens (1.5 s). Prompts, clients; seconds.
LEVELLED_PARTS = [
    ((4,), 1, 1.0),
    ((12,), 1, 2.25),  # one and a half top levels; the stage itself would take 2.5 s
    ((6, 6), 1, 2.5),  # two stages: one of each level holds 12 tokens
    ((2, 2), 1, 2.0),  # two stages, two small levels
    ((2, 2), 2, 1.0),
    ((16,), 1, 3.0),
]


@pytest.mark.parametrize(("prompts", "clients", "seconds"), LEVELLED_PARTS)
def test_levelled_prefill_part(prompts: tuple[int, ...], clients: int, seconds: float) -> None:
    requests = instance(*((prompt, 2) for prompt in prompts))
    assert bound_of(requests, clients, LEVELS).prefill_s == pytest.approx(seconds, rel=1e-12)


def test_overhead_part() -> None:
    """Three requests in two stages: 2 · 0.25 + 3 · 0.5; rounds of 1 + 0.25 + n · 0.5."""
    costs = replace(UNIT_COSTS, engine_overhead=EngineOverhead(0.25, 0.5))
    bound = bound_of(instance((5, 2), (5, 2), (5, 2)), 2, costs)
    assert bound.prefill_s == pytest.approx(2 * 2.0 + 2 * 0.25 + 3 * 0.5)
    assert bound.decode_s == pytest.approx(2.25 + 1.75)


def test_parts_add_up() -> None:
    bound = bound_of(instance((7, 2), (3, 4), (5, 1)), 2, LINE)
    assert bound.seconds == bound.release_s + bound.decode_s + bound.prefill_s
    assert bound.decode_share == bound.decode_s / (bound.decode_s + bound.prefill_s)


def test_release_part() -> None:
    """From 10 s on one request of 3 rounds remains: 10 + 2 + 3. All of them: 0 + 2 · 2 + 4 < 15."""
    bound = bound_of(instance((5, 2), (5, 2), (5, 4, 10.0)), 2, UNIT_COSTS)
    assert (bound.release_s, bound.seconds) == (10.0, 15.0)
    early = bound_of(instance((5, 2), (5, 2), (5, 4, 0.5)), 2, UNIT_COSTS)
    assert (early.release_s, early.seconds) == (0.0, 4.0 + 3.0)


def test_a_late_request_may_share_its_rounds_with_an_earlier_one() -> None:
    """Rounds of two take 1 s, of one 4 s. The late request's only round may be shared: 1 s."""
    costs = StageCosts(TableDecode((1, 2), (4.0, 1.0)), AffinePrefill(2.0, 0.0))
    late = bound_of(instance((5, 2), (5, 2, 100.0)), 2, costs)
    assert (late.release_s, late.decode_s) == (100.0, 1.0)


DIPS = [
    ((1,), 4.0),  # one round with one client
    ((2, 1), 5.0),  # two rounds, exactly three tokens: one round of each kind
    ((2, 2), 2.0),
]


@pytest.mark.parametrize(("rounds", "seconds"), DIPS)
def test_dip(rounds: tuple[int, ...], seconds: float) -> None:
    """Rounds of one take 4 s, of two 1 s; without arrivals no other request can share them."""
    costs = StageCosts(TableDecode((1, 2), (4.0, 1.0)), AffinePrefill(2.0, 0.0))
    requests = instance(*((5, 1 + count) for count in rounds))
    assert bound_of(requests, 2, costs).decode_s == pytest.approx(seconds)


def test_many_arrivals(rng: np.random.Generator) -> None:
    """Of many arrivals only some are tried, the first and the last among them; the bound still holds."""
    arrivals = np.sort(rng.uniform(0, 200, 100))
    requests = make_requests(rng.integers(1, 9, 100), rng.integers(1, 9, 100), arrivals)
    bound = bound_of(requests, 4, UNIT_COSTS)
    assert bound.release_s in arrivals
    assert bound.seconds >= arrivals[-1] + 2.0 + (requests.output_tokens[-1] - 1)


def test_the_largest_workload_of_the_longest_requests() -> None:
    """100,000 requests of 10 million tokens each way, alike: the cache part alone is known."""
    most, n = 10**7, 100_000
    costs = StageCosts(AffineDecode(1.0, 0.0, 1e-9), AffinePrefill(2.0, 0.0))
    bound = bound_of(make_requests(np.full(n, most), np.full(n, most)), 1, costs)
    rounds = most - 1
    expected = n * (rounds + 1e-9 * (rounds * most + rounds * (rounds + 1) / 2))
    assert bound.decode_s == pytest.approx(expected)


# ---- rounds of the busiest client ------------------------------------------------------------

ROUNDS = [
    ((), 3, 0),
    ((0, 0), 1, 0),
    ((5,), 3, 5),  # the longest
    ((3, 3, 3), 3, 3),
    ((3, 3, 3), 2, 6),  # pigeonhole: two of them on one client
    ((4, 3, 3), 2, 6),  # … and these are at least the two shortest
    ((4, 4, 4, 1, 1), 3, 5),  # area 14/3; pigeonhole 4 + 1
    ((9, 1, 1), 2, 9),
    ((2, 2, 2, 2, 2), 2, 6),  # k = 2: five requests, three on one client
]


@pytest.mark.parametrize(("rounds", "clients", "expected"), ROUNDS)
def test_rounds_lower_bound(rounds: tuple[int, ...], clients: int, expected: int) -> None:
    assert rounds_lower_bound(np.array(rounds, dtype=np.int64), clients) == expected


def test_rounds_lower_bound_is_at_most_the_best_plan(rng: np.random.Generator) -> None:
    for _ in range(100):
        clients = int(rng.integers(1, 4))
        rounds = rng.integers(0, 12, int(rng.integers(1, 7)))
        best = min(
            max(sum(rounds[np.array(plan) == client]) for client in range(clients))
            for plan in itertools.product(range(clients), repeat=len(rounds))
        )
        assert rounds_lower_bound(rounds, clients) <= best


def test_rounds_lower_bound_refuses_nonsense() -> None:
    with pytest.raises(ServegymError, match="clients must be ≥ 1, got 0"):
        rounds_lower_bound(np.array([1]), 0)
    with pytest.raises(ServegymError, match="rounds must be ≥ 0, got -1"):
        rounds_lower_bound(np.array([3, -1]), 1)
    assert rounds_lower_bound(np.array([3, 0]), 1) == 3


FREE = np.zeros(1, RATES).view(np.recarray)
NO_LEVELS = np.zeros((1, 0), np.int64)


@pytest.mark.parametrize("exact", [True, False])
def test_the_linear_programs_are_solved_as_highs_solves_them(
    rng: np.random.Generator, exact: bool
) -> None:
    """Random costs with dips, concave, convex and flat parts, tight and slack counts.

    ``exact``: rounds give exactly the work; otherwise levels hold at least the tokens.
    """
    for _ in range(300):
        n = int(rng.integers(1, 12))
        cost = rng.choice([1.0, 2.0, 3.0, 5.0], n) + rng.choice([0.0, 1.0]) * rng.random(n)
        size = np.cumsum(rng.integers(1, 4, n)).astype(float)
        count = int(rng.integers(1, 9))
        # A total that some mix of at least so many columns can hold.
        total = float(rng.choice(size, count + int(rng.integers(0, 4))).sum())
        rows, sides = -np.stack([np.ones(n), size]), np.array([-float(count), -total])
        if exact:
            solved = linprog(cost, rows[:1], sides[:1], -rows[1:], -sides[1:], method="highs")
        else:
            solved = linprog(cost, rows, sides, method="highs")
        work, places = np.array([int(total)]), size.astype(int)
        if exact:
            rounds_s = np.full(places[-1] + 1, 1e6)  # sizes between the columns are never worth it
            rounds_s[places] = cost
            tables = CostTables(rounds_s[None], FREE, NO_LEVELS, np.zeros((1, 0)))
            seconds = decode_bound(totals_of(work, work), count, tables, alone=True)
        else:
            tables = CostTables(np.ones((1, 2)), FREE, places[None], cost[None])
            seconds = prefill_bound(totals_of(work, work), count, tables)
        assert seconds == pytest.approx(solved.fun, rel=1e-9)
