"""Metrics of an episode, from the simulator's records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.process.measured import Columns, Counts, columns_of, weigh_queue
from servegym.envs.process.service import NAN, has_met, jain_index
from servegym.envs.simulator.state import REJECTED, SHED, State


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """Per-request records of one episode; NaN or −1 for events that have not happened."""

    arrival_s: NDArray[np.float64]  # (requests,)
    admitted_s: NDArray[np.float64]  # (requests,) start of the prefill stage
    first_token_s: NDArray[np.float64]  # (requests,) end of the prefill stage
    finished_s: NDArray[np.float64]  # (requests,)
    client: NDArray[np.int32]  # (requests,)
    prompt_tokens: NDArray[np.int32]  # (requests,)
    decode_rounds: NDArray[np.int32]  # (requests,) output tokens − 1
    replica: NDArray[np.int16]  # (requests,) where it ran last
    preemptions: NDArray[np.int16]  # (requests,)
    recomputed_tokens: NDArray[np.int32]  # (requests,) prefill tokens beyond its prompt
    rejected: NDArray[np.bool_]  # (requests,) larger than the memory of any replica, or shed
    moves: NDArray[np.int16]  # (requests,) between replicas
    met_slo: NDArray[np.bool_]  # (requests,) finished within the limits of ``[slo]``
    worst_gap_s: NDArray[np.float64]  # (requests,) between two of its tokens, of the finished;
    # NaN without a second token, and where the task does not note it
    arrived: NDArray[np.bool_]  # (requests,) by the present time


def records(state: State, e: int) -> EpisodeLog:
    """Copy the per-request records of environment ``e``."""
    episode, cluster = np.asarray(state.episodes)[e], state.cluster
    n = int(episode["requests"])
    columns = {
        name: array[e, :n][name]
        for array in (np.asarray(state.requests), np.asarray(state.times))  # faster than recarrays
        for name in array.dtype.fields or ()
    }
    columns["recomputed_tokens"] = np.maximum(
        columns["prefilled_tokens"] - columns["prompt_tokens"], 0
    )
    columns["rejected"] = (columns["phase"] == REJECTED) | (columns["phase"] == SHED)
    first_s, finished_s = columns["first_token_s"], columns["finished_s"]
    limits = (cluster.slo_ttft_s, cluster.slo_tpot_s)
    if state.limits.shape[1] > 0:
        limits = (state.limits[e, :n, 0], state.limits[e, :n, 1])
    columns["met_slo"] = has_met(
        first_s - columns["arrival_s"],
        finished_s - first_s,
        columns["decode_rounds"],
        limits,
    )
    columns["arrived"] = np.arange(n) < episode["routed"]
    columns["worst_gap_s"] = np.full(n, NAN)
    if episode["keeps_gaps"]:
        noted = np.isfinite(finished_s) & (columns["decode_rounds"] > 0)
        columns["worst_gap_s"][noted] = np.asarray(state.carried)[e, :n]["worst_gap_s"][noted]
    return EpisodeLog(*(np.array(columns[item.name]) for item in fields(EpisodeLog)))


METRICS: Final = (
    "requests",
    "makespan_s",
    "lower_bound_s",
    "gap",
    "client_utilization",
    "decode_utilization",
    "decode_rounds",
    "prefill_stages",
    "prefill_s",
    "output_tokens_per_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "decisions",
    "unfinished_requests",
    "replicas",
    "mixed_stages",
    "preemptions",
    "recomputed_tokens",
    "rejected",
    "moves",
    "e2e_p50_s",
    "e2e_p99_s",
    "goodput_per_s",
    "slo_attainment",
    "gap_between_tokens_p50_s",
    "gap_between_tokens_p99_s",
    "e2e_mean_s",
    "jain_fairness",
    "peak_queue",
    "idle_wait_share",
    "preempted_slowdown",
    "recompute_tax",
    "memory_overrun_blocks",
    "shed",
)
"""Names of the metrics of an episode, in the order of the result tables."""

METRIC_DEFAULTS: Final[Mapping[str, float]] = {
    name: float("nan")
    for name in METRICS
    if name not in ("requests", "makespan_s", "lower_bound_s", "gap")
} | {
    "unfinished_requests": 0,
    "replicas": 1,
    "mixed_stages": 0,
    "preemptions": 0,
    "recomputed_tokens": 0,
    "rejected": 0,
    "moves": 0,
    "shed": 0,
}
"""What a metric is in a table of an earlier version, which lacks its column: NaN, not measured.

