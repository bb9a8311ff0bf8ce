"""The block ``latency``: every entry against plain formulas on random clusters, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.envs import ServingEnv
from servegym.envs.process.observed_latency import LATENCY_FEATURES, observe_latency
from servegym.envs.simulator.imagination import imagine_row
from servegym.envs.simulator.state import make_alike
from servegym.envs.task.config import with_overrides
from servegym.envs.vocabulary import ADMISSION_RULES
from tests.cluster_helpers import play_any, requests_of, shared_case, task_of
from tests.helpers import changed, instance, make_env, start
from tests.recount import recount

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")


def share(a: float, b: float) -> float:
    """a / (a + b), 0 if both are 0."""
    return a / (a + b) if a + b > 0 else 0.0


def waiting_in(env: ServingEnv, r: int) -> list[int]:
    """The requests that wait for the replica's decision."""
    state = env.state
    assert state is not None
    found, i = [], int(state.queues[0, min(r, state.queues.shape[1] - 1)].first)
    while i >= 0:
        if state.requests[0, i].phase == 1:
            found.append(i)
        i = int(state.requests[0, i].next)
    return found


def expected(env: ServingEnv, r: int, tokens: dict[int, int]) -> list[float]:
    """The entries, from the records; `tokens`: what each request has emitted."""
    state, log = env.state, env.records()
    assert state is not None
    (ttft_s, tpot_s), now_s = env.task.slo.limits, float(state.episodes[0].now_s)
    clients, view = env.task.cluster.replica_tables()[r].clients, env.view()
    waiting = waiting_in(env, r)
    ages = [now_s - log.arrival_s[i] for i in waiting if np.isnan(log.first_token_s[i])]
    counts = [0.0] * 5
    for age_s in ages:
        if ttft_s < np.inf:
            parts = age_s / ttft_s
            counts[4 if parts > 1 else min(int(4 * parts), 3)] += 1
    running = [
        int(finish.request) for finish in state.finishes[0, r, : state.replicas[0, r].active]
    ]
    token_s = [(now_s - log.first_token_s[i]) / (tokens[i] - 1) for i in running if tokens[i] > 1]
    limited, paced = ttft_s < np.inf, tpot_s < np.inf
    done = np.isfinite(log.finished_s)
    return [
        float(limited),
        float(paced),
        share(max(ages), ttft_s) if ages and limited else 0.0,
        *(count / max(len(waiting), 1) for count in counts),
        (len(waiting) - len(ages)) / max(len(waiting), 1),
        share(view.prefill_s, ttft_s) if limited else 0.0,
        sum(each > tpot_s for each in token_s) / clients if paced else 0.0,
        sum(0.8 * tpot_s <= each <= tpot_s for each in token_s) / clients if paced else 0.0,
        share(float(np.mean(token_s)), tpot_s) if token_s and paced else 0.0,
        share(view.round_s, tpot_s) if paced else 0.0,
        float(log.met_slo.sum() / done.sum()) if done.any() else 1.0,
    ]


def emitted(env: ServingEnv, r: int) -> dict[int, int]:
    """Tokens of those who decode at a replica, by what is left to their finishes."""
    state = env.state
    assert state is not None
    replica = state.replicas[0, r]
    return {
        int(finish.request): int(
            state.requests[0, finish.request].decode_rounds + 1 - (finish.due - replica.rounds)
        )
        for finish in state.finishes[0, r, : replica.active]
    }


@pytest.mark.parametrize("seed", range(40))
def test_every_entry(seed: int) -> None:
    rng = np.random.default_rng([seed, 41])
    case = shared_case(rng, dyadic=True, moving=bool(seed % 2))
    limits = dict(
        zip(("ttft_s", "tpot_s"), rng.choice([0.5, 2.0, 8.0, 40.0, np.inf], 2), strict=True)
    )
    task = task_of(case.spec, mixed_rules=ADMISSION_RULES, observe=("latency",))
    env = ServingEnv(changed(task, slo=limits))
    env.reset(options={"requests": requests_of(case)})
    state = env.state
    assert state is not None

    def watch() -> None:
        recount(state)
        if state.episodes[0].finished + state.episodes[0].rejected < state.episodes[0].requests:
            r = int(state.episodes[0].turn)
            ours = env.rows.observations[0].tolist()
            assert env.observation_space.contains(env.rows.observations[0])
            theirs = dict(zip(LATENCY_FEATURES, expected(env, r, emitted(env, r)), strict=True))
            assert dict(zip(env.features, ours, strict=True)) == pytest.approx(
                theirs, rel=1e-6, abs=1e-7
            )

    play_any(env, rng, watch)


def test_by_hand() -> None:
    """One client, 2 s a stage, 1 s a round; 4 s to the first token, 1.25 s a token.

    At 4 s request 0 has finished in time, 1 has waited for 4 s and 2 for 1 s.
    """
    env = ServingEnv(
        changed(
            make_env(1, rules=("fcfs", "longest"), observe=("latency",)).task,
            slo={"ttft_s": 4.0, "tpot_s": 1.25},
        )
    )
    start(env, instance((5, 3), (5, 3), (5, 3, 3.0)))
    env.step(np.int64(1))
    values = dict(zip(env.features, env.rows.observations[0].tolist(), strict=True))
    found = [round(values[name], 6) for name in LATENCY_FEATURES]
    assert found == [1, 1, 0.5, 0, 0.5, 0, 0.5, 0, 0, round(2 / 6, 6), 0, 0, 0, found[13], 1]
    assert env.records().met_slo.tolist() == [True, False, False]


def test_an_imagined_episode_has_no_latency() -> None:
    """It has no times; requests that are admitted in it have no pace."""
    env = ServingEnv(
        changed(
            make_env(2, rules=("fcfs", "longest"), observe=("latency",)).task,
            slo={"ttft_s": 4.0, "tpot_s": 1.25},
        )
    )
    start(env, instance(*[(5, 3 + k) for k in range(9)]))
    for _ in range(2):
        env.step(np.int64(1))
    state = env.state
    assert state is not None
    imagined = make_alike(state, 1)
    imagine_row(state, env.costs, 0, imagined, 0)
    assert imagined.replicas[0, 0].active > 0
    assert imagined.paces.size == imagined.carried.size == imagined.gaps.size == 0
    entries = np.ones(len(LATENCY_FEATURES), np.float32)
    observe_latency(imagined, env.costs, 0, 0, 0, entries)
    assert not entries.any()


@pytest.mark.parametrize("limit", ["ttft_s", "tpot_s"])
def test_without_a_limit_its_entries_are_0(limit: str, rng: np.random.Generator) -> None:
    other = {"ttft_s": "tpot_s", "tpot_s": "ttft_s"}[limit]
    overrides: dict[str, Any] = {"process": {"observe": ["latency"]}, "slo": {other: 5.0}}
    env = ServingEnv(with_overrides(make_env(2).task, overrides))
    start(env, instance(*[(5, 3 + k) for k in range(9)]))
    entries = {"ttft_s": [0, 2, 3, 4, 5, 6, 7, 9], "tpot_s": [1, 10, 11, 12, 13]}[limit]

    def watch() -> None:
        assert not env.rows.observations[0, entries].any()

    play_any(env, rng, watch)
