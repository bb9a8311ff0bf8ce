"""Play policies on the same held-out cases; write one row per episode and a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from servegym.baselines.exact.optima import TooLargeError, find_optima
from servegym.baselines.registry import policy_descriptions
from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.machine.links import LINKS
from servegym.envs.machine.presets import COST_PRESETS
from servegym.envs.playing.evaluation import (
    check_policies,
    evaluate,
    make_case,
    read_best_known,
    read_service,
)
from servegym.envs.playing.identity import claim_task
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS, Workers
from servegym.envs.playing.remarks import remarks
from servegym.envs.playing.service import Window, chosen_rows, service_table
from servegym.envs.playing.signatures import warnings
from servegym.envs.playing.summary import summarise, to_markdown
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import TASKS, load_task
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.vocabulary import ADMISSION_GUARDS, MIGRATIONS, ORDERS, ROUTERS, VICTIMS
from servegym.envs.workload.arrivals import PROCESSES
from servegym.envs.workload.cells import SUFFIXES, is_file
from servegym.envs.workload.formats import FORMATS
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.envs.workload.sources import describe_file
from servegym.studies.cases import parse_policies, parse_seeds
from servegym.studies.cli import command_line, parse
from servegym.studies.policies import DESCRIPTIONS, make_policy, note_agents
from servegym.studies.workers import open_workers


@dataclass(frozen=True)
class Args:
    """Play policies on the same cases; writes episodes.csv and summary.md."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML."""
    policies: str = "random,fcfs,offline-steal,hybrid,threshold-12,lookahead,aligned"
    """Comma-separated names or folders of trained agents; see --list-policies."""
    seeds: str = "1000000:1000010"
    """FIRST:AFTER_LAST, or one seed. Held-out seeds begin at 1000000."""
    output: Path = Path("results/evaluation")
    """Folder for the results; episodes that stand in it are not played again."""
    workload: str = ""
    """A workload file to play in place of the task's own; see --list-workloads."""
    reference: str = "hybrid"
    """Policy that the summary's paired differences are taken from."""
    optimum_limit: float = 10.0
    """Seconds to look for the exact optimum of a case, where a task is small; 0: not at all."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""
    records: bool = False
    """Also write when and where each request was served, to records/POLICY-SEED.csv in the folder."""
    warmup_s: float = 0.0
    """Arrivals of the first seconds count in no figure of the table of service, which service.csv holds."""
    cooldown_s: float = 0.0
    """Nor do those of so many seconds before the last arrival."""
    list_policies: bool = False
    """List the policies and stop."""
    list_costs: bool = False
    """List the cost presets with their fit and source and stop."""
    list_workloads: bool = False
    """List the workload presets, the trace files that can be read and the arrival processes, and stop."""
    list_tasks: bool = False
    """List the registered tasks and stop."""
    list_routers: bool = False
    """List what may send requests to replicas (cluster.router) and stop."""
    list_victims: bool = False
    """List who may give up memory (cluster.preempt) and stop."""
    list_guards: bool = False
    """List what admission may look at in memory (cluster.admission_guard) and stop."""
    list_orders: bool = False
    """List what the rule ``shortest`` may go by (cluster.shortest_by) and stop."""
    list_migrations: bool = False
    """List which running requests a replica may steal, and from where (cluster.migrate), and stop."""
    list_links: bool = False
    """List what keys and values are copied over (cluster.link) and stop."""


def resolve_task(args: Args) -> TaskConfig:
    """Return the task, on the workload file if one is given."""
    task = load_task(args.task)
    if args.workload:
        if not is_file(args.workload):
            raise ServegymError(f"{args.workload}: a workload file ends in {', '.join(SUFFIXES)}")
        task = replace(task, workload=WorkloadConfig(source=str(Path(args.workload))))
    return task


def list_costs() -> str:
    """Return the cost presets with provenance, R² and worst errors."""
    rows = [
        {
            "preset": name,
            "decode R²": "" if preset.decode_r_squared is None else preset.decode_r_squared,
            "decode worst error": _percent(preset.decode_worst_error),
            "prefill worst error": _percent(preset.prefill_worst_error),
            "source": preset.source,
        }
        for name, preset in COST_PRESETS.items()
    ]
    return pd.DataFrame(rows).to_string(index=False)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def list_policies() -> str:
    """Return the policies with their descriptions."""
    return _in_columns(policy_descriptions() | DESCRIPTIONS)


def list_tasks() -> str:
    """Return the registered tasks."""
    return _in_columns(
        {
            name: f"{task.workload.requests} requests ({task.workload.source}), "
            f"{task.cluster.clients} clients{_more(task)}"
            for name, task in TASKS.items()
        }
    )


def _more(task: TaskConfig) -> str:
    """Return what a task has beyond a batch on one machine without a limit of memory."""
    cluster, parts = task.cluster, []
    if cluster.replicas > 1:
        parts.append(f" on each of {cluster.replicas} replicas")
    if cluster.kv_capacity_tokens > 0:
        parts.append(f", memory of {cluster.kv_capacity_tokens} tokens")
    if task.workload.arrivals is not None and task.workload.arrivals.rate_per_s is not None:
        parts.append(f", {task.workload.arrivals.rate_per_s:g} arrive a second")
    if task.process.reward != "gap":
        parts.append(f", reward {task.process.reward}")
    return "".join(parts)


def list_workloads() -> str:
    """Return what ``[workload]`` takes: presets, columns of files, arrival processes."""
    presets = {name: preset.description for name, preset in WORKLOAD_PRESETS.items()}
    files = {name: f"{form.columns}: {form.source}" for name, form in FORMATS.items()}
    return "\n\n".join(
        (
            f"workload.source, a preset:\n{_in_columns(presets)}",
            f"or a file ({', '.join(SUFFIXES)}), known by its columns:\n{_in_columns(files)}",
            f"workload.arrivals.process:\n{_in_columns(PROCESSES)}",
        )
    )


def list_links() -> str:
    """Return the links with their latency, bytes per second and source."""
    return _in_columns(
        {
            name: f"{1e3 * link.latency_s:g} ms + bytes / {link.bytes_per_s / 1e9:g} GB/s: {link.source}"
            for name, link in LINKS.items()
        }
    )


def _in_columns(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and write the tables."""
    args = parse(Args, argv)
    listings = [
        text()
        for wanted, text in (
            (args.list_policies, list_policies),
            (args.list_costs, list_costs),
            (args.list_workloads, list_workloads),
            (args.list_tasks, list_tasks),
            (args.list_routers, partial(_in_columns, ROUTERS)),
            (args.list_victims, partial(_in_columns, VICTIMS)),
            (args.list_guards, partial(_in_columns, ADMISSION_GUARDS)),
            (args.list_orders, partial(_in_columns, ORDERS)),
            (args.list_migrations, partial(_in_columns, MIGRATIONS)),
            (args.list_links, list_links),
        )
        if wanted
    ]
    if listings:
        print("\n\n".join(listings))
        return 0
    if args.optimum_limit < 0:
        raise ServegymError(f"--optimum-limit must be ≥ 0 seconds, got {args.optimum_limit}")
    for option, seconds in (("warmup-s", args.warmup_s), ("cooldown-s", args.cooldown_s)):
        if seconds < 0:
            raise ServegymError(f"--{option} must be ≥ 0 seconds, got {seconds}")
    task, seeds = resolve_task(args), parse_seeds(args.seeds)
    names = parse_policies(args.policies, task.name)
    if args.reference not in names:
        args = replace(args, reference=usual_reference(names))
    # Refuse policies and a workload file before anything is written.
    policy_of = partial(make_policy, task_name=task.name)
    check_policies(task, policy_of, names)
    make_case(task, seeds[0])
    for line in remarks(task, policy_of, names):
        print(line)
    if note := describe_file(task.workload.source, task.workload.trace):
        print(note)
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        text = play_and_tabulate(task, names, seeds, args, crew)
    print(text)
    print(f"wrote {args.output / 'episodes.csv'} and {args.output / 'summary.md'}")
    if args.records:
        print(f"a row per request is in {args.output / 'records'}")
    return 0


