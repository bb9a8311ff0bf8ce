"""How far studies on a cluster scale: two local workers measured, 1, 10 and 100 nodes simulated."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from servegym.envs.errors import ServegymError
from servegym.envs.files import read_json, write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.playing.locks import locked
from servegym.envs.playing.summary import fixed, to_markdown
from servegym.envs.playing.tables import Schema, read_rows
from servegym.studies.cli import check_number, command_line, parse, read_list
from servegym.studies.nodes import NODES, WORKS, Costs, costs_of, plan, saturation
from servegym.studies.nodes_measured import POLICIES, TASK, measure, ratio_of, speed_up

PARTS: Final = ("measure", "plan")
MEASURED: Final = "measured.json"
RUNS: Final = "speed_up.csv"
EFFICIENT: Final = 0.9
"""Share of all workers' time that is to be spent on calls."""

MOST_NODES: Final = 128

_RUNS: Final = Schema(
    ("repeat", "workers", "cases", "seconds", "others"), key=("repeat", "workers"),
    whole=("repeat", "workers", "cases"),
)  # fmt: skip

MEASURED_TEXT: Final = """## Measured

Two local workers of dask, one thread each, on a machine of {processors} processors: {ratio} × one worker, the
median of {pairs} pairs of runs in turn ({range}). The study, {policies} on {cases} cases of
{task}, takes {seconds} s on one worker. Meanwhile other processes kept {others} processors busy on
average: what they take, the second worker lacks first. All runs gave the same rows.
A batch costs {batch} ms from end to end, of which {driver} ms are the driver's; a call that does nothing
costs {call} ms, while other processes kept {batch_others} processors busy.
"""

TEXT: Final = """# Studies on many nodes

`{command}`

{measured}
## Simulated

Nodes of {cores} workers; a study that keeps all of them busy for {hours} h, of {most} calls at most.

{table}
Most nodes, of 1, 2, 4 … {most_nodes}, on which such a study spends {efficient} of all workers' time on calls:

{limits}
Seconds that were simulated:

{costs}"""