The first tables were of episodes that had all been played to the end, on one replica without a limit
of memory. No table lacks the four metrics that are left out here.
"""


def episode_metrics(state: State, e: int) -> dict[str, float]:
    """Return the metrics of the episode in environment ``e``, which may have been cut short.

    ``unfinished_requests`` counts the requests that had not finished at the end, less those that were
    ``rejected`` as larger than the memory of any replica and those ``shed`` as too late. If there are any,
    ``makespan_s`` and ``gap`` are NaN, and every other metric covers the simulated part. The makespan is
    that of the requests that finished, 0 if all were rejected. Where requests were shed there is no gap, as
    the lower bound is that of all.

    ``client_utilization`` is Σ_j (time client j holds a request) / (J · makespan), a preempted request
    counted from its first admission on, and ``decode_utilization`` Σ_rounds (n/J · round seconds) /
    makespan, on average over replicas. Time to first token and end to end (``e2e``) count from arrival;
    time per output token is over the tokens after the first (NaN if no request has any).

    ``slo_attainment`` is the share of the requests that have arrived which finished within the limits of
    ``[slo]``: a rejected request, one that was shed and one that was cut short have not met them.
    ``goodput_per_s`` is their number a second. Without limits each finished request counts.
    ``gap_between_tokens`` is each finished request's worst gap between two tokens; NaN where the task does
    not note it. ``jain_fairness`` is Jain's index of output tokens a second from arrival on, 0 for a request
    that has not finished. ``peak_queue``: the most requests that waited for their first admission at once.
    Rejected ones and those that were shed are left out of both. ``moves`` counts each move between replicas
    that began, also of a request that is shed later: its time on the link is spent all the same.

    Four tell of failures. ``idle_wait_share``: ∫ min(idle clients, waiting requests) dt over all client-time,
    in all replicas together. ``preempted_slowdown``: mean seconds per output token from arrival on of the
    finished requests that were preempted, over those of the others. ``recompute_tax``: tokens computed again
    over all computed tokens, those of prefills and of decode rounds. ``memory_overrun_blocks``: most blocks
    beyond a replica's memory; always 0.
    """
    counts, columns = columns_of(state, e)
    figures = _counted(state, e, counts)
    figures |= _used(state, e, counts, columns)
    figures |= _felt(columns)  # last: it sorts the columns
    figures["preempted_slowdown"] = _preempted_slowdown(columns)
    return {name: figures[name] for name in METRICS}


def _counted(state: State, e: int, counts: Counts) -> dict[str, float]:
    """Return what is counted, and how the whole episode ended."""
    episode, replicas = np.asarray(state.episodes)[e], np.asarray(state.replicas)[e]
    total, rejected, shed = (int(episode[name]) for name in ("requests", "rejected", "shed"))
    unfinished, bound_s = int(total - episode["finished"] - rejected), float(episode["bound_s"])
    makespan_s = NAN if unfinished else _elapsed_s(state, e, counts)
    return {
        "requests": total,
        "makespan_s": makespan_s,
        "lower_bound_s": bound_s,
        "gap": _gap(makespan_s, bound_s, shed),
        "decode_rounds": int(_total(replicas, "rounds")),
        "prefill_stages": int(_total(replicas, "prefill_stages")),
        "prefill_s": float(_total(replicas, "prefill_s")),
        "decisions": int(episode["decisions"]),
        "unfinished_requests": unfinished,
        "replicas": len(replicas),
        "mixed_stages": int(_total(replicas, "mixed_stages")),
        "preemptions": int(_total(replicas, "preemptions")),
        "recomputed_tokens": counts.recomputed_tokens,
        "rejected": rejected - shed,
        "moves": counts.moves,
        "memory_overrun_blocks": float(replicas["overrun_blocks"].max()),
        "shed": shed,
    }


def _elapsed_s(state: State, e: int, counts: Counts) -> float:
    """Return the present time, or when the last request finished if that ended the episode."""
    episode = np.asarray(state.episodes)[e]
    rejected, finished = int(episode["rejected"]), int(episode["finished"])
    if rejected > 0 and finished + rejected == int(episode["requests"]):
        return counts.last_s  # the last to come may have been rejected
    return float(episode["now_s"])


def _used(state: State, e: int, counts: Counts, columns: Columns) -> dict[str, float]:
    """Return how the machine was used and what it yielded; sorts two columns."""
    episode, replicas = np.asarray(state.episodes)[e], np.asarray(state.replicas)[e]
    clients = int(_total(np.asarray(state.machines), "clients"))
    now_s = _elapsed_s(state, e, counts)
    elapsed_s = now_s or NAN  # at t = 0 there is no utilization yet
    served_rounds, routed = int(episode["served_rounds"]), int(episode["routed"])
    held_s = float(np.add.reduce(columns.held_s))
    for column in (columns.admitted_s, columns.finished_s):
        column.sort()
    wasted, lasts_s = np.empty((2, counts.admitted + counts.done + counts.served))
    peak = weigh_queue(
        columns.admitted_s, columns.finished_s, columns.arrived_s, clients, now_s, wasted, lasts_s
    )
    computed = counts.prefilled_tokens + served_rounds
    busy_s = float(_total(replicas, "busy_decode_s"))
    return {
        "client_utilization": held_s / (clients * elapsed_s),
        "decode_utilization": busy_s / (len(replicas) * elapsed_s),
        "output_tokens_per_s": (served_rounds + counts.emitting) / elapsed_s,
        "goodput_per_s": counts.met / elapsed_s,
        "slo_attainment": counts.met / routed if routed else NAN,
        "peak_queue": float(peak),
        "idle_wait_share": float(wasted @ lasts_s) / (clients * elapsed_s),
        "recompute_tax": counts.recomputed_tokens / computed if computed else NAN,
    }


def _felt(columns: Columns) -> dict[str, float]:
    """Return what users feel; sorts the columns."""
    done = len(columns.e2e_s)
    figures = {
        "e2e_mean_s": float(np.add.reduce(columns.e2e_s) / done) if done else NAN,
        "jain_fairness": jain_index(columns.rates),
    }
    for name, column in (
        ("ttft", columns.ttft_s),
        ("tpot", columns.tpot_s),
        ("e2e", columns.e2e_s),
        ("gap_between_tokens", columns.worst_gap_s),
    ):
        figures[f"{name}_p50_s"], figures[f"{name}_p99_s"] = _percentiles(column)
    return figures


def gap_of(state: State, e: int) -> float:
    """Return the gap of environment ``e`` alone, as ``episode_metrics`` does."""
    episode = state.episodes[e]
    if episode.rejected > 0:
        return float(episode_metrics(state, e)["gap"])
    if episode.finished < episode.requests:
        return NAN
    return _gap(float(episode.now_s), float(episode.bound_s), 0)


def _preempted_slowdown(columns: Columns) -> float:
    """Return mean seconds per output token, from arrival on, of the preempted, over those of the others.

    Of those that have finished; NaN where all or none of them were preempted.
    """
    if len(columns.preempted_s) == 0 or len(columns.undisturbed_s) == 0:
        return NAN
    return float(columns.preempted_s.mean() / columns.undisturbed_s.mean())


def _gap(makespan_s: float, bound_s: float, shed: int) -> float:
    """Return the gap; NaN where requests were shed, whose work the bound holds."""
    if shed > 0:
        return NAN
    return 0.0 if bound_s == 0 else makespan_s / bound_s - 1.0


def _total(replicas: NDArray[np.void], name: str) -> float:
    """Return the sum over replicas; a sum over one takes 3 µs more than a look, ten times an episode."""
    return replicas[name][0] if len(replicas) == 1 else replicas[name].sum()


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """Sort the values; return median and 99th percentile, NaN without values.

    Equal to ``np.percentile`` to the last bit in a tenth of its time, as every episode ends here.
    """
    if len(values) == 0:
        return NAN, NAN
    values.sort()
    return _quantile(values, 0.5), _quantile(values, 0.99)


def _quantile(ascending: NDArray[np.float64], share: float) -> float:
    place = share * (len(ascending) - 1)
    low = int(place)
    first, second = ascending[low], ascending[min(low + 1, len(ascending) - 1)]
    step, part = second - first, place - low
    value = first + step * part if part < 0.5 else second - step * (1 - part)  # as numpy rounds
    return float(value)
