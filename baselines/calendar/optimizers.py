"""Optimisers of a vector: each asks for candidates and is told how good they were.

``cma`` and ``sep-cma`` are those of the package ``cmaes``: CMA-ES (Hansen 2016, arXiv 1604.00772), and the
one that learns the diagonal of the covariance only (Ros & Hansen 2008, doi 10.1007/978-3-540-87700-4_30).
``es`` is the project's own evolution strategy for agents (``agents/evolution.py``), over the vector itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, unknown

OPTIMIZERS: Final = ("cma", "sep-cma", "es")

_STEP_RATE: Final = 0.05
"""Of ``es``: what a step is, per unit of a slope in percentage points."""

_LONGEST_STEP: Final = 1.0
"""Of ``es``, in standard deviations of its perturbations."""

_MEDIANS: Final = 2.0
"""Of ``es``: a difference counts at most so many medians of all."""

Vector = NDArray[np.float64]


class Optimizer(Protocol):
    """What a search needs of an optimiser."""

    @property
    def mean(self) -> Vector:
        """Where it is."""

    @property
    def generation(self) -> int:
        """How often it has been told."""

    def ask(self) -> Vector:
        """Return the next candidate of the generation."""

    def tell(self, solutions: list[tuple[Vector, float]]) -> None:
        """Learn from a generation: its candidates, as asked for, and what is to be made small."""


class EvolutionStrategy:
    """Follows the slope that pairs of opposite perturbations show (Salimans et al. 2017, arXiv 1703.03864).

    The perturbations' standard deviation stays as it is.

    Parameters
    ----------
    mean
        Where it begins, shape (numbers,).
    sigma
        Standard deviation of the perturbations, > 0.
    population_size
        Candidates of a generation, even.
    seed
        Of the perturbations.

    Raises
    ------
    ServegymError
        If the population is odd.

    Examples
    --------
    >>> strategy = EvolutionStrategy(np.ones(3), 0.1, 4, seed=0)
    >>> first, second = strategy.ask(), strategy.ask()
    >>> np.allclose(first + second, 2)
    True
    """

    def __init__(self, mean: Vector, sigma: float, population_size: int, seed: int) -> None:
        if population_size < 2 or population_size % 2:
            raise ServegymError(
                f"optimizer es needs an even population, got {population_size}; "
                f"take {population_size + 1}"
            )
        self.mean = np.array(mean, float)
        self.generation = 0
        self._sigma, self._population, self._seed = sigma, population_size, seed
        self._asked = 0
        self._steps = self._draw()

    def _draw(self) -> Vector:
        rng = np.random.default_rng([self._seed, self.generation])
        return rng.standard_normal((self._population // 2, len(self.mean)))

    def ask(self) -> Vector:
        """Return the next candidate: perturbations in turn, each with its opposite behind it."""
        pair, opposite = divmod(self._asked % self._population, 2)
        self._asked += 1
        return self.mean + (-1) ** opposite * self._sigma * self._steps[pair]

    def tell(self, solutions: Sequence[tuple[Vector, float]]) -> None:
        """Take a step along the slope; ``solutions`` in the order in which they were asked for."""
        fitness = np.array([value for _, value in solutions])
        gains_percent = 100 * (fitness[1::2] - fitness[::2])
        sizes = np.abs(gains_percent[gains_percent != 0])
        limit = _MEDIANS * float(np.median(sizes)) if len(sizes) else 0.0
        gains_percent = gains_percent.clip(-limit, limit)
        slope = gains_percent @ self._steps / (2 * self._sigma * len(self._steps))
        step = _STEP_RATE * slope
        length, longest = float(np.linalg.norm(step)), _LONGEST_STEP * self._sigma
        self.mean = self.mean + step * min(1.0, longest / max(length, 1e-12))
        self.generation += 1
        self._asked = 0
        self._steps = self._draw()


def make_optimizer(
    name: str, mean: Vector, sigma: float, population_size: int, seed: int
) -> Optimizer:
    """Return a new optimiser.

    Parameters
    ----------
    name
        One of ``OPTIMIZERS``.
    mean, sigma
        Where it begins, shape (numbers,), and its first standard deviation.
    population_size
        Candidates of a generation.
    seed
        Of its random numbers.

    Raises
    ------
    ServegymError
        If there is no such optimiser, or ``cmaes``, where needed, is not installed.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    if name == "es":
        return EvolutionStrategy(mean, sigma, population_size, seed)
    try:
        from cmaes import CMA, SepCMA
    except ImportError:
        raise ServegymError(
            "learning a calendar needs the package cmaes; install it by `pip install cmaes`"
        ) from None
    kind = CMA if name == "cma" else SepCMA
    made: Optimizer = kind(mean=mean, sigma=sigma, population_size=population_size, seed=seed)
    return made
