"""Signs of a scheduler that fails, as one line each: what a policy's episodes show beyond a threshold.

The paper's review names them: clients that idle while requests wait, latency that rises with preemption,
memory that overruns; and thrash, when a machine mostly computes again what it has computed before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Signature:
    """A metric, the most that is no sign of failure, and what to say beyond it."""

    metric: str
    most: float
    text: str
    """With ``{found}`` and ``{most}``."""
    why: str
    """Where the threshold comes from."""
    worst: bool = False
    """Whether the worst episode counts, not the mean of all."""


SIGNATURES: Final = (
    Signature(
        "idle_wait_share",
        0.2,
        "clients idle for {found:.0%} of their time while requests wait (more than {most:.0%}); admit sooner "
        "or look at what keeps requests out",
        "The paper's baseline leaves 19.8 % of client-time idle, its method 10.9 %.",
    ),
    Signature(
        "preempted_slowdown",
        2.0,
        "requests that are preempted take {found:.1f} times as long per token as others (more than "
        "{most:.0f}); preempt less: a watermark, a guard or fewer clients",
        "To compute a prompt again is a small part of an output's rounds: only waiting anew doubles them.",
    ),
    Signature(
        "recompute_tax",
        0.3,
        "{found:.0%} of all computed tokens are computed again (more than {most:.0%}), the machine thrashes; "
        "leave memory free when you admit",
        "vLLM (RFC 54644) measures 10 … 23 % in service, 32 % and more where memory is far too small.",
    ),
    Signature(
        "memory_overrun_blocks",
        0.0,
        "{found:.0f} blocks beyond the memory of a replica are in use (more than {most:.0f}): a fault of the "
        "simulator, please report it",
        "No stage begins that does not fit.",
        worst=True,
    ),
)
"""What is looked for, in this order."""

_LEAST_PREEMPTIONS: Final = 0.01
"""Preemptions per request below which nobody's slowdown is told: a handful of requests says little."""


def warnings(episodes: pd.DataFrame) -> list[str]:
    """Return a line for each policy and each sign of failure in its episodes.

    Parameters
    ----------
    episodes
        Rows with the columns of ``episodes.csv``. A metric that earlier versions did not measure shows
        nothing.

    Examples
    --------
    >>> row = {"policy": "p", "requests": 9, "preemptions": 0, "idle_wait_share": 0.5}
    >>> rest = {"preempted_slowdown": 1.0, "recompute_tax": 0.0, "memory_overrun_blocks": 0}
    >>> [line[:47] for line in warnings(pd.DataFrame([row | rest]))]
    ['Warning: p: clients idle for 50% of their time w']
    """
    lines = []
    for policy in dict.fromkeys(episodes["policy"]):
        group = episodes[episodes["policy"] == policy]
        for sign in SIGNATURES:
            values = group[sign.metric].to_numpy(float)
            values = values[~np.isnan(values)]
            if len(values) == 0 or (
                sign.metric == "preempted_slowdown" and _preempts_little(group)
            ):
                continue
            found = float(values.max() if sign.worst else values.mean())
            if found > sign.most:
                lines.append(f"Warning: {policy}: {sign.text.format(found=found, most=sign.most)}.")
    return lines


def _preempts_little(episodes: pd.DataFrame) -> bool:
    preemptions, requests = episodes["preemptions"].sum(), episodes["requests"].sum()
    return bool(preemptions < _LEAST_PREEMPTIONS * requests)
