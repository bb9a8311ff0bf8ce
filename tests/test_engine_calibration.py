"""Iterations of an engine without an engine: the simulator's own, fits, logs, and what is missing."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.engines.calibration import (
    COLUMNS,
    cost_section,
    fit_costs,
    predicted_seconds,
    read_log,
    table_of,
)
from servegym.engines.iterations import Iteration, first_difference, simulate
from servegym.envs import ServegymError, load_task, make_case, play
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts, TableDecode
from servegym.envs.simulator.seconds import decode_seconds, prefill_seconds
from servegym.studies.commands import calibrate_engine, serve
from servegym.studies.engines.grid import spaced
from servegym.studies.engines.held_out import costs_line, quality_table
from servegym.studies.engines.loads import read_texts, text_load

COSTS = StageCosts(AffineDecode(2e-3, 1e-4, 2e-6), AffinePrefill(4e-3, 7e-5, 0.0, 0.0, 6e-8))


def made_log(costs: StageCosts = COSTS, count: int = 60, noise: float = 0.0) -> pd.DataFrame:
    """A log of iterations that take what the kernels say, give or take some noise."""
    rng = np.random.default_rng(0)
    tables, iterations = costs.tables(16), []
    for _ in range(count):
        n = int(rng.integers(1, 17))
        prompts = tuple(int(p) for p in rng.integers(4, 120, n))
        squares, cached = float(sum(p * p for p in prompts)), int(rng.integers(n, 200 * n))
        seconds = (
            prefill_seconds(tables, 0, sum(prompts), squares, n),
            decode_seconds(tables, 0, n, cached, 1),
        )
        first, second = (float(s * np.exp(noise * rng.standard_normal())) for s in seconds)
        ids = tuple(range(n))
        iterations.append(Iteration("prefill", ids, prompts, 0, first, first))
        iterations.append(Iteration("decode", ids, (1,) * n, cached, second, second))
    return table_of(iterations)


def test_the_simulators_iterations_are_those_of_play() -> None:
    task = load_task("Tiny-v0")
    case = make_case(task, 3)
    iterations, twin = simulate(task, make_policy("hybrid"), case.requests)
    episode = play(task, "hybrid", make_policy("hybrid"), case, seed=0)
    assert twin.clock_s == episode.elapsed_s
    assert sum(each.kind == "prefill" for each in iterations) == episode.row["prefill_stages"]
    assert sum(each.kind == "decode" for each in iterations) == episode.row["decode_rounds"]
    held = sum(each.cached_tokens for each in iterations)
    p, d = case.requests.prompt_tokens, case.requests.decode_rounds
    assert held == (p * d + d * (d + 1) // 2).sum()


def test_the_first_difference() -> None:
    trace = [Iteration("prefill", (1, 0), (3, 4)), Iteration("decode", (0, 1), (1, 1))]
    alike = [Iteration("prefill", (0, 1), (4, 3)), Iteration("decode", (1, 0), (1, 1), 9)]
    other = [Iteration("prefill", (0, 1), (4, 4)), alike[1]]
    assert first_difference(trace, alike) is None
    assert first_difference(trace, other) == 0
    assert first_difference(trace, alike[:1]) == 1


@pytest.mark.parametrize("squared", [(0.0, 0.0), (6e-8, 0.0), (0.0, 6e-8)], ids=["", "Σp²", "T²"])
def test_costs_without_noise_are_found(squared: tuple[float, float]) -> None:
    prefill = AffinePrefill(4e-3, 7e-5, squared[0], 0.0, squared[1])
    costs = StageCosts(COSTS.decode, prefill)
    log = made_log(costs)
    fit = fit_costs(log)
    assert predicted_seconds(fit.costs, log) == pytest.approx(log["seconds"], rel=1e-6)
    assert predicted_seconds(costs, log) == pytest.approx(log["seconds"], rel=1e-9)
    assert fit.decode_quality.worst_error < 1e-6
    assert fit.prefill_quality.r_squared == pytest.approx(1.0)
    if squared[0] > 0:
        assert fit.form == "prompts"
    if squared[1] > 0:
        assert fit.form == "batch"


def test_a_table_of_rounds_is_found_where_a_line_is_not_enough(write: Any) -> None:
    """A step between two numbers of clients, as kernels have them that compute by eights."""
    rounds = TableDecode((1, 8, 9, 16), (2e-3, 2.5e-3, 4e-3, 4.5e-3), 2e-6)
    costs = StageCosts(rounds, COSTS.prefill)
    log = made_log(costs, 2000)
    line, table = fit_costs(log, "batch", "line"), fit_costs(log, "batch", "table")
    assert predicted_seconds(costs, log) == pytest.approx(log["seconds"], rel=1e-9)
    assert table.decode_quality.median_error < 0.5 * line.decode_quality.median_error
    assert isinstance(table.decode, TableDecode)
    assert (table.decode.batch[0], table.decode.batch[-1]) == (1, 16)
    read = load_task(str(write("table.toml", cost_section(table.costs)))).cost
    assert isinstance(read, StageCosts)
    assert predicted_seconds(read, log) == pytest.approx(
        predicted_seconds(table.costs, log), rel=1e-5
    )
    few = made_log(costs, 30)  # so few of each number that a table has but those seen
    assert fit_costs(few, "batch", "table").decode_quality.iterations == 30
    with pytest.raises(ServegymError, match="did you mean 'table'"):
        fit_costs(log, "batch", "tabel")


def test_rounds_that_pay_for_all_the_cache_of_all_are_found(write: Any) -> None:
    costs = StageCosts(AffineDecode(2e-3, 1e-4, 1e-6, 7e-8), COSTS.prefill)
    log = made_log(costs)
    fit, line = fit_costs(log, rounds="batch"), fit_costs(log, rounds="line")
    assert predicted_seconds(costs, log) == pytest.approx(log["seconds"], rel=1e-9)
    assert predicted_seconds(fit.costs, log) == pytest.approx(log["seconds"], rel=1e-6)
    assert fit.decode.per_client_kv_token == pytest.approx(7e-8, rel=1e-6)
    assert line.decode_quality.worst_error > 1e-2
    assert line.decode.per_client_kv_token == 0.0
    read = load_task(str(write("batch.toml", cost_section(fit.costs)))).cost
    assert isinstance(read, StageCosts)
    assert read.decode.per_client_kv_token == pytest.approx(7e-8, rel=1e-5)
    assert "+ 7e-05 B·kv ms; prefill" in costs_line(fit)
    assert "B·kv" not in costs_line(line)
    assert "| decode | 1, B, kv, B·kv | 60 |" in quality_table(log)


def test_a_table_with_the_term_predicts_what_the_kernels_say() -> None:
    rounds = TableDecode((1, 8, 16), (2e-3, 2.5e-3, 4.5e-3), 1e-6, 7e-8)
    log = made_log(StageCosts(rounds, COSTS.prefill))
    said = predicted_seconds(StageCosts(rounds, COSTS.prefill), log)
    assert said == pytest.approx(log["seconds"], rel=1e-9)


def test_noise_makes_no_prediction_too_low() -> None:
    log = made_log(count=400, noise=0.3)
    seconds = predicted_seconds(fit_costs(log, "batch").costs, log)
    assert seconds.sum() == pytest.approx(log["seconds"].sum(), rel=0.03)


def test_a_task_takes_the_costs(write: Any) -> None:
    path = write("engine.toml", cost_section(COSTS))
    assert load_task(str(path)).cost == COSTS


def test_a_log_is_read_and_fitted_and_predicts_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        made_log(noise=0.05).to_csv(tmp_path / f"{name}.csv", index=False)
    options = ["--log", f"{tmp_path}/a.csv", "--held-out-log", f"{tmp_path}/b.csv"]
    assert calibrate_engine.main([*options, "--output", f"{tmp_path}/out"]) == 0
    text = capsys.readouterr().out
    assert "| prefill | 1, T, T² | 60 |" in text
    assert "Held out: 120 iterations took" in text
    task = load_task(str(tmp_path / "out" / "engine.toml"))
    assert task.cluster.clients == 16
    assert isinstance(task.cost, StageCosts)
    assert task.cost.decode.per_kv_token == pytest.approx(2e-6, rel=0.5)


def test_a_folder_holds_the_log_that_was_fitted_and_none_of_an_earlier_run(tmp_path: Path) -> None:
    log, kept = tmp_path / "a.csv", tmp_path / "out" / "iterations.csv"
    made_log().to_csv(log, index=False)
    kept.parent.mkdir()
    kept.write_text("of an engine, long ago")
    calibrate_engine.main(["--log", str(log), "--output", str(kept.parent)])
    assert kept.read_text() == log.read_text()
    calibrate_engine.main(["--log", str(kept), "--output", str(kept.parent), "--rounds", "table"])
    assert kept.read_text() == log.read_text()
    assert 'model = "table"' in (kept.parent / "engine.toml").read_text()


def rows(**changes: Any) -> str:
    row = {"kind": "decode", "requests": 1, "tokens": 1, "cached_tokens": 0, "seconds": 0.5}
    return ",".join(str(value) for value in (row | changes).values())


@pytest.mark.parametrize(
    ("changes", "message", "legal"),
    [
        ({"kind": "decod"}, "kind 'decod'; did you mean 'decode'", {"kind": "prefill"}),
        ({"requests": 0}, "requests must be a whole number in 1 … 1e\\+12, got 0", {"requests": 1}),
        ({"requests": 1.5}, "requests must be a whole number", {"requests": 2.0}),
        ({"tokens": "x"}, "tokens must be a whole number in 1 …", {"tokens": 1}),
        ({"tokens": "1e308"}, "tokens must be a whole number in 1 …", {"tokens": 1e12}),
        (
            {"cached_tokens": -1},
            "cached_tokens must be a whole number in 0 …",
            {"cached_tokens": 0},
        ),
        ({"seconds": 0}, "seconds must be a number in 1e-09 … 1e\\+09, got 0", {"seconds": 1e-9}),
        ({"seconds": "nan"}, "seconds must be a number in", {"seconds": 1}),
        ({"seconds": "1e-320"}, "seconds must be a number in", {"seconds": 1e9}),
    ],
)
def test_a_wrong_row_is_refused(
    write: Any, changes: dict[str, Any], message: str, legal: dict[str, Any]
) -> None:
    head = ",".join(COLUMNS)
    with pytest.raises(ServegymError, match=f"line 3: .*{message}"):
        read_log(write("bad.csv", f"{head}\n{rows()}\n{rows(**changes)}\n"))
    assert len(read_log(write("good.csv", f"{head}\n{rows()}\n{rows(**legal)}\n"))) == 2


def test_a_log_that_says_too_little_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="no column seconds; a log of iterations has kind,"):
        read_log(write("few.csv", "kind,requests,tokens,cached_tokens\n"))
    with pytest.raises(ServegymError, match="no such log of iterations"):
        read_log(tmp_path / "none.csv")
    log = made_log()
    with pytest.raises(ServegymError, match="has 9 iterations of kind prefill, a fit needs 10"):
        fit_costs(log.iloc[:18])
    assert fit_costs(log.iloc[:20]).prefill_quality.iterations == 10
    with pytest.raises(ServegymError, match="needs the column prompt_squares"):
        fit_costs(log.drop(columns="prompt_squares"), "prompts")
    with pytest.raises(ServegymError, match="did you mean 'batch'"):
        fit_costs(log, "batchs")


def test_a_grid_is_spaced_by_factors() -> None:
    assert spaced(1, 16, 5) == [1, 2, 4, 8, 16]
    assert spaced(4, 4, 6) == [4]


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (serve.main, ["--policy", "hybird"], "did you mean 'hybrid'"),
        (serve.main, ["--compare", "fcfs,hybrid", "--clock", "wall"], "take --clock busy"),
        (serve.main, ["--clients", "0"], "--clients must lie in 1 … 4096, got 0"),
        (serve.main, ["--requests", "0"], "--requests must lie in 1 …"),
        (serve.main, ["--rate", "-1"], "--rate must lie in 0 …"),
        (serve.main, ["--port", "65536"], "--port must lie in 0 … 65535, got 65536"),
        (serve.main, ["--port", "65535"], "knows output lengths, and clients tell nobody; take"),
        (serve.main, ["--prompts", "none.txt"], r"none\.txt: no such file of prompts"),
        (calibrate_engine.main, ["--held-out-log", "a.csv"], "--held-out-log needs --log"),
        (calibrate_engine.main, ["--clients", "1"], "--clients must lie in 2 …"),
        (calibrate_engine.main, ["--log", "none.csv"], r"none\.csv: no such log of iterations"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, main: Any, options: list[str], message: str
) -> None:
    with pytest.raises(ServegymError, match=message) as refused:
        main([*options, "--output", str(tmp_path / "out")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_policy_that_needs_lengths_which_nobody_predicts_is_refused(write: Any) -> None:
    with pytest.raises(ServegymError, match="tells nobody; take --task GSM8KPredicted-v0"):
        text_load(["Hello."], None, None, load_task("GSM8K-v0"), 8, 0)
    with pytest.raises(ServegymError, match="holds no prompt; one a line"):
        read_texts(write("empty.txt", "\n  \n"))
    assert read_texts(write("two.txt", "one\n\n two \n")) == ["one", "two"]


def test_without_transformers_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    for name in [name for name in sys.modules if name.startswith("servegym.engines.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ServegymError, match="transformers is not installed; get it by"):
        importlib.import_module("servegym.engines.huggingface")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_is_said_where_to_read_how_to_get_it() -> None:
    with pytest.raises(ServegymError, match=r"no vLLM that works here .*vllm\.md says how"):
        importlib.import_module("servegym.engines.vllm")
