"""Cases of constructed output lengths: distributions known exactly, to check a rule against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, unknown
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.workload.presets import WORKLOAD_PRESETS, sample_gsm8k_prompts
from servegym.envs.workload.requests import make_requests

Lengths = NDArray[np.int64]

MEAN_TOKENS: Final = 344
"""Mean of every constructed distribution, that of the paper's outputs."""

MAX_CONSTRUCTED_TOKENS: Final = 4096


def _lognormal(n: int, rng: np.random.Generator, mean: float, deviation: float) -> Lengths:
    logs = np.log(mean) - deviation**2 / 2 + deviation * rng.standard_normal(n)
    return np.clip(np.rint(np.exp(logs)), 1, MAX_CONSTRUCTED_TOKENS).astype(np.int64)


def _bimodal(n: int, rng: np.random.Generator) -> Lengths:
    short = rng.random(n) < 0.5
    return np.where(short, _lognormal(n, rng, 64, 0.1), _lognormal(n, rng, 624, 0.1))


OUTPUTS: Final[dict[str, Callable[[int, np.random.Generator], Lengths]]] = {
    "constant": lambda n, rng: np.full(n, MEAN_TOKENS),
    "uniform": lambda n, rng: rng.integers(1, 2 * MEAN_TOKENS, n),
    "narrow": lambda n, rng: _lognormal(n, rng, MEAN_TOKENS, 0.2),
    "wide": lambda n, rng: _lognormal(n, rng, MEAN_TOKENS, 1.0),
    "bimodal": _bimodal,
}
"""Samplers by name, ``sample(n, rng)``: constant; uniform on 1 … 687; lognormal of spread 0.2 or 1.0,
at most 4096; half 64 and half 624, each with a spread of 0.1."""


def check_outputs(name: str) -> None:
    """Refuse a name that is neither of ``OUTPUTS`` nor a preset of ``WORKLOAD_PRESETS``."""
    if name not in OUTPUTS and name not in WORKLOAD_PRESETS:
        raise unknown("distribution of outputs", name, [*OUTPUTS, *WORKLOAD_PRESETS])


def make_constructed_case(task: TaskConfig, outputs: str, seed: int) -> Case:
    """Return a case of the task's size and costs with output lengths of a distribution.

    Constructed lengths go with GSM8K prompts, independent of them; a preset brings its own.

    Raises
    ------
    ServegymError
        If there is no such distribution, or the seed is negative.
    """
    check_outputs(outputs)
    if seed < 0:
        raise ServegymError(f"the seed must be ≥ 0, got {seed}")
    rng, n = seeding.np_random(seed)[0], task.workload.requests
    if outputs in WORKLOAD_PRESETS:
        prompts, lengths, *_ = WORKLOAD_PRESETS[outputs].sample(n, rng)
    else:
        prompts, lengths = sample_gsm8k_prompts(n, rng), OUTPUTS[outputs](n, rng)
    return bound_case(lower(task), make_requests(prompts, lengths))
