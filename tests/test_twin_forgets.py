"""A twin that forgets who has finished goes on as if it had not: an engine in service for days."""

from __future__ import annotations

from dataclasses import fields
from random import Random
from typing import Any

import numpy as np
import pytest

from servegym.baselines.registry import make_policy
from servegym.engines import Twin
from servegym.envs import ServegymError, TaskConfig, load_task
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import with_overrides


def task(clients: int) -> TaskConfig:
    information = {"information": {"output_lengths": "predicted"}}
    cluster = {"cluster": {"clients": clients}, "slo": {"ttft_s": 3.0, "tpot_s": 1.0}}
    noted = {"workload": {"arrival_rate_per_s": 1.0}, "process": {"observe": ["latency"]}}
    return with_overrides(load_task("Tiny-v0"), information | cluster | noted)


def rows_of(log: EpisodeLog, places: Any) -> list[bytes]:
    return [getattr(log, item.name)[places].tobytes() for item in fields(log)]


def sums(twin: Twin) -> tuple[Any, ...]:
    """What must not depend on whether anybody has been forgotten."""
    state = twin._state
    queue, replica, view = state.queues[0, 0], state.replicas[0, 0], twin.situation().view
    names = ("waiting", "rounds", "tokens", "squares_low", "unseen")
    counts = [int(queue[name]) for name in names] + state.waiting_lengths[0, 0].tolist()
    shown = view._replace(arrived=0, finished=0, served_rounds=0)
    return counts, int(replica["due_sum"]), int(replica["cached_tokens"]), shown


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["fcfs", "aligned", "hybrid", "offline-steal"])
def test_whoever_is_forgotten_changes_nothing_for_the_others(name: str, seed: int) -> None:
    """All but the rules that go by how many have finished so far, as `feedback` does."""
    luck, config = Random(seed), task(1 + seed)
    whole, other = (Twin(config, make_policy(name), capacity=40) for _ in range(2))
    for now_s in np.arange(0.0, 15.0, 0.25):
        happening = luck.randrange(6)
        if happening <= 2 and whole.submitted < 40:
            prompt, expected, most = (luck.randint(1, 9) for _ in range(3))
            late = luck.choice([None, now_s + 1.5])
            for each in (whole, other):
                each.submit(prompt, expected, 0.5, most, late)
        elif happening == 3 and whole.submitted:
            gone = luck.randrange(whole.submitted)
            whole.cancel(gone)
            other.cancel(gone)
        elif happening == 4:
            before = other.held
            assert len(other.forget(luck.randrange(10))) == before - other.held
        assert sums(other) == sums(whole)
        work = whole.work(now_s)
        assert other.work(now_s) == work
        if work is not None:
            other.forget(luck.choice([0, 5, 40]))  # while the engine runs
            ended = luck.sample(work.ids, luck.randint(0, len(work.ids)))
            whole.ran(ended, 0.5)
            other.ran(ended, 0.5)
    assert other.clock_s == whole.clock_s
    assert len(other.ids) < len(whole.ids)
    assert rows_of(other.records(), ...) == rows_of(whole.records(), list(other.ids))
    assert other._as_of_now().episodes["met"][0] == other.records().met_slo.sum()


def test_a_small_twin_serves_any_number_of_requests() -> None:
    twin = Twin(task(2), make_policy("hybrid"), capacity=8)
    served = 0
    for _ in range(100):
        if twin.held == 8:
            twin.forget(4)
        twin.submit(5, 3, 0.5, most_tokens=3)
        while (work := twin.work()) is not None:
            twin.ran()
            served += len(work.ids)
    assert (twin.submitted, served) == (100, 300)
    assert twin.held <= 8
    assert twin.ids == tuple(range(100 - twin.held, 100))
    view = twin.situation().view
    assert (view.finished, view.arrived) == (twin.held, twin.held)
    assert view.served_rounds == 2 * twin.held
    twin.cancel(0)  # whom it has forgotten
    assert twin.work() is None


def test_who_is_there_is_not_forgotten() -> None:
    twin = Twin(task(1), make_policy("fcfs"), capacity=3)
    for most in (1, 4, 4):
        twin.submit(5, 3, most_tokens=most)
    assert twin.forget(0) == ()
    work = twin.work()
    assert work is not None
    twin.ran()
    assert twin.forget(0) == ()  # 0 has finished, and nothing is booked yet
    assert twin.work() == ("prefill", (1,))
    assert twin.forget(0) == (0,)
    assert twin.submit(7, 7) == 3
    twin.ran()
    twin.cancel(2)
    assert twin.work() == ("decode", (1,))
    twin.ran([1])
    assert twin.work() == ("prefill", (3,))
    assert twin.records().prompt_tokens.tolist() == [5, 5, 7]
    assert twin.forget(2) == (1,)
    assert twin.ids == (2, 3)
    assert np.isnan(twin.records().finished_s).all()
    with pytest.raises(ServegymError, match="most must be a whole number"):
        twin.forget(1.5)  # type: ignore[arg-type]
