"""The paper's comparison: baseline → offline plan → + stealing → + iteration rule, and simple rows.

Plays Paper-v0's single case and a study of 100 held-out cases, prints ours beside the published
figures and writes tables and pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from servegym.envs.files import write_file
from servegym.envs.pictures import draw_gantts, draw_makespans, to_png
from servegym.envs.playing.evaluation import HELD_OUT_SEED, evaluate, make_case, play
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS, Workers
from servegym.envs.playing.summary import fixed, summarise, to_markdown, with_interval
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import PAPER_CASE_SEED, TASKS
from servegym.studies import anew
from servegym.studies.cli import check_number, parse
from servegym.studies.policies import make_policy, weights_of
from servegym.studies.tuned import with_tuned
from servegym.studies.workers import open_workers

STEPS = {
    "fcfs": "baseline: first come, first served",
    "offline": "+ offline plan",
    "offline-steal": "+ stealing",
    "hybrid": "+ Lagrangian rule = hybrid",
}
"""The paper's ablation, in its order."""

OTHERS = with_tuned(
    "Paper-v0",
    (
        *("random", "static", "hybrid-myopic", "hybrid-*", "lpt", "threshold-*", "lookahead"),
        *("aligned", "aligned-lookahead", "rollout"),
    ),
)
"""Simple policies; ``*`` is the number tuned on the task."""

LEARNED = ("ppo",)
"""The shipped agent of the task."""

SHORT = {
    **STEPS,
    "lpt": "longest requests first, same rule",
    "rollout": "a search at every decision",
    "ppo": "the shipped trained agent",
}
"""Rows of the short table, which the README shows."""

PUBLISHED = {
    "fcfs": ("201.00", "80.2"),
    "hybrid": ("190.58", "89.1"),
}
"""Makespan (s) and utilisation (%) in arXiv 2502.15763; it gives no others."""

PUBLISHED_GAIN = "+8.0"
"""Utilisation gained on average over the paper's 100 cases, in points."""


@dataclass(frozen=True)
class Args:
    """Run the paper's comparison on its single case and on held-out cases."""

    output: Path = Path("results/paper")
    """Folder for tables, raw rows and pictures. An interrupted run goes on, a finished one starts anew."""
    cases: int = 100
    """Held-out cases of the study, seeds 1000000 and up."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def comparison(case: pd.DataFrame, study: pd.DataFrame) -> pd.DataFrame:
    """Return ours beside the published figures, one row a step of the ablation and other policies."""
    rows = []
    for policy in dict.fromkeys(study["policy"]):
        single = case[case["policy"] == policy].iloc[0]
        cases = study[study["policy"] == policy]
        published_s, published_share = PUBLISHED.get(policy, ("", ""))
        rows.append(
            {
                "policy": f"**`{policy}`** {STEPS[policy]}" if policy in STEPS else f"`{policy}`",
                "makespan (s)": with_interval(np.array([single["makespan_s"]])),
                "paper (s)": published_s,
                "client / decode util. (%)": (
                    f"{100 * single['client_utilization']:.1f} / "
                    f"{100 * single['decode_utilization']:.1f}"
                ),
                "paper (%)": published_share,
                f"gap to bound, {len(cases)} cases (%)": with_interval(cases["gap"], 100),
            }
        )
    return pd.DataFrame(rows)


def gains(study: pd.DataFrame) -> str:
    """Return the utilisation that the hybrid gains over the baseline, paired by case, in points."""
    texts = []
    for column in ("client_utilization", "decode_utilization"):
        by_case = study.pivot_table(index="seed", columns="policy", values=column)
        gained = with_interval((by_case["hybrid"] - by_case["fcfs"]).to_numpy(float), 100, 1)
        texts.append(f"{gained} points of {column.replace('_', ' ')}")
    return " and ".join(texts)


def latency(study: pd.DataFrame) -> str:
    """Return the decision latency beside the paper's, in one line."""
    typical, worst = study["decision_ms_p99"].median(), study["decision_ms_p99"].max()
    return (
        f"decision latency, p99 of an episode: median {typical:.3f} ms, worst {worst:.2f} ms "
        "(paper: below 5 ms)"
    )


