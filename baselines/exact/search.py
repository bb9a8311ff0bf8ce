"""Best-first search (A*) for the joint problem of small cases.

A state is the multiset of waiting requests and the sorted rounds left of the running ones; of two ways
to a state the cheaper one is never worse. Moves are a prefill stage (any batch that fits; a full one
where stages count alone) and decoding on (to the next finish; by one round where the time of a round
is no straight line in the active clients, as then waiting a while can pay).

**Bound.** If s more stages admit the w waiting requests, they fill w of s · J places, and a request
that runs through a stage takes one of the others. So at most s · J − w requests run through any stage.
Each other request lies within one of the s + 1 stretches between stages, at most J in each, and a
stretch is as long as its longest request. Hence: sort all requests by rounds left and drop the
s · J − w longest; every J-th of the rest, from the first on, add up to no more than the rounds to come.
Area, longest and pigeonhole (``rounds_lower_bound``) bound these rounds, too. Decode time follows from
the rounds (the bound's linear program, by its dual); the s stages take at least as long as the cheapest
partition of the waiting requests into s or more batches. The least sum over s is the bound.
"""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

import numpy as np

from servegym.baselines.exact.problem import JointProblem, Outcome
from servegym.baselines.exact.tables import Tables, Whole, make_tables
from servegym.baselines.schedules import Schedule, Stage
from servegym.envs.jit import allocating_kernel, kernel

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment,return-value"

MAX_NODES: Final = 1 << 23
"""States kept before the search gives up, about 1 GB."""

_NODE: Final = np.dtype(
    [
        ("key", np.int64),  # waiting counts and rounds left, packed
        ("cost_s", np.float64),  # least cost known of getting here
        ("parent", np.int64),  # node it was reached from, −1 at the start
        ("waiting", np.int32),  # number of the waiting set
        ("batch", np.int32),  # admitted last, −1: decoded
        ("rounds", np.int64),  # decode clock
    ]
)
_ENTRY: Final = np.dtype([("bound_s", np.float64), ("cost_s", np.float64), ("node", np.int64)])

RUNNING, FOUND, EMPTY, FULL = range(4)


class Frontier(NamedTuple):
    """States found so far, a hash table of them and the heap of those to expand."""

    nodes: Any  # (room,) _NODE
    slots: Whole  # (2 · room,) node + 1, 0: free; a power of two
    heap: Any  # (2 · room,) _ENTRY
    used: Whole  # (2,) nodes, entries of the heap


class Arrival(NamedTuple):
    """One way to a state: what waits there, and how the state was reached."""

    packed: int  # the waiting set
    number: int  # of the waiting set
    cost_s: float
    parent: int  # node it was reached from, −1 at the start
    batch: int  # admitted last, −1: decoded
    clock: int  # decode clock


def search(problem: JointProblem, cutoff_s: float, time_limit_s: float) -> Outcome:
    """Look for the cheapest schedule below ``cutoff_s``.

    Raises
    ------
    ServegymError
        If the case has too many waiting sets or batches.
    """
    deadline = time.perf_counter() + time_limit_s
    tables = make_tables(problem)
    frontier = _start(problem, tables)
    started = time.perf_counter()
    _expand(tables, frontier, cutoff_s, 0)
    deadline += time.perf_counter() - started  # compiling it does not count
    status, goal, seconds = RUNNING, -1, 0.0
    while status in (RUNNING, FULL):
        if status == FULL:
            if len(frontier.nodes) >= MAX_NODES:
                break
            frontier = _grown(frontier)
        if time.perf_counter() > deadline:
            break
        status, goal, seconds = _expand(tables, frontier, cutoff_s, 2000)
    if status == FOUND:
        return Outcome(_schedule_to(problem, tables, frontier, goal), seconds, True)
    if status == EMPTY:
        return Outcome(None, cutoff_s, True)
    return Outcome(None, min(cutoff_s, float(frontier.heap[0].bound_s)), False)


