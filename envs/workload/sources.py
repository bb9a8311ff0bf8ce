"""Sources of requests: a preset, sampled with a seed, or a workload file; and when they arrive."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, nearest, shown
from servegym.envs.files import read_bytes
from servegym.envs.workload.arrivals import MAX_ARRIVAL_RATE_PER_S, Arrivals, Measured
from servegym.envs.workload.cells import is_file
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.envs.workload.quantiles import FIGURES, figures_text
from servegym.envs.workload.requests import MAX_ARRIVAL_S, Requests, make_requests
from servegym.envs.workload.traces import Trace, read_trace
from servegym.envs.workload.windows import TraceWindow

Generator = np.random.Generator
Tokens = NDArray[np.int64]

WHOLE: Final = TraceWindow()
"""The whole of a file, as it is."""


def check_source(source: str) -> None:
    """Refuse a source that is neither a preset nor the name of a workload file."""
    if source not in WORKLOAD_PRESETS and not is_file(source):
        raise ServegymError(
            f"workload.source {shown(source)} is neither a preset nor a .csv, .json or .jsonl file"
            f"{nearest(source, WORKLOAD_PRESETS)}"
        )


def check_readable(source: str, window: TraceWindow = WHOLE) -> None:
    """Refuse a missing or invalid workload file before an episode reads it."""
    if source not in WORKLOAD_PRESETS:
        _read_file(source, window)


def measured_arrivals(source: str) -> Measured | None:
    """Return the arrival statistics that a preset brings; None where it brings none."""
    return FIGURES[source].arrivals if source in FIGURES else None


def check_arrival_rate(requests: int, arrival_rate_per_s: float) -> None:
    """Refuse a rate above 10⁹, or so low that requests would arrive after ``MAX_ARRIVAL_S``.

    The last of n Poisson arrivals comes after n / rate on average, and later than
    (n + 10·√n + 50) / rate in one episode of 10²⁰.
    """
    least = math.ceil(requests + 10.0 * math.sqrt(requests) + 50.0) / MAX_ARRIVAL_S
    if arrival_rate_per_s != 0 and not least <= arrival_rate_per_s <= MAX_ARRIVAL_RATE_PER_S:
        raise ServegymError(
            f"workload.arrival_rate_per_s must be 0 or lie in {least} … {MAX_ARRIVAL_RATE_PER_S:g} "
            f"for {requests} requests, which are to arrive within {MAX_ARRIVAL_S:g} s, got "
            f"{arrival_rate_per_s}",
            "arrival_rate_per_s",
        )


_LENGTHS_SAMPLED: Final = 100_000


def output_lengths(source: str, window: TraceWindow = WHOLE) -> Tokens:
    """Return a fixed sample of output lengths from the workload's distribution, shape (any,).

    Without predictions nothing else is known of a length. Of a preset it is a large sample, of a
    file the whole column, whatever part of it an episode plays.
    """
    check_source(source)
    if source not in WORKLOAD_PRESETS:
        return _read_file(source, window).requests.output_tokens
    return _sampled_lengths(source)


@cache
def _sampled_lengths(preset: str) -> Tokens:
    rng = np.random.default_rng(0)
    lengths = WORKLOAD_PRESETS[preset].sample(_LENGTHS_SAMPLED, rng).output_tokens
    lengths.setflags(write=False)
    return lengths


def workload_sha256(source: str) -> str | None:
    """Return the hash of a file's bytes, or of the figures that a preset is drawn from.

    None for a preset that is a formula. What else a workload depends on is in the task's configuration.

    Raises
    ------
    ServegymError
        If there is no such file, or it cannot be read.
    """
    check_source(source)
    if source in FIGURES:
        return hashlib.sha256(figures_text(source).encode()).hexdigest()
    if source in WORKLOAD_PRESETS:
        return None
    path = Path(source)
    state = _state_of(path)
    if state is None:
        raise ServegymError(f"{path}: no such workload file")
    return _hash_once(path, state)


def _read_file(source: str, window: TraceWindow) -> Trace:
    path = Path(source)
    trace = _read_once(path, _state_of(path), window.max_tokens)
    window.check(trace, source)
    return trace


_FileState = tuple[int, int, int, int]


def _state_of(path: Path) -> _FileState | None:
    """Return values that differ after every change of a file; None without a file.

    Among them is the inode's change time, which cannot be set as the content's can.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):  # reading the file says what is wrong
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=8)
def _read_once(path: Path, state: _FileState | None, max_tokens: int) -> Trace:
    """Read a workload file once, and again when its ``state`` has changed."""
    if max_tokens == 0:
        return read_trace(path)
    trace = _read_once(path, state, 0)
    try:
        return trace.without_longer(max_tokens)
    except ServegymError as error:
        raise ServegymError(f"workload.trace.max_tokens: {path}: {error}") from None


