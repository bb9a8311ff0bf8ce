"""Policies on a real engine beside the simulator: iterations, tokens, makespans.

On the clock of the cost model the engine must run what the simulator runs by itself; that is the check.
Makespans are predicted from a grid of iterations in the same lockstep; they are reported, as is the twin's
time, and depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.engines.calibration import cost_section, fit_costs, table_of
from servegym.engines.iterations import simulate
from servegym.envs.files import make_folder, write_file
from servegym.envs.task.config import TaskConfig
from servegym.studies.cli import check_folder, check_number, command_line, parse
from servegym.studies.engines.equality import SETTINGS, Row, equality_table, run_setting
from servegym.studies.engines.grid import Grid
from servegym.studies.engines.held_out import (
    FITTED,
    Calibration,
    HeldOut,
    costs_line,
    held_out_table,
    in_one_lockstep,
    quality_table,
    run_all,
    with_costs,
)
from servegym.studies.engines.loads import engine_policy, engine_task, uniform_load
from servegym.studies.speed import commit, machine

HELD_OUT = ("fcfs", "threshold-4", "lookahead", "aligned", "hybrid", "ppo", "static")
TIMED = ("fcfs", "hybrid", "ppo")


@dataclass(frozen=True)
class Args:
    """Check that engine and simulator agree; writes engine.md, engine.toml and the grid's iterations."""

    requests: int = 32
    """Requests of each run whose iterations are compared."""
    clients: int = 12
    """Slots of those engines."""
    held_out_requests: int = 64
    """Requests of each run whose makespan is predicted, on 16 slots."""
    seed: int = 0
    """Of all draws."""
    output: Path = Path("results/engine")
    """Folder for the results."""

    def __post_init__(self) -> None:
        check_number("--requests", self.requests, 2, 1000)
        check_number("--clients", self.clients, 2, 256)
        check_number("--held-out-requests", self.held_out_requests, 16, 1000)
        check_number("--seed", self.seed, 0, 2**32)


def calibration(model: Any, task: TaskConfig, args: Args, seed: int) -> Calibration:
    """Return a new grid, and requests like those held out, but other ones."""
    load = uniform_load(args.held_out_requests, 1000, seed + 7, (20, 120), (20, 200))
    return Calibration(model, task, Grid(model, task, 16, 120, seed=seed), load)


def twin_milliseconds(repeats: int = 5) -> dict[str, float]:
    """Return the CPU time of twin and policy in an iteration, the engine a loop that does nothing."""
    task = engine_task("GSM8K-v0", 16, 64)
    load = uniform_load(64, 1000, 0, (20, 120), (20, 200))
    found = {}
    for name in TIMED:
        times = []
        for _ in range(repeats + 1):
            policy = engine_policy(name, task)
            started = time.process_time()
            iterations, _ = simulate(task, policy, load.requests)
            times.append(1e3 * (time.process_time() - started) / len(iterations))
        found[name] = float(np.median(times[1:]))  # the first compiles
    return found


def machine_line(transformers: str) -> str:
    """Return versions and commit."""
    return f"transformers {transformers}, {machine()}, one thread; commit {commit()}."


