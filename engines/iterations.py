"""Iterations of an engine: what each was and how long it took, and what the simulator would have run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from servegym.engines.twin import Twin, Work
from servegym.envs.errors import ServegymError
from servegym.envs.playing.policy import Policy
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.requests import Requests


class Iteration(NamedTuple):
    """One iteration as an engine has run it: a prefill of whole prompts, or one token of each request.

    Examples
    --------
    >>> Iteration("prefill", (0, 2), (70, 55)).key
    ('prefill', (0, 2), 125)
    """

    kind: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    """Tokens of each request that the engine computed: a whole prompt, or 1."""
    cached_tokens: int = 0
    """Tokens that the requests of a decode round hold, prompts and outputs so far; 0 of a prefill."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    twin_s: float = 0.0
    """Wall time of the twin and its policy, which is in neither of the two."""

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """What is compared between engine and simulator: kind, who, how many tokens."""
        return self.kind, tuple(sorted(self.ids)), sum(self.tokens)


class Timed:
    """The iteration that an engine has under way: what it is, and since when.

    Examples
    --------
    >>> timed = Timed()
    >>> timed.ask(lambda: None), timed.under_way
    (None, False)
    >>> timed.begin("decode", (0,), (1,), 71)
    >>> timed.under_way, timed.end(lambda wall_s: None).key, timed.under_way
    (True, ('decode', (0,), 1), False)
    """

    def __init__(self) -> None:
        self._batch: tuple[str, tuple[int, ...], tuple[int, ...], int] | None = None
        self._begun_s = self._begun_cpu_s = self._twin_s = 0.0

    @property
    def under_way(self) -> bool:
        """Whether one has begun and not ended."""
        return self._batch is not None

    def ask(self, work: Callable[[], Work | None]) -> Work | None:
        """Return the twin's next work; from here on the time is the engine's."""
        started_s = time.perf_counter()
        found = work()
        self._begun_s, self._begun_cpu_s = time.perf_counter(), time.process_time()
        self._twin_s = self._begun_s - started_s
        return found

    def begin(
        self, kind: str, ids: tuple[int, ...], tokens: tuple[int, ...], cached_tokens: int
    ) -> None:
        """Note what the engine runs; as in ``Iteration``."""
        self._batch = (kind, ids, tokens, cached_tokens)

    def end(self, tell: Callable[[float], None]) -> Iteration:
        """Tell the twin, by its wall seconds, that the engine has run it; return it."""
        if self._batch is None:
            raise ServegymError("no iteration is under way")
        ended_s, cpu_s = time.perf_counter(), time.process_time() - self._begun_cpu_s
        wall_s = ended_s - self._begun_s
        tell(wall_s)
        twin_s = self._twin_s + time.perf_counter() - ended_s
        iteration = Iteration(*self._batch, wall_s, cpu_s, twin_s)
        self._batch = None
        return iteration


def submit(twin: Twin, requests: Requests, i: int) -> int:
    """Tell a twin of one request as the scheduler of its task knows it; return its id."""
    return twin.submit(
        int(requests.prompt_tokens[i]),
        *expectation(twin.task, requests, i),
        now_s=float(requests.arrival_s[i]),
    )


def expectation(task: TaskConfig, requests: Requests, i: int) -> tuple[int, float]:
    """Return the output tokens that a task's scheduler expects of a request, and their spread."""
    if task.information.output_lengths == "known":
        return int(requests.output_tokens[i]), 0.0
    spread = requests.predicted_spread
    return int(requests.predicted_output_tokens[i]), 0.0 if spread is None else float(spread[i])


def simulate(
    task: TaskConfig, policy: Policy, requests: Requests, seed: int = 0
) -> tuple[list[Iteration], Twin]:
    """Return the iterations that the simulator runs by itself, and the twin that has run them.

    Truth comes from ``requests``, time from the cost model. The twin so driven is ``play`` to the last bit.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS, make_requests
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> iterations, twin = simulate(task, make_policy("fcfs"), make_requests([5, 7], [1, 2]))
    >>> [iteration.key for iteration in iterations], twin.clock_s
    ([('prefill', (0, 1), 12), ('decode', (1,), 1)], 3.0)
    """
    twin = Twin(task, policy, capacity=len(requests), seed=seed)
    for i in range(len(requests)):
        submit(twin, requests, i)
    left = requests.output_tokens.copy()
    prompts, arrivals = requests.prompt_tokens, requests.arrival_s
    held = prompts.copy()  # tokens of each, prompt and output so far
    iterations: list[Iteration] = []
    while left.any():
        work = twin.work()
        if work is None:  # nobody is there; the next to come
            work = twin.work(float(arrivals[arrivals > twin.clock_s].min()))
        if work is None:
            raise ServegymError("the simulator waits for nobody")
        ids = list(work.ids)
        if work.kind == "prefill":
            step = Iteration("prefill", work.ids, tuple(prompts[ids].tolist()))
        else:
            step = Iteration("decode", work.ids, (1,) * len(ids), int(held[ids].sum()))
        iterations.append(step)
        left[ids] -= 1
        held[ids] += 1
        twin.ran([i for i in ids if left[i] == 0])
    twin.work()
    return iterations, twin


def first_difference(one: Sequence[Iteration], other: Sequence[Iteration]) -> int | None:
    """Return the first iteration in which two traces differ; None if they are equal.

    Examples
    --------
    >>> trace = [Iteration("prefill", (0,), (5,)), Iteration("decode", (0,), (1,))]
    >>> first_difference(trace, trace), first_difference(trace, trace[:1])
    (None, 1)
    """
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a.key != b.key:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


class Stepping(Protocol):
    """An engine that is advanced by hand."""

    @property
    def share_done(self) -> float:
        """How much of all it is to do it has done, 0 … 1."""
        ...

    def step(self) -> Iteration | None:
        """Run one iteration; None: nothing is left."""
        ...


def next_in_lockstep(engines: Mapping[str, Stepping]) -> tuple[str, Iteration | None]:
    """Advance the engine that has done the least of its work; return its name and what it has run.

    So every engine meets the same noise of a shared machine. Stop when all have returned None.
    """
    name = min(engines, key=lambda each: engines[each].share_done)
    return name, engines[name].step()
