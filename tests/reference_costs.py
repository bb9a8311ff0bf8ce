"""What a stage costs, written anew: every formula of the slow reference."""

from __future__ import annotations

from collections.abc import Sequence

from servegym.envs.machine.costs import AffinePrefill, StageCosts, TableDecode


def decode_round_s(costs: StageCosts, active: int, cached_tokens: int) -> float:
    """Seconds of one decode round of `active` clients that starts with `cached_tokens`."""
    decode, overhead = costs.decode, costs.engine_overhead
    if isinstance(decode, TableDecode):
        seconds = interpolated(active, decode.batch, decode.seconds)
    else:
        seconds = decode.base + decode.per_client * active
    seconds += decode.per_kv_token * cached_tokens
    seconds += decode.per_client_kv_token * active * cached_tokens
    return seconds + overhead.base + overhead.per_client * active


def interpolated(x: int, xs: Sequence[int], ys: Sequence[float]) -> float:
    """The straight line between the two neighbours of `x`; beyond the ends, the end."""
    if x <= xs[0]:
        return ys[0]
    for place in range(1, len(xs)):
        if x <= xs[place]:
            share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
            return ys[place - 1] + share * (ys[place] - ys[place - 1])
    return ys[-1]


def prefill_stage_s(costs: StageCosts, prompts: Sequence[int]) -> float:
    """Seconds of one prefill stage that admits requests with these prompt lengths."""
    return prefill_s(costs, sum(prompts), sum(p * p for p in prompts), len(prompts))


def prefill_s(costs: StageCosts, tokens: int, squares: float, requests: int) -> float:
    """Seconds of a prefill stage with so many prompt tokens, Σp² and requests."""
    prefill, overhead = costs.prefill, costs.engine_overhead
    if isinstance(prefill, AffinePrefill):
        line = prefill.base + prefill.per_token * tokens + prefill.per_token_squared * squares
        line += prefill.per_batch_token_squared * float(tokens) * float(tokens)
        seconds = max(line, prefill.floor)
    else:
        seconds = 0.0
        while tokens > prefill.level_tokens[-1]:  # beyond the top level: whole top levels first
            seconds += prefill.level_seconds[-1]
            tokens -= prefill.level_tokens[-1]
        levels = zip(prefill.level_tokens, prefill.level_seconds, strict=True)
        seconds += next(cost for holds, cost in levels if tokens <= holds)
    return seconds + overhead.base + overhead.per_client * requests
