"""What the slow reference of the cluster is made of: settings, requests, replicas, stages, seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from servegym.envs.machine.costs import AffinePrefill, StageCosts, TableDecode
from tests.reference_costs import decode_round_s, interpolated, prefill_s

HOST = -1  # where keys and values are that no replica holds
ROUTERS = (
    "round-robin random least-requests least-waiting least-tokens vllm-dp llumnix dynamo pool"
).split()
VICTIMS = ("newest", "least-computed", "fewest-output")
GUARDS = ("none", "full", "peak")
ROLES = ("both", "prefill", "decode")
TAKES = ("longest", "newest", "oldest")
SHARES = ("room", "half")
MIGRATIONS = ("longest", "shortest", "freeness")


@dataclass(frozen=True)
class ReplicaSpec:
    """What may differ between replicas."""

    clients: int
    kv_capacity_tokens: int = 0  # 0: no limit
    speed: float = 1.0  # all seconds are divided by it
    role: str = "both"  # one of ROLES


@dataclass(frozen=True)
class ClusterSpec:
    """The keys of `[cluster]`, and what a stage costs."""

    replicas: tuple[ReplicaSpec, ...]
    costs: StageCosts
    kv_block_tokens: int = 1
    watermark: float = 0.0
    preempt: str = "newest"  # one of VICTIMS
    admission_guard: str = "none"  # one of GUARDS, or sglang: see reference_sglang
    conservativeness: float = 1.0  # of sglang
    patience_s: float = math.inf  # of shortest first, see reference_shortest
    shortest_by: str = "length"  # which is shortest, see reference_orders
    level_tokens: int = 256
    chunk_tokens: int = 0  # 0: prefill first
    max_prefill_tokens: int = 0  # of a prefill stage; 0: no budget
    padded: bool = False  # that budget counts requests × longest
    reserve: str = "chunk"  # chunk, prompt: the blocks that a prompt takes when it is admitted
    mixed: str = "one-pass"  # one-pass, sum
    router: str = "round-robin"  # one of ROUTERS; first: the lowest that can, for tests
    draws: Sequence[int] = ()  # of the router `random`: a replica for each routed request
    staleness_s: float = 0.0
    steals: tuple[str, ...] = ()  # of waiting, running
    steal_takes: str = "longest"  # one of TAKES: which waiting requests
    steal_share: str = "room"  # one of SHARES: how many of them
    steal_delay_s: float = 0.0
    migrate: str = "longest"  # one of MIGRATIONS: which running request, and from where
    steal_period_s: float = 0.0  # between thefts of running requests by one replica
    freeness_steps: float = 3.0  # of freeness: blocks a request
    shed_s: float = math.inf  # after which a first token comes too late
    latency_s: float = 0.0  # of the link between replicas
    bytes_per_s: float = math.inf
    kv_bytes_per_token: int = 1
    move_by: str = "copy"  # copy, recompute, cheaper: how a running request moves
    preempt_to: str = "recompute"  # recompute, host: what becomes of a victim's keys and values
    host_latency_s: float = 0.0
    host_bytes_per_s: float = math.inf

    def copy_s(self, tokens: int) -> float:
        """Seconds to copy the keys and values of so many tokens to another replica."""
        return self.latency_s + tokens * self.kv_bytes_per_token / self.bytes_per_s

    def host_s(self, tokens: int) -> float:
        """Seconds to the host and back."""
        one_way_s = tokens * self.kv_bytes_per_token / self.host_bytes_per_s
        return 2 * (self.host_latency_s + one_way_s)

    def __post_init__(self) -> None:
        roles = {replica.role for replica in self.replicas}
        if self.steals and (len(self.replicas) == 1 or self.router == "pool"):
            raise ValueError("stealing needs two replicas with queues of their own")
        if roles != {"both"} and (self.router == "pool" or len(roles) == 1):
            raise ValueError("roles need prefill and decode replicas with queues of their own")
        unlimited = any(replica.kv_capacity_tokens == 0 for replica in self.replicas)
        if self.router == "llumnix" and unlimited:  # CHOICE: its free steps would be infinite
            raise ValueError("llumnix needs a limited memory on every replica")


@dataclass(eq=False)
class ReferenceRequest:
    """One request and what has happened to it. A clock that has not struck is None."""

    id: int  # row
    arrival_s: float
    prompt: int
    output: int
    phase: str = "future"  # future, waiting, running, moving, finished, rejected, shed
    replica: int | None = None  # the last that it was queued at (in a pool: that admitted it)
    client: int | None = None  # the last that it held
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    preemptions: int = 0
    moves: int = 0
    prefilled_tokens: int = 0  # computed by prefill in all stages
    emitted: int = 0
    todo: int = 0  # tokens that its prefill computes
    computed: int = 0  # tokens whose keys and values it holds
    blocks: int = 0  # at the replica where it runs, or that keeps them while it waits or moves
    stolen: bool = False  # it waits where it has come by theft: nobody steals it again
    stored: int | None = None  # waiting or fetched: the replica with its keys and values, or HOST
    last_token_s: float | None = None
    worst_gap_s: float | None = None  # between two of its tokens

    def emit(self, now_s: float) -> None:
        """A token more; the time since the one before counts wherever it was spent."""
        self.emitted += 1
        if self.first_token_s is None or self.last_token_s is None:
            self.first_token_s = now_s
        else:
            self.worst_gap_s = max(self.worst_gap_s or 0.0, now_s - self.last_token_s)
        self.last_token_s = now_s

    @property
    def rejected(self) -> bool:
        return self.phase in ("rejected", "shed")

    @property
    def recomputed_tokens(self) -> int:
        """What prefill computed beyond the prompt, once."""
        return max(self.prefilled_tokens - self.prompt, 0)

    @property
    def decoding(self) -> bool:
        return self.phase == "running" and self.computed >= self.todo

    @property
    def held_tokens(self) -> int:
        """What a decoding request holds between stages."""
        return self.prompt + self.emitted - 1

    @property
    def wanted_tokens(self) -> int:
        """What a waiting request will hold once it is admitted."""
        return self.todo if self.stored is None else self.held_tokens

    @property
    def tokens_left(self) -> int:
        """Tokens still to compute: the rest of its prefill, then one a round."""
        if self.decoding or self.stored is not None:
            return self.output - self.emitted
        return self.todo - self.computed + self.output - self.emitted - 1


@dataclass(frozen=True)
class Action:
    """What a replica does at its boundary: wait, decode, prefill by a rule, mixed by a rule."""

    kind: str
    rule: str = "fcfs"


@dataclass(eq=False)
class Stage:
    """What one replica does from `start_s` on, fixed at its start, booked at its end."""

    replica: int
    start_s: float
    seconds: float
    decodes: list[ReferenceRequest]
    chunks: list[tuple[ReferenceRequest, int]]  # prompts and how many of their tokens
    preempted: list[ReferenceRequest]
    fetched: bool = False

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


@dataclass(frozen=True)
class StageRecord:
    """A line of the log. Requests are named by their rows."""

    replica: int
    kind: str  # decode, prefill, mixed
    start_s: float
    seconds: float
    decodes: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]  # (row, tokens)
    preempted: tuple[int, ...]
    free_blocks: float  # while it runs; inf: no limit


@dataclass(frozen=True)
class View:
    """What a router sees of a replica."""

    waiting: int
    running: int
    tokens: int  # still to compute, of all waiting and running
    wanted_blocks: int  # by the prefills of waiting requests
    unfinished_blocks: int  # of prompts begun: what they have not computed
    held_blocks: int
    free_blocks: float

    def with_one_more(self, request: ReferenceRequest, replica: Replica) -> View:
        """The same after a request that has not run yet has been sent there."""
        return replace(
            self,
            waiting=self.waiting + 1,
            tokens=self.tokens + request.tokens_left,
            wanted_blocks=self.wanted_blocks + replica.blocks_for(request.wanted_tokens),
        )

    def score(self, router: str) -> float:
        """The replica with the least score gets the request."""
        present = self.waiting + self.running
        if router == "least-requests":
            return present
        if router == "least-waiting":
            return self.waiting
        if router == "least-tokens":
            return self.tokens
        if router == "vllm-dp":
            return 4 * self.waiting + self.running
        if (
            router == "llumnix"
        ):  # most free steps; CHOICE: a replica with nothing has infinitely many
            return -(self.free_blocks - self.wanted_blocks) / present if present else -math.inf
        assert router == "dynamo"
        # CHOICE: prefill is what all have yet to compute, in blocks of each; "active decode blocks"
        # are all that are held. The new request adds the same everywhere.
        return self.wanted_blocks + self.unfinished_blocks + self.held_blocks


@dataclass(eq=False)
class Move:
    """A request's way from one replica to another, or from the host; from the steal to its end.

    kind: `queue` and `recompute` end in the target's queue, `copy` and `fetch` on a reserved client.
    state: `flying` until due, then over or `landed`; a live `copy` before that `copying` until due;
    that and `recompute` are `pausing` until the source's boundary; in the end `queued` or `joined`,
    `failed` (no memory) or `void` (the request had finished or was preempted).
    """

    kind: str
    request: ReferenceRequest
    source: Replica | None  # None: the host
    target: Replica
    made_s: float
    state: str
    due_s: float = math.inf  # inf: it waits for a boundary
    client: int | None = None  # reserved at the target
    blocks: int = 0  # reserved at the target
    emitted: int = 0  # tokens, when it was made
    tokens: int = 0  # that the target's queue will want to prefill, as counted when it was made
    left_s: float | None = None  # when the request left the source's clients or queue
    ended_s: float | None = None

    @property
    def leaving(self) -> bool:
        """Whether the request still decodes at its source."""
        return self.state in ("copying", "pausing")


@dataclass(eq=False)
class Replica:
    """One copy of the model: its queue, who runs (in order of admission), its stage."""

    id: int
    spec: ReplicaSpec
    block_tokens: int
    queue: list[ReferenceRequest]  # in a pool the same list for all
    running: list[ReferenceRequest] = field(default_factory=list)
    stage: Stage | None = None
    reserved: list[Move] = field(default_factory=list)  # with a client and blocks here
    kept: list[ReferenceRequest] = field(default_factory=list)  # gone, but their blocks are here
    stole_s: float = -math.inf  # when it last stole a running request

    def blocks_for(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_tokens)

    @property
    def blocks(self) -> float:
        if self.spec.kv_capacity_tokens == 0:
            return math.inf
        return self.spec.kv_capacity_tokens // self.block_tokens

    @property
    def free_blocks(self) -> float:
        return self.blocks - self.used_blocks

    @property
    def used_blocks(self) -> int:
        held = sum(request.blocks for request in self.running + self.kept)
        return held + self.reserved_blocks

    @property
    def reserved_blocks(self) -> int:
        return sum(move.blocks for move in self.reserved)

    @property
    def held_clients(self) -> int:
        return len(self.running) + len(self.reserved)

    @property
    def watermark_binds(self) -> bool:
        return self.held_clients > 0 and self.blocks < math.inf

    @property
    def idle_clients(self) -> list[int]:
        busy = {request.client for request in self.running}
        busy |= {move.client for move in self.reserved}
        return [client for client in range(self.spec.clients) if client not in busy]

    def could_ever_hold(self, request: ReferenceRequest) -> bool:
        return self.blocks_for(request.prompt + request.output) <= self.blocks

    def lacks(self, request: ReferenceRequest, tokens: int) -> int:
        """Blocks that a request must still take to hold so many tokens."""
        return max(self.blocks_for(tokens) - request.blocks, 0)

    def take(self, request: ReferenceRequest, tokens: int) -> None:
        request.blocks += self.lacks(request, tokens)
        assert self.free_blocks >= 0

    def view(self) -> View:
        """Whoever has a reservation counts as running, without tokens left.

        CHOICE: blocks kept for those that have gone count as held.
        """
        begun = [request for request in self.running if not request.decoding]
        return View(
            waiting=len(self.queue),
            running=self.held_clients,
            tokens=sum(request.tokens_left for request in self.queue + self.running),
            wanted_blocks=sum(self.blocks_for(request.wanted_tokens) for request in self.queue),
            unfinished_blocks=sum(
                self.blocks_for(request.todo - request.computed) for request in begun
            ),
            held_blocks=self.used_blocks,
            free_blocks=self.free_blocks,
        )


# ---- seconds --------------------------------------------------------------------------------


def stage_s(
    costs: StageCosts,
    mixed: str,
    decodes: Sequence[ReferenceRequest],
    chunks: Sequence[tuple[ReferenceRequest, int]],
) -> float:
    """Seconds at speed 1 of a stage: a decode round, a prefill stage, or both in one pass."""
    if mixed == "sum":
        return sum_s(costs, decodes, chunks)
    if not chunks:
        return decode_round_s(costs, len(decodes), cached(decodes))
    if not decodes:
        return prefill_s(costs, *work(chunks), len(chunks))
    return one_pass_s(costs, decodes, chunks)


def cached(requests: Sequence[ReferenceRequest]) -> int:
    """Costs count the prompt and every emitted token."""
    return sum(request.prompt + request.emitted for request in requests)


def work(chunks: Sequence[tuple[ReferenceRequest, int]]) -> tuple[int, int]:
    """Tokens of chunks, and how much the squares of what is computed grow by them."""
    tokens = sum(count for _, count in chunks)
    squares = sum((r.computed + count) ** 2 - r.computed**2 for r, count in chunks)
    return tokens, squares


def one_pass_s(
    costs: StageCosts,
    decodes: Sequence[ReferenceRequest],
    chunks: Sequence[tuple[ReferenceRequest, int]],
) -> float:
    """The longest of floor, decode line and prefill line at all tokens, plus attention of both.

    CHOICE: the engine's overhead counts every request of the pass once.
    """
    decode, prefill, overhead = costs.decode, costs.prefill, costs.engine_overhead
    assert isinstance(prefill, AffinePrefill), "levels say nothing of a mixed pass"
    tokens, squares = work(chunks)
    served = len(decodes) + tokens
    if isinstance(decode, TableDecode):
        decode_line = interpolated(served, decode.batch, decode.seconds)
    else:
        decode_line = decode.base + decode.per_client * served
    prefill_line = prefill.base + prefill.per_token * served
    seconds = max(prefill.floor, decode_line, prefill_line)
    seconds += decode.per_kv_token * cached(decodes) + prefill.per_token_squared * squares
    seconds += decode.per_client_kv_token * len(decodes) * cached(decodes)
    seconds += prefill.per_batch_token_squared * float(tokens) * float(tokens)
    return seconds + overhead.base + overhead.per_client * (len(decodes) + len(chunks))


def sum_s(
    costs: StageCosts,
    decodes: Sequence[ReferenceRequest],
    chunks: Sequence[tuple[ReferenceRequest, int]],
) -> float:
    """A decode round of all that emit a token after their first, plus a prefill stage of prompts.

    A chunk that begins beyond the prompt (a token emitted before a preemption) is no prefill.
    """
    ends = [r for r, count in chunks if r.computed + count == r.todo]
    later = [*decodes, *(request for request in ends if request.emitted > 0)]
    of_prompts = [(r, count) for r, count in chunks if r.computed < r.prompt]
    seconds = 0.0
    if later:
        seconds += decode_round_s(costs, len(later), cached(later))
    if of_prompts:
        seconds += prefill_s(costs, *work(of_prompts), len(of_prompts))
    return seconds
