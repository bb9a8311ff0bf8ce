"""Lockstep runs on fresh requests: their order, medians and words, and how an interrupted run goes on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.engines.calibration import table_of
from servegym.envs import ServegymError
from servegym.studies.commands import check_engine
from servegym.studies.engines import equality, makespans
from servegym.studies.engines.equality import Row, Setting
from servegym.studies.engines.held_out import HeldOut, order_of

FAR = (0.0, 4.0, 1.0)  # percent by which one, two and three are predicted too long, at the median


def held(error: float = 0.0, **changes: Any) -> list[HeldOut]:
    """Policies of 10, 9 and 5 s; predicted exactly, but for ``FAR`` and an ``error`` of the first."""
    times = {"one": (10.0, FAR[0] + error), "two": (9.0, FAR[1]), "three": (5.0, FAR[2])}
    rows = [
        HeldOut(name, 7, None, s, 2 * s, s * (1 + far / 100), 3 * s, s / 4, 0.3 * s, 0.05)
        for name, (s, far) in times.items()
    ]
    return [HeldOut(**vars(rows[0]) | changes), *rows[1:]]


def filled(path: Path, *errors: float) -> Any:
    table = makespans.open_runs(path)
    for run, error in enumerate(errors):
        table.add(makespans.run_rows(run, makespans.request_seed(0, run), 1.25, held(error)))
    table.save()
    return makespans.open_runs(path).frame()


def test_each_part_is_first_once_and_behind_each_other_once() -> None:
    orders = [order_of(10, run) for run in range(10)]
    assert sorted(order[0] for order in orders) == list(range(10))
    pairs = {pair for order in orders for pair in pairwise(order)}
    assert len(pairs) == 90
    assert order_of(3, 5) == [0, 1, 2]


def test_errors_are_medians_over_runs(tmp_path: Path) -> None:
    runs = filled(tmp_path / "runs.csv", -1.0, 0.0, 10.0)
    errors = makespans.errors_of(runs)
    assert errors.makespan.median().tolist() == pytest.approx([0.0, 4.0, 1.0])
    assert errors.makespan["one"].tolist() == pytest.approx([-1.0, 0.0, 10.0])
    assert errors.ratio["two"].median() == pytest.approx(100 * (0.9 * 1.04 - 0.9))
    assert makespans.errors_of(runs, "wall").makespan.to_numpy() == pytest.approx(50.0)
    table = makespans.medians_table(runs).splitlines()
    assert table[2] == (
        "| one | 21 | all | 10.00 | +0.0 (-1.0 … +10.0) | +50.0 (+50.0 … +50.0) | 1 | 1 |  |  |"
    )
    assert table[3].startswith("| two | 21 | all | 9.00 | +4.0 (+4.0 … +4.0) |")
    assert makespans.medians_table(runs[runs["run"] == 0]).count("…") == 0


def test_errors_are_those_of_decode_rounds_and_of_prefills(tmp_path: Path) -> None:
    table = makespans.stages_table(filled(tmp_path / "runs.csv", 0.0)).splitlines()
    assert table[2:] == [  # prefill is a quarter, said to be 5 % of the makespan more
        "| one | 7.50 | -5.0 | 2.50 | +5.0 |",
        "| two | 6.75 | -1.0 | 2.25 | +5.0 |",
        "| three | 3.75 | -4.0 | 1.25 | +5.0 |",
    ]


def test_the_verdict_counts_who_is_near_enough(tmp_path: Path) -> None:
    errors = makespans.errors_of(filled(tmp_path / "runs.csv", 0.0))
    assert makespans.verdict(errors) == (
        "Median errors of makespans: 2 of 3 within 3 % (the largest: two, +4.0); of ratios: 1 of 2 within "
        "2 points (the largest: two, +3.6). Of 3 pairs of policies that are predicted to differ by more than "
        "that 3 come in the predicted order."
    )
    swapped = errors.predicted_ratio.assign(two=0.4)  # before three, which it is behind
    wrong = makespans.Errors(errors.makespan, errors.ratio, errors.measured_ratio, swapped)
    assert makespans.pairs_in_order(wrong) == (2, 3)
    alike = makespans.Errors(
        errors.makespan, errors.ratio, errors.measured_ratio, 1 + 0 * errors.predicted_ratio
    )
    assert makespans.verdict(alike).endswith(
        "No two policies are predicted to differ by more than that."
    )


def test_where_iterations_differ_is_told(tmp_path: Path) -> None:
    table = makespans.open_runs(tmp_path / "runs.csv")
    table.add(makespans.run_rows(0, 1, 1.0, held(difference=3)))
    table.add(makespans.run_rows(1, 2, 1.0, held()))
    table.save()
    rows = makespans.open_runs(tmp_path / "runs.csv").frame()
    assert "| one | 14 | not in 1 of 2 runs |" in makespans.medians_table(rows)


def test_requests_of_runs_are_fresh_and_held_out() -> None:
    seeds = [makespans.request_seed(seed, run) for seed in range(3) for run in (0, 1, 998)]
    assert len(set(seeds)) == 9
    assert min(seeds) == 1_000_000


def test_rows_of_iterations_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        Row("known, arriving", "fcfs", 9, None, (), 4, 4, 2),
        Row("known, arriving", "ppo", 9, 3, ("finished_s", "client"), 3, 4, 2),
    ]
    with equality.open_rows(tmp_path / "rows.csv") as table:
        table.add([equality.to_table(row) for row in rows])
    assert [equality.from_table(r) for r in equality.open_rows(tmp_path / "rows.csv").rows] == rows
    assert [row.same for row in rows] == [True, False]


# ---- the command, with stand-ins for engines ----------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What engines are asked to run; the third thing interrupts."""
    log: list[str] = []

    def run_setting(_: Any, setting: Setting, *__: Any) -> Any:
        for policy in setting.policies:
            log.append(policy)
            yield Row(setting.name, policy, 9, None, (), 4, 4, 2)

    def in_one_lockstep(
        _: Any, __: Any, ___: Any, ____: Any, _____: Any, ______: Any, run: int, **_______: Any
    ) -> Any:
        log.append(f"run {run}")
        if len(log) == 3:
            raise KeyboardInterrupt
        return None, held(), table_of([])

    monkeypatch.setattr(check_engine, "run_setting", run_setting)
    monkeypatch.setattr(check_engine, "in_one_lockstep", in_one_lockstep)
    for name in ("Grid", "run_all", "fit_costs", "with_costs", "calibration"):
        monkeypatch.setattr(check_engine, name, lambda *_, **__: type("", (), {"iterations": []}))
    return log


def test_an_interrupted_run_makes_what_is_missing(tmp_path: Path, asked: list[str]) -> None:
    args = check_engine.Args(repeats=3, output=tmp_path)
    settings = [Setting("all", ("fcfs",))]

    def run() -> Any:
        rows = check_engine.compare_iterations(None, args, settings)
        return rows, check_engine.predict_makespans(None, args)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert asked == ["fcfs", "run 0", "run 1"]
    rows, runs = run()
    assert asked == ["fcfs", "run 0", "run 1", "run 1", "run 2"]
    assert len(rows) == 1
    assert runs["seed"].unique().tolist() == [1_002_000, 1_002_001, 1_002_002]
    assert np.isnan(runs["difference"]).all()


@pytest.mark.parametrize(("repeats", "legal"), [(0, False), (1, True), (999, True), (1000, False)])
def test_repeats_are_checked(repeats: int, legal: bool) -> None:
    if legal:
        assert check_engine.Args(repeats=repeats).repeats == repeats
    else:
        with pytest.raises(ServegymError, match=r"--repeats must lie in 1 … 999, got"):
            check_engine.Args(repeats=repeats)
