"""Prefill that costs the square of a stage's tokens, as engines pay that pack a stage into one row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.baselines.exact.optimum import METHODS, exact_optimum
from servegym.envs import Requests, lower_bound, read_task
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.playing.identity import notes_of
from servegym.envs.task.registered import TASKS
from tests import against_reference, random_clusters
from tests.against_cluster import compare_cluster, with_draws
from tests.hand_solved_helpers import Player
from tests.helpers import instance, random_costs, random_requests
from tests.reference_simulator import optimal_makespan
from tests.test_own_cost_model import Imitation

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")

PACKED = StageCosts(AffineDecode(1.0), AffinePrefill(0.5, 0.0, per_batch_token_squared=0.25))


def packed(costs: StageCosts, squared: float) -> StageCosts:
    """The same costs with the term, where prefill has a line."""
    if not isinstance(costs.prefill, AffinePrefill):
        return costs
    return replace(costs, prefill=replace(costs.prefill, per_batch_token_squared=squared))


def test_a_stage_by_hand(play: Player) -> None:
    """Prompts of 1 and 2 together: 0.5 + 9/4; a round; then 3 alone: 0.5 + 9/4."""
    requests = instance((1, 2), (2, 2), (3, 1))
    played = play(requests, 2, ["fcfs", "fcfs"], PACKED)
    assert played.stages() == [(0.0, 2.75, [0, 1]), (3.75, 6.5, [2])]


def test_the_simulator_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(1)

    def costs(*given: Any, **more: Any) -> StageCosts:
        return packed(random_costs(*given, **more), float(draws.choice([2.0**-12, 2.0**-8])))

    monkeypatch.setattr(against_reference, "random_costs", costs)
    rng = np.random.default_rng(2)
    for _ in range(40):
        against_reference.play_one(rng, "known")
    for _ in range(10):
        against_reference.play_one(rng, "predicted")


def test_so_it_is_in_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, draws = random_clusters.random_costs, np.random.default_rng(1)

    def costs(*given: Any, **more: Any) -> StageCosts:
        return packed(plain(*given, **more), float(draws.choice([2.0**-16, 2.0**-12])))

    monkeypatch.setattr(random_clusters, "random_costs", costs)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        case = random_clusters.random_case(rng, dyadic=bool(seed % 2), moving=False)
        spec = replace(case.spec, padded=False, reserve="chunk")
        compare_cluster(with_draws(random_clusters.ClusterCase(case.requests, spec)))


def test_the_bound_is_at_most_the_optimum_which_is_found() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        clients, n = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        requests = random_requests(rng, n, dyadic=False)
        costs = packed(random_costs(rng, clients, dyadic=False), float(rng.uniform(0, 0.05)))
        tables = costs.tables(clients)
        optimum = optimal_makespan(requests, clients, costs, 0)
        assert 0 < lower_bound(requests, clients, tables).seconds <= optimum * (1 + 1e-12)
        if not requests.arrival_s.any():
            for method in METHODS:
                found = exact_optimum(requests, clients, tables, method=method)
                assert found.proven
                assert found.makespan_s == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize(
    ("prefill", "clients", "seconds"),
    [
        (
            AffinePrefill(2.0, 0.0, per_batch_token_squared=0.25),
            4,
            3 * 2.0 + 64 / 4 / 3,
        ),  # 3 stages
        (AffinePrefill(4.0, 0.0, per_batch_token_squared=0.25), 4, 2 * 4.0 + 64 / 4 / 2),  # 2
        (AffinePrefill(0.0, 1.0, per_batch_token_squared=0.25), 4, 8.0 + 16 / 4),  # each alone
        (AffinePrefill(99.0, 0.0, per_batch_token_squared=0.25), 2, 2 * 99.0 + 64 / 4 / 2),
        (AffinePrefill(0.0, 0.0, floor=4.0, per_batch_token_squared=0.25), 4, 2 * 4.0),
    ],
    ids=["stage", "dear stage", "alone", "clients", "floor"],
)
def test_the_bound_by_hand(prefill: AffinePrefill, clients: int, seconds: float) -> None:
    """Four prompts of 2 tokens: one stage has T² = 64, four have 4 · 4."""
    requests = instance(*[(2, 1)] * 4)
    tables = StageCosts(AffineDecode(1.0), prefill).tables(clients)
    assert lower_bound(requests, clients, tables).prefill_s == pytest.approx(seconds, rel=1e-12)


def test_a_task_file_takes_it(write: Any) -> None:
    path = write(
        "task.toml",
        "[cost]\nmodel = 'affine'\ndecode = {base = 1.0}\n"
        "prefill = {base = 0.5, per_token = 0.0, per_batch_token_squared = 0.25}\n",
    )
    assert read_task(path, TASKS["servegym/GSM8K-v0"]).cost == PACKED


def test_the_hash_of_a_users_tables_counts_it_where_it_is_used() -> None:
    task = TASKS["servegym/Tiny-v0"]
    known = notes_of(replace(task, cost=Imitation()))["cost"]["tables_sha256"]
    assert known == "ad05b078208b5def081f6d58cf66b4cce94ba8a7fea291655d642f7baae91ce2"
    rates = Imitation().tables(3).rates.copy()
    rates["prefill_per_batch_token_squared_s"] = 1.0
    assert notes_of(replace(task, cost=Imitation(rates=rates)))["cost"]["tables_sha256"] != known


def many(n: int) -> Requests:
    return instance(*[(1, 1)] * n)


def test_the_bound_of_many_requests_is_finite() -> None:
    assert 0 < lower_bound(many(5000), 7, PACKED.tables(7)).seconds < 1e6
