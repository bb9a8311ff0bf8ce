"""Decode rounds that cost clients times cached tokens, as engines pay that pack a round into one row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.baselines.exact.optimum import METHODS, exact_optimum
from servegym.baselines.registry import make_policy
from servegym.engines.iterations import simulate
from servegym.envs import ServegymError, load_task, lower_bound, make_case, play, read_task
from servegym.envs.bounds.batch import decode_bound
from servegym.envs.bounds.padding import joint_bound
from servegym.envs.bounds.totals import totals_of
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts, TableDecode
from servegym.envs.playing.identity import notes_of
from servegym.envs.simulator.seconds import one_pass_seconds
from servegym.envs.task.registered import TASKS
from tests import random_clusters
from tests.against_cluster import compare_cluster, compare_or_nearly
from tests.cluster_helpers import shared_case
from tests.hand_solved_helpers import Player
from tests.helpers import instance, random_costs, random_requests
from tests.reference_simulator import optimal_makespan
from tests.test_own_cost_model import Imitation

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")

PACKED = StageCosts(AffineDecode(1.0, 0.0, 0.25, 0.125), AffinePrefill(0.5, 0.0))


def packed(costs: StageCosts, shared: float) -> StageCosts:
    """The same costs with the term."""
    return replace(costs, decode=replace(costs.decode, per_client_kv_token=shared))


@pytest.mark.parametrize(
    "decode", [PACKED.decode, TableDecode((1,), (1.0,), 0.25, 0.125)], ids=["affine", "table"]
)
def test_rounds_by_hand(play: Player, decode: AffineDecode | TableDecode) -> None:
    """A round takes 1 + kv/4 + B·kv/8.

    Requests 0 and 1 hold 5 tokens, then 7: 3.5 and 4.5 s, which is one run. Then 0 and 2 hold 8: 5 s; at
    last 0 holds 5 alone: 1 + 5/4 + 5/8.
    """
    requests = instance((1, 5), (2, 3), (3, 2))
    played = play(requests, 2, ["fcfs", "fcfs"], replace(PACKED, decode=decode))
    assert played.trace == [
        (0.0, "admit", 0, 0),
        (0.0, "admit", 1, 1),
        (0.5, "first", 0, 0),
        (0.5, "first", 1, 1),
        (8.5, "finish", 1, 1),
        (8.5, "admit", 2, 1),
        (9.0, "first", 2, 1),
        (14.0, "finish", 2, 1),
        (16.875, "finish", 0, 0),
    ]


def test_a_mixed_stage_pays_for_those_who_decode_and_their_cache() -> None:
    """Two clients, 10 tokens: 2 · 10/8 more, whatever is prefilled besides."""
    tables = [
        replace(costs.tables(3), pass_base_s=np.ones((1, 9)))
        for costs in (PACKED, packed(PACKED, 0.0))
    ]
    with_term, without = (one_pass_seconds(each, 0, 2, 10, 4, 16.0) for each in tables)
    assert with_term - without == 2.5


@pytest.mark.parametrize("dyadic", [True, False])
def test_clusters_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch, dyadic: bool) -> None:
    plain, draws = random_clusters.random_costs, np.random.default_rng(1)

    def costs(*given: Any, **more: Any) -> StageCosts:
        return packed(plain(*given, **more), float(draws.choice([2.0**-14, 2.0**-10])))

    monkeypatch.setattr(random_clusters, "random_costs", costs)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        case = shared_case(rng, dyadic=dyadic, moving=bool(seed % 2))
        if dyadic:
            compare_cluster(case)
        else:
            compare_or_nearly(case)


def test_the_simulator_by_itself_is_play_to_the_last_bit() -> None:
    task = replace(load_task("Tiny-v0"), cost=PACKED)
    case = make_case(task, 3)
    iterations, twin = simulate(task, make_policy("hybrid"), case.requests)
    episode = play(task, "hybrid", make_policy("hybrid"), case, seed=0)
    assert twin.clock_s == episode.elapsed_s
    rounds = [each for each in iterations if each.kind == "decode"]
    said_s = sum(1 + (2 + len(each.ids)) * each.cached_tokens / 8 for each in rounds)
    assert twin.clock_s == said_s + 0.5 * (len(iterations) - len(rounds))


# ---- bounds --------------------------------------------------------------------------------------


def test_bounds_are_at_most_the_optimum() -> None:
    rng = np.random.default_rng(4)
    for _ in range(120):
        clients, n = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        requests = random_requests(rng, n, dyadic=False)
        costs = random_costs(rng, clients, dyadic=False)
        costs = packed(costs, float(rng.choice([1e-4, 0.01, 1.0]) * rng.uniform(0, 1)))
        tables = costs.tables(clients)
        optimum = optimal_makespan(requests, clients, costs, 0)
        bound = lower_bound(requests, clients, tables)
        assert 0 < bound.seconds <= optimum * (1 + 1e-12)
        joint = joint_bound(requests, clients, tables)
        assert bound.seconds <= joint.seconds <= optimum * (1 + 1e-12)


ALIKE, UNLIKE = instance((2, 2), (2, 2)), instance((1, 2), (3, 2))
LONG = instance((1, 3), (1, 3))


@pytest.mark.parametrize(
    ("requests", "clients", "shared", "seconds"),
    [
        (instance((2, 4)), 3, 0.5, 3 + 0.5 * (3 + 4 + 5)),  # alone
        (ALIKE, 2, 0.125, 1 + 0.125 * 2 * 6),  # together, 3 tokens each
        (ALIKE, 2, 1.0, 2 * (1 + 3)),  # one after the other
        (UNLIKE, 2, 0.125, 1 + 0.125 * 2 * 6),  # 2 and 4 tokens
        (LONG, 1, 1.0, 4 + 2 * (2 + 3)),  # one client
        (LONG, 2, 0.125, 2 + 0.125 * 2 * (4 + 6)),
    ],
    ids=["alone", "together", "apart", "unlike", "one client", "two rounds"],
)
def test_the_bound_by_hand(requests: Any, clients: int, shared: float, seconds: float) -> None:
    """Rounds of 1 s and B·kv; it is the optimum in each."""
    costs = StageCosts(AffineDecode(1.0, 0.0, 0.0, shared), AffinePrefill(1e-9, 0.0))
    bound = lower_bound(requests, clients, costs.tables(clients))
    assert bound.decode_s == pytest.approx(seconds, rel=1e-12)
    assert bound.seconds <= optimal_makespan(requests, clients, costs) * (1 + 1e-12)


def test_requests_that_share_rounds_with_others_are_bounded_by_the_least_time_of_as_many() -> None:
    """Rounds of one client take 9 s, of two 1 s: one of these may be another request's."""
    costs = StageCosts(TableDecode((1, 2), (9.0, 1.0), 0.0, 0.25), AffinePrefill(1.0, 0.0))
    totals, tables = totals_of(np.array([2]), np.array([1])), costs.tables(2)
    assert decode_bound(totals, 1, tables, alone=True) == pytest.approx(9 + 0.75, rel=1e-12)
    assert decode_bound(totals, 1, tables, alone=False) == pytest.approx(1 + 0.75, rel=1e-12)


