"""Policies that take the shortest first: by hand, against the reference, against the hindsight optimum."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import TASKS, make_requests
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import WorkloadConfig
from servegym.studies.checks.hindsight import draw, least_latency, total_latency
from servegym.studies.commands import check_hindsight
from tests.against_cluster import compare_cluster
from tests.helpers import UNIT_COSTS, changed, refused
from tests.random_clusters import ClusterCase, random_case

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")

FREE_PREFILL = StageCosts(AffineDecode(1.0), AffinePrefill(1e-9, 0.0))
"""Nearly: free prefills are refused."""


def machine(clients: int, memory: int, costs: StageCosts = UNIT_COSTS) -> TaskConfig:
    task = replace(TASKS["servegym/Tiny-v0"], cost=costs)
    return changed(task, cluster={"clients": clients, "kv_capacity_tokens": memory})


def served(task: TaskConfig, name: str, *rows: tuple[int, int, float]) -> EpisodeLog:
    """Rows are (prompt, output, arrival)."""
    case = bound_case(lower(task), make_requests(*(np.array(c) for c in zip(*rows, strict=True))))
    episode = play(task, name, make_policy(name), case, seed=0)
    compiled = play_compiled(task, make_trigger_policy(name), case)
    assert episode.row["makespan_s"] == compiled["makespan_s"]
    return episode.records


# One client, a stage of 2 s, rounds of 1 s: an output of 3 takes 4 s, of 1 takes 2 s.
WAITING = [(5, 3, 0.0), (5, 5, 0.0), (5, 1, 0.0), (5, 1, 5.0), (5, 1, 7.0)]


@pytest.mark.parametrize(
    ("name", "admitted"),
    [
        ("sjf", [2, 10, 0, 6, 8]),  # 1, 3, then at 6 s the one of 5 s, at 8 s that of 7 s
        ("sjf-100", [2, 10, 0, 6, 8]),
        ("sjf-6", [2, 6, 0, 12, 14]),  # at 6 s the one of 5 tokens has waited 6 s
        ("sjf(patience=6.5)", [2, 8, 0, 6, 14]),  # not yet, but at 8 s
        ("sjf-1", [2, 6, 0, 12, 14]),
    ],
)
def test_patience_by_hand(name: str, admitted: list[int]) -> None:
    log = served(machine(1, 0), name, *WAITING)
    assert log.admitted_s.tolist() == admitted


@pytest.mark.parametrize(("name", "admitted_s"), [("sjf-4", 5.0), ("sjf-6.5", 7.5), ("sjf", 31.0)])
def test_patience_wakes_a_replica_that_sleeps(name: str, admitted_s: float) -> None:
    """The shortest fits only into the first replica, which is busy until 31 s; who came first fits into both.

    The second replica has nothing to do until it goes by who came first: 4 s after 1 s, say.
    """
    pool = {"router": "pool", "replicas": 2, "clients": 1, "kv_block_tokens": 1}
    memories = [{"kv_capacity_tokens": 60}, {"kv_capacity_tokens": 20}]
    task = changed(machine(1, 60), cluster=pool | {"replica": memories})
    log = served(task, name, (5, 30, 0.0), (10, 8, 1.0), (25, 3, 1.0))
    assert log.admitted_s.tolist()[:2] == [0.0, admitted_s]
    assert log.replica.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["sjf-0", "sjf(patience=0)", "sjf(patience=1e10)"])
def test_patience_is_a_positive_number(name: str) -> None:
    refused(lambda: make_policy(name), "must be > 0 and at most 1000000000")
    assert make_policy("sjf-0.5").cluster == {"patience_s": 0.5}


def test_mc_sf_by_hand() -> None:
    """Memory of 12 tokens, free prefills; they need at most 2 + 2, 2 + 4 and 2 + 5 tokens.

    The first two end at 1 s and 3 s. All three would hold 9 tokens at 1 s, but the later two 10 at 3 s
    and the last alone 6 at 4 s: all fit. Beside a memory of 9 the third must wait until, at 1 s, it
    would hold 2 + 2 when the second ends with 5.
    """
    rows = (2, 2, 0.0), (2, 4, 0.0), (2, 5, 0.0)
    assert served(machine(9, 12, FREE_PREFILL), "mc-sf", *rows).admitted_s.round(6).tolist() == [
        0,
        0,
        0,
    ]
    assert served(machine(9, 9, FREE_PREFILL), "mc-sf", *rows).admitted_s.round(6).tolist() == [
        0,
        0,
        1,
    ]


def test_mc_sf_stops_at_the_first_that_does_not_fit() -> None:
    """The prompt of 8 waits until 3 s; the longer output behind it would fit beside the first."""
    rows = (2, 4, 0.0), (8, 5, 0.0), (1, 6, 0.0)
    assert served(machine(9, 13, FREE_PREFILL), "mc-sf", *rows).admitted_s.round(6).tolist() == [
        0,
        3,
        7,
    ]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_nobody_is_better_than_hindsight(rate: float) -> None:
    """The model of arXiv 2502.07115: rounds of one unit, free prefills, all at once or Poisson arrivals."""
    optimal = 0
    for seed in range(12):
        instance = draw(5, (9, 12), rate, np.random.default_rng([seed, int(2 * rate)]))
        sums = [total_latency(instance, name) for name in ("mc-sf", "sorted-f")]
        best = least_latency(instance, min(sums))  # refuses what cannot be
        assert best is not None
        assert best <= min(sums)
        assert max(sums) <= 1.5 * best
        optimal += sums[0] == best
    assert optimal >= 3


def test_the_hindsight_program_by_trying_all() -> None:
    for seed in range(6):
        instance = draw(3, (7, 9), 0.5 * (seed % 2), np.random.default_rng(seed))
        rows = list(zip(instance.arrivals, instance.prompts, instance.rounds, strict=True))
        sums = []
        latest = int(instance.arrivals[-1] + instance.rounds.sum())
        for starts in itertools.product(range(latest), repeat=3):
            held = [0] * (2 * latest)
            for t, (_, prompt, rounds) in zip(starts, rows, strict=True):
                for j in range(1, rounds + 1):
                    held[t + j] += prompt + j
            early = any(t < row[0] for t, row in zip(starts, rows, strict=True))
            if not early and max(held) <= instance.memory:
                sums.append(sum(t + row[2] - row[0] for t, row in zip(starts, rows, strict=True)))
        assert least_latency(instance, min(sums) + 3) == min(sums)
        with pytest.raises(ValueError, match="no schedule"):
            least_latency(instance, min(sums) - 1)


def test_the_page_of_hindsight() -> None:
    """The committed page is of the command's defaults, all its cases are proven, and a row is played anew."""
    args = check_hindsight.Args(cases=1)
    page = (Path(__file__).parents[1] / "results/checks/hindsight.md").read_text("utf-8")
    assert check_hindsight.command_of(check_hindsight.Args()) in page
    rows = [line.split(" | ") for line in page.splitlines() if " of 20 | " in line]
    assert len(rows) == 18
    assert all(row[3] == "20 of 20" and 1 <= float(row[5]) <= float(row[6]) for row in rows)
    assert (
        "| 1 of 1 | mc-sf | 1.0000 | 1.0000 | 1 |"
        in check_hindsight.rows_of(args, 1, check_hindsight.SIZES[1])[0]
    )


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_shortest_first_equals_the_reference(first: int) -> None:
    for seed in range(first, first + 40):
        rng = np.random.default_rng(seed)
        case = random_case(rng, dyadic=bool(seed % 2), moving=False)
        patience_s = float(rng.choice([np.inf, 0.25, 4.0, 16.0])) * (1.0 if seed % 2 else 0.05)
        spec = replace(case.spec, padded=False, reserve="chunk", patience_s=patience_s)
        compare_cluster(ClusterCase(case.requests, spec), "shortest")