@lru_cache(maxsize=8)
def _hash_once(path: Path, state: _FileState) -> str:
    return hashlib.sha256(read_bytes(path, "workload file")).hexdigest()


def make_workload(
    source: str,
    requests: int,
    arrival_rate_per_s: float,
    rng: Generator,
    arrivals: Arrivals | None = None,
    window: TraceWindow = WHOLE,
) -> Requests:
    """Return the requests of one episode.

    A preset samples ``requests`` requests with ``rng``; a file brings its own number, and is the same for
    every seed unless its ``window`` has a random start. A process, or a positive ``arrival_rate_per_s``
    for Poisson, draws when they arrive. Without either they arrive as the file says, else are all present
    at t = 0.

    Examples
    --------
    >>> requests = make_workload("gsm8k-lognormal", 100, 0.0, np.random.default_rng(0))
    >>> len(requests), requests.arrival_s.max()
    (100, np.float64(0.0))
    """
    check_source(source)
    if source in WORKLOAD_PRESETS:
        check_arrival_rate(requests, arrival_rate_per_s)
        drawn = WORKLOAD_PRESETS[source].sample(requests, rng)
        arrivals_s = _drawn(
            source, requests, arrival_rate_per_s, rng, arrivals, measured_arrivals(source)
        )
        if arrivals_s is not None and not (arrivals_s[1:] >= arrivals_s[:-1]).all():
            return make_requests(drawn[0], drawn[1], arrivals_s, *drawn[2:])
        arrivals_s = np.zeros(requests) if arrivals_s is None else arrivals_s
        predicted = drawn.output_tokens  # by whom nobody predicts
        if drawn.predicted_output_tokens is not None:
            predicted = drawn.predicted_output_tokens
        return Requests(
            arrivals_s, drawn.prompt_tokens, drawn.output_tokens, predicted, drawn.predicted_spread
        )
    trace = _read_file(source, window)
    found = window.cut(trace, rng)
    check_arrival_rate(len(found), arrival_rate_per_s)
    measured = trace.measured(window.rate_scale) if arrivals is not None else None
    arrivals_s = _drawn(source, len(found), arrival_rate_per_s, rng, arrivals, measured)
    return found if arrivals_s is None else replace(found, arrival_s=arrivals_s)


def _drawn(
    source: str,
    requests: int,
    arrival_rate_per_s: float,
    rng: Generator,
    arrivals: Arrivals | None,
    measured: Measured | None,
) -> NDArray[np.float64] | None:
    """Return drawn arrival times; None where no process is named."""
    if arrivals is None and arrival_rate_per_s == 0:
        return None
    if arrivals is None:
        return np.cumsum(rng.exponential(1.0 / arrival_rate_per_s, requests))
    process = arrivals.with_defaults(measured, source)
    process.check(requests)
    return process.sample(requests, rng)


def most_requests(source: str, requests: int, window: TraceWindow = WHOLE) -> int:
    """Return the most requests that an episode may have, whatever the seed."""
    if source in WORKLOAD_PRESETS:
        return requests
    return window.most_requests(_read_file(source, window))


def describe_file(source: str, window: TraceWindow = WHOLE) -> str:
    """Return in one line what was read of a workload file, and what was left out; "" for a preset."""
    if source in WORKLOAD_PRESETS:
        return ""
    trace = _read_file(source, window)
    text = f"{source}: {trace.summary()}"
    if window == TraceWindow(max_tokens=window.max_tokens):
        return text
    most = window.most_requests(trace)
    if window.start == "random":
        return f"{text}; an episode plays at most {most}, from a start drawn by its seed"
    return f"{text}; an episode plays {most}"