def report(args: Args, rows: Sequence[Row], held: Sequence[HeldOut], parts: dict[str, str]) -> str:
    """Return engine.md."""
    equal = sum(row.difference is None for row in rows)
    bits = sum(not row.unequal for row in rows)
    iterations = sum(row.iterations for row in rows)
    tokens, asked = sum(row.tokens_equal for row in rows), sum(row.requests for row in rows)
    policies = len({row.policy for row in rows})
    errors = [row.predicted_cpu_s / row.cpu_s - 1 for row in held]
    first = held[0]
    ratios = [
        row.predicted_cpu_s / first.predicted_cpu_s - row.cpu_s / first.cpu_s for row in held[1:]
    ]
    options = {key: value for key, value in vars(args).items() if value != getattr(Args, key)}
    return f"""# A real engine runs the policies

`{command_line("check_engine", **options)}` (`make engine`); {parts["machine"]}

A LLaMA of 4 layers of width 256 with random weights, in transformers' continuous batching, scheduled by the
policies through the twin.

## Iterations and tokens

{equal} of {len(rows)} engine runs, under {policies} policies, are what the simulator runs by itself, in every
iteration: kind, requests and tokens ({iterations} iterations). {bits} of {len(rows)} equal `play` in all
records to the last bit. {tokens} of {asked} outputs are those of `generate`. Clock: the cost model's.
{args.requests} requests on {args.clients} slots, prompts of 10 … 80, outputs of 8 … 80 tokens. Lengths are
the engine's: the twin is told who has finished. Decisions: how often the policy is asked.

{equality_table(rows)}

## Makespans

Costs are fitted to a grid of iterations (batches of equal prompts, a few rounds each) and to other requests
under {" and ".join(FITTED)}, all in the same lockstep; no iteration of a row is fitted. Policies go by costs
of a grid before. Predicted are the simulator's own iterations on the true lengths: {args.held_out_requests}
requests on 16 slots, prompts of 20 … 120, outputs of 20 … 200 tokens. CPU time of the process, without the
twin: its errors are {min(errors):+.1%} … {max(errors):+.1%}, those of the ratios to {first.policy}
{100 * min(ratios):+.1f} … {100 * max(ratios):+.1f} points. Wall time meets whatever else runs on the machine.

{held_out_table(held)}

The fit, by CPU time: {parts["costs"]}

{parts["quality"]}

T, p: prompt tokens of the stage, of a request; B, kv: clients and cached tokens. The engine packs a batch
into one dense row, so that a prefill pays for T²; `per_batch_token_squared` says so. A decode round pays for
B · kv, which affine costs have no term for.

## The twin

{parts["twin"]}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, compare and write; 1 if an iteration, a record or a token differs."""
    args = parse(Args, argv)
    check_folder(args.output)
    from servegym.engines.huggingface import check_installed, tiny_llama, use_threads

    use_threads(1)
    model = tiny_llama(args.seed)
    make_folder(args.output)
    rows: list[Row] = []
    for setting in SETTINGS:
        for row in run_setting(model, setting, args.requests, args.clients, args.seed):
            same = row.difference is None and not row.unequal
            rows.append(row)
            print(f"{row.setting}, {row.policy}: {'equal' if same else 'DIFFERS'}", flush=True)
    task = engine_task("GSM8K-v0", 16, args.held_out_requests)
    print("running the grid", flush=True)
    before = Grid(model, task, 16, 120, repeats=1, seed=args.seed)
    run_all({"the grid": before})

    print("running it again, in lockstep with the policies", flush=True)
    load = uniform_load(args.held_out_requests, 1000, args.seed + 1, (20, 120), (20, 200))
    seen = with_costs(task, fit_costs(table_of(before.iterations)))
    again = calibration(model, seen, args, seed=args.seed + 2)
    fit, held, log = in_one_lockstep(model, seen, again, load, HELD_OUT, args.seed)
    twin = twin_milliseconds()
    alone = ", ".join(f"{name} {value:.3f}" for name, value in twin.items())
    beside = ", ".join(f"{row.policy} {row.twin_ms:.3f}" for row in held)
    parts = {
        "machine": machine_line(check_installed()),
        "costs": costs_line(fit),
        "quality": quality_table(log),
        "twin": (
            "Milliseconds an iteration, twin and policy, compiled; the aim is 0.1. CPU time beside an engine "
            f"that\ndoes nothing: {alone}. Median wall time beside the model, which\npushes it out of the "
            f"caches: {beside}."
        ),
    }
    write_file(args.output / "engine.md", report(args, rows, held, parts))
    write_file(args.output / "iterations.csv", log.round(6).to_csv(index=False))
    toml = f"# scripts/check_engine.py\n[cluster]\nclients = 16\n\n{cost_section(fit.costs)}"
    write_file(args.output / "engine.toml", toml)
    print(report(args, rows, held, parts))
    print(f"wrote {args.output / 'engine.md'}")
    same = all(
        r.difference is None and not r.unequal and r.tokens_equal == r.requests for r in rows
    )
    return 0 if same else 1
