"""The twin: one row of the simulator's state, kept in step with a real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.engines.told import (
    Told,
    believed,
    check_task,
    checked_request,
    number,
    requests_of,
)
from servegym.envs.arguments import whole_number
from servegym.envs.errors import ServegymError, shown
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.policy import Briefing, Policy, Situation, asked_task
from servegym.envs.process.actions import legal_actions
from servegym.envs.process.blocks import observe
from servegym.envs.process.metrics import EpisodeLog, records
from servegym.envs.process.serving import CHOOSES, WORKS, begin_work, choose
from servegym.envs.serving_env import check_plan
from servegym.envs.simulator.forgetting import forget, has_finished
from servegym.envs.simulator.imagination import imagine_row
from servegym.envs.simulator.joining import see_arrivals
from servegym.envs.simulator.loading import clear, queue_plan
from servegym.envs.simulator.outlook import outlook
from servegym.envs.simulator.serving import (
    PROGRESS,
    append_request,
    catch_up,
    end_request,
    has_ended,
    note_iteration,
    present_s,
    withdraw,
)
from servegym.envs.simulator.state import (
    FUTURE,
    NOBODY,
    PREFILL,
    RUNNING,
    WAITING,
    State,
    make_alike,
    make_state,
    row_arrays,
)
from servegym.envs.simulator.view import view
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import MAX_ARRIVAL_S, MAX_REQUESTS, MAX_TOKENS

_ANY_SECONDS: Final = -1.0
"""Stands for the cost model's seconds, and for no time of the caller's."""


class Work(NamedTuple):
    """What the engine is to run next, in one iteration.

    Examples
    --------
    >>> Work("decode", (0, 2)).kind
    'decode'
    """

    kind: Literal["prefill", "decode"]
    ids: tuple[int, ...]
    """A prefill's requests in the order of admission, or all that decode, ascending."""