def play_and_tabulate(
    task: TaskConfig, names: Sequence[str], seeds: range, args: Args, crew: Workers
) -> str:
    """Play what is missing, write summary.md and return its table."""
    task = claim_task(task, args.output)
    weights = note_agents(names, task.name, args.output)
    policy_of = partial(make_policy, task_name=task.name, weights=weights)
    window = Window(args.warmup_s, args.cooldown_s)
    episodes = evaluate(
        task,
        policy_of,
        names,
        seeds,
        args.output,
        jobs=crew,
        records=args.records,
        window=window,
    )
    optima, note = look_for_optima(task, seeds, args)
    best_known = read_best_known(args.output / "best_known.csv", task.name, episodes)
    table = to_markdown(summarise(episodes, args.reference, optima, best_known))
    served = chosen_rows(read_service(args.output).rows, names, seeds, window)
    note += service_text(served, window, bool((episodes["shed"] > 0).any()))
    note += "".join(f"\n{line}\n" for line in warnings(episodes))
    write_file(args.output / "summary.md", summary_text(task.name, args, names, table + note))
    return table + note


def service_text(served: pd.DataFrame, window: Window, sheds: bool) -> str:
    """Return the table of service with a line that says what it counts; nothing without rows.

    ``sheds`` says whether requests were shed in an episode of the table.
    """
    if len(served) == 0:
        return ""
    counted = "All requests"
    if window.cuts:
        counted = (
            f"Requests that arrive after {window.warmup_s:g} s, and {window.cooldown_s:g} s before the "
            "last at the latest"
        )
    lost = "rejected, shed" if sheds else "rejected"
    return (
        f"\n{counted}; a request that is {lost} or left unfinished has not met its limits. Intervals "
        "are over seeds,\nof a single seed by the means of 20 batches of successive requests.\n\n"
        f"{to_markdown(service_table(served))}"
    )


