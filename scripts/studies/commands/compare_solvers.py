"""Compare the planner's solvers with the paper's way, and show the hard band of the packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.baselines.planning.planner import SOLVERS, CertifiedPlan, plan_offline
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.playing.summary import fixed, to_markdown
from servegym.envs.task.registered import TASKS
from servegym.envs.workload.sources import make_workload
from servegym.studies.cli import check_number, command_line, parse

SOURCES = ("gsm8k-lognormal", "gsm8k-cap512")
REQUESTS_PER_CLIENT = (2.5, 2.9, 3.0, 3.1, 3.2, 3.4, 3.6, 4.0, 5.0)
CLIENTS = 200


@dataclass(frozen=True)
class Args:
    """Compare the solvers on one GSM8K-v0 case and the default one across the hard band."""

    output: Path = Path("results/planner")
    """Folder for the results."""
    solver_limit: float = 20.0
    """Seconds each solver has on the GSM8K-v0 case."""
    band_limit: float = 1.0
    """Seconds a plan of the hard band has."""
    seeds: int = 6
    """Instances for each number of requests per client."""


def solvers_table(limit_s: float) -> pd.DataFrame:
    """Every solver on training case 0 of GSM8K-v0."""
    rounds = make_case(TASKS["servegym/GSM8K-v0"], 0).requests.decode_rounds
    rows = [solver_row(solver, rounds, limit_s) for solver in tqdm(SOLVERS, desc="solvers")]
    return pd.DataFrame(rows).fillna("")


def solver_row(solver: str, rounds: NDArray[np.int64], limit_s: float) -> dict[str, object]:
    """One solver's load and bound; ``milp-cold`` may find no plan at all in a short time."""
    try:
        plan = plan_offline(rounds, CLIENTS, time_limit_s=limit_s, solver=solver)
    except ServegymError:
        return {"solver": f"`{solver}`", "status": "no plan found"}
    return {
        "solver": f"`{solver}`",
        "load": plan.load,
        "lower bound": plan.lower_bound,
        "gap (%)": fixed(100 * plan.gap),
        "status": plan.status,
        "seconds": f"{plan.seconds:.3f}",
    }


def band_plans(source: str, ratio: float, seeds: int, limit_s: float) -> list[CertifiedPlan]:
    """Plan ``seeds`` instances with ``ratio`` requests per client."""
    plans = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rounds = make_workload(source, round(ratio * CLIENTS), 0.0, rng).decode_rounds
        plans.append(plan_offline(rounds, CLIENTS, time_limit_s=limit_s))
    return plans


def band_table(seeds: int, limit_s: float) -> pd.DataFrame:
    """Share of proven plans and the gap that is left, by requests per client."""
    rows = []
    for ratio in tqdm(REQUESTS_PER_CLIENT, desc="hard band"):
        row = {"requests per client": f"{ratio}"}
        for source in SOURCES:
            plans = band_plans(source, ratio, seeds, limit_s)
            proven = sum(plan.status == "optimal" for plan in plans)
            row[f"{source}: optimal"] = f"{proven} of {seeds}"
            row[f"{source}: mean gap (%)"] = fixed(
                100 * float(np.mean([plan.gap for plan in plans])), 3
            )
        rows.append(row)
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write solvers.md."""
    args = parse(Args, argv)
    check_number("--seeds", args.seeds, 1, HELD_OUT_SEED)
    for option, limit_s in (
        ("--solver-limit", args.solver_limit),
        ("--band-limit", args.band_limit),
    ):
        if limit_s <= 0:
            raise ServegymError(f"{option} must be > 0 seconds, got {limit_s}")
    make_folder(args.output)
    text = (
        f"# The offline planner\n\n`{command_line('compare_solvers', output=args.output)}`\n\n"
        f"1319 requests on {CLIENTS} clients, {args.solver_limit:g} s each; loads in decode rounds. "
        "`milp` is the paper's program started from the rebalanced plan with the bound as a cut, "
        f"`milp-cold` the same from nothing.\n\n{to_markdown(solvers_table(args.solver_limit))}\n"
        f"The default solver where few requests share a client, {args.band_limit:g} s a plan:\n\n"
        f"{to_markdown(band_table(args.seeds, args.band_limit))}"
    )
    write_file(args.output / "solvers.md", text)
    print(text)
    return 0
