"""Queues that are known exactly, served by the simulator: mean waits beside closed formulas and chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from servegym.baselines.rules import triggers
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.checks import exact_queues as exact
from servegym.studies.serving import Served, serve

Array = NDArray[np.float64]
Tokens = NDArray[np.int64]

TICK_S: Final = 2.0**-10
"""Seconds of a prompt token and of a decode round where services are made of many."""

FREE_S: Final = 2.0**-30
"""A prefill stage that takes no time worth speaking of; a stage must take some."""

BATCHES: Final = 40
WARM_UP: Final = 0.05
"""Share of the requests, the first, that no mean counts."""

SHORTEST: Final = TriggerPolicy("shortest", triggers.EAGER)


@dataclass(frozen=True)
class Measured:
    """What one run says about one number."""

    name: str
    exact: float
    values: Array
    """One for each request, in order of arrival."""


@dataclass(frozen=True)
class Queue:
    """A queue that the simulator can be."""

    name: str
    how: str
    """How requests and costs make the simulator this queue."""
    play: Callable[[int, np.random.Generator], list[Measured]]
    """Serves so many requests."""


def batch_means(values: Array) -> tuple[float, float]:
    """Mean and half of its 95 % interval, by means of consecutive batches.

    Examples
    --------
    >>> batch_means(np.ones(1000))
    (1.0, 0.0)
    """
    kept = values[int(WARM_UP * len(values)) :]
    size = len(kept) // BATCHES
    means = kept[: size * BATCHES].reshape(BATCHES, size).mean(axis=1)
    half = student.ppf(0.975, BATCHES - 1) * means.std(ddof=1) / np.sqrt(BATCHES)
    return float(means.mean()), float(half)


def task_of(decode_s: float, prefill: tuple[float, float], **cluster: Any) -> TaskConfig:
    """Constant decode rounds, and prefill stages of base and seconds a token."""
    costs = StageCosts(AffineDecode(decode_s), AffinePrefill(*prefill))
    return TaskConfig("queue", ClusterConfig(**cluster), costs)


def poisson_arrivals(rate: float, n: int, rng: np.random.Generator) -> Array:
    """Arrivals in seconds."""
    return np.cumsum(rng.exponential(1.0 / rate, n))


def slotted_arrivals(rate: float, n: int, rng: np.random.Generator) -> Array:
    """Draw a Poisson number at each whole second, n arrivals in all: the last slots are cut off."""
    slots = np.arange(1.0, 2.0 + n / rate + 20.0 * np.sqrt(n))
    return np.repeat(slots, rng.poisson(rate, len(slots)))[:n]


def waits(served: Served) -> Array:
    """Seconds from arrival to admission."""
    return served.log.admitted_s - served.log.arrival_s


def sojourns(served: Served) -> Array:
    """Seconds from arrival to the last token."""
    return served.log.finished_s - served.log.arrival_s


# ---- one server ------------------------------------------------------------------------------


def fixed_services(n: int, rng: np.random.Generator) -> list[Measured]:
    """M/D/1: half a second of prompt, half a second of rounds."""
    task = task_of(TICK_S, (0.0, TICK_S), clients=1)
    arrivals = poisson_arrivals(0.7, n, rng)
    served = serve(task, "fcfs", np.full(n, 512), np.full(n, 513), arrivals)
    return [Measured("wait", exact.one_server_wait(0.7, 1.0, 1.0), waits(served))]


def lognormal_services(n: int, rng: np.random.Generator) -> list[Measured]:
    """M/G/1: services of whole ticks, a random part of them prompt."""
    task = task_of(TICK_S, (0.0, TICK_S), clients=1)
    ticks = np.rint(exact.lognormal(1.0, 0.5452, n, rng) / TICK_S).astype(np.int64)
    prompts = rng.integers(1, np.maximum(ticks, 2))
    served = serve(task, "fcfs", prompts, ticks - prompts + 1, poisson_arrivals(0.7, n, rng))
    square = exact.lognormal_square(1.0, 0.5452) + TICK_S**2 / 12.0  # rounded to ticks
    return [Measured("wait", exact.one_server_wait(0.7, 1.0, square), waits(served))]


def shortest_first(n: int, rng: np.random.Generator) -> list[Measured]:
    """M/G/1, the shortest of those who wait next, three lengths."""
    services, shares, rate = (0.25, 1.0, 3.0), (0.5, 0.35, 0.15), 0.8
    task = task_of(TICK_S, (0.0, TICK_S), clients=1)
    kinds = rng.choice(len(services), n, p=shares)
    rounds = (np.array(services)[kinds] / TICK_S).astype(np.int64) - 64
    served = serve(task, SHORTEST, np.full(n, 64), rounds + 1, poisson_arrivals(rate, n, rng))
    known = exact.shortest_first_waits(rate, services, shares)
    return [
        Measured(f"wait of {services[k]} s", known[k], waits(served)[kinds == k])
        for k in range(len(services))
    ]


def vacations(n: int, rng: np.random.Generator) -> list[Measured]:
    """M/D/1 whose server, when nobody waits, takes vacations: rounds of a request that never ends."""
    rate, service, vacation = 0.7, 1.0, 0.75
    task = task_of(vacation, (service, 0.0), clients=2)
    arrivals = np.append(0.0, 2.0 + poisson_arrivals(rate, n, rng))
    outputs = np.append(int(2.0 * arrivals[-1] / vacation), np.ones(n)).astype(np.int64)
    served = serve(task, "fcfs", np.ones(n + 1, np.int64), outputs, arrivals)
    known = exact.one_server_wait(rate, service, service**2) + vacation / 2.0
    return [Measured("wait", known, waits(served)[1:])]


# ---- many servers ----------------------------------------------------------------------------


def pooled(servers: int, load: float, n: int, seconds: Array, rng: np.random.Generator) -> Served:
    """One queue for replicas of one client each: independent servers."""
    tick = 2.0**-13
    task = task_of(1.0, (0.0, tick), clients=1, replicas=servers, router="pool")
    prompts = np.maximum(np.rint(seconds / tick), 1).astype(np.int64)
    arrivals = poisson_arrivals(servers * load, n, rng)
    return serve(task, "fcfs", prompts, np.ones(n, np.int64), arrivals)


def pooled_fixed(servers: int, load: float) -> Queue:
    """M/D/c."""

    def play(n: int, rng: np.random.Generator) -> list[Measured]:
        served = pooled(servers, load, n, np.ones(n), rng)
        return [Measured("wait", exact.fixed_service_wait(servers, load), waits(served))]

    how = "replicas of one client share a pool, prompts of 1 s, one token"
    return Queue(f"M/D/{servers}, load {load}", how, play)


def pooled_exponential(servers: int, load: float) -> Queue:
    """M/M/c."""

    def play(n: int, rng: np.random.Generator) -> list[Measured]:
        served = pooled(servers, load, n, rng.exponential(1.0, n), rng)
        waiting, wait = exact.erlang_wait(servers, load)
        delayed = (waits(served) > 0).astype(float)
        return [Measured("wait", wait, waits(served)), Measured("share who wait", waiting, delayed)]

    how = "replicas of one client share a pool, exponential prompts, one token"
    return Queue(f"M/M/{servers}, load {load}", how, play)


def slotted_fixed(clients: int, load: float) -> Queue:
    """M/D/c by Crommelin's chain: one replica, everybody decodes one round."""

    def play(n: int, rng: np.random.Generator) -> list[Measured]:
        task = task_of(1.0, (FREE_S, 0.0), clients=clients)
        arrivals = slotted_arrivals(clients * load, n, rng)
        served = serve(task, "fcfs", np.ones(n, np.int64), np.full(n, 2), arrivals)
        return [Measured("wait", exact.fixed_service_wait(clients, load), waits(served))]

    how = "one replica of c clients, one decode round each, arrivals at round boundaries"
    return Queue(f"M/D/{clients} in slots, load {load}", how, play)