# ---- states ---------------------------------------------------------------------------------


def _start(problem: JointProblem, tables: Tables) -> Frontier:
    """Return a frontier whose only state has every request waiting."""
    shift = problem.clients * tables.width
    packed = int(problem.kinds.count @ (1 << tables.field))
    frontier = _make_frontier(1 << 14)
    scratch = np.zeros(problem.clients + len(problem.requests) + 1, dtype=np.int64)
    left = np.zeros(problem.clients, dtype=np.int64)
    everything = Arrival(packed, len(tables.count) - 1, 0.0, -1, -1, 0)
    _reach(tables, frontier, everything, left, 0, np.inf, scratch)
    assert frontier.nodes[0].key == packed << shift
    return frontier


def _make_frontier(room: int) -> Frontier:
    return Frontier(
        np.zeros(room, dtype=_NODE).view(np.recarray),
        np.zeros(2 * room, dtype=np.int64),
        np.zeros(2 * room, dtype=_ENTRY).view(np.recarray),
        np.zeros(2, dtype=np.int64),
    )


def _grown(old: Frontier) -> Frontier:
    """Return a frontier of the same states with twice the room."""
    new = _make_frontier(2 * len(old.nodes))
    new.nodes[: len(old.nodes)] = old.nodes
    new.heap[: len(old.heap)] = old.heap
    new.used[:] = old.used
    _rehash(new)
    return new


@allocating_kernel
def _rehash(frontier: Frontier) -> None:
    for node in range(frontier.used[0]):
        frontier.slots[_slot(frontier, frontier.nodes[node].key)] = node + 1


@kernel
def _slot(frontier: Frontier, key: int) -> int:
    """Return where a key stands in the hash table, or the free place for it."""
    last = frontier.slots.size - 1
    mixed = (key ^ (key >> 29)) * 0x2545F4914F6CDD1D
    place = (mixed ^ (mixed >> 32)) & last
    while True:
        node = frontier.slots[place] - 1
        if node < 0 or frontier.nodes[node].key == key:
            return place
        place = (place + 1) & last


@allocating_kernel
def _expand(
    tables: Tables, frontier: Frontier, cutoff_s: float, expansions: int
) -> tuple[int, int, float]:
    """Expand the most promising states; return the status, and the goal's node and cost if found."""
    clients = tables.decode_s.size - 1
    left = np.zeros(clients, dtype=np.int64)
    after = np.zeros(clients, dtype=np.int64)
    scratch = np.zeros(clients + tables.prefill_s.shape[1], dtype=np.int64)
    most = tables.batch_s.size + 1  # states that one state can lead to
    for _ in range(expansions):
        if frontier.used[1] == 0:
            return EMPTY, -1, 0.0
        room = min(frontier.nodes.size - frontier.used[0], frontier.heap.size - frontier.used[1])
        if room < most:
            return FULL, -1, 0.0
        bound_s = frontier.heap[0].bound_s
        entry_s = frontier.heap[0].cost_s
        node = frontier.heap[0].node
        _pop(frontier)
        state = frontier.nodes[node]
        cost_s, number, clock = state.cost_s, state.waiting, state.rounds
        if entry_s > cost_s:
            continue  # a cheaper way to the state was found since
        if tables.count[number] == 0:
            return FOUND, node, bound_s
        here = Arrival(
            state.key >> (clients * tables.width), number, cost_s, node, state.batch, clock
        )
        active = 0
        for j in range(clients):
            left[j] = (state.key >> (j * tables.width)) & ((1 << tables.width) - 1)
            active += left[j] > 0
        _admit(tables, frontier, here, left, active, after, cutoff_s, scratch)
        if active > 0:
            _decode(tables, frontier, here, left, active, after, cutoff_s, scratch)
    return RUNNING, -1, 0.0


