"""Presets: requests sampled with a seed. Those of other data sets are drawn from published ``quantiles``.

The GSM8K presets shuffle the 1319 measured prompt lengths; another number of requests takes whole
copies and a random part of one. Output lengths of the paper's model are not public: two families are
fitted to its mean (344.83) and standard deviation (187.99) and joined to the prompts by a Gaussian copula
with the measured rank correlation. The generation limit of ``gsm8k-lognormal`` lowers mean and deviation
to 342.9 and 179.1; ties at the cap lower the correlation of ``gsm8k-cap512`` to 0.50. ``gsm8k-mixed``
brings its own predictions: about half are accurate, the others rough.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from servegym.envs.workload.quantiles import FIGURES, Figures

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
    scores = _scores_of_lengths(np.bincount(prompts).tobytes())[prompts]
    noise = rng.standard_normal(len(prompts))
    normals: NDArray[np.float64] = rho * scores + np.sqrt(1.0 - rho**2) * noise
    return normals


@lru_cache(maxsize=16)
def _scores_of_lengths(counts_bytes: bytes) -> NDArray[np.float64]:
    """Return the normal score of each length, of which there are so many; whole copies have the same."""
    counts = np.frombuffer(counts_bytes, np.int64)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each length, the mean over its ties
    with np.errstate(divide="ignore", invalid="ignore"):
        return ndtri((ranks - 0.5) / counts.sum())


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


def _by_figures(figures: Figures) -> WorkloadPreset:
    arrivals = figures.arrivals
    rate = "" if arrivals is None else f"; {arrivals.rate_per_s:.4g} requests a second"
    if arrivals is not None and arrivals.cv is not None:
        rate += f", cv {arrivals.cv:.3g}"
    note = f"; {figures.note}" if figures.note else ""
    return WorkloadPreset(
        f"{figures.description}{rate} ({figures.source}, {figures.licence}{note})",
        lambda requests, rng: Sample(*figures.sample(requests, rng)),
    )


WORKLOAD_PRESETS: Final[dict[str, WorkloadPreset]] = {
    "gsm8k-lognormal": WorkloadPreset("GSM8K prompts, lognormal outputs", sample_gsm8k_lognormal),
    "gsm8k-cap512": WorkloadPreset("GSM8K prompts, outputs capped at 512", sample_gsm8k_cap512),
    "gsm8k-mixed": WorkloadPreset(
        "GSM8K prompts, outputs predicted with spreads of 0.1 and 0.8", sample_gsm8k_mixed
    ),
    "tiny": WorkloadPreset("a handful of short requests", sample_tiny),
    **{name: _by_figures(figures) for name, figures in FIGURES.items()},
}
"""Presets by name, as ``[workload] source = …`` takes them; any other source is a file."""
