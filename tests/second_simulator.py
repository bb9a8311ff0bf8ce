"""A second slow simulator of clusters, written from the page of exact rules alone.

It was written before its author had looked at the core or at ``reference_cluster.py``, and shares nothing
with them: where all three agree, a rule has been read alike three times. It knows first come, first served,
prefill-first (``fcfs``) or in chunks (``vllm``), without moves. Every decode round is a stage of its own,
queues are lists, and each question is answered by a sum over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from typing import Final, NamedTuple

NEVER: Final = math.inf


class Costs(NamedTuple):
    """Seconds of stages: D(x) of a round, P(x) of a prefill."""

    decode_base: float
    decode_per_client: float
    decode_per_kv_token: float
    prefill_base: float
    prefill_per_token: float
    prefill_per_token_squared: float
    prefill_floor: float
    sums: bool = False  # mixed = "sum"

    def decode(self, clients: int, cached: int) -> float:
        """Return the seconds of a decode round."""
        line = self.decode_base + self.decode_per_client * clients
        return line + self.decode_per_kv_token * cached

    def prefill(self, tokens: int, squares: int) -> float:
        """Return the seconds of a prefill stage."""
        line = self.prefill_base + self.prefill_per_token * tokens
        return max(self.prefill_floor, line + self.prefill_per_token_squared * squares)

    def one_pass(self, decoding: int, cached: int, tokens: int, squares: int) -> float:
        """Return the seconds of a mixed stage in one pass of the weights."""
        both = decoding + tokens
        decode_line = self.decode_base + self.decode_per_client * both
        prefill_line = self.prefill_base + self.prefill_per_token * both
        attention = self.decode_per_kv_token * cached + self.prefill_per_token_squared * squares
        return max(self.prefill_floor, decode_line, prefill_line) + attention


class Machine(NamedTuple):
    """One replica."""

    clients: int
    capacity: int  # tokens; 0: no limit
    speed: float = 1.0


class Cluster(NamedTuple):
    """All replicas and what they share."""

    machines: tuple[Machine, ...]
    costs: Costs
    block: int = 1
    watermark: float = 0.0
    chunk: int = 0  # 0: prefill first
    budget: int = 0  # of a prefill stage; 0: none
    router: str = "round-robin"


@dataclass(eq=False)
class Request:
    """A request and what has become of it."""

    arrival: float
    prompt: int
    output: int
    emitted: int = 0
    todo: int = 0
    computed: int = 0
    blocks: int = 0
    replica: int = -1
    admitted: float = NEVER
    first_token: float = NEVER
    finish: float = NEVER
    preemptions: int = 0
    prefilled: int = 0
    rejected: bool = False

    def __post_init__(self) -> None:
        self.todo = self.prompt

    @property
    def decodes(self) -> bool:
        """Whether its prompt is computed."""
        return self.computed == self.todo


@dataclass(eq=False)
class Replica:
    """A machine with its queue, whom it runs in order of admission, and its stage."""

    machine: Machine
    cluster: Cluster
    waiting: list[Request]
    running: list[Request] = field(default_factory=list)
    ends: float = NEVER
    decoding: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)

    @property
    def all_blocks(self) -> float:
        """Blocks of its memory."""
        capacity = self.machine.capacity
        return capacity // self.cluster.block if capacity else math.inf

    @property
    def free(self) -> float:
        """Blocks that nobody holds."""
        return self.all_blocks - sum(request.blocks for request in self.running)

    def wanted(self, tokens: int) -> int:
        """Return the blocks of so many tokens."""
        return math.ceil(tokens / self.cluster.block)

    def holds(self, request: Request) -> bool:
        """Return whether it could ever serve a request."""
        return self.wanted(request.prompt + request.output) <= self.all_blocks

    # --- a stage begins

    def decide(self, now: float) -> None:
        """Begin a stage, if there is anything to do."""
        self.decoding, self.chunks = [], []
        if self.cluster.chunk:
            self._fill_a_pass(now)
        else:
            self._prefill_or_decode(now)
        if self.decoding or self.chunks:
            self.ends = now + self._seconds() / self.machine.speed

    def _prefill_or_decode(self, now: float) -> None:
        left = self.cluster.budget or math.inf
        while self.waiting and len(self.running) < self.machine.clients and self._fits():
            todo = self.waiting[0].todo
            if todo > left and self.chunks:
                break
            left -= todo
            self._admit(now, todo)
        if not self.chunks:
            self._make_room()

    def _fill_a_pass(self, now: float) -> None:
        disturbed = self._make_room()
        left = self.cluster.chunk - len(self.decoding)
        for request in [request for request in self.running if not request.decodes]:
            tokens = min(request.todo - request.computed, left)
            if tokens == 0:
                continue
            blocks = self.wanted(request.computed + tokens)
            while blocks - request.blocks > self.free and request in self.running:
                self._preempt()
                disturbed = True
            if request in self.running:
                request.blocks = blocks
                self.chunks.append((request, tokens))
                left -= tokens
        if disturbed:
            return
        while (
            self.waiting and left > 0 and len(self.running) < self.machine.clients and self._fits()
        ):
            tokens = min(self.waiting[0].todo, left)
            left -= tokens
            self._admit(now, tokens)

    def _fits(self) -> bool:
        """Return whether the head of the queue may be admitted."""
        kept = 0
        if self.running and self.all_blocks < math.inf:
            kept = math.floor(self.cluster.watermark * self.all_blocks)
        return self.wanted(self.waiting[0].todo) + kept <= self.free

    def _admit(self, now: float, tokens: int) -> None:
        request = self.waiting.pop(0)
        request.admitted = min(request.admitted, now)
        request.blocks = self.wanted(tokens)
        self.running.append(request)
        self.chunks.append((request, tokens))

    def _make_room(self) -> bool:
        """Take the blocks of a round for all who decode; return whether somebody was preempted."""
        disturbed = False
        while True:
            decoding = [request for request in self.running if request.decodes]
            after = [self.wanted(request.prompt + request.emitted) for request in decoding]
            if sum(after) - sum(request.blocks for request in decoding) <= self.free:
                break
            self._preempt()
            disturbed = True
        for request, blocks in zip(decoding, after, strict=True):
            request.blocks = blocks
        self.decoding = decoding
        return disturbed

    def _preempt(self) -> None:
        request = self.running.pop()
        request.blocks = request.computed = 0
        request.todo = request.prompt + request.emitted
        request.preemptions += 1
        self.waiting.insert(0, request)

    def _seconds(self) -> float:
        costs = self.cluster.costs
        squares = [(r.computed + tokens) ** 2 - r.computed**2 for r, tokens in self.chunks]
        cached = sum(request.prompt + request.emitted for request in self.decoding)
        all_tokens = sum(tokens for _, tokens in self.chunks)
        if costs.sums and self.cluster.chunk:
            return self._sum_seconds(squares)
        if not self.chunks:
            return costs.decode(len(self.decoding), cached)
        if not self.decoding:
            return costs.prefill(all_tokens, sum(squares))
        return costs.one_pass(len(self.decoding), cached, all_tokens, sum(squares))

    def _sum_seconds(self, squares: list[int]) -> float:
        ends = [r for r, tokens in self.chunks if r.computed + tokens == r.todo]
        later = self.decoding + [request for request in ends if request.emitted > 0]
        begun = [
            k for k, (request, _) in enumerate(self.chunks) if request.computed < request.prompt
        ]
        seconds = 0.0
        if later:
            cached = sum(request.prompt + request.emitted for request in later)
            seconds += self.cluster.costs.decode(len(later), cached)
        if begun:
            tokens = sum(self.chunks[k][1] for k in begun)
            seconds += self.cluster.costs.prefill(tokens, sum(squares[k] for k in begun))
        return seconds

    # --- a stage ends

    def book(self) -> None:
        """Book the stage that ends now."""
        now, self.ends = self.ends, NEVER
        emitting = list(self.decoding)
        for request, tokens in self.chunks:
            request.computed += tokens
            request.prefilled += tokens
            if request.decodes:
                emitting.append(request)
        for request in emitting:
            request.emitted += 1
            if request.emitted == 1:
                request.first_token = now
            if request.emitted == request.output:
                request.finish = now
                self.running.remove(request)
        for request in self.decoding:  # another token of what is computed
            request.computed += 1
            request.todo += 1


def serve(cluster: Cluster, requests: list[tuple[float, int, int]]) -> list[Request]:
    """Serve requests of (arrival, prompt, output); return them as they end, by row."""
    rows = [Request(*request) for request in requests]
    pool: list[Request] | None = [] if cluster.router == "pool" else None
    replicas = [
        Replica(machine, cluster, [] if pool is None else pool) for machine in cluster.machines
    ]
    coming = sorted(rows, key=lambda request: request.arrival)  # of equals the first row
    turns = count()
    while True:
        now = min([r.ends for r in replicas] + [r.arrival for r in coming[:1]])
        if now == NEVER:
            return rows
        while coming and coming[0].arrival == now:
            _arrive(coming.pop(0), replicas, turns)
        for k, replica in enumerate(replicas):
            if replica.ends == now:
                served = [*replica.decoding, *(request for request, _ in replica.chunks)]
                replica.book()
                for request in served:
                    request.replica = k
        asked = True
        while asked:  # a victim in a pool may wake who decided before
            asked = False
            for replica in replicas:
                if replica.ends == NEVER:
                    replica.decide(now)
                    asked |= replica.ends < NEVER


def _arrive(request: Request, replicas: list[Replica], turns: count[int]) -> None:
    able = [replica for replica in replicas if replica.holds(request)]
    if not able:
        request.rejected = True
        return
    loads = {
        "round-robin": lambda _: 0,
        "pool": lambda _: 0,
        "least-requests": lambda r: len(r.waiting) + len(r.running),
        "least-waiting": lambda r: len(r.waiting),
        "vllm-dp": lambda r: 4 * len(r.waiting) + len(r.running),
    }
    router = replicas[0].cluster.router
    if router == "round-robin":
        turn = next(turns)  # of those who are routed; who cannot hold it is passed over
        chosen = next(r for r in (replicas * 2)[turn % len(replicas) :] if r in able)
    else:
        chosen = min(able, key=loads[router])
    chosen.waiting.append(request)
