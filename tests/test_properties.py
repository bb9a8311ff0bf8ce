"""Properties of every episode, for any instance, costs and actions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs import Requests, ServingEnv
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.simulator.state import FINISHED, RUNNING, WAITING
from tests.helpers import inside, instance, make_env, start

SECONDS = st.floats(0.001, 10.0)
OR_ZERO = st.one_of(st.just(0.0), SECONDS)

DECODES = st.one_of(
    st.builds(AffineDecode, SECONDS, OR_ZERO, OR_ZERO, OR_ZERO),
    st.builds(
        lambda seconds, *rates: TableDecode(tuple(range(1, 7)), tuple(seconds), *rates),
        st.lists(SECONDS, min_size=6, max_size=6),
        OR_ZERO,
        OR_ZERO,
    ),
)
PREFILLS = st.one_of(
    st.builds(AffinePrefill, SECONDS, OR_ZERO, OR_ZERO, OR_ZERO),
    st.builds(
        lambda tokens, seconds: LevelledPrefill(
            tuple(sorted(tokens)), tuple(sorted(seconds[: len(tokens)]))
        ),
        st.sets(st.integers(1, 60), min_size=1, max_size=4),
        st.lists(SECONDS, min_size=4, max_size=4),
    ),
)
COSTS = st.builds(StageCosts, DECODES, PREFILLS, st.builds(EngineOverhead, OR_ZERO, OR_ZERO))
ROWS = st.lists(
    st.tuples(
        st.integers(1, 30), st.integers(1, 12), st.one_of(st.just(0.0), st.floats(0.0, 50.0))
    ),
    min_size=1,
    max_size=25,
)


@dataclass(frozen=True)
class Case:
    """An instance, what it is played on, and where the actions come from."""

    requests: Requests
    clients: int
    costs: StageCosts
    budget: int
    every_round: bool
    seed: int

    def env(self) -> ServingEnv:
        mode = "rounds" if self.every_round else "events"
        env = make_env(self.clients, self.costs, self.budget, decisions=mode)
        start(env, self.requests)
        return env


CASES = st.builds(
    lambda rows, clients, costs, budget, every_round, seed: Case(
        instance(*rows), clients, costs, budget, every_round, seed
    ),
    ROWS,
    st.integers(1, 6),
    COSTS,
    st.sampled_from([0, 1, 20, 60]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)


def play(case: Case, env: ServingEnv, watch: Any = None) -> dict[str, Any]:
    """Take random legal actions to the end; call `watch` before each and after the last."""
    rng = np.random.default_rng(case.seed)
    over, info = False, dict[str, Any]()
    while not over:
        if watch is not None:
            watch()
        action = rng.choice(np.flatnonzero(env.action_masks()))
        _, _, over, _, info = env.step(action)
    if watch is not None:
        watch()
    return info


@given(CASES)
def test_conservation_and_capacity(case: Case) -> None:
    """Each request is in one phase, each running one alone on its client, no client is invented."""
    env = case.env()

    def watch() -> None:
        state, now = inside(env), env.view()
        phases = np.array(state.phases)
        holders = np.array(state.clients)[phases == RUNNING]
        assert len(phases) == len(case.requests)
        assert now.waiting == np.sum(phases == WAITING)
        assert now.active == len(set(holders)) == len(holders) <= case.clients
        assert now.active + now.idle == case.clients
        assert all(0 <= holder < case.clients for holder in holders)
        assert min(state.queue_rounds) >= 0

    play(case, env, watch)
    assert set(inside(env).phases) == {FINISHED}
    assert inside(env).queue_rounds == [0] * case.clients


@given(CASES)
def test_clocks_and_cache(case: Case) -> None:
    """Clocks never go back, every decision takes time; the cache is empty at the end."""
    env = case.env()
    seen = [(-1.0, -1)]
    totals = []

    def watch() -> None:
        state, now = inside(env), env.view()
        seconds, rounds = seen[-1]
        assert now.clock_s > seconds
        assert now.round >= rounds
        assert state.cached_tokens >= now.active * 2  # a prompt and a token each
        assert now.idle_wait_s >= 0
        seen.append((now.clock_s, now.round))
        totals.append(
            [state.totals_s[name] for name in ("prefill_s", "busy_decode_s", "in_system_s")]
        )

    play(case, env, watch)
    assert inside(env).cached_tokens == 0
    assert (np.diff(np.array(totals), axis=0) >= 0).all()


def stages_of(log: EpisodeLog) -> list[tuple[float, float]]:
    """Start and end of every prefill stage, in order."""
    return sorted(set(zip(log.admitted_s.tolist(), log.first_token_s.tolist(), strict=True)))


@given(CASES)
def test_records_are_in_order(case: Case) -> None:
    env = case.env()
    info = play(case, env)
    log = env.records()
    assert (log.arrival_s <= log.admitted_s).all()
    assert (log.admitted_s < log.first_token_s).all()
    assert (log.first_token_s <= log.finished_s).all()
    assert ((log.first_token_s == log.finished_s) == (log.decode_rounds == 0)).all()
    assert log.finished_s.max() == info["makespan_s"]
    stages = stages_of(log)
    assert len(stages) == info["prefill_stages"]
    assert all(end <= start for (_, end), (start, _) in pairwise(stages))


@given(CASES)
def test_a_client_holds_one_request_at_a_time(case: Case) -> None:
    env = case.env()
    play(case, env)
    log = env.records()
    for client in range(case.clients):
        mine = np.flatnonzero(log.client == client)
        mine = mine[np.argsort(log.admitted_s[mine])]
        assert (log.finished_s[mine[:-1]] <= log.admitted_s[mine[1:]]).all()


@given(CASES)
def test_metrics_are_within_their_limits(case: Case) -> None:
    info = play(case, case.env())
    assert info["makespan_s"] >= info["lower_bound_s"] * (1 - 1e-12)
    assert info["gap"] >= -1e-12
    assert 0 <= info["decode_utilization"] <= info["client_utilization"] <= 1 + 1e-12
    assert 0 < info["prefill_s"] <= info["makespan_s"] * (1 + 1e-12)
    assert info["ttft_p50_s"] <= info["ttft_p99_s"]
    rounds = case.requests.decode_rounds
    assert -(-rounds.sum() // case.clients) <= info["decode_rounds"] <= rounds.sum()
    assert -(-len(rounds) // case.clients) <= info["prefill_stages"] <= len(rounds)
    tokens = info["output_tokens_per_s"] * info["makespan_s"]
    assert tokens == pytest.approx(case.requests.output_tokens.sum())


# ---- episodes that must be alike ------------------------------------------------------------


def fixed_rule_times(case: Case, every_round: bool, *, eager: bool) -> list[float]:
    """When each request finishes if a stage starts as soon (or as late) as it can."""
    mode = "rounds" if every_round else "events"
    env = make_env(case.clients, case.costs, case.budget, decisions=mode, rules=("longest", "fcfs"))
    start(env, case.requests)
    over = False
    while not over:
        mask = env.action_masks()
        _, _, over, _, _ = env.step(np.int64(1 if eager and mask[1] else np.argmax(mask)))
    finished: list[float] = env.records().finished_s.tolist()
    return finished


@given(CASES, st.booleans())
def test_asking_at_every_round_changes_nothing(case: Case, eager: bool) -> None:
    """A rule that answers the same between events plays the same episode in both modes."""
    events = fixed_rule_times(case, every_round=False, eager=eager)
    assert fixed_rule_times(case, every_round=True, eager=eager) == pytest.approx(events)


def doubled(case: Case) -> Case:
    """The same case in half seconds: every cost and every arrival is twice as much."""
    decode, prefill, overhead = case.costs.decode, case.costs.prefill, case.costs.engine_overhead
    rates = (decode.per_kv_token * 2, decode.per_client_kv_token * 2)
    if isinstance(decode, AffineDecode):
        decode = AffineDecode(decode.base * 2, decode.per_client * 2, *rates)
    else:
        times = tuple(second * 2 for second in decode.seconds)
        decode = TableDecode(decode.batch, times, *rates)
    if isinstance(prefill, AffinePrefill):
        parts = (prefill.base, prefill.per_token, prefill.per_token_squared, prefill.floor)
        prefill = AffinePrefill(*(part * 2 for part in parts))
    else:
        times = tuple(second * 2 for second in prefill.level_seconds)
        prefill = LevelledPrefill(prefill.level_tokens, times)
    costs = StageCosts(decode, prefill, EngineOverhead(overhead.base * 2, overhead.per_client * 2))
    old = case.requests
    rows = zip(old.prompt_tokens, old.output_tokens, old.arrival_s * 2, strict=True)
    requests = instance(*((int(p), int(o), float(a)) for p, o, a in rows))
    return Case(requests, case.clients, costs, case.budget, case.every_round, case.seed)


@given(CASES)
def test_twice_the_costs_is_twice_the_time_to_the_last_bit(case: Case) -> None:
    """Doubling is exact in binary, so nothing but the seconds may change."""
    first, second = case.env(), doubled(case).env()
    play(case, first)
    play(case, second)
    assert (first.records().finished_s * 2).tolist() == second.records().finished_s.tolist()
    assert first.records().client.tolist() == second.records().client.tolist()


@given(CASES)
def test_return_is_minus_the_gap(case: Case) -> None:
    env = case.env()
    total, over = 0.0, False
    rng = np.random.default_rng(case.seed)
    while not over:
        action = rng.choice(np.flatnonzero(env.action_masks()))
        _, reward, over, _, info = env.step(action)
        total += float(reward)
    assert total == pytest.approx(-100 * info["gap"], rel=1e-9, abs=1e-9)