@pytest.mark.parametrize("clients", [7, 300])
def test_waves_of_equal_requests_reach_the_bound(clients: int) -> None:
    """Each round is full, which is best where e·n²·h < 1 s: a round alone takes as long without its cache."""
    shared, rounds = 1e-7, 40
    costs = StageCosts(AffineDecode(1.0, 0.0, 0.0, shared), AffinePrefill(1.0, 0.0))
    requests = instance(*[(10, 1 + rounds)] * (5 * clients))
    held = rounds * 10 + rounds * (rounds + 1) / 2
    wave_s = rounds + shared * clients * clients * held
    bound = lower_bound(requests, clients, costs.tables(clients))
    assert bound.decode_s == pytest.approx(5 * wave_s, rel=1e-9)


@pytest.mark.parametrize("shared", [1e-30, 1e-9, 1.0, 1e9])
def test_the_bound_of_the_longest_requests_is_finite(shared: float) -> None:
    totals = totals_of(np.full(50, 10**7), np.full(50, 10**7))
    with_term, without = (
        decode_bound(totals, 2 * 10**7, packed(PACKED, each).tables(40), alone=True)
        for each in (shared, 0.0)
    )
    assert without * (1 - 1e-12) <= with_term < float("inf")


# ---- where it cannot be taken, files and hashes ----------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_exact_methods_refuse_it(method: str) -> None:
    requests, costs = instance((1, 3), (2, 2)), packed(PACKED, 1e-30)
    with pytest.raises(ServegymError, match=r"cost\.decode\.per_client_kv_token = 0, got 1e-30"):
        exact_optimum(requests, 2, costs.tables(2), method=method)
    assert exact_optimum(requests, 2, packed(PACKED, 0.0).tables(2), method=method).proven


@pytest.mark.parametrize(
    ("model", "decode", "expected"),
    [
        ("affine", "base = 1.0, per_kv_token = 0.25", PACKED.decode),
        (
            "table",
            "batch = [1, 2], seconds = [1.0, 2.0]",
            TableDecode((1, 2), (1.0, 2.0), 0.0, 0.125),
        ),
    ],
)
def test_a_task_file_takes_it(write: Any, model: str, decode: str, expected: Any) -> None:
    path = write(
        "task.toml",
        f"[cost]\nmodel = '{model}'\ndecode = {{{decode}, per_client_kv_token = 0.125}}\n"
        "prefill = {base = 0.5, per_token = 0.0}\n",
    )
    found = read_task(path, TASKS["servegym/GSM8K-v0"])
    assert found.cost == replace(PACKED, decode=expected)
    assert notes_of(found)["cost"]["decode"]["per_client_kv_token"] == 0.125


def test_the_hash_of_a_users_tables_counts_it_where_it_is_used() -> None:
    task = TASKS["servegym/Tiny-v0"]

    def hash_with(**used: float) -> str:
        rates = Imitation().tables(3).rates.copy()
        for name, seconds in used.items():
            rates[name] = seconds
        notes = notes_of(replace(task, cost=Imitation(rates=rates)))
        return str(notes["cost"]["tables_sha256"])

    prefill = "prefill_per_batch_token_squared_s"
    known = hash_with()
    assert known == "ad05b078208b5def081f6d58cf66b4cce94ba8a7fea291655d642f7baae91ce2"
    both = (hash_with(**{prefill: 1.0}), hash_with(decode_per_client_kv_token_s=1.0))
    assert len({known, *both}) == 3
    # of the version that had the other term alone:
    assert both[0] == "e2209854843e7adb039b4d7c91b53248a5ea2f7a77223d0fd4711b2ea79bc698"
