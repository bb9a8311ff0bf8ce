"""A proven lower bound on the makespan for any cluster: replicas, memory, mixed stages.

One replica without a memory limit and without mixed stages has the sharper bound of ``batch``.

**Work.** Let W be the least seconds of all stages if the fastest replica ran them all, with as many
clients as the largest replica has. Replica r takes s_r ≥ 1 times as long as the fastest for the same
stage. In a makespan M the replicas run stages of Σ M / s_r of the fastest one's seconds, so
M ≥ W / Σ (1/s_r). W is a decode part and a prefill part, each at least its linear program in ``batch``.
Rounds are counted over all replicas: at least ⌈D/J⌉, and where memory holds K tokens, at least ⌈g/K⌉
with the *KV area* g = Σ (d_i·p_i + d_i(d_i + 1)/2), the tokens held in all rounds. A term e·n·kv of a
round with n ≥ 1 clients costs at least e·kv: below, e is part of c. Where nobody is computed again and stages
are not mixed the bound of ``batch`` for it counts, if that is more.

**One request.** It runs at one replica at a time: its prefill and its rounds, each at least as long as
the shortest round of the fastest replica. No two of its tokens come in one stage. Where it may be
computed again each of them after the first takes at least the less of such a round and of computing p + 1
tokens; where stages are not mixed and it stays at one replica at least such a round, as each preemption there
is followed by one without it.

**Preemption**, or a running request that moves to be computed again; not where each memory holds the
largest requests, one for each client. Computing a request again emits one token: a decode round is served
one token less, t = p + k cached tokens less, and t tokens more are computed. Let a be the seconds per
prompt token, c per cached token, v those of the shortest round, u the least seconds per token of a full
round, s = v/K (0 where some memory is without limit), p the shortest prompt. By its dual the decode
program, *without rounding rounds up*, falls by at most u + s·t. So if (a − c − s)·(p + 1) ≥ u it never
pays, and the work holds with the line of a prefill, S·base + a·Σp, in the place of its floor and levels,
under which more tokens may be free. Else, where stages are not mixed, a token takes at least the less of u
and (a − c)·(p + 1), of a·(p + 1) without cache if a < c. Prefills alone, with floor and levels, are counted
if that is more.

**Mixed stages.** A pass of n decoding clients and T prompt tokens takes at least the decode line at n, and
at least a·T; attention adds to both. So W is the larger of the two lines, plus attention; in stages that
are the ``sum`` of two parts it is the sum of both. In one pass X tokens that are computed again may be hidden
behind decoding: then W is at least the decode line less (c + s)·X, and the other plus (a − c)·X, so at
least the mean of the two with weights in which X cancels, (a − c) to (c + s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bounds.batch import (
    LowerBound,
    cached_token_seconds,
    cover_by,
    decode_bound,
    dual_vertices,
    first_released,
    least_stages,
    lower_bound,
    prefill_bound,
    refuse_standstill,
)
from servegym.envs.bounds.totals import Totals, totals_from
from servegym.envs.jit import shared_kernel
from servegym.envs.machine.costs import CostTables, costs_of
from servegym.envs.machine.layout import Layout
from servegym.envs.vocabulary import MOVE_COPY, ROLE_DECODE, ROLE_PREFILL
from servegym.envs.workload.requests import Requests

Whole = NDArray[np.int64]
Real = NDArray[np.float64]

_ROUNDS: Final = 0
"""No token but the first is computed: each takes a round."""
_CACHED_OR_COMPUTED: Final = 1
"""Each takes a round, whose cached tokens may have been computed again instead."""
_ROUNDS_OR_COMPUTED: Final = 2
"""Each takes a round or is computed."""


def cluster_bound(
    requests: Requests, layout: Layout, costs: CostTables, max_prefill_tokens: int
) -> LowerBound:
    """Return the best bound over release times; see the module docstring for the proof.

    Requests that no replica's memory can hold are rejected and need no work.

    Raises
    ------
    ServegymError
        If the shortest stage would not advance a clock, a 64-bit float, that shows the bound.
    """
    limited = all(tokens > 0 for tokens in layout.kv_capacity_tokens)
    moves_again = layout.steals_running and layout.move != MOVE_COPY
    recomputes = moves_again or _may_preempt(requests, layout)
    if len(layout.clients) == 1 and not limited and layout.chunk_tokens == 0:
        return lower_bound(requests, layout.clients[0], costs, max_prefill_tokens)
    passes = _passes(costs, layout.chunk_tokens > 0)
    tables, strength = passes.tables, passes.strength
    most_tokens, fits = 0, _servable(layout)  # of the largest memory, if none is without limit
    if limited:
        most_tokens = _whole_blocks(layout, layout.kv_capacity_tokens)
    arrival_s, prompts = requests.arrival_s, requests.prompt_tokens
    rounds = requests.decode_rounds
    if fits is not None and (prompts + requests.output_tokens).max() > fits:
        served = prompts + requests.output_tokens <= fits
        arrival_s, prompts, rounds = arrival_s[served], prompts[served], rounds[served]
    if len(prompts) == 0:
        return LowerBound(0.0, 0.0, 0.0, 0.0, 0, 0)
    bounds = [_longest_alone(arrival_s, prompts, rounds, tables, layout, recomputes=recomputes)]
    firsts = first_released(arrival_s)
    for release_s, totals in zip(
        arrival_s[firsts].tolist(),
        totals_from(prompts, rounds, firsts, max_prefill_tokens),
        strict=True,
    ):
        parts = _work(
            totals, passes, layout, max_prefill_tokens, most_tokens, recomputes=recomputes
        )
        decode_s, prefill_s = parts[0] / strength, parts[1] / strength
        seconds = release_s + decode_s + prefill_s
        bounds.append(LowerBound(seconds, release_s, decode_s, prefill_s, parts[2], parts[3]))
    best = max(bounds, key=lambda bound: bound.seconds)
    refuse_standstill(best.seconds, requests, tables)
    return best


def _servable(layout: Layout) -> int | None:
    """Return the tokens of the largest request that is served; None: any is."""
    most = []
    if all(tokens > 0 for tokens in layout.kv_capacity_tokens):
        most.append(_whole_blocks(layout, layout.kv_capacity_tokens))
    if any(layout.roles):  # a request goes through a replica for its prompt and one for its rounds
        for role in (ROLE_PREFILL, ROLE_DECODE):
            sizes = zip(layout.roles, layout.kv_capacity_tokens, strict=True)
            own = [tokens for its_role, tokens in sizes if its_role != role]
            if all(own):
                most.append(_whole_blocks(layout, own))
    return min(most, default=None)


def _may_preempt(requests: Requests, layout: Layout) -> bool:
    """Return whether some memory might not hold the largest requests, one for each of its clients."""
    if not any(layout.kv_capacity_tokens):
        return False
    if layout.moves:  # memory may be kept for those who have left, too
        return True
    tokens = requests.prompt_tokens + requests.output_tokens + 1  # SGLang wants room for one more
    blocks = -(-tokens // layout.block_tokens)
    return any(
        0 < most < _sum_of_largest(blocks, clients) * layout.block_tokens
        for clients, most in {*zip(layout.clients, layout.kv_capacity_tokens, strict=True)}
    )


def _sum_of_largest(values: Whole, count: int) -> int:
    """Return the sum of the ``count`` largest values, of all if there are no more."""
    if count >= len(values):
        return int(values.sum())
    return int(np.partition(values, len(values) - count)[len(values) - count :].sum())


def _whole_blocks(layout: Layout, tokens: Sequence[int]) -> int:
    """Return the tokens in whole blocks of the largest of several limited memories."""
    return max(tokens) // layout.block_tokens * layout.block_tokens


class _Passes(NamedTuple):
    """What bounds take of a cluster's costs: those of the fastest replica."""

    tables: CostTables
    stage_s: float  # of a prefill stage, without its tokens
    token_s: float  # of a prompt token
    square_s: float  # of a prompt's tokens squared
    cached_s: float  # the least of a cached token in a round
    shares_cache: bool  # whether a cached token costs more the more clients decode
    strength: float  # of all replicas together, the fastest being 1
    shortest_s: float  # pass
    full_s: float  # the least seconds of a pass per decoding client
    vertices: Real  # of the dual of covering tokens by passes


