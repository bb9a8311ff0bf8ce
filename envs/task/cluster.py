"""``[cluster]`` of a task: replicas, memory, routers, and what moves between replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from servegym.envs.arguments import check_fields
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.machine.links import LINKS
from servegym.envs.vocabulary import (
    ADMISSION_GUARDS,
    EVICTIONS,
    MIGRATIONS,
    MIXED_COSTS,
    MOVES,
    ORDERS,
    ROLES,
    ROUTERS,
    STEAL_ORDERS,
    STEAL_SHARES,
    VICTIMS,
)

MAX_CLIENTS: Final = 1_000_000
MAX_REPLICAS: Final = 4096


def check_whole(name: str, value: int, least: int, most: int) -> None:
    """Refuse a number outside a range."""
    if not least <= value <= most:
        raise ServegymError(
            f"{name} must be a whole number in {least} … {most}, got {shown(value)}"
        )


@dataclass(frozen=True)
class ReplicaConfig:
    """``[[cluster.replica]]``: in what one replica differs from the others.

    Examples
    --------
    >>> ReplicaConfig(speed=2.0).clients is None
    True
    """

    clients: int | None = None
    """Its concurrency slots; None: as ``cluster.clients``."""
    kv_capacity_tokens: int | None = None
    """Its memory; None: as ``cluster.kv_capacity_tokens``."""
    speed: float = 1.0
    """Its stages take the cost model's seconds divided by this, 1e-6 … 1e6."""

    role: str = "both"
    """``prefill``: whoever has its first token goes on at another replica, to which its keys and values
    are copied; ``decode``: no request comes here first; or ``both``."""

    def __post_init__(self) -> None:
        check_fields("cluster.replica", self)
        if self.role not in ROLES:
            raise unknown("value of cluster.replica.role:", self.role, ROLES)
        if self.clients is not None:
            check_whole("cluster.replica.clients", self.clients, 1, MAX_CLIENTS)
        if self.kv_capacity_tokens is not None:
            check_whole("cluster.replica.kv_capacity_tokens", self.kv_capacity_tokens, 0, 10**12)
        if not 1e-6 <= self.speed <= 1e6:
            raise ServegymError(f"cluster.replica.speed must lie in 1e-6 … 1e6, got {self.speed}")


class FullReplica(NamedTuple):
    """All numbers of one replica."""

    clients: int
    kv_capacity_tokens: int
    speed: float
    role: str


@dataclass(frozen=True)
class LinkConfig:
    """``cluster.link``: what copying between two memories costs.

    Examples
    --------
    >>> LinkConfig(latency_s=0.001, bytes_per_s=1e10).bytes_per_s
    10000000000.0
    """

    latency_s: float = 0.0
    """Seconds before the first byte, 0 … 1e6."""
    bytes_per_s: float = 200e9
    """> 0, at most 1e18."""

    def __post_init__(self) -> None:
        check_fields("cluster.link", self)
        if not 0 <= self.latency_s <= 1e6:
            raise ServegymError(f"cluster.link.latency_s must lie in 0 … 1e6, got {self.latency_s}")
        if not 0 < self.bytes_per_s <= 1e18:
            raise ServegymError(
                f"cluster.link.bytes_per_s must be > 0 and at most 1e18, got {self.bytes_per_s}"
            )


_WHOLE: Final = {
    "clients": (1, MAX_CLIENTS),
    "replicas": (1, MAX_REPLICAS),
    "kv_capacity_tokens": (0, 10**12),
    "kv_block_tokens": (1, 65_536),
    "level_tokens": (1, 10**6),
    "chunk_tokens": (0, 10**12),
    "max_prefill_tokens": (0, 10**12),
    "kv_bytes_per_token": (0, 10**9),
}
"""Whole numbers of ``[cluster]``: least and most."""

_UP_TO: Final = {
    "steal_delay_s": "1e6",
    "conservativeness": "100",
    "patience_s": "1e9",
    "steal_period_s": "1e9",
    "freeness_steps": "1e9",
    "shed_at": "1e6",
    "staleness_s": "1e9",
}
"""Other numbers, from 0 on: the most, as messages write it."""

