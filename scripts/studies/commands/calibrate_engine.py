"""Fit a cost model to an engine: run a grid of iterations, or read a log of them.

The fit is by non-negative least squares on relative errors. With an engine at hand, policies then serve a
workload of which nothing was fitted, in lockstep with the grid, and their makespans are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from servegym.engines.calibration import Fit, cost_section, fit_costs, predicted_seconds, read_log
from servegym.envs.errors import ServegymError
from servegym.envs.files import read_text, write_file
from servegym.envs.playing.locks import locked
from servegym.envs.task.config import TaskConfig
from servegym.studies.cases import parse_policies
from servegym.studies.cli import check_folder, check_number, command_line, parse
from servegym.studies.engines.grid import Grid
from servegym.studies.engines.held_out import (
    Calibration,
    costs_line,
    fitted_policies,
    held_out_table,
    in_one_lockstep,
    quality_table,
    run_all,
    with_costs,
)
from servegym.studies.engines.loads import Load, engine_task, uniform_load


@dataclass(frozen=True)
class Args:
    """Fit a cost model to an engine; writes engine.toml, iterations.csv and calibration.md."""

    model: str = "tiny"
    """tiny, smollm2 or a model's folder, as in the command serve."""
    log: str = ""
    """A CSV of iterations to fit, in place of an engine: kind, requests, tokens, cached_tokens, seconds."""
    held_out_log: str = ""
    """With --log: another one, whose seconds are predicted."""
    form: Literal["best", "linear", "prompts", "batch"] = "best"
    """What prefill grows with besides its tokens T: nothing, Σp² of the prompts, or T²."""
    rounds: Literal["line", "table", "batch"] = "line"
    """What decode rounds take besides a rate per cached token kv: a line in the clients B, a table by them,
    or the line and B·kv."""
    policies: str = "fcfs,hybrid,ppo"
    """Policies whose makespans are predicted; none of their iterations is fitted. Empty: no such run."""
    clients: int = 16
    """Most clients of the grid, and those of the held-out run."""
    prompt_tokens: int = 120
    """Longest prompt of both."""
    output_tokens: int = 120
    """Longest output of the held-out run."""
    requests: int = 48
    """Requests of the held-out run."""
    repeats: int = 2
    """How often each cell of the grid is run."""
    seed: int = 0
    """Of the grid's order, of requests and prompts."""
    threads: int = 1
    """Threads of torch."""
    output: Path = Path("results/calibrated")
    """Folder for the results."""

    def __post_init__(self) -> None:
        check_number("--clients", self.clients, 2, 4096)
        check_number("--prompt-tokens", self.prompt_tokens, 8, 100_000)
        check_number("--output-tokens", self.output_tokens, 2, 100_000)
        check_number("--requests", self.requests, 1, 100_000)
        check_number("--repeats", self.repeats, 1, 1000)
        check_number("--seed", self.seed, 0, 2**32)
        check_number("--threads", self.threads, 1, 1024)
        if self.held_out_log and not self.log:
            raise ServegymError("--held-out-log needs --log")


def from_log(args: Args) -> tuple[Fit, str, str]:
    """Fit a log; return the fit, what is to be said of it, and the log as it was."""
    log = read_log(Path(args.log))
    fit = fit_costs(log, args.form, args.rounds)
    parts = [quality_table(log), costs_line(fit)]
    if args.held_out_log:
        other = read_log(Path(args.held_out_log))
        if fit.form == "prompts" and "prompt_squares" not in other:
            raise ServegymError(
                f"{args.held_out_log}: no column prompt_squares, which the fit needs"
            )
        whole_s, said_s = other["seconds"].sum(), predicted_seconds(fit.costs, other).sum()
        parts.append(
            f"Held out: {len(other)} iterations took {whole_s:.4g} s, predicted are {said_s:.4g} s "
            f"({said_s / whole_s - 1:+.1%})."
        )
    return fit, "\n\n".join(parts), read_text(Path(args.log))


def from_engine(args: Args, names: Sequence[str]) -> tuple[Fit, str, str]:
    """Run the grid and the policies; return the fit, what is to be said of it, and the grid's log."""
    from servegym.engines.huggingface import load_model, use_threads

    use_threads(args.threads)
    model, _ = load_model(args.model, args.seed)
    task = engine_task("GSM8K-v0", args.clients, args.requests)
    shortest = max(1, args.prompt_tokens // 6), max(1, args.output_tokens // 10)

    def requests(seed: int) -> Load:
        prompts, outputs = (shortest[0], args.prompt_tokens), (shortest[1], args.output_tokens)
        return uniform_load(
            args.requests, int(model.config.vocab_size), args.seed + seed, prompts, outputs
        )

    def fitted(log: pd.DataFrame) -> Fit:
        return fit_costs(log, args.form, args.rounds)

    def calibration(task: TaskConfig, seed: int) -> Calibration:
        most = args.clients, args.prompt_tokens
        grid = Grid(model, task, *most, repeats=args.repeats, seed=args.seed + seed, rounds=1)
        return Calibration(model, task, grid, requests(seed + 7))

    print("running the grid", flush=True)
    before = calibration(task, 0)
    run_all(before.parts())
    log = before.log()
    fit = fitted(log)
    if not names:
        return fit, f"{quality_table(log)}\n\n{costs_line(fit)}", log.to_csv(index=False)
    print("running it again, in lockstep with the policies", flush=True)
    task = with_costs(task, fit)
    fit, rows, again = in_one_lockstep(
        model, task, calibration(task, 2), requests(1), names, args.seed, fitted=fitted
    )
    text = (
        f"{quality_table(again)}\n\n{costs_line(fit)}\n\nFitted: prefills of a grid, and other requests "
        f"under {' and '.join(fitted_policies(args.clients))}.\nHeld out: {args.requests} requests of "
        f"{shortest[0]} … {args.prompt_tokens} prompt and {shortest[1]} … {args.output_tokens} output "
        "tokens, in the same lockstep. Predicted are the simulator's own iterations.\n\n"
        f"{held_out_table(rows)}"
    )
    return fit, text, again.to_csv(index=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, predict, print and write."""
    args = parse(Args, argv)
    names = parse_policies(args.policies, "GSM8K-v0") if args.policies and not args.log else []
    check_folder(args.output)
    options = {key: value for key, value in vars(args).items() if value != getattr(Args, key)}
    command = command_line("calibrate_engine", **options)
    with locked(args.output):
        fit, text, log = from_log(args) if args.log else from_engine(args, names)
        # Of a log, too: the folder holds what was fitted, and nothing of an earlier run.
        write_file(args.output / "iterations.csv", log)
        words = "seconds as logged" if args.log else f"CPU seconds of {args.model}"
        head = f"# {command}\n# {words}\n[cluster]\nclients = {args.clients}\n\n"
        write_file(args.output / "engine.toml", head + cost_section(fit.costs))
        page = f"# Costs of an engine\n\n`{command}`\n\n{text}\n"
        write_file(args.output / "calibration.md", page)
    print(text)
    print(f"wrote {args.output / 'engine.toml'}, which --task takes, and calibration.md beside it")
    return 0
