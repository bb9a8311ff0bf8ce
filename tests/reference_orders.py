"""The slow reference under the other orders of the rule `shortest`, and where lengths lie in intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tests.reference_cluster import ClusterSpec, ReferenceRequest
from tests.reference_cluster_parts import Replica
from tests.reference_shortest import ShortestCluster


class OrderedCluster(ShortestCluster):
    """Whoever `spec.shortest_by` puts first; the first in line goes before it once it has lost patience."""

    def __init__(self, requests: Sequence[tuple[float, int, int]], spec: ClusterSpec) -> None:
        super().__init__(requests, spec)
        self.sequences: dict[int, list[ReferenceRequest]] = {}  # by queue, of `batch`
        self.rank = {request.id: rank for rank, request in enumerate(self.future)}

    def believed(self, request: ReferenceRequest) -> int:
        """The output that the scheduler expects."""
        return request.output

    def candidate(self, replica: Replica, rule: str, client: int) -> ReferenceRequest | None:
        queue, by = replica.queue, self.spec.shortest_by
        if not queue:
            return None
        if self.clock_s >= self.patient_until(queue[0]):
            return queue[0]
        if by == "batch":
            return self.in_sequence(replica)[0]
        if by == "length":
            return super().candidate(replica, rule, client)
        if by == "expected":  # of equal ones the last to come, as `length` has it
            return min(queue, key=lambda r: (self.believed(r), -self.rank[r.id]))
        keys = {
            "prompt": lambda r: r.prompt,
            "deadline": lambda r: r.arrival_s,
            "level": self.level,
        }
        return min(queue, key=lambda r: (keys[by](r), self.rank[r.id]))

    def level(self, request: ReferenceRequest) -> int:
        """How often the first level must be doubled to hold prompt and emitted tokens."""
        level, most = 0, self.spec.level_tokens
        tokens = request.prompt + request.emitted - (request.stored is not None)
        while tokens > most:
            level, most = level + 1, 2 * most
        return level

    def victim(self, replica: Replica) -> ReferenceRequest:
        newest_first = self.preemptible(replica)[::-1]
        if self.spec.preempt == "fewest-expected":
            return min(newest_first, key=self.believed)
        if self.spec.preempt == "lowest-level":
            return max(newest_first, key=self.level)
        return super().victim(replica)

    # ---- batches ----------------------------------------------------------------------------

    def in_sequence(self, replica: Replica) -> list[ReferenceRequest]:
        """Who waits, in the sequence made when somebody was last found waiting who was not in it."""
        queue = replica.queue
        sequence = self.sequences.get(id(queue), [])
        if any(request not in sequence for request in queue):
            sequence = self.batches(replica, list(queue))
        sequence = [request for request in sequence if request in queue]
        self.sequences[id(queue)] = sequence
        return sequence

    def admit(self, replica: Replica, request: ReferenceRequest, client: int) -> None:
        super().admit(replica, request, client)
        for sequence in self.sequences.values():  # should it come back, it is somebody new
            if request in sequence:
                sequence.remove(request)

    def batches(self, replica: Replica, left: list[ReferenceRequest]) -> list[ReferenceRequest]:
        """Batch after batch with the least sum of outputs over squared size; within one, shortest first.

        Tried are the beginnings of two orders, by output and by prompt plus output, as far as they fit. Of
        equal ones the larger, then the one by output.
        """
        sequence: list[ReferenceRequest] = []
        while left:
            by_output = sorted(left, key=lambda r: (self.output_left(r), self.rank[r.id]))
            by_size = sorted(left, key=lambda r: (self.size(r), self.rank[r.id]))
            best: list[ReferenceRequest] = []
            least = math.inf
            for order in (by_output, by_size):
                for size in range(len(order), 0, -1):
                    batch = order[:size]
                    value = sum(self.output_left(r) for r in batch) / (size * size)
                    if (size == 1 or self.fits_alone(replica, batch)) and (
                        value < least or (value == least and size > len(best))
                    ):
                        best, least = batch, value
            sequence += [request for request in by_output if request in best]
            left = [request for request in left if request not in best]
        return sequence

    def output_left(self, request: ReferenceRequest) -> int:
        return self.believed(request) - request.emitted

    def rounds_left(self, request: ReferenceRequest) -> int:
        """Decode rounds after its prefill, which emits a token; after a fetch, which emits none."""
        return self.output_left(request) - (request.stored is None)

    def size(self, request: ReferenceRequest) -> int:
        """Tokens that it holds in the end."""
        return request.wanted_tokens + self.rounds_left(request)

    def fits_alone(self, replica: Replica, batch: list[ReferenceRequest]) -> bool:
        """Whether the replica, were it empty, could begin all of them at once and see them to their ends."""
        if len(batch) > replica.spec.clients:
            return False
        for rounds in range(max(self.rounds_left(r) for r in batch) + 1):
            lasting = [r for r in batch if self.rounds_left(r) >= rounds]
            if sum(replica.blocks_for(r.wanted_tokens + rounds) for r in lasting) > replica.blocks:
                return False
        return True


class IntervalCluster(OrderedCluster):
    """Nobody knows the outputs, but one end of an interval for each; who outlives it is taken to end next."""

    ends: Sequence[int] = ()  # by row

    def believed(self, request: ReferenceRequest) -> int:
        return max(self.ends[request.id], request.emitted + 1)

    def peak(self, replica: Replica, together: list[ReferenceRequest]) -> int:
        copies = [replace(request, output=self.believed(request)) for request in together]
        return super().peak(replica, copies)
