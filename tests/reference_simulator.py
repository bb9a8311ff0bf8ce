"""A slow, obvious reference of CONTRIBUTING's semantics: lists and loops, no kernel, no closed form.

The fast simulator must agree with this file. Of the package it uses plain data only (requests, cost
parameters, a plan's queues); every formula and every rule is written anew, as a reader of them would.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from servegym.envs.machine.costs import StageCosts
from servegym.envs.workload.requests import Requests
from servegym.envs.workload.scoring import Scoring
from tests.reference_costs import decode_round_s, prefill_s, prefill_stage_s
from tests.reference_requests import Request, greedy_queues, make_requests_list
from tests.reference_scored import score

__all__ = [  # also what a stage costs and its requests
    "ALL_RULES",
    "RULES",
    "ReferenceSimulator",
    "Request",
    "decode_round_s",
    "greedy_queues",
    "make_reference",
    "make_requests_list",
    "optimal_makespan",
    "prefill_s",
    "prefill_stage_s",
]

RULES = ("plan", "steal", "longest", "shortest", "fcfs", "aligned")
ALL_RULES = (*RULES, "scored")


@dataclass(eq=False)
class ReferenceSimulator:
    """One replica. Action 0 decodes, action 1 + k runs a prefill stage under `rules[k]`."""

    requests: list[Request]
    clients: int
    costs: StageCosts
    queues: list[list[Request]]  # the plan: waiting (or not yet arrived) requests of each client
    rules: Sequence[str] = RULES
    max_prefill_tokens: int = 0
    every_round: bool = False
    clock_s: float = 0.0
    round: int = 0
    stages: int = 0
    prefill_s: float = 0.0
    idle_wait_s: float = 0.0  # idle client-seconds since the last prefill stage, work waiting
    busy_decode_s: float = 0.0  # Σ over rounds of n / J · seconds
    in_system_s: float = 0.0  # Σ over finished stages and arrivals of time spent in the system
    decisions: int = 0
    scoring: Scoring = field(default_factory=Scoring)  # of the rule scored
    log: list[tuple] = field(default_factory=list)  # what every stage did

    # ---- what can be seen -------------------------------------------------------------------

    def waiting(self) -> list[Request]:
        return [request for request in self.requests if request.phase == "waiting"]

    def running(self) -> list[Request]:
        return [request for request in self.requests if request.phase == "running"]

    def idle_clients(self) -> list[int]:
        busy = {request.client for request in self.running()}
        return [client for client in range(self.clients) if client not in busy]

    def cached_tokens(self) -> int:
        """A request holds its prompt and every token it has emitted."""
        return sum(request.prompt + request.emitted for request in self.running())

    def finished(self) -> bool:
        return all(request.phase == "finished" for request in self.requests)

    def legal_actions(self) -> list[bool]:
        """Decoding needs an active client; prefilling an idle one and a request it could admit."""
        prefill = [self.would_admit(rule) for rule in self.rules]
        return [self.finished() or len(self.running()) > 0, *prefill]

    def would_admit(self, rule: str) -> bool:
        idle = self.idle_clients()
        if rule == "plan":
            return any(self.head(client) is not None for client in idle)
        return bool(idle) and bool(self.waiting())

    # ---- the decision process ---------------------------------------------------------------

    def begin(self) -> None:
        self.receive_arrivals()
        self.run_to_choice()

    def step(self, action: int) -> None:
        if not self.finished():  # an episode without any choice is over before its first step
            self.decisions += 1
            self.apply(action)
            self.run_to_choice()

    def apply(self, action: int) -> None:
        """Decode until a request finishes or arrives (or one round), or run one prefill stage."""
        if action > 0:
            self.prefill_stage(self.rules[action - 1])
            return
        changed = self.decode_round()
        while not changed and not self.every_round:
            changed = self.decode_round()

    def run_to_choice(self) -> None:
        """Run until there is a choice, or the episode ends."""
        while not self.finished():
            legal = self.legal_actions()
            if legal.count(True) > 1:
                return
            if legal.count(True) == 1:
                self.apply_one_round(legal.index(True))
            else:
                self.sleep()

    def apply_one_round(self, action: int) -> None:
        if action == 0:
            self.decode_round()
        else:
            self.apply(action)

    # ---- stages -----------------------------------------------------------------------------

    def sleep(self) -> None:
        """Without active clients and waiting requests, go to the next arrival."""
        coming = [request.arrival_s for request in self.requests if request.phase == "future"]
        self.clock_s = max(self.clock_s, min(coming))
        self.receive_arrivals()

    def decode_round(self) -> bool:
        """Run one decode round; return whether a request finished or arrived."""
        return self.end_stage(self.emit_tokens())

    def emit_tokens(self) -> list[Request]:
        """Every active client emits one token; return their requests."""
        active = self.running()
        seconds = decode_round_s(self.costs, len(active), self.cached_tokens())
        idle = self.clients - len(active)
        if self.waiting():
            self.idle_wait_s += seconds * idle
        self.busy_decode_s += seconds * len(active) / self.clients
        self.log.append(("decode", self.clock_s, [request.id for request in active]))
        self.pass_time(seconds)
        self.round += 1
        for request in active:
            request.emitted += 1
        return active

    def prefill_stage(self, rule: str) -> None:
        """Admit a batch; all other requests stall; each admitted request emits its first token."""
        batch = self.admit(rule)
        seconds = prefill_stage_s(self.costs, [request.prompt for request in batch])
        self.log.append(("prefill", self.clock_s, [request.id for request in batch]))
        for request in batch:
            request.admitted_s = self.clock_s
        self.pass_time(seconds)
        for request in batch:
            request.first_token_s = self.clock_s
            request.emitted = 1
        self.stages += 1
        self.prefill_s += seconds
        self.idle_wait_s = 0.0
        self.end_stage(batch)

    def pass_time(self, seconds: float) -> None:
        self.in_system_s += seconds * (len(self.waiting()) + len(self.running()))
        self.clock_s += seconds

    def end_stage(self, emitting: list[Request]) -> bool:
        """Finish the requests that have emitted their last token; then receive arrivals."""
        done = [request for request in emitting if request.emitted == request.output]
        for request in done:
            request.phase = "finished"
            request.finished_s = self.clock_s
        self.learn()
        return self.receive_arrivals() or bool(done)

    def learn(self) -> None:
        """Nothing: lengths are known."""

    def receive_arrivals(self) -> bool:
        """Let requests that have arrived by now wait; the unplanned join the least loaded client."""
        seen = [
            request
            for request in self.requests
            if request.phase == "future" and request.arrival_s <= self.clock_s
        ]
        for request in seen:
            request.phase = "waiting"
            self.in_system_s += self.clock_s - request.arrival_s
            if not any(request in queue for queue in self.queues):
                self.queues[self.client_to_join(request)].append(request)
        return bool(seen)

    def client_to_join(self, request: Request) -> int:
        """Least work, then fewest requests queued; for a request without rounds the reverse order."""
        before = [(self.work(client), len(self.queues[client])) for client in range(self.clients)]
        if request.expected_rounds == 0:
            before = [(queued, work) for work, queued in before]
        return before.index(min(before))

    # ---- admission rules --------------------------------------------------------------------

    def admit(self, rule: str) -> list[Request]:
        """Idle clients in order take what the rule gives them, until the token budget is spent."""
        batch: list[Request] = []
        targets = self.targets()
        waits = [request.compared_rounds for request in self.waiting()]
        for client in self.idle_clients():
            if not self.waiting():
                break
            if rule == "scored":
                request: Request | None = self.scored(targets, waits)
            else:
                request = self.candidate(rule, client, targets)
            if request is None:
                continue
            tokens = sum(other.prompt for other in batch) + request.prompt
            if batch and 0 < self.max_prefill_tokens < tokens:
                break
            batch.append(request)
            request.phase = "running"
            request.client = client
            next(queue for queue in self.queues if request in queue).remove(request)
        return batch

    def candidate(self, rule: str, client: int, targets: list[int]) -> Request | None:
        if rule == "plan":
            return self.head(client)
        if rule == "steal":
            return self.head(client) or self.stolen()
        if rule == "longest":
            return self.by_length()[-1]
        if rule == "shortest":
            return self.by_length()[0]
        if rule == "fcfs":
            return min(self.waiting(), key=lambda request: (request.arrival_s, request.id))
        return self.aligned(targets)

    def by_length(self) -> list[Request]:
        """Waiting requests, shortest first; of equal ones the later counts as the shorter."""
        return sorted(self.waiting(), key=lambda request: (request.compared_rounds, -request.id))

    def head(self, client: int) -> Request | None:
        waiting = [request for request in self.queues[client] if request.phase == "waiting"]
        return waiting[0] if waiting else None

    def work(self, client: int) -> int:
        """Rounds left to a client: its planned queue and its running request (paper, Algorithm 1)."""
        queued = sum(request.expected_rounds for request in self.queues[client])
        return queued + sum(
            request.expected_rounds if request.emitted == 0 else max(request.expected_left, 0)
            for request in self.running()
            if request.client == client
        )

    def stolen(self) -> Request:
        """The longest request of the client with most work; ties go to the first client and request."""
        victims = [client for client in range(self.clients) if self.head(client) is not None]
        victim = max(victims, key=lambda client: (self.work(client), -client))
        return max(self.queues[victim], key=lambda request: request.expected_rounds)

    def targets(self) -> list[int]:
        """Rounds from now in which at least two running requests finish, soonest first."""
        left = [request.expected_left for request in self.running()]
        return sorted({rounds for rounds in left if left.count(rounds) >= 2})

    def aligned(self, targets: list[int]) -> Request:
        """Best score L − 3·pad among the longer half.

        The last two per client go longest first, as does everything that finishes past the last
        target. Equal scores: the longer one.
        """
        order = self.by_length()
        longest = order[-1]
        if len(order) <= 2 * self.clients:
            return longest
        best, best_score = longest, None
        for request in reversed(order[len(order) // 2 :]):
            rounds = request.expected_rounds
            pads = [target - rounds for target in targets if target >= rounds]
            if not pads:
                continue
            score = rounds - 3 * min(pads)
            if best_score is None or score > best_score:
                best, best_score = request, score
        return best

    def scored(self, targets: list[int], waits: list[int]) -> Request:
        """The candidate of the best score, the longer of equals; ``waits``: lengths when the stage began."""
        order = self.by_length()
        best, best_score = order[-1], None
        if len(order) <= self.scoring.weights.tail * self.clients:
            return best
        together = [self.round + rounds for rounds in targets]
        first = int(len(order) * self.scoring.weights.shortest_share)
        for request in reversed(order[first:]):
            rounds = request.compared_rounds
            found = score(rounds, waits.count(rounds), self.round, self.scoring, together)
            if found is not None and (best_score is None or found > best_score):
                best, best_score = request, found
        return best


def make_reference(
    requests: Requests | Sequence[Request],
    clients: int,
    costs: StageCosts,
    queues: Sequence[Sequence[int]] | None = None,
    rules: Sequence[str] = RULES,
    max_prefill_tokens: int = 0,
    every_round: bool = False,
    simulator_class: type[ReferenceSimulator] = ReferenceSimulator,
    scoring: Scoring | None = None,
) -> ReferenceSimulator:
    """A simulator at its first decision point; without `queues` it follows the greedy plan."""
    listed = make_requests_list(requests) if isinstance(requests, Requests) else list(requests)
    if queues is None:
        planned = greedy_queues(listed, clients)
    else:
        planned = [[listed[i] for i in queue] for queue in queues]
    simulator = simulator_class(
        listed, clients, costs, planned, rules, max_prefill_tokens, every_round
    )
    simulator.scoring = scoring or Scoring()
    simulator.begin()
    return simulator


# ---- exhaustive search ----------------------------------------------------------------------

Emitted = tuple[int, ...]  # output tokens so far of each request; says all there is but the clock


def optimal_makespan(
    requests: Requests, clients: int, costs: StageCosts, max_prefill_tokens: int = 0
) -> float:
    """The shortest makespan of any schedule at all, by Dijkstra's search over the tokens emitted.

    A schedule may prefill any batch of arrived requests that fits, decode one round, or sleep until
    the next arrival. Of two schedules with the same tokens and arrivals so far the earlier is never
    worse: it can copy the later one's stages, each no later.
    """
    listed = make_requests_list(requests)
    seen: set[tuple[Emitted, int]] = set()
    heap: list[tuple[float, Emitted]] = [(0.0, (0,) * len(listed))]
    while heap:
        clock_s, emitted = heapq.heappop(heap)
        if emitted == tuple(request.output for request in listed):
            return clock_s
        arrived = sum(request.arrival_s <= clock_s for request in listed)
        if (emitted, arrived) in seen:
            continue
        seen.add((emitted, arrived))
        for seconds, after in _stages(listed, clients, costs, max_prefill_tokens, clock_s, emitted):
            heapq.heappush(heap, (clock_s + seconds, after))
        coming = [request.arrival_s for request in listed if request.arrival_s > clock_s]
        if coming:
            heapq.heappush(heap, (min(coming), emitted))
    raise AssertionError("no schedule serves all requests")


def _stages(
    listed: list[Request],
    clients: int,
    costs: StageCosts,
    max_prefill_tokens: int,
    clock_s: float,
    emitted: Emitted,
) -> Iterator[tuple[float, Emitted]]:
    """Every stage that could run now: its seconds and the tokens emitted after it."""
    active = [request for request in listed if 0 < emitted[request.id] < request.output]
    if active:
        cached = sum(request.prompt + emitted[request.id] for request in active)
        yield decode_round_s(costs, len(active), cached), _emit(emitted, active)
    arrived = [request for request in listed if request.arrival_s <= clock_s]
    waiting = [request for request in arrived if emitted[request.id] == 0]
    for size in range(1, clients - len(active) + 1):
        for batch in combinations(waiting, size):
            prompts = [request.prompt for request in batch]
            if size == 1 or max_prefill_tokens == 0 or sum(prompts) <= max_prefill_tokens:
                yield prefill_stage_s(costs, prompts), _emit(emitted, batch)


def _emit(emitted: Emitted, stage: Sequence[Request]) -> Emitted:
    """One more token for every request of the stage."""
    ids = {request.id for request in stage}
    return tuple(count + (i in ids) for i, count in enumerate(emitted))
