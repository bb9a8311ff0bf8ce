"""What runs on a worker: a batch of calls, after its kernels are there; one at a time in a process.

Results and errors come back in an :class:`Outcome`, so that neither dask's nor Ray's wrapping of errors
matters.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, Final

from filelock import FileLock
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.kernel_cache import cache_folders, make_private_folder
from servegym.envs.playing.nodes.carry import packed, unpacked
from servegym.envs.playing.nodes.identity import check_same, identity
from servegym.envs.playing.parallel import PARENT

_ONE_AT_A_TIME: Final = Lock()
"""A worker process may have several threads; kernels and relative paths are the process's."""


@dataclass(frozen=True)
class Job:
    """What all calls of a run have in common."""

    identity: Mapping[str, str]
    """The driver's."""
    function: Callable[..., Any]
    warm_up: str
    """Module that compiles every kernel when it is run; empty: nothing is compiled beforehand."""


@dataclass
class Outcome:
    """What came of a batch."""

    worker: str
    results: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    """Of all calls together."""
    error: BaseException | None = None
    """What the call after the last result raised."""


def work(job: bytes, batch: bytes) -> bytes:
    """Make the calls of a batch one after the other; return their outcome.

    Parameters
    ----------
    job, batch
        A packed :class:`Job`, and the packed arguments of each call.
    """
    with _ONE_AT_A_TIME:
        outcome = Outcome(worker_name())
        try:
            _work(_job(job), unpacked(batch), outcome)
        except Exception as error:
            outcome.error = _with_place(error, outcome.worker)
        try:
            return packed(outcome)
        except Exception as error:
            return packed(Outcome(outcome.worker, error=RuntimeError(f"cannot be sent: {error}")))


def _work(job: Job, batch: Sequence[tuple[Any, ...]], outcome: Outcome) -> None:
    compile_once(job.warm_up)
    started = perf_counter()
    for words in batch:
        if not is_wanted():
            return
        outcome.results.append(job.function(*words))
        outcome.seconds = perf_counter() - started


@lru_cache(maxsize=2)
def _job(data: bytes) -> Job:
    """Return a run's job, unpacked and checked once a process."""
    parts = unpacked(data)
    check_same(worker_name(), identity(), parts["identity"])  # before its functions are read
    return Job(parts["identity"], unpacked(parts["function"]), parts["warm_up"])


def pack_job(function: Callable[..., Any], warm_up: str) -> bytes:
    """Return a :class:`Job` as bytes; the function is packed apart, as another version cannot read it."""
    return packed({"identity": dict(identity()), "function": packed(function), "warm_up": warm_up})


def worker_name() -> str:
    """Return the host and the process, for messages."""
    return f"{socket.gethostname()} (pid {os.getpid()})"


def _with_place(error: Exception, worker: str) -> Exception:
    """Return an error that says where it was raised, and that can be sent."""
    if isinstance(error, ServegymError):
        return error
    if isinstance(error, ImportError):
        return ServegymError(f"worker {worker}: {error}; install there what is installed here")
    text = "".join(traceback.format_exception(error))
    error.add_note(f"on worker {worker}:\n{text}")
    try:
        unpacked(packed(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} on worker {worker}:\n{text}")
    return error


def is_wanted() -> bool:
    """Return whether the driver still waits for the call under way.

    Ray ends the process where it does not; dask cannot end a thread, so that long calls have to ask.
    """
    distributed = sys.modules.get("distributed.worker")
    key = None if distributed is None else getattr(distributed.thread_state, "key", None)
    if distributed is None or key is None:
        return True
    task = distributed.get_worker().state.tasks.get(key)
    return task is not None and task.state in ("executing", "long-running")


# ---- kernels, once a node ------------------------------------------------------------------------


@cache  # once a process
def compile_once(module: str) -> None:
    """Run a module that compiles every kernel, unless this node has them; other processes wait.

    A file beside the kernels says that they are there. Where nothing can be kept, nothing is done:
    each process then compiles what it calls.
    """
    if not module or os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return
    stamps = _stamps(module)
    if any(path.exists() for path in stamps):
        return
    name = sha256(str(stamps).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"servegym-{name}.lock"):
        if any(path.exists() for path in stamps):
            return
        environment = os.environ | {PARENT: str(os.getpid())}
        status = subprocess.run(
            [sys.executable, "-m", module],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
        for path in stamps if status == 0 else ():
            with suppress(OSError, ServegymError):  # the next folder, then
                make_private_folder(path.parent, 0o755)
                write_file(path, "")
                return


def _stamps(module: str) -> list[Path]:
    """Return the files that say that all kernels are compiled, in the folders that may hold them.

    The folders' names depend on all sources that the module imports, the file's on the processor, as
    several kinds of nodes may share the folder.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return []
    processor = f"{get_host_cpu_name()} {get_host_cpu_features().flatten()}"
    name = f"all-{sha256(processor.encode()).hexdigest()[:8]}"
    return [folder / name for folder in cache_folders(Path(spec.origin).resolve())]
