"""Published rules that differ in whom they admit first: an order of ``ORDERS``, a guard, a victim.

All prefill as soon as a client is idle and somebody fits. [R]: read in the paper or its code; [K]: recalled
or read in summaries only. Defaults that no source gives are this project's choice, and said to be.
"""

from __future__ import annotations

from typing import Any, Final

from servegym.baselines.rules import triggers
from servegym.baselines.rules.policies import TriggerPolicy

INTERVAL: Final = 0.9
"""With what probability a length lies in the interval of ``a-min`` and ``a-max``: this project's choice."""

LEVEL_TOKENS: Final = 256
"""Tokens of the first level of ``mlfq``: this project's choice."""

PATIENCE_S: Final = 60.0
"""Seconds after which nobody goes before a request under ``sjf`` and ``mlfq``: this project's choice."""


def _shortest(cluster: dict[str, Any], comparison: dict[str, Any] | None = None) -> TriggerPolicy:
    return TriggerPolicy("shortest", triggers.EAGER, cluster=cluster, comparison=comparison or {})


def sjf() -> TriggerPolicy:
    """Return shortest expected output first, whoever has lost patience before all others.

    Examples
    --------
    >>> sjf().cluster
    {'patience_s': 60.0}
    """
    return _shortest({"patience_s": PATIENCE_S})


def mc_sf() -> TriggerPolicy:
    """Return MC-SF of Jaillet and others (arXiv 2502.07115).

    Examples
    --------
    >>> mc_sf().cluster
    {'admission_guard': 'peak'}
    """
    return _shortest({"admission_guard": "peak"})


def a_max() -> TriggerPolicy:
    """Return A_max of Chen, Ye and Zhou (arXiv 2508.14544).

    Each output lies in an interval [l, u]; u is taken for the output and packed as ``mc-sf`` packs [R
    abstract; K in detail]. l and u are the quantiles (1 − q) / 2 and (1 + q) / 2 of the task's prediction, a
    lognormal length; where lengths are known l = u, and this is ``mc-sf``. Memory never overflows as long as
    no output exceeds its u, which one in twenty does with q = 0.9: it is then expected to end with its next
    token, and the newest is evicted if memory is full.

    Examples
    --------
    >>> a_max().comparison["expect"]
    'upper'
    """
    return _shortest(
        {"admission_guard": "peak"},
        {"compare_by": "mean", "expect": "upper", "interval": INTERVAL},
    )


def a_min() -> TriggerPolicy:
    """Return A_min of the same paper: it goes by the lower end l, as far as it still holds.

    Who has the smallest lower bound goes first, while memory holds all who run until their lower bounds.
    Where the next round does not fit, those with the smallest go until it does [K]; of equals the newest.
    A bound that a request outlives becomes the tokens emitted, and one more, whether it is evicted or runs
    on. Evicted, it computes prompt and emitted tokens anew and goes on; in the paper it starts again.

    Examples
    --------
    >>> a_min().cluster["preempt"]
    'fewest-expected'
    """
    return _shortest(
        {"admission_guard": "peak", "shortest_by": "expected", "preempt": "fewest-expected"},
        {"expect": "lower", "interval": INTERVAL},
    )


def sorted_f() -> TriggerPolicy:
    """Return Sorted-F of Wang, Ye and Zhou (arXiv 2508.06133): batches of least Σ o / |X|², packed as mc-sf.

    The paper has a backlog present at once [R abstract]. Here the batches are formed anew of all who wait
    when somebody is waiting who is in none; ``envs/simulator/ranking.py`` says which batches are tried in
    the place of all.

    Examples
    --------
    >>> sorted_f().cluster["shortest_by"]
    'batch'
    """
    return _shortest({"admission_guard": "peak", "shortest_by": "batch"})


def edf() -> TriggerPolicy:
    """Return earliest deadline first (Liu and Layland, 1973): arrival plus the request's ``ttft_s``.

    That is its class's in ``[[slo.classes]]``, else that of ``[slo]``. A deadline stays when it has passed,
    and a preempted request keeps it: it does not go to the front. Who runs is not stopped for one who is
    due sooner. Where all have the same limit, or none, it is first come, first served.

    Examples
    --------
    >>> edf().cluster["shortest_by"]
    'deadline'
    """
    return _shortest({"shortest_by": "deadline"})


def mlfq() -> TriggerPolicy:
    """Return multi-level feedback in the way of FastServe (arXiv 2305.05920) [K].

    A request's level is how often Q must be doubled to hold its prompt and the tokens emitted so far: a long
    prompt skips levels when it joins (FastServe's skip-join goes by the seconds of its prefill), and who is
    evicted comes back at the level of what it has got. The first level goes first, within one the first to
    come; where memory is full the last level is evicted first, of it the newest. Who came 60 s ago goes
    before all others (FastServe promotes after a time limit). No length is predicted.

    Left out, as a client holds its request to the last token: a running request does not make way for one
    of a higher level, and its memory is not moved to the host ahead of time.

    Examples
    --------
    >>> mlfq().cluster["level_tokens"]
    256
    """
    return _shortest(
        {
            "shortest_by": "level",
            "level_tokens": LEVEL_TOKENS,
            "preempt": "lowest-level",
            "patience_s": PATIENCE_S,
        }
    )
