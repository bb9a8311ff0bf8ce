"""The simulated cluster: cases that can be solved by hand, and the page."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from servegym.envs import ServegymError
from servegym.envs.playing.nodes.driver import LONG_S
from servegym.studies import nodes_measured
from servegym.studies.commands import study_nodes
from servegym.studies.nodes import Costs, Work, calls_in, costs_of, saturation, simulate

FREE = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
LONG = Work("long calls, each a batch of its own", LONG_S)


def test_without_costs_all_workers_are_busy() -> None:
    outcome = simulate(LONG, 12, nodes=2, cores=3, costs=FREE)
    assert (outcome.seconds, outcome.speed_up, outcome.workers_busy) == (2 * LONG_S, 6.0, 1.0)
    assert outcome.batch == 1.0


def test_workers_wait_for_the_kernels_of_their_node() -> None:
    outcome = simulate(LONG, 6, 2, 3, replace(FREE, compile_s=40.0))
    assert outcome.seconds == 40.0 + LONG_S


def test_the_driver_serves_one_batch_after_the_other() -> None:
    """Ten batches of 1 s to submit: the tenth worker begins after 10 s, and its result takes 2 s more."""
    outcome = simulate(LONG, 10, 1, 10, replace(FREE, submit_s=1.0, result_s=2.0))
    assert outcome.driver_busy == pytest.approx(30.0 / outcome.seconds)
    assert outcome.seconds == 10.0 + 10 * 2.0  # results wait for the driver
    slow = simulate(LONG, 10, 1, 10, replace(FREE, schedule_s=1.0))
    assert slow.seconds == 0.5 * 10 + LONG_S + 0.5  # half a second when it comes, half when it ends


def test_small_calls_share_a_batch_and_rows_cost_the_driver() -> None:
    work = Work("", 0.01)
    outcome = simulate(work, 10_000, 1, 1, replace(FREE, start_s=0.1, row_s=0.001))
    assert outcome.batch > 30
    assert outcome.driver_busy * outcome.seconds == pytest.approx(10.0)
    assert outcome.seconds < 10_000 * 0.01 + 0.1 * 300 + 1


def test_saturation_is_where_efficiency_falls() -> None:
    assert calls_in(LONG, 50.0, nodes=2, cores=1, most=100) == 20
    assert calls_in(LONG, 50.0, nodes=2, cores=1, most=7) == 7
    costs = replace(FREE, result_s=0.1)  # fifty workers keep the driver busy
    assert saturation(LONG, 1, 1.0, costs, 2000, 0.9, 64) == 32
    assert saturation(LONG, 64, 1.0, costs, 2000, 0.9, 64) == 0
    assert saturation(LONG, 1, 1.0, FREE, 10**4, 0.9, 8) == 8


def test_processors_that_other_processes_take_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is not idle, less this process and its children; what a hypervisor takes counts."""
    times = namedtuple("times", "user system idle steal guest")
    clock, machine, own = [0.0], [times(5.0, 1.0, 100.0, 0.0, 1.0)], [(2.0, 1.0, 99.0)]

    def process(children: list[Any]) -> Any:
        return SimpleNamespace(cpu_times=lambda: own[0], children=lambda recursive: children)

    fake = SimpleNamespace(cpu_times=lambda: machine[0], Process=lambda: process([process([])]))
    monkeypatch.setitem(sys.modules, "psutil", fake)
    monkeypatch.setattr("servegym.studies.nodes_measured.time.perf_counter", lambda: clock[0])
    others = nodes_measured.OtherProcesses()
    clock[0], machine[0] = 10.0, times(20.0, 2.0, 102.0, 4.0, 3.0)  # 15 + 1 + 4 s busy
    own[0] = (5.0, 2.0, 999.0)  # 4 s each, of two processes
    assert others.mean() == pytest.approx((20 - 2 * 4) / 10)


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--parts", "plan", "--cores", "2", "--hours", "0.01", "--most-calls", "500"]
    assert study_nodes.main([*options, "--output", str(tmp_path)]) == 0
    assert "Nothing was measured here" in capsys.readouterr().out
    measured = {
        "batch_s": 0.004,
        "driver_batch_s": 0.002,
        "call_s": 1e-4,
        "processors": 2.0,
        "others": 0.5,
    }
    (tmp_path / "measured.json").write_text(json.dumps(measured | {"submit_s": 0.0015}))
    (tmp_path / "speed_up.csv").write_text(
        "repeat,workers,cases,seconds,others\n0,1,500,60.0,0.05\n0,2,500,30.0,0.1\n1,1,500,64.0,0.25\n1,2,500,40.0,0.1\n"
    )
    assert study_nodes.main([*options, "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "1.80 × one worker, the\nmedian of 2 pairs of runs in turn (1.60 … 2.00)" in text
    assert "`ppo` on 500 cases of\nGSM8K-v0, takes 62 s on one worker. Meanwhile" in text
    assert "Meanwhile other processes kept 0.05 … 0.25 processors busy" in text
    assert "while other processes kept 0.50 processors busy" in text
    assert "| driver: pack and submit a batch" in text
    assert text.strip() == (tmp_path / "plan.md").read_text().strip()
    assert costs_of(measured | {"submit_s": 0.0015}) == Costs(submit_s=0.0015)
    (tmp_path / "measured.json").write_text('{"submit_s": "much"}')
    with pytest.raises(ServegymError, match=r"measured.json: damaged; make it anew with --parts"):
        study_nodes.main([*options, "--output", str(tmp_path)])
