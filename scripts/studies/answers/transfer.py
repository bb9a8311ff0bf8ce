"""When moving running requests between replicas pays: by bandwidth, lengths and skew of the routing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.machine.costs import AffinePrefill
from servegym.envs.machine.presets import cost_preset
from servegym.envs.pictures import to_png
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.summary import fixed, mean_interval, to_markdown, with_interval
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.task.slo import SloConfig
from servegym.envs.workload.requests import Requests, make_requests

REPLICAS: Final = 4
CLIENTS: Final = 64
REQUESTS: Final = 1024
MACHINE: Final = "llama2-70b-h100x4"
MEMORY_TOKENS: Final = 450_000
"""What 320 GB leave for keys and values beside 140 GB of weights and a tenth kept free."""
KV_BYTES: Final = 327_680
LATENCY_S: Final = 4e-4
"""Of a copy at any bandwidth: what Mooncake's measurements and NVLink's have in common."""
POLICY: Final = "vllm"
CHUNK_TOKENS: Final = 2048

LENGTHS: Final[Mapping[str, float]] = {
    "gsm8k-lognormal": 22.0,
    "azure-conv": 19.0,
    "mooncake-conversation": 1.4,
}
"""Presets, and arrivals a second: about 0.8 of what the cluster bears."""

BANDWIDTHS: Final = (1.0, 2.0, 5.0, 12.5, 50.0, 200.0, 450.0)
"""GB/s: 10 Gb/s Ethernet, a loaded network, around the break-even, 100 Gb/s, NDR or PCIe 5, NVLink."""

SHOWN: Final = (1.0, 5.0, 50.0, 450.0)
"""Bandwidths that stand in the tables; the picture and the CSV files have all."""

SKEWS: Final = (0.0, 0.5, 1.0)
"""Share of the rounds of the router in which the longest answer goes to the first replica, and so on."""

BATCH, ARRIVALS = "batch", "arrivals"
FEELS: Final = {
    "makespan_s": (BATCH, "Makespan, all requests at t = 0"),
    "e2e_mean_s": (ARRIVALS, "Mean seconds from arrival to the last token"),
    "e2e_p99_s": (ARRIVALS, "99th percentile from arrival to the last token"),
    "gap_between_tokens_p99_s": (
        ARRIVALS,
        "99th percentile of a request's worst gap between tokens",
    ),
}
"""What is tabulated: metric, how its requests come, heading."""

MEASURED: Final = (*FEELS, "ttft_p99_s", "moves", "recomputed_tokens")


class Way(NamedTuple):
    """What replicas may steal, and how a running request moves."""

    waiting: bool
    move: str  # none | recompute | copy
    gbps: float = 0.0  # of a copy

    @property
    def steals(self) -> list[str]:
        """What stands in ``process.steals``."""
        return ["waiting"] * self.waiting + ["running"] * (self.move != "none")


def ways() -> Iterator[Way]:
    """Yield every way that is played."""
    for waiting in (False, True):
        yield Way(waiting, "none")
        yield Way(waiting, "recompute")
        for gbps in BANDWIDTHS:
            yield Way(waiting, "copy", gbps)


def transfer_task(lengths: str) -> TaskConfig:
    """Return the cluster that serves requests of such lengths, all present at t = 0."""
    cluster = ClusterConfig(
        REPLICAS,
        CLIENTS,
        kv_capacity_tokens=MEMORY_TOKENS,
        kv_block_tokens=16,
        chunk_tokens=CHUNK_TOKENS,
        kv_bytes_per_token=KV_BYTES,
    )
    workload = WorkloadConfig(lengths, REQUESTS)
    # A limit that nobody misses, so that gaps between tokens are noted.
    slo = SloConfig(ttft_s=1e9)
    costs = cost_preset(MACHINE).costs
    return TaskConfig(f"transfer-{lengths}", cluster, costs, workload, slo=slo)


def arriving(task: TaskConfig) -> TaskConfig:
    """Return the task with Poisson arrivals at the rate of its lengths."""
    rate = LENGTHS[task.workload.source]
    return replace(task, workload=replace(task.workload, arrival_rate_per_s=rate))


def skewed(requests: Requests, skew: float, rng: np.random.Generator) -> Requests:
    """Return the same requests in another order, in which round-robin sends long answers to one replica.

    In each block of as many requests as there are replicas, with probability ``skew``, the longest
    output comes first, the next longest second, and so on; else they stay as they come. Arrival times
    stay where they are.
    """
    order = np.arange(len(requests))
    for first in range(0, len(order), REPLICAS):
        block = order[first : first + REPLICAS]
        if rng.random() < skew:
            order[first : first + REPLICAS] = block[
                np.argsort(-requests.output_tokens[block], kind="stable")
            ]
    prompts, outputs = requests.prompt_tokens[order], requests.output_tokens[order]
    return make_requests(prompts, outputs, requests.arrival_s)


def fullest(requests: Requests) -> float:
    """Return the output tokens sent to the fullest replica over those of the mean replica."""
    loads = [requests.output_tokens[r::REPLICAS].sum() for r in range(REPLICAS)]
    return float(max(loads) / np.mean(loads))


def play_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return a row a way to come, skew and way to move."""
    policy = make_trigger_policy(POLICY)
    rows = []
    for coming, played in ((BATCH, task), (ARRIVALS, arriving(task))):
        drawn = make_case(played, seed).requests
        for skew in SKEWS:
            requests = skewed(drawn, skew, np.random.default_rng([seed, 2]))
            case = bound_case(lower(played), requests)
            for way in ways():
                cluster: dict[str, Any] = {}
                if way.move != "none":
                    cluster["move"] = way.move
                if way.move == "copy":
                    cluster["link"] = {"latency_s": LATENCY_S, "bytes_per_s": way.gbps * 1e9}
                moved = with_overrides(
                    played, {"cluster": cluster, "process": {"steals": way.steals}}
                )
                metrics = play_compiled(moved, policy, case)
                rows.append(
                    {"seed": seed, "coming": coming, "skew": skew, "fullest": fullest(requests)}
                    | {"steals": "waiting" if way.waiting else "nothing", "move": way.move}
                    | {"gbps": way.gbps}
                    | {name: metrics[name] for name in MEASURED}
                )
    return rows


