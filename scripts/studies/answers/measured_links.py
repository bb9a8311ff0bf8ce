"""Our seconds of moving a request beside those that Llumnix and Mooncake have measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_loaded
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.machine.links import LINKS
from servegym.envs.machine.presets import cost_preset
from servegym.envs.playing.summary import fixed, to_markdown
from servegym.envs.process.metrics import records
from servegym.envs.task.cluster import ClusterConfig, LinkConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, load_case, lower, make_task_state
from servegym.envs.task.sections import ProcessConfig
from servegym.envs.task.slo import SloConfig
from servegym.envs.workload.requests import make_requests

MOONCAKE_BYTES: Final = 144 * 1024
MOONCAKE_MS: Final = {128: 0.54, 1024: 1.50, 4096: 4.75, 8192: 8.84, 32768: 31.65}
"""Qwen3-8B, 8 × RoCE between H800 nodes: tokens, and milliseconds of the transfer."""

LLUMNIX_TOKENS: Final = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Llumnix:
    """What Llumnix's artifact measured of one model on A10 nodes, milliseconds by ``LLUMNIX_TOKENS``."""

    model: str
    kv_bytes: int  # a token
    step_s: float  # of decoding, in the middle of what is told
    recompute_ms: tuple[int, ...]
    copy_ms: tuple[int, ...]  # with the request paused
    downtime_ms: tuple[int, ...]  # of a live migration
    preset: str  # the nearest of our costs; empty: none


LLUMNIX: Final = (
    Llumnix(
        "7B",
        512 * 1024,
        0.045,
        (58, 110, 220, 436, 940, 1995),
        (68, 129, 226, 451, 909, 1682),
        (13, 12, 15, 16, 22, 26),
        "llama2-7b-a100x1",
    ),
    Llumnix(
        "30B on four",
        60 * 2 * 6656 * 2,
        0.063,
        (115, 235, 443, 829, 1712, 3546),
        (118, 181, 272, 604, 1203, 1730),
        (33, 37, 32, 33, 37, 35),
        "",
    ),
)


def fitted_link(measured: Llumnix) -> LinkConfig:
    """Return latency and bandwidth that fit the copies with the least squares of relative errors."""
    tokens, seconds = np.array(LLUMNIX_TOKENS), np.array(measured.copy_ms) / 1e3
    design = np.stack([1 / seconds, tokens * measured.kv_bytes / seconds], axis=1)
    latency_s, per_byte_s = np.linalg.lstsq(design, np.ones(len(tokens)), rcond=None)[0]
    return LinkConfig(max(0.0, float(latency_s)), 1.0 / float(per_byte_s))


def fitted_prefill(measured: Llumnix) -> AffinePrefill:
    """Return a straight line through the recomputations, by relative errors."""
    tokens, seconds = np.array(LLUMNIX_TOKENS), np.array(measured.recompute_ms) / 1e3
    design = np.stack([1 / seconds, tokens / seconds], axis=1)
    base_s, per_token_s = np.linalg.lstsq(design, np.ones(len(tokens)), rcond=None)[0]
    return AffinePrefill(max(0.0, float(base_s)), float(per_token_s))


def pause_s(measured: Llumnix, tokens: int, move: str) -> float:
    """Return for how long a request of so many tokens is paused when our simulator moves it.

    Two replicas of two clients. The first gets the request and a companion, the second one that ends with
    its first token, so that it takes the request over. The pause is its worst gap between two tokens less
    a decode step.
    """
    costs = StageCosts(AffineDecode(measured.step_s), fitted_prefill(measured))
    cluster = ClusterConfig(
        2, 2, move=move, kv_bytes_per_token=measured.kv_bytes, link=fitted_link(measured)
    )
    process, slo = ProcessConfig(steals=("running",)), SloConfig(ttft_s=1e9)
    task = TaskConfig("one move", cluster, costs, process=process, slo=slo)
    case = bound_case(lower(task), make_requests([tokens, 1, 1], [400, 1, 300]))
    state = make_task_state(task, 1, len(case.requests))
    load_case(task, state, 0, case)
    play_loaded(state, lower(task).costs, task, make_trigger_policy("fcfs"))
    log = records(state, 0)
    assert log.moves[0] == 1
    return float(log.worst_gap_s[0]) - measured.step_s


