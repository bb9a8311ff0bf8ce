"""The library's own threaded engine, scheduled by a twin, for requests that come and go in real time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers.generation.continuous_batching.requests import RequestStatus

from servegym.engines.huggingface.driving import Driven
from servegym.engines.twin import Twin
from servegym.envs.errors import ServegymError

START_S: Final = 60.0
"""How long its thread may take to start, and to stop."""


class FullError(ServegymError):
    """As many requests are there as may be; one more can come when some have ended."""


class Service(Driven):
    """The library's own threaded engine, on the wall's clock: requests come and go while it runs.

    Use it as a context; at its end whoever is still there is cancelled, so that ``twin.records()`` holds
    everybody.

    Parameters
    ----------
    model, twin, kv_tokens, batch_tokens
        As of ``Engine``.
    lasting
        Whether it may go on for ever: a twin that is full forgets those who have ended, the older half of
        its ``capacity``; no more than that half may be there at once. Else ``capacity`` bounds all requests.
    """

    def __init__(
        self,
        model: Any,
        twin: Twin,
        *,
        kv_tokens: int = 8192,
        batch_tokens: int = 2048,
        lasting: bool = False,
    ) -> None:
        if lasting and twin.capacity < 2:
            raise ServegymError(
                "a service that lasts needs a twin with a capacity of 2 or more, got 1"
            )
        super().__init__(model, twin, "wall", kv_tokens, batch_tokens, lasting=lasting)
        self._lasting = lasting
        self.answers: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()

    def __enter__(self) -> Service:
        with torch.inference_mode():
            self.manager.start()
        try:
            deadline = time.perf_counter() + START_S
            while self.manager.batch_processor is None:
                if not self.manager.is_running() or time.perf_counter() > deadline:
                    raise ServegymError(
                        f"the engine's thread has not started; it may lack room for {self._needs}"
                    )
                time.sleep(0.005)
            self.scheduler = self._check(self.manager.batch_processor)
        except BaseException:  # Ctrl-C, too: a thread that is left behind keeps the process alive
            self.manager.stop(block=True, timeout=START_S)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        failed = self.fault is not None
        for name in set(self.asked.copy()) - set(self.answers):
            self.cancel(name)
        self.manager.stop(block=True, timeout=START_S)
        if self.manager.is_running():
            raise ServegymError("the engine's thread does not stop")
        if not failed and self.scheduler.error is None:
            self.scheduler.settle()

    @property
    def started(self) -> bool:
        """Whether it has run; then ``scheduler`` holds what has come of it."""
        return hasattr(self, "scheduler")

    @property
    def fault(self) -> Exception | None:
        """Why it cannot go on: twin and engine would part, or the engine has failed; None: it can."""
        error: Exception | None = self.scheduler.error
        if error is not None or self.manager.is_running():
            return error
        cause = self.manager.background_thread_status.fatal_error
        why = "" if cause is None else f": {type(cause).__name__}: {' '.join(str(cause).split())}"
        return ServegymError(f"the engine's thread has ended{why}")

    def submit(
        self,
        prompt: Sequence[int],
        most_tokens: int,
        expected_tokens: int | None = None,
        spread: float = 0.0,
        *,
        ends: Sequence[int] = (),
    ) -> str:
        """Hand a request over now and return its name. See ``ask``; ``FullError`` is raised, too."""
        now_s = time.perf_counter() - self.scheduler.started_s
        return self.ask(prompt, most_tokens, expected_tokens, spread, arrival_s=now_s, ends=ends)

    def cancel(self, name: str) -> None:
        """Let a request end, whether it waits or runs; whoever has been answered stays so."""
        if name in self.asked:
            self.cancelled.add(name)
            self.manager.cancel_request(name)

    def progress(self, name: str) -> tuple[list[int], bool]:
        """Return the output tokens of a request so far, and whether it has ended.

        Raises
        ------
        ServegymError
            If twin and engine would part, the engine has failed, or the request ended so long ago that it
            has been forgotten.
        """
        id_ = self.scheduler.ids.get(name)
        state = None if id_ is None else self.scheduler.states.get(id_)
        if state is None:  # not seen yet, or no more
            self.check()
            if name not in self.asked:
                raise ServegymError(f"request {name} has been forgotten")
            return [], name in self.cancelled
        ended = state.status == RequestStatus.FINISHED or name in self.cancelled
        if not ended:
            self.check()
            if state.status > RequestStatus.FINISHED:
                raise ServegymError(f"the engine has failed at request {name}: {state.error}")
        return list(state.generated_tokens), ended

    def check(self) -> None:
        """Raise the ``fault``, if there is one."""
        fault = self.fault
        if fault is not None:
            raise fault

    def collect(self) -> None:
        """Take in what has been answered by now; ``answers`` holds it, of those who are not forgotten.

        Raises
        ------
        ServegymError
            If twin and engine would part, or the engine has failed.
        """
        while self._take(0.0):
            pass
        if self._lasting:
            for name in [name for name in self.answers if name not in self.asked]:
                del self.answers[name]
            self.cancelled -= {name for name in self.cancelled if name not in self.asked}

    def wait(self, seconds: float) -> None:
        """Do as ``collect`` for some time."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self._take(min(left, 0.1))

    def _take(self, seconds: float) -> bool:
        """Take in one output of the engine, if one comes within some time; return whether it has."""
        self.check()
        try:
            output = self.manager.get_result(timeout=seconds)
        except RuntimeError:
            self.check()
            raise
        if output is None:
            return False
        if output.is_finished() and output.error is None:
            self.answers[output.request_id] = list(output.generated_tokens)
        return True

    def _check_room(self) -> None:
        if not self._lasting:
            super()._check_room()
        elif self.scheduler.present_requests >= self.twin.capacity // 2:
            raise FullError(
                f"{self.twin.capacity // 2} requests are there, which is the most; ask again when some have "
                "ended"
            )
