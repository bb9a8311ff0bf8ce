"""Layers timed by depth: the lines through them, the command on a CPU, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from servegym.engines.calibration import fit_costs, predicted_seconds
from servegym.envs import ServegymError, load_task
from servegym.envs.machine.costs import StageCosts, TableDecode
from servegym.studies.commands import profile_gpu
from servegym.studies.engines.depths import Cell, cells, depth_table, extrapolated, log_of, timed

TINY = (
    "--device cpu --width 32 --heads 2 --inner 64 --vocabulary 50 --layers 9 --depths 1,2 "
    "--held-out-depth 4 --batches 1,2,4 --cached 4,8,16,32 --prompts 2,4,8,12,16,24,32,48,64,96 --repeats 3 "
    "--warm-ups 1 --clients 4"
).split()


def layer_s(cell: Cell) -> float:
    """Seconds of a layer: a table by clients and a rate, or tokens of prompts."""
    if cell.kind == "prefill":
        return 1e-4 + 1e-6 * cell.requests * cell.new
    return {1: 1e-4, 2: 1.5e-4, 4: 1.6e-4}[cell.requests] + 1e-7 * cell.requests * (cell.cached + 1)


def measured(cell: Cell, depth: int, mode: str) -> Sequence[float]:
    late = 5e-3 if mode == "eager" else 1e-3
    return [late + depth * layer_s(cell) + more for more in (-1e-5, 0.0, 1e-5)]


def test_a_line_by_depth_says_a_deeper_model_and_all_its_layers() -> None:
    todo = cells([1, 2, 4], [8, 16, 32, 64], list(range(16, 176, 16)), 300)
    table = pd.DataFrame(timed(todo, [2, 4, 8], ["eager", "graph"], measured))
    assert len(table) == 3 * (2 * 12 + len(todo) - 12)
    found = extrapolated(table, 8, 80)
    assert found["predicted_s"].to_numpy() == pytest.approx(found["held_out_s"].to_numpy())
    assert "| decode | graph | 12 | 1.000 | +0.0% |" in depth_table(found, 8)
    log = log_of(found)
    for place, cell in enumerate(todo):  # decode rounds by graph, without the eager start
        late = 1e-3 if cell.kind == "decode" else 5e-3
        assert log["seconds"][place] == pytest.approx(late + 80 * layer_s(cell))
    fit = fit_costs(log, rounds="table")
    assert fit.decode.per_kv_token == pytest.approx(80e-7, rel=1e-3)
    assert predicted_seconds(fit.costs, log) == pytest.approx(log["seconds"], rel=1e-3)


def test_noise_that_gets_less_with_depth_makes_no_layer_that_gives_time_back() -> None:
    cell = Cell("decode", 1, 8, 1)
    rows = list(timed([cell], [1, 2, 4], ["eager"], lambda _, depth, __: [1e-3 / depth]))
    found = extrapolated(pd.DataFrame(rows), 4, 80)
    assert found["layer_s"][0] == 0
    assert found["seconds"][0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--depths 2", "--depths must name at least two depths"),
        ("--depths 2,x", "--depths must be whole numbers in 1 … 80, as in 1,2,4, got 'x'"),
        ("--depths 2,81", "--depths must be whole numbers in 1 … 80"),
        ("--held-out-depth 8", "--held-out-depth must not be one of --depths, got 8"),
        ("--batches 0", "--batches must be whole numbers in 1 … 1000000"),
        ("--prompts ,", "--prompts names no number"),
        ("--batches 1 --cached 8", "needs 10 cells of kind decode, these options give 1 within"),
        ("--width 100", "--width must be an even multiple of the 64 heads, got 100"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message) as refused:
        profile_gpu.main([*options.split(), "--output", str(tmp_path / "out")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_a_line_says_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ServegymError, match="torch sees no GPU here; take --device cpu"):
        profile_gpu.main(["--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_stage_by_hand_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and a decode round behind them give the logits of the unmodified model."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from servegym.engines.huggingface.layers import Layers, Shape

    layers = Layers(Shape(32, 2, 64, 50), 3, 60, "cpu")
    drawn: list[Any] = []
    draw = torch.randint

    def noted(*given: Any, **named: Any) -> Any:
        drawn.append(draw(*given, **named))
        return drawn[-1]

    monkeypatch.setattr(torch, "randint", noted)
    with torch.inference_mode():
        first = layers.stage(2, 0, 7)(3)
        whole = layers._model(drawn[0]).logits[:, -1:]
        assert torch.allclose(first, whole, atol=1e-5)
        held = [view.clone() for view in layers._slots._views]
        last = layers.stage(2, 7, 1)
        for view, before in zip(layers._slots._views, held, strict=True):
            view[:, :, :, :7] = before
        whole = layers._model(torch.cat(drawn, dim=1)).logits[:, -1:]
        assert torch.allclose(last(3), whole, atol=1e-5)
    assert "attention" in layers.attention(last)


def test_the_command_runs_on_a_cpu_and_a_task_takes_its_costs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert profile_gpu.main([*TINY, "--output", str(tmp_path)]) == 0
    task = load_task(str(tmp_path / "cost.toml"))
    assert task.cluster.clients == 4
    assert isinstance(task.cost, StageCosts)
    assert isinstance(task.cost.decode, TableDecode)
    page = (tmp_path / "profile.md").read_text()
    assert "Attention by torch's kernels: prefill: _scaled_dot_product" in page
    assert "| decode | eager | 12 |" in page
    assert len(pd.read_csv(tmp_path / "cells.csv")) == 3 * 22
    assert len(pd.read_csv(tmp_path / "iterations.csv")) == 22
