"""Shared by many test files: instances, environments and traces in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from servegym.envs import Requests, ServegymError, ServingEnv, make_requests
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import InformationConfig, ProcessConfig
from servegym.envs.workload.plan import Plan, plan_by_scores, plan_from_queues
from servegym.envs.workload.scoring import Scoring

if TYPE_CHECKING:  # the simulator's tests do without torch
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

UNIT_COSTS = StageCosts(AffineDecode(1.0), AffinePrefill(2.0, 0.0))
"""A round takes 1 s and a prefill stage 2 s, whatever they hold: traces are easy to add up."""

HUGE = "1" + "0" * 400  # a TOML integer may be that long


def instance(
    *rows: tuple[int, int] | tuple[int, int, float], predicted: Sequence[int] | None = None
) -> Requests:
    """Requests from rows of (prompt, output[, arrival])."""
    arrivals = [float(row[2]) if len(row) == 3 else 0.0 for row in rows]
    return make_requests(
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array(arrivals),
        None if predicted is None else np.array(predicted),
    )


def make_env(
    clients: int,
    costs: StageCosts = UNIT_COSTS,
    max_prefill_tokens: int = 0,
    lengths: Literal["known", "predicted", "unknown"] = "known",
    **process: Any,
) -> ServingEnv:
    """An environment whose instances are given to `reset(options=…)`."""
    cluster = ClusterConfig(clients=clients, max_prefill_tokens=max_prefill_tokens)
    task = TaskConfig(
        "test",
        cluster=cluster,
        cost=costs,
        information=InformationConfig(output_lengths=lengths),
        process=ProcessConfig(**process),
    )
    return ServingEnv(task)


def start(
    env: ServingEnv,
    requests: Requests,
    queues: Sequence[Sequence[int]] | None = None,
    scoring: Scoring | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Reset to an instance, with a plan if one is given."""
    plan: Plan | None = None if queues is None else plan_from_queues(queues)
    if scoring is not None:
        plan = plan_by_scores(scoring) if plan is None else replace(plan, scoring=scoring)
    return env.reset(options={"requests": requests, "plan": plan})


@dataclass(frozen=True)
class Inside:
    """State of the simulator that no public method shows. Tests read its layout only here."""

    decisions: int
    stages: int
    cached_tokens: int
    phases: list[int]  # of each request
    clients: list[int]  # that each request was given to, −1 before
    queue_rounds: list[int]  # of each client's planned queue
    totals_s: dict[str, float]
    bound_s: float


def inside(env: ServingEnv) -> Inside:
    """Read the state of the one episode of an environment."""
    assert env.state is not None
    episode = env.state.episodes[0]
    replica = env.state.replicas[0, 0]
    requests = env.state.requests[0, : episode["requests"]]
    totals = {name: float(replica[name]) for name in ("clock_s", "idle_wait_s", "prefill_s")}
    assert episode["now_s"] == replica["clock_s"]
    totals |= {"busy_decode_s": float(replica["busy_decode_s"])}
    return Inside(
        decisions=int(episode["decisions"]),
        stages=int(replica["prefill_stages"]),
        cached_tokens=int(replica["cached_tokens"]),
        phases=requests["phase"].tolist(),
        clients=requests["client"].tolist(),
        queue_rounds=env.state.clients[0, 0]["queue_rounds"].tolist(),
        totals_s=totals | {"in_system_s": float(episode["in_system_s"])},
        bound_s=float(episode["bound_s"]),
    )


def trace(log: EpisodeLog) -> list[tuple[float, str, int, int]]:
    """Events in order: (second, "first" | "finish" | "admit", request, client)."""
    kinds = ("first", "finish", "admit")  # a stage ends before the next begins
    events = [
        (float(second), kinds.index(event), request, int(log.client[request]))
        for event, seconds in zip(
            kinds, (log.first_token_s, log.finished_s, log.admitted_s), strict=True
        )
        for request, second in enumerate(seconds)
        if np.isfinite(second)
    ]
    return [
        (second, kinds[event], request, client) for second, event, request, client in sorted(events)
    ]


def random_legal_action(env: ServingEnv, rng: np.random.Generator) -> int:
    """One of the legal actions."""
    return int(rng.choice(np.flatnonzero(env.action_masks())))


