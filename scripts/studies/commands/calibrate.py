"""Calibrate Paper-v0's cost model to the published numbers, and show what they leave open.

The paper (arXiv 2502.15763) gives a baseline of 201.00 s and a lower bound of about 180 s for 1319
GSM8K requests on 200 clients, output tokens of mean 344.83 and standard deviation 187.99, but neither
the lengths nor the stage times. Chosen here: which sampled case stands for "the" case (the training
seed nearest in mean and standard deviation); the prefill cost per token (of a public profile of
LLaMA-2-70B on four A100); no fixed part of a prefill stage (with one, baseline and bound would lie
further apart than published). Fitted: the decode round, so that the baseline takes 201.00 s. Not
fitted: everything else, the lower bound included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.files import make_folder, write_file
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    LevelledPrefill,
    StageCosts,
    geometric_levels,
)
from servegym.envs.machine.presets import PAPER_LEVELS, cost_preset
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.summary import to_markdown
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import PAPER_CASE_SEED, TASKS
from servegym.envs.task.sections import WorkloadConfig
from servegym.studies.cli import command_line, parse

PAPER_BASELINE_S = 201.00
PAPER_BOUND_S = 180.0
PAPER_OUTPUT_MEAN = 344.83
PAPER_OUTPUT_STD = 187.99
CANDIDATE_SEEDS = range(1000)
AVERAGED_SEEDS = range(100)


@dataclass(frozen=True)
class Args:
    """Calibrate Paper-v0's cost model; writes calibration.md and coefficients.csv."""

    output: Path = Path("results/calibration")
    """Folder for the results."""


@dataclass(frozen=True)
class Coefficients:
    """Baseline and bound are linear in the decode round and the prefill cost per token.

    With all requests present at t = 0, a constant decode round and prefill-first, the order of
    events does not depend on what stages cost.
    """

    bound_rounds: float
    bound_tokens: float  # prompt tokens, as the levels' lower bound counts them
    baseline_rounds: float
    baseline_tokens: float  # prompt tokens, each stage rounded up to its level
    baseline_stages: float

    def round_s(self, per_token_s: float, fixed_s: float = 0.0) -> float:
        """Return the decode round with which the baseline takes the published time."""
        prefill_s = per_token_s * self.baseline_tokens + fixed_s * self.baseline_stages
        return (PAPER_BASELINE_S - prefill_s) / self.baseline_rounds


def nearest_case() -> int:
    """Return the training seed whose output lengths are nearest to the published mean and std."""

    def distance(seed: int) -> float:
        tokens = make_case(TASKS["servegym/Paper-v0"], seed).requests.output_tokens
        mean_error = abs(tokens.mean() / PAPER_OUTPUT_MEAN - 1)
        return float(mean_error + abs(tokens.std() / PAPER_OUTPUT_STD - 1))

    return min(tqdm(CANDIDATE_SEEDS, desc="choosing the case"), key=distance)


def unit_task(source: str, prefill: LevelledPrefill) -> TaskConfig:
    """Return Paper-v0 with a decode round of 1 s, so that clocks count rounds."""
    return replace(
        TASKS["servegym/Paper-v0"],
        workload=WorkloadConfig(source=source),
        cost=StageCosts(AffineDecode(1.0), prefill),
    )


def coefficients(task: TaskConfig, seed: int) -> Coefficients:
    """Measure one case under the baseline."""
    case = make_case(task, seed)
    row = play_compiled(task, make_trigger_policy("fcfs"), case)
    return Coefficients(
        case.bound.decode_rounds,
        case.bound.prefill_s,
        row["decode_rounds"],
        row["prefill_s"],
        row["prefill_stages"],
    )


def mean_coefficients(source: str, levels: int) -> Coefficients:
    """Average over training seeds, for outputs of ``source`` and a number of prefill levels."""
    task = unit_task(source, geometric_levels(AffinePrefill(0.0, 1.0), levels, 16, 16384))
    rows = [coefficients(task, seed).__dict__ for seed in AVERAGED_SEEDS]
    return Coefficients(*pd.DataFrame(rows).mean())


def solve_both(mean: Coefficients) -> tuple[float, float]:
    """Return the round and the cost per token that meet bound and baseline at once, in seconds."""
    matrix = [
        [mean.bound_rounds, mean.bound_tokens],
        [mean.baseline_rounds, mean.baseline_tokens],
    ]
    round_s, per_token_s = np.linalg.solve(matrix, [PAPER_BOUND_S, PAPER_BASELINE_S])
    return float(round_s), float(per_token_s)