def geometric_rounds(clients: int, rate: float, ends: float) -> Queue:
    """Geometric outputs on J clients that decode together."""

    def play(n: int, rng: np.random.Generator) -> list[Measured]:
        task = task_of(1.0, (FREE_S, 0.0), clients=clients)
        arrivals = slotted_arrivals(rate, n, rng)
        outputs = rng.geometric(ends, n) + 1
        served = serve(task, "fcfs", np.ones(n, np.int64), outputs, arrivals)
        known = exact.rounds_in_system(clients, rate, ends)
        return [Measured("rounds in system", known, sojourns(served))]

    how = "geometric outputs, constant rounds, free prefill, arrivals at round boundaries"
    return Queue(f"geometric chain, J = {clients}, λ = {rate}, p = {ends}", how, play)


# ---- a server that takes all who wait ---------------------------------------------------------


def take_all(rate: float, base: float, each: float) -> Queue:
    """Serve static batches: prefill stages of all who wait, one token each."""

    def play(n: int, rng: np.random.Generator) -> list[Measured]:
        task = task_of(1.0, (base, each), clients=500)
        arrivals = poisson_arrivals(rate, n, rng)
        served = serve(task, "fcfs", np.ones(n, np.int64), np.ones(n, np.int64), arrivals)
        sojourn, batch = exact.take_all(rate, base, each)
        starts = served.log.admitted_s
        _, sizes = np.unique(starts, return_counts=True)
        return [
            Measured("sojourn", sojourn, sojourns(served)),
            Measured("requests of a batch", batch, sizes.astype(float)),
        ]

    how = "prefill stages of a + b · requests seconds take all who wait, one token each"
    return Queue(f"all who wait, λ = {rate}, a = {base}, b = {each}", how, play)


QUEUES: Final[Sequence[Queue]] = (
    Queue("M/D/1, load 0.7", "one client, half prompt, half rounds", fixed_services),
    Queue(
        "M/G/1, load 0.7, lognormal, CV 0.5452",
        "one client, a random part of a service is prompt",
        lognormal_services,
    ),
    Queue(
        "M/G/1, load 0.74, shortest first",
        "one client, services of three lengths, rule shortest",
        shortest_first,
    ),
    Queue(
        "M/D/1 with vacations of 0.75 s, load 0.7",
        "two clients, of which one decodes an endless output whenever nobody waits",
        vacations,
    ),
    pooled_fixed(2, 0.8),
    pooled_fixed(4, 0.8),
    pooled_fixed(16, 0.9),
    pooled_exponential(2, 0.8),
    pooled_exponential(4, 0.8),
    pooled_exponential(16, 0.9),
    slotted_fixed(2, 0.8),
    slotted_fixed(4, 0.8),
    slotted_fixed(16, 0.9),
    geometric_rounds(4, 0.32, 0.1),
    geometric_rounds(8, 0.7, 0.1),
    take_all(1.0, 1.0, 0.0),
    take_all(2.0, 1.0, 0.1),
    take_all(5.0, 1.0, 0.1),
    take_all(8.0, 1.0, 0.1),
    take_all(0.5, 1.0, 0.5),
)
"""Every queue of the page."""
