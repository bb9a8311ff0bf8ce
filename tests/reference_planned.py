"""The slow reference under the rules that go by length or by a plan: longest, plan, steal, aligned.

Every client has a planned queue, of whom it is to serve. The offline plan deals those present at t = 0; who
comes later, or elsewhere than was planned, joins the client with least work.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference_cluster import ClusterSpec, ReferenceCluster, ReferenceRequest
from tests.reference_cluster_parts import Action, Move, Replica, Stage
from tests.reference_costs import decode_round_s

PLANNED_RULES = ("longest", "plan", "steal", "aligned")

PAD_WEIGHT = 3  # of the rule aligned, in rounds
TAIL = 2  # waiting requests a client, up to which it goes longest first
TOGETHER = 2  # running requests that make a target

Client = tuple[int, int]  # replica and client


class PlannedCluster(ReferenceCluster):
    """A cluster under one of `PLANNED_RULES`."""

    rule = "steal"

    def __init__(self, requests: Sequence[tuple[float, int, int]], spec: ClusterSpec) -> None:
        super().__init__(requests, spec)
        self.planned: dict[Client, list[ReferenceRequest]] = {
            (replica.id, client): []
            for replica in self.replicas
            for client in range(replica.spec.clients)
        }
        self.coming_rounds: dict[Client, int] = {}  # of whoever a client is reserved for
        self.rank = {request.id: rank for rank, request in enumerate(self.future)}
        if spec.router in ("pool", "plan") or len(self.replicas) == 1:
            self.plan()

    def choose(self, replica: Replica) -> Action:
        return Action(super().choose(replica).kind, self.rule)

    def by_length(self, requests: list[ReferenceRequest]) -> list[ReferenceRequest]:
        """Shortest first; of equal ones the later counts as the shorter."""
        return sorted(requests, key=lambda r: (r.output, -self.rank[r.id]))

    # ---- the offline plan -------------------------------------------------------------------

    def plan(self) -> None:
        """Longest first, to the client that would end first; last those without rounds, by their number."""
        present = self.by_length([request for request in self.future if request.arrival_s == 0])
        dealt: dict[Client, list[ReferenceRequest]] = {client: [] for client in self.planned}
        longest_first = present[::-1]
        for request in sorted(longest_first, key=lambda r: r.output == 1):
            clients = [c for c in dealt if self.replicas[c[0]].could_ever_hold(request)]
            if not clients:
                continue
            rounds = {c: sum(r.output - 1 for r in dealt[c]) for c in clients}
            end_s = {c: (rounds[c] + request.output - 1) * self.full_round_s(c[0]) for c in clients}
            if request.output == 1:
                chosen = min(clients, key=lambda c: (len(dealt[c]), end_s[c], c))
            else:
                chosen = min(clients, key=lambda c: (end_s[c], c))
            dealt[chosen].append(request)
        for client, requests in dealt.items():
            self.planned[client] = self.by_length(requests)[::-1]

    def full_round_s(self, r: int) -> float:
        """Seconds of a round of a replica whose clients all decode, without their cache."""
        if len(self.replicas) == 1:
            return 1.0
        spec = self.replicas[r].spec
        return decode_round_s(self.spec.costs, spec.clients, 0) / spec.speed

    def client_of(self, request: ReferenceRequest) -> Client | None:
        """Whose planned queue a request is in."""
        return next((c for c, queue in self.planned.items() if request in queue), None)

    def leave_plan(self, request: ReferenceRequest) -> None:
        client = self.client_of(request)
        if client:
            self.planned[client].remove(request)

    # ---- who comes --------------------------------------------------------------------------

    def arrive(self, request: ReferenceRequest) -> None:
        super().arrive(request)
        client = self.client_of(request)
        if client and (request.phase == "rejected" or request.replica not in (None, client[0])):
            self.leave_plan(request)

    def route(self, request: ReferenceRequest, fitting: list[Replica]) -> Replica:
        """CHOICE: to the replica with the fewest requests where the plan names none that can hold it."""
        if self.spec.router != "plan":
            return super().route(request, fitting)
        client = self.client_of(request)
        if client and self.replicas[client[0]] in fitting:
            return self.replicas[client[0]]
        views = self.look()
        chosen = min(fitting, key=lambda r: (views[r.id].score("least-requests"), r.id))
        views[chosen.id] = views[chosen.id].with_one_more(request, chosen)
        return chosen

    def see(self, replica: Replica) -> None:
        """Whoever waits without a plan joins the client with least work, then with fewest queued.

        One without rounds ahead adds no work: for it the number of those queued counts first.
        CHOICE: they join at the replica's first boundary after they came, before anybody leaves it there;
        in a pool at anybody's.
        """
        for request in replica.queue:
            if self.client_of(request) is None:
                self.planned[self.client_to_join(replica, request)].append(request)

    def leave(self, move: Move) -> None:
        assert move.source
        self.see(move.source)
        super().leave(move)

    def client_to_join(self, replica: Replica, request: ReferenceRequest) -> Client:
        """CHOICE: in a pool only a client whose replica could hold it all."""

        def key(client: Client) -> tuple[int, int, Client]:
            work, queued = self.work(client), len(self.planned[client])
            adds_work = self.rounds_ahead(request) > 0
            return (work, queued, client) if adds_work else (queued, work, client)

        holding = [c for c in self.alike(replica) if self.replicas[c[0]].could_ever_hold(request)]
        return min(holding, key=key)

    def alike(self, replica: Replica) -> list[Client]:
        """The clients of a replica, in a pool those of all."""
        pool = self.spec.router == "pool"
        return [client for client in self.planned if pool or client[0] == replica.id]

    def rounds_ahead(self, request: ReferenceRequest) -> int:
        """Rounds of a waiting request after its prefill, which emits a token, or its fetch."""
        return request.output - request.emitted - (request.stored is None)

    def work(self, client: Client) -> int:
        """Rounds left to a client, as of its replica's last boundary: of its queue and of its request.

        CHOICE: who is fetched or copied counts, until it joins, for what was left when that began.
        """
        replica = self.replicas[client[0]]
        queued = sum(self.rounds_ahead(request) for request in self.planned[client])
        for request in replica.running:
            if request.client == client[1]:
                return queued + self.rounds_left(request)
        reserved = any(move.client == client[1] for move in replica.reserved)
        return queued + (self.coming_rounds[client] if reserved else 0)

    def rounds_left(self, request: ReferenceRequest) -> int:
        return request.output - request.emitted if request.decoding else self.rounds_ahead(request)

    # ---- what happens to them ---------------------------------------------------------------

    def admit(self, replica: Replica, request: ReferenceRequest, client: int) -> None:
        super().admit(replica, request, client)
        self.leave_plan(request)

    def reserve(self, move: Move, client: int) -> None:
        super().reserve(move, client)
        self.leave_plan(move.request)
        self.coming_rounds[move.target.id, client] = self.rounds_left(move.request)

    def preempt(self, replica: Replica, stage: Stage) -> None:
        super().preempt(replica, stage)
        victim = stage.preempted[-1]
        assert victim.client is not None
        if self.spec.router != "pool" or replica.could_ever_hold(victim):
            self.planned[replica.id, victim.client].insert(0, victim)

    def steal_waiting(self, thief: Replica) -> bool:
        count = len(self.made)
        stolen = super().steal_waiting(thief)
        for move in self.made[count:]:
            self.leave_plan(move.request)
        return stolen

    def shed_late(self, replica: Replica) -> None:
        """It is the replica's turn."""
        self.see(replica)
        super().shed_late(replica)
        for queue in self.planned.values():
            queue[:] = [request for request in queue if request.phase != "shed"]

    # ---- rules ------------------------------------------------------------------------------

    def candidate(self, replica: Replica, rule: str, client: int) -> ReferenceRequest | None:
        if not replica.queue:
            return None
        if self.rule == "longest":
            return self.by_length(replica.queue)[-1]
        if self.rule == "aligned":
            return self.aligned(replica)
        own = self.planned[replica.id, client]
        if own or self.rule == "plan":
            return own[0] if own else None
        return self.stolen_from_busiest(replica)

    def stolen_from_busiest(self, replica: Replica) -> ReferenceRequest:
        """The longest request of the client with most work; ties: the first client, the first request."""
        victims = [client for client in self.alike(replica) if self.planned[client]]
        victim = max(victims, key=lambda client: (self.work(client), [-n for n in client]))
        return max(self.planned[victim], key=self.rounds_ahead)

    def aligned(self, replica: Replica) -> ReferenceRequest:
        """Best score L − 3 · pad of the longer half; longest first for the last two a client.

        L: rounds; pad: rounds from its finish to the next target. A target is when at least two running
        requests finish together. CHOICE: L is the whole output, also of who has emitted some of it.
        """
        order = self.by_length(replica.queue)
        if len(order) <= TAIL * replica.spec.clients:
            return order[-1]
        left = [r.output - r.emitted for r in replica.running if r.decoding]
        targets = {rounds for rounds in left if left.count(rounds) >= TOGETHER}
        best, best_score = order[-1], None
        for request in reversed(order[len(order) // 2 :]):
            rounds = request.output - 1
            pads = [target - rounds for target in targets if target >= rounds]
            score = rounds - PAD_WEIGHT * min(pads) if pads else None
            if score is not None and (best_score is None or score > best_score):
                best, best_score = request, score
        return best
