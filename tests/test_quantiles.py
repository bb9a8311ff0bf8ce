"""Presets that are drawn from published figures: what is drawn has these figures again."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from servegym.envs.task.registered import load_task
from servegym.envs.workload.arrivals import PROCESSES, Arrivals
from servegym.envs.workload.formats import FORMATS
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.envs.workload.quantiles import FIGURES, Marginal
from servegym.envs.workload.requests import MAX_TOKENS
from servegym.envs.workload.sources import make_workload
from servegym.envs.workload.windows import TraceWindow
from servegym.studies.commands import evaluate

DRAWN = 100_000


@cache
def table() -> dict[str, dict[str, Any]]:
    """The shipped figures by preset."""
    text = files("servegym.envs.data").joinpath("workloads.json").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = json.loads(text)["presets"]
    return presets


@cache
def drawn(preset: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts and outputs of a large sample."""
    return FIGURES[preset].sample(DRAWN, np.random.default_rng(0))


@pytest.mark.parametrize("side", ["prompt", "output"])
@pytest.mark.parametrize("preset", FIGURES)
def test_quantiles_mean_and_deviation(preset: str, side: str) -> None:
    """Quantiles by the share below and at each: 0.01 is over six standard errors."""
    lengths, figures = drawn(preset)[side == "output"], table()[preset][side]
    for k, quantile in enumerate(figures["quantiles"]):
        share = 0.05 * k
        assert (lengths < quantile - 0.5).mean() <= share + 0.01
        assert (lengths <= quantile + 0.5).mean() >= share - 0.01
    assert lengths.min() >= max(1, figures["quantiles"][0] - 0.5)
    assert lengths.max() <= min(figures["quantiles"][-1] + 0.5, MAX_TOKENS)
    assert lengths.mean() == pytest.approx(figures["mean"], rel=0.015)
    # Tails of the first moments that a sample of this size knows to some per cent.
    assert lengths.std() == pytest.approx(figures["std"], rel=0.2)


@pytest.mark.parametrize("preset", FIGURES)
def test_rank_correlation(preset: str) -> None:
    """Ties of short outputs lower it by up to 0.01."""
    found = stats.spearmanr(*drawn(preset)).statistic
    assert found == pytest.approx(table()[preset]["rank_correlation"], abs=0.02)


@pytest.mark.parametrize("preset", FIGURES)
def test_every_preset_says_where_it_is_from(preset: str) -> None:
    figures = table()[preset]
    assert figures["source"] in WORKLOAD_PRESETS[preset].description
    assert figures["licence"] in WORKLOAD_PRESETS[preset].description
    assert figures["requests"] >= 300
    for side in ("prompt", "output"):
        assert len(figures[side]["quantiles"]) == 21
        assert figures[side]["quantiles"] == sorted(figures[side]["quantiles"])


def test_a_seed_gives_a_fresh_draw() -> None:
    one, again, other = (
        make_workload("azure-conv", 50, 0.0, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.output_tokens, again.output_tokens)
    assert np.array_equal(one.prompt_tokens, again.prompt_tokens)
    assert not np.array_equal(one.output_tokens, other.output_tokens)


QUANTILES = np.linspace(0.0, 100.0, 21)
# Mean and deviation of lengths that are uniform up to the 95 % quantile, 95, and then up to 10,000.
TAILS = [
    (50.0 + 0.05 * 100.0, 55.0),  # Pareto
    (50.0 + 0.05 * 100.0, 20.0),  # no deviation to spare: a power
    (50.0 - 0.05 * 10.0, 30.0),  # a mean below that of the quantiles: straight to the longest
]


@pytest.mark.parametrize(("mean", "std"), TAILS)
def test_tails(mean: float, std: float) -> None:
    quantiles = QUANTILES.copy()
    quantiles[-1] = 10_000.0
    shares = np.linspace(0.0, 1.0, 1_000_001)
    lengths = Marginal(quantiles, mean, std).lengths(shares)
    assert (np.diff(lengths) >= 0).all()
    assert lengths[[0, 500_000, 950_000]].tolist() == [1, 50, 95]
    assert lengths[-1] <= 10_000
    if mean > 50:
        assert lengths.mean() == pytest.approx(mean, rel=0.01)
    if (mean, std) == TAILS[0]:
        assert lengths.std() == pytest.approx(std, rel=0.03)


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--list-workloads"]) == 0
    listed = capsys.readouterr().out
    for name in ("azure-conv", "servegen-m-mid", "gsm8k-lognormal", "burstgpt", "weibull", "day"):
        assert f"\n{name} " in listed
    assert "CC-BY-4.0" in listed


def test_the_page_names_every_key_and_column_and_its_tasks_load(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "TRAFFIC.md").read_text("utf-8")
    keys = {item.name for kind in (Arrivals, TraceWindow) for item in fields(kind)} - {"process"}
    columns = {name for form in FORMATS.values() for name in (*form.lengths, form.arrival)}
    for name in {*keys, *columns, *PROCESSES}:
        assert f"`{name}`" in page or f"{name} = " in page, name
    blocks = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.M)
    assert len(blocks) == 2
    for block in blocks:
        path = tmp_path / "task.toml"
        path.write_text(block)
        load_task(str(path))
