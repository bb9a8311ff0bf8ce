"""Engines at work, shown in a terminal: clients, queue, tokens a second, what the policy decides."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from servegym.envs.playing.policy import Policy, Situation

REDRAWN_S: Final = 0.25
PRINTED_S: Final = 5.0
BAR: Final = 16


class Noted:
    """A policy that counts what it has decided."""

    def __init__(self, policy: Policy, actions: Sequence[str]) -> None:
        self.policy, self.actions = policy, actions
        self.counts = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def act(self, situation: Situation) -> int:
        """Return the policy's action."""
        action = self.policy.act(situation)
        if 0 <= action < len(self.actions):
            self.counts[self.actions[action].removeprefix("prefill:")] += 1
        return action


class Glance:
    """One engine in one line. Changes nothing, as the scheduler may be another thread's."""

    def __init__(self, name: str, scheduler: Any, policy: Noted, total: int) -> None:
        self.name, self.scheduler, self.policy, self.total = name, scheduler, policy, total
        self._seen = 0
        self._tokens = 0
        self._busy_s = 0.0

    def line(self) -> str:
        """Return the line as things are now."""
        scheduler = self.scheduler
        iterations = scheduler.iterations
        while self._seen < len(iterations):
            each = iterations[self._seen]
            self._tokens += len(each.ids)
            self._busy_s += each.wall_s
            self._seen += 1
        clients = scheduler.twin.task.cluster.clients
        active = len(scheduler.active_requests)
        last = f"{iterations[-1].kind} of {len(iterations[-1].ids)}" if iterations else "starts"
        rate = self._tokens / self._busy_s if self._busy_s > 0 else 0.0
        filled = round(BAR * active / clients)
        asked = ", ".join(f"{name} {count}" for name, count in self.policy.counts.most_common(4))
        return (
            f"{self.name:12} [{'#' * filled}{'.' * (BAR - filled)}] {active}/{clients} clients, "
            f"{scheduler.due_requests} wait, {scheduler.ended_requests}/{self.total} ended | "
            f"{self._seen} iterations, {last}, {rate:.0f} tokens/s | "
            f"asked {self.policy.counts.total()}{': ' if asked else ''}{asked}"
        )


class Screen:
    """Lines that are drawn anew in place on a terminal, else printed now and then."""

    def __init__(self, glances: Sequence[Glance]) -> None:
        self._glances = glances
        self._in_place = sys.stdout.isatty()
        self._next = 0.0
        self._drawn = 0

    def show(self, *, now: bool = False) -> None:
        """Show all engines, if it is time or ``now``."""
        if time.perf_counter() < self._next and not now:
            return
        self._next = time.perf_counter() + (REDRAWN_S if self._in_place else PRINTED_S)
        lines = [glance.line() for glance in self._glances]
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            print(up + "\n".join(f"\x1b[2K{line[:width]}" for line in lines), flush=True)
            self._drawn = len(lines)
        else:
            print("\n".join(lines), flush=True)
