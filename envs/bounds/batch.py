"""A proven lower bound on the makespan of an instance, whatever the scheduler.

At one replica stages never overlap, so the makespan is at least the time of all decode rounds plus
the time of all prefill stages, and each sum is bounded by itself.

**Decode.** Write d_i for the decode rounds of request i and D = Σ d_i. Let x_n be the number of
rounds with n active clients, n = 1 … J. Any schedule has Σ n·x_n = D and Σ x_n ≥ R, where R is the
largest of ⌈D/J⌉, the longest request and the pigeonhole bound (``rounds_lower_bound``: the rounds of
one client are disjoint). So Σ b(n)·x_n, with b(n) the round's time, is at least the optimum of that
linear program. The cache adds c per token and round: request i holds p_i + k tokens at the start of
its k-th round, so in any schedule this is exactly c·H with H = Σ (d_i·p_i + d_i(d_i + 1)/2).

A term e·n·kv of each round depends on who decodes together. For any v ≥ 0 a round with n clients costs at
least v + Σ over their tokens of g_v(h), where a token is served to a client who then holds h cached ones and
g_v(h) = min over n of (b(n) − v)/n + e·n·h. As a minimum of lines in h, g_v is concave: with all h between l
and m it lies above its chord, so that Σ g_v(h) ≥ (D − y)·g_v(l) + y·g_v(m), y = (H − D·l)/(m − l). Every v
thus proves v·R + (D − y)·g_v(l) + y·g_v(m); tried are 0 and where the minimum changes from one n to another.

**Prefill.** A stage admits at most J requests, so there are S ≥ ⌈I/J⌉ stages; under a token budget B a
stage holds at most B tokens when each prompt is counted as min(p, B), so S ≥ ⌈Σ min(p, B)/B⌉, too.
Affine cost max(floor, base + a·T + q·Σp²): summed over the stages it is at least S·floor, and at least
S·base + a·ΣT + q·Σp². A term c·T² of each stage adds at least c·max(Σp², (ΣT)²/S), by Cauchy and
Schwarz; as more stages then cost less of it, the least over all S counts. Levelled cost: let z_l be the
number of stages at level l (a stage beyond the top level counts as several); Σ cap_l·z_l ≥ ΣT and
Σ z_l ≥ S, and the linear program minimises the cost.

**Arrivals.** Requests that arrive at a or later cannot start before a, so a + (the bound of these
requests alone) holds for every a. Other requests may share their rounds and stages, which only adds to
Σ n·x_n; the program then has ≥ in place of =, and b(n) is the least time of n or more clients where e > 0.

Each linear program has two constraints, so its dual has two variables, and the dual's vertices depend on
the costs alone: they are computed once per cost model. A bound is the best over the vertices. By weak
duality each vertex proves a bound by itself, without a solver's tolerance. The tests compare with HiGHS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.bounds.totals import Totals, totals_from
from servegym.envs.errors import ServegymError
from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.workload.requests import Requests

_RELEASE_POINTS: Final = 16  # arrival times tried; more take longer and gain little
_TOLERANCE: Final = 1e-13  # relative, of a bound's rounding


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on the makespan and the parts that prove it. Times in seconds.

    Examples
    --------
    >>> from servegym.envs import TASKS, make_case
    >>> bound = make_case(TASKS["servegym/Tiny-v0"], 0).bound
    >>> round(bound.seconds, 2), 0 <= bound.decode_share <= 1
    (21.08, True)
    """

    seconds: float
    release_s: float  # no request counted in the bound arrives before
    decode_s: float
    prefill_s: float
    decode_rounds: int
    prefill_stages: int

    @property
    def decode_share(self) -> float:
        """Share of the work part that is decoding, 0 … 1; ½ where no work is proven."""
        work_s = self.decode_s + self.prefill_s
        return self.decode_s / work_s if work_s > 0 else 0.5


def lower_bound(
    requests: Requests, clients: int, costs: CostTables, max_prefill_tokens: int = 0
) -> LowerBound:
    """Return the best bound over release times; see the module docstring for the proof.

    Raises
    ------
    ServegymError
        If the shortest stage would not advance a clock, a 64-bit float, that shows the bound.

    Examples
    --------
    >>> from servegym.envs import TASKS, lower, make_requests
    >>> costs = lower(TASKS["servegym/Tiny-v0"]).costs
    >>> requests = make_requests([5, 5], [9, 4])  # prompt tokens, output tokens
    >>> round(lower_bound(requests, 3, costs).seconds, 2)
    10.0
    """
    prompts, rounds = requests.prompt_tokens, requests.decode_rounds
    firsts = first_released(requests.arrival_s)
    bounds = []
    for first, totals in zip(
        firsts.tolist(), totals_from(prompts, rounds, firsts, max_prefill_tokens), strict=True
    ):
        least_rounds = rounds_lower_bound(rounds[first:], clients)
        stages = least_stages(totals, clients, max_prefill_tokens)
        decode_s = decode_bound(totals, least_rounds, costs, alone=first == 0)
        prefill_s = prefill_bound(totals, stages, costs)
        release_s = float(requests.arrival_s[first])
        total_s = release_s + decode_s + prefill_s
        bounds.append(LowerBound(total_s, release_s, decode_s, prefill_s, least_rounds, stages))
    best = max(bounds, key=lambda bound: bound.seconds)
    refuse_standstill(best.seconds, requests, costs)
    return best


