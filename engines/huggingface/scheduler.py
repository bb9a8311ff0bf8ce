"""The scheduler that transformers' continuous batching asks, and that asks a twin."""

from __future__ import annotations

import time
from threading import Lock
from typing import Any, Literal, NamedTuple

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

from servegym.engines.iterations import Iteration, Timed
from servegym.engines.twin import Twin, Work
from servegym.envs.errors import ServegymError

Clock = Literal["model", "busy", "wall"]
"""Whose seconds the twin gets: the cost model's, those of the iterations, those of the wall."""


class Asked(NamedTuple):
    """What a client asks for and what is expected of it."""

    prompt: tuple[int, ...]
    most_tokens: int
    expected_tokens: int
    spread: float
    arrival_s: float | None
    ends: tuple[int, ...] = ()
    """Token ids that end the text."""


class TwinScheduler(Scheduler):
    """A scheduler of transformers' continuous batching that runs what a twin says.

    The engine's thread alone calls it, and it alone calls the twin. A request becomes known to the twin
    when the engine sees it; what has come of an iteration is told before the next thing happens.

    Parameters
    ----------
    twin, asked, clock
        The twin, what has been asked for by name, and whose seconds the twin gets.
    lasting
        Whether a twin that is full forgets those who have finished, and the scheduler and ``asked`` with it.
    cache, safety_margin, max_requests_per_batch
        The library's own.
    """

    def __init__(
        self,
        twin: Twin,
        asked: dict[str, Asked],
        clock: Clock,
        *,
        lasting: bool = False,
        cache: Any,
        safety_margin: float | None,
        max_requests_per_batch: int,
    ) -> None:
        if cache.use_prefix_sharing:
            raise ServegymError("requests that share prefixes part the twin from the engine")
        self.twin, self.asked, self.clock, self.lasting = twin, asked, clock, lasting
        self.iterations: list[Iteration] = []
        self.states: dict[int, Any] = {}  # by the twin's id
        self.ids: dict[str, int] = {}
        self.error: Exception | None = None
        self.started_s = time.perf_counter()
        self.spared_tokens = 0
        self._arrivals: dict[int, float] = {}
        self._last_arrival_s = 0.0
        self._lock = Lock()  # while the twin has forgotten somebody and ``asked`` has not
        self._timed = Timed()
        self._finished: list[int] = []
        super().__init__(cache, 0.0, max_requests_per_batch)

    # ---- what the library calls -------------------------------------------------------------

    def reset(self) -> None:
        """Make ready for requests; once only, as the twin would still have those before."""
        if self.ids:
            raise ServegymError("a twin's scheduler is not used twice; make a new engine")
        super().reset()

    def add_waiting_request(self, state: Any) -> None:
        """Tell the twin of a request that the engine has just seen."""
        try:
            self.settle()
            asked = self.asked.get(state.request_id)
            if asked is None:
                raise ServegymError(f"request {state.request_id} was not added by its engine")
            if state.num_children:
                raise ServegymError("several outputs of a request part the twin from the engine")
            if self.lasting and self.twin.held == self.twin.capacity:
                self._forget()
            id_ = self.twin.submit(
                len(asked.prompt),
                asked.expected_tokens,
                asked.spread,
                asked.most_tokens,
                now_s=asked.arrival_s,
            )
        except Exception as error:
            self.error = self.error or error
            raise
        self.states[id_] = state  # first: whoever finds the id, in another thread, finds the state
        self.ids[state.request_id] = id_
        # No earlier than the one before it, as the twin has it.
        self._last_arrival_s = max(asked.arrival_s or 0.0, self._last_arrival_s)
        self._arrivals[id_] = self._last_arrival_s
        super().add_waiting_request(state)

    def finish_request(self, request_id: str) -> None:
        """Note who has finished with this iteration."""
        super().finish_request(request_id)
        id_ = self.ids[request_id]
        self._finished.append(id_)
        self._spare(self.states[id_])

    def clear_cancelled_requests(self) -> Any:
        """Cancel in the twin whoever is cancelled in the engine, between two iterations."""
        self.settle()
        gone = super().clear_cancelled_requests()
        for state in gone or ():
            self.twin.cancel(self.ids[state.request_id])
            self._spare(state)
        return gone

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Return the batch of the twin's next work; an empty one if there is none."""
        try:
            return self._schedule(token_budget, cache_budget)
        except Exception as error:
            self.error = self.error or error
            raise

    # ---- the twin ---------------------------------------------------------------------------

    def _spare(self, state: Any) -> None:
        """Count the tokens that somebody who has gone might have had."""
        self.spared_tokens += self.asked[state.request_id].most_tokens - len(state.generated_tokens)

    def settle(self) -> None:
        """Tell the twin what has come of the iteration that has just ended, if one has."""
        if self._timed.under_way:
            self.iterations.append(self._timed.end(self._tell))
            self._finished = []

    def _tell(self, wall_s: float) -> None:
        self.twin.ran(self._finished, None if self.clock == "model" else wall_s)

    def tokens(self) -> dict[int, list[int]]:
        """Return the output tokens so far, by the twin's id."""
        return {id_: list(state.generated_tokens) for id_, state in list(self.states.items())}

    @property
    def due_requests(self) -> int:
        """Requests that wait, without those still to come."""
        waiting = list(self.waiting_requests)
        if self.clock == "wall":
            return len(waiting)
        clock_s = self.twin.clock_s
        return sum(self._arrivals[self.ids[name]] <= clock_s for name in waiting)

    @property
    def ended_requests(self) -> int:
        """Requests that the engine has seen and that neither wait nor run."""
        return self.twin.submitted - len(self.waiting_requests) - len(self.active_requests)

    @property
    def present_requests(self) -> int:
        """Requests that have been asked for, also by another thread, and have not ended."""
        with self._lock:
            ended = self.twin.held - len(self.waiting_requests) - len(self.active_requests)
            return len(self.asked) - ended

    def _forget(self) -> None:
        """Forget the older half of those it holds, but whoever is still there, and their iterations."""
        with self._lock:
            for id_ in self.twin.forget(self.twin.capacity // 2):
                name = self.states[id_].request_id
                del self.ids[name], self.asked[name], self.states[id_], self._arrivals[id_]
        left = frozenset(self.states)
        served = (k for k, each in enumerate(self.iterations) if not left.isdisjoint(each.ids))
        del self.iterations[: next(served, len(self.iterations))]

    def _schedule(self, token_budget: int, cache_budget: int) -> Any:
        self.settle()
        work = self._timed.ask(self._next_work)
        if work is None:
            return [], True, 0, 0
        states = [self.states[i] for i in work.ids]
        waits = RequestStatus.PENDING if work.kind == "prefill" else RequestStatus.DECODING
        for i, state in zip(work.ids, states, strict=True):
            if state.status != waits or self.request_is_cancelled(state.request_id):
                raise ServegymError(
                    f"the twin wants a {work.kind} of request {i}, which is {state.status.name} in "
                    "the engine"
                )
        cached = 0 if work.kind == "prefill" else sum(s.position_offset + 1 for s in states)
        wanted = [len(s.initial_tokens) if work.kind == "prefill" else 1 for s in states]
        removed: set[str] = set()
        batch, failed, fast, queries, keys = self._process_candidates(
            states, token_budget, cache_budget, removed
        )
        self._cleanup_waiting_queue(removed)
        tokens = [future.query_length for future in batch]
        if failed or tokens != wanted:
            raise ServegymError(
                f"the engine takes {sum(tokens)} of {sum(wanted)} tokens of a {work.kind} of "
                f"{len(states)} requests; raise kv_tokens, batch_tokens, or lower cluster.clients"
            )
        ids = tuple(self.ids[future.state.request_id] for future in batch)
        self._timed.begin(work.kind, ids, tuple(tokens), cached)
        return batch, fast, queries, keys

    def _next_work(self) -> Work | None:
        """Return what is to run; where time is not the wall's, wait in no time for the next to come."""
        if self.clock == "wall":
            return self.twin.work(time.perf_counter() - self.started_s)
        work = self.twin.work()
        if work is None:
            clock_s = self.twin.clock_s
            coming = [self._arrivals[self.ids[name]] for name in self.waiting_requests]
            later = [arrival_s for arrival_s in coming if arrival_s > clock_s]
            work = self.twin.work(min(later)) if later else None
        return work
