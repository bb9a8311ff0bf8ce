"""Plans over clients that differ in speed or memory: hand-solved, against brute force, equal where alike."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servegym.baselines.planning.milp import FORMULATIONS, solve_mip
from servegym.baselines.planning.planner import (
    SMALL_CELLS,
    SOLVERS,
    CertifiedPlan,
    plan_offline,
    rebalanced_plan,
)
from servegym.baselines.planning.sampled import mean_largest_load, plan_by_samples
from servegym.baselines.planning.servers import Servers, most_rounds
from servegym.baselines.planning.span_bound import span_lower_bound
from servegym.envs import make_requests
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.machine.layout import UNLIMITED_TOKENS, Fleet
from servegym.envs.simulator.heap import NO_CLIENT, deal, deal_by_time
from servegym.envs.workload.plan import Plan
from tests.helpers import refused
from tests.planner_helpers import whole

Whole = NDArray[np.int64]


def fleet(*round_s: float, tokens: int | tuple[int, ...] = UNLIMITED_TOKENS) -> Fleet:
    return Fleet(np.array(round_s), np.broadcast_to(np.array(tokens), len(round_s)))


def queues(plan: Plan) -> list[list[int]]:
    return [plan.queue(client).tolist() for client in range(plan.clients)]


def least_span(rounds: Whole, clients: Fleet, needs: Whole) -> float:
    """The least span of any plan, by trying every assignment; ∞ if some request fits nowhere."""
    best = np.inf
    for each in itertools.product(range(len(clients.round_s)), repeat=len(rounds)):
        client_of = np.array(each, np.int64)
        if (needs <= clients.tokens[client_of]).all():
            loads = np.bincount(client_of, weights=rounds, minlength=len(clients.round_s))
            best = min(best, float((loads * clients.round_s).max()))
    return best


@st.composite
def instances(draw: st.DrawFn) -> tuple[Whole, Fleet, Whole]:
    """At most 3^6 assignments; some client holds every request."""
    n, clients = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    length = st.integers(0, 12) | st.integers(0, 1000)
    rounds = whole(*draw(st.lists(length, min_size=n, max_size=n)))
    needs = whole(*draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)))
    seconds = st.sampled_from([0.25, 0.5, 1.0, 0.1, 0.3, 0.0586])
    round_s = draw(st.lists(seconds, min_size=clients, max_size=clients))
    memory = st.integers(1, 9)
    tokens = draw(st.lists(memory, min_size=clients, max_size=clients))
    tokens[draw(st.integers(0, clients - 1))] = 9
    return rounds, Fleet(np.array(round_s), whole(*tokens)), needs


class TestDealing:
    def test_to_the_client_that_would_end_first(self) -> None:
        """6 ends at 3 s on the fast one; 4 at 4 s on the slow one, not at 5; 3 at 4.5 s, not at 7."""
        rounds, nothing = whole(6, 4, 3), whole(0, 0, 0)
        client_of = deal_by_time(rounds, nothing, np.array([1.0, 0.5]), whole(0, 0))
        assert client_of.tolist() == [1, 0, 1]

    def test_ties_go_to_the_lowest(self) -> None:
        round_s, nothing = np.array([1.0, 0.5, 1.0]), whole(0, 0, 0)
        assert deal_by_time(whole(4, 2, 2), nothing, round_s, nothing).tolist() == [1, 0, 2]

    def test_only_where_it_fits(self) -> None:
        rounds, needs = whole(9, 8, 7, 0, 0), whole(20, 5, 30, 20, 99)
        client_of = deal_by_time(rounds, needs, np.array([0.1, 1.0, 1.0]), whole(10, 20, 30))
        assert client_of.tolist() == [1, 0, 2, 2, NO_CLIENT]

    def test_without_rounds_by_number(self) -> None:
        """8 rounds end at 4 s, 6 at 6 s: one each, so the second client is first, then in turn."""
        rounds, nothing = whole(8, 6, 0, 0, 0), np.zeros(5, np.int64)
        client_of = deal_by_time(rounds, nothing, np.array([1.0, 0.5]), whole(0, 0))
        assert client_of.tolist() == [1, 0, 1, 0, 1]

    @given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 6), st.floats(1e-3, 9.0))
    def test_alike_as_it_was(self, lengths: list[int], clients: int, round_s: float) -> None:
        rounds = whole(*lengths)
        same = deal_by_time(
            rounds, np.ones_like(rounds), np.full(clients, round_s), np.full(clients, 7)
        )
        assert same.tolist() == deal(rounds, clients).tolist()


class TestSpans:
    def test_limits_are_those_of_float_products(self) -> None:
        """3 · 0.1 is above 0.3: the third round is not within 0.3 s."""
        assert 3 * 0.1 > 0.3
        assert most_rounds(np.array([0.1, 0.3, 1e-300]), 0.3)[:2].tolist() == [2, 1]

    @given(st.floats(1e-6, 10.0), st.integers(0, 10**6))
    def test_a_span_is_within_itself(self, round_s: float, rounds: int) -> None:
        servers = Servers(np.array([round_s, 2 * round_s]), whole(0, 0), whole())
        span = servers.span(whole(rounds, 0))
        assert servers.limits(span)[0] == rounds
        assert servers.next_span(span) == span
        if rounds > 0:
            assert servers.limits(servers.before(span))[0] == rounds - 1

    @pytest.mark.parametrize(
        ("rounds", "round_s", "bound"),
        [
            ([6, 6, 6], [1.0, 0.5], 6.0),  # area: 18 rounds at 3 rounds a second
            ([9], [1.0, 0.5], 4.5),  # the longest on the fastest
            (
                [9, 9],
                [1.0, 0.5],
                9.0,
            ),  # within less than 9 s the slow one holds none, the fast one one
            ([7, 1, 1], [1.0, 0.25], 2.0),  # area: 9 rounds at 5 a second, in whole rounds
            ([], [1.0, 0.5], 0.0),
        ],
    )
    def test_bound_by_hand(self, rounds: list[int], round_s: list[float], bound: float) -> None:
        servers = Servers.of(fleet(*round_s), np.ones(len(rounds), np.int64))
        assert span_lower_bound(whole(*rounds), servers) == bound

    def test_memory_raises_the_bound(self) -> None:
        servers = Servers.of(fleet(1.0, 1.0, tokens=(5, 9)), whole(9, 9, 1))
        assert span_lower_bound(whole(4, 4, 1), servers) == 8

    @given(instances())
    def test_the_bound_is_never_above_the_optimum(self, case: tuple[Whole, Fleet, Whole]) -> None:
        rounds, clients, needs = case
        servers = Servers.of(clients, needs)
        best = least_span(rounds, Fleet(servers.round_s, clients.tokens), needs)
        assert span_lower_bound(rounds, servers) <= best

    @given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 6))
    def test_alike_but_for_a_slow_one_it_is_no_less(self, lengths: list[int], clients: int) -> None:
        """A client that is far too slow for anything: the bound is that of the others."""
        rounds = whole(*lengths)
        servers = Servers.of(fleet(*[1.0] * clients, 1e9), np.ones_like(rounds))
        assert span_lower_bound(rounds, servers) == rounds_lower_bound(rounds, clients)


@settings(max_examples=60)
@given(instances())
def test_plans_agree_with_brute_force(case: tuple[Whole, Fleet, Whole]) -> None:
    rounds, clients, needs = case
    certified = plan_offline(rounds, clients, tokens=needs, time_limit_s=20)
    alike = (clients.round_s == clients.round_s[0]).all()
    counted = Fleet(np.ones_like(clients.round_s), clients.tokens) if alike else clients
    assert certified.load == least_span(rounds, counted, needs)
    assert certified.lower_bound > certified.load - 2e-3 * counted.round_s.min()
    assert certified.unit == ("rounds" if alike else "s")
    check_plan(certified, rounds, counted, needs)


def check_plan(certified: CertifiedPlan, rounds: Whole, clients: Fleet, needs: Whole) -> None:
    plan = certified.plan
    assert sorted(plan.order.tolist()) == np.flatnonzero(needs <= clients.tokens.max()).tolist()
    assert (plan.loads(rounds) * clients.round_s).max() == certified.load
    assert certified.lower_bound <= certified.load
    for client, queue in enumerate(queues(plan)):
        assert queue == sorted(queue, key=lambda i: (-rounds[i], i))
        assert (needs[queue] <= clients.tokens[client]).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_larger_plans_are_sound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, kinds = int(rng.integers(1, 80)), int(rng.integers(1, 4))
    rounds, needs = rng.integers(0, rng.choice([9, 400, 10**6]), n), rng.integers(1, 10, n)
    count = rng.integers(1, 5, kinds)
    round_s, tokens = rng.uniform(0.01, 0.05, kinds), rng.integers(5, 12, kinds)
    clients = Fleet(np.repeat(round_s, count), np.repeat(tokens, count))
    if kinds == 1:
        clients = clients._replace(round_s=np.ones(len(clients.round_s)))
    longest_first = plan_offline(rounds, clients, tokens=needs, solver="lpt")
    for certified in (
        longest_first,
        rebalanced_plan(rounds, clients, tokens=needs, tries=100, seed=seed),
        plan_offline(rounds, clients, tokens=needs, time_limit_s=0.02),
    ):
        check_plan(certified, rounds, clients, needs)
        assert certified.load <= longest_first.load


def test_the_walk_meets_the_bound_of_many_clients() -> None:
    """Two speeds and a memory: longest first misses the bound, the walk meets it."""
    rounds = np.clip(np.random.default_rng(0).lognormal(5.7, 0.5, 300), 1, 1024).astype(np.int64)
    clients = fleet(*[0.03] * 20, *[0.05] * 20, tokens=(*[400] * 10, *[2000] * 30))
    plan = rebalanced_plan(rounds, clients, tokens=rounds, tries=6000)
    check_plan(plan, rounds, clients, rounds)
    assert plan.load < plan_offline(rounds, clients, tokens=rounds, solver="lpt").load
    assert plan.status == "optimal"


@given(st.lists(st.integers(0, 99), max_size=25), st.integers(1, 6), st.floats(1e-3, 9.0))
def test_equal_clients_are_planned_as_they_were(
    lengths: list[int], clients: int, round_s: float
) -> None:
    rounds = whole(*lengths)
    one, other = (
        rebalanced_plan(rounds, who, tokens=rounds + 5, tries=50)
        for who in (clients, fleet(*[round_s] * clients, tokens=200))
    )
    assert queues(one.plan) == queues(other.plan)
    assert (one.load, one.lower_bound, one.unit) == (other.load, other.lower_bound, other.unit)
    assert isinstance(other.load, int)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_by_hand(solver: str) -> None:
    """12 rounds at 3 a second; only the second client holds request 3, nobody request 4."""
    rounds, tokens = whole(5, 4, 3, 0, 50), whole(5, 4, 3, 90, 1000)
    clients = fleet(0.5, 1.0, tokens=(80, 100))
    found = plan_offline(rounds, clients, tokens=tokens, solver=solver)
    assert queues(found.plan) == [[0, 2], [1, 3]]
    assert (found.load, found.lower_bound, found.status) == (4.0, 4.0, "optimal")
    assert found.summary().startswith("load 4.0 s, lower bound 4.0, optimal (gap 0.000%)")


def test_nothing_fits_anywhere() -> None:
    clients = fleet(0.5, 1.0, tokens=3)
    for solver in SOLVERS:
        found = plan_offline(whole(5, 6), clients, tokens=whole(6, 7), solver=solver)
        assert (queues(found.plan), found.load, found.lower_bound) == ([[], []], 0, 0)


def test_tokens_of_other_requests_are_refused() -> None:
    clients = fleet(0.5, 1.0)
    refused(lambda: plan_offline(whole(5, 6), clients, tokens=whole(6)), "shape of rounds")
    plan_offline(whole(5, 6), clients, tokens=whole(6, 6))
    plan_offline(whole(5, 6), clients)


VARIANTS = list(itertools.product(FORMULATIONS, [False, True], [False, True]))


@settings(max_examples=40)
@given(instances(), st.sampled_from(VARIANTS))
def test_the_program_agrees_with_brute_force(
    case: tuple[Whole, Fleet, Whole], variant: tuple[str, bool, bool]
) -> None:
    """Both formulations, with and without symmetries, cold or from a plan."""
    rounds, clients, needs = case
    servers = Servers.of(clients, needs)
    start = deal_by_time(rounds, servers.needs, servers.round_s, servers.holds)
    formulation, break_symmetry, warm = variant
    found = solve_mip(
        rounds,
        servers,
        time_limit_s=20,
        start=start if warm else None,
        formulation=formulation,
        break_symmetry=break_symmetry,
    )
    assert found.client_of is not None
    assert (servers.needs <= servers.holds[found.client_of]).all()
    span = servers.span(
        np.bincount(found.client_of, weights=rounds, minlength=servers.clients).astype(np.int64)
    )
    counted = Fleet(servers.round_s, clients.tokens)
    assert span == least_span(rounds, counted, needs)
    assert span - 2e-3 * servers.round_s.min() < found.lower_bound <= span


def test_the_planner_leaves_small_cases_to_the_program() -> None:
    """The bound says 6.5 s, and only whole requests show that 7 s are needed."""
    rounds, clients = whole(7, 7, 5), fleet(1.0, 0.5)
    assert len(rounds) * 2 <= SMALL_CELLS
    found = plan_offline(rounds, clients)
    assert (found.load, found.lower_bound) == (7.0, 7.0)


class TestSamples:
    def test_the_faster_of_two_serves_the_longer(self) -> None:
        requests = make_requests([1, 1, 1], [13, 9, 5])
        rounds = whole(12, 8, 4)[None]
        clients = fleet(1.0, 0.5)
        found = plan_by_samples(requests, clients, rounds, np.random.default_rng(0))
        assert found.in_sample_rounds == 8.0  # 16 rounds in 8 s beside 8 in 8 s
        assert mean_largest_load(found.plan, rounds, clients) == 8.0

    @given(instances())
    def test_plans_are_sound_and_nearly_the_best(self, case: tuple[Whole, Fleet, Whole]) -> None:
        rounds, clients, _ = case
        prompts = np.random.default_rng(int(rounds.sum())).integers(1, 6, len(rounds))
        requests = make_requests(prompts, rounds + 1)
        clients = clients._replace(tokens=clients.tokens * 20)
        needs = prompts + rounds + 1
        found = plan_by_samples(requests, clients, rounds[None], np.random.default_rng(0))
        assert sorted(found.plan.order.tolist()) == np.flatnonzero(needs <= 180).tolist()
        for client, queue in enumerate(queues(found.plan)):
            assert (needs[queue] <= clients.tokens[client]).all()
        planned = np.sort(found.plan.order)
        servers = Servers.of(clients, needs[planned])
        best = least_span(rounds[planned], Fleet(servers.round_s, clients.tokens), needs[planned])
        assert best <= found.in_sample_rounds <= 2 * best + 1e-9

    def test_equal_clients_are_planned_as_they_were(self, rng: np.random.Generator) -> None:
        outputs = rng.integers(1, 40, 20)
        requests = make_requests(np.ones(20, int), outputs)
        rounds = rng.integers(0, 40, (5, 20))
        both: list[Any] = [np.int64(4), fleet(*[0.03] * 4, tokens=60)]
        plans = [plan_by_samples(requests, who, rounds, np.random.default_rng(3)) for who in both]
        assert queues(plans[0].plan) == queues(plans[1].plan)
        assert plans[0].in_sample_rounds == plans[1].in_sample_rounds
