"""An offline plan: which client serves which requests, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servegym.envs.arguments import whole_numbers
from servegym.envs.errors import ServegymError, shown
from servegym.envs.workload.scoring import Scoring

_MAX_ID: Final = np.iinfo(np.int32).max  # the kernels hold request ids in 32 bits


@dataclass(frozen=True, eq=False)
class Plan:
    """Queues of request ids, one per client, laid out one after another.

    Client ``j`` serves ``order[offsets[j]:offsets[j + 1]]`` in that order. Every request stands in
    at most one queue; a request in no queue joins the shortest one when it is first seen.

    Raises
    ------
    ServegymError
        If an array holds anything but whole numbers ≥ 0 in one dimension, a request is planned twice or
        the offsets do not span the order.

    Examples
    --------
    >>> plan = plan_from_queues([[0, 2], [1]])
    >>> plan.clients, plan.queue(0)
    (2, array([0, 2]))
    """

    order: NDArray[np.int64]  # (planned requests,) request ids
    offsets: NDArray[np.int64]  # (clients + 1,) where each client's queue begins
    scoring: Scoring | None = None
    """What the rule ``scored`` goes by; None: the usual weights, without a calendar."""

    def __post_init__(self) -> None:
        for name in ("order", "offsets"):
            checked = whole_numbers(f"plan {name}", getattr(self, name), 0, _MAX_ID)
            object.__setattr__(self, name, checked)
        steps = np.diff(self.offsets)
        least = 2 if self.scoring is None else 1
        if len(self.offsets) < least or self.offsets[0] != 0 or np.any(steps < 0):
            raise ServegymError("plan offsets must start at 0 and not decrease")
        if self.offsets[-1] != len(self.order):
            raise ServegymError(
                f"plan offsets end at {self.offsets[-1]}, but {len(self.order)} requests are planned"
            )
        if len(np.unique(self.order)) != len(self.order):
            raise ServegymError("a plan names each request at most once")

    @property
    def has_queues(self) -> bool:
        """Whether it says anything about queues; a plan made for its scoring need not."""
        return self.clients > 0

    @property
    def clients(self) -> int:
        """Number of clients of the plan."""
        return len(self.offsets) - 1

    def queue(self, client: int) -> NDArray[np.int64]:
        """Request ids of one client's queue, in order."""
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def loads(self, rounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Total decode rounds of each client's queue, shape (clients,)."""
        totals = np.concatenate(([0], np.cumsum(rounds[self.order])))
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]


def plan_from_queues(queues: Sequence[ArrayLike] | NDArray[np.integer]) -> Plan:
    """Build a plan from one sequence of request ids per client.

    Raises
    ------
    ServegymError
        If ``queues`` is no sequence of such sequences, or a request is planned twice.

    Examples
    --------
    >>> plan_from_queues([[0, 2], [1]]).order
    array([0, 2, 1])
    """
    given: object = queues
    listed = isinstance(given, Sequence) or (isinstance(given, np.ndarray) and given.ndim > 0)
    if not listed or isinstance(given, str | bytes):
        raise ServegymError(
            f"a plan is made from a list of request ids per client, got {shown(queues)}"
        )
    checked = [
        whole_numbers(f"queue of client {j}", queue, 0, _MAX_ID) for j, queue in enumerate(queues)
    ]
    order = np.concatenate([np.zeros(0, np.int64), *checked])
    return Plan(order, np.cumsum([0, *(len(queue) for queue in checked)]))


def plan_by_scores(scoring: Scoring) -> Plan:
    """Return a plan that holds no queues, only what the rule ``scored`` goes by.

    Examples
    --------
    >>> plan_by_scores(Scoring()).has_queues
    False
    """
    return Plan(np.zeros(0, np.int64), np.zeros(1, np.int64), scoring)
