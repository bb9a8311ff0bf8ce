"""``service.csv``: rows by class and window, batch means, resuming, and what the command says of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from servegym.baselines.registry import make_policy
from servegym.envs import ServegymError, TaskConfig, load_task, make_case, play
from servegym.envs.playing.evaluation import evaluate, read_service
from servegym.envs.playing.service import Window, half_width, service_rows
from servegym.envs.task.config import with_overrides
from servegym.envs.workload.requests import EVERYBODY
from servegym.studies.commands import evaluate as command
from tests.helpers import refused

ROWS = 300


@pytest.fixture
def task(tmp_path: Path) -> TaskConfig:
    """Three hundred requests a second apart, of two classes; in steady state a third of the clients idle."""
    rng = np.random.default_rng(0)
    lines = ["prompt_tokens,output_tokens,arrival_s,class"]
    for k in range(ROWS):
        name = "chat" if k % 3 else "batch"
        lines.append(f"{rng.integers(1, 30)},{rng.integers(1, 4)},{4.0 * k},{name}")
    (tmp_path / "work.csv").write_text("\n".join(lines) + "\n")
    text = '[cluster]\nclients = 3\n[cost]\npreset = "tiny"\n[workload]\nsource = "work.csv"\n'
    text += "[slo]\nttft_s = 6.0\n"
    (tmp_path / "task.toml").write_text(text)
    return load_task(str(tmp_path / "task.toml"))


def test_rows_count_what_arrives_in_the_window(task: TaskConfig) -> None:
    case = make_case(task, 0)
    episode = play(task, "fcfs", make_policy("fcfs"), case, seed=0)
    log = episode.records
    window = Window(100.0, 200.0)
    rows = service_rows(log, case.requests, window, episode.elapsed_s)
    assert [row["class"] for row in rows] == [EVERYBODY, "batch", "chat"]
    within = (log.arrival_s >= 100.0) & (log.arrival_s <= log.arrival_s[-1] - 200.0)
    for row, chosen in zip(rows, (within, within.copy(), within.copy()), strict=True):
        if row["class"] != EVERYBODY:
            chosen &= (np.arange(ROWS) % 3 == 0) == (row["class"] == "batch")
        ttft_s = (log.first_token_s - log.arrival_s)[chosen]
        assert row["requests"] == row["finished"] == chosen.sum()
        assert row["met_slo"] == (ttft_s <= 6.0).sum()
        assert row["slo_attainment"] == pytest.approx((ttft_s <= 6.0).mean())
        length_s = log.arrival_s[-1] - 300.0
        assert row["goodput_per_s"] == pytest.approx((ttft_s <= 6.0).sum() / length_s)
        assert row["ttft_mean_s"] == pytest.approx(ttft_s.mean())
        assert row["ttft_p99_s"] == np.percentile(ttft_s, 99)
    uncut = service_rows(log, case.requests, Window(), episode.elapsed_s)
    assert uncut[0]["goodput_per_s"] == episode.row["goodput_per_s"]
    assert uncut[0]["slo_attainment"] == episode.row["slo_attainment"]


def test_a_class_without_requests_has_no_figures(task: TaskConfig) -> None:
    case = make_case(task, 0)
    log = play(task, "fcfs", make_policy("fcfs"), case, seed=0).records
    last_s = float(case.requests.arrival_s[-1])
    row = service_rows(log, case.requests, Window(last_s), 1.0)[1]  # the last one is of class chat
    assert (row["class"], row["requests"], row["met_slo"]) == ("batch", 0, 0)
    assert np.isnan([row["slo_attainment"], row["ttft_p99_s"], row["e2e_mean_s"]]).all()
    for window in (Window(last_s + 1e-6), Window(600.0, 600.0)):
        refused(partial(service_rows, log, case.requests, window, 1.0), "no request arrives from")


def test_what_has_not_arrived_and_not_finished_is_told(task: TaskConfig) -> None:
    task = with_overrides(task, {"process": {"max_seconds": 500.0}})
    case = make_case(task, 0)
    episode = play(task, "fcfs", make_policy("fcfs"), case, seed=0)
    row = service_rows(episode.records, case.requests, Window(), episode.elapsed_s)[0]
    assert 0 < row["finished"] <= row["requests"] < ROWS
    assert row["slo_attainment"] == episode.row["slo_attainment"]


def test_batch_means_by_hand(rng: np.random.Generator) -> None:
    values = rng.normal(size=200)
    means = values.reshape(20, 10).mean(axis=1)
    half = stats.t.ppf(0.975, 19) * means.std(ddof=1) / np.sqrt(20)
    assert half_width(values) == pytest.approx(half)
    assert np.isnan(half_width(values[:99]))
    assert np.isfinite(half_width(values[:100]))


def test_batch_means_hold_where_values_depend_on_each_other(rng: np.random.Generator) -> None:
    """Autoregressive values of mean 0: intervals by batches hold it as often as they say, naive ones not."""
    shocks = rng.normal(size=(200, 4000))
    values = np.zeros_like(shocks)
    for k in range(1, 4000):
        values[:, k] = 0.8 * values[:, k - 1] + shocks[:, k]
    held = np.mean([abs(run.mean()) <= half_width(run) for run in values])
    naive = np.mean([abs(run.mean()) <= 1.96 * stats.sem(run) for run in values])
    assert naive < 0.75 < 0.9 < held <= 1


def test_rows_are_kept_and_only_missing_ones_played(task: TaskConfig, tmp_path: Path) -> None:
    def go(window: Window) -> pd.DataFrame:
        evaluate(task, make_policy, ["fcfs"], [0], tmp_path / "out", progress=False, window=window)
        return read_service(tmp_path / "out").frame()

    first = go(Window())
    assert list(first["class"]) == [EVERYBODY, "batch", "chat"]
    both = go(Window(100.0, 50.0))
    assert len(both) == 6
    before = (tmp_path / "out/service.csv").stat().st_mtime_ns
    assert len(go(Window())) == 6
    assert (tmp_path / "out/service.csv").stat().st_mtime_ns == before
    (tmp_path / "out/service.csv").unlink()
    pd.testing.assert_frame_equal(go(Window()), first)


def test_no_classes_and_no_window_make_no_file(tmp_path: Path) -> None:
    task = load_task("Tiny-v0")
    evaluate(task, make_policy, ["fcfs"], [0], tmp_path, progress=False)
    assert not (tmp_path / "service.csv").exists()
    evaluate(task, make_policy, ["fcfs"], [0, 1], tmp_path, progress=False, window=Window(0.0, 0.0))
    assert not (tmp_path / "service.csv").exists()
    refused(
        lambda: evaluate(task, make_policy, ["fcfs"], [0], tmp_path, window=Window(-1.0)), "warm-up"
    )


@pytest.mark.parametrize("option", ["--warmup-s", "--cooldown-s"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_bad_windows(option: str, value: str, tmp_path: Path) -> None:
    words = ["--task", "Tiny-v0", "--policies", "fcfs", "--output", str(tmp_path / "x")]
    with pytest.raises((ServegymError, SystemExit)) as refusal:
        command.main([*words, f"{option}={value}"])
    if value == "-1":  # what is no finite number is refused with the other options
        assert str(refusal.value) == f"{option} must be ≥ 0 seconds, got -1.0"
    assert not (tmp_path / "x").exists()


def test_the_command_shows_classes_and_steady_state(
    task: TaskConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", task.name, "--policies", "fcfs", "--seeds", "0", "--jobs", "1"]
    words += ["--output", str(tmp_path / "out"), "--optimum-limit", "0"]
    assert command.main([*words, "--warmup-s", "100", "--cooldown-s", "50"]) == 0
    text = (tmp_path / "out/summary.md").read_text()
    assert "arrive after 100 s, and 50 s before the last" in text
    assert "--warmup-s 100 --cooldown-s 50" in text
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| fcfs")]
    assert [row[1].strip() for row in rows[1:]] == ["all", "batch", "chat"]
    assert " ± " in text.partition("TTFT mean")[2]
    capsys.readouterr()
