"""The scheduler of SGLang in the slow reference, as AISimulate replays it.

Prefill stages come first and never mix with decode rounds. SGLang takes a request's memory one token
earlier: one that has emitted k tokens counts with p + k, and a round must leave room for p + k + 1.
A prefill is admitted if it fits with its whole output beside a share of what the running requests will
still emit. That share, the ratio, falls with every decode round and is set anew where memory was short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.reference_cluster import ClusterSpec, ReferenceCluster, ReferenceRequest
from tests.reference_cluster_parts import Action, Replica, Stage

FIRST_RATIO = 0.7
LEAST_SHARE = 0.14  # of the first ratio
ROUNDS_TO_LEAST = 600
MOST_RESERVED = 4096  # output tokens of one request
ROUNDS_AHEAD = 20  # which the ratio after a preemption provides for


@dataclass
class Ratio:
    """Share of the outputs to come for which a replica keeps memory free."""

    first: float
    start: float
    rounds: int = 0  # decoded since it was at `start`

    @property
    def now(self) -> float:
        fall = self.first * (1 - LEAST_SHARE) / ROUNDS_TO_LEAST
        return max(self.start - self.rounds * fall, self.first * LEAST_SHARE)


class SglangCluster(ReferenceCluster):
    """A cluster under the guard `sglang`."""

    def __init__(self, requests: Sequence[tuple[float, int, int]], spec: ClusterSpec) -> None:
        # CHOICE: `sum` is a cost of mixed stages, and there are none.
        super().__init__(requests, replace(spec, mixed="one-pass"))
        first = min(FIRST_RATIO * spec.conservativeness, 1.0)
        self.ratios = [Ratio(first, first) for _ in self.replicas]

    def choose(self, replica: Replica) -> Action:
        if self.next_chunks(replica):
            return Action("prefill")
        return Action("decode" if replica.running else "wait")

    # ---- prefill stages ---------------------------------------------------------------------

    def admit_whole(self, replica: Replica, stage: Stage, rule: str) -> None:
        assert rule == "fcfs"
        stage.chunks = self.next_chunks(replica)
        for request, tokens in stage.chunks:
            if request in replica.queue:
                self.admit(replica, request, replica.idle_clients[0])
            replica.take(request, request.computed + tokens)

    def next_chunks(self, replica: Replica) -> list[tuple[ReferenceRequest, int]]:
        """The half-computed prompt, then waiting ones, until one is cut or does not fit.

        CHOICE: where nobody else runs, whatever fits now is admitted; AISimulate would wait for ever.
        """
        length = replica.block_tokens
        begun = [request for request in replica.running if not request.decoding]
        left = self.spec.chunk_tokens or math.inf
        limit = self.spec.max_prefill_tokens or math.inf
        room, others = self.tokens_free(replica), len(replica.running) - len(begun)
        chunks: list[tuple[ReferenceRequest, int]] = []
        for request in begun + replica.queue:
            if others == replica.spec.clients:
                break
            rest = request.todo - request.computed
            tokens = self.cut(rest, left, length, first=not chunks)
            after = request.computed + tokens
            needed = length * (replica.blocks_for(after) - replica.blocks_for(request.computed))
            output = min(request.output - request.emitted, MOST_RESERVED) if tokens == rest else 0
            kept = math.floor(self.spec.watermark * replica.blocks) if room < math.inf else 0
            fits = needed + output + kept * length < room
            if not tokens or (chunks and needed > limit) or (others and not fits):
                break
            chunks.append((request, tokens))
            room, left, limit = room - needed - output, left - needed, limit - needed
            others += 1
            if tokens < rest:
                break
        return chunks

    def cut(self, rest: int, left: float, length: int, *, first: bool) -> int:
        """Whole blocks of a prompt that does not fit into the budget.

        CHOICE: of a budget below one block, all of it.
        """
        if rest <= left:
            return rest
        whole = max(int(left) // length * length, 0)
        return int(left) if first and whole == 0 else whole

    def tokens_free(self, replica: Replica) -> float:
        """Tokens of memory that nobody holds and that are not reserved."""
        held, reserved = 0, 0
        for request in replica.running:
            held += replica.blocks_for(request.computed + request.decoding)
            if request.decoding:
                reserved += min(request.output - request.emitted, MOST_RESERVED)
        free = (replica.blocks - held) * replica.block_tokens
        return free - self.ratios[replica.id].now * reserved

    # ---- decode rounds ----------------------------------------------------------------------

    def make_room(self, replica: Replica, stage: Stage) -> None:
        """Preempt until the round after the next fits, too."""
        ratio = self.ratios[replica.id]
        ratio.rounds += 1
        while True:
            stage.decodes = [request for request in replica.running if request.decoding]
            lacking = sum(replica.lacks(r, r.prompt + r.emitted + 1) for r in stage.decodes)
            if lacking <= replica.free_blocks:
                break
            self.preempt(replica, stage)
        if stage.preempted:
            emitted = sum(r.emitted + ROUNDS_AHEAD for r in stage.decodes)
            ratio.start = min(emitted / (sum(r.output for r in stage.decodes) + 1), 1.0)
            ratio.rounds = 0
        for request in stage.decodes:
            replica.take(request, request.prompt + request.emitted)

    def preemptible(self, replica: Replica) -> list[ReferenceRequest]:
        """Who decodes; CHOICE: the last of them keeps its memory if a half-computed prompt can go."""
        decoding = [request for request in replica.running if request.decoding]
        if len(decoding) > 1:
            return decoding
        return [request for request in replica.running if not request.decoding] or decoding

    def preempt(self, replica: Replica, stage: Stage) -> None:
        """Evict one request, which waits behind all others."""
        super().preempt(replica, stage)
        replica.queue.append(replica.queue.pop(0))