_NAMED: Final = {
    "link": tuple(LINKS),
    "host_link": tuple(LINKS),
    "preempt": VICTIMS,
    "admission_guard": ADMISSION_GUARDS,
    "shortest_by": ORDERS,
    "mixed": MIXED_COSTS,
    "router": ROUTERS,
    "steal_order": STEAL_ORDERS,
    "steal_share": STEAL_SHARES,
    "migrate": MIGRATIONS,
    "move": MOVES,
    "evict": EVICTIONS,
}
"""What the other keys may name."""


@dataclass(frozen=True)
class ClusterConfig:
    """``[cluster]``: the machines.

    Examples
    --------
    >>> ClusterConfig(clients=50).clients
    50
    """

    replicas: int = 1
    """Copies of the model, 1 … 4,096."""
    clients: int = 200
    """Concurrency slots of a replica, 1 … 1,000,000."""
    kv_capacity_tokens: int = 0
    """Tokens whose keys and values a replica's memory holds; 0: not limiting."""
    kv_block_tokens: int = 1
    """Tokens of one block of that memory, 1 … 65,536: a request holds whole blocks. 16 is vLLM's."""
    watermark: float = 0.0
    """Share of the blocks that admission leaves free while others run, ≥ 0 and < 1."""
    preempt: str = "newest"
    """Who gives up its memory when a decode round does not fit, see ``VICTIMS``."""
    admission_guard: str = "none"
    """What must fit into memory before a request is admitted, see ``ADMISSION_GUARDS``."""
    conservativeness: float = 1.0
    """Of ``sglang``: factor of that share at first, 0 … 100; SGLang's schedule_conservativeness."""
    patience_s: float = 0.0
    """Under the rule ``shortest``: who came so long ago goes before shorter ones, 0 … 1e9; 0: nobody."""
    shortest_by: str = "length"
    """Who goes first under the rule ``shortest``, see ``ORDERS``."""
    level_tokens: int = 256
    """Tokens of the first level of feedback, each next one holds twice as many, 1 … 10⁶. Without meaning
    unless ``shortest_by`` is ``level`` or ``preempt`` ``lowest-level``."""
    chunk_tokens: int = 0
    """Token budget of a mixed stage, which cuts prompts to what decoding clients leave of it; 0: no
    mixed stages. Under the guard ``sglang`` it cuts prompts of prefill stages, too."""
    mixed: str = "one-pass"
    """What a mixed stage costs: ``one-pass`` of the weights for all tokens, or the ``sum`` of a prefill
    part and a decode part, as some simulators have it."""
    max_prefill_tokens: int = 0
    """Token budget of one prefill stage; 0: none. A stage always admits at least one request."""
    router: str = "round-robin"
    """Which replica a request goes to when it arrives, see ``ROUTERS``; ``pool``: one queue for all."""
    staleness_s: float = 0.0
    """For how long a router goes by what it has seen of the replicas."""
    steal_order: str = "longest"
    """Which waiting requests a replica steals, see ``STEAL_ORDERS``. Without meaning unless
    ``process.steals`` names ``waiting``."""
    steal_share: str = "room"
    """How many of them, see ``STEAL_SHARES``."""
    steal_delay_s: float = 0.0
    """Seconds until a stolen request that has no keys and values to copy arrives, 0 … 1e6."""
    migrate: str = "longest"
    """Which running request a replica steals and from where, see ``MIGRATIONS``. Without meaning unless
    ``process.steals`` names ``running``."""
    steal_period_s: float = 0.0
    """Seconds after a theft of running requests in which the same replica steals no more of them, 0 … 1e9."""
    freeness_steps: float = 3.0
    """Of ``freeness``: a replica with fewer free blocks a request gives requests away, one with more takes
    them, 0 … 1e9; 3 is Llumnix's."""
    shed_at: float = 0.0
    """Share of ``slo.ttft_s`` by which a first token must come: who waits and cannot have it by then is
    turned away, 0 … 1e6; 0: nobody."""
    move: str = "copy"
    """How a stolen running request moves, see ``MOVES``."""
    kv_bytes_per_token: int = 327_680
    """Bytes of the keys and values of one token; the default is that of Llama 2 70B in 16 bits."""
    link: str | LinkConfig = "nvlink"
    """What copies run over between replicas: one of ``LINKS``, or a table of ``latency_s`` and
    ``bytes_per_s``."""
    evict: str = "recompute"
    """What becomes of the keys and values of a preempted request: dropped, to ``recompute`` them, or kept
    on the ``host``, to fetch them when it is admitted again."""
    host_link: str | LinkConfig = "pcie4"
    """What copies run over between a replica and its host."""
    replica: tuple[ReplicaConfig, ...] = ()
    """``[[cluster.replica]]``: what differs, one table per replica; none: all are equal."""

    def __post_init__(self) -> None:
        check_fields("cluster", self)
        for key, (least, most) in _WHOLE.items():
            check_whole(f"cluster.{key}", getattr(self, key), least, most)
        if not 0 <= self.watermark < 1:
            raise ServegymError(f"cluster.watermark must be ≥ 0 and < 1, got {self.watermark}")
        for key, highest in _UP_TO.items():
            if not 0 <= getattr(self, key) <= float(highest):
                raise ServegymError(
                    f"cluster.{key} must lie in 0 … {highest}, got {getattr(self, key)}"
                )
        for key, names in _NAMED.items():
            value = getattr(self, key)
            if isinstance(value, str) and value not in names:  # a link may be numbers
                raise unknown(f"value of cluster.{key}:", value, names)
        self._check_replicas()
        self._check_roles()

    def _check_replicas(self) -> None:
        """Refuse tables that are too few or too many, too many clients, and memory that holds no block."""
        if self.replica and len(self.replica) != self.replicas:
            raise ServegymError(
                f"cluster.replicas is {self.replicas}, but there are {len(self.replica)} tables "
                "[[cluster.replica]]; give one for each replica or none"
            )
        total = sum(replica.clients for replica in self.replica_tables())
        if total > MAX_CLIENTS:
            raise ServegymError(
                f"all replicas together may have {MAX_CLIENTS} clients, got {total}"
            )
        memory = {full.kv_capacity_tokens for full in self.replica_tables()}
        if self.router == "pool" and self.admission_guard == "sglang" and len(memory) > 1:
            raise ServegymError(
                "cluster.admission_guard 'sglang' has no rule for a pool of replicas of unlike memory: "
                "give all the same kv_capacity_tokens, or choose another router"
            )
        for k, full in enumerate(self.replica_tables()):
            if 0 < full.kv_capacity_tokens < self.kv_block_tokens:
                own = bool(self.replica) and self.replica[k].kv_capacity_tokens is not None
                raise ServegymError(
                    f"cluster.{f'replica[{k}].' if own else ''}kv_capacity_tokens must be 0 or hold a "
                    f"block of {self.kv_block_tokens} tokens (cluster.kv_block_tokens), got "
                    f"{full.kv_capacity_tokens}"
                )

    def _check_roles(self) -> None:
        """Refuse roles that leave requests without a replica for their prompts or for their rounds."""
        roles = [replica.role for replica in self.replica]
        if set(roles) <= {"both"}:
            return
        if self.router in ("pool", "plan"):
            raise ServegymError(
                f"cluster.router {self.router!r} knows no roles of replicas; choose another router"
            )
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            if role in roles and not {"both", other} & set(roles):
                raise ServegymError(
                    f"cluster.replica has roles {role!r} only; one must be 'both' or {other!r}"
                )

    def link_numbers(self) -> tuple[LinkConfig, LinkConfig]:
        """Return the link between replicas and that to the host as numbers."""
        between, host = (
            LinkConfig(*LINKS[link][:2]) if isinstance(link, str) else link
            for link in (self.link, self.host_link)
        )
        return between, host

    @property
    def all_clients(self) -> int:
        """Clients of all replicas together: as many planned queues as a plan has."""
        return sum(replica.clients for replica in self.replica_tables())

    @property
    def is_batch_machine(self) -> bool:
        """Whether it is one replica without memory limit, mixed stages and sheds: exact methods know it."""
        unlimited = all(replica.kv_capacity_tokens == 0 for replica in self.replica_tables())
        return self.replicas == 1 and unlimited and self.chunk_tokens == 0 and self.shed_at == 0

    def replica_tables(self) -> tuple[FullReplica, ...]:
        """Return each replica's own numbers, with the cluster's in the place of what it leaves out."""
        tables = self.replica or (ReplicaConfig(),) * self.replicas
        return tuple(
            FullReplica(
                self.clients if table.clients is None else table.clients,
                self.kv_capacity_tokens
                if table.kv_capacity_tokens is None
                else table.kv_capacity_tokens,
                table.speed,
                table.role,
            )
            for table in tables
        )
