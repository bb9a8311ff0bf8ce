"""Simulated annealing over a calendar of prefill stages and the stage at which each request starts.

All running clients decode together, so a schedule is a *calendar* s_0 = 0 < s_1 < … < s_M, the decode
clock of each of M stages and of the end, and the stage a at which each request starts: it runs to s_a
plus its decode rounds and then keeps its client until the next stage. Which client that is does not
matter, only that no more than J are held at a time.

The end is fixed. The energy, in client-rounds, measures what does not fit: clients held beyond J
between two stages, and rounds past the end. A schedule of energy 0 can be carried out. Moves: a request
starts at another stage; two requests of about the same length swap their stages, which hardly changes
how many clients are held; some successive stages shift by the same number of rounds.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment,return-value"

Whole = NDArray[np.int64]

# Plain choices, not tuned.
SWAPS: Final = 0.5  # share of the moves
RANKS: Final = 24  # maximum rank distance, by length, between two swapped requests
DRAWS: Final = 3  # stages drawn for a new start; the one that idles the client least is tried
SHIFT_EVERY: Final = 150  # moves; a shift looks at every request
FARTHEST_SHIFT: Final = 12  # rounds
OVERFULL: Final = 3  # energy of a client-round held beyond J
_NOWHERE: Final = -1  # the decode clock of a request without a place


class Calendar(NamedTuple):
    """A schedule under search: M stages; arrays of M + 1 places have the end in the last one."""

    lengths: Whole  # (requests,) decode rounds, at least 1, ascending
    start: Whole  # (requests,) the stage each starts at, 0 … M − 1
    stop: Whole  # (requests,) the stage at which its client is free again, at most M
    times: Whole  # (M + 1,) decode clock, strictly ascending from 0
    held: Whole  # (M + 1,) clients held from each stage to the next; the last place is not used
    next_stage: Whole  # (times[M] + 1,) the first stage at or after each value of the decode clock


def make_calendar(lengths: Whole, start: Whole, times: Whole) -> Calendar:
    """Lay out a schedule; see ``Calendar`` for the arguments, which are copied."""
    stop, held = np.zeros_like(start), np.zeros_like(times)
    next_stage = np.searchsorted(times, np.arange(times[-1] + 1))
    return Calendar(lengths.copy(), start.copy(), stop, times.copy(), held, next_stage)


@kernel
def _lateness(rounds: int) -> int:
    """Return the energy of a request that runs so many rounds past the end (none if negative).

    It grows with the square: the last request sets the makespan, so one very late request is worse
    than several that are a little late.
    """
    return rounds * (rounds + 1) // 2 if rounds > 0 else 0


@allocating_kernel
def misfit(calendar: Calendar, clients: int, stop: Whole, held: Whole) -> int:
    """Return the energy; write when each request stops and how many clients are held."""
    times = calendar.times
    last = times.size - 1
    end = times[last]
    held[:] = 0
    total = 0
    for i in range(stop.size):
        a = calendar.start[i]
        done = times[a] + calendar.lengths[i]
        if done > end:
            total += _lateness(done - end)
            done = end
        b = calendar.next_stage[done]
        stop[i] = b
        held[a] += 1
        held[b] -= 1
    running = 0
    for stage in range(last):
        running += held[stage]
        held[stage] = running
        total += OVERFULL * max(running - clients, 0) * (times[stage + 1] - times[stage])
    return total


@kernel
def _stop_at(calendar: Calendar, done: int) -> int:
    """Return the stage at which a request that is done at this clock leaves its client."""
    return calendar.next_stage[min(done, calendar.next_stage.size - 1)]


@kernel
def _if_held(calendar: Calendar, clients: int, first: int, after: int) -> int:
    """Return the energy that one more client held from stage ``first`` to ``after`` adds."""
    added = 0
    for stage in range(first, after):
        if calendar.held[stage] >= clients:
            added += calendar.times[stage + 1] - calendar.times[stage]
    return OVERFULL * added


@kernel
def _if_freed(calendar: Calendar, clients: int, first: int, after: int) -> int:
    """Return the energy that one client fewer from stage ``first`` to ``after`` saves."""
    saved = 0
    for stage in range(first, after):
        if calendar.held[stage] > clients:
            saved += calendar.times[stage + 1] - calendar.times[stage]
    return OVERFULL * saved


@kernel
def _hold(calendar: Calendar, first: int, after: int, change: int) -> None:
    for stage in range(first, after):
        calendar.held[stage] += change


@kernel
def _try_swap(calendar: Calendar, clients: int, i: int, k: int, allowed: float) -> int:
    """Let request ``i`` and a longer one ``k`` swap their stages if the energy rises by less."""
    start, stop = calendar.start, calendar.stop
    end = calendar.times[-1]
    a, b = start[i], start[k]
    done_i, done_k = (
        calendar.times[b] + calendar.lengths[i],
        calendar.times[a] + calendar.lengths[k],
    )
    stop_i, stop_k = _stop_at(calendar, done_i), _stop_at(calendar, done_k)
    # The longer one now holds its client from stop[i] to stop_k, the shorter one frees the other's
    # from stop_i to stop[k]. Where the two overlap nothing changes.
    first, after = max(stop[i], stop_i), min(stop_k, stop[k])
    change = _lateness(done_i - end) + _lateness(done_k - end)
    change -= _lateness(calendar.times[a] + calendar.lengths[i] - end)
    change -= _lateness(calendar.times[b] + calendar.lengths[k] - end)
    if first < after:
        change += _if_held(calendar, clients, stop[i], first)
        change += _if_held(calendar, clients, after, stop_k)
        change -= _if_freed(calendar, clients, stop_i, first)
        change -= _if_freed(calendar, clients, after, stop[k])
    else:
        change += _if_held(calendar, clients, stop[i], stop_k)
        change -= _if_freed(calendar, clients, stop_i, stop[k])
    if change > allowed:
        return 0
    _hold(calendar, stop[i], stop_k, 1)
    _hold(calendar, stop_i, stop[k], -1)
    start[i], start[k] = b, a
    stop[i], stop[k] = stop_i, stop_k
    return change


@kernel
def _try_start(calendar: Calendar, clients: int, i: int, b: int, allowed: float) -> int:
    """Let request ``i`` start at stage ``b`` if the energy rises by no more than ``allowed``."""
    start, stop, times = calendar.start, calendar.stop, calendar.times
    end = times[-1]
    a, old = start[i], stop[i]
    done = times[b] + calendar.lengths[i]
    new = _stop_at(calendar, done)
    change = _lateness(done - end) - _lateness(times[a] + calendar.lengths[i] - end)
    if b >= old or new <= a:
        change += _if_held(calendar, clients, b, new) - _if_freed(calendar, clients, a, old)
    else:
        change += _if_held(calendar, clients, b, a) + _if_held(calendar, clients, old, new)
        change -= _if_freed(calendar, clients, a, b) + _if_freed(calendar, clients, new, old)
    if change > allowed:
        return 0
    _hold(calendar, a, old, -1)
    _hold(calendar, b, new, 1)
    start[i], stop[i] = b, new
    return change


@kernel
def _draw_start(calendar: Calendar, i: int, rng: np.random.Generator) -> int:
    """Draw a few stages; return the one after which the client of request ``i`` idles least."""
    times = calendar.times
    best, least = 0, np.int64(1 << 62)
    for _ in range(DRAWS):
        stage = int(rng.random() * (times.size - 1))
        done = times[stage] + calendar.lengths[i]
        pad = abs(times[_stop_at(calendar, done)] - done)
        if pad < least:
            best, least = stage, pad
    return best


@allocating_kernel
def _shift(calendar: Calendar, first: int, after: int, rounds: int) -> None:
    """Move the stages ``first`` … ``after`` − 1, which must keep their order."""
    times, next_stage = calendar.times, calendar.next_stage
    low = min(times[first], times[first] + rounds)
    high = max(times[after - 1], times[after - 1] + rounds)
    for stage in range(first, after):
        times[stage] += rounds
    stage = first
    for clock in range(low, high + 1):
        while times[stage] < clock:
            stage += 1
        next_stage[clock] = stage


@allocating_kernel
def anneal(
    calendar: Calendar, clients: int, hot: float, cold: float, moves: int, rng: np.random.Generator
) -> int:
    """Make ``moves`` moves in place, the temperature falling geometrically; return the energy.

    Stops early at an energy of 0. Temperatures are in client-rounds.
    """
    n, last = calendar.lengths.size, calendar.times.size - 1
    times, held, stop = calendar.times, calendar.held, calendar.stop
    new_held, new_stop = np.empty_like(held), np.empty_like(stop)
    now = misfit(calendar, clients, stop, held)
    cooling = (cold / hot) ** (SHIFT_EVERY / max(moves, 1))
    temperature = hot
    for move in range(moves):
        if now == 0:
            break
        if move % SHIFT_EVERY == 0:
            temperature *= cooling
            if last == 1:
                continue
            first = 1 + int(rng.random() * (last - 1))
            after = first + 1
            if rng.random() < 0.3:
                after += int(rng.random() * (last - first))
            rounds = 1 + int(rng.random() * rng.random() * FARTHEST_SHIFT)
            if rng.random() < 0.5:
                rounds = -rounds
            if (
                times[first] + rounds <= times[first - 1]
                or times[after - 1] + rounds >= times[after]
            ):
                continue
            _shift(calendar, first, after, rounds)
            then = misfit(calendar, clients, new_stop, new_held)
            if then - now <= temperature * rng.standard_exponential():
                now = then
                held[:] = new_held
                stop[:] = new_stop
            else:
                _shift(calendar, first, after, -rounds)
            continue
        allowed = temperature * rng.standard_exponential()
        i = int(rng.random() * n)
        if rng.random() < SWAPS:
            k = i + 1 + int(rng.random() * RANKS)
            if k < n and calendar.start[k] != calendar.start[i]:
                now += _try_swap(calendar, clients, i, k, allowed)
        else:
            now += _try_start(calendar, clients, i, _draw_start(calendar, i, rng), allowed)
    return now


def repair(calendar: Calendar, clients: int) -> tuple[Whole, int]:
    """Move requests that have no free client to the clock at which they delay the end least.

    Where a stage holds more requests than clients, the shortest requests move. A new stage counts as
    half a round of delay.

    Returns
    -------
    tuple
        The decode clock at which each request starts, shape (requests,), and the clock at the end.
    """
    lengths = calendar.lengths
    end = int((calendar.times[calendar.start] + lengths).max())
    held, clock_of = calendar.held.copy(), calendar.times[calendar.start]
    for stage in np.flatnonzero(held[:-1] > clients):
        during = (calendar.start <= stage) & (calendar.stop > stage) & (clock_of >= 0)
        for i in np.flatnonzero(during)[: max(held[stage] - clients, 0)]:
            held[calendar.start[i] : calendar.stop[i]] -= 1
            clock_of[i] = _NOWHERE
    displaced = np.flatnonzero(clock_of == _NOWHERE)
    running = np.zeros(end + int(lengths[displaced].sum()) + 1, np.int64)
    placed = clock_of != _NOWHERE
    np.add.at(running, clock_of[placed], 1)
    np.add.at(running, clock_of[placed] + lengths[placed], -1)
    running = np.cumsum(running)
    is_stage = np.isin(np.arange(len(running)), clock_of[placed])
    for i in displaced[::-1]:
        full = np.concatenate(([0], np.cumsum(running >= clients)))
        clocks = np.flatnonzero(full[lengths[i] :] == full[: len(full) - lengths[i]])
        late = np.maximum(clocks + lengths[i] - end, 0)
        best = clocks[np.argmin(2 * late + ~is_stage[clocks])]
        clock_of[i] = best
        is_stage[best] = True
        running[best : best + lengths[i]] += 1
        end = max(end, int(best + lengths[i]))
    return clock_of, end
