"""What the slow reference does when requests move: steals, copies, fetches, prefill and decode replicas.

A move is one object in a list in order of its making, from the steal or the fetch to its end.
"""

from __future__ import annotations

import math

from tests.reference_balance import Balancing
from tests.reference_cluster_parts import (
    HOST,
    Move,
    ReferenceRequest,
    Replica,
    Stage,
)
from tests.reference_costs import prefill_s


class Moving(Balancing):
    """The part of the cluster that moves requests."""

    made: list[Move]

    def watermark(self, replica: Replica) -> int:
        raise NotImplementedError

    # ---- the clock --------------------------------------------------------------------------

    def transfer(self) -> None:
        """Serve the transfers that are due now, in order of their making."""
        for move in [move for move in self.moves if move.due_s == self.clock_s]:
            move.due_s = math.inf
            if move.state == "copying":
                # CHOICE: a source without a stage is at a boundary. A policy that decodes
                # whenever somebody runs never comes here without a stage.
                move.state = "pausing"
                if move.source and not move.source.stage:
                    self.leave(move)
            elif move.client is None:
                self.enqueue(move)
            else:
                move.state = "landed"
                if move.source:
                    move.source.kept.remove(move.request)
                move.request.blocks = 0

    def leave_at_boundary(self, replica: Replica) -> None:
        """A stage of this replica has been booked: whoever waited for that leaves."""
        for move in list(self.moves):
            if move.source is replica and move.state == "pausing":
                self.leave(move)

    def leave(self, move: Move) -> None:
        """The request leaves the clients of its source, unless the target has no room for it."""
        request, source, target = move.request, move.source, move.target
        assert source
        assert request in source.running
        assert request.decoding
        if move.kind == "copy":
            lacking = max(target.blocks_for(request.held_tokens) - move.blocks, 0)
            if lacking > target.free_blocks:
                self.end(move, "failed")
                return
            move.blocks += lacking
            source.kept.append(request)
            tokens = request.emitted - move.emitted
            later_s = tokens * self.spec.kv_bytes_per_token / self.spec.bytes_per_s
        else:
            request.todo = request.prompt + request.emitted
            request.computed = 0
            request.blocks = 0
            later_s = self.spec.steal_delay_s
        source.running.remove(request)
        request.phase = "moving"
        request.moves += 1
        move.left_s = self.clock_s
        move.state = "flying"
        move.due_s = self.clock_s + later_s
        if move.kind == "recompute" and self.spec.steal_delay_s == 0:
            self.enqueue(move)

    def enqueue(self, move: Move) -> None:
        """The request lands at the back of the target's queue."""
        move.due_s = math.inf
        move.request.phase = "waiting"
        move.request.stolen = True
        move.request.replica = move.target.id
        move.target.queue.append(move.request)
        self.end(move, "queued")

    def join(self, replica: Replica) -> None:
        """Whoever has landed runs from now on.

        CHOICE: several that join at once do so in order of the making of their moves.
        """
        for move in [m for m in self.moves if m.target is replica and m.state == "landed"]:
            request = move.request
            request.phase = "running"
            request.stored = None
            request.replica, request.client = replica.id, move.client
            request.blocks = move.blocks
            self.end(move, "joined")
            replica.running.append(request)
            assert request.decoding
            assert replica.free_blocks >= 0

    # ---- moves begin and end ----------------------------------------------------------------

    def begin(self, move: Move) -> None:
        self.moves.append(move)
        self.made.append(move)

    def reserve(self, move: Move, client: int) -> None:
        """Reserve an idle client of the target, and blocks of what the request holds."""
        move.client = client
        move.blocks = move.target.blocks_for(move.request.held_tokens)
        move.target.reserved.append(move)
        assert move.target.free_blocks >= 0

    def end(self, move: Move, state: str) -> None:
        move.state = state
        move.due_s = math.inf
        move.ended_s = self.clock_s
        self.moves.remove(move)
        if move in move.target.reserved:
            move.target.reserved.remove(move)

    def void(self, request: ReferenceRequest) -> None:
        """The request has finished or is preempted: no move of it goes on."""
        for move in list(self.moves):
            if move.request is request:
                assert move.leaving
                self.end(move, "void")

    # ---- counts -----------------------------------------------------------------------------

    def coming(self, replica: Replica) -> int:
        """Requests on their way to the queue of a replica."""
        return sum(m.target is replica and m.kind in ("queue", "recompute") for m in self.moves)

    def room(self, replica: Replica) -> int:
        return len(replica.idle_clients) - len(replica.queue) - self.coming(replica)

    def present(self, replica: Replica) -> int:
        return replica.held_clients + len(replica.queue) + self.coming(replica)

    def stealable(self, replica: Replica) -> list[ReferenceRequest]:
        """Those that decode and are not leaving, as of the last booking.

        CHOICE: whoever the stage under way has evicted is in the queue already.
        """
        leaving = [move.request for move in self.moves if move.leaving]
        return [r for r in replica.running if r.decoding and r not in leaving]

    def victims_of(self, thief: Replica) -> list[Replica]:
        """Replicas that a thief may steal from: of its role, with no more memory."""
        return [
            replica
            for replica in self.replicas
            if replica is not thief
            and replica.spec.role == thief.spec.role
            and replica.blocks <= thief.blocks
        ]

    # ---- stealing ---------------------------------------------------------------------------

    def steal_waiting(self, thief: Replica) -> bool:
        """Steal from the queue with most work, if that is legal; return whether it was."""
        room = self.room(thief)
        queued = [
            replica
            for replica in self.victims_of(thief)
            if any(not request.stolen for request in replica.queue)
            and self.most_taken(replica, thief, room) > 0
        ]
        if "waiting" not in self.spec.steals or room <= 0 or not queued:
            return False
        source = max(queued, key=lambda s: (sum(r.tokens_left for r in s.queue), -s.id))
        taken = self.taken(source.queue, self.most_taken(source, thief, room))
        if not self.admissible(thief, taken[0]):
            return False
        for request in taken:
            if not self.admissible(thief, request):
                break
            source.queue.remove(request)
            request.moves += 1
            request.phase = "moving"
            move = Move("queue", request, source, thief, self.clock_s, "flying")
            move.tokens = request.wanted_tokens
            move.left_s = self.clock_s
            move.due_s = self.clock_s + self.spec.steal_delay_s
            self.begin(move)
            if self.spec.steal_delay_s == 0:
                self.enqueue(move)
        return True

    def guard_allows(self, replica: Replica, request: ReferenceRequest) -> bool:
        raise NotImplementedError

    def admissible(self, thief: Replica, request: ReferenceRequest) -> bool:
        """Whether a thief could admit a waiting request if its queue had been admitted."""
        fits = self.fits(thief, self.blocks_to_admit(thief, request))
        return fits and self.guard_allows(thief, request)

    def blocks_to_admit(self, replica: Replica, request: ReferenceRequest) -> int:
        raise NotImplementedError

    def fits(self, thief: Replica, blocks: int) -> bool:
        """Whether memory has so many blocks more than what waits at or comes to a queue wants."""
        wanted = sum(thief.blocks_for(request.wanted_tokens) for request in thief.queue)
        wanted += sum(
            thief.blocks_for(move.tokens)
            for move in self.moves
            if move.target is thief and move.kind in ("queue", "recompute")
        )
        kept = 0
        if self.present(thief) > 0 and thief.blocks < math.inf:
            kept = math.floor(self.spec.watermark * thief.blocks)
        return wanted + blocks + kept <= thief.free_blocks

    def taken(self, queue: list[ReferenceRequest], room: int) -> list[ReferenceRequest]:
        queue = [request for request in queue if not request.stolen]
        count = min(room, len(queue))
        if self.spec.steal_takes == "oldest":
            return queue[:count]
        if self.spec.steal_takes == "newest":
            return queue[-count:]
        assert self.spec.steal_takes == "longest"
        return sorted(queue, key=lambda r: (-r.output, r.arrival_s, r.id))[:count]

    def steal_running(self, thief: Replica) -> bool:
        """Steal one of those that decode elsewhere; return whether that was legal."""
        if "running" not in self.spec.steals or self.room(thief) <= 0 or self.frozen(thief):
            return False
        source = self.source_for(thief)
        if source is None:
            return False
        request = self.moved(source)
        move = Move("copy", request, source, thief, self.clock_s, "copying")
        move.emitted = request.emitted
        copy_s = self.spec.copy_s(request.held_tokens)
        if self.recomputes(thief, request, copy_s):
            if not self.fits(thief, thief.blocks_for(request.prompt + request.emitted)):
                return False
            move.kind, move.state = "recompute", "pausing"
            move.tokens = request.prompt + request.emitted
            thief.stole_s = self.clock_s
            self.begin(move)
            if not source.stage:
                self.leave(move)
            return True
        if not self.fits(thief, thief.blocks_for(request.prompt + request.emitted)):
            return False
        thief.stole_s = self.clock_s
        self.reserve(move, thief.idle_clients[0])
        move.due_s = self.clock_s + copy_s
        self.begin(move)
        return True

    def recomputes(self, thief: Replica, request: ReferenceRequest, copy_s: float) -> bool:
        """CHOICE: recomputing takes a prefill stage of all tokens at once, with chunks, too."""
        if self.spec.move_by != "cheaper":
            return self.spec.move_by == "recompute"
        tokens = request.prompt + request.emitted
        return prefill_s(self.spec.costs, tokens, tokens**2, 1) / thief.spec.speed < copy_s

    # ---- keys and values stored elsewhere ---------------------------------------------------

    def fetch(self, replica: Replica, request: ReferenceRequest, client: int, stage: Stage) -> None:
        """Admit a waiting request whose keys and values are stored: they are copied first."""
        stage.fetched = True
        replica.queue.remove(request)
        request.stolen = False
        request.phase = "moving"
        request.replica = replica.id
        if request.admitted_s is None:
            request.admitted_s = self.clock_s
        on_host = request.stored == HOST
        assert request.stored is not None
        source = None if on_host else self.replicas[request.stored]
        move = Move("fetch", request, source, replica, self.clock_s, "flying")
        move.emitted, move.left_s = request.emitted, self.clock_s
        self.reserve(move, client)
        tokens = request.held_tokens
        move.due_s = self.clock_s + (
            self.spec.host_s(tokens) if on_host else self.spec.copy_s(tokens)
        )
        self.begin(move)

    def hand_over(self, replica: Replica, request: ReferenceRequest) -> None:
        """A prefill has ended at a prefill replica: the request waits where it will decode."""
        replica.running.remove(request)
        replica.kept.append(request)
        request.stored = replica.id
        request.phase = "waiting"
        request.moves += 1
        fitting = [
            other
            for other in self.replicas
            if other.spec.role != "prefill" and other.could_ever_hold(request)
        ]
        target = min(fitting, key=lambda other: (self.present(other), other.id))
        request.replica = target.id
        target.queue.append(request)
