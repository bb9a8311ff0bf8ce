"""Worker processes: no more than there is work and processors for, and none that outlives its parent.

A cluster's workers may take their place; see ``servegym.envs.playing.nodes``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from joblib import Parallel, cpu_count, delayed

from servegym.envs.errors import ServegymError
from servegym.envs.playing.policy import Policy

MAX_JOBS: Final = 1024
USUAL_JOBS: Final = 2
"""What scripts use unless told otherwise."""

PARENT: Final = "SERVEGYM_PARENT"
"""Environment variable: the id of the process without which a script is to end; see
:func:`end_with_parent`."""

_LOOK_EVERY_S: Final = 0.25

Result = TypeVar("Result")


class Elsewhere(Protocol):
    """Workers on other machines, as ``nodes.driver.Nodes``."""

    def run(
        self, function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[Result]:
        """Call a function once for each of ``arguments``; yield the results as they come."""

    def carried(
        self, make_policy: Callable[[str], Policy], names: Sequence[str]
    ) -> Callable[[str], Policy]:
        """Return a function that makes these policies there, without the files they are read from."""


Workers: TypeAlias = int | Elsewhere
"""Who does the work: so many processes of this machine, or the workers of a cluster."""


def check_jobs(jobs: int) -> None:
    """Refuse a number of worker processes outside 1 … ``MAX_JOBS``."""
    if not 1 <= jobs <= MAX_JOBS:
        raise ServegymError(f"--jobs must lie in 1 … {MAX_JOBS}, got {str(jobs)[:40]}")


def useful_jobs(jobs: int, things: int) -> int:
    """Return how many of ``jobs`` processes can be busy with so many things on this machine.

    Where that is fewer, and ``jobs`` is more than the usual ``USUAL_JOBS``, a line on stderr says so once.
    """
    check_jobs(jobs)
    useful = max(1, min(jobs, things, cpu_count()))
    if useful < jobs and jobs > USUAL_JOBS and things > 0:
        reason = f"{things} to do" if things < cpu_count() else f"{cpu_count()} processors"
        _say(f"--jobs {jobs}: {useful} are used, more would be idle ({reason})")
    return useful


@cache  # each line once
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def run_parallel(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], jobs: Workers
) -> Generator[Result]:
    """Call a picklable function once for each of ``arguments``; yield the results as they come.

    Works in this process if more than one would be idle. The processes end when this process does,
    however it ends. Close the generator where an exception may leave it half-way: that stops the workers.

    ``jobs`` is the number of processes here, or a cluster.

    Raises
    ------
    ServegymError
        If the number of processes is out of range, one was killed, or a cluster is gone.
    """
    if not isinstance(jobs, int):
        yield from jobs.run(function, arguments)
        return
    jobs = useful_jobs(jobs, len(arguments))
    if jobs == 1:
        for words in arguments:
            yield function(*words)
        return
    pool = Parallel(
        jobs,
        backend="loky",
        return_as="generator_unordered",
        initializer=_begin_worker,
        initargs=(os.getpid(), str(Path.cwd())),
    )
    try:
        with pool as parallel:
            results = parallel(delayed(function)(*words) for words in arguments)
            try:
                for result in results:  # noqa: UP028 (which would close them)
                    yield result
            except GeneratorExit:  # closed half-way, which joblib would advise against
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    results.close()
                raise
    except BrokenProcessPool:
        raise ServegymError(
            "a worker process was ended from outside, as by a system out of memory; what is finished is "
            "kept: start again, with fewer --jobs if need be"
        ) from None


def _begin_worker(parent: int, folder: str) -> None:
    os.chdir(folder)  # workers outlive a call; relative paths mean those of the call's folder
    # Ctrl-C reaches the whole group of processes; the parent ends the workers, without their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)


def end_with_parent(parent: int | None = None) -> None:
    """End this process soon after its parent has ended, even if the parent was killed.

    Parameters
    ----------
    parent
        The parent's process id; None takes it from the environment variable ``PARENT`` and does
        nothing where that is not set.
    """
    if parent is None:
        parent = int(os.environ.pop(PARENT, "0"))
    if parent > 0:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
