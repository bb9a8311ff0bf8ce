"""Sources of requests: presets sampled with a seed, or a CSV file.

The GSM8K presets shuffle the 1319 measured prompt lengths; another number of requests takes whole
copies and a random part of one. Output lengths of the paper's model are not public: two families are
fitted to its mean (344.83) and standard deviation (187.99) and joined to the prompts by a Gaussian copula
with the measured rank correlation. The generation limit of ``gsm8k-lognormal`` lowers mean and deviation
to 342.9 and 179.1; ties at the cap lower the correlation of ``gsm8k-cap512`` to 0.50. ``gsm8k-mixed``
brings its own predictions: about half are accurate, the others rough.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from servegym.envs.errors import ServegymError, nearest, shown
from servegym.envs.files import read_bytes
from servegym.envs.workload.csv import read_requests
from servegym.envs.workload.requests import MAX_ARRIVAL_S, Requests, make_requests

Generator = np.random.Generator
Tokens = NDArray[np.int64]

PROMPT_OUTPUT_RANK_CORRELATION: Final = 0.55
"""Spearman correlation of prompt and output lengths; 0.52 … 0.58 measured on GSM8K."""

GSM8K_LOGNORMAL: Final = (5.71294, 0.51011)
"""μ and σ of the log of ``gsm8k-lognormal``'s output tokens."""

MIXED_SPREADS: Final = (0.1, 0.8)
"""Standard deviations of log(true / predicted) in ``gsm8k-mixed``."""

MAX_LOGNORMAL_TOKENS: Final = 1024
"""Generation limit of ``gsm8k-lognormal``; 0.8 % of the lengths reach it."""

MAX_CAP512_TOKENS: Final = 512

MAX_ARRIVAL_RATE_PER_S: Final = 1e9


class Sample(NamedTuple):
    """Sampled requests, with predicted lengths if the preset brings its own."""

    prompt_tokens: Tokens  # (n,)
    output_tokens: Tokens  # (n,)
    predicted_output_tokens: Tokens | None = None  # (n,) means
    predicted_spread: NDArray[np.float64] | None = None  # (n,) of the log length


@dataclass(frozen=True)
class WorkloadPreset:
    """A named sampler of n requests."""

    description: str
    sample: Callable[[int, Generator], Sample]


@cache
def _gsm8k_prompts() -> Tokens:
    text = resources.files("servegym.envs.data").joinpath("gsm8k_prompts.json").read_text("utf-8")
    histogram = json.loads(text)["histogram"]
    lengths = np.array([int(length) for length in histogram], dtype=np.int64)
    return np.repeat(lengths, list(histogram.values()))


def sample_gsm8k_prompts(requests: int, rng: Generator) -> Tokens:
    """Return GSM8K prompt lengths in random order: 1319 of them are exactly the measured ones."""
    prompts = _gsm8k_prompts()
    copies, rest = divmod(requests, len(prompts))
    chosen = np.concatenate([np.tile(prompts, copies), rng.permutation(prompts)[:rest]])
    return rng.permutation(chosen)


def _correlated_normals(prompts: Tokens, rng: Generator) -> NDArray[np.float64]:
    """Return standard normals whose rank correlation with ``prompts`` is the measured one."""
    rho = 2.0 * np.sin(np.pi * PROMPT_OUTPUT_RANK_CORRELATION / 6.0)  # Spearman → normal copula
    counts = np.bincount(prompts)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each length, the mean over its ties
    with np.errstate(divide="ignore", invalid="ignore"):
        score_of_length = ndtri((ranks - 0.5) / len(prompts))
    scores = score_of_length[prompts]
    noise = rng.standard_normal(len(prompts))
    normals: NDArray[np.float64] = rho * scores + np.sqrt(1.0 - rho**2) * noise
    return normals


def _lognormal(
    normals: NDArray[np.float64],
    mean: float | NDArray[np.float64],
    std: float | NDArray[np.float64],
    most: int,
) -> Tokens:
    lengths = np.exp(mean + std * normals)
    return np.clip(np.rint(lengths), 1, most).astype(np.int64)


def sample_gsm8k_lognormal(requests: int, rng: Generator) -> Sample:
    """GSM8K prompts with lognormal outputs, at most 1024 tokens."""
    prompts = sample_gsm8k_prompts(requests, rng)
    normals = _correlated_normals(prompts, rng)
    return Sample(prompts, _lognormal(normals, *GSM8K_LOGNORMAL, MAX_LOGNORMAL_TOKENS))


def sample_gsm8k_mixed(requests: int, rng: Generator) -> Sample:
    """GSM8K prompts; the *predicted* means are distributed as ``gsm8k-lognormal``'s outputs.

    An output is lognormal about its prediction, with a spread of 0.1 or 0.8 at equal chance, and at most
    1024 tokens long. The spread is part of the prediction.
    """
    prompts = sample_gsm8k_prompts(requests, rng)
    normals = _correlated_normals(prompts, rng)
    predicted = _lognormal(normals, *GSM8K_LOGNORMAL, MAX_LOGNORMAL_TOKENS)
    spread = rng.choice(MIXED_SPREADS, requests)
    noise = rng.standard_normal(requests)
    medians = np.log(predicted) - spread**2 / 2.0
    outputs = _lognormal(noise, medians, spread, MAX_LOGNORMAL_TOKENS)
    return Sample(prompts, outputs, predicted, spread)


