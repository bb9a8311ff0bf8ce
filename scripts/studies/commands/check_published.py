"""Published figures of real engines beside the simulator: watermark, recomputation, memory, mixed passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from servegym.envs.files import make_folder, write_file
from servegym.studies.checks.capacities import CAPACITIES
from servegym.studies.checks.published import (
    MEMORY_CASES,
    PUBLISHED_SAVING,
    PUBLISHED_TAX,
    PUBLISHED_WATERMARKS,
    TAX_BLOCKS,
    TAX_CASES,
    TAX_REQUESTS,
    Watermark,
    recompute_tax,
    service_rate,
    watermark_row,
)
from servegym.studies.checks.recomputing import (
    EACH,
    WASTED,
    WASTED_LEAST,
    try_workload,
    workloads,
)
from servegym.studies.cli import check_number, command_line, parse

REQUESTS = 3000  # of a memory case

WATERMARK = """vLLM's pull request 44594: Qwen2.5-7B on a GB200, 299,584 tokens of memory, prompts of
about 1000 and outputs of about 5000 tokens ± 20 %, 450 requests of 128 users who ask again once they are
answered, budget 8192. Ours is the mean of {seeds} draws of the lengths, ± the standard deviation between
draws: what one run may be off by.

128 clients and all requests at t = 0 stand for the users. It is the same schedule: whoever is preempted
waits at the front, and a new request is admitted only once somebody has finished. Times to first token
count from when its user would have asked. AISimulate, replayed with users, preempts as often and ends at
the same time (`tests/test_aisimulate.py`).

**Preemptions depend on no seconds.** Those are a guess: 10 µs a token, 5 ns a cached token, and a base
that is fitted to the published tokens per second at 0.05."""

WATERMARK_READING = """What agrees: preemptions, within two standard deviations; tokens per second,
lowest without a watermark and highest at 0.05; end to end within 3 %; the 99th percentile to first token
within 11 %. The 99th percentile of the gap between tokens falls by more than half with the first
watermark, as published.

What does not: that percentile is higher here without a watermark and lower with one. At 0.05 and 0.10
fewer than one token in a hundred comes from a pass that computes prompts, so it is that of plain passes;
the real engine has others that are slow. Its median times to first token at 0.02 and 0.05 are higher
than ours."""

TAX = """vLLM's issue 54644, a 0.5B model and 300 requests offline: recomputed tokens as a share of all
computed ones, and how many fewer are recomputed if the victim is the request with the fewest computed
tokens. **Its lengths and number of clients are not told**, nor whether decoded tokens count as computed.
So this is no confirmation: of 900 workloads that were tried it shows the nearest to either column. Means
of {seeds} draws."""

SEARCH = """**By what it does tell.** With 400 blocks 623,948 tokens were recomputed, 415 by preemption,
and with the least computed as victim 354,882, 261 by preemption. If these are 78.8 % of all that was
computed, each of the 300 requests had {each} tokens, and was preempted five times. Of {count} workloads
with so many tokens (a tenth to nine tenths of them prompt, ± 0 or 90 %; 64 or 256 clients; budgets of
8192, 512 and 128 tokens; one draw each) these come nearest to the published tax and to the published
saving; taxes are of all tokens."""

SEARCH_READING = """Reached, by a workload chosen for it: the saving, within nine points at each memory; a
preemption of the newest then loses about as many tokens as published. **Not reached: the tax.** At 400
blocks no workload passed {most:.0%}, and none recomputed a quarter of the published tokens: in the
workload nearest to the saving a request is preempted {rate:.1f} times, not five. What preempted them so
often there is not told. So the order of both victims is confirmed, and that the tax rises with scarcity;
its size is not."""

TAX_READING = """What agrees: the tax rises with scarcity and flattens, and where prompts are long and
unlike, choosing the least computed saves 35 to 50 %. What does not: no workload that was tried gives both
columns. As a share of what prefills compute the tax comes within 11 points everywhere; as a share of all
tokens, which is how the issue seems to count, it never passed 46 %."""

MEMORY = """Nie, Si and Zhou (2605.04595): a memory of M tokens serves μ = M / (b · E[g]) requests a
second, with b the mean seconds of a pass and g the token-passes that a request holds. They report
agreement to about 10 % with vLLM on eight replicas, prompts eight times as long as outputs. Here one
replica under `vllm`, costs of llama3-8b-a100x1, {requests} requests present at once, so that memory is
always full; the rate is that of the middle 60 % of finishes, b is measured."""

MIXED = """Li, Dai and Peng (2504.07347): passes of at most b tokens that take t seconds bear
b / (t (m_p + m_d)) requests a second if they mix prompts and decodes; prefill-first bears less. The same
requests (prompts of 20, a geometric number of rounds, 100 on average), passes of 256 tokens, {requests}
arrivals. The columns say how many of them are in system at the last arrival; overload must leave
1 − 1 / load."""


@dataclass(frozen=True)
class Args:
    """Serve workloads of published figures, and tabulate both."""

    seeds: int = 20
    """Draws of the lengths."""
    requests: int = 200_000
    """Requests of the last table's rows."""
    output: Path = Path("results/checks")
    """Folder for published.md."""

    def __post_init__(self) -> None:
        check_number("--seeds", self.seeds, 2, 10_000)
        check_number("--requests", self.requests, 10_000, 10_000_000)


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("seeds", "requests", "output")}
    return command_line("check_published", **asked)


