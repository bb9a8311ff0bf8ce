"""A proven lower bound on the makespan for any cluster: replicas, memory, mixed stages.

One replica without a memory limit and without mixed stages has the sharper bound of ``batch``.

**Work.** Let W be the least seconds of all stages if the fastest replica ran them all, with as many
clients as the largest replica has. Replica r takes s_r ≥ 1 times as long as the fastest for the same
stage. In a makespan M the replicas run stages of Σ M / s_r of the fastest one's seconds, so
M ≥ W / Σ (1/s_r). W is a decode part and a prefill part, each at least its linear program in ``batch``.
Rounds are counted over all replicas: at least ⌈D/J⌉, and where memory holds K tokens, at least ⌈g/K⌉
with the *KV area* g = Σ (d_i·p_i + d_i(d_i + 1)/2), the tokens held in all rounds.

**One request.** It runs at one replica at a time: its prefill and its rounds, each at least as long as
the shortest round of the fastest replica.

**Preemption**, or a running request that moves to be computed again. A recomputation emits one token, so
a decode round is served one token less; it computes the prompt and a token more. The work above holds
where that never pays: (a − c − v/K)·(p + 1) ≥ u for the shortest prompt p, a seconds per prompt token, c per
cached token, v the shortest round and u the least seconds per token of a full round; v/K is 0 where some
memory is without limit. Where it might pay, prefills alone are counted.

**Mixed stages.** A pass of n decoding clients and T prompt tokens takes at least the decode line at n, and
at least a·T; attention adds to both. So W is the larger of the two lines, plus attention; in stages that
are the ``sum`` of two parts it is the sum of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bounds.batch import (
    LowerBound,
    cover,
    least_stages,
    lower_bound,
    prefill_bound,
    refuse_standstill,
    release_times,
    tokens_held,
)
from servegym.envs.machine.costs import CostTables, costs_of
from servegym.envs.machine.layout import Layout
from servegym.envs.vocabulary import MOVE_COPY, ROLE_DECODE, ROLE_PREFILL
from servegym.envs.workload.requests import Requests


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
    recomputes = any(layout.kv_capacity_tokens) or moves_again
    if len(layout.clients) == 1 and not limited and layout.chunk_tokens == 0:
        return lower_bound(requests, layout.clients[0], costs, max_prefill_tokens)
    fastest = int(np.argmin(costs.decode_base_s[:, 1]))
    strength = float((costs.decode_base_s[fastest, 1] / costs.decode_base_s[:, 1]).sum())
    tables = costs_of(costs, fastest)
    served = np.ones(len(requests), np.bool_)
    most_tokens = 0  # of the largest memory, if none is without limit
    if limited:
        most_tokens = _whole_blocks(layout, layout.kv_capacity_tokens)
        served = requests.prompt_tokens + requests.output_tokens <= most_tokens
    if any(layout.roles):  # a request goes through a replica for its prompt and one for its rounds
        for role in (ROLE_PREFILL, ROLE_DECODE):
            sizes = zip(layout.roles, layout.kv_capacity_tokens, strict=True)
            own = [tokens for its_role, tokens in sizes if its_role != role]
            if all(own):
                most = _whole_blocks(layout, own)
                served &= requests.prompt_tokens + requests.output_tokens <= most
    if not served.any():
        return LowerBound(0.0, 0.0, 0.0, 0.0, 0, 0)
    bounds = [_longest_alone(requests, served, tables, layout, recomputes=recomputes)]
    for release in release_times(requests.arrival_s[served]):
        counted = served & (requests.arrival_s >= release)
        prompts, rounds = requests.prompt_tokens[counted], requests.decode_rounds[counted]
        parts = _work(
            prompts, rounds, layout, tables, max_prefill_tokens, most_tokens, recomputes=recomputes
        )
        decode_s, prefill_s = parts[0] / strength, parts[1] / strength
        seconds = float(release) + decode_s + prefill_s
        bounds.append(LowerBound(seconds, float(release), decode_s, prefill_s, parts[2], parts[3]))
    best = max(bounds, key=lambda bound: bound.seconds)
    refuse_standstill(best.seconds, requests, tables)
    return best


def _whole_blocks(layout: Layout, tokens: Sequence[int]) -> int:
    """Return the tokens in whole blocks of the largest of several limited memories."""
    return max(tokens) // layout.block_tokens * layout.block_tokens


def _work(
    prompts: NDArray[np.int64],
    rounds: NDArray[np.int64],
    layout: Layout,
    tables: CostTables,
    max_prefill_tokens: int,
    most_tokens: int,
    *,
    recomputes: bool,
) -> tuple[float, float, int, int]:
    """Return the least seconds of decoding and of prefilling, the fewest rounds and stages."""
    rates, clients = tables.rates[0], max(layout.clients)
    p = prompts.astype(float)
    area = float(tokens_held(prompts, rounds).sum())
    total = float(rounds.astype(float).sum())
    cached_s = float(rates.decode_per_kv_token_s)
    token_s = float(rates.prefill_per_token_s)
    base_s = tables.decode_base_s[0, 1:]
    if layout.chunk_tokens > 0:
        # A pass of n decoding clients may have any more tokens besides: the least time of those.
        lines = np.minimum.accumulate(tables.pass_base_s[0, 1:][::-1])[::-1]
        most = min(len(base_s), len(lines))
        base_s = np.append(np.minimum(base_s[:most], lines[:most]), base_s[most:])
    least_rounds = -(-int(rounds.sum()) // clients)
    if most_tokens > 0:
        least_rounds = max(least_rounds, int(np.ceil(area / most_tokens)))
    if recomputes:
        sizes = np.arange(1.0, len(base_s) + 1.0)
        spared_s = token_s - cached_s
        if most_tokens > 0:
            spared_s -= float(base_s.min()) / most_tokens
        if spared_s * (float(p.min()) + 1.0) < float((base_s / sizes).min()):
            total, area, least_rounds = 0.0, 0.0, 0
    run_s = 0.0
    if total > 0:
        sizes = np.arange(1.0, len(base_s) + 1.0)
        run_s = cover(base_s, sizes, total, least_rounds, exact=False)
    decode_s = run_s + cached_s * area
    if layout.chunk_tokens == 0:
        stages = least_stages(prompts, clients, max_prefill_tokens)
        return decode_s, prefill_bound(prompts, stages, tables), least_rounds, stages
    squares_s = float(rates.prefill_per_token_squared_s) * float((p**2).sum())
    line_s = token_s * float(p.sum())
    if not layout.one_pass:
        return decode_s, line_s + squares_s, least_rounds, 0
    if line_s > run_s:
        return cached_s * area, line_s + squares_s, least_rounds, 0
    return decode_s, squares_s, least_rounds, 0


def _longest_alone(
    requests: Requests,
    served: NDArray[np.bool_],
    tables: CostTables,
    layout: Layout,
    *,
    recomputes: bool,
) -> LowerBound:
    """Return the bound that the latest request to end proves by itself on the fastest replica."""
    rates = tables.rates[0]
    p = requests.prompt_tokens[served].astype(float)
    d = requests.decode_rounds[served].astype(float)
    line_s = rates.prefill_per_token_s * p
    if layout.chunk_tokens == 0 and tables.prefill_level_s.shape[1] == 0:
        line_s = line_s + rates.prefill_base_s
    prefill_s = line_s + rates.prefill_per_token_squared_s * p**2
    round_s = float(tables.decode_base_s[0, 1:].min())
    if layout.chunk_tokens > 0:
        round_s = min(round_s, float(tables.pass_base_s[0, 1:].min()))
    cached_s = float(rates.decode_per_kv_token_s)
    held = tokens_held(requests.prompt_tokens[served], requests.decode_rounds[served])
    decode_s = d * round_s + cached_s * held
    if recomputes:
        decode_s = np.zeros_like(decode_s)  # its recomputations might emit its tokens
    ends_s = requests.arrival_s[served] + prefill_s + decode_s
    last = int(np.argmax(ends_s))
    return LowerBound(
        float(ends_s[last]),
        float(requests.arrival_s[served][last]),
        float(decode_s[last]),
        float(prefill_s[last]),
        int(d[last]),
        1,
    )