def report(case: pd.DataFrame, study: pd.DataFrame) -> str:
    """Return table.md; it holds no wall times, so that a rerun gives the same text."""
    bound_s = case["lower_bound_s"].iloc[0]
    seeds = study["seed"]
    return f"""{to_markdown(comparison(case, study))}
Lower bound of the single case: {bound_s:.2f} s (paper: about 180 s). Over {seeds.nunique()} held-out
cases (seeds {seeds.min()} … {seeds.max()}) the hybrid gains {gains(study)}
on the baseline (paper: {PUBLISHED_GAIN}). Intervals are 95 %, Student-t.
"""


def short_report(case: pd.DataFrame, study: pd.DataFrame) -> str:
    """Return short.md: some rows and columns of table.md, for the README."""
    table = comparison(case, study).set_index(pd.Index(dict.fromkeys(study["policy"])))
    table = table.drop(columns=["client / decode util. (%)", "paper (%)"]).loc[list(SHORT)]
    table["policy"] = [f"`{name}` {text}" for name, text in SHORT.items()]
    seeds, bound_s = study["seed"], case["lower_bound_s"].iloc[0]
    held_out = f"{seeds.nunique()} held-out cases, seeds {seeds.min()} … {seeds.max()}"
    return f"""{to_markdown(table)}
Makespans are those of the paper's single case, whose lower bound is {bound_s:.2f} s (paper: about 180 s).
Gaps are means over {held_out}, with 95 % Student-t intervals.
"""


def draw(task: TaskConfig, study: pd.DataFrame, output: Path) -> None:
    """Write the two pictures."""
    shown = study[study["policy"].isin([*STEPS, "random"])]
    write_file(output / "makespan_vs_bound.png", to_png(draw_makespans(shown)))
    case = make_case(task, PAPER_CASE_SEED)
    episodes = []
    for name in ("fcfs", "hybrid"):
        episode = play(task, name, make_policy(name, task.name), case, PAPER_CASE_SEED)
        row = episode.row
        title = (
            f"{name}: {row['makespan_s']:.1f} s, {fixed(100 * row['gap'], 1)} % above the lower bound, "
            f"{row['prefill_stages']} prefill stages"
        )
        episodes.append((title, episode.records))
    write_file(output / "gantt.png", to_png(draw_gantts(episodes, task.cluster.clients)))


def main(argv: Sequence[str] | None = None) -> int:
    """Play, tabulate and draw."""
    args = parse(Args, argv)
    check_number("--cases", args.cases, 2, HELD_OUT_SEED)
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        text = compare(args, crew)
    print(text)
    print(
        f"wrote {args.output}: table.md, short.md, study/summary.md, two episodes.csv, two pictures"
    )
    return 0


def compare(args: Args, crew: Workers) -> str:
    """Play what is missing and write all results; return the table and the decision latency."""
    task, names = TASKS["servegym/Paper-v0"], [*STEPS, *OTHERS, *LEARNED]
    weights = weights_of(names, task.name)
    policy_of = partial(make_policy, task_name=task.name, weights=weights)
    begin(args.output, weights)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + args.cases)
    print(f"the paper's single case (training seed {PAPER_CASE_SEED}), {len(names)} policies")
    case = evaluate(task, policy_of, names, [PAPER_CASE_SEED], args.output / "case")
    print(f"{args.cases} held-out cases")
    study = evaluate(task, policy_of, names, seeds, args.output / "study", jobs=crew)
    table = report(case, study)
    write_file(args.output / "table.md", table)
    write_file(args.output / "short.md", short_report(case, study))
    write_file(args.output / "study" / "summary.md", to_markdown(summarise(study, "hybrid")))
    draw(task, study, args.output)
    anew.end(args.output)
    return f"\n{table}{latency(study)}\n"


def begin(output: Path, weights: Mapping[str, str]) -> None:
    """Start anew, unless the last run was interrupted and of the same agents: then go on with it."""
    files = [
        f"{part}/{name}" for part in ("case", "study") for name in ("episodes.csv", "task.json")
    ]
    anew.begin(output, weights, files)
