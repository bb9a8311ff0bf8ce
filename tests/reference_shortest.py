"""The slow reference under shortest first, with patience."""

from __future__ import annotations

import math

from tests.reference_cluster import ReferenceCluster, ReferenceRequest
from tests.reference_cluster_parts import Action, Replica


class ShortestCluster(ReferenceCluster):
    """Shortest output first, of equal ones the last to come; the first in line goes before it if it has
    been there for `patience_s` since it came.
    """

    def patient_until(self, request: ReferenceRequest) -> float:
        return request.arrival_s + self.spec.patience_s

    def event_times(self) -> list[float]:
        """Patience ends for a replica that has no stage, as nobody may fit before."""
        idle = [r for r in self.replicas if not r.stage and r.queue and r.idle_clients]
        ends = [self.patient_until(replica.queue[0]) for replica in idle]
        return super().event_times() + [s for s in ends if self.clock_s < s < math.inf]

    def choose(self, replica: Replica) -> Action:
        action = super().choose(replica)
        return Action(action.kind, "shortest")

    def candidate(self, replica: Replica, rule: str, client: int) -> ReferenceRequest | None:
        if not replica.queue:
            return None
        first = replica.queue[0]
        if self.clock_s >= self.patient_until(first):
            return first
        return min(replica.queue, key=lambda r: (r.output, -r.arrival_s, -r.id))
