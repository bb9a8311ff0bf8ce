"""Batches on the workers of a dask.distributed scheduler."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import dask
import distributed

from servegym.envs.errors import ServegymError
from servegym.envs.playing.nodes.driver import WorkerLostError
from servegym.envs.playing.nodes.worker import work

ANSWER_S: Final = 4.0
"""How long a scheduler, and then its first worker, may take to answer."""


class DaskBackend:
    """A client of a scheduler; see :class:`~servegym.envs.playing.nodes.driver.Backend`.

    Raises
    ------
    ServegymError
        If nobody answers at the address, or no worker has joined the scheduler.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        # What lost connections mean for a run is said in one line.
        for name in [*logging.root.manager.loggerDict, "asyncio"]:
            if name.split(".")[0] in ("asyncio", "distributed", "tornado"):
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GiB"})
        try:
            self._client = distributed.Client(address, timeout=ANSWER_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            words = " ".join(str(error).split()) or "no answer"
            raise ServegymError(
                f"--cluster {address}: no dask scheduler answers there ({words[:200]})"
            ) from None
        self._futures: dict[Hashable, distributed.Future] = {}
        self._ended: SimpleQueue[Hashable] = SimpleQueue()
        try:
            self._client.wait_for_workers(1, timeout=ANSWER_S)
        except TimeoutError:
            self.close()
            raise ServegymError(
                f"--cluster {address}: the scheduler has no workers; start some with "
                f"`dask worker {address} --nworkers auto --nthreads 1`"
            ) from None
        self._say_threads()

    def _say_threads(self) -> None:
        """Say which workers run several calls in one process, where they would wait for each other."""
        threads = {name: count for name, count in self._client.nthreads().items() if count > 1}
        if threads:
            name, count = next(iter(threads.items()))
            more = f" and {len(threads) - 1} more" if len(threads) > 1 else ""
            print(
                f"worker {name}{more}: {count} threads in one process make one call at a time; start it "
                f"with --nworkers {count} --nthreads 1",
                file=sys.stderr,
            )

    def probe(self, function: Callable[[], Any]) -> Mapping[str, Any]:
        """Call a function on every worker."""
        found: Mapping[str, Any] = self._client.run(function, on_error="return")
        return found

    def slots(self) -> int:
        """Return the number of workers: each makes one call at a time."""
        try:
            if self._client.status == "running":
                return len(self._client.nthreads())
        except (OSError, TimeoutError, CancelledError):
            pass
        raise ServegymError(
            f"{self.address}: the scheduler no longer answers; what is finished is kept: start again "
            "when it does"
        )

    def share(self, job: bytes) -> Any:
        """Return the job as a task's result, which is made anew should its worker die."""
        return self._client.submit(_itself, job, pure=False)

    def submit(self, shared: Any, batch: bytes) -> Hashable:
        """Begin a batch."""
        future = self._client.submit(work, shared, batch, pure=False)
        self._futures[future.key] = future
        future.add_done_callback(self._note)
        return future.key

    def _note(self, future: distributed.Future) -> None:
        self._ended.put(future.key)

    def finished(self, timeout_s: float) -> Collection[Hashable]:
        """Return the batches that have ended."""
        ended = []
        with suppress(Empty):
            ended.append(self._ended.get(timeout=timeout_s))
            while True:
                ended.append(self._ended.get_nowait())
        return [key for key in ended if key in self._futures]

    def result(self, name: Hashable) -> bytes:
        """Return what a batch has returned."""
        future = self._futures.pop(name)
        try:
            data: bytes = future.result()
        except distributed.KilledWorker as error:
            raise WorkerLostError(
                f"{self.address}: a call has lost {error.allowed_failures + 1} workers one after the other, "
                f"the last {error.last_worker.address}, as where memory is short; what is finished is kept: "
                "start again"
            ) from None
        except (CancelledError, OSError):
            raise ServegymError(
                f"{self.address}: the scheduler has lost what was under way; what is finished is kept: "
                "start again"
            ) from None
        except ImportError as error:
            raise ServegymError(
                f"{self.address}: a worker that came later lacks servegym ({error}); install the same there"
            ) from None
        finally:
            future.release()
        return data

    def cancel(self, names: Collection[Hashable]) -> None:
        """Give up batches; a worker ends the one under way where it asks ``is_wanted``."""
        futures = [self._futures.pop(name) for name in names if name in self._futures]
        if futures:
            with suppress(Exception):  # a scheduler that is gone has nothing to give up
                self._client.cancel(futures, force=True)

    def close(self) -> None:
        """Leave the scheduler."""
        with suppress(Exception):
            self._client.close(timeout=2)


def _itself(job: bytes) -> bytes:
    return job
