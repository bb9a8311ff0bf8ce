"""How long a stage takes, exactly as CONTRIBUTING's cost formulas say; mixed stages as CLUSTER.md says."""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables


@kernel
def decode_seconds(
    costs: CostTables, r: int, active: int, cached_tokens: int, rounds: int
) -> float:
    """Return the time of ``rounds`` successive rounds of ``active`` clients, none finishing within.

    The k-th round (k = 0, 1, …) starts with ``cached_tokens`` + k · ``active`` tokens, so the sum is
    arithmetic. Floats, because a hundred thousand of the longest requests would overflow 64-bit integers.
    Who is active stays so: in these rounds a cached token costs the same.
    """
    n = float(rounds)
    cached = n * cached_tokens + active * (n * (n - 1.0) / 2.0)
    return rounds * costs.decode_base_s[r, active] + kv_token_seconds(costs, r, active) * cached


@kernel
def kv_token_seconds(costs: CostTables, r: int, active: int) -> float:
    """Return what a cached token adds to a decode round of ``active`` clients."""
    rates = costs.rates[r]
    return rates.decode_per_kv_token_s + rates.decode_per_client_kv_token_s * active


@kernel
def prefill_seconds(costs: CostTables, r: int, tokens: int, squares: float, requests: int) -> float:
    """Return the time of a prefill stage of ``tokens`` prompt tokens (Σp² ``squares``)."""
    rates = costs.rates[r]
    if costs.prefill_level_tokens.shape[1] > 0:
        seconds = _levelled_seconds(costs, r, tokens)
    else:
        line = (
            rates.prefill_base_s
            + rates.prefill_per_token_s * tokens
            + rates.prefill_per_token_squared_s * squares
            + rates.prefill_per_batch_token_squared_s * (float(tokens) * tokens)
        )
        seconds = max(rates.prefill_floor_s, line)
    return seconds + rates.overhead_base_s + rates.overhead_per_client_s * requests


@kernel
def _levelled_seconds(costs: CostTables, r: int, tokens: int) -> float:
    levels = costs.prefill_level_tokens.shape[1]
    top = costs.prefill_level_tokens[r, levels - 1]
    whole = tokens // top
    rest = tokens - whole * top
    seconds = whole * costs.prefill_level_s[r, levels - 1]
    if rest > 0:
        level = np.searchsorted(costs.prefill_level_tokens[r], rest)
        seconds += costs.prefill_level_s[r, level]
    return seconds


@kernel
def one_pass_seconds(
    costs: CostTables, r: int, active: int, cached_tokens: int, tokens: int, squares: float
) -> float:
    """Return the time of one pass of ``active`` ≥ 1 decoding clients and ``tokens`` ≥ 1 of prompts.

    The longer of the decode line and the prefill line at all the pass's tokens, plus attention over the
    cached tokens and over the chunks, Σ (end² − start²) is ``squares``, and over all tokens of prompts as
    one row. The engine's overhead is not in it.
    """
    rates = costs.rates[r]
    everything = active + tokens
    if costs.prefill_level_tokens.shape[1] > 0:
        line = _levelled_seconds(costs, r, everything)
    else:
        line = rates.prefill_base_s + rates.prefill_per_token_s * everything
    seconds = max(rates.prefill_floor_s, line, _decode_line(costs, r, everything))
    seconds += kv_token_seconds(costs, r, active) * cached_tokens
    seconds += rates.prefill_per_token_squared_s * squares
    return seconds + rates.prefill_per_batch_token_squared_s * (float(tokens) * tokens)


@kernel
def _decode_line(costs: CostTables, r: int, tokens: int) -> float:
    """Return the time of a pass of so many tokens as a decode round has it, without its cache.

    Beyond the table, in the direction of its last two entries.
    """
    last = costs.pass_base_s.shape[1] - 1
    if tokens <= last:
        return costs.pass_base_s[r, tokens]
    slope = costs.pass_base_s[r, last] - costs.pass_base_s[r, last - 1]
    return costs.pass_base_s[r, last] + slope * (tokens - last)
