"""What the parts of a run on a cluster take here: local workers of dask, the same study on one and on two."""

from __future__ import annotations

import math
import operator
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import pandas as pd

from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import EPISODES, evaluate
from servegym.envs.playing.nodes import driver
from servegym.envs.playing.nodes.addresses import connect
from servegym.envs.playing.nodes.driver import Nodes
from servegym.envs.playing.tables import ResumableTable
from servegym.envs.task.registered import load_task
from servegym.studies.policies import make_policy
from servegym.studies.workers import WARM_UP

TASK: Final = "GSM8K-v0"
POLICIES: Final = ("fcfs", "hybrid", "aligned", "ppo")
TIMED: Final = ("decision_ms_p50", "decision_ms_p99", "prepare_s")
"""Columns of a row that depend on the clock."""

BATCHES: Final = 500
CALLS: Final = 20_000
ROWS: Final = 20_000
TRIED: Final = 60
"""Cases by which the length of the study is chosen."""


@contextmanager
def local_workers(count: int) -> Iterator[Nodes]:
    """Give workers of one thread each on this machine, processes of their own behind a scheduler.

    Raises
    ------
    ServegymError
        If the extra is not installed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    worker = ["dask_worker", address, "--nworkers", "1", "--nthreads", "1", "--no-nanny"]
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="servegym-"))
        for words in (scheduler, *[worker] * count):
            stack.enter_context(_process(words, Path(folder)))
        deadline = time.monotonic() + 60
        while True:
            try:
                nodes = stack.enter_context(connect(address, WARM_UP))
                if nodes.slots() == count:
                    break
                nodes.close()
            except ServegymError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)
        yield nodes


@contextmanager
def _process(words: Sequence[str], folder: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:], "--no-dashboard"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def seconds_a_batch(nodes: Nodes) -> dict[str, float]:
    """Return what a batch costs: of the clock from end to end, and of the driver's processor."""
    most, driver.MAX_BATCH = driver.MAX_BATCH, 1  # type: ignore[misc]
    try:
        list(nodes.run(operator.neg, [(1,)] * 20))
        clock, processor = time.perf_counter(), time.process_time()
        list(nodes.run(operator.neg, [(1,)] * BATCHES))
        spent = time.perf_counter() - clock, time.process_time() - processor
    finally:
        driver.MAX_BATCH = most  # type: ignore[misc]
    clock = time.perf_counter()
    list(nodes.run(operator.neg, [(1,)] * CALLS))
    return {
        "batch_s": spent[0] / BATCHES,
        "driver_batch_s": spent[1] / BATCHES,
        "call_s": (time.perf_counter() - clock) / CALLS,
    }


def seconds_a_row(row: dict[str, Any]) -> dict[str, float]:
    """Return what the driver takes to add a row of ``episodes.csv``, and to write one."""
    rows = [row | {"seed": seed} for seed in range(ROWS)]
    with TemporaryDirectory(prefix="servegym-") as folder:
        path = Path(folder) / "episodes.csv"
        table = ResumableTable(
            path, EPISODES, "", ("policy", "seed"), order=operator.itemgetter("seed")
        )
        table._wait_s = float("inf")  # saved below, and timed
        started = time.perf_counter()
        for added in rows:
            table.add([added])
        added_s = time.perf_counter() - started
        started = time.perf_counter()
        table.save()
        return {"row_s": added_s / ROWS, "save_row_s": (time.perf_counter() - started) / ROWS}


def play_study(crew: Nodes | int, cases: int, folder: Path) -> tuple[float, pd.DataFrame]:
    """Play the study in an empty folder; return the seconds and its rows, but for times."""
    task = load_task(TASK)
    started = time.perf_counter()
    policy_of = partial(make_policy, task_name=task.name)
    table = evaluate(task, policy_of, POLICIES, range(cases), folder, jobs=crew, progress=False)
    return time.perf_counter() - started, table.drop(columns=list(TIMED))