def watermark_lines(seeds: int) -> list[str]:
    """Two lines a watermark: theirs, ours."""
    digits = {"preemptions": 0, "tokens_per_s": 0}
    names = [item.name for item in fields(Watermark)][1:]
    lines = [
        "| watermark | | preemptions | tokens/s | TTFT p50 (s) | p99 | gap p99 (ms) | E2E p50 (s) |",
        "|:--|:--|" + "--:|" * len(names),
    ]
    for theirs in tqdm(PUBLISHED_WATERMARKS, desc="watermarks"):
        ours = [watermark_row(theirs.watermark, seed) for seed in range(seeds)]
        cells, published = list[str](), list[str]()
        for name in names:
            values = np.array([getattr(row, name) for row in ours])
            places = digits.get(name, 1)
            cells.append(f"{values.mean():.{places}f} ± {values.std(ddof=1):.{places}f}")
            published.append(f"{getattr(theirs, name):.{places}f}")
        lines.append(f"| {theirs.watermark} | published | {' | '.join(published)} |")
        lines.append(f"| | servegym | {' | '.join(cells)} |")
    return lines


def tax_lines(seeds: int) -> list[str]:
    """One line a memory size: published, then for each workload both shares and the saving."""
    heads = "".join(f" {case.name}: of prefills | of all | saved |" for case in TAX_CASES)
    lines = [
        f"| blocks | published tax | published saving |{heads}",
        "|--:|--:|--:|" + "--:|" * (3 * len(TAX_CASES)),
    ]
    for place, blocks in enumerate(tqdm(TAX_BLOCKS, desc="taxes")):
        saved = f"{PUBLISHED_SAVING[place]:.0%}" if place else "–"
        cells = [str(blocks), f"{PUBLISHED_TAX[place]:.1%}", saved]
        for case in TAX_CASES:
            newest, least = (
                [recompute_tax(case, blocks, victim, seed) for seed in range(seeds)]
                for victim in ("newest", "least-computed")
            )
            cells.append(f"{np.mean([tax.of_prefills for tax in newest]):.1%}")
            cells.append(f"{np.mean([tax.of_all for tax in newest]):.1%}")
            before, after = (sum(tax.again for tax in taxes) for taxes in (newest, least))
            cells.append(f"{1 - after / before:.0%}" if before else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tax_workloads() -> list[str]:
    """Say what each workload is."""
    return [
        f"- {case.name}: prompts {case.prompt} ± {case.prompt_spread:.0%}, outputs {case.output} ± 50 %, "
        f"{case.clients} clients, budget 8192."
        for case in TAX_CASES
    ]


def search_parts() -> list[str]:
    """Return the search by what the issue tells: what it is, a table, how to read it."""
    found = [try_workload(workload, 0) for workload in tqdm([*workloads()], desc="workloads")]
    nearest = [min(found, key=lambda each: each.off), min(found, key=lambda each: each.off_saving)]
    heads = ("prompts", "outputs", "clients", "budget")
    names = [
        *heads,
        *(f"tax at {n}" for n in TAX_BLOCKS),
        *(f"saved at {n}" for n in TAX_BLOCKS[1:]),
    ]
    names += ["recomputed at 400", "by preemption", "least computed", "by preemption"]
    rows = [["published, not told", "", "", "", *(f"{tax:.0%}" for tax in PUBLISHED_TAX)]]
    rows[0] += [*(f"{saved:.0%}" for saved in PUBLISHED_SAVING[1:]), f"{WASTED}", "415"]
    rows[0] += [f"{WASTED_LEAST}", "261"]
    for each in nearest:
        (prompts, outputs), (again, least) = each.spreads, each.again
        row = [f"{each.prompt} ± {prompts:.0%}", f"{each.output} ± {outputs:.0%}"]
        row += [str(each.clients), str(each.budget), *(f"{tax:.0%}" for tax in each.tax)]
        row += [f"{saved:.0%}" for saved in each.saving[1:]]
        own, other = each.a_preemption
        rows.append([*row, str(again), f"{own:.0f}", str(least), f"{other:.0f}"])
    lines = [names, ["--:"] * len(names), *rows]
    again, lost = nearest[1].again[0], nearest[1].a_preemption[0]
    reading = SEARCH_READING.format(
        most=max(each.tax[-1] for each in found), rate=again / lost / TAX_REQUESTS
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return [SEARCH.format(each=EACH, count=len(found)), table, reading]


def memory_lines() -> list[str]:
    """One line a case."""
    lines = [
        "| requests | memory (tokens) | prompts | outputs | μ (per s) | served | served / μ | recomputed |",
        "|:--|" + "--:|" * 7,
    ]
    for place, case in enumerate(tqdm(MEMORY_CASES, desc="memories")):
        rng = np.random.default_rng([7, place])
        known, rate, again = service_rate(case, REQUESTS, rng)
        capacity = case.task.cluster.kv_capacity_tokens
        prompts, outputs = (f"{low} … {high}" for low, high in (case.prompts, case.outputs))
        lines.append(
            f"| {case.name} | {capacity} | {prompts} | {outputs} | {known:.3f} | {rate:.3f} | "
            f"{rate / known:.3f} | {again:.1%} |"
        )
    return lines


def mixed_lines(requests: int) -> list[str]:
    """One line a load: in system at the end, mixed passes and prefill-first."""
    mixed, either_or = CAPACITIES[0], CAPACITIES[2]
    bears = (
        f"Mixed passes bear {mixed.rate:.2f} requests a second, prefill-first {either_or.rate:.2f} "
        f"({either_or.rate / mixed.rate:.1%}):\nJ p / (t (1 + q)), with all J clients busy and q the share "
        "of rounds in which anybody finishes."
    )
    lines = [
        bears,
        "",
        "| arrivals, of what mixed passes bear | mixed | must leave | prefill-first | must leave |",
        "|--:|" + "--:|" * 4,
    ]
    for place, load in enumerate((0.60, 0.65, 0.98, 1.02)):
        cells = list[str]()
        for capacity in (mixed, either_or):
            own = load * mixed.rate / capacity.rate
            left, _ = capacity.left_over(own, requests, np.random.default_rng([8, place]))
            cells += [f"{left:.2%}", f"{max(0.0, 1 - 1 / own):.2%}"]
        lines.append(f"| {load} | {' | '.join(cells)} |")
    return lines


def report(args: Args) -> str:
    """Return published.md."""
    parts = [
        "# Published figures beside the simulator",
        f"`{command_of(args)}`",
        "## A watermark against preemption",
        WATERMARK.format(seeds=args.seeds),
        "\n".join(watermark_lines(args.seeds)),
        WATERMARK_READING,
        "## What preemption computes again",
        TAX.format(seeds=args.seeds),
        "\n".join(tax_workloads()),
        "\n".join(tax_lines(args.seeds)),
        TAX_READING,
        *search_parts(),
        "## What a memory serves",
        MEMORY.format(requests=REQUESTS),
        "\n".join(memory_lines()),
        "## Mixed passes and prefill-first",
        MIXED.format(requests=args.requests),
        "\n".join(mixed_lines(args.requests)),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, tabulate and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    text = report(args)
    write_file(args.output / "published.md", text)
    print(text)
    return 0
