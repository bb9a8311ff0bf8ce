"""A slow, obvious reference of the cluster: replicas, memory in blocks, preemption, chunked prompts.

Token by token and stage by stage: lists and loops, no kernel, no closed form. The fast core must agree
with this file. What the rules leave open is decided simply, in a comment that begins with CHOICE.
Words: a request of prompt p that has emitted k of its o tokens holds keys and values of p + k − 1
tokens between stages; the round that reads its newest token needs room for p + k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.reference_cluster_moves import Moving
from tests.reference_cluster_parts import (
    GUARDS,
    HOST,
    ROUTERS,
    VICTIMS,
    Action,
    ClusterSpec,
    Move,
    ReferenceRequest,
    Replica,
    ReplicaSpec,
    Stage,
    StageRecord,
    View,
    stage_s,
)

__all__ = [  # also what it is made of
    "GUARDS",
    "ROUTERS",
    "VICTIMS",
    "Action",
    "ClusterSpec",
    "Outcome",
    "ReferenceCluster",
    "ReferenceRequest",
    "ReplicaSpec",
    "StageRecord",
    "serve",
]


@dataclass(frozen=True)
class Outcome:
    """What has happened: a record a request, in order of row, and all stages in order of start."""

    records: list[ReferenceRequest]
    stages: list[StageRecord]
    clock_s: float
    moves: list[Move]  # in order of their making

    @property
    def preemptions(self) -> int:
        return sum(record.preemptions for record in self.records)

    @property
    def makespan_s(self) -> float:
        return max((record.finished_s or 0.0 for record in self.records), default=0.0)


class ReferenceCluster(Moving):
    """A cluster under one rule of decision, `choose`; override it for another policy."""

    def __init__(self, requests: Sequence[tuple[float, int, int]], spec: ClusterSpec) -> None:
        self.spec = spec
        self.records = [ReferenceRequest(i, *row) for i, row in enumerate(requests)]
        self.future = sorted(self.records, key=lambda request: (request.arrival_s, request.id))
        pool: list[ReferenceRequest] = []
        self.replicas = [
            Replica(i, part, spec.kv_block_tokens, pool if spec.router == "pool" else [])
            for i, part in enumerate(spec.replicas)
        ]
        self.clock_s = 0.0
        self.routed = 0
        self.looked_s = 0.0
        self.views: list[View] = []
        self.stages: list[StageRecord] = []
        self.evictions = self.sheds = 0
        self.moves: list[Move] = []  # under way, in order of their making
        self.made: list[Move] = []  # all

    # ---- the clock --------------------------------------------------------------------------

    def run(self) -> Outcome:
        while self.next_event():
            pass
        left = [r.id for r in self.records if r.phase != "finished" and not r.rejected]
        assert not left, f"nothing happens any more, but requests {left} are not finished"
        return Outcome(self.records, self.stages, self.clock_s, self.made)

    def next_event(self) -> bool:
        """Go to the next time; serve transfers, arrivals, stages that end, joins, idle replicas.

        Replicas that stay idle are asked again, by number, as long as one of them evicts, steals or fetches
        somebody or begins a stage: what a later one leaves may suit an earlier one.
        """
        times = self.event_times()
        if not times:
            return False
        self.clock_s = min(times)
        self.transfer()
        while self.future and self.future[0].arrival_s == self.clock_s:
            self.arrive(self.future.pop(0))
        for replica in self.replicas:
            if replica.stage and replica.stage.end_s == self.clock_s:
                self.end_stage(replica, replica.stage)
                self.leave_at_boundary(replica)
        for replica in self.replicas:
            if not replica.stage:
                self.join(replica)
        again = True
        while again:
            changes = self.evictions + self.sheds + len(self.made)
            idle = [replica for replica in self.replicas if not replica.stage]
            for replica in idle:
                self.begin_stage(replica)
            again = self.evictions + self.sheds + len(self.made) > changes
            again |= any(replica.stage for replica in idle)
        return True

    def event_times(self) -> list[float]:
        """When something will happen; override it where a rule changes its mind as time passes."""
        times = [request.arrival_s for request in self.future[:1]]
        times += [replica.stage.end_s for replica in self.replicas if replica.stage]
        return times + [move.due_s for move in self.moves if move.due_s < math.inf]

    # ---- arrivals and routing ---------------------------------------------------------------

    def arrive(self, request: ReferenceRequest) -> None:
        holding = [replica for replica in self.replicas if replica.could_ever_hold(request)]
        fitting = [replica for replica in holding if replica.spec.role != "decode"]
        if not fitting or all(replica.spec.role == "prefill" for replica in holding):
            request.phase = "rejected"
            return
        request.phase = "waiting"
        request.todo = request.prompt
        if self.spec.router == "pool":
            self.replicas[0].queue.append(request)
            return
        replica = self.route(request, fitting)
        request.replica = replica.id
        replica.queue.append(request)
        self.routed += 1

    def route(self, request: ReferenceRequest, fitting: list[Replica]) -> Replica:
        """CHOICE: of replicas with different memory only those that can hold the request count.

        Where a turn or a draw names another, the next number that can takes the request.
        """
        router, count = self.spec.router, len(self.replicas)
        if router == "first":
            return fitting[0]
        if router in ("round-robin", "random"):
            turn = self.spec.draws[self.routed] if router == "random" else self.routed
            return min(fitting, key=lambda replica: (replica.id - turn) % count)
        views = self.look()
        chosen = min(fitting, key=lambda replica: (views[replica.id].score(router), replica.id))
        views[chosen.id] = views[chosen.id].with_one_more(request, chosen)
        return chosen

    def look(self) -> list[View]:
        """The replicas as their router sees them, by id.

        Admissions and evictions are seen from the start of their stage on, tokens and finishes from
        its end. A stale router looks at all replicas, keeps what it has seen for `staleness_s`, and adds
        what it sends meanwhile.
        """
        if not self.views or self.clock_s - self.looked_s >= self.spec.staleness_s:
            self.looked_s = self.clock_s
            self.views = [replica.view() for replica in self.replicas]
        return self.views

    # ---- decisions --------------------------------------------------------------------------

    def choose(self, replica: Replica) -> Action:
        """Chunked: a pass whenever there is something to do. Else prefill first, then decode."""
        if self.spec.chunk_tokens > 0:
            return Action("mixed" if replica.queue or replica.running else "wait")
        given = (self.candidate(replica, "fcfs", client) for client in replica.idle_clients)
        head = next((request for request in given if request), None)
        if head and self.memory_allows(replica, head):
            return Action("prefill")
        return Action("decode" if replica.running else "wait")

    def candidate(self, replica: Replica, rule: str, client: int) -> ReferenceRequest | None:
        """The waiting request that a rule gives an idle client next; override it for rules of your own."""
        assert rule == "fcfs"
        return replica.queue[0] if replica.queue else None

    def begin_stage(self, replica: Replica) -> None:
        """Shed, steal what may be stolen, then decide; if that was only a fetch, all once more."""
        fetched = True
        while fetched:
            self.shed_late(replica)
            # Who waits first; with less room another may be the first of those taken from a queue.
            while self.steal_waiting(replica) or self.steal_running(replica):
                self.shed_late(replica)
            fetched = self.decide(replica)

    def decide(self, replica: Replica) -> bool:
        """Begin a stage if there is one; return whether requests were fetched and nothing else."""
        action = self.choose(replica)
        stage = Stage(replica.id, self.clock_s, 0.0, [], [], [])
        if action.kind == "prefill":
            self.admit_whole(replica, stage, action.rule)
        elif action.kind == "decode":
            self.make_room(replica, stage)
        elif action.kind == "mixed":
            self.make_room(replica, stage)
            self.continue_prompts(replica, stage)
            if not stage.preempted:
                self.admit_chunks(replica, stage, action.rule)
        if not stage.decodes and not stage.chunks:
            return stage.fetched
        # CHOICE: `sum` is a cost of chunked passes; prefill-first stages cost what they cost.
        mixed = self.spec.mixed if self.spec.chunk_tokens > 0 else "one-pass"
        seconds = stage_s(self.spec.costs, mixed, stage.decodes, stage.chunks)
        stage.seconds = seconds / replica.spec.speed
        replica.stage = stage
        self.log(replica, stage)
        return False

    def log(self, replica: Replica, stage: Stage) -> None:
        kind = "mixed" if stage.decodes and stage.chunks else "prefill"
        self.stages.append(
            StageRecord(
                replica=replica.id,
                kind="decode" if not stage.chunks else kind,
                start_s=stage.start_s,
                seconds=stage.seconds,
                decodes=tuple(request.id for request in stage.decodes),
                chunks=tuple((request.id, tokens) for request, tokens in stage.chunks),
                preempted=tuple(request.id for request in stage.preempted),
                free_blocks=replica.free_blocks,
            )
        )

    # ---- what a stage takes -----------------------------------------------------------------

    def admit_whole(self, replica: Replica, stage: Stage, rule: str) -> None:
        """Take waiting requests until one does not fit: clients, budget, memory. No skipping.

        A client for whom the rule has nobody stays idle.
        """
        for client in replica.idle_clients:
            request = self.candidate(replica, rule, client)
            if request is None:
                continue
            if not self.memory_allows(replica, request):
                return
            if request.stored is not None:
                self.fetch(replica, request, client, stage)
                continue
            if stage.chunks and self.over_budget([tokens for _, tokens in stage.chunks], request):
                return
            self.admit(replica, request, client)
            replica.take(request, request.todo)
            stage.chunks.append((request, request.todo))

    def over_budget(self, taken: list[int], request: ReferenceRequest) -> bool:
        counts = [*taken, request.todo]
        tokens = len(counts) * max(counts) if self.spec.padded else sum(counts)
        return 0 < self.spec.max_prefill_tokens < tokens

    def make_room(self, replica: Replica, stage: Stage) -> None:
        """Preempt until every decode of the replica has room for the token that it reads.

        CHOICE: the victim is one of all that run, whether it lacks blocks or not.
        """
        while True:
            stage.decodes = [request for request in replica.running if request.decoding]
            lacking = sum(replica.lacks(r, r.prompt + r.emitted) for r in stage.decodes)
            if lacking <= replica.free_blocks:
                break
            self.preempt(replica, stage)
        for request in stage.decodes:
            replica.take(request, request.prompt + request.emitted)

    def continue_prompts(self, replica: Replica, stage: Stage) -> None:
        """Prompts already begun, in order of admission; one that lacks blocks preempts.

        CHOICE: what a victim gives back does not lengthen the chunk that evicted it.
        """
        for request in list(replica.running):
            left = self.budget_left(stage)
            if request not in replica.running or request.decoding or left <= 0:
                continue
            tokens = min(request.todo - request.computed, left)
            after = request.computed + tokens
            while request in replica.running and (
                replica.lacks(request, after) > replica.free_blocks
            ):
                self.preempt(replica, stage)
            if request in replica.running:
                replica.take(request, after)
                stage.chunks.append((request, tokens))

    def admit_chunks(self, replica: Replica, stage: Stage, rule: str) -> None:
        """Waiting requests until one does not fit; the whole prompt must fit, a chunk is taken."""
        for client in replica.idle_clients:
            if self.budget_left(stage) <= 0:
                return
            request = self.candidate(replica, rule, client)
            if request is None:
                continue
            if not self.memory_allows(replica, request):
                return
            if request.stored is not None:
                self.fetch(replica, request, client, stage)
                continue
            tokens = min(request.todo, self.budget_left(stage))
            self.admit(replica, request, client)
            replica.take(request, request.todo if self.spec.reserve == "prompt" else tokens)
            stage.chunks.append((request, tokens))

    def budget_left(self, stage: Stage) -> int:
        taken = len(stage.decodes) + sum(tokens for _, tokens in stage.chunks)
        return self.spec.chunk_tokens - taken

    def admit(self, replica: Replica, request: ReferenceRequest, client: int) -> None:
        """Give a waiting request an idle client."""
        replica.queue.remove(request)
        request.stolen = False
        request.client = client
        request.replica = replica.id
        request.phase = "running"
        if request.admitted_s is None:
            request.admitted_s = self.clock_s
        replica.running.append(request)

    # ---- memory -----------------------------------------------------------------------------

    def memory_allows(self, replica: Replica, request: ReferenceRequest) -> bool:
        """Whether the whole prefill fits now, above the watermark, and the guard allows it.

        CHOICE: a guard comes on top of this and compares with the whole memory, not the watermark.
        """
        wanted = self.blocks_to_admit(replica, request)
        if wanted + self.watermark(replica) > replica.free_blocks:
            return False
        return self.guard_allows(replica, request)

    def blocks_to_admit(self, replica: Replica, request: ReferenceRequest) -> int:
        """Blocks that must be free for a waiting request.

        A fetch also wants a round of everybody. Else two requests of a full memory may fetch and evict
        each other for ever.
        """
        if request.stored is None:
            return replica.blocks_for(request.wanted_tokens)
        wanted = replica.blocks_for(request.wanted_tokens + 1) + len(replica.reserved)
        decoding = [r for r in replica.running if r.decoding]
        return wanted + sum(replica.lacks(r, r.prompt + r.emitted) for r in decoding)

    def guard_allows(self, replica: Replica, request: ReferenceRequest) -> bool:
        """Whether whole outputs fit, beside those that run; where nobody does, the guard does not bind.

        A pool may offer a request to a replica that is too small for all of it.
        """
        if replica.held_clients == 0:
            return True
        together = [*replica.running, request]
        if self.spec.admission_guard == "full":
            wholes = [replica.blocks_for(r.prompt + r.output) for r in together]
            return sum(wholes) + replica.reserved_blocks <= replica.blocks
        if self.spec.admission_guard == "peak":
            return self.peak(replica, together) + replica.reserved_blocks <= replica.blocks
        return True

    def watermark(self, replica: Replica) -> int:
        """Blocks that stay free while a client is held or reserved."""
        return math.floor(self.spec.watermark * replica.blocks) if replica.watermark_binds else 0

    def peak(self, replica: Replica, together: list[ReferenceRequest]) -> int:
        """Most blocks held at once if these end their prefills now and then decode side by side.

        CHOICE: prompts begun and admitted count as computed in this stage, whatever the chunks, and
        nobody decodes meanwhile.
        """
        highest, rounds = 0, 0
        while True:
            held = []
            for request in together:
                prefills = not request.decoding and request.stored is None
                first = request.prompt + request.emitted - (0 if prefills else 1)
                rounds_left = request.output - request.emitted - (1 if prefills else 0)
                if rounds <= rounds_left:
                    held.append(replica.blocks_for(first + rounds))
            if not held:
                return highest
            highest = max(highest, sum(held))
            rounds += 1

    def preempt(self, replica: Replica, stage: Stage) -> None:
        """Evict one request: it loses its blocks, its client and its part of this stage."""
        victim = self.victim(replica)
        self.void(victim)
        if victim.decoding and self.spec.preempt_to == "host":
            victim.stored = HOST
        else:
            victim.todo = victim.prompt + victim.emitted
            victim.computed = 0
        replica.running.remove(victim)
        replica.queue.insert(0, victim)
        victim.phase = "waiting"
        victim.blocks = 0
        victim.preemptions += 1
        self.evictions += 1
        stage.preempted.append(victim)
        stage.decodes = [request for request in stage.decodes if request is not victim]
        stage.chunks = [chunk for chunk in stage.chunks if chunk[0] is not victim]

    def victim(self, replica: Replica) -> ReferenceRequest:
        """Of equal outputs the longest prompt, as SGLang. CHOICE: of equal ones the newest."""
        newest_first = self.preemptible(replica)[::-1]
        if self.spec.preempt == "least-computed":
            return min(newest_first, key=lambda request: request.computed)
        if self.spec.preempt == "fewest-output":
            return min(newest_first, key=lambda request: (request.emitted, -request.prompt))
        assert self.spec.preempt == "newest"
        return newest_first[0]

    def preemptible(self, replica: Replica) -> list[ReferenceRequest]:
        return replica.running

    # ---- the end of a stage -----------------------------------------------------------------

    def end_stage(self, replica: Replica, stage: Stage) -> None:
        emitting = list(stage.decodes)
        for request in stage.decodes:
            request.computed += 1
        for request, tokens in stage.chunks:
            request.computed += tokens
            request.prefilled_tokens += tokens
            if request.computed == request.todo:
                emitting.append(request)
        for request in emitting:
            request.emit(self.clock_s)
            if request.emitted == request.output:
                request.phase = "finished"
                request.finished_s = self.clock_s
                request.blocks = 0
                replica.running.remove(request)
                self.void(request)
        replica.stage = None
        if replica.spec.role == "prefill":
            for request, _ in stage.chunks:
                if request.decoding:
                    self.hand_over(replica, request)


def serve(
    requests: Sequence[tuple[float, int, int]],
    spec: ClusterSpec,
    cluster_class: type[ReferenceCluster] = ReferenceCluster,
) -> Outcome:
    """Serve requests (arrival in seconds, prompt, output) to the end; rows need not be sorted."""
    return cluster_class(requests, spec).run()