@lru_cache(maxsize=16)  # tables are compared by identity, and nobody writes to them
def _passes(costs: CostTables, chunked: bool) -> _Passes:
    first_s = costs.decode_base_s[:, 1]
    fastest = int(np.argmin(first_s))
    strength = float((first_s[fastest] / first_s).sum())
    tables = costs_of(costs, fastest)
    base_s = tables.decode_base_s[0, 1:]
    if chunked:
        # A pass of n decoding clients may have any more tokens besides: the least time of those.
        lines = np.minimum.accumulate(tables.pass_base_s[0, 1:][::-1])[::-1]
        most = min(len(base_s), len(lines))
        base_s = np.append(np.minimum(base_s[:most], lines[:most]), base_s[most:])
    sizes = np.arange(1.0, len(base_s) + 1.0)
    vertices = dual_vertices(base_s, sizes, exact=False)
    rates = tables.rates[0]
    return _Passes(
        tables,
        float(rates.prefill_base_s),
        float(rates.prefill_per_token_s),
        float(rates.prefill_per_token_squared_s),
        cached_token_seconds(tables),
        bool(rates.decode_per_client_kv_token_s > 0),
        strength,
        float(base_s.min()),
        float((base_s / sizes).min()),
        vertices,
    )


def _work(
    totals: Totals,
    passes: _Passes,
    layout: Layout,
    max_prefill_tokens: int,
    most_tokens: int,
    *,
    recomputes: bool,
) -> tuple[float, float, int, int]:
    """Return the least seconds of decoding and of prefilling, the fewest rounds and stages."""
    tables, clients = passes.tables, max(layout.clients)
    token_s, cached_s = passes.token_s, passes.cached_s
    area, total = totals.held, float(totals.rounds)
    stages = 0
    if layout.chunk_tokens == 0:
        stages = least_stages(totals, clients, max_prefill_tokens)
    squares_s = passes.square_s * totals.squares
    line_s = token_s * totals.prompts
    full_rounds = area / most_tokens if most_tokens > 0 else 0.0
    least_rounds = max(-(-totals.rounds // clients), math.ceil(full_rounds))
    if not recomputes:
        run_s = cover_by(passes.vertices, total, least_rounds) if total > 0 else 0.0
        if stages > 0:
            prefill_s = prefill_bound(totals, stages, tables)
            decode_s = run_s + cached_s * area
            if passes.shares_cache:
                decode_s = max(decode_s, decode_bound(totals, least_rounds, tables, alone=False))
            return decode_s, prefill_s, least_rounds, stages
        share = 1.0 if run_s >= line_s else 0.0
    else:
        full_s = passes.full_s
        saved_s = passes.shortest_s / most_tokens if most_tokens > 0 else 0.0
        spared_s = token_s - cached_s - saved_s
        if spared_s * (float(totals.shortest) + 1.0) >= full_s:
            run_s = cover_by(passes.vertices, total, full_rounds) if total > 0 else 0.0
        elif stages > 0:  # it might pay: a token takes whichever takes less
            if token_s < cached_s:
                spared_s, area = token_s, 0.0
            else:
                spared_s = token_s - cached_s
            run_s = total * min(full_s, spared_s * (float(totals.shortest) + 1.0))
        else:
            run_s, area = 0.0, 0.0
        least_rounds = 0
        if stages > 0:
            decode_s, alone_s = run_s + cached_s * area, prefill_bound(totals, stages, tables)
            if tables.prefill_level_s.shape[1] == 0:
                line_s += stages * passes.stage_s
            if decode_s + line_s + squares_s > alone_s:
                return decode_s, line_s + squares_s, 0, stages
            return 0.0, alone_s, 0, stages
        share = 0.0
        if run_s > line_s:
            share = (token_s - cached_s) / (token_s + saved_s)
    if not layout.one_pass:
        return run_s + cached_s * area, line_s + squares_s, least_rounds, 0
    return share * run_s + cached_s * area, (1.0 - share) * line_s + squares_s, least_rounds, 0


def _longest_alone(
    arrival_s: Real,
    prompts: Whole,
    rounds: Whole,
    tables: CostTables,
    layout: Layout,
    *,
    recomputes: bool,
) -> LowerBound:
    """Return the bound that the latest request to end proves by itself on the fastest replica."""
    round_s = float(tables.decode_base_s[0, 1:].min())
    if layout.chunk_tokens > 0:
        round_s = min(round_s, float(tables.pass_base_s[0, 1:].min()))
    stays = not layout.moves and (len(layout.clients) == 1 or not layout.pool)
    mode = _ROUNDS
    if recomputes:
        mode = _CACHED_OR_COMPUTED if layout.chunk_tokens == 0 and stays else _ROUNDS_OR_COMPUTED
    _, base_s, token_s, square_s, floor_s, *_ = tables.rates[0].item()
    cached_s = cached_token_seconds(tables)
    if tables.prefill_level_s.shape[1] > 0:
        base_s = 0.0
    last, end_s, decode_s, prefill_s = _latest_end(
        np.ascontiguousarray(arrival_s),
        np.ascontiguousarray(prompts),
        np.ascontiguousarray(rounds),
        mode,
        round_s,
        cached_s,
        base_s,
        token_s,
        square_s,
        floor_s,
    )
    release_s, most = float(arrival_s[last]), int(rounds[last])
    return LowerBound(float(end_s), release_s, float(decode_s), float(prefill_s), most, 1)


@shared_kernel
def _latest_end(
    arrival_s: Real,
    prompts: Whole,
    rounds: Whole,
    mode: int,
    round_s: float,
    cached_s: float,
    base_s: float,
    token_s: float,
    square_s: float,
    floor_s: float,
) -> tuple[int, float, float, float]:
    """Return which request ends last alone, when, and its seconds of decoding and of its prefill.

    Where its tokens may be computed, token k + 1 takes a round with p + k cached tokens, or stages that
    compute as many: ``line_s`` is the least that these cost. Where a token computed costs more than one
    cached, so does what they cost beyond the cache of the round.
    """
    kept_s = min(cached_s, token_s) if mode == _CACHED_OR_COMPUTED else cached_s
    last, latest_s, latest_decode_s, latest_prefill_s = 0, -np.inf, 0.0, 0.0
    for i in range(prompts.size):
        p, d = float(prompts[i]), float(rounds[i])
        prefill_s = token_s * p + base_s + square_s * (p * p)
        held = d * p + d * (d + 1.0) / 2.0
        decode_s = d * round_s + kept_s * held
        if mode == _ROUNDS_OR_COMPUTED:
            line_s = token_s * (p + 1.0) + square_s * ((p + 1.0) * (p + 1.0)) + base_s
            decode_s = d * min(round_s, max(line_s, floor_s))
            if token_s >= cached_s:
                beyond_s = min(round_s, line_s - cached_s * (p + 1.0))
                decode_s = max(decode_s, cached_s * held + d * beyond_s)
        end_s = arrival_s[i] + prefill_s + decode_s
        if end_s > latest_s:
            last, latest_s = i, end_s
            latest_decode_s, latest_prefill_s = decode_s, prefill_s
    return last, latest_s, latest_decode_s, latest_prefill_s