def play_randomly(env: ServingEnv, rng: np.random.Generator) -> tuple[float, dict[str, Any]]:
    """Take random legal actions to the end; return the return and the last info."""
    total, over, info = 0.0, False, dict[str, Any]()
    while not over:
        _, reward, terminated, truncated, info = env.step(np.int64(random_legal_action(env, rng)))
        total += float(reward)
        over = terminated or truncated
    return total, info


def random_costs(rng: np.random.Generator, clients: int, *, dyadic: bool) -> StageCosts:
    """A cost model of any family. Dyadic costs add up without rounding, so ties are exact."""

    def seconds(most: float) -> float:
        return (
            float(rng.integers(1, 64)) / 64 * most if dyadic else float(rng.uniform(0.01, 1)) * most
        )

    per_kv = rng.choice([0.0, seconds(0.0078125)])
    decode: AffineDecode | TableDecode = AffineDecode(seconds(1), seconds(0.25), float(per_kv))
    if rng.random() < 0.3:
        # Neighbouring batches in the dyadic case: nothing is interpolated. Times may dip.
        batch = range(1, clients + 1) if dyadic else sorted({1, int(rng.integers(2, 9)), 9, 30})
        decode = TableDecode(tuple(batch), tuple(seconds(1) for _ in batch), float(per_kv))
    prefill: AffinePrefill | LevelledPrefill = AffinePrefill(
        seconds(1), seconds(0.0625), seconds(0.0009765625), seconds(2) * (rng.random() < 0.5)
    )
    if rng.random() < 0.4:
        levels = sorted({int(level) for level in rng.integers(1, 120, 4)})
        prefill = LevelledPrefill(tuple(levels), tuple(sorted(seconds(3) for _ in levels)))
    overhead = EngineOverhead(seconds(0.25), seconds(0.125)) if rng.random() < 0.3 else None
    return StageCosts(decode, prefill, overhead or EngineOverhead())


def random_requests(rng: np.random.Generator, most: int = 60, *, dyadic: bool) -> Requests:
    """Up to `most` requests: all at 0, spread out, in clumps, or after a while of nothing."""
    n = int(rng.integers(1, most + 1))
    longest = int(rng.choice([2, 6, 40]))
    arrivals = {
        "present": np.zeros(n),
        "spread": rng.uniform(0, n / 2, n),
        "clumps": rng.choice(rng.uniform(0, n, 4), n),
        "late": rng.uniform(5, 10, n),
        "some late": np.where(rng.random(n) < 0.5, 0.0, rng.uniform(0, n / 2, n)),
    }[str(rng.choice(["present", "spread", "clumps", "late", "some late"]))]
    if dyadic:
        arrivals = np.floor(arrivals * 8) / 8
    return make_requests(rng.integers(1, 41, n), 1 + rng.integers(0, longest, n), arrivals)


def random_queues(
    rng: np.random.Generator, requests: Requests, clients: int
) -> list[list[int]] | None:
    """A plan of some of the requests present at t = 0, or none."""
    if rng.random() < 0.5:
        return None
    present = np.flatnonzero(requests.arrival_s == 0)
    planned = rng.permutation(present)[: int(rng.integers(0, len(present) + 1))]
    queues: list[list[int]] = [[] for _ in range(clients)]
    for request in planned:
        queues[int(rng.integers(clients))].append(int(request))
    return queues


def changed(task: TaskConfig, **parts: Mapping[str, Any]) -> TaskConfig:
    """`task` with fields of its parts replaced: `changed(task, cluster={"clients": 2})`."""
    return replace(task, **{name: replace(getattr(task, name), **p) for name, p in parts.items()})


def weights(model: OnPolicyAlgorithm) -> dict[str, bytes]:
    """All weights of an agent, to the last bit."""
    return {name: value.numpy().tobytes() for name, value in model.policy.state_dict().items()}


def refused(call: Callable[[], Any], words: str) -> None:
    """The error's message is one printable line that contains these words."""
    with pytest.raises(ServegymError) as error:
        call()
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 300  # with the path of a temporary folder


class Terminal:
    """A stream that says it is a terminal and keeps what it gets."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """Nothing waits."""

    def isatty(self) -> bool:
        return True