TEXTS: Final = ("coming", "steals", "move")


class Rows:
    """The rows of one preset, looked up by what was played."""

    def __init__(self, rows: pd.DataFrame) -> None:
        """Group them once."""
        keys = ["coming", "skew", "steals", "move", "gbps"]
        ordered = rows.sort_values("seed", kind="stable")
        self._groups = dict(iter(ordered.groupby(keys)))
        self.seeds = sorted(set(rows["seed"]))

    def values(self, metric: str, skew: float, way: Way) -> NDArray[np.float64]:
        """Return a metric of all cases, by seed."""
        steals = "waiting" if way.waiting else "nothing"
        coming = FEELS[metric][0] if metric in FEELS else ARRIVALS
        group = self._groups[coming, skew, steals, way.move, way.gbps]
        return group[metric].to_numpy(float)

    def change(self, metric: str, skew: float, way: Way) -> NDArray[np.float64]:
        """Return by how many percent moving running requests changes a metric, case by case."""
        still = self.values(metric, skew, Way(way.waiting, "none"))
        return 100 * (self.values(metric, skew, way) / still - 1)


def effect(changes: NDArray[np.float64]) -> str:
    """Return the mean change in percent with its interval."""
    mean, half = mean_interval(changes)
    return f"{fixed(mean, 1, '+')} ± {fixed(half, 1)}"


