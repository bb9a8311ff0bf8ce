"""How many clients: fixed counts against admission that looks at memory, by memory and length variance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.machine.presets import cost_preset
from servegym.envs.pictures import to_png
from servegym.envs.playing.summary import fixed, mean_interval, to_markdown, with_interval
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.workload.requests import Requests, make_requests

MACHINE: Final = "llama2-70b-a100x4"
REQUESTS: Final = 1500
PROMPT_TOKENS: Final = 200
MEAN_OUTPUT: Final = 400
LIMIT: Final = 4096
"""Generation limit: the longest output that a worst case must reckon with."""
MOST_CLIENTS: Final = 512
"""Of those who admit by memory; vLLM's default is 256 or 1024."""

MEMORIES: Final = (10_000, 40_000, 160_000)
VARIATIONS: Final = (0.0, 0.5, 1.0, 2.0)
"""Standard deviation of output lengths over their mean, before the limit cuts them."""
FACTORS: Final = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Fixed counts, as multiples of memory / (prompt + mean output)."""
WORST: Final = 0.0
"""Stands among the factors for the worst case, memory / (prompt + limit)."""

FREE: Final = 0.05
"""A watermark: the share of memory that admission leaves free while others run."""
FIXED, FIXED_FREE = "fixed", "fixed, 5 % free"

ONLINE: Final = {
    "vllm": "greedy: the prompt must fit now",
    "vllm, 5 % free": "the same, a watermark of 0.05",
    "sglang": "a falling reserve for outputs to come",
    "trt-no-evict": "all expected outputs must fit at once",
    "peak": "all who run must fit at every expected finish",
}
"""Who decides online how many run, and by what."""

BY_LENGTHS: Final = ("sglang", "trt-no-evict", "peak")
"""Those for whom it matters what is known of output lengths."""

TEXTS: Final = ("policy", "lengths")
LEAST: Final = 0.05
"""Percent by which makespans must differ to count as different."""
MEASURED: Final = ("makespan_s", "e2e_mean_s", "preemptions", "recompute_tax")


class Setting(NamedTuple):
    """How much memory, in tokens, and how unlike the output lengths are."""

    memory: int
    variation: float


def settings(memories: Iterable[int]) -> list[Setting]:
    """Return all settings of these memories."""
    return [Setting(memory, variation) for memory in memories for variation in VARIATIONS]


def clients_task(memory: int) -> TaskConfig:
    """Return one replica with so much memory, and clients for whoever admits by it."""
    cluster = ClusterConfig(
        1, MOST_CLIENTS, kv_capacity_tokens=memory, kv_block_tokens=16, chunk_tokens=2048
    )
    costs = cost_preset(MACHINE).costs
    return TaskConfig(f"clients-{memory}", cluster, costs, WorkloadConfig(requests=REQUESTS))


def draw(variation: float, seed: int) -> Requests:
    """Return requests of lognormal outputs, all present at t = 0, each predicted at the mean of all."""
    rng = np.random.default_rng([seed, 3])
    spread = np.sqrt(np.log1p(variation**2))
    outputs = np.exp(np.log(MEAN_OUTPUT) - spread**2 / 2 + spread * rng.standard_normal(REQUESTS))
    outputs = np.clip(np.rint(outputs), 1, LIMIT).astype(np.int64)
    prompts, alike = np.full(REQUESTS, PROMPT_TOKENS), np.full(REQUESTS, float(MEAN_OUTPUT))
    return make_requests(
        prompts,
        outputs,
        predicted_output_tokens=alike,
        predicted_spread=np.full(REQUESTS, float(spread)),
    )


def fixed_clients(memory: int, factor: float) -> int:
    """Return a fixed count of clients; the worst case for ``WORST``."""
    if factor == WORST:
        return max(1, memory // (PROMPT_TOKENS + LIMIT))
    return max(1, round(factor * memory / (PROMPT_TOKENS + MEAN_OUTPUT)))


def policy_of(name: str) -> tuple[TriggerPolicy, dict[str, Any]]:
    """Return a policy of ``ONLINE`` and the keys of its ``[cluster]``."""
    if name == "peak":
        guard = {"admission_guard": "peak"}
        return TriggerPolicy("fcfs", triggers.EAGER, mixed=True, cluster=guard), {}
    if name == "vllm, 5 % free":
        return make_trigger_policy("vllm"), {"watermark": FREE}
    return make_trigger_policy(name), {}


def play_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return a row a variation and policy, for the memory of ``task``."""
    rows = []
    for setting in settings((task.cluster.kv_capacity_tokens,)):
        requests = draw(setting.variation, seed)
        plays: list[tuple[str, float, str, TaskConfig, TriggerPolicy]] = []
        for factor in (WORST, *FACTORS):
            count = fixed_clients(setting.memory, factor)
            for name, free in (FIXED, 0.0), (FIXED_FREE, FREE):
                keys = {"clients": count, "watermark": free}
                counted = with_overrides(task, {"cluster": keys})
                plays.append((name, factor, "-", counted, make_trigger_policy("vllm")))
        for name in ONLINE:
            policy, keys = policy_of(name)
            online = with_overrides(task, {"cluster": keys})
            for lengths in ("known", "unknown") if name in BY_LENGTHS else ("-",):
                kind = "predicted" if lengths == "unknown" else "known"
                informed = with_overrides(online, {"information": {"output_lengths": kind}})
                plays.append((name, np.nan, lengths, informed, policy))
        for name, factor, lengths, played, policy in plays:
            metrics = play_compiled(played, policy, bound_case(lower(played), requests))
            running = metrics["decode_utilization"] * played.cluster.clients
            rows.append(
                {"seed": seed, **setting._asdict(), "policy": name, "lengths": lengths}
                | {"factor": factor, "clients": played.cluster.clients, "running": running}
                | {key: metrics[key] for key in MEASURED}
            )
    return rows


