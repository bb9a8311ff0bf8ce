"""Play named actions in the environment and in the reference, for instances solved by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from servegym.envs import Requests
from servegym.envs.machine.costs import StageCosts
from servegym.envs.process.metrics import EpisodeLog
from tests.helpers import UNIT_COSTS, make_env, start, trace
from tests.reference_simulator import RULES, ReferenceSimulator, make_reference


@dataclass
class Played:
    """Results of an episode."""

    trace: list[tuple[float, str, int, int]]  # (second, what, request, client)
    decisions: list[tuple[float, int, int]]  # (second, active, waiting) at every decision point

    def finishes(self) -> list[tuple[float, int]]:
        """(second, request) in order of finishing."""
        return [(second, request) for second, event, request, _ in self.trace if event == "finish"]

    def stages(self) -> list[tuple[float, float, list[int]]]:
        """(start, end, requests in order of their clients) of every prefill stage."""
        ends = {request: second for second, event, request, _ in self.trace if event == "first"}
        admitted = sorted((s, c, r) for s, event, r, c in self.trace if event == "admit")
        stages: dict[float, list[int]] = {}
        for second, _, request in admitted:
            stages.setdefault(second, []).append(request)
        return [(second, ends[ids[0]], ids) for second, ids in stages.items()]


Player = Callable[..., Played]


def number(name: str, rules: Sequence[str] = RULES) -> int:
    """The action called `name`."""
    return ("decode", *rules).index(name)


def play_env(
    requests: Requests,
    clients: int,
    actions: Sequence[str],
    costs: StageCosts = UNIT_COSTS,
    queues: Sequence[Sequence[int]] | None = None,
    max_prefill_tokens: int = 0,
    every_round: bool = False,
    rules: Sequence[str] = RULES,
) -> Played:
    """Take the named actions, which must be legal, in the environment."""
    mode = "rounds" if every_round else "events"
    env = make_env(clients, costs, max_prefill_tokens, decisions=mode, rules=tuple(rules))
    start(env, requests, queues)
    decisions = []
    for place, name in enumerate(actions):
        now = env.view()
        decisions.append((now.clock_s, now.active, now.waiting))
        assert env.action_masks()[number(name, rules)], f"{name} is illegal at decision {place}"
        env.step(np.int64(number(name, rules)))
    return Played(trace(env.records()), decisions)


def play_reference(
    requests: Requests,
    clients: int,
    actions: Sequence[str],
    costs: StageCosts = UNIT_COSTS,
    queues: Sequence[Sequence[int]] | None = None,
    rules: Sequence[str] = RULES,
    **settings: Any,
) -> Played:
    """Take the same actions in the reference simulator."""
    reference = make_reference(requests, clients, costs, queues, rules, **settings)
    decisions = []
    for name in actions:
        active, waiting = len(reference.running()), len(reference.waiting())
        decisions.append((reference.clock_s, active, waiting))
        reference.step(number(name, rules))
    return Played(trace(reference_records(reference)), decisions)


def reference_records(reference: ReferenceSimulator) -> EpisodeLog:
    """The reference's records in the environment's form."""
    rows = reference.requests
    times = {
        name: np.array([getattr(row, name) for row in rows], dtype=float)
        for name in ("arrival_s", "admitted_s", "first_token_s", "finished_s")
    }
    whole = {"client": "client", "prompt_tokens": "prompt", "decode_rounds": "rounds"}
    ints = {
        name: np.array([-1 if (value := getattr(row, field)) is None else value for row in rows])
        for name, field in whole.items()
    }
    ints |= {
        name: np.zeros(len(rows), int) for name in ("preemptions", "recomputed_tokens", "moves")
    }
    ints["replica"] = np.where(np.isnan(times["admitted_s"]), -1, 0)
    flags = {
        "rejected": np.zeros(len(rows), bool),
        "met_slo": np.isfinite(times["finished_s"]),
        "arrived": np.array([row.arrival_s <= reference.clock_s for row in rows]),
    }
    return EpisodeLog(**times, **ints, **flags, worst_gap_s=np.full(len(rows), np.nan))
