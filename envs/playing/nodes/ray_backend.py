"""Batches as tasks of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from servegym.envs.errors import ServegymError
from servegym.envs.playing.nodes.driver import WorkerLostError
from servegym.envs.playing.nodes.worker import work

RETRIES: Final = 3
"""How often a batch whose worker has died is begun anew."""

PROBE_S: Final = 60.0
"""How long a node may take to start its first process."""


class RayBackend:
    """A driver of a Ray cluster; see :class:`~servegym.envs.playing.nodes.driver.Backend`.

    Parameters
    ----------
    address
        As the user wrote it, for messages.
    target
        What ``ray.init`` takes; None: Ray has been initialised already, and stays so.

    Raises
    ------
    ServegymError
        If there is no cluster, or it has no processors.
    """

    def __init__(self, address: str, target: str | None) -> None:
        self.address, self._owns = address, target is not None
        if target is not None:
            try:
                ray.init(address=target, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError, TimeoutError) as error:
                words = " ".join(str(error).split())
                raise ServegymError(
                    f"--cluster {address}: no Ray cluster answers there ({words[:200]})"
                ) from None
        self._work = ray.remote(num_cpus=1, max_retries=RETRIES)(work)
        self._refs: dict[Hashable, Any] = {}
        if self.slots() == 0:
            self.close()
            raise ServegymError(f"--cluster {address}: the Ray cluster has no processors")

    def probe(self, function: Callable[[], Any]) -> Mapping[str, Any]:
        """Call a function once on every node."""
        remote = ray.remote(num_cpus=0, max_retries=0)(function)
        asked = {}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
                strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[node["NodeManagerAddress"]] = remote.options(
                    scheduling_strategy=strategy
                ).remote()
        found = {}
        for name, ref in asked.items():
            try:
                found[name] = ray.get(ref, timeout=PROBE_S)
            except ray.exceptions.RayTaskError as error:
                found[name] = error.cause
            except ray.exceptions.RayError as error:
                found[name] = error
        return found

    def slots(self) -> int:
        """Return the number of processors, those in use by others included."""
        try:
            return int(ray.cluster_resources().get("CPU", 0))
        except Exception:  # Ray's client raises errors of many kinds
            raise ServegymError(
                f"{self.address}: the Ray cluster no longer answers; what is finished is kept: start "
                "again when it does"
            ) from None

    def share(self, job: bytes) -> Any:
        """Put the job into the object store."""
        return ray.put(job)

    def submit(self, shared: Any, batch: bytes) -> Hashable:
        """Begin a batch."""
        ref = self._work.remote(shared, batch)
        self._refs[ref] = ref
        name: Hashable = ref
        return name

    def finished(self, timeout_s: float) -> Collection[Hashable]:
        """Return the batches that have ended."""
        if not self._refs:
            time.sleep(timeout_s)
            return []
        refs = list(self._refs)
        ended, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ended:
            ended, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        names: Collection[Hashable] = ended
        return names

    def result(self, name: Hashable) -> bytes:
        """Return what a batch has returned."""
        ref = self._refs.pop(name)
        try:
            data: bytes = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            words = " ".join(str(error.cause).split())
            raise ServegymError(
                f"worker {error.ip} (pid {error.pid}) cannot run servegym: {words[:300]}; install the "
                "same there"
            ) from None
        except ray.exceptions.RayError as error:
            words = " ".join(str(error).split())
            raise WorkerLostError(
                f"{self.address}: a call has lost {RETRIES + 1} workers one after the other "
                f"({words[:200]}); what is finished is kept: start again"
            ) from None
        return data

    def cancel(self, names: Collection[Hashable]) -> None:
        """Give up batches; a process that runs one is ended."""
        for name in names:
            if (ref := self._refs.pop(name, None)) is not None:
                with suppress(Exception):  # it has ended meanwhile, or the cluster has
                    ray.cancel(ref, force=True)

    def close(self) -> None:
        """Leave the cluster."""
        if self._owns:
            with suppress(Exception):
                ray.shutdown()