@kernel
def _admit(
    tables: Tables,
    frontier: Frontier,
    here: Arrival,
    left: Whole,
    active: int,
    after: Whole,
    cutoff_s: float,
    scratch: Whole,
) -> None:
    """Reach what every prefill stage leads to; ``here.parent`` is this state's own node."""
    most = min(left.size - active, tables.count[here.number])
    if most == 0:
        return
    least = most if tables.counts_stages else 1
    for b in range(tables.first[least], tables.first[most + 1]):
        rest = (here.packed | tables.guards) - tables.batch_packed[b]
        if rest & tables.guards == tables.guards:
            busy = _join(left, active, tables.batch_rounds[b], after)
            reached = Arrival(
                rest ^ tables.guards,
                here.number - tables.batch_number[b],
                here.cost_s + tables.batch_s[b],
                here.parent,
                b,
                here.clock,
            )
            _reach(tables, frontier, reached, after, busy, cutoff_s, scratch)


@kernel
def _decode(
    tables: Tables,
    frontier: Frontier,
    here: Arrival,
    left: Whole,
    active: int,
    after: Whole,
    cutoff_s: float,
    scratch: Whole,
) -> None:
    """Reach what decoding on leads to; ``here.parent`` is this state's own node."""
    run = left[active - 1] if tables.counts_rounds or active == left.size else 1
    busy = 0
    for j in range(left.size):
        after[j] = max(left[j] - run, 0)
        busy += after[j] > 0
    cost_s = here.cost_s + run * tables.decode_s[active]
    reached = Arrival(here.packed, here.number, cost_s, here.parent, -1, here.clock + run)
    _reach(tables, frontier, reached, after, busy, cutoff_s, scratch)


@kernel
def _join(left: Whole, active: int, joining: Whole, after: Whole) -> int:
    """Merge two lists, most rounds first, into ``after``; return how many have rounds left."""
    i = 0
    j = 0
    for place in range(after.size):
        if i < active and (j == joining.size or left[i] >= joining[j]):
            after[place] = left[i]
            i += 1
        else:
            after[place] = joining[j]
            j += 1
    busy = 0
    for place in range(after.size):
        busy += after[place] > 0
    return busy


@kernel
def _reach(
    tables: Tables,
    frontier: Frontier,
    reached: Arrival,
    left: Whole,
    active: int,
    cutoff_s: float,
    scratch: Whole,
) -> None:
    """Keep a state and queue it, unless a way as cheap is known or its bound is above the cutoff."""
    key = reached.packed
    for j in range(left.size - 1, -1, -1):
        key = (key << tables.width) | left[j]
    place = _slot(frontier, key)
    node = frontier.slots[place] - 1
    cost_s = reached.cost_s
    if node >= 0 and frontier.nodes[node].cost_s <= cost_s:
        return
    bound_s = cost_s + _bound(tables, reached.packed, reached.number, left, active, scratch)
    if bound_s >= cutoff_s:
        return
    if node < 0:
        node = frontier.used[0]
        frontier.used[0] += 1
        frontier.slots[place] = node + 1
        frontier.nodes[node].key = key
    state = frontier.nodes[node]
    state.cost_s = cost_s
    state.parent = reached.parent
    state.waiting = reached.number
    state.batch = reached.batch
    state.rounds = reached.clock
    _push(frontier, bound_s, cost_s, node)