def mooncake_table() -> pd.DataFrame:
    """Return Mooncake's transfers beside those of the link ``rdma8``."""
    link = LINKS["rdma8"]
    rows = []
    for tokens, theirs in MOONCAKE_MS.items():
        size = tokens * MOONCAKE_BYTES
        ours = 1e3 * (link.latency_s + size / link.bytes_per_s)
        rows.append(
            {
                "tokens": f"{tokens}",
                "MB": fixed(size / 1e6, 0),
                "Mooncake (ms)": fixed(theirs),
                "`rdma8` (ms)": fixed(ours),
                "ours / theirs": fixed(ours / theirs),
            }
        )
    return pd.DataFrame(rows)


def _prefill_ms(preset: str, tokens: int) -> float:
    costs = cost_preset(preset).costs.prefill
    assert isinstance(costs, AffinePrefill)
    squared = costs.per_token_squared * tokens**2
    return 1e3 * max(costs.floor, costs.base + costs.per_token * tokens + squared)


def llumnix_table(measured: Llumnix) -> pd.DataFrame:
    """Return Llumnix's three ways to move beside ours."""
    link, tcp = fitted_link(measured), LINKS["tcp"]
    rows = []
    for k, tokens in enumerate(LLUMNIX_TOKENS):
        size = tokens * measured.kv_bytes
        rows.append(
            {
                "tokens": f"{tokens}",
                "MB": fixed(size / 1e6, 0),
                "copy: theirs (ms)": f"{measured.copy_ms[k]}",
                "`tcp`": fixed(1e3 * (tcp.latency_s + size / tcp.bytes_per_s), 0),
                "fitted link": fixed(1e3 * (link.latency_s + size / link.bytes_per_s), 0),
                "recompute: theirs (ms)": f"{measured.recompute_ms[k]}",
                "our costs on an A100": fixed(_prefill_ms(measured.preset, tokens), 0)
                if measured.preset
                else "",
                "pause by recomputing, simulated": fixed(
                    1e3 * pause_s(measured, tokens, "recompute"), 0
                ),
                "pause of a live move: theirs (ms)": f"{measured.downtime_ms[k]}",
                "simulated": fixed(1e3 * pause_s(measured, tokens, "copy"), 1),
            }
        )
    return pd.DataFrame(rows)


def control_ms(measured: Llumnix) -> tuple[float, float]:
    """Return the least and the most milliseconds by which their pauses exceed ours."""
    more: NDArray[np.float64] = np.array(
        [
            theirs - 1e3 * pause_s(measured, tokens, "copy")
            for tokens, theirs in zip(LLUMNIX_TOKENS, measured.downtime_ms, strict=True)
        ]
    )
    return float(more.min()), float(more.max())


MOONCAKE: Final = """\
Mooncake (Qwen3-8B, 144 KiB a token, 8 × RoCE, H800). The link `rdma8` is a fit of these figures, so the table
shows how well a latency and a bandwidth describe them, not that they are right. The sizes are 144 KiB ×
tokens; the source states 4.5 GB for the largest, which is 4.5 GiB, so that `rdma8` is 13 % slow there.
"""

LLUMNIX_WORDS: Final = """\
Llumnix (values in its artifact's plotting script, A10). `tcp` is our preset for a loaded network; the fitted
link and the line through their recomputations are least squares of relative errors. Pauses are simulated with
these and their decode step: the worst gap between two tokens of a request that moves, less a step. Computing
again emits a token, so that its pause is a step shorter than the prefill.
"""


def report() -> str:
    """Return the section of transfer.md."""
    parts = [
        "## Beside measured transfers\n",
        MOONCAKE,
        to_markdown(mooncake_table()),
        LLUMNIX_WORDS,
    ]
    for measured in LLUMNIX:
        link = fitted_link(measured)
        low, high = control_ms(measured)
        fitted = f"{1e3 * link.latency_s:.0f} ms + bytes / {link.bytes_per_s / 1e9:.1f} GB/s"
        parts.append(f"### {measured.model}, {measured.kv_bytes / 1024:g} KiB a token\n")
        parts.append(to_markdown(llumnix_table(measured)))
        parts.append(
            f"Fitted: {fitted}. Their live pauses are {low:.0f} to {high:.0f} ms longer than ours: that much "
            "is control, which the simulator leaves out.\n"
        )
    return "\n".join(parts)
