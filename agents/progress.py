"""How far training has come: a bar on a terminal, elsewhere a plain line whenever there is news."""

from __future__ import annotations

import contextlib
import sys
from time import perf_counter
from typing import Final, Self

from tqdm import tqdm

from servegym.envs.compilation import is_terminal

_BAR: Final = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
_LINES: Final = 10  # plain lines of a run that is never evaluated


class ProgressLine:
    """Shows steps, time left and a status on standard error; a context manager.

    On a terminal it is tqdm's bar. Elsewhere, as in a log, a line is printed when the status changes
    and, without any status, ten times in all.

    Parameters
    ----------
    total, initial
        Steps in all, and those done before.
    unit
        What is counted, as ``timesteps``.
    status
        What is to be shown first.
    shown
        Whether anything is to be shown.
    """

    def __init__(
        self, total: int, initial: int, unit: str, status: str = "", *, shown: bool = True
    ) -> None:
        self._unit, self._total, self._initial = unit, total, initial
        self._done, self._said = initial, initial
        self._status = ""
        self._started = perf_counter()
        self._plain = shown and not is_terminal()
        # Smoothing 0: the rate of all steps so far, since evaluations come seldom and take long.
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=unit,
            unit_scale=True,
            smoothing=0,
            bar_format=_BAR,
            disable=not shown or self._plain,
            postfix=status or None,
        )
        if self._plain:
            self._tell(status, "")

    def update(self, steps: int, status: str, note: str = "") -> None:
        """Count further steps; ``note`` is shown beside the status and is no news by itself."""
        self._done += steps
        self._bar.set_postfix_str(", ".join(filter(None, (status, note))), refresh=False)
        self._bar.update(steps)
        if self._plain:
            self._tell(status, note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def left_s(self) -> float | None:
        """Seconds left at the rate of all steps so far; None before the first."""
        done = self._done - self._initial
        if done == 0:
            return None
        return (self._total - self._done) * (perf_counter() - self._started) / done

    def _tell(self, status: str, note: str) -> None:
        """Print a line if there is news."""
        late = self._done - self._said >= self._total / _LINES
        if status == self._status and (status or not late):
            return
        self._status, self._said = status, self._done
        line = f"{self._done:,} of {self._total:,} {self._unit}"
        words = ", ".join(filter(None, (status, note)))
        left_s = self.left_s
        if left_s is not None:
            line += f", {tqdm.format_interval(left_s)} left"
        with contextlib.suppress(OSError, ValueError):  # nowhere to print to
            print(f"{line}: {words}" if words else line, file=sys.stderr, flush=True)
