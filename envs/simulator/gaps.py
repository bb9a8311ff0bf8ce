"""The worst gap between two tokens of each request, in O(1) a stage and request on average.

All that decode at a replica emit together, so who has been there longer has had a gap at least as bad. They
stand in groups of equal worst gaps, a stack from the oldest to the newest in which the gaps fall: a gap that
all have now is the worst of the newest groups, which become one. A group is *fresh* until its first token
together: what it waits for counts from its own beginning, not from the replica's last token.

A request finds its group by the stamp with which it began to decode: it is the last whose stamp is not
higher. Elsewhere a request carries what it has had so far, and the time of its last token, in CARRIED.
"""

from __future__ import annotations

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.seconds import decode_seconds
from servegym.envs.simulator.state import NOBODY, PREFILL, State


@shared_kernel
def note_stage(state: State, costs: CostTables, e: int, r: int) -> None:
    """Note the gaps that end with the stage of replica ``r``, which is to be booked next.

    Of a run of decode rounds the first ends the wait since the token before; of the others the last takes
    longest, as the cache grows.
    """
    replica = state.replicas[e, r]
    if replica.stage == PREFILL or replica.active == 0:
        return
    rounds = replica.run_rounds
    first_s, longest_s = state.event_s[e, r], 0.0
    if rounds > 1:
        round_s = decode_seconds(costs, r, replica.active, replica.cached_tokens, 1)
        first_s = replica.clock_s + round_s
        cached = replica.cached_tokens + (rounds - 1) * replica.active
        longest_s = decode_seconds(costs, r, replica.active, cached, 1)
    note_rounds(state, e, r, first_s, longest_s)


@kernel
def note_rounds(state: State, e: int, r: int, first_s: float, longest_s: float) -> None:
    """Note the gaps of a run whose first round ends at ``first_s``; the longest of the others, if any."""
    replica = state.replicas[e, r]
    _end_wait(state, e, r, first_s)
    if replica.run_rounds > 1:
        replica.gap_groups = _raise(state, e, r, replica.gap_groups, longest_s)
    replica.emitted_s = state.event_s[e, r]


@kernel
def _end_wait(state: State, e: int, r: int, now_s: float) -> None:
    """Let everybody at replica ``r`` emit a token; no group is fresh any more."""
    replica, gaps = state.replicas[e, r], state.gaps[e, r]
    first_fresh = replica.gap_groups - replica.fresh_groups
    top = _raise(state, e, r, first_fresh, now_s - replica.emitted_s)
    for k in range(first_fresh, replica.gap_groups):
        stamp, members, joined = gaps[k].stamp, gaps[k].members, gaps[k].joined
        wait_s = now_s - gaps[k].since_s
        if joined != NOBODY:
            own = state.carried[e, joined]
            own.worst_gap_s = max(own.worst_gap_s, now_s - own.last_token_s)
        if top > 0 and gaps[top - 1].worst_s <= wait_s:
            gaps[top - 1].members += members
        else:
            gaps[top].stamp = stamp
            gaps[top].members = members
            gaps[top].worst_s = wait_s
            top += 1
    replica.gap_groups = top
    replica.fresh_groups = 0


@kernel
def _raise(state: State, e: int, r: int, groups: int, gap_s: float) -> int:
    """Let the first ``groups`` have had a gap; return how many they are then."""
    gaps = state.gaps[e, r]
    top, members = groups, 0
    while top > 0 and gaps[top - 1].worst_s <= gap_s:
        top -= 1
        members += gaps[top].members
    if top == groups:
        return groups
    gaps[top].members = members
    gaps[top].worst_s = gap_s
    return top + 1


@shared_kernel
def begin_decoding(state: State, e: int, r: int, emitting: int) -> None:
    """Let the first ``emitting`` of ``picked``, whose prefill has just ended, decode from now on."""
    clock_s = state.replicas[e, r].clock_s
    stamp = _push(state, e, r, clock_s, NOBODY, emitting)
    for k in range(emitting):
        i = state.picked[e, r, k]
        own = state.carried[e, i]
        own.gap_stamp = stamp
        if state.requests[e, i].emitted == 0:
            own.worst_gap_s = 0.0
        else:
            own.worst_gap_s = max(own.worst_gap_s, clock_s - own.last_token_s)


@shared_kernel
def join_decoding(state: State, e: int, r: int, i: int) -> None:
    """Let a request that has landed decode at ``r`` from now on; its next token ends the wait."""
    state.carried[e, i].gap_stamp = _push(state, e, r, state.episodes[e].now_s, i, 1)


@shared_kernel
def end_decoding(state: State, e: int, r: int, i: int) -> None:
    """Let a request carry what it has had at ``r``: it finishes, is preempted or leaves."""
    replica, own = state.replicas[e, r], state.carried[e, i]
    low, high = 0, replica.gap_groups - 1
    while low < high:
        middle = (low + high + 1) // 2
        if state.gaps[e, r, middle].stamp <= own.gap_stamp:
            low = middle
        else:
            high = middle - 1
    group = state.gaps[e, r, low]
    group.members -= 1
    own.gap_stamp = NOBODY
    if low < replica.gap_groups - replica.fresh_groups:
        own.worst_gap_s = max(own.worst_gap_s, group.worst_s)
        own.last_token_s = replica.emitted_s
    elif group.joined == NOBODY:
        own.last_token_s = group.since_s
    else:
        group.joined = NOBODY  # it leaves before it has emitted anything here


@kernel
def _push(state: State, e: int, r: int, since_s: float, joined: int, members: int) -> int:
    """Put a fresh group on the stack; return its stamp."""
    replica = state.replicas[e, r]
    if replica.gap_groups == state.gaps.shape[2]:
        _drop_empty(state, e, r)
    group = state.gaps[e, r, replica.gap_groups]
    group.stamp = replica.gap_stamp
    group.members = members
    group.worst_s = 0.0
    group.since_s = since_s
    group.joined = joined
    replica.gap_groups += 1
    replica.fresh_groups += 1
    replica.gap_stamp += 1
    return group.stamp


@shared_kernel
def _drop_empty(state: State, e: int, r: int) -> None:
    """Drop the groups without members: fewer are left than there are clients, half of the stack."""
    replica, gaps = state.replicas[e, r], state.gaps[e, r]
    first_fresh = replica.gap_groups - replica.fresh_groups
    top, fresh = 0, 0
    for k in range(replica.gap_groups):
        if gaps[k].members > 0:
            gaps[top] = gaps[k]
            top += 1
            fresh += k >= first_fresh
    replica.gap_groups = top
    replica.fresh_groups = fresh
