"""How far a study on a cluster scales: a discrete simulation of driver, scheduler and workers.

Every batch passes four stations. The driver packs and submits it, the scheduler gives it to a worker, the
worker makes its calls, the driver takes the results, adds the rows and now and then writes the whole table.
Driver and scheduler serve one batch at a time. The sizes of batches are those of the real driver
(``servegym.envs.playing.nodes.driver.Pace``), the times are measured.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from servegym.envs.playing.nodes.driver import Pace
from servegym.envs.playing.tables import SAVE_EVERY_S, SAVE_SHARE

DAY_S: Final = 86_400.0

NODES: Final = (1, 10, 100)
"""Sizes of clusters that are simulated."""


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take."""

    submit_s: float = 0.0013
    """Of the driver, to pack and submit a batch."""
    result_s: float = 0.0013
    """Of the driver, to take a batch's result, without its rows."""
    row_s: float = 3e-5
    """Of the driver, to unpack a row and add it."""
    save_row_s: float = 2.5e-5
    """Of the driver, to write a row when it saves the table."""
    schedule_s: float = 0.001
    """Of the scheduler, for a batch, half when it comes and half when it ends."""
    start_s: float = 0.001
    """Of a worker, to begin a batch."""
    compile_s: float = 40.0
    """Of a node, to compile all kernels; its workers wait for it."""


@dataclass(frozen=True)
class Work:
    """A study: calls that are all alike."""

    name: str
    call_s: float
    rows: int = 1
    """Rows of the table that a call gives."""


WORKS: Final = (
    Work("a rule, 10 ms an episode", 0.010),
    Work("an agent, 50 ms an episode", 0.050),
    Work("a search (`rollout`), 2 s an episode", 2.0),
    Work("a training run of 150 s", 150.0, rows=0),
)
"""Kinds of studies, by what an episode costs on GSM8K-v0."""


@dataclass(frozen=True)
class Outcome:
    """What came of a simulated run."""

    calls: int
    seconds: float
    speed_up: float
    """Over one worker that does nothing but calls."""
    driver_busy: float
    """Share of the time, 0 … 1."""
    scheduler_busy: float
    workers_busy: float
    batch: float
    """Mean number of calls of a batch."""


class _Station:
    """Serves one after the other."""

    def __init__(self) -> None:
        self.free_s = 0.0
        self.busy_s = 0.0

    def serve(self, now_s: float, seconds: float) -> float:
        """Return when what came at ``now_s`` is done."""
        self.free_s = max(self.free_s, now_s) + seconds
        self.busy_s += seconds
        return self.free_s


def simulate(work: Work, calls: int, nodes: int, cores: int, costs: Costs) -> Outcome:
    """Return what a run of so many calls takes on nodes of so many cores, a worker a core.

    Examples
    --------
    >>> alone = simulate(Work("", 1.0), 100, 1, 1, Costs(0, 0, 0, 0, 0, 0, 0))
    >>> alone.seconds, alone.speed_up
    (100.0, 1.0)
    """
    slots = nodes * cores
    pace, driver, scheduler = Pace(), _Station(), _Station()
    warm_s, idle = costs.compile_s, deque(range(slots))
    queued: deque[int] = deque()  # sizes of batches that wait for a worker
    ended: list[tuple[float, int, int]] = []  # (when, worker, size) of batches under way
    left, running, rows, batches, saved_s, save_s = calls, 0, 0, 0, 0.0, 0.0
    worker_busy_s, now_s = 0.0, 0.0

    def begin(at_s: float) -> None:
        nonlocal worker_busy_s
        while queued and idle:
            size = queued.popleft()
            seconds = costs.start_s + size * work.call_s
            worker_busy_s += seconds
            heapq.heappush(ended, (max(at_s, warm_s) + seconds, idle.popleft(), size))

    while left or running:
        while left and running < slots * pace.depth:
            size = pace.batch(left, slots)
            left, running, batches = left - size, running + 1, batches + 1
            queued.append(size)
            now_s = driver.serve(now_s, costs.submit_s)
            begin(scheduler.serve(now_s, costs.schedule_s / 2))
        at_s, worker, size = heapq.heappop(ended)
        idle.append(worker)
        told_s = scheduler.serve(at_s, costs.schedule_s / 2)
        begin(told_s)
        now_s = driver.serve(max(now_s, told_s), costs.result_s + size * work.rows * costs.row_s)
        running, rows = running - 1, rows + size * work.rows
        pace.note(size, size * work.call_s)
        if rows and now_s - saved_s > max(SAVE_EVERY_S, save_s / SAVE_SHARE):
            save_s = rows * costs.save_row_s
            saved_s = now_s = driver.serve(now_s, save_s)
    seconds = driver.serve(now_s, rows * costs.save_row_s)
    return Outcome(
        calls,
        seconds,
        calls * work.call_s / seconds,
        driver.busy_s / seconds,
        scheduler.busy_s / seconds,
        worker_busy_s / (slots * seconds),
        calls / batches,
    )


def calls_in(work: Work, seconds: float, nodes: int, cores: int, most: int) -> int:
    """Return how many calls keep all workers busy for so long, ``most`` at most."""
    return max(1, min(most, round(seconds * nodes * cores / work.call_s)))


def plan(
    nodes: tuple[int, ...], cores: int, hours: float, costs: Costs, most_calls: int
) -> pd.DataFrame:
    """Return a row a kind of study and number of nodes: what a study of some hours reaches."""
    table = []
    for work in WORKS:
        for count in nodes:
            calls = calls_in(work, 3600 * hours, count, cores, most_calls)
            outcome = simulate(work, calls, count, cores, costs)
            table.append(
                {
                    "study": work.name,
                    "nodes": count,
                    "workers": count * cores,
                    "calls": calls,
                    "hours": outcome.seconds / 3600,
                    "calls a day": DAY_S * calls / outcome.seconds,
                    "speed-up": outcome.speed_up,
                    "efficiency": outcome.speed_up / (count * cores),
                    "driver busy": outcome.driver_busy,
                    "scheduler busy": outcome.scheduler_busy,
                    "calls a batch": outcome.batch,
                }
            )
    return pd.DataFrame(table)


def saturation(
    work: Work,
    cores: int,
    hours: float,
    costs: Costs,
    most_calls: int,
    efficiency: float,
    most_nodes: int,
) -> int:
    """Return the most nodes, a power of two, on which a study stays so efficient; 0 if not even on one."""
    best, count = 0, 1
    while count <= most_nodes:
        calls = calls_in(work, 3600 * hours, count, cores, most_calls)
        if simulate(work, calls, count, cores, costs).speed_up < efficiency * count * cores:
            break
        best, count = count, 2 * count
    return best


def costs_of(measured: Mapping[str, Any]) -> Costs:
    """Return the costs that were measured; what was not keeps its usual value."""
    return Costs(**{name: float(measured[name]) for name in vars(Costs()) if name in measured})