@dataclass(frozen=True)
class Args:
    """Measure two local workers and simulate many; writes measured.json, speed_up.csv, plan.csv, plan.md."""

    parts: str = ",".join(PARTS)
    """Comma-separated: measure (costs of a batch and a row; the same study on one local worker and on
    two; needs the extra cluster), plan (the simulation, with what was measured)."""
    cases: int = 0
    """Cases of the measured study; 0: as many as one worker plays in --seconds."""
    seconds: float = 70.0
    """See --cases."""
    repeats: int = 5
    """Runs of it on one worker, and on two, in turn."""
    cores: int = 32
    """Workers of a simulated node."""
    hours: float = 1.0
    """How long a simulated study is to keep all workers busy."""
    most_calls: int = 1_000_000
    """Most calls of a simulated study: a table of more rows is seldom wanted."""
    output: Path = Path("results/nodes")
    """Folder for the results."""

    def __post_init__(self) -> None:
        check_number("--cases", self.cases, 0, HELD_OUT_SEED)
        check_number("--seconds", self.seconds, 1, 86_400)
        check_number("--repeats", self.repeats, 1, 1000)
        check_number("--cores", self.cores, 1, 1024)
        check_number("--hours", self.hours, 0.01, 100)
        check_number("--most-calls", self.most_calls, 1, 10_000_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate and write."""
    args = parse(Args, argv)
    parts = read_list("--parts", args.parts, PARTS)
    with locked(args.output):
        if "measure" in parts:
            measured = measure() | {"processors": float(os.cpu_count() or 1)}
            write_file(args.output / MEASURED, json.dumps(measured, indent=2) + "\n")
            runs = speed_up(args.cases, args.repeats, args.seconds)
            write_file(args.output / RUNS, runs.round(3).to_csv(index=False))
        if "plan" in parts:
            text = report(args)
            write_file(args.output / "plan.md", text)
            print(text)
    return 0


def report(args: Args) -> str:
    """Simulate and return plan.md; writes plan.csv."""
    costs, notes = _costs(args.output / MEASURED)
    table = plan(NODES, args.cores, args.hours, costs, args.most_calls)
    write_file(args.output / "plan.csv", table.to_csv(index=False, float_format="%.6g"))
    command = command_line(
        "study_nodes",
        parts=args.parts,
        cores=args.cores,
        hours=args.hours,
        most_calls=args.most_calls,
    )
    shown = pd.DataFrame([_row(row) for row in table.to_dict("records")])
    limits = [
        {
            "study": work.name,
            "nodes": _limit(
                saturation(
                    work, args.cores, args.hours, costs, args.most_calls, EFFICIENT, MOST_NODES
                )
            ),
        }
        for work in WORKS
    ]
    return TEXT.format(
        command=command,
        measured=_measured_text(args.output / RUNS, notes),
        cores=args.cores,
        hours=f"{args.hours:g}",
        most=f"{args.most_calls:,}",
        table=to_markdown(shown),
        most_nodes=MOST_NODES,
        efficient=f"{EFFICIENT:.0%}",
        limits=to_markdown(pd.DataFrame(limits)),
        costs=to_markdown(_costs_table(costs)),
    )


def _costs(path: Path) -> tuple[Costs, dict[str, Any]]:
    """Return the measured costs, or the usual ones where nothing was measured."""
    if not path.exists():
        return Costs(), {}
    measured = read_json(path)
    try:
        return costs_of(measured), dict(measured)
    except (TypeError, ValueError):
        raise ServegymError(f"{path}: damaged; make it anew with --parts measure") from None


def _measured_text(path: Path, notes: dict[str, Any]) -> str:
    if not notes or not path.exists():
        return "Nothing was measured here: the costs are the usual ones (`--parts measure` measures them).\n"
    runs = read_rows(path, _RUNS, "make it anew with --parts measure")
    middle, least, most = ratio_of(runs)
    by_workers = runs.groupby("workers")["seconds"].median()
    others = runs["others"]
    return MEASURED_TEXT.format(
        processors=int(notes["processors"]),
        ratio=f"{middle:.2f}",
        range=f"{least:.2f} … {most:.2f}",
        pairs=runs["repeat"].nunique(),
        policies=", ".join(f"`{name}`" for name in POLICIES),
        task=TASK,
        seconds=f"{by_workers[1]:.0f}",
        cases=f"{runs['cases'].iloc[0]:,}",
        others=f"{others.min():.2f} … {others.max():.2f}",
        batch=f"{1e3 * notes['batch_s']:.1f}",
        driver=f"{1e3 * notes['driver_batch_s']:.1f}",
        call=f"{1e3 * notes['call_s']:.3f}",
        batch_others=f"{notes.get('others', float('nan')):.2f}",
    )


def _row(row: dict[Any, Any]) -> dict[str, str]:
    return {
        "study": row["study"],
        "nodes": str(row["nodes"]),
        "workers": f"{row['workers']:,}",
        "calls": f"{row['calls']:,}",
        "hours": fixed(row["hours"], 2),
        "calls a day": f"{float(format(row['calls a day'], '.2g')):,.0f}",
        "speed-up": fixed(row["speed-up"], 0),
        "of the workers (%)": fixed(100 * row["efficiency"], 0),
        "driver busy (%)": fixed(100 * row["driver busy"], 0),
        "scheduler busy (%)": fixed(100 * row["scheduler busy"], 0),
        "calls a batch": fixed(row["calls a batch"], 0),
    }


def _limit(nodes: int) -> str:
    return "below 1" if nodes == 0 else f"{nodes}{' or more' if nodes == MOST_NODES else ''}"


def _costs_table(costs: Costs) -> pd.DataFrame:
    words = {
        "submit_s": "driver: pack and submit a batch",
        "result_s": "driver: take its result",
        "row_s": "driver: add a row",
        "save_row_s": "driver: write a row, each time the table is saved",
        "schedule_s": "scheduler: a batch",
        "start_s": "worker: begin a batch",
        "compile_s": "node: compile all kernels, once",
    }
    return pd.DataFrame(
        [{"what": words[name], "s": f"{value:.3g}"} for name, value in asdict(costs).items()]
    )
