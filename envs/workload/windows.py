"""Which part of a workload file an episode plays, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import check_fields
from servegym.envs.errors import ServegymError
from servegym.envs.workload.requests import MAX_ARRIVAL_S, MAX_REQUESTS, MAX_TOKENS, Requests
from servegym.envs.workload.traces import Trace, picked

Generator = np.random.Generator

_NAME: Final = "workload.trace"


@dataclass(frozen=True)
class TraceWindow:
    """``workload.trace``: which part of a workload file an episode plays, and how fast.

    Examples
    --------
    >>> TraceWindow(start_s=3600.0, window_s=600.0, rate_scale=2.0).max_requests
    0
    """

    start_s: float = 0.0
    """Seconds of the file at which the episode begins; earlier requests are left out."""
    window_s: float = 0.0
    """Seconds of the file that are played; 0: to its end."""
    start: Literal["given", "random"] = "given"
    """``random``: the seed draws when the window begins, uniformly over the file's time as far as the
    window holds a request; of a file without times, the first of ``max_requests`` rows."""
    rate_scale: float = 1.0
    """The requests come so many times as fast, 1e-6 … 1e6."""
    max_requests: int = 0
    """At most so many requests, the first of the window; 0: all."""
    max_tokens: int = 0
    """Drop requests whose prompt and output together are longer; 0: none."""

    def __post_init__(self) -> None:
        check_fields(_NAME, self)
        for key, least, most in (
            ("start_s", 0.0, MAX_ARRIVAL_S),
            ("window_s", 0.0, MAX_ARRIVAL_S),
            ("rate_scale", 1e-6, 1e6),
            ("max_requests", 0, MAX_REQUESTS),
            ("max_tokens", 0, 2 * MAX_TOKENS),
        ):
            value = getattr(self, key)
            if not least <= value <= most:
                raise ServegymError(f"{_NAME}.{key} must lie in {least:g} … {most:g}, got {value}")
        if self.start == "random" and self.window_s == 0 and self.max_requests == 0:
            raise ServegymError(
                f"{_NAME}.start 'random' needs window_s, or max_requests without times"
            )
        if self.start == "random" and self.start_s > 0:
            raise ServegymError(f"{_NAME} has both start 'random' and start_s; give one of them")

    def check(self, trace: Trace, path: str) -> None:
        """Refuse what a file cannot give: times that it lacks, a start after its end."""
        if not trace.arrives:
            for key, absent in (("start_s", 0.0), ("window_s", 0.0), ("rate_scale", 1.0)):
                if getattr(self, key) != absent:
                    raise ServegymError(
                        f"{_NAME}.{key}: {path} has no arrival times; name workload.arrivals"
                    )
            return
        arrivals_s = trace.requests.arrival_s
        if self.start == "random" and self.window_s == 0:
            raise ServegymError(
                f"{_NAME}.start 'random' needs window_s, as {path} has arrival times"
            )
        last_s = float(arrivals_s[-1])
        if self.start_s > last_s:
            raise ServegymError(
                f"{_NAME}.start_s must be at most {last_s}, when the last request of {path} arrives, "
                f"got {self.start_s}"
            )
        if self.start == "given" and len(range(*self._bounds(arrivals_s, self.start_s))) == 0:
            after_s = float(arrivals_s[np.searchsorted(arrivals_s, self.start_s)])
            raise ServegymError(
                f"{_NAME}: no request of {path} arrives in the {self.window_s} s from {self.start_s} "
                f"s; the next comes at {after_s}"
            )
        if last_s / self.rate_scale > MAX_ARRIVAL_S:
            raise ServegymError(
                f"{_NAME}.rate_scale must be at least {last_s / MAX_ARRIVAL_S:.3g} for {path}, got "
                f"{self.rate_scale}"
            )

    def most_requests(self, trace: Trace) -> int:
        """Return the most requests that an episode may have, whatever the seed draws."""
        arrivals_s, count = trace.requests.arrival_s, len(trace.requests)
        if self.start == "random" and trace.arrives:
            ends = np.searchsorted(arrivals_s, arrivals_s + self.window_s)
            count = int((ends - np.arange(count)).max())
        elif trace.arrives:
            count = len(range(*self._bounds(arrivals_s, self.start_s)))
        return min(count, self.max_requests or count)

    def cut(self, trace: Trace, rng: Generator) -> Requests:
        """Return the requests of an episode; only a random start draws from ``rng``."""
        requests = trace.requests
        if self == TraceWindow(max_tokens=self.max_tokens):
            return requests
        arrivals_s, start_s = requests.arrival_s, self.start_s
        if trace.arrives:
            if self.start == "random":
                start_s = self._random_start(arrivals_s, rng)
            first, after = self._bounds(arrivals_s, start_s)
            if first == after:  # by rounding, or where the window ends with the file
                start_s = float(arrivals_s[min(first, len(requests) - 1)])
                first, after = self._bounds(arrivals_s, start_s)
        else:
            first, after = 0, len(requests)
            if self.start == "random":
                first = int(rng.integers(max(after - self.max_requests, 0) + 1))
        after = min(after, first + (self.max_requests or after))
        part = picked(requests, np.arange(first, after))
        if part.rows is not None and len(part) == len(requests) and requests.rows is None:
            part = replace(part, rows=None)
        return replace(part, arrival_s=(part.arrival_s - start_s) / self.rate_scale)

    def _bounds(self, arrivals_s: NDArray[np.float64], start_s: float) -> tuple[int, int]:
        """Return the first request of a window and the first after it."""
        first = int(np.searchsorted(arrivals_s, start_s))
        if self.window_s == 0:
            return first, len(arrivals_s)
        return first, max(first, int(np.searchsorted(arrivals_s, start_s + self.window_s)))

    def _random_start(self, arrivals_s: NDArray[np.float64], rng: Generator) -> float:
        """Draw a start uniformly from the times at which the window holds a request.

        A window holds the request that arrives at t if it begins in (t − window, t].
        """
        latest_s = max(float(arrivals_s[-1]) - self.window_s, 0.0)
        ends_s = np.minimum(arrivals_s, latest_s)
        begins_s = np.maximum(
            np.maximum(arrivals_s - self.window_s, 0.0), np.append(0.0, ends_s[:-1])
        )
        lengths_s = np.cumsum(np.maximum(ends_s - begins_s, 0.0))
        drawn_s = (1.0 - rng.random()) * lengths_s[-1]  # > 0 where there is a choice
        part = min(int(np.searchsorted(lengths_s, drawn_s)), len(ends_s) - 1)
        return float(max(ends_s[part] - (lengths_s[part] - drawn_s), 0.0))