class Rows:
    """The rows of the study, looked up by setting and policy."""

    def __init__(self, rows: pd.DataFrame) -> None:
        """Group them once."""
        ordered = rows.sort_values("seed", kind="stable").fillna({"factor": -1.0})
        keys = ["memory", "variation", "policy", "lengths", "factor"]
        self._groups = dict(iter(ordered.groupby(keys)))
        self.seeds = sorted(set(rows["seed"]))
        self.settings = settings(sorted(set(rows["memory"])))

    def values(
        self, setting: Setting, policy: str, lengths: str, factor: float, metric: str = "makespan_s"
    ) -> NDArray[np.float64]:
        """Return a metric of all cases, by seed."""
        return self._groups[(*setting, policy, lengths, factor)][metric].to_numpy(float)

    def fixed(
        self, setting: Setting, factor: float, metric: str = "makespan_s", name: str = FIXED
    ) -> NDArray[np.float64]:
        """Return a metric of a fixed count."""
        return self.values(setting, name, "-", factor, metric)

    def online(
        self, setting: Setting, name: str, lengths: str, metric: str = "makespan_s"
    ) -> NDArray[np.float64]:
        """Return a metric of who decides online."""
        shown = lengths if name in BY_LENGTHS else "-"
        return self.values(setting, name, shown, -1.0, metric)

    def best(self, setting: Setting, name: str = FIXED) -> float:
        """Return the factor with the least mean makespan: who chose it knew the cases."""
        means = {f: float(self.fixed(setting, f, name=name).mean()) for f in FACTORS}
        return min(means, key=means.__getitem__)

    def best_free(self, setting: Setting) -> NDArray[np.float64]:
        """Return the makespans of the best fixed count that leaves memory free."""
        return self.fixed(setting, self.best(setting, FIXED_FREE), name=FIXED_FREE)


def change(values: NDArray[np.float64], base: NDArray[np.float64]) -> str:
    """Return the mean change in percent, paired by case, with its interval."""
    mean, half = mean_interval(100 * (values / base - 1))
    return f"{fixed(mean, 1, '+')} ± {fixed(half, 1)}"


def makespan_table(rows: Rows) -> pd.DataFrame:
    """Return what every way changes against the best fixed count, a row a setting."""
    table = []
    for setting in rows.settings:
        best = rows.best(setting)
        base = rows.fixed(setting, best)
        cells = {
            "memory (tokens)": f"{setting.memory:,}",
            "variation": f"{setting.variation:g}",
            "best fixed count": f"{fixed_clients(setting.memory, best)} ({best:g})",
            "its makespan (s)": with_interval(base, digits=1),
            "worst case": f"{fixed_clients(setting.memory, WORST)}: "
            + change(rows.fixed(setting, WORST), base),
            "by the mean (1)": change(rows.fixed(setting, 1.0), base),
            "three times (3)": change(rows.fixed(setting, 3.0), base),
            "best fixed, 5 % free": f"{fixed_clients(setting.memory, rows.best(setting, FIXED_FREE))}: "
            + change(rows.best_free(setting), base),
        }
        for name in ONLINE:
            cells[f"`{name}`"] = change(rows.online(setting, name, "known"), base)
        for name in BY_LENGTHS:
            cells[f"`{name}`, lengths unknown"] = change(
                rows.online(setting, name, "unknown"), base
            )
        table.append(cells)
    return pd.DataFrame(table)


def running_table(rows: Rows) -> pd.DataFrame:
    """Return how many decoded on average, and how often memory was taken away."""
    table = []
    for setting in rows.settings:
        cells = {"memory (tokens)": f"{setting.memory:,}", "variation": f"{setting.variation:g}"}
        best = rows.best(setting)
        looked = {
            "best fixed": (
                rows.fixed(setting, best, "running"),
                rows.fixed(setting, best, "preemptions"),
            )
        }
        for name in ONLINE:
            for lengths in ("known", "unknown") if name in BY_LENGTHS else ("known",):
                words = f"`{name}`" + (", unknown" if lengths == "unknown" else "")
                looked[words] = (
                    rows.online(setting, name, lengths, "running"),
                    rows.online(setting, name, lengths, "preemptions"),
                )
        for words, (running, preemptions) in looked.items():
            cells[words] = f"{fixed(running.mean(), 1)} / {fixed(preemptions.mean(), 0)}"
        table.append(cells)
    return pd.DataFrame(table)