class Twin:
    """Asks a policy what an engine is to run, and follows what the engine has run.

    Parameters
    ----------
    task
        One replica without a limit of memory, mixed stages, sheds and limits of classes. Its workload and
        the limits of an episode (``max_decisions``, ``max_seconds``) are without meaning here.
    policy
        Any policy. Its ``prepare`` is called at the first ``work`` with the requests submitted for 0 s.
    capacity
        How many requests it can hold: all that are submitted, less those it is told to ``forget``.
    seed
        Of the policy's random generator, as in ``play``.

    Raises
    ------
    ServegymError
        If the task has what a twin has not, or the policy refuses the task.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS
    >>> twin = Twin(TASKS["servegym/Tiny-v0"], make_policy("hybrid"))
    >>> twin.submit(prompt_tokens=70, expected_output_tokens=2), twin.work().kind
    (0, 'prefill')
    >>> twin.ran(seconds=0.25)
    >>> twin.work().kind, twin.clock_s
    ('decode', 0.25)
    """

    def __init__(
        self, task: TaskConfig, policy: Policy, *, capacity: int = 10_000, seed: int = 0
    ) -> None:
        self.capacity = capacity = whole_number("capacity", capacity, 1, MAX_REQUESTS)
        self._seed = whole_number("seed", seed, 0)
        self.policy = policy
        self.task = task = asked_task(task, policy)
        machine = lower(task)
        layout = machine.layout
        check_task(task, layout)
        self._costs, self._settings = machine.costs, machine.settings
        self._state = make_state(1, capacity, layout, lengths_known=False)
        clear(self._state, 0)
        self._progress = np.zeros(1, PROGRESS).view(np.recarray)
        self._mask = np.zeros(len(task.actions), np.bool_)
        self._features = len(machine.features)
        self._imagined: State | None = None
        self._told: list[Told] = []  # of requests, until the policy is briefed
        self._briefed = False
        self.submitted = 0
        """How many requests it has been told of."""
        self._ids = np.zeros(capacity, np.int64)  # by the request's place in the state, ascending
        self._leaving: set[int] = set()  # places of those who are cancelled and do not run
        self._work: Work | None = None
        self._under_way = False

    # ---- requests come and go ---------------------------------------------------------------

    def submit(
        self,
        prompt_tokens: int,
        expected_output_tokens: int,
        spread: float = 0.0,
        most_tokens: int = MAX_TOKENS,
        now_s: float | None = None,
    ) -> int:
        """Tell of a request and return its id: 0, 1, … in the order of submission.

        Parameters
        ----------
        prompt_tokens, most_tokens
            What it has, and the output tokens at which it ends in any case, 1 … ``MAX_TOKENS``.
        expected_output_tokens, spread
            The prediction: mean, and standard deviation of the length's logarithm, 0: certain.
        now_s
            When it arrives; None: now. It counts as arrived with the one before it, or now, if that is
            later. One that is to come is not seen before its time.

        Raises
        ------
        ServegymError
            If a number is out of its range, an uncertain length meets a task of known ones, or the twin
            is full.
        """
        state, i = self._state, self.held
        prompt, expected, spread, most = checked_request(
            self.task, prompt_tokens, expected_output_tokens, spread, most_tokens
        )
        self.check_room(i)
        arrival_s = 0.0 if now_s is None else number("now_s", now_s, MAX_ARRIVAL_S)
        if self._briefed:
            arrival_s = max(
                arrival_s, self.clock_s if now_s is None else float(state.episodes["now_s"][0])
            )
        if i > 0:
            arrival_s = max(arrival_s, float(state.times["arrival_s"][0, i - 1]))
        mean, doubt, compared = believed(self.task, prompt, expected, spread)
        state.beliefs[0, i] = (np.log(mean) - doubt**2 / 2, doubt)
        append_request(state, 0, arrival_s, prompt, most - 1, mean - 1, compared - 1)
        if not self._briefed:
            self._told.append((arrival_s, prompt, expected, spread))
        self._ids[i] = self.submitted
        self.submitted += 1
        return self.submitted - 1

    def check_room(self, held: int) -> None:
        """Refuse one more request than ``held``, if these are all that the twin can hold."""
        if held >= self.capacity:
            raise ServegymError(
                f"the twin holds {self.capacity} requests, which is its capacity; make one of more, or let "
                "it forget() those who have finished"
            )

    def forget(self, most: int) -> tuple[int, ...]:
        """Forget who has finished, the oldest first, until ``most`` requests are left; return their ids.

        Fewer if not so many have finished. Ids do not change; ``records`` has no rows of those forgotten, and
        what the policy is told of the requests so far is of those that are left.
        """
        finished = np.flatnonzero(has_finished(self._state, 0))
        gone = np.zeros(self.held, np.bool_)
        gone[finished[: max(self.held - whole_number("most", most, 0), 0)]] = True
        if not gone.any():
            return ()
        ids = self._ids[: self.held].copy()
        places = forget(self._state, 0, gone)
        self._leaving = {int(places[place]) for place in self._leaving}
        self._ids[: self.held] = ids[~gone]
        return tuple(ids[gone].tolist())

    @property
    def held(self) -> int:
        """How many requests it holds: all that were submitted, less those forgotten."""
        return int(self._state.episodes["requests"][0])

    @property
    def ids(self) -> tuple[int, ...]:
        """The requests that it holds, as the rows of ``records`` are."""
        return tuple(self._ids[: self.held].tolist())

    def cancel(self, request: int) -> None:
        """Let a request end here, between two iterations, whether it waits, runs or is still to come.

        One that runs counts as finished, with the tokens that it has; one that does not, as gone without
        any. One that has finished already stays as it is.

        Raises
        ------
        ServegymError
            If there is no such request, or an iteration is under way: then name it in ``ran``.
        """
        state = self._state
        known = self.submitted
        if known == 0:
            raise ServegymError(
                f"nobody has been submitted, so {shown(request)} cannot be cancelled"
            )
        id_ = whole_number("request", request, 0, known - 1)
        self._check_between("cancel")
        i = self._place(id_)
        if i == NOBODY:
            return
        phase = state.requests["phase"][0, i]
        if phase == RUNNING and not has_ended(state, self._progress, 0, i):
            end_request(state, self._progress, 0, i)
        elif phase in (WAITING, FUTURE):
            self._leaving.add(i)
            if phase == WAITING:
                self._progress["ended"][0] = 1

    # ---- iterations -------------------------------------------------------------------------

    def work(self, now_s: float | None = None) -> Work | None:
        """Return what the engine is to run next; None: nobody is there to be served.

        Asks the policy where there is a choice. ``now_s`` moves the clock there if it is behind: what has
        passed since the last iteration then counts as time.

        Raises
        ------
        ServegymError
            If ``ran`` has not been called for the last work, or the policy chooses what is not legal.
        """
        self._check_between("work")
        until_s = _ANY_SECONDS if now_s is None else number("now_s", now_s, MAX_ARRIVAL_S)
        state, costs, progress = self._state, self._costs, self._progress
        if not self._briefed:
            self._brief()
        if catch_up(state, costs, progress, 0, until_s):
            self._withdraw(state)
            phases = state.requests["phase"][0]
            self._leaving = {i for i in self._leaving if phases[i] == FUTURE}
            found = begin_work(state, costs, self._settings, progress, 0, self._mask)
            while found == CHOOSES:
                action = self._choice()
                choose(state, costs, self._settings, 0, action)
                found = begin_work(state, costs, self._settings, progress, 0, self._mask)
            self._work = self._begun() if found == WORKS else None
        self._under_way = self._work is not None
        return self._work

    def ran(self, finished: Iterable[int] = (), seconds: float | None = None) -> None:
        """Tell that the engine has run the work: who has finished with it, and how long it took.

        Whoever has emitted its ``most_tokens`` finishes, told or not. Without ``seconds`` the cost model
        says how long.

        Raises
        ------
        ServegymError
            If no work is under way, a request is not among its ``ids``, or ``seconds`` is no time.
        """
        if not self._under_way or self._work is None:
            raise ServegymError("no iteration is under way; call work() before ran()")
        taken_s = _ANY_SECONDS if seconds is None else number("seconds", seconds, MAX_ARRIVAL_S)
        if not isinstance(finished, Iterable):
            raise ServegymError(f"finished must be a list of requests, got {shown(finished)}")
        ended = set()
        for each in finished:
            i = whole_number("finished", each, 0)
            if i not in self._work.ids:
                raise ServegymError(
                    f"finished names {i}, which this {self._work.kind} does not serve; it serves "
                    f"{shown(list(self._work.ids))}"
                )
            ended.add(i)
        note_iteration(self._state, self._costs, self._progress, 0, taken_s)
        for id_ in sorted(ended):
            end_request(self._state, self._progress, 0, self._place(id_))
        self._under_way = False

    # ---- what there is to see ---------------------------------------------------------------

    def situation(self) -> Situation:
        """Return what a policy would be told now, for logs and dashboards: it changes nothing.

        An iteration under way has not happened yet. Copies the state, so it takes its time.
        """
        state = self._as_of_now()
        mask = np.zeros_like(self._mask)
        legal_actions(state, self._costs, self._settings, 0, 0, mask)
        return self._situation(
            state, mask, lambda: _imagined(state, self._costs, make_alike(state, 1))
        )

    def records(self) -> EpisodeLog:
        """Return a copy of the records so far, a row of each of ``ids``, as ``ServingEnv.records``.

        The ``decode_rounds`` of a request that runs are the most it may take, less its first token; −1
        where it was cancelled before it ran.
        """
        return records(self._as_of_now(), 0)

    @property
    def clock_s(self) -> float:
        """The end of the last iteration, or until when ``work`` has waited since."""
        return float(present_s(self._state, self._costs, self._progress, 0))

    # ---- within -----------------------------------------------------------------------------

    def _check_between(self, what: str) -> None:
        if self._under_way:
            raise ServegymError(f"an iteration is under way; call ran() before {what}()")

    def _place(self, id_: int) -> int:
        """Return where the state has a request; ``NOBODY`` if it has been forgotten."""
        place = int(np.searchsorted(self._ids[: self.held], id_))
        return place if place < self.held and self._ids[place] == id_ else NOBODY

    def _brief(self) -> None:
        """Let the policy get ready, with the requests that are present at t = 0; queue them."""
        present = [row for row in self._told if row[0] == 0.0]
        requests = requests_of(present, self.task) if present else None
        rng = np.random.default_rng([self._seed, 1])  # as ``play`` has it
        plan = self.policy.prepare(Briefing(self.task, requests, rng))
        if plan is not None and not isinstance(plan, Plan):
            raise ServegymError(f"the policy's plan must be a Plan or None, got {shown(plan)}")
        if plan is not None and requests is None and len(plan.order) > 0:
            raise ServegymError("the policy plans requests, but none is present at t = 0")
        if requests is not None:
            check_plan(plan, requests, self.task.cluster.all_clients)
        queue_plan(self._state, 0, plan)
        self._briefed, self._told = True, []

    def _choice(self) -> int:
        """Ask the policy."""
        told = self._situation(self._state, self._mask.copy(), self._imagine)
        action = whole_number("the policy's action", self.policy.act(told), 0, len(self._mask) - 1)
        if not self._mask[action]:
            legal = ", ".join(map(str, np.flatnonzero(self._mask)))
            raise ServegymError(f"the policy chose illegal action {action}; legal are {legal}")
        return action

    def _situation(
        self, state: State, mask: NDArray[np.bool_], imagine: Callable[[], State]
    ) -> Situation:
        observation = np.zeros(self._features, np.float32)
        observe(state, self._costs, self._settings, 0, 0, observation)
        seen = view(state, self._costs, 0, 0)
        return Situation(
            seen, observation, mask, imagine, lambda: outlook(state, self._costs, 0, 0, seen)
        )

    def _imagine(self) -> State:
        if self._imagined is None:
            self._imagined = make_alike(self._state, 1)
        return _imagined(self._state, self._costs, self._imagined)

    def _begun(self) -> Work:
        """Return the work of the stage that has begun."""
        state, replica = self._state, self._state.replicas[0, 0]
        if replica["stage"] == PREFILL:
            picked = state.picked[0, 0, : replica["emitting"]]
            return Work("prefill", tuple(self._ids[picked].tolist()))
        decoding = state.finishes["request"][0, 0, : replica["active"]]
        return Work("decode", tuple(self._ids[np.sort(decoding)].tolist()))

    def _withdraw(self, state: State) -> None:
        """Take out whoever was cancelled and waits by now; the replica is at a boundary."""
        for i in sorted(self._leaving):
            if state.requests["phase"][0, i] == WAITING:
                withdraw(state, 0, i)

    def _as_of_now(self) -> State:
        """Return a copy of the state in which all is booked that the engine has run."""
        copies: dict[str, Any] = {
            name: array.copy() for name, array in row_arrays(self._state).items()
        }
        state, progress = replace(self._state, **copies), self._progress.copy()
        stage = state.replicas["stage"][0, 0]
        if stage != PREFILL or progress["ended"][0]:  # else it is under way
            progress["ended"][0] = 1
            catch_up(state, self._costs, progress, 0, _ANY_SECONDS)
            see_arrivals(state, 0, 0)
            self._withdraw(state)
        return state


def _imagined(state: State, costs: CostTables, target: State) -> State:
    """Write the episode as its scheduler believes it to be into ``target``, which is returned."""
    imagine_row(state, costs, 0, target, 0)
    return target
