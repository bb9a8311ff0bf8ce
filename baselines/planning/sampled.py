"""An offline plan for uncertain lengths: a two-stage stochastic program by sample-average approximation.

First stage: which client serves which requests, decided before any length is known. Second stage: the
lengths come out, and the makespan is the largest load. The first stage minimises the mean of that over
scenarios, lengths drawn from the predictions (Kleywegt, Shapiro and Homem-de-Mello 2002, "The Sample
Average Approximation Method for Stochastic Discrete Optimization"). The paper leaves it open whether
that beats planning by expected lengths (its section VI).

Solved by local search from the longest-first plan of the means: a request of a scenario's busiest client
is swapped with one of another client, or moved to it, if the mean falls. Few scenarios are
overfitted: at GSM8K-v0's size 32 of them make worse plans than the means do; hundreds are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.servers import Servers
from servegym.envs.errors import ServegymError
from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.machine.layout import Fleet
from servegym.envs.simulator.heap import deal, deal_by_time
from servegym.envs.workload.plan import Plan, plan_from_queues
from servegym.envs.workload.requests import MAX_TOKENS, Requests

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment,return-value"

Whole = NDArray[np.int64]
Seconds = NDArray[np.float64]

MOVES_PER_REQUEST: Final = 100
"""Moves tried for each request; more gain less than another draw of scenarios changes."""

MAX_SCENARIOS: Final = 10_000

_SPARE_PLACES: Final = 8  # of each client, beyond those of the first plan's fullest client
_NOBODY: Final = -1


@dataclass(frozen=True, eq=False)
class SampledPlan:
    """A plan and the mean over its own scenarios of the largest load, in decode rounds.

    Where clients differ in speed, both are in seconds, whatever the name says.

    The mean is too low: the plan was fitted to these scenarios. ``mean_largest_load`` on other
    scenarios is unbiased.
    """

    plan: Plan
    in_sample_rounds: float


def sample_rounds(requests: Requests, scenarios: int, rng: np.random.Generator) -> Whole:
    """Draw decode rounds from the predictions, shape (scenarios, requests).

    Requests without predictions are certain: every scenario has their true lengths.
    """
    if requests.predicted_spread is None:
        return np.tile(requests.decode_rounds, (scenarios, 1))
    noise = rng.standard_normal((scenarios, len(requests)))
    spread = requests.predicted_spread
    tokens = requests.predicted_output_tokens * np.exp(spread * noise - spread**2 / 2.0)
    return np.clip(np.rint(tokens), 1, MAX_TOKENS).astype(np.int64) - 1


def mean_largest_load(plan: Plan, rounds: Whole, fleet: Fleet | None = None) -> float:
    """Return the mean over scenarios of the largest client load, ``rounds`` (scenarios, requests).

    In rounds, or in seconds where the clients of ``fleet`` differ in speed.
    """
    nothing = np.zeros(rounds.shape[1], np.int64)
    servers = Servers.alike(plan.clients, 0) if fleet is None else Servers.of(fleet, nothing)
    return float(np.mean([servers.span(plan.loads(scenario)) for scenario in rounds]))


def plan_by_samples(
    requests: Requests, clients: int | Fleet, rounds: Whole, rng: np.random.Generator
) -> SampledPlan:
    """Plan the requests so that the mean largest load over scenarios is small.

    Parameters
    ----------
    requests
        The requests to plan. A client serves its own longest first, by their predictions.
    clients
        Number of clients, ≥ 1, or what they are. A request goes where it is expected to fit, or nowhere.
    rounds
        The scenarios' decode rounds, shape (scenarios, requests).
    rng
        Chooses the moves.

    Raises
    ------
    ServegymError
        If there is no client, no scenario, or the scenarios are of other requests.
    """
    if not isinstance(clients, Fleet) and clients < 1:
        raise ServegymError(f"clients must be ≥ 1, got {clients}")
    if rounds.ndim != 2 or len(rounds) == 0 or rounds.shape[1] != len(requests):
        raise ServegymError(f"scenarios must have shape (any, {len(requests)}), got {rounds.shape}")
    expected = requests.predicted_output_tokens - 1
    order = np.argsort(-expected, kind="stable")
    if not isinstance(clients, Fleet):
        servers = Servers.alike(clients, len(requests))
    else:
        needs = requests.prompt_tokens + requests.predicted_output_tokens
        order = order[needs[order] <= clients.tokens.max()]
        servers = Servers.of(clients, needs)
    round_s, needs, holds = servers.round_s, servers.needs, servers.holds
    if servers.are_alike:
        client_of = deal(expected[order], servers.clients)
    else:
        client_of = deal_by_time(expected[order], needs[order], round_s, holds)
    queues = _line_up(order, client_of, servers.clients)
    loads = _loads(queues, rounds)
    if servers.clients > 1:
        moves = MOVES_PER_REQUEST * len(requests)
        _improve(queues, rounds, loads, round_s, needs, holds, moves, rng)
    kept = [sorted(queue[queue != _NOBODY], key=lambda i: (-expected[i], i)) for queue in queues]
    return SampledPlan(plan_from_queues(kept), float((loads * round_s).max(axis=1).mean()))


@allocating_kernel
def _line_up(order: Whole, client_of: Whole, clients: int) -> Whole:
    """Return the queues (clients, places) of requests dealt in ``order``, with places to spare."""
    count = np.bincount(client_of, minlength=clients)
    queues = np.full((clients, count.max() + _SPARE_PLACES), _NOBODY)
    count[:] = 0
    for place in range(order.size):
        client = client_of[place]
        queues[client, count[client]] = order[place]
        count[client] += 1
    return queues


@allocating_kernel
def _loads(queues: Whole, rounds: Whole) -> Whole:
    """Return each client's load in each scenario, shape (scenarios, clients)."""
    loads = np.zeros((rounds.shape[0], queues.shape[0]), np.int64)
    for s in range(rounds.shape[0]):
        for client in range(queues.shape[0]):
            for i in queues[client]:
                if i != _NOBODY:
                    loads[s, client] += rounds[s, i]
    return loads