def joint_fits() -> pd.DataFrame:
    """Show that bound and baseline together do not determine two parameters."""
    rows = []
    for source in ("gsm8k-cap512", "gsm8k-lognormal"):
        for levels in (16, 32, 64, 128):
            mean = mean_coefficients(source, levels)
            round_s, per_token_s = solve_both(mean)
            rows.append(
                {
                    "outputs": source,
                    "levels": levels,
                    "baseline / bound rounds": f"{mean.baseline_rounds / mean.bound_rounds:.3f}",
                    "decode round (ms)": f"{1e3 * round_s:.1f}",
                    "prefill in the bound (s)": f"{per_token_s * mean.bound_tokens:.1f}",
                }
            )
    return pd.DataFrame(rows)


def fixed_parts(case: Coefficients, per_token_s: float) -> pd.DataFrame:
    """Show how a fixed part of each prefill stage moves the bound, the baseline held at 201 s."""
    rows = []
    least_stages = 7  # ⌈1319 / 200⌉
    for fixed_s in (0.0, 0.002, 0.005, 0.01, 0.02787):
        round_s = case.round_s(per_token_s, fixed_s)
        bound_s = (
            round_s * case.bound_rounds + per_token_s * case.bound_tokens + fixed_s * least_stages
        )
        rows.append(
            {
                "fixed part (ms)": f"{1e3 * fixed_s:.1f}",
                "decode round (ms)": f"{1e3 * round_s:.2f}",
                "lower bound (s)": f"{bound_s:.1f}",
            }
        )
    return pd.DataFrame(rows)


def report(seed: int, case: Coefficients, per_token_s: float, joint: pd.DataFrame) -> str:
    """Return the text of calibration.md."""
    round_s = case.round_s(per_token_s)
    bound_s = round_s * case.bound_rounds + per_token_s * case.bound_tokens
    prefill_s = per_token_s * case.baseline_tokens
    return f"""# Calibration of Paper-v0

Command: `{command_line("calibrate", output=Args().output)}`

- The case: training seed {seed}, of 0 … {CANDIDATE_SEEDS[-1]} the nearest to the published output
  mean {PAPER_OUTPUT_MEAN} and standard deviation {PAPER_OUTPUT_STD}.
- Prefill: {per_token_s:.4g} s per token (preset `llama2-70b-a100x4`), no fixed part, {PAPER_LEVELS}
  geometric levels from 16 to 16,384 tokens; {prefill_s:.2f} s in the baseline, all stages together.
- Decode round: {1e3 * round_s:.3f} ms, fitted: the baseline (`fcfs`) takes {PAPER_BASELINE_S:.2f} s.
- Lower bound that follows: {bound_s:.2f} s (published: about {PAPER_BOUND_S:.0f} s).

## What the paper leaves open

Fitting bound = 180 s and baseline = 201 s together, means over 100 training cases. The two equations
are almost parallel: the split between decode and prefill hangs on how finely prefill is levelled, and
many answers are negative. With lognormal outputs of the same mean and standard deviation (up to 1024
tokens) the baseline needs about 30 % more rounds than the bound, where the paper has 12 %:

{to_markdown(joint)}
A fixed part of each prefill stage, with the decode round fitted again so that the baseline stays at
201 s, moves the bound away from 180 s (the public profile's own fixed part is the last row):

{to_markdown(fixed_parts(case, per_token_s))}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate and write the report."""
    args = parse(Args, argv)
    make_folder(args.output)
    seed = nearest_case()
    if seed != PAPER_CASE_SEED:
        print(f"note: the nearest case is seed {seed}, Paper-v0 ships {PAPER_CASE_SEED}")
    levels = geometric_levels(AffinePrefill(0.0, 1.0), PAPER_LEVELS, 16, 16384)
    case = coefficients(unit_task("gsm8k-cap512", levels), seed)
    profile = cost_preset("llama2-70b-a100x4").costs.prefill
    if not isinstance(profile, AffinePrefill):
        raise TypeError("the profile is affine")
    print(f"decode round {case.round_s(profile.per_token):.8f} s; now the alternatives")
    text = report(seed, case, profile.per_token, joint_fits())
    write_file(args.output / "calibration.md", text)
    print(text)
    return 0
