"""Assign a workload's requests to clients so that the busiest client has as little to do as can be.

Writes the plan as JSON. An interrupted search (Ctrl-C) writes nothing and leaves with status 130;
for the best plan found in some time, set ``--time-limit``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _cli import parse, run

from servegym.baselines.planner import CertifiedPlan, plan_offline
from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.requests import read_requests


@dataclass(frozen=True)
class Args:
    """Plan a workload offline; prints load, lower bound, status and seconds, writes the plan."""

    workload: Path
    """A workload CSV with prompt_tokens and output_tokens."""
    clients: int
    """Clients that serve it, 1 to a million."""
    output: Path
    """The JSON file to write; its folder must exist."""
    solver: str = "rebalance"
    """rebalance, lpt, milp or milp-cold (the paper's program, started from nothing)."""
    time_limit: float = 10.0
    """Seconds after which the best plan so far counts; a proven one ends the search early."""
    seed: int = 0
    """Of the search's random numbers."""


def check_output(path: Path) -> None:
    """Refuse a path that could not be written, before any time is spent on a plan."""
    if path.is_dir():
        raise ServegymError(f"{path}: is a folder; --output names a file")
    if not path.parent.is_dir():
        raise ServegymError(f"{path.parent}: no such folder; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ServegymError(f"{path.parent}: not writable")


def to_json(found: CertifiedPlan) -> str:
    """Write a plan as JSON; a request's id is its row by arrival, counted from 0."""
    plan = found.plan
    content = {
        "clients": plan.clients,
        "load": found.load,
        "lower_bound": found.lower_bound,
        "status": found.status,
        "solver": found.solver,
        "seconds": found.seconds,
        "queues": [plan.queue(client).tolist() for client in range(plan.clients)],
    }
    return json.dumps(content) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and write."""
    args = parse(Args, argv)
    check_output(args.output)
    requests = read_requests(args.workload)
    found = plan_offline(
        requests.decode_rounds,
        args.clients,
        solver=args.solver,
        time_limit_s=args.time_limit,
        seed=args.seed,
    )
    write_file(args.output, to_json(found))
    print(found.summary())
    return 0


if __name__ == "__main__":
    run(main)
