"""Mean waits of queues that are known exactly: closed formulas, and stationary chains solved by number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, poisson

Array = NDArray[np.float64]

STATES = 400
"""States of a chain; the mass beyond is below 1e-12 in every case here."""


def one_server_wait(rate: float, mean: float, mean_square: float) -> float:
    """Mean wait of M/G/1 in order of arrival (Pollaczek and Khinchine).

    Examples
    --------
    >>> round(one_server_wait(0.7, 1.0, 1.0), 6)
    1.166667
    """
    return rate * mean_square / (2.0 * (1.0 - rate * mean))


def shortest_first_waits(
    rate: float, services: Sequence[float], shares: Sequence[float]
) -> list[float]:
    """Mean wait of each class of M/G/1 where the shortest waiting request is served next (Cobham).

    ``services`` ascend; a request in service is served to its end.

    Examples
    --------
    >>> shortest_first_waits(0.5, [1.0], [1.0]) == [one_server_wait(0.5, 1.0, 1.0)]
    True
    """
    residual = rate * sum(share * s * s for s, share in zip(services, shares, strict=True)) / 2.0
    waits, before = list[float](), 0.0
    for service, share in zip(services, shares, strict=True):
        upto = before + rate * share * service
        waits.append(residual / ((1.0 - before) * (1.0 - upto)))
        before = upto
    return waits


def erlang_wait(servers: int, load: float) -> tuple[float, float]:
    """Probability to wait and mean wait of M/M/c with services of mean 1; ``load`` is a server's.

    Examples
    --------
    >>> [round(value, 8) for value in erlang_wait(2, 0.8)]
    [0.71111111, 1.77777778]
    """
    offered = servers * load
    blocked = 1.0
    for k in range(1, servers + 1):  # Erlang B
        blocked = offered * blocked / (k + offered * blocked)
    waits = blocked / (1.0 - load * (1.0 - blocked))
    return waits, waits / (servers - offered)


def stationary(step: Callable[[int], Array]) -> Array:
    """Stationary distribution of a chain on 0 … STATES − 1; ``step(n)`` is the law after n."""
    moves = np.array([step(n) for n in range(STATES)])
    moves[:, -1] += 1.0 - moves.sum(axis=1)
    equations = np.vstack([(moves.T - np.eye(STATES))[:-1], np.ones(STATES)])
    return np.linalg.solve(equations, np.append(np.zeros(STATES - 1), 1.0))


def arrivals_of(mean: float) -> Array:
    """Law of a Poisson number on 0 … STATES − 1."""
    return np.asarray(poisson.pmf(np.arange(STATES), mean))


def fixed_service_wait(servers: int, load: float) -> float:
    """Mean wait of M/D/c with services of 1 (Crommelin's chain): n′ = max(n − c, 0) + Poisson.

    Examples
    --------
    >>> round(fixed_service_wait(2, 0.8), 8)
    0.90328388
    """
    rate = servers * load
    coming = arrivals_of(rate)
    shares = stationary(lambda n: _shifted(coming, max(n - servers, 0)))
    queue = np.maximum(np.arange(STATES) - servers, 0)
    return float(shares @ queue) / rate


def rounds_in_system(clients: int, rate: float, ends: float) -> float:
    """Mean rounds in system where each of J running requests ends a round with chance ``ends``.

    A Poisson number arrives at each boundary: n′ = n − Bin(min(n, J), p) + Poisson(λ).

    Examples
    --------
    >>> round(rounds_in_system(4, 0.32, 0.1), 6)
    17.084461
    """
    coming = arrivals_of(rate)
    laws = [
        binom.pmf(np.arange(running + 1), running, 1.0 - ends) for running in range(clients + 1)
    ]

    def step(n: int) -> Array:
        running = min(n, clients)
        stay = np.asarray(laws[running])
        return _shifted(np.convolve(stay, coming)[:STATES], n - running)

    return float(stationary(step) @ np.arange(STATES)) / rate


def take_all(rate: float, base: float, each: float) -> tuple[float, float]:
    """Mean sojourn, and mean batch, where a free server takes all who wait, in base + each · n seconds.

    Examples
    --------
    >>> [round(value, 4) for value in take_all(2.0, 1.0, 0.1)]
    [1.9661, 2.6047]
    """

    def step(n: int) -> Array:
        coming = arrivals_of(rate * (base + each * n))
        batch = coming.copy()
        batch[1] += batch[0]  # nobody: it waits for one
        batch[0] = 0.0
        return batch

    sizes = np.arange(STATES)
    shares = stationary(step)
    lengths = base + each * sizes
    batch = float(shares @ sizes)
    waited = float(shares @ (rate * lengths**2 / 2.0))
    return (waited + float(shares @ (sizes * lengths))) / batch, batch


def take_all_bound(rate: float, base: float, each: float) -> float:
    """Bound that sojourn in closed form (Inoue 2021)."""
    work, fixed = rate * each, rate * base
    first = (each + base) / (2.0 * (1.0 - work))
    first *= 1.0 + 2.0 * fixed + (1.0 - fixed) / (1.0 + work)
    second = 1.5 * base / (1.0 - work) + each / 2.0 * (work + 2.0) / (1.0 - work**2)
    return min(first, second)


def lognormal_square(mean: float, variation: float) -> float:
    """E[S²] of a lognormal, or of any law, with a coefficient of variation."""
    return mean * mean * (1.0 + variation * variation)


def lognormal(mean: float, variation: float, n: int, rng: np.random.Generator) -> Array:
    """Draws of a lognormal."""
    spread = math.sqrt(math.log1p(variation * variation))
    return mean * rng.lognormal(-spread * spread / 2.0, spread, n)


def _shifted(law: Array, places: int) -> Array:
    return np.concatenate([np.zeros(places), law[: STATES - places]])