def look_for_optima(task: TaskConfig, seeds: range, args: Args) -> tuple[pd.DataFrame | None, str]:
    """Return the optima of a small task's cases, and what must be said of them."""
    if args.optimum_limit == 0:
        return None, ""
    try:
        optima = find_optima(task, seeds, args.output, args.optimum_limit)
    except TooLargeError as error:
        return None, f"\nNo optimum: {error}.\n"
    open_cases = len(optima) - int(optima["proven"].sum())
    if open_cases == 0:
        return optima, ""
    return optima, (
        f"\n{open_cases} of {len(optima)} optima are not proven within {args.optimum_limit:g} s; "
        "there the search's proven bound\nstands in, and the gap to it is no smaller than that to the "
        "optimum.\n"
    )


def usual_reference(names: Sequence[str]) -> str:
    """Return the policy that differences are taken from where nobody says another."""
    return Args.reference if Args.reference in names else names[0]


def summary_text(task: str, args: Args, names: Sequence[str], table: str) -> str:
    """Return summary.md: the command that makes it, then the table."""
    asked = {
        name: getattr(args, name) for name in ("task", "policies", "seeds", "output", "workload")
    }
    asked |= {
        name: getattr(args, name) for name in ("warmup_s", "cooldown_s") if getattr(args, name) > 0
    }
    if args.reference != usual_reference(names):
        asked["reference"] = args.reference
    command = command_line("evaluate", **asked)
    return (
        f"# {task}\n\n`{command}`\n\nMeans over seeds with 95 % Student-t intervals; decision p99 is "
        f"the median over episodes.\n\n{table}"
    )
