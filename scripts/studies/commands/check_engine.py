"""Policies on a real engine beside the simulator: iterations, tokens, makespans.

On the clock of the cost model the engine must run what the simulator runs by itself; that is the check.
Makespans are predicted from a grid of iterations in the same lockstep; they are reported, as is the twin's
time, and depend on the machine. Lockstep runs are repeated, each with requests of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import numpy as np
import pandas as pd

from servegym.engines.calibration import Fit, cost_section, fit_costs, read_log, table_of
from servegym.engines.iterations import simulate
from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.task.config import TaskConfig
from servegym.studies import anew
from servegym.studies.cli import check_number, command_line, parse
from servegym.studies.engines.equality import (
    SETTINGS,
    Row,
    equality_table,
    from_table,
    open_rows,
    run_setting,
    to_table,
)
from servegym.studies.engines.grid import Grid
from servegym.studies.engines.held_out import (
    Calibration,
    costs_line,
    fitted_policies,
    in_one_lockstep,
    quality_table,
    run_all,
    with_costs,
)
from servegym.studies.engines.loads import engine_policy, engine_task, uniform_load
from servegym.studies.engines.makespans import (
    MOST_RUNS,
    errors_of,
    medians_table,
    open_runs,
    request_seed,
    run_rows,
    stages_table,
    verdict,
)
from servegym.studies.speed import commit, machine

HELD_OUT: Final = ("fcfs", "threshold-4", "lookahead", "aligned", "hybrid", "ppo", "static")
TIMED: Final = ("fcfs", "hybrid", "ppo")
SLOTS: Final = 16
"""Of the engines whose makespans are predicted."""

PROMPTS, OUTPUTS = (20, 120), (20, 200)
"""Tokens of their requests: from, to."""

EQUALITY, LOG, MAKESPANS = "equality.csv", "iterations.csv", "makespans.csv"
"""What an interrupted run goes on with."""


@dataclass(frozen=True)
class Args:
    """Check that engine and simulator agree; writes engine.md, engine.toml and the rows behind them."""

    requests: int = 24
    """Requests of each run whose iterations are compared."""
    clients: int = 12
    """Slots of those engines."""
    held_out_requests: int = 64
    """Requests of each run whose makespan is predicted, on 16 slots."""
    repeats: int = 3
    """Lockstep runs of these, each with fresh requests; pages show medians over them."""
    seed: int = 2
    """Of all draws. What is fitted, and how, was settled in sight of the requests of seeds 0 and 1."""
    output: Path = Path("results/engine")
    """Folder for the results. An interrupted run goes on, a finished one starts anew."""

    def __post_init__(self) -> None:
        check_number("--requests", self.requests, 2, 1000)
        check_number("--clients", self.clients, 2, 256)
        check_number("--held-out-requests", self.held_out_requests, 2, 1000)
        check_number("--repeats", self.repeats, 1, MOST_RUNS)
        check_number("--seed", self.seed, 0, 2**32)


def compare_iterations(model: Any, args: Args, settings: Sequence[Any] = SETTINGS) -> list[Row]:
    """Serve under all settings and policies that have not been served yet; return all rows."""
    with open_rows(args.output / EQUALITY) as table:
        for setting in settings:
            left = table.missing([(setting.name, policy) for policy in setting.policies])
            todo = replace(setting, policies=tuple(policy for _, policy in left))
            for row in run_setting(model, todo, args.requests, args.clients, args.seed):
                table.add([to_table(row)])
                print(
                    f"{row.setting}, {row.policy}: {'equal' if row.same else 'DIFFERS'}", flush=True
                )
    return [from_table(row) for row in table.rows]


def calibration(model: Any, task: TaskConfig, args: Args, run: int) -> Calibration:
    """Return a new grid, and requests like those held out, but other ones."""
    seed = args.seed + 2 + 10 * run
    load = uniform_load(args.held_out_requests, 1000, seed + 7, PROMPTS, OUTPUTS)
    grid = Grid(model, task, SLOTS, PROMPTS[1], seed=seed, rounds=1)  # prefills alone are fitted
    return Calibration(model, task, grid, load)


def fitted(log: pd.DataFrame) -> Fit:
    """Return costs of an engine that packs a batch into one row, of prefills as of decode rounds."""
    return fit_costs(log, rounds="batch")


def predict_makespans(model: Any, args: Args) -> pd.DataFrame:
    """Make the lockstep runs that have not been made yet; return the rows of all."""
    with open_runs(args.output / MAKESPANS) as table:
        left = table.missing(range(args.repeats))
        if left:
            task = engine_task("GSM8K-v0", SLOTS, args.held_out_requests)
            print("running the grid", flush=True)
            before = Grid(model, task, SLOTS, PROMPTS[1], repeats=1, seed=args.seed)
            run_all({"the grid": before})
            seen = with_costs(task, fitted(table_of(before.iterations)))
        for run in left:
            print(f"policies and grid in lockstep, {run + 1} of {args.repeats}", flush=True)
            seed = request_seed(args.seed, run)
            load = uniform_load(args.held_out_requests, 1000, seed, PROMPTS, OUTPUTS)
            again = calibration(model, seen, args, run)
            _, held, log = in_one_lockstep(
                model, seen, again, load, HELD_OUT, args.seed, run, fitted=fitted
            )
            if run == 0:
                write_file(args.output / LOG, log.round(6).to_csv(index=False))
            table.add(run_rows(run, seed, os.getloadavg()[0], held))
            table.save()
    # From the file: the same after any number of interruptions.
    return open_runs(args.output / MAKESPANS).frame()


def twin_milliseconds(repeats: int = 5) -> dict[str, float]:
    """Return the CPU time of twin and policy in an iteration, the engine a loop that does nothing."""
    task = engine_task("GSM8K-v0", SLOTS, 64)
    load = uniform_load(64, 1000, 0, PROMPTS, OUTPUTS)
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


def report(args: Args, rows: Sequence[Row], runs: pd.DataFrame, parts: dict[str, str]) -> str:
    """Return engine.md."""
    equal = sum(row.difference is None for row in rows)
    bits = sum(not row.unequal for row in rows)
    iterations = sum(row.iterations for row in rows)
    tokens, asked = sum(row.tokens_equal for row in rows), sum(row.requests for row in rows)
    policies = len({row.policy for row in rows})
    seeds, loads = sorted(set(runs["seed"])), runs["load"]
    count = "one run" if len(seeds) == 1 else f"each of {len(seeds)} runs"
    drawn = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} … {seeds[-1]}"
    intro = (
        f"In {count}, costs are fitted to other requests under {' and '.join(fitted_policies(SLOTS))}, "
        "which no row has, and to prefills of a grid (batches of equal prompts), all in the same lockstep. "
        "Policies go by costs of a grid before. Predicted are the simulator's own "
        f"iterations on the true lengths: {args.held_out_requests} requests on {SLOTS} slots, prompts of "
        f"{PROMPTS[0]} … {PROMPTS[1]}, outputs of {OUTPUTS[0]} … {OUTPUTS[1]} tokens, fresh ones in each "
        f"run ({drawn}), as is the order in which those go on who are equally far. Measured is CPU time "
        "of the process, without the twin; wall time, beside it, meets whatever else runs on the machine, "
        f"whose load was {loads.min():.1f} … {loads.max():.1f}, this process included. Errors are "
        "predicted less measured: the median over runs, and the least and the largest."
    )
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

{fill(intro, 110)}

**Blind.** What is fitted and in which form was settled on other requests, in sight of their errors: seeds
1000000 … 1000002 of `--seed 0`, two trial runs, and 1001000 … 1001002 of `--seed 1`. Those were blind until
`static` missed there by 3.7 %; then B · kv and threshold-15 came in. No row of another `--seed` had a part.

{fill(verdict(errors_of(runs)), 110)}

{medians_table(runs)}

Where the errors come from: CPU seconds of decode rounds and of prefills, and what the errors of each make of
the makespan, in percent of it; medians over runs.

{stages_table(runs)}

The fit of the first run, by CPU time: {parts["costs"]}

{parts["quality"]}

{fill(parts["terms"], 110)}

## The twin

{parts["twin"]}
"""


