"""The twin beside `play`: driven with the cost model's seconds it is the simulator, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

from servegym.baselines.catalogue import MIXED, REGISTRY
from servegym.baselines.registry import make_policy
from servegym.engines import Twin
from servegym.envs import Policy, Requests, Situation, TaskConfig, load_task, make_case, play
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import with_overrides

PREDICTED = {"output_lengths": "predicted"}
TASKS: dict[str, dict[str, Any]] = {
    "known": {},
    "known, arriving": {"workload": {"arrival_rate_per_s": 0.4}},
    "predicted": {"information": PREDICTED},
    "predicted, arriving": {
        "information": PREDICTED,
        "workload": {"arrival_rate_per_s": 0.4, "requests": 20},
    },
    "unknown, every block": {
        "information": {"output_lengths": "unknown"},
        "workload": {"arrival_rate_per_s": 1.0, "requests": 20},
        "process": {"observe": ("replica", "memory", "cluster", "latency")},
        "slo": {"ttft_s": 10.0, "tpot_s": 1.2},
    },
    "rounds, a token budget": {
        "information": PREDICTED,
        "workload": {"arrival_rate_per_s": 0.3, "requests": 16},
        "process": {"decisions": "rounds"},
        "cluster": {"max_prefill_tokens": 150},
    },
}
NAMES = ["threshold-2" if name == "threshold" else name for name in REGISTRY if name not in MIXED]


class Watched:
    """A policy that notes what it is told and what it answers."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seen: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def act(self, situation: Situation) -> int:
        action = self.policy.act(situation)
        told = situation.observation.tobytes(), situation.mask.tobytes(), tuple(situation.view)
        self.seen.append((int(action), *told))
        return action


def tiny(overrides: Mapping[str, Any]) -> TaskConfig:
    return with_overrides(load_task("Tiny-v0"), overrides)


def submit(twin: Twin, requests: Requests, i: int) -> None:
    known = twin.task.information.output_lengths == "known"
    expected = requests.output_tokens if known else requests.predicted_output_tokens
    spread = 0.0 if known or requests.predicted_spread is None else requests.predicted_spread[i]
    twin.submit(requests.prompt_tokens[i], expected[i], spread, now_s=requests.arrival_s[i])


def serve(twin: Twin, requests: Requests, *, ahead: bool) -> None:
    """Be the engine: decode everybody to the true length.

    `ahead`: all requests are submitted before the first iteration, else each once its time has come.
    """
    left = requests.output_tokens.copy()
    known = 0
    while left.any():
        while known < len(requests) and (ahead or requests.arrival_s[known] <= twin.clock_s):
            submit(twin, requests, known)
            known += 1
        work = twin.work()
        if work is None:  # nobody is there: the next to come
            waits = requests.arrival_s[requests.arrival_s > twin.clock_s].min()
            while known < len(requests) and requests.arrival_s[known] <= waits:
                submit(twin, requests, known)
                known += 1
            work = twin.work(now_s=waits)
        assert work is not None
        ids = list(work.ids)
        left[ids] -= 1
        assert (left >= 0).all()
        twin.ran([i for i in ids if left[i] == 0])
    assert twin.work() is None


def unequal(one: EpisodeLog, other: EpisodeLog) -> list[str]:
    pairs = [
        (item.name, getattr(one, item.name), getattr(other, item.name)) for item in fields(one)
    ]
    return [name for name, a, b in pairs if a.dtype != b.dtype or a.tobytes() != b.tobytes()]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_twin_is_the_simulator(task: dict[str, Any], name: str) -> None:
    config = tiny(task)
    case = make_case(config, seed=3)
    plain, twinned = Watched(make_policy(name)), Watched(make_policy(name))
    episode = play(config, name, plain, case, seed=3)
    twin = Twin(config, twinned, capacity=len(case.requests), seed=3)
    serve(twin, case.requests, ahead=True)
    assert twinned.seen == plain.seen
    assert unequal(twin.records(), episode.records) == []
    assert twin.clock_s == episode.elapsed_s


@pytest.mark.parametrize("name", ["random", "hybrid", "aligned", "quantile", "rollout"])
def test_so_it_is_where_requests_become_known_when_they_come(name: str) -> None:
    config = tiny(TASKS["predicted, arriving"])
    for seed in range(4):
        case = make_case(config, seed)
        plain, twinned = Watched(make_policy(name)), Watched(make_policy(name))
        episode = play(config, name, plain, case, seed)
        twin = Twin(config, twinned, capacity=50, seed=seed)
        serve(twin, case.requests, ahead=False)
        assert twinned.seen == plain.seen
        assert unequal(twin.records(), episode.records) == []


def test_so_it_is_on_two_hundred_clients() -> None:
    overrides = {"workload": {"requests": 300, "arrival_rate_per_s": 30.0}}
    config = with_overrides(load_task("GSM8KPredicted-v0"), overrides)
    case = make_case(config, seed=0)
    plain, twinned = Watched(make_policy("hybrid")), Watched(make_policy("hybrid"))
    episode = play(config, "hybrid", plain, case, seed=0)
    twin = Twin(config, twinned)
    serve(twin, case.requests, ahead=True)
    assert twinned.seen == plain.seen
    assert unequal(twin.records(), episode.records) == []
