"""The slow reference under shortest first, with patience."""

from __future__ import annotations

from tests.reference_cluster import ReferenceCluster, ReferenceRequest
from tests.reference_cluster_parts import Action, Replica


class ShortestCluster(ReferenceCluster):
    """Shortest output first, of equal ones the last to come; the first in line goes before it if it has
    been there for `patience_s` since it came.
    """

    def choose(self, replica: Replica) -> Action:
        action = super().choose(replica)
        return Action(action.kind, "shortest")

    def candidate(self, replica: Replica, rule: str) -> ReferenceRequest | None:
        if not replica.queue:
            return None
        first = replica.queue[0]
        if self.clock_s - first.arrival_s >= self.spec.patience_s:
            return first
        return min(replica.queue, key=lambda r: (r.output, -r.arrival_s, -r.id))