@kernel
def _bound(
    tables: Tables, packed: int, number: int, left: Whole, active: int, line: Whole
) -> float:
    """Return a lower bound on the seconds that a state still needs; exact once no request waits."""
    seconds = 0.0
    if tables.count[number] == 0:
        done = 0
        for j in range(active - 1, -1, -1):
            seconds += (left[j] - done) * tables.decode_s[j + 1]
            done = left[j]
        return seconds
    clients = left.size
    # All unfinished requests, most rounds first.
    size = 0
    taken = 0
    work = tables.work[number]
    for kind in range(tables.rounds.size):
        length = tables.rounds[kind]
        while taken < active and left[taken] >= length:
            line[size] = left[taken]
            work += left[taken]
            size += 1
            taken += 1
        for _ in range((packed >> tables.field[kind]) & tables.mask[kind]):
            line[size] = length
            size += 1
    while taken < active:
        line[size] = left[taken]
        work += left[taken]
        size += 1
        taken += 1
    least = max(-(-work // clients), line[0])
    depth = 1
    while depth * clients < size:  # pigeonhole
        pile = 0
        for above in range(depth + 1):
            pile += line[depth * clients - above]
        least = max(least, pile)
        depth += 1
    waiting = tables.count[number]
    seconds = np.inf
    for stages in range(-(-waiting // clients), waiting + 1):
        rounds = 0
        for place in range(stages * clients - waiting, size, clients):
            rounds += line[place]
        rounds = max(rounds, least)
        decode_s = 0.0
        for vertex in range(tables.duals.shape[0]):
            vertex_s = tables.duals[vertex, 0] * work + tables.duals[vertex, 1] * rounds
            decode_s = max(decode_s, vertex_s)
        seconds = min(seconds, tables.prefill_s[number, stages] + decode_s)
        if rounds == least:  # more stages gain no more rounds
            break
    return seconds


# ---- the heap -------------------------------------------------------------------------------


@kernel
def _push(frontier: Frontier, bound_s: float, cost_s: float, node: int) -> None:
    heap = frontier.heap
    place = frontier.used[1]
    frontier.used[1] += 1
    while place > 0:
        above = (place - 1) // 2
        if not _before(bound_s, cost_s, heap[above].bound_s, heap[above].cost_s):
            break
        _copy(heap, above, place)
        place = above
    heap[place].bound_s = bound_s
    heap[place].cost_s = cost_s
    heap[place].node = node


@kernel
def _pop(frontier: Frontier) -> None:
    """Remove the first entry."""
    heap = frontier.heap
    frontier.used[1] -= 1
    size = frontier.used[1]
    place = 0
    while 2 * place + 1 < size:
        below = 2 * place + 1
        right = below + 1
        if right < size and _before(
            heap[right].bound_s, heap[right].cost_s, heap[below].bound_s, heap[below].cost_s
        ):
            below = right
        if not _before(
            heap[below].bound_s, heap[below].cost_s, heap[size].bound_s, heap[size].cost_s
        ):
            break
        _copy(heap, below, place)
        place = below
    _copy(heap, size, place)


@kernel
def _before(bound_s: float, cost_s: float, other_bound_s: float, other_cost_s: float) -> bool:
    """Whether an entry comes first: the lower bound; of equal bounds the higher cost so far."""
    return bound_s < other_bound_s or (bound_s == other_bound_s and cost_s > other_cost_s)


@kernel
def _copy(heap: Any, source: int, target: int) -> None:
    heap[target].bound_s = heap[source].bound_s
    heap[target].cost_s = heap[source].cost_s
    heap[target].node = heap[source].node


# ---- the answer -----------------------------------------------------------------------------


def _schedule_to(problem: JointProblem, tables: Tables, frontier: Frontier, goal: int) -> Schedule:
    """Read the stages off the way to a state; of equal requests the first ids go first."""
    stages: list[tuple[int, int]] = []
    node = goal
    while node >= 0:
        state = frontier.nodes[node]
        if state.batch >= 0:
            stages.append((int(state.rounds), int(state.batch)))
        node = int(state.parent)
    waiting = [list(ids) for ids in problem.kinds.members]
    schedule: list[Stage] = []
    for clock, batch in reversed(stages):
        packed = int(tables.batch_packed[batch])
        ids: list[int] = []
        for kind, members in enumerate(waiting):
            count = packed >> int(tables.field[kind]) & int(tables.mask[kind])
            ids += [members.pop(0) for _ in range(count)]
        schedule.append(Stage(clock, tuple(sorted(ids))))
    return schedule
