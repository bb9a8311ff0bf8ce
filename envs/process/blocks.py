"""The blocks of the observation, and how a task's are put together.

``[process] observe`` names them. The sizes depend on no number of clients, requests or replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.actions import Settings
from servegym.envs.process.observation import FEATURES, OBSERVATION_SIZE, observe_replica
from servegym.envs.process.observed_cluster import CLUSTER_FEATURES, observe_cluster
from servegym.envs.process.observed_latency import LATENCY_FEATURES, observe_latency
from servegym.envs.process.observed_memory import MEMORY_FEATURES, observe_memory
from servegym.envs.simulator.state import State
from servegym.envs.vocabulary import OBSERVATION_BLOCKS

BLOCK_FEATURES: Final[dict[str, tuple[str, ...]]] = {
    "replica": FEATURES,
    "memory": MEMORY_FEATURES,
    "cluster": CLUSTER_FEATURES,
    "latency": LATENCY_FEATURES,
}
"""What each entry of each block means; no two entries have the same name."""

_REPLICA, _MEMORY, _CLUSTER, _LATENCY = (1 << k for k in range(len(OBSERVATION_BLOCKS)))


def features_of(blocks: Iterable[str]) -> tuple[str, ...]:
    """Return what each entry of an observation of these blocks means.

    Examples
    --------
    >>> features_of(["cluster", "replica"])[65]
    '1 / replicas'
    """
    named = set(blocks)
    return tuple(
        feature
        for block in OBSERVATION_BLOCKS
        if block in named
        for feature in BLOCK_FEATURES[block]
    )


def block_of(feature: str) -> str | None:
    """Return the block that has a feature; None where none has.

    Examples
    --------
    >>> block_of("1 / replicas"), block_of("weather")
    ('cluster', None)
    """
    return next((block for block, names in BLOCK_FEATURES.items() if feature in names), None)


@kernel
def observe(
    state: State,
    costs: CostTables,
    settings: Settings,
    e: int,
    r: int,
    out: NDArray[np.float32],
) -> None:
    """Write the task's observation of replica ``r`` in environment ``e`` into ``out`` (features,)."""
    at = 0
    if settings.observes & _REPLICA:
        observe_replica(state, costs, e, r, out)
        at = OBSERVATION_SIZE
    if settings.observes & _MEMORY:
        observe_memory(state, e, r, at, out)
        at += len(MEMORY_FEATURES)
    if settings.observes & _CLUSTER:
        observe_cluster(state, costs, e, r, at, out)
        at += len(CLUSTER_FEATURES)
    if settings.observes & _LATENCY:
        observe_latency(state, costs, e, r, at, out)