def break_even(rows: Rows, metric: str, skew: float, waiting: bool, against: str) -> str:
    """Return from which bandwidth on, at all higher ones, too, a copy is clearly better."""
    found = "at none"
    for gbps in reversed(BANDWIDTHS):
        copied = rows.values(metric, skew, Way(waiting, "copy", gbps))
        other = rows.values(metric, skew, Way(waiting, against))
        mean, half = mean_interval(copied - other)
        if not mean < -half:
            break
        found = f"from {gbps:g}"
    return found


def tabulate(tables: Mapping[str, Rows], metric: str) -> pd.DataFrame:
    """Return a row a preset, skew and base: its seconds, and what moves of running requests change."""
    table = []
    digits = 3 if metric == "gap_between_tokens_p99_s" else 2
    for name, rows in tables.items():
        for skew in SKEWS:
            for waiting in (False, True):
                base = rows.values(metric, skew, Way(waiting, "none"))
                cells = {
                    "lengths": f"`{name}`",
                    "skew": f"{skew:g}",
                    "waiting requests": "stolen" if waiting else "stay",
                    "nothing running moves (s)": with_interval(base, digits=digits),
                    "recompute (%)": effect(rows.change(metric, skew, Way(waiting, "recompute"))),
                }
                for gbps in SHOWN:
                    change = rows.change(metric, skew, Way(waiting, "copy", gbps))
                    cells[f"copy, {gbps:g} GB/s"] = effect(change)
                for against, words in (("recompute", "recompute"), ("none", "none")):
                    cells[f"copy beats {words} (GB/s)"] = break_even(
                        rows, metric, skew, waiting, against
                    )
                table.append(cells)
    return pd.DataFrame(table)


def moves_table(tables: Mapping[str, Rows]) -> pd.DataFrame:
    """Return how skewed the routing was, and how many requests moved."""
    table = []
    for name, rows in tables.items():
        for skew in SKEWS:
            cells = {"lengths": f"`{name}`", "skew": f"{skew:g}"}
            full = rows.values("fullest", skew, Way(False, "none"))
            cells["fullest replica / mean"] = with_interval(full)
            for way, words in (
                (Way(True, "none"), "waiting"),
                (Way(False, "recompute"), "running, recompute"),
                (Way(False, "copy", 50.0), "running, copy at 50 GB/s"),
                (Way(True, "copy", 50.0), "both, copy at 50 GB/s"),
            ):
                moved = rows.values("moves", skew, way) / REQUESTS
                cells[f"moves: {words} (% of requests)"] = with_interval(moved, 100, 1)
            table.append(cells)
    return pd.DataFrame(table)


def count(tables: Mapping[str, Rows], metric: str, waiting: bool) -> str:
    """Return in how many settings copying at some bandwidth gains, loses or changes nothing clear."""
    gains, loses, best, settings = 0, 0, 0.0, 0
    for rows in tables.values():
        for skew in SKEWS:
            for gbps in BANDWIDTHS:
                mean, half = mean_interval(rows.change(metric, skew, Way(waiting, "copy", gbps)))
                gains, loses = gains + (mean < -half), loses + (mean > half)
                best, settings = min(best, mean), settings + 1
    return (
        f"{gains} of {settings} settings gain (at best {fixed(best, 1, '+')} %), {loses} lose, "
        f"{settings - gains - loses} change nothing clear"
    )


def findings(tables: Mapping[str, Rows]) -> str:
    """Return in words how often a copy gains, for each metric, with waiting requests stolen or not."""
    lines = []
    for metric, (_, heading) in FEELS.items():
        alone, beside = (count(tables, metric, waiting) for waiting in (False, True))
        lines.append(
            f"- {heading}: by copies where waiting requests stay, {alone}; beside stealing of waiting "
            f"requests, {beside}."
        )
    return "\n".join(lines) + "\n"


