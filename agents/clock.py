"""How long a training has taken, without its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from stable_baselines3.common.callbacks import CallbackList

from servegym.agents.callbacks import ServingCallback


@dataclass
class Clock:
    """Seconds of training since it was made, without those of callbacks."""

    callbacks: TimedCallbacks
    earlier_s: float
    limit_s: float
    started: float = field(default_factory=perf_counter)

    @property
    def since_start_s(self) -> float:
        """Seconds of this start."""
        return perf_counter() - self.started - self.callbacks.seconds

    @property
    def training_s(self) -> float:
        """Seconds so far, those before this start included."""
        return self.earlier_s + self.since_start_s

    @property
    def late(self) -> bool:
        """Whether this start has used up its time, if that is limited."""
        return 0 < self.limit_s <= self.since_start_s


class TimedCallbacks(CallbackList):
    """The given callbacks, and how long they have taken."""

    def __init__(self, callbacks: CallbackList) -> None:
        super().__init__(callbacks.callbacks)
        self.seconds = 0.0
        self._watching = [each for each in self.callbacks if isinstance(each, ServingCallback)]

    @property
    def status(self) -> str:
        """What the last evaluation has found, in a few words; empty where nothing is evaluated."""
        return "; ".join(filter(None, (each.status for each in self._watching)))

    @property
    def stopped(self) -> bool:
        """Whether a hook has asked to stop."""
        return any(each.stopped for each in self._watching)

    def _on_step(self) -> bool:
        return self._timed(super()._on_step)

    def _on_rollout_start(self) -> None:
        self._timed(super()._on_rollout_start)

    def _on_rollout_end(self) -> None:
        self._timed(super()._on_rollout_end)

    def _timed(self, call: Callable[[], Any]) -> Any:
        started = perf_counter()
        result = call()
        self.seconds += perf_counter() - started
        return result