def terms_line(fit: Fit) -> str:
    """Return what the terms of a fit mean."""
    none = "" if fit.decode.per_client_kv_token > 0 else ", of which this fit has none"
    return (
        "T, p: prompt tokens of the stage, of a request; B, kv: clients and cached tokens. The engine packs "
        "a batch into one dense row, so that a prefill may pay for T² (`per_batch_token_squared`) and a "
        f"decode round for B·kv (`per_client_kv_token`{none}). What a cached token costs grows with how "
        "many there are: fits hold near the rounds that they are fitted to, and these are a workload's, "
        "under policies that let half or nearly all clients idle. A grid's rounds, short and of few tokens, "
        "are not fitted: with them ratios missed by up to 2.3 points."
    )


def write_page(args: Args, rows: Sequence[Row], runs: pd.DataFrame, transformers: str) -> None:
    """Write what is made from the rows, engine.md at last."""
    log = read_log(args.output / LOG)
    fit, twin = fitted(log), twin_milliseconds()
    alone = ", ".join(f"{name} {value:.3f}" for name, value in twin.items())
    medians = runs.groupby("policy", sort=False)["twin_ms"].median()
    beside = ", ".join(f"{name} {value:.3f}" for name, value in medians.items())
    parts = {
        "machine": machine_line(transformers),
        "costs": costs_line(fit),
        "terms": terms_line(fit),
        "quality": quality_table(log),
        "twin": (
            "Milliseconds an iteration, twin and policy, compiled; the aim is 0.1. CPU time beside an engine "
            f"that\ndoes nothing: {alone}. Median wall time beside the model, which\npushes it out of the "
            f"caches: {beside}."
        ),
    }
    toml = f"# scripts/check_engine.py\n[cluster]\nclients = {SLOTS}\n\n{cost_section(fit.costs)}"
    write_file(args.output / "engine.toml", toml)
    text = report(args, rows, runs, parts)
    write_file(args.output / "engine.md", text)
    print(text)
    print(f"wrote {args.output / 'engine.md'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, compare and write; 1 if an iteration, a record or a token differs."""
    args = parse(Args, argv)
    from servegym.engines.huggingface import check_installed, tiny_llama, use_threads

    transformers = check_installed()
    with locked(args.output):
        depends = {name: value for name, value in vars(args).items() if name != "output"}
        depends |= {"transformers": transformers, "commit": commit()}
        anew.begin(args.output, depends, (EQUALITY, LOG, MAKESPANS))
        use_threads(1)
        model = tiny_llama(args.seed)
        rows = compare_iterations(model, args)
        runs = predict_makespans(model, args)
        write_page(args, rows, runs, transformers)
        anew.end(args.output)
    return 0 if all(row.same for row in rows) else 1