def sample_gsm8k_cap512(requests: int, rng: Generator) -> Sample:
    """GSM8K prompts; 54.72 % of outputs run to a cap of 512, the rest are lognormal.

    A hypothesis that reproduces the paper's mean and standard deviation from a 512 cap alone
    (μ 4.88307, σ 0.39596). The largest uniforms are the capped ones.
    """
    prompts = sample_gsm8k_prompts(requests, rng)
    uniforms = ndtr(_correlated_normals(prompts, rng))
    share_free = 1.0 - 0.5472
    inner = np.minimum(uniforms / share_free, 1.0 - 1e-12)
    free = _lognormal(ndtri(inner), 4.88307, 0.39596, MAX_CAP512_TOKENS)
    outputs = np.where(uniforms >= share_free, MAX_CAP512_TOKENS, free).astype(np.int64)
    return Sample(prompts, outputs)


def sample_tiny(requests: int, rng: Generator) -> Sample:
    """Prompts of 4 … 12 and outputs of 1 … 9 tokens, uniform: small enough to solve exactly."""
    return Sample(rng.integers(4, 13, requests), rng.integers(1, 10, requests))


WORKLOAD_PRESETS: Final[dict[str, WorkloadPreset]] = {
    "gsm8k-lognormal": WorkloadPreset("GSM8K prompts, lognormal outputs", sample_gsm8k_lognormal),
    "gsm8k-cap512": WorkloadPreset("GSM8K prompts, outputs capped at 512", sample_gsm8k_cap512),
    "gsm8k-mixed": WorkloadPreset(
        "GSM8K prompts, outputs predicted with spreads of 0.1 and 0.8", sample_gsm8k_mixed
    ),
    "tiny": WorkloadPreset("a handful of short requests", sample_tiny),
}
"""Presets by name, as ``[workload] source = …`` takes them; any other source is a CSV file."""


def is_csv(source: str) -> bool:
    """Return whether a source is a CSV file by its name, in capitals or not."""
    return source.lower().endswith(".csv")


def check_source(source: str) -> None:
    """Refuse a source that is neither a preset nor the name of a CSV file."""
    if source not in WORKLOAD_PRESETS and not is_csv(source):
        raise ServegymError(
            f"workload.source {shown(source)} is neither a preset nor a .csv file"
            f"{nearest(source, WORKLOAD_PRESETS)}"
        )


def check_readable(source: str) -> None:
    """Refuse a missing or invalid workload file before an episode reads it."""
    if source not in WORKLOAD_PRESETS:
        _read_file(source)


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


def output_lengths(source: str) -> Tokens:
    """Return a fixed sample of output lengths from the workload's distribution, shape (any,).

    Without predictions nothing else is known of a length. Of a preset it is a large sample, of a CSV
    file the whole column.
    """
    check_source(source)
    if source not in WORKLOAD_PRESETS:
        return _read_file(source).output_tokens
    return _sampled_lengths(source)


@cache
def _sampled_lengths(preset: str) -> Tokens:
    rng = np.random.default_rng(0)
    return WORKLOAD_PRESETS[preset].sample(_LENGTHS_SAMPLED, rng).output_tokens


def workload_sha256(source: str) -> str | None:
    """Return the hash of a CSV file's bytes; None for a preset.

    Raises
    ------
    ServegymError
        If there is no such file, or it cannot be read.
    """
    check_source(source)
    if source in WORKLOAD_PRESETS:
        return None
    path = Path(source)
    state = _state_of(path)
    if state is None:
        raise ServegymError(f"{path}: no such workload file")
    return _hash_once(path, state)


def _read_file(source: str) -> Requests:
    path = Path(source)
    return _read_once(path, _state_of(path))


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
def _read_once(path: Path, state: _FileState | None) -> Requests:
    """Read a workload file once, and again when its ``state`` has changed."""
    return read_requests(path)


@lru_cache(maxsize=8)
def _hash_once(path: Path, state: _FileState) -> str:
    return hashlib.sha256(read_bytes(path, "workload file")).hexdigest()


def make_workload(
    source: str, requests: int, arrival_rate_per_s: float, rng: Generator
) -> Requests:
    """Return the requests of one episode.

    A preset samples ``requests`` requests with ``rng``, all present at t = 0 or, with a positive
    ``arrival_rate_per_s``, arriving as a Poisson process. A CSV file is the same for every seed and
    brings its own number and arrivals.

    Examples
    --------
    >>> requests = make_workload("gsm8k-lognormal", 100, 0.0, np.random.default_rng(0))
    >>> len(requests), requests.arrival_s.max()
    (100, np.float64(0.0))
    """
    check_source(source)
    if source not in WORKLOAD_PRESETS:
        return _read_file(source)
    check_arrival_rate(requests, arrival_rate_per_s)
    prompts, outputs, *predictions = WORKLOAD_PRESETS[source].sample(requests, rng)
    arrivals = None
    if arrival_rate_per_s > 0:
        arrivals = np.cumsum(rng.exponential(1.0 / arrival_rate_per_s, requests))
    return make_requests(prompts, outputs, arrivals, *predictions)
