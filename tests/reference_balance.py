"""Which requests the slow reference takes where replicas balance their load, and whom it turns away.

Half of an imbalance, migration by free memory, times between thefts; requests that come too late.
"""

from __future__ import annotations

import math

from tests.reference_cluster_parts import ClusterSpec, Move, ReferenceRequest, Replica
from tests.reference_costs import prefill_s


class Balancing:
    """The part of the cluster that says from where to where requests move, and who is shed."""

    spec: ClusterSpec
    replicas: list[Replica]
    clock_s: float
    moves: list[Move]
    sheds: int

    def coming(self, replica: Replica) -> int:
        raise NotImplementedError

    def present(self, replica: Replica) -> int:
        raise NotImplementedError

    def stealable(self, replica: Replica) -> list[ReferenceRequest]:
        raise NotImplementedError

    def victims_of(self, thief: Replica) -> list[Replica]:
        raise NotImplementedError

    def excess(self, source: Replica, thief: Replica) -> int:
        """How many more wait at the source than at the thief or on their way there."""
        return len(source.queue) - len(thief.queue) - self.coming(thief)

    def most_taken(self, source: Replica, thief: Replica, room: int) -> int:
        """How many waiting requests a thief may take from a queue."""
        if self.spec.steal_share == "half":
            return min(room, math.ceil(self.excess(source, thief) / 2))
        return room

    def frozen(self, thief: Replica) -> bool:
        """Whether it is too early for another running request; those of one instant are one theft."""
        since_s = self.clock_s - thief.stole_s
        return 0 < since_s < self.spec.steal_period_s

    def source_for(self, thief: Replica) -> Replica | None:
        """From where a thief may take a running request."""
        if self.spec.migrate == "freeness":
            return self.paired_source(thief)
        least = self.present(thief) + 2
        busy = [s for s in self.victims_of(thief) if len(self.stealable(s)) >= least]
        return max(busy, key=lambda s: (len(self.stealable(s)), -s.id)) if busy else None

    def paired_source(self, thief: Replica) -> Replica | None:
        """The k-th of those short of memory for the k-th of those that have most, one at a time."""
        free = {replica: self.freeness(replica) for replica in self.replicas}
        short = {r for r in free if free[r] < self.spec.freeness_steps or self.has_preempted(r)}
        ample = {r for r in free if free[r] > self.spec.freeness_steps and r not in short}
        sources = sorted(short, key=lambda r: (free[r], r.id))
        targets = sorted(ample, key=lambda r: (-free[r], r.id))
        pairs = dict(zip(targets, sources, strict=False))
        source = pairs.get(thief)
        if source not in self.victims_of(thief) or not self.stealable(source):
            return None
        leaving = any(move.leaving and move.source is source for move in self.moves)
        return None if leaving or thief.reserved else source

    def freeness(self, replica: Replica) -> float:
        """Free blocks less those wanted by waiting prompts, a request."""
        return math.inf if replica.blocks == math.inf else -replica.view().score("llumnix")

    def has_preempted(self, replica: Replica) -> bool:
        return bool(replica.queue) and replica.queue[0].preemptions > 0

    def moved(self, source: Replica) -> ReferenceRequest:
        """Which running request moves: most rounds left, or fewest tokens in memory."""
        if self.spec.migrate == "longest":
            return min(
                self.stealable(source), key=lambda r: (r.emitted - r.output, r.arrival_s, r.id)
            )
        return min(self.stealable(source), key=lambda r: (r.held_tokens, r.arrival_s, r.id))

    def shed_late(self, replica: Replica) -> None:
        """Turn away whoever waits in vain: its first token would come too late if it were alone."""
        alike = self.replicas if self.spec.router == "pool" else [replica]
        for request in list(replica.queue):
            alone_s = prefill_s(self.spec.costs, request.todo, request.todo**2, 1)
            soonest_s = self.clock_s + min(alone_s / other.spec.speed for other in alike)
            if request.admitted_s is None and soonest_s > request.arrival_s + self.spec.shed_s:
                replica.queue.remove(request)
                request.phase = "shed"
                self.sheds += 1