class OtherProcesses:
    """How many processors are busy with other processes than this one and its children, and stolen ones."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), self._busy_s()

    def mean(self) -> float:
        """Return their mean number since the start."""
        seconds = time.perf_counter() - self._started[0]
        return max(0.0, (self._busy_s() - self._started[1]) / seconds)

    @staticmethod
    def _busy_s() -> float:
        import psutil  # which distributed needs

        of_all = psutil.cpu_times()
        idle = of_all.idle + getattr(of_all, "iowait", 0.0)
        guests = getattr(of_all, "guest", 0.0) + getattr(of_all, "guest_nice", 0.0)  # counted twice
        here = psutil.Process()
        own = 0.0
        for process in (here, *here.children(recursive=True)):
            own += sum(process.cpu_times()[:2])
        return float(sum(of_all) - idle - guests - own)


def cases_in(seconds: float, nodes: Nodes, folder: Path) -> int:
    """Return how many cases of the study the workers play in so many seconds."""
    taken_s, _ = play_study(nodes, TRIED, folder)
    return max(TRIED, math.ceil(TRIED * seconds / taken_s))


def speed_up(cases: int, repeats: int, seconds: float) -> pd.DataFrame:
    """Return a row a run of the study: on one worker, on two, and so on, all runs in turn.

    ``cases`` 0: as many as one worker plays in ``seconds``.

    Raises
    ------
    ServegymError
        If a run gives other rows than this process alone.
    """
    rows = []
    with (
        local_workers(1) as one,
        local_workers(2) as two,
        TemporaryDirectory(prefix="servegym-") as place,
    ):
        _, wanted = play_study(1, 8, Path(place) / "here")
        for crew in (one, two):  # kernels are there, and all modules are imported
            _, found = play_study(crew, 8, Path(place) / f"warm-{crew.slots()}")
            if not found.equals(wanted):
                raise ServegymError(f"{crew.slots()} workers give other rows than this process")
        cases = cases or cases_in(seconds, one, Path(place) / "tried")
        first: pd.DataFrame | None = None
        for repeat in range(repeats):
            for crew in (one, two) if repeat % 2 == 0 else (two, one):
                workers = crew.slots()
                others = OtherProcesses()
                taken_s, found = play_study(crew, cases, Path(place) / f"{repeat}-{workers}")
                first = found if first is None else first
                if not found.equals(first):
                    raise ServegymError(f"{workers} workers give other rows than one")
                row = {"repeat": repeat, "workers": workers, "cases": cases, "seconds": taken_s}
                rows.append(row | {"others": others.mean()})
                print(
                    f"{workers} worker{'s' * (workers > 1)}, {cases} cases: {taken_s:.1f} s, other processes "
                    f"took {rows[-1]['others']:.2f} processors"
                )
    return pd.DataFrame(rows)


def ratio_of(runs: pd.DataFrame) -> tuple[float, float, float]:
    """Return the speed-up of two workers over one: the median, the least and the most over repeats."""
    by_workers = runs.pivot_table(index="repeat", columns="workers", values="seconds")
    ratios = (by_workers[1] / by_workers[2]).to_list()
    return median(ratios), min(ratios), max(ratios)


def measure() -> dict[str, float]:
    """Return the costs of a batch, a call and a row here, by the names of ``nodes.Costs``, and others."""
    with local_workers(2) as nodes, TemporaryDirectory(prefix="servegym-") as place:
        others = OtherProcesses()
        costs = seconds_a_batch(nodes)
        costs["others"] = others.mean()
        task = load_task(TASK)
        table = evaluate(
            task,
            partial(make_policy, task_name=task.name),
            ["fcfs"],
            [0],
            Path(place),
            progress=False,
        )
    row = {str(name): cell for name, cell in table.to_dict("records")[0].items()}
    costs |= seconds_a_row(row)
    # What of a batch's time is not the driver's is the scheduler's and the worker's.
    rest = max(costs["batch_s"] - costs["driver_batch_s"], 0.0)
    costs |= {"submit_s": costs["driver_batch_s"] / 2, "result_s": costs["driver_batch_s"] / 2}
    return costs | {"schedule_s": rest / 2, "start_s": rest / 2}