def findings(rows: Rows) -> str:
    """Return in words how every way does against the best fixed count over all settings."""
    lines = []
    ways: dict[str, list[NDArray[np.float64]]] = {
        "the worst case": [rows.fixed(setting, WORST) for setting in rows.settings],
        "the count by the mean": [rows.fixed(setting, 1.0) for setting in rows.settings],
        "the best count with 5 % left free": [rows.best_free(setting) for setting in rows.settings],
    }
    for name in ONLINE:
        for lengths in ("known", "unknown") if name in BY_LENGTHS else ("known",):
            words = f"`{name}`" + (f", lengths {lengths}" if name in BY_LENGTHS else "")
            ways[words] = [rows.online(setting, name, lengths) for setting in rows.settings]
    for words, values in ways.items():
        changes = [
            mean_interval(100 * (value / rows.fixed(setting, rows.best(setting)) - 1))
            for value, setting in zip(values, rows.settings, strict=True)
        ]
        shorter = sum(mean < -max(half, LEAST) for mean, half in changes)
        longer = sum(mean > max(half, LEAST) for mean, half in changes)
        means = [mean for mean, _ in changes]
        lines.append(
            f"- {words}: shorter than the best fixed count in {shorter} of {len(changes)} settings, longer "
            f"in {longer}; {fixed(min(means), 1, '+')} to {fixed(max(means), 1, '+')} %."
        )
    return "\n".join(lines) + "\n"


INTRODUCTION: Final = f"""\
One replica, costs of `{MACHINE}`, {REQUESTS} requests at t = 0 with prompts of {PROMPT_TOKENS} tokens and
lognormal outputs, {MEAN_OUTPUT} on average before a limit of {LIMIT} cuts them. **Variation** is their
standard deviation over their mean. A **fixed** count of clients is served in order of arrival under `vllm`,
and preempts where it was too bold; counts are multiples (in brackets) of memory / (prompt + mean output), and
the worst case is memory / (prompt + limit). The best fixed count was chosen afterwards, on these very cases:
who fixes one in advance does no better. With *5 % free* it also has vLLM's watermark. **Online** policies
have {MOST_CLIENTS} clients and admit by memory, which is what `process.caps` and `process.reserves` let an
agent decide:

{{ways}}

The watermark was not tuned here: 0.05 is where vLLM's published table has its best throughput. `sglang`
prefills in stages of its own, the others mix them with decoding. Where lengths are unknown each is predicted
at the mean of all. Changes of the makespan in percent against the best fixed count, paired by case, with 95 %
Student-t intervals; at variation 0 nothing is drawn, and all cases are the same.
"""


def report(rows: Rows, command: str) -> str:
    """Return clients.md."""
    ways = "\n".join(f"- `{name}`: {words};" for name, words in ONLINE.items())
    parts = [
        "# How many clients?\n",
        f"`{command}`\n",
        INTRODUCTION.format(ways=f"{ways[:-1]}."),
        f"{len(rows.seeds)} cases of each row, seeds {rows.seeds[0]} … {rows.seeds[-1]}.\n",
        findings(rows),
        "![Makespan by count](clients.png)\n",
        f"## Makespan\n\n{to_markdown(makespan_table(rows))}",
        "## How many ran, and preemptions\n\nRequests that decode, on average / preemptions of a case.\n",
        to_markdown(running_table(rows)),
    ]
    return "\n".join(parts)


def picture(rows: Rows) -> bytes:
    """Return a PNG: makespan by fixed count, online policies as lines; a panel a setting."""
    lines = len(rows.settings) // len(VARIATIONS)
    figure = Figure(figsize=(15.0, 1.4 + 2.7 * lines), dpi=100, layout="constrained")
    grid = figure.subplots(lines, len(VARIATIONS), squeeze=False)
    for axes, setting in zip(grid.flat, rows.settings, strict=True):
        base = rows.fixed(setting, rows.best(setting))
        means = [float((rows.fixed(setting, f) / base).mean()) for f in FACTORS]
        axes.plot(FACTORS, means, "o-", color="black", label="fixed count", linewidth=1.5)
        free = [float((rows.fixed(setting, f, name=FIXED_FREE) / base).mean()) for f in FACTORS]
        axes.plot(FACTORS, free, "s--", color="grey", label="fixed, 5 % free", linewidth=1.2)
        for k, name in enumerate(ONLINE):
            for lengths, style in (("known", "-"), ("unknown", ":")):
                if lengths == "unknown" and name not in BY_LENGTHS:
                    continue
                level = float((rows.online(setting, name, lengths) / base).mean())
                label = name + (", lengths unknown" if lengths == "unknown" else "")
                axes.axhline(level, color=f"C{k}", linestyle=style, label=label, linewidth=1.4)
        axes.set_title(
            f"{setting.memory:,} tokens, variation {setting.variation:g}", loc="left", fontsize=10
        )
        axes.grid(alpha=0.25)
    for axes in grid[-1]:
        axes.set_xlabel("fixed count ×\n(prompt + mean output) / memory")
    for line in grid:
        line[0].set_ylabel("makespan / best fixed")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *(handles, labels), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return to_png(figure)