def test_max_utilization_evicts_where_no_evict_waits() -> None:
    """Memory for 12 tokens, two requests of up to 10: one is evicted, or waits for the other."""
    task = changed(machine(2, 12), cluster={"chunk_tokens": 64, "watermark": 0.0})
    rows = (4, 6, 0.0), (4, 6, 0.0)
    busy, careful = (served(task, name, *rows) for name in ("trt-max-util", "trt-no-evict"))
    assert busy.preemptions.tolist() == [0, 1]
    assert careful.preemptions.tolist() == [0, 0]
    assert careful.admitted_s[1] == careful.finished_s[0]


def test_the_hybrid_steals_across_replicas_of_a_pool() -> None:
    """Nobody knows the lengths: who ends early steals, so that some are served elsewhere than planned."""
    cluster = {"replicas": 2, "clients": 2, "router": "pool"}
    task = TaskConfig("tiny", workload=WorkloadConfig("tiny", requests=40))
    task = changed(task, cluster=cluster, information={"output_lengths": "unknown"})
    case = make_case(task, 0)
    log = play(task, "hybrid", make_policy("hybrid"), case, seed=0).records
    by_plan = changed(task, cluster={"router": "plan"})
    planned = play(by_plan, "offline", make_policy("offline"), case, seed=0).records
    assert (log.replica != planned.replica).any()