def first_released(arrival_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the first request of each arrival time that is tried as a release.

    All times, or ``_RELEASE_POINTS`` evenly among them. ``arrival_s`` (requests,) ascends, at least one.
    """
    firsts = np.flatnonzero(arrival_s[1:] != arrival_s[:-1]) + 1
    firsts = np.concatenate(([0], firsts))
    if len(firsts) <= _RELEASE_POINTS:
        return firsts
    return firsts[np.linspace(0, len(firsts) - 1, _RELEASE_POINTS).round().astype(int)]


def refuse_standstill(bound_s: float, requests: Requests, costs: CostTables) -> None:
    """Refuse an instance whose shortest stage would not advance a clock that shows the bound."""
    step_s = math.ulp(bound_s)
    if _shortest_stage_s(costs, 1.0, decodes=True) >= step_s:
        return  # the usual case, decided without the requests
    prompt = float(requests.prompt_tokens.min())
    stage_s = _shortest_stage_s(costs, prompt, decodes=bool(requests.output_tokens.max() > 1))
    if stage_s < step_s:
        raise ServegymError(
            f"stages of {stage_s:.3g} s would not advance a clock that shows {bound_s:.3g} s, as this "
            f"episode's will: its 64-bit number has steps of {step_s:.3g} s there, which is the "
            "shortest stage possible"
        )


def _shortest_stage_s(costs: CostTables, prompt: float, *, decodes: bool) -> float:
    """Return the seconds of the shortest stage if every prompt has at least ``prompt`` tokens."""
    _, base_s, token_s, square_s, floor_s, overhead_s, client_s, packed_s, _ = costs.rates[0].item()
    square_s += packed_s
    stage_s = max(base_s + token_s * prompt + square_s * prompt**2, floor_s)
    if costs.prefill_level_s.shape[1] > 0:
        stage_s = float(costs.prefill_level_s[0, 0])
    stage_s += overhead_s + client_s
    return min(stage_s, float(costs.decode_base_s[0, 1:].min())) if decodes else stage_s


def least_stages(totals: Totals, clients: int, max_prefill_tokens: int) -> int:
    """Return the fewest prefill stages that can admit these requests (0: no token budget)."""
    by_clients = -(-totals.requests // clients)
    if max_prefill_tokens == 0:
        return by_clients
    return max(by_clients, -(-totals.counted // max_prefill_tokens))


def decode_bound(totals: Totals, least_rounds: int, costs: CostTables, alone: bool) -> float:
    """Return the least seconds of decoding in at least ``least_rounds`` rounds.

    ``alone``: no other requests share these rounds. See the module docstring for the proof.
    """
    base_s, rates = costs.decode_base_s[0, 1:], costs.rates[0]
    shared_s = float(rates.decode_per_client_kv_token_s)
    if shared_s > 0 and totals.rounds > 0:
        if not alone:
            base_s = np.minimum.accumulate(base_s[::-1])[::-1]
        run_s = _shared_cache_bound(totals, least_rounds, base_s, shared_s)
    else:
        sizes = np.arange(1.0, len(base_s) + 1.0)
        run_s = cover(base_s, sizes, float(totals.rounds), least_rounds, exact=alone)
    return run_s + float(rates.decode_per_kv_token_s) * totals.held


def _shared_cache_bound(
    totals: Totals, least_rounds: int, base_s: NDArray[np.float64], shared_s: float
) -> float:
    """Return the least seconds of rounds that cost b(n) + e·n·kv each, with b(n) in ``base_s`` (J,).

    Rounding is taken off: of sums of v's own, and relative.
    """
    least, most, total = float(totals.shortest + 1), float(totals.longest), float(totals.rounds)
    full = 0.0
    if most > least:
        full = min(max((totals.held - total * least) / (most - least), 0.0), total)
    prices = _shared_cache_prices(base_s.tobytes(), shared_s, least, most)
    seconds = prices @ np.array([float(least_rounds), total - full, full])
    seconds -= 8.0 * np.finfo(float).eps * prices[:, 0] * (least_rounds + total)
    return float(seconds.max()) * (1.0 - _TOLERANCE)


@lru_cache(maxsize=64)
def _shared_cache_prices(
    base_bytes: bytes, shared_s: float, least: float, most: float
) -> NDArray[np.float64]:
    """Return v, g_v(``least``) and g_v(``most``) of every v that is tried, shape (tried, 3)."""
    base_s = np.frombuffer(base_bytes)
    sizes = np.arange(1.0, len(base_s) + 1.0)
    shares = np.ascontiguousarray(1.0 / sizes[::-1])
    tried, token_s = [np.zeros(1)], []
    for held in (least, most):
        token_s.append(base_s / sizes + shared_s * held * sizes)
        own_s = np.ascontiguousarray(token_s[-1][::-1])
        hull = lower_hull(shares, own_s)
        tried.append(np.diff(own_s[hull]) / np.diff(shares[hull]))
    v = np.maximum(np.concatenate(tried), 0.0)
    least_s = [np.array([(own_s - price / sizes).min() for price in v]) for own_s in token_s]
    return np.stack([v, *least_s], axis=1)


def cached_token_seconds(costs: CostTables) -> float:
    """Return the least that a cached token adds to a round: where some are cached, somebody decodes."""
    rates = costs.rates[0]
    return float(rates.decode_per_kv_token_s) + float(rates.decode_per_client_kv_token_s)


def prefill_bound(totals: Totals, stages: int, costs: CostTables) -> float:
    """Return the least seconds of prefilling these prompts in at least ``stages`` stages."""
    tokens = float(totals.prompts)
    _, base_s, token_s, square_s, floor_s, overhead_s, client_s, packed_s, _ = costs.rates[0].item()
    if costs.prefill_level_tokens.shape[1] > 0:
        capacities = costs.prefill_level_tokens[0].astype(float)
        work_s = cover(costs.prefill_level_s[0], capacities, tokens, stages, exact=False)
    else:
        if packed_s > 0:
            packed = _packed_bound(tokens, totals.squares, stages, costs.rates[0])
            return packed + totals.requests * client_s
        line_s = stages * base_s + token_s * tokens + square_s * totals.squares
        work_s = max(stages * floor_s, line_s)
    return float(work_s + (stages * overhead_s + totals.requests * client_s))


def _packed_bound(tokens: float, squares: float, stages: int, rates: Any) -> float:
    """Return the least seconds of at least ``stages`` stages that cost c·T² each, without their requests.

    For S stages they are S·overhead + max(S·floor, S·base + a·ΣT + q·Σp² + c·max(Σp², (ΣT)²/S)). This is
    convex in S, so that its least lies at the fewest stages, or beside where the last term is as dear as a
    stage or one side of a maximum takes over.
    """
    base_s, floor_s = float(rates.prefill_base_s), float(rates.prefill_floor_s)
    overhead_s = float(rates.overhead_base_s)
    squared_s = float(rates.prefill_per_batch_token_squared_s)
    line_s = float(rates.prefill_per_token_s) * tokens
    line_s += float(rates.prefill_per_token_squared_s) * squares
    packed_s = squared_s * tokens**2
    turns = [float(stages), tokens**2 / squares]
    if base_s + overhead_s > 0:
        turns.append(math.sqrt(packed_s / (base_s + overhead_s)))
    if floor_s > base_s:
        root = math.sqrt(line_s**2 + 4.0 * (floor_s - base_s) * packed_s)
        turns.append((line_s + root) / (2.0 * (floor_s - base_s)))

    def seconds(count: int) -> float:
        together_s = max(squared_s * squares, packed_s / count)
        line = count * base_s + line_s + together_s
        return count * overhead_s + max(count * floor_s, line)

    counts = {near(turn) for turn in turns if turn >= stages for near in (math.floor, math.ceil)}
    return min(seconds(count) for count in counts if count >= stages) * (1.0 - _TOLERANCE)


def cover(
    cost: NDArray[np.float64],
    size: NDArray[np.float64],
    total: float,
    count: float,
    *,
    exact: bool,
) -> float:
    """Return min cost·x subject to size·x = total (≥ unless ``exact``), Σx ≥ count, x ≥ 0.

    By duality the largest total·u + count·v over size·u + v ≤ cost, v ≥ 0 (and u ≥ 0 unless
    ``exact``). The vertices of that set depend on the costs alone and are computed once.
    """
    if total == 0:
        return float(count * cost.min())
    return cover_by(dual_vertices(cost, size, exact=exact), total, count)


def cover_by(vertices: NDArray[np.float64], total: float, count: float) -> float:
    """Return the same by the vertices of the dual; ``total`` must be > 0."""
    return float((vertices @ np.array([total, float(count)])).max())


def dual_vertices(
    cost: NDArray[np.float64], size: NDArray[np.float64], *, exact: bool
) -> NDArray[np.float64]:
    """Return the vertices (u, v) of the dual, shape (vertices, 2).

    A vertex is the slope and intercept of an edge of the lower convex hull of the points (size, cost),
    if feasible, or a corner on the axis v = 0 or u = 0. An edge that rounding puts above a point is
    lowered, so the bounds hold for sums in floats, up to a relative 10⁻¹³.

    Parameters
    ----------
    cost
        Seconds, > 0, shape (points,).
    size
        Strictly ascending whole numbers, 1 … 2⁵³, shape (points,).
    exact
        u may be negative.
    """
    return _dual_vertices(cost.tobytes(), size.tobytes(), exact)


@lru_cache(maxsize=64)
def _dual_vertices(cost_bytes: bytes, size_bytes: bytes, exact: bool) -> NDArray[np.float64]:
    cost, size = np.frombuffer(cost_bytes), np.frombuffer(size_bytes)
    hull = lower_hull(size, cost)
    slopes = np.diff(cost[hull]) / np.diff(size[hull])
    edges = np.stack([slopes, cost[hull[:-1]] - slopes * size[hull[:-1]]], axis=1)
    for edge in edges:
        edge[1] -= _excess(edge[0], edge[1], cost[hull], size[hull])
    allowed = (edges[:, 1] >= 0) & (exact | (edges[:, 0] >= 0))
    corners = [[(cost / size).min(), 0.0]]
    if not exact:
        corners.append([0.0, cost.min()])
    return np.vstack([edges[allowed], corners])


def _excess(u: float, v: float, cost: NDArray[np.float64], size: NDArray[np.float64]) -> float:
    """Return by how much the line v + u · size must be lowered to be feasible; mostly 0.

    ``cost`` and ``size`` are the hull's corners: no point between them lies farther below the line.
    """
    rounding = 4.0 * np.finfo(float).eps * (size * abs(u) + abs(v) + cost)
    above = size * u + v - cost + rounding
    return float(above.max()) if np.any(above > _TOLERANCE * cost) else 0.0


@allocating_kernel
def lower_hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of the lower convex hull of points whose ``x`` strictly ascends."""
    hull = np.empty(x.size, np.int64)
    parts = np.empty(6)
    count = 0
    for place in range(x.size):
        while count >= 2:
            a, b = hull[count - 2], hull[count - 1]
            # Drop b if it lies on or above the line from a to this point.
            left, right = x[b] - x[a], x[place] - x[b]
            if _weighted_sum_sign(y[a], -right, y[b], left + right, y[place], -left, parts) < 0:
                break
            count -= 1
        hull[count] = place
        count += 1
    return hull[:count]


@kernel
def _weighted_sum_sign(
    a: float, u: float, b: float, v: float, c: float, w: float, parts: NDArray[np.float64]
) -> float:
    """Return a number with the exact sign of a·u + b·v + c·w; ``parts`` (6,) is scratch.

    On a nearly straight line of a million points rounded sums pick wrong corners, and slopes between
    wrong corners prove false bounds. If rounding could change the sign, each product is written as the
    sum of two floats, and the six are added without loss (Shewchuk 1997, "Adaptive precision
    floating-point arithmetic and fast robust geometric predicates").
    """
    first, second, third = a * u, b * v, c * w
    total = first + second + third
    if abs(total) > 1e-15 * (abs(first) + abs(second) + abs(third)):
        return total
    parts[0], parts[1] = _product_error(a, u, first), first
    parts[2], parts[3] = _product_error(b, v, second), second
    parts[4], parts[5] = _product_error(c, w, third), third
    for k in range(1, 6):
        carry = parts[k]
        for i in range(k):
            total = carry + parts[i]
            added = total - carry
            parts[i] = (carry - (total - added)) + (parts[i] - added)
            carry = total
        parts[k] = carry
    for k in range(5, -1, -1):
        if parts[k] != 0.0:
            return parts[k]
    return 0.0


@kernel
def _product_error(a: float, b: float, product: float) -> float:
    """Return the exact rounding error a·b − ``product`` of a rounded product (Dekker)."""
    a_high, b_high = _high_half(a), _high_half(b)
    a_low, b_low = a - a_high, b - b_high
    rest = product - a_high * b_high - a_low * b_high - a_high * b_low
    return a_low * b_low - rest


@kernel
def _high_half(a: float) -> float:
    """Return the upper 26 bits of a float."""
    scaled = a * 134217729.0  # 2²⁷ + 1
    return scaled - (scaled - a)
