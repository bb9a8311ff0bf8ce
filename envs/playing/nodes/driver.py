"""The driver's side of a cluster: batches go out, results come back in any order, none is lost.

Small calls go in batches of about ``BATCH_S`` seconds, so that what a task costs the scheduler is shared
by many calls. No more batches are under way than keep all workers busy: a worker that dies takes one or
two with it, which the scheduler gives to others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from servegym.envs.errors import ServegymError
from servegym.envs.playing.nodes.carry import Carried, packed, unpacked
from servegym.envs.playing.nodes.identity import check_same, identity
from servegym.envs.playing.nodes.worker import Outcome, pack_job
from servegym.envs.playing.policy import Policy

BATCH_S: Final = 0.5
"""Seconds of work that a batch is to be."""

DRIVER_S: Final = 0.01
"""Seconds of work that a batch is to be for each slot, where that is more: a driver that needs a few
milliseconds a batch keeps up with any number of workers."""

LEAST_S: Final = 0.05
"""Seconds of work below which no batch is made smaller for all workers to end together."""

LONG_S: Final = 5.0
"""Calls longer than this are not queued at a worker: others may be free before it is."""

MAX_BATCH: Final = 1000
"""Most calls of a batch."""

PATIENCE_S: Final = 30.0
"""How long a run waits without any worker; one that was killed may be started anew."""

LOOK_EVERY_S: Final = 1.0
"""How often the driver looks which workers there are."""

Result = TypeVar("Result")


class WorkerLostError(ServegymError):
    """A batch that has ended several workers, one after the other."""


class Backend(Protocol):
    """What runs batches somewhere else: dask.distributed, or Ray.

    A batch whose worker dies is given to another one by the backend itself.
    """

    address: str
    """As the user wrote it."""

    def probe(self, function: Callable[[], Any]) -> Mapping[str, Any]:
        """Call a function on every worker, or once on every node; return results and errors by name."""

    def slots(self) -> int:
        """Return how many batches can run at a time; 0 where no worker is left.

        Raises
        ------
        ServegymError
            If the cluster no longer answers.
        """

    def share(self, job: bytes) -> Any:
        """Return a reference to what all batches of a run are submitted with."""

    def submit(self, shared: Any, batch: bytes) -> Hashable:
        """Begin ``worker.work(job, batch)`` on some worker; return what names it."""

    def finished(self, timeout_s: float) -> Collection[Hashable]:
        """Return the batches that have ended since they were last asked for; wait for the first."""

    def result(self, name: Hashable) -> bytes:
        """Return what ``work`` has returned, once.

        Raises
        ------
        ServegymError
            If the batch has ended its worker again and again, or the worker lacks servegym.
        """

    def cancel(self, names: Collection[Hashable]) -> None:
        """Give up batches, those under way included."""

    def close(self) -> None:
        """Leave the cluster."""


class Nodes:
    """The workers of a cluster; close it, or use it as a context.

    Parameters
    ----------
    backend
        What runs batches.
    warm_up
        Module that compiles every kernel, run once a node; see ``worker.compile_once``.

    Raises
    ------
    ServegymError
        If a worker lacks servegym or has another version of what results depend on.
    """

    def __init__(self, backend: Backend, warm_up: str = "") -> None:
        self._backend, self._warm_up = backend, warm_up
        try:
            self._check_workers()
        except BaseException:
            backend.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster."""
        self._backend.close()

    def slots(self) -> int:
        """Return how many batches can run at a time now."""
        return self._backend.slots()

    @property
    def address(self) -> str:
        """The cluster's address, as the user wrote it."""
        return self._backend.address

    def _check_workers(self) -> None:
        here = identity()
        for worker, found in self._backend.probe(_make_probe()).items():
            if isinstance(found, ImportError):
                text = f"lacks servegym ({found}), here {here['servegym']}"
                raise ServegymError(f"worker {worker} {text}; install the same there")
            if isinstance(found, Exception):
                words = f"{type(found).__name__}: {' '.join(str(found).split())}"
                raise ServegymError(f"worker {worker} cannot run servegym: {words[:300]}")
            check_same(worker, found, here)

    def carried(
        self, make_policy: Callable[[str], Policy], names: Sequence[str]
    ) -> Callable[[str], Policy]:
        """Return a function that makes these policies on a worker, which needs no agents' folders."""
        return Carried(make_policy, names)

    def run(
        self, function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[Result]:
        """Call a function once for each of ``arguments`` on the workers; yield the results as they come.

        A deque of arguments is emptied, and may be added to while results come. Close the generator
        where an exception may leave it half-way: that gives up what is under way.

        Raises
        ------
        ServegymError
            If the cluster or its last worker is gone, or a call ends its worker again and again.
        """
        if not arguments:
            return
        shared = self._backend.share(pack_job(function, self._warm_up))
        waiting = arguments if isinstance(arguments, deque) else deque(arguments)
        running = set[Hashable]()
        pace, census = Pace(), _Census(self._backend)
        try:
            while waiting or running:
                slots = census.slots()
                while waiting and len(running) < slots * pace.depth:
                    size = pace.batch(len(waiting), slots)
                    batch = [waiting.popleft() for _ in range(size)]
                    running.add(self._backend.submit(shared, packed(batch)))
                for name in self._backend.finished(LOOK_EVERY_S):
                    outcome: Outcome = unpacked(self._backend.result(name))
                    running.remove(name)
                    pace.note(len(outcome.results), outcome.seconds)
                    yield from outcome.results
                    if outcome.error is not None:
                        raise outcome.error
        finally:
            self._backend.cancel(running)


class Pace:
    """How many calls go in a batch, by the seconds that calls have taken."""

    def __init__(self) -> None:
        self._calls, self._seconds = 0, 0.0

    def note(self, calls: int, seconds: float) -> None:
        """Count calls of a batch and their seconds."""
        self._calls, self._seconds = self._calls + calls, self._seconds + seconds

    @property
    def _mean_s(self) -> float:
        return self._seconds / self._calls if self._calls else LONG_S

    @property
    def depth(self) -> int:
        """Batches under way for each slot: one runs, and one waits at the worker where calls are short."""
        return 1 if self._mean_s >= LONG_S else 2

    def batch(self, waiting: int, slots: int) -> int:
        """Return the number of calls of the next batch: fewer towards the end, for all to end together."""
        mean_s = max(self._mean_s, 1e-6)
        share = max(round(LEAST_S / mean_s), -(-waiting // (2 * slots)))
        usual = round(max(BATCH_S, slots * DRIVER_S) / mean_s)
        return max(1, min(waiting, MAX_BATCH, share, usual))


class _Census:
    """How many slots there are, asked for now and then; refuses to wait without any for long."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._slots, self._seen, self._next = 0, monotonic(), 0.0

    def slots(self) -> int:
        now = monotonic()
        if now >= self._next:
            self._slots, self._next = self._backend.slots(), now + LOOK_EVERY_S
            if self._slots:
                self._seen = now
            elif now - self._seen > PATIENCE_S:
                raise ServegymError(
                    f"{self._backend.address}: no worker is left; what is finished is kept: start "
                    "again when there are workers"
                )
        return self._slots


def _make_probe() -> Callable[[], Mapping[str, str]]:
    """Return a function that is sent by value: it must begin where servegym is missing."""

    def probe() -> Mapping[str, str]:
        import importlib
        import importlib.metadata

        try:
            module = importlib.import_module("servegym.envs.playing.nodes.identity")
        except ModuleNotFoundError as error:
            try:
                return {"servegym": importlib.metadata.version("servegym")}
            except importlib.metadata.PackageNotFoundError:
                raise error from None
        return dict(module.identity())

    return probe