@kernel
def _find_largest(load: Whole, round_s: Seconds, largest: Whole) -> None:
    """Write the clients of the (up to) three largest loads, the largest first."""
    largest[:] = _NOBODY
    for client in range(load.size):
        place = largest.size
        end_s = load[client] * round_s[client]
        while place > 0 and (
            largest[place - 1] == _NOBODY
            or load[largest[place - 1]] * round_s[largest[place - 1]] < end_s
        ):
            if place < largest.size:
                largest[place] = largest[place - 1]
            place -= 1
        if place < largest.size:
            largest[place] = client


@kernel
def _largest_without(load: Whole, round_s: Seconds, largest: Whole, a: int, b: int) -> float:
    """Return the largest load of any client but two; 0 without others."""
    for client in largest:
        if client not in (a, b, _NOBODY):
            return load[client] * round_s[client]
    return 0.0


@kernel
def _may_hold(client: int, i: int, needs: Whole, holds: Whole) -> bool:
    return i == _NOBODY or needs[i] <= holds[client]


@allocating_kernel
def _improve(
    queues: Whole,
    rounds: Whole,
    loads: Whole,
    round_s: Seconds,
    needs: Whole,
    holds: Whole,
    moves: int,
    rng: np.random.Generator,
) -> None:
    """Swap and move requests in place as long as the sum of the largest loads falls."""
    scenarios, clients = loads.shape
    largest = np.empty((scenarios, 3), np.int64)
    for s in range(scenarios):
        _find_largest(loads[s], round_s, largest[s])
    for _ in range(moves):
        a = largest[int(rng.random() * scenarios), 0]
        b = int(rng.random() * clients)
        place_a = int(rng.random() * queues.shape[1])
        place_b = int(rng.random() * queues.shape[1])
        i, k = queues[a, place_a], queues[b, place_b]
        if a == b or i == _NOBODY:
            continue
        if not (_may_hold(a, k, needs, holds) and _may_hold(b, i, needs, holds)):
            continue
        gain = 0.0
        for s in range(scenarios):
            shift = rounds[s, i] - (rounds[s, k] if k != _NOBODY else 0)
            then = max((loads[s, a] - shift) * round_s[a], (loads[s, b] + shift) * round_s[b])
            others = _largest_without(loads[s], round_s, largest[s], a, b)
            most = largest[s, 0]
            gain += loads[s, most] * round_s[most] - max(then, others)
        if gain <= 0:
            continue
        queues[a, place_a], queues[b, place_b] = k, i
        for s in range(scenarios):
            shift = rounds[s, i] - (rounds[s, k] if k != _NOBODY else 0)
            loads[s, a] -= shift
            loads[s, b] += shift
            _find_largest(loads[s], round_s, largest[s])
