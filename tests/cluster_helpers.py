"""Shared by the tests of clusters: cases without what only the reference has, and episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from servegym.envs import Requests, ServingEnv, make_requests
from servegym.envs.simulator.state import (
    State,
)
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import InformationConfig
from servegym.envs.vocabulary import STEALS, VICTIMS
from tests.against_cluster import cluster_task
from tests.random_clusters import ClusterCase, balanced, in_step, random_case
from tests.reference_cluster import ClusterSpec
from tests.reference_costs import decode_round_s

MANY_STEPS = 20_000
"""More decisions than any episode of a random case has that comes to an end."""


def informed(lengths: str) -> InformationConfig:
    """What a scheduler knows of output lengths: known, predicted or unknown."""
    return InformationConfig(output_lengths=cast(Any, lengths))


def shared_case(rng: np.random.Generator, **settings: Any) -> ClusterCase:
    """A random case without what only the reference has: two options, and moves unless asked for."""
    case = random_case(rng, **{"moving": False, **settings})
    return ClusterCase(case.requests, replace(case.spec, padded=False, reserve="chunk"))


def ordered_case(
    rng: np.random.Generator, by: str, *, dyadic: bool, moving: bool | None = None
) -> ClusterCase:
    """A case under the rule `shortest`, which goes by `by`; any victim, patience or none."""
    case = shared_case(rng, dyadic=dyadic, moving=moving)
    unit_s = 1.0 if dyadic else 0.05
    spec = replace(
        case.spec,
        shortest_by=by,
        preempt=str(rng.choice(list(VICTIMS))),
        level_tokens=int(rng.integers(1, 20)),
        patience_s=float(rng.choice([np.inf, np.inf, 4.0, 16.0])) * unit_s,
    )
    return ClusterCase(case.requests, spec)


def interval_case(rng: np.random.Generator, *, dyadic: bool) -> tuple[ClusterCase, list[int]]:
    """A case of outputs known by one end of an interval, which may be far from them; and these ends."""
    case = shared_case(rng, dyadic=dyadic, routers=["round-robin", "least-requests", "pool"])
    spec = replace(
        case.spec,
        shortest_by=str(rng.choice(["expected", "expected", "batch"])),
        preempt=str(rng.choice(["fewest-expected", "fewest-expected", "newest"])),
        admission_guard=str(rng.choice(["peak", "peak", "none"])),
    )
    outputs = np.array([output for _, _, output in case.requests])
    ends = np.maximum(np.rint(outputs * rng.choice([0.1, 0.5, 1.0, 2.0], len(outputs))), 1)
    return ClusterCase(case.requests, spec), ends.astype(int).tolist()


def stealing_case(rng: np.random.Generator, **settings: Any) -> ClusterCase:
    """A case with moves, and both kinds of theft wherever there is something to steal from."""
    case = shared_case(rng, **{"moving": True, **settings})
    if len(case.spec.replicas) == 1 or case.spec.router == "pool":
        return case
    return ClusterCase(case.requests, replace(case.spec, steals=tuple(STEALS)))


def balancing_case(rng: np.random.Generator, *, dyadic: bool) -> ClusterCase:
    """A case with moves in which replicas balance their load, or turn away who is late."""
    case = shared_case(rng, dyadic=dyadic, moving=True)
    return balanced(rng, case, 1.0 if dyadic else decode_round_s(case.spec.costs, 1, 0))


def planned_case(rng: np.random.Generator, *, dyadic: bool) -> ClusterCase:
    """A case for the rules by length and by plan: still, moving, balancing, in step; also routed by plan."""
    kind = str(rng.choice(["still", "moving", "moving", "balancing"]))
    if kind == "balancing":
        case = balancing_case(rng, dyadic=dyadic)
    else:
        case = shared_case(rng, dyadic=dyadic, moving=kind == "moving")
    alike = all(part.role == "both" for part in case.spec.replicas)
    if alike and rng.random() < 0.15:
        case = ClusterCase(case.requests, replace(case.spec, router="plan"))
    return in_step(rng, case) if dyadic and rng.random() < 0.3 else case


def requests_of(case: ClusterCase, predicted: Sequence[int] | None = None) -> Requests:
    """The requests in the order of their rows; `predicted` names a length for each row."""
    arrivals, prompts, outputs = (np.array(column) for column in zip(*case.requests, strict=True))
    return make_requests(
        prompts, outputs, arrivals, None if predicted is None else np.array(predicted)
    )


def task_of(spec: ClusterSpec, **process: Any) -> TaskConfig:
    """The task of a reference's settings, with keys of `[process]`."""
    task = cluster_task(spec)
    return replace(task, process=replace(task.process, **process))


def play_eagerly(env: ServingEnv, action: str) -> tuple[float, dict[str, Any]]:
    """Take an action wherever it is legal, else the first that is; return the return and last info."""
    chosen = env.task.actions.index(action)
    total, over, info = 0.0, False, dict[str, Any]()
    while not over:
        mask = env.action_masks()
        taken = chosen if mask[chosen] else int(np.argmax(mask))
        _, reward, terminated, truncated, info = env.step(np.int64(taken))
        assert not info["illegal_action"]
        total += float(reward)
        over = terminated or truncated
    return total, info


def play_any(
    env: ServingEnv, rng: np.random.Generator, watch: Callable[[], None], prefer: str = "decode"
) -> tuple[float, dict[str, Any]]:
    """Take random legal actions to the end; `watch` looks before each.

    Half of the time it is the first legal one of a kind, or of all.
    """
    kind = np.array([name.startswith(prefer) for name in env.task.actions])
    total, over, steps, info = 0.0, False, 0, dict[str, Any]()
    while not over:
        steps += 1
        assert steps < MANY_STEPS
        watch()
        mask = env.action_masks()
        legal = np.flatnonzero(mask)
        first = np.flatnonzero(mask & kind)[:1]
        taken = int([*first, *legal][0] if rng.random() < 0.5 else rng.choice(legal))
        _, reward, terminated, truncated, info = env.step(np.int64(taken))
        assert not info["illegal_action"]
        total += float(reward)
        over = terminated or truncated
    watch()
    return total, info


def assert_empty(state: State) -> None:
    """At the end nobody holds, wants or is on the way to anything."""
    replicas, episode = state.replicas[0], state.episodes[0]
    for name in ("used_blocks", "cached_tokens", "active", "due_sum"):
        assert not replicas[name].any(), name
    for name in ("coming", "coming_blocks", "incoming", "incoming_blocks", "leaving"):
        assert not replicas[name].any(), name
    assert (replicas.idle == state.machines.clients).all()
    assert not state.residues[0].any()
    for name in ("waiting", "rounds", "tokens", "blocks", "squares_high", "squares_low", "unseen"):
        assert not state.queues[0][name].any(), name
    assert not state.waiting_lengths[0].any()
    assert not state.clients[0]["queue_rounds"].any()
    assert episode.in_system == 0
    assert episode.transfers == 0