INTRODUCTION: Final = f"""\
{REPLICAS} replicas of {CLIENTS} clients, costs of `{MACHINE}`, {MEMORY_TOKENS:,} tokens of memory each,
{KV_BYTES:,} bytes a token, {REQUESTS} requests under `{POLICY}` with {CHUNK_TOKENS} tokens a stage,
round-robin. **Skew** s: in a share s of the router's rounds the longest answer goes to the first replica, the
next to the second, and so on, as where users stick to replicas. **Moves** are those of CLUSTER.md: a replica
on which at least two fewer requests are present than decode on the fullest takes the running request with
most rounds left. A copy takes {1e3 * LATENCY_S:g} ms + bytes / bandwidth and goes on while the request
decodes; copies slow neither each other nor those who decode. Arrivals are Poisson, each second
{", ".join(f"{rate:g} of `{name}`" for name, rate in LENGTHS.items())}: about 0.8 of what the cluster bears.

Percentages are changes against the same cluster in which nothing running moves, paired by case, with 95 %
Student-t intervals. *Beats*: the bandwidth from which on a copy is better by more than its interval.
"""


def report(tables: Mapping[str, Rows], measured: str, command: str) -> str:
    """Return transfer.md."""
    seeds = next(iter(tables.values())).seeds
    prefill = cost_preset(MACHINE).costs.prefill
    assert isinstance(prefill, AffinePrefill)
    price = prefill.per_token
    by_prices = (
        f"By the prices alone a copy takes less than computing again above {KV_BYTES} / {price:.3g} s = "
        f"{KV_BYTES / price / 1e9:.1f} GB/s.\n"
    )
    parts = [
        "# When does moving running requests pay?\n",
        f"`{command}`\n",
        INTRODUCTION,
        f"{len(seeds)} cases of each row, seeds {seeds[0]} … {seeds[-1]}.\n",
        by_prices,
        findings(tables),
        "![Change by bandwidth](transfer.png)\n",
    ]
    for metric, (_, heading) in FEELS.items():
        parts.append(f"## {heading}\n\n{to_markdown(tabulate(tables, metric))}")
    parts.append(f"## How skewed, and how many moved\n\n{to_markdown(moves_table(tables))}")
    parts.append(measured)
    return "\n".join(parts)


def picture(tables: Mapping[str, Rows]) -> bytes:
    """Return a PNG: changes of makespan and of mean latency by bandwidth, a column a preset."""
    metrics = {"makespan_s": "makespan at t = 0", "e2e_mean_s": "mean latency of arrivals"}
    figure = Figure(figsize=(1.2 + 4.2 * max(len(tables), 2), 7.6), dpi=110, layout="constrained")
    grid = figure.subplots(len(metrics), len(tables), squeeze=False)
    for line, metric in zip(grid, metrics, strict=True):
        for axes, (name, rows) in zip(line, tables.items(), strict=True):
            for k, skew in enumerate(SKEWS):
                for waiting, style in ((False, "o-"), (True, "s--")):
                    label = f"copy, skew {skew:g}" + (", waiting stolen" if waiting else "")
                    intervals = [
                        mean_interval(rows.change(metric, skew, Way(waiting, "copy", gbps)))
                        for gbps in BANDWIDTHS
                    ]
                    mean, half = np.array(intervals).T
                    axes.plot(
                        *(BANDWIDTHS, mean, style), color=f"C{k}", label=label,
                        linewidth=1.5, markersize=4,
                    )  # fmt: skip
                    low, high = mean - half, mean + half
                    axes.fill_between(BANDWIDTHS, low, high, color=f"C{k}", alpha=0.15, linewidth=0)
                again = rows.change(metric, skew, Way(False, "recompute")).mean()
                axes.axhline(
                    again, color=f"C{k}", linestyle=":", linewidth=1.2,
                    label=f"recompute, skew {skew:g}",
                )  # fmt: skip
            axes.axhline(0.0, color="black", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_title(f"{metrics[metric]}: {name}", loc="left", fontsize=10)
            axes.grid(alpha=0.25)
        line[0].set_ylabel("change against no moves (%)")
    for axes in grid[-1]:
        axes.set_xlabel("bandwidth (GB/s)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *(handles, labels), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return to_png(figure)
