"""Assign a workload's requests to clients so that the busiest client has as little to do as can be.

Plans the requests that are present at t = 0: a later one is not known yet, and joins the client with
the fewest rounds before it when it arrives. Writes the plan as JSON. An interrupted search (Ctrl-C)
writes nothing and leaves with status 130; for the best plan found in some time, set ``--time-limit``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servegym.baselines.planning.planner import CertifiedPlan, plan_offline
from servegym.envs.files import write_file
from servegym.envs.workload.traces import read_trace
from servegym.studies.cli import check_output, parse


@dataclass(frozen=True)
class Args:
    """Plan a workload offline; prints load, lower bound, status and seconds, writes the plan."""

    workload: Path
    """A workload file, as a CSV of prompt_tokens and output_tokens; requests after t = 0 are left out."""
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


def to_json(certified: CertifiedPlan, later: int) -> str:
    """Write a plan as JSON; a request's id is its row by arrival, counted from 0.

    ``later_requests`` is the number of those that arrive after t = 0, which no queue holds.
    """
    plan = certified.plan
    content = {
        "clients": plan.clients,
        "load": certified.load,
        "lower_bound": certified.lower_bound,
        "status": certified.status,
        "solver": certified.solver,
        "seconds": certified.seconds,
        "later_requests": later,
        "queues": [plan.queue(client).tolist() for client in range(plan.clients)],
    }
    return json.dumps(content) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and write."""
    args = parse(Args, argv)
    check_output(args.output)
    trace = read_trace(args.workload)
    requests = trace.requests
    present = int(np.count_nonzero(requests.arrival_s == 0))  # the first ones: sorted by arrival
    certified = plan_offline(
        requests.decode_rounds[:present],
        args.clients,
        solver=args.solver,
        time_limit_s=args.time_limit,
        seed=args.seed,
    )
    later = len(requests) - present
    write_file(args.output, to_json(certified, later))
    if any(trace.dropped.values()):
        print(trace.summary())
    print(
        certified.summary() + (f"; {later} requests arrive later and are left out" if later else "")
    )
    return 0
