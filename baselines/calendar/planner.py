"""A clairvoyant planner of the joint schedule: when prefill stages happen and what each admits.

The planner knows all lengths, which no policy does in practice, and takes minutes. Its schedules show
how much of a policy's gap to the lower bound can be closed. All requests are present at t = 0.

1. Some rules are played; the best schedule is the first to beat.
2. A good number of stages and a good end are estimated from the least padding of the lengths
   (``bounds.padding``). Short searches with about as many stages choose their number.
3. Further searches start anew with an end somewhat before the best one so far.
4. The best calendar is polished: heated a little and cooled with its end a round earlier.

A search anneals (``calendar.search``) a calendar of a given number of stages and a given end. Where
not every request fits, the end moves later in small steps. Schedules are compared by their true
makespan, which the simulator's kernels replay.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.calendar.search import Calendar, anneal, make_calendar, repair
from servegym.baselines.rules.compiled import CompiledPolicy, run_episode
from servegym.baselines.rules.triggers import LOOKAHEAD
from servegym.baselines.schedules import Stage, replay
from servegym.envs.bounds.batch import decode_bound, lower_bound, prefill_bound
from servegym.envs.bounds.padding import least_padding
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.bounds.totals import totals_of
from servegym.envs.errors import ServegymError
from servegym.envs.machine.costs import CostTables
from servegym.envs.machine.layout import one_replica
from servegym.envs.process.metrics import records
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.state import make_state
from servegym.envs.vocabulary import ADMISSION_RULES
from servegym.envs.workload.requests import Requests

MOVES_PER_REQUEST: Final = 2_000_000
"""Moves of a search without a time limit: about five minutes on one core for GSM8K-v0."""

_RULES: Final = ("aligned", "longest")
_PARAMETERS: Final = (0.05, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)  # λ of the rules tried first

# Chosen on training seeds 2, 5 and 9 of GSM8K-v0; another seed changes a search as much as these do.
_DIFFERENCES: Final = 1.65  # lengths a stage that a good calendar pads to, see _estimate
_STAGE_SHARES: Final = (0.8, 0.9, 1.0)  # of the estimated stages, for one short search each
_TRIAL_SHARE: Final = 0.05  # of the budget left, for each short search
_STAGE_FACTORS: Final = (0.94, 1.0, 1.06)  # stages of the searches that follow
_RESTARTS: Final = 10  # most searches that follow; the best of ten short ones beats a long one
_RESTART_MOVES: Final = 20_000  # least moves a request of each, unless there is only one
_RESTARTS_SHARE: Final = 0.85  # of the budget that the trials leave; polishing spends the rest
_LATER_ENDS: Final = (0.7, 0.85)  # their ends, as shares of the way from the bound to the best end
# Reject an end if the schedule found is more than this factor farther from the bound.
_FAR: Final = 2.0
_HOT: Final = 2.0  # temperatures, in mean rounds between stages
_WARM: Final = 0.05
_REHEATED: Final = (0.01, 0.1)  # polishing begins between these
_COLD: Final = 0.02
_COLDEST: Final = 0.003  # lowest temperature after the first anneal
_COOLING_SHARE: Final = 0.8  # of a search's budget; the rest is for later ends
_STEPS: Final = 5  # times that the end is moved later
_FARTHEST_STEP: Final = 20  # a step is the energy left / (this · clients), in rounds
_POLISHES: Final = 10
_PIECE: Final = 1_000_000  # moves between two looks at the clock
_MOST_LATENESS: Final = 1 << 61  # requests × rounds²


@dataclass(frozen=True, eq=False)
class JointPlan:
    """A whole schedule, its makespan by ``replay`` and the lower bound of its case."""

    stages: tuple[Stage, ...]
    makespan_s: float
    lower_bound_s: float

    @property
    def gap(self) -> float:
        """Makespan / lower bound − 1."""
        return self.makespan_s / self.lower_bound_s - 1


def plan_jointly(
    requests: Requests,
    clients: int,
    costs: CostTables,
    time_limit_s: float = math.inf,
    seed: int = 0,
    moves: int | None = None,
) -> JointPlan:
    """Search for the joint schedule of least makespan.

    Parameters
    ----------
    requests
        All present at t = 0; their true lengths are used.
    clients
        Concurrency slots of the one replica, ≥ 1.
    costs
        Tables of the cost model for as many clients.
    time_limit_s
        Seconds after which the best schedule so far is returned; the rules are played in any case.
        Where the limit is not reached, equal arguments give equal plans.
    seed
        Of the search's random numbers.
    moves
        Budget of the search; None: ``MOVES_PER_REQUEST`` for each request, 0: the rules alone.

    Raises
    ------
    ServegymError
        If a request arrives later than t = 0 or an argument is out of range.

    Examples
    --------
    >>> from servegym.envs import TASKS, lower, make_case
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> machine = lower(task)
    >>> plan = plan_jointly(make_case(task, 0).requests, machine.clients, machine.costs, moves=1000)
    >>> plan.makespan_s >= plan.lower_bound_s
    True
    """
    if moves is None:
        moves = MOVES_PER_REQUEST * len(requests)
    _check(requests, clients, time_limit_s, moves)
    bound_s = lower_bound(requests, clients, costs).seconds
    search = _Search(requests, clients, costs, time_limit_s, np.random.default_rng(seed))
    search.try_rules()
    search.run(moves)
    return JointPlan(tuple(search.best), search.best_s, bound_s)


def _check(requests: Requests, clients: int, time_limit_s: float, moves: int) -> None:
    if clients < 1:
        raise ServegymError(f"clients must be ≥ 1, got {clients}")
    if not time_limit_s >= 0:
        raise ServegymError(f"the time limit must be ≥ 0 seconds, got {time_limit_s}")
    if moves < 0:
        raise ServegymError(f"moves must be ≥ 0, got {moves}")
    if len(requests) == 0:
        raise ServegymError("a joint plan needs at least one request")
    late = int(np.count_nonzero(requests.arrival_s))
    if late:
        raise ServegymError(f"a joint plan needs all requests at t = 0; {late} arrive later")
    longest = int(requests.decode_rounds.max())
    if len(requests) * longest**2 > _MOST_LATENESS:
        raise ServegymError(
            f"a joint plan can do {_MOST_LATENESS // max(longest**2, 1)} requests of up to {longest} "
            f"decode rounds, got {len(requests)}: its sums of squares have 64 bits"
        )


# ---- the search -----------------------------------------------------------------------------


class _Attempt(NamedTuple):
    """A calendar and the schedule made of it: its makespan and the decode clock at its end."""

    seconds: float
    end: int
    calendar: Calendar


def _best(attempts: Sequence[_Attempt]) -> _Attempt:
    return min(attempts, key=lambda attempt: attempt.seconds)


def _aim(spare: float, made: int, nearer: float) -> float:
    """Return the spare rounds to try next: interpolate if the achieved end is far from the target."""
    return math.sqrt(spare * made) if made > _FAR * spare else nearer


def _until(calendar: Calendar, end: int) -> Calendar:
    """Return a copy that ends at another clock, after its last stage."""
    times = calendar.times.copy()
    times[-1] = end
    return make_calendar(calendar.lengths, calendar.start, times)


class _Search:
    """One instance, the best schedule so far, and the budget."""

    def __init__(
        self,
        requests: Requests,
        clients: int,
        costs: CostTables,
        time_limit_s: float,
        rng: np.random.Generator,
    ) -> None:
        self._requests, self._clients, self._costs = requests, clients, costs
        self._time_limit_s, self._rng = time_limit_s, rng
        self._deadline = perf_counter() + time_limit_s
        self._by_length = np.argsort(requests.decode_rounds, kind="stable")
        # A request without rounds needs an idle client, too: it is taken to hold one for a round.
        self._lengths = np.maximum(requests.decode_rounds[self._by_length], 1)
        self._least_end = max(rounds_lower_bound(requests.decode_rounds, clients), 1)
        self.best: list[Stage] = []
        self.best_s = math.inf
        self._rule_end = 0  # decode clock at the end of the best rule's schedule
        self._moves = 0  # left of the budget

    def try_rules(self) -> None:
        """Play some rules and keep the best schedule."""
        rounds = self._requests.decode_rounds
        state = make_state(1, len(self._requests), one_replica(self._clients))
        for rule in _RULES:
            for parameter in _PARAMETERS:
                load(state, 0, self._requests, None)
                policy = CompiledPolicy(ADMISSION_RULES.index(rule), LOOKAHEAD, parameter, False, 0)
                run_episode(state, self._costs, 0, policy)
                stage_s = records(state, 0).admitted_s  # a stage's requests share its start
                self._offer([np.flatnonzero(stage_s == start) for start in np.unique(stage_s)])
        self._rule_end = max(
            stage.clock + int(rounds[list(stage.requests)].max()) for stage in self.best
        )

    def run(self, moves: int) -> None:
        """Spend the budget: trials of some numbers of stages, searches around the best, polishing."""
        self._moves = moves
        if moves == 0 or len(self._requests) == 1:
            return
        stages, spare = self._estimate()
        least = -(-len(self._requests) // self._clients)
        counts = {max(least, round(share * stages)) for share in _STAGE_SHARES}
        tried: list[_Attempt] = []
        for count in sorted(counts, reverse=True):
            tried.append(self._search(count, self._end_at(spare), _TRIAL_SHARE))
            spare = _aim(spare, self._spare_of(_best(tried)), spare)
        best = self._restart(_best(tried), spare, least)
        for left in range(_POLISHES, 0, -1):
            best = _best([best, self._polish(best, 1 / left)])

    def _restart(self, best: _Attempt, spare: float, least: int) -> _Attempt:
        """Search anew some times, around the best so far; return the best."""
        affordable = _RESTARTS_SHARE * self._moves / (_RESTART_MOVES * len(self._requests))
        restarts = max(1, min(_RESTARTS, round(affordable)))
        for left in range(restarts, 0, -1):
            made = self._spare_of(best)
            spare = _aim(spare, made, self._rng.uniform(*_LATER_ENDS) * made)
            share = _RESTARTS_SHARE / (_RESTARTS_SHARE * left + (1 - _RESTARTS_SHARE) * restarts)
            stages = len(best.calendar.times) - 1
            count = max(least, round(self._rng.choice(_STAGE_FACTORS) * stages))
            best = _best([best, self._search(count, self._end_at(spare), share)])
        return best

    def _spare_of(self, attempt: _Attempt) -> int:
        """Return the rounds from the lower bound to the end, or to the best rule's end if that is earlier."""
        return min(attempt.end, self._rule_end) - self._least_end

    def _estimate(self) -> tuple[int, float]:
        """Return about how many stages are best and how many rounds each client then idles.

        S stages are taken to idle as long as the least padding to ``_DIFFERENCES`` · S lengths.
        """
        lengths, counts = np.unique(self._lengths, return_counts=True)
        totals = totals_of(self._requests.prompt_tokens, self._requests.decode_rounds)
        tried = []
        for stages in range(-(-totals.requests // self._clients), totals.requests + 1):
            padding = least_padding(lengths, counts, max(1, round(_DIFFERENCES * stages)))
            spare = padding / self._clients
            end = self._least_end + round(spare)
            decode_s = decode_bound(totals, end, self._costs, alone=True)
            tried.append((decode_s + prefill_bound(totals, stages, self._costs), stages, spare))
            if padding == 0:
                break
        _, stages, spare = min(tried)
        return stages, spare

    def _end_at(self, spare: float) -> int:
        return self._least_end + max(1, round(spare))

    def _rounds(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._requests.decode_rounds[ids]

    def _search(self, stages: int, end: int, share: float) -> _Attempt:
        """Anneal random starts, then move the end later step by step until every request fits.

        Spends at most a share of what is left of the budget.
        """
        moves, time_s = self._slice(share)
        times = np.unique(np.rint(np.linspace(0, end, stages + 1)).astype(np.int64))
        start = self._rng.integers(0, len(times) - 1, len(self._lengths))
        calendar = make_calendar(self._lengths, start, times)
        left = self._anneal(calendar, _HOT, _COLD, _COOLING_SHARE * moves, _COOLING_SHARE * time_s)
        attempts = [self._carry_out(calendar)]
        step = (1 - _COOLING_SHARE) / _STEPS
        for _ in range(_STEPS):
            if left == 0 or perf_counter() >= self._deadline:
                break
            later = int(calendar.times[-1]) + max(1, left // (_FARTHEST_STEP * self._clients))
            calendar = _until(calendar, later)
            left = self._anneal(calendar, _WARM, _COLDEST, step * moves, step * time_s)
            attempts.append(self._carry_out(calendar))
        return _best(attempts)

    def _polish(self, attempt: _Attempt, share: float) -> _Attempt:
        """Heat a calendar a little and cool it with its end a round earlier."""
        earliest = int(attempt.calendar.times[-2]) + 1
        calendar = _until(attempt.calendar, max(earliest, self._least_end, attempt.end - 1))
        low, high = _REHEATED
        hot = low * (high / low) ** self._rng.random()
        self._anneal(calendar, hot, _COLDEST, *self._slice(share))
        return self._carry_out(calendar)

    def _slice(self, share: float) -> tuple[float, float]:
        """Return a share of the moves and the seconds that are left."""
        return share * self._moves, share * max(self._deadline - perf_counter(), 0.0)

    def _anneal(
        self, calendar: Calendar, hot: float, cold: float, moves: float, time_s: float
    ) -> int:
        """Anneal in pieces; where time is short, the temperature falls faster. Return the energy left.

        Temperatures are in mean rounds between stages.
        """
        spacing = calendar.times[-1] / (len(calendar.times) - 1)
        started = perf_counter()
        moves = max(1.0, moves)
        done, left = 0.0, 1
        while done < 1.0 and left > 0:
            until = min(1.0, done + _PIECE / moves)
            warm, cool = (spacing * hot * (cold / hot) ** share for share in (done, until))
            count = math.ceil(moves * (until - done))
            left = anneal(calendar, self._clients, warm, cool, count, self._rng)
            self._moves = max(0, self._moves - count)
            done = until
            if perf_counter() - started > done * time_s:
                done = (perf_counter() - started) / time_s if time_s > 0 else 1.0
        return left

    def _carry_out(self, calendar: Calendar) -> _Attempt:
        """Offer the schedule of the repaired calendar."""
        clock_of, end = repair(calendar, self._clients)
        batches = [self._by_length[clock_of == clock] for clock in np.unique(clock_of)]
        return _Attempt(self._offer(batches), end, calendar)

    def _offer(self, batches: list[NDArray[np.int64]]) -> float:
        """Keep the best schedule; return the makespan of stages that start once enough clients are idle."""
        stages: list[Stage] = []
        running: list[int] = []
        clock = 0
        # Stages of requests without rounds may share a clock, so a batch may hold more than J.
        fitting = [
            batch[np.argsort(self._rounds(batch), kind="stable")][first : first + self._clients]
            for batch in batches
            for first in range(0, len(batch), self._clients)
        ]
        for batch in fitting:
            while running and (len(running) + len(batch) > self._clients or running[0] <= clock):
                clock = max(clock, heapq.heappop(running))
            stages.append(Stage(clock, tuple(np.sort(batch).tolist())))
            for rounds in self._rounds(batch):
                if rounds > 0:
                    heapq.heappush(running, clock + int(rounds))
        seconds = replay(self._requests, self._clients, self._costs, stages)
        if seconds < self.best_s:
            self.best, self.best_s = stages, seconds
        return seconds
