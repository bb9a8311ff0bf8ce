"""How many arrivals a policy sustains: the search, the statistics, refusals, resuming, committed pages."""

from __future__ import annotations

import io
import shlex
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs import TASKS, ServegymError, make_case, with_overrides
from servegym.envs.playing.service import Window
from servegym.studies import capacity as study
from servegym.studies.capacity import SUSTAINED, TOO_MUCH, UNDECIDED, Bracket, next_rate
from servegym.studies.commands import capacity
from tests.test_scripts import refused

RESULTS = Path(__file__).parents[1] / "results/capacity"
CHAT = TASKS["servegym/Chat-v0"]
SMALL = ["--requests", "100", "--episodes", "12", "--narrow", "0.5", "--jobs", "1"]
SMALL += ["--warmup-s", "2", "--cooldown-s", "2", "--policies", "vllm,fcfs"]


# ---- the search ----------------------------------------------------------------------------------


def searched(low: float, high: float, start: float = 4.0) -> dict[float, int]:
    """Verdicts where rates up to ``low`` are sustained, those from ``high`` on not."""
    verdicts: dict[float, int] = {}
    while (rate := next_rate(verdicts, start, 0.1, 50.0, 0.02)) is not None:
        assert rate not in verdicts
        verdicts[rate] = SUSTAINED if rate <= low else TOO_MUCH if rate >= high else UNDECIDED
    return verdicts


@pytest.mark.parametrize("truth", [0.2, 3.99, 4.0, 5.3, 47.0])
def test_a_bracket_holds_the_truth_and_is_narrow(truth: float) -> None:
    verdicts = searched(truth, np.nextafter(truth, inf))
    bracket = Bracket.of(verdicts)
    assert bracket.low <= truth < bracket.high <= 1.021 * bracket.low
    assert not bracket.undecided
    assert len(verdicts) < 20


def test_both_sides_of_what_stays_undecided_are_narrowed() -> None:
    bracket = Bracket.of(searched(5.0, 6.0))
    assert bracket.low <= 5.0 < bracket.undecided[0] <= 1.021 * bracket.low
    assert bracket.high / 1.021 <= bracket.undecided[-1] < 6.0 <= bracket.high


def test_a_rate_above_one_that_was_too_much_does_not_count() -> None:
    assert Bracket.of({3.0: 1, 4.0: -1, 5.0: 1, 6.0: -1}) == Bracket(3.0, 4.0)


def test_a_search_ends_where_rates_run_out() -> None:
    assert Bracket.of(searched(0.0, 0.05)) == Bracket(0.0, 0.1)
    never_decided = searched(0.0, inf)
    assert min(never_decided) == 0.1
    always = searched(99.0, inf)
    assert max(always) == 50.0
    assert Bracket.of(always).high == inf


def test_verdicts_by_hand() -> None:
    """Mean 0.9, standard error 0.01, t of 2 degrees of freedom at 95 %: 4.303."""
    shares = 0.9 + 0.01 * np.sqrt(3.0) * np.array([-1.0, 0.0, 1.0])
    assert study.interval(shares, 0.95) == pytest.approx((0.9, 0.04303), abs=1e-5)
    for target, verdict in ((0.8569, 1), (0.857, 0), (0.943, 0), (0.9431, -1)):
        assert study.verdict_of(shares, target, 0.95) == verdict
    assert study.verdict_of(np.ones(3), 1.0, 0.95) == SUSTAINED
    assert study.looks(640) == [10, 20, 40, 80, 160, 320, 640]
    assert study.looks(10) == [10]
    assert study.looks(4) == [4]


@pytest.mark.parametrize(
    "arrivals",
    [
        {"process": "gamma", "rate_per_s": 1.0},
        {"process": "on-off", "burst_rate_per_s": 4.0, "burst_s": 30.0, "calm_s": 60.0},
    ],
)
def test_rates_are_set(arrivals: dict[str, object]) -> None:
    task = with_overrides(CHAT, {"workload": {"requests": 500, "arrivals": arrivals}})
    slow, fast = (study.at_rate(task, rate) for rate in (2.0, 4.0))
    for rated, rate in ((slow, 2.0), (fast, 4.0)):
        assert rated.workload.arrivals is not None
        assert rated.workload.arrivals.mean_rate_per_s == pytest.approx(rate)
    drawn = [make_case(rated, 3).requests for rated in (slow, fast)]
    assert np.array_equal(drawn[0].output_tokens, drawn[1].output_tokens)
    if arrivals["process"] == "gamma":
        assert np.allclose(drawn[0].arrival_s, 2.0 * drawn[1].arrival_s)


# ---- the page ------------------------------------------------------------------------------------


def seen(*rows: tuple[float, float, int]) -> pd.DataFrame:
    names = ["rate_per_s", "attainment", "verdict"]
    return pd.DataFrame(rows, columns=names).assign(episodes=10, half=0.01)


def test_the_table_says_what_is_known() -> None:
    rates = {
        "found": seen((4.0, 0.95, 1), (5.0, 0.91, 0), (6.0, 0.87, -1)),
        "never": seen((0.1, 0.5, -1)),
        "always": seen((4.0, 0.95, 1), (9.0, 0.92, 1)),
    }
    table = study.table_of(rates, 0.9, 10.0, 20.0).set_index("policy")
    found = table.loc["`found`"]
    assert list(found) == [
        "5.25", "4.00 … 6.00", "5.00", "95.0 / 87.0", "3", "30", "0.53", "0.26",
    ]  # fmt: skip
    assert table.loc["`never`", "bracket"] == "below 0.100"
    assert table.loc["`always`", "bracket"] == "above 9.00"
    assert "rate / μ" not in study.table_of(rates, 0.9, 10.0, 0.0)
    never, always = study.without_capacity(rates, 0.9)
    assert never.startswith("policy never never meets 90 % of the limits: 50.0 % at 0.1 a second")
    assert always.startswith("policy always always meets 90 % of the limits: 92.0 % at 9 a second")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "Rollout-v0"], "Rollout-v0 draws no arrivals"),
        (["--task", "Chet-v0"], "did you mean 'Chat-v0'"),
        (["--attainment", "1.01"], "--attainment must lie in 0 … 1, got 1.01"),
        (["--attainment", "-0.1"], "--attainment must lie in 0 … 1"),
        (["--policies", "vlm"], "did you mean 'vllm'"),
        (["--policies", ","], "--policies names no policy"),
        (["--reference", "vlm"], "did you mean 'vllm'"),
        (["--requests", "800"], "800 requests are too few: at the fluid capacity, 4.98 a second"),
        (
            ["--policies", "vllm", "--task", "Cluster-v0", "--reference", "sglang"],
            "--reference sglang: ",
        ),
        (["--episodes", "1"], "--episodes must lie in 2"),
        (["--warmup-s", "-1"], "the warm-up must be ≥ 0"),
    ],
)
def test_refusals(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused("capacity", tmp_path / "out", *options)


def test_a_task_without_limits_or_cut_short_is_refused() -> None:
    study.check_task(CHAT)
    with pytest.raises(ServegymError, match="has no limits to meet"):
        study.check_task(replace(CHAT, slo=type(CHAT.slo)()))
    with pytest.raises(ServegymError, match="cuts episodes short"):
        study.check_task(with_overrides(CHAT, {"process": {"max_decisions": 9}}))


# ---- runs ----------------------------------------------------------------------------------------


def run(folder: Path, *options: str) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        assert capacity.main([*SMALL, *options, "--output", str(folder)]) == 0
    return printed.getvalue()


def test_an_interrupted_search_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "LOAD_REQUESTS", 100)
    monkeypatch.setattr(capacity, "LOAD_SEEDS", 1)
    text, rows = run(tmp_path), tmp_path / "Chat-v0/rows.csv"
    whole = rows.read_text("utf-8")
    lines = whole.splitlines(keepends=True)
    rows.write_text("".join(lines[:1] + lines[5:]), "utf-8")
    assert run(tmp_path) == text
    assert rows.read_text("utf-8") == whole
    with pytest.raises(ServegymError, match="holds rows of another task, setting or version"):
        run(tmp_path, "--warmup-s", "3")
    with pytest.raises(ServegymError, match=r"policy vllm always meets 0 % of the limits"):
        run(tmp_path, "--attainment", "0")


def test_what_is_no_rule_is_played_too() -> None:
    task = study.at_rate(study.with_requests(CHAT, 30), 3.0)
    rows = [study.play_episode(task, name, Window(), make_policy, 5) for name in ("vllm", "random")]
    assert [row["requests"] for row in rows] == [30, 30]


@pytest.mark.parametrize("task", ["Chat-v0", "Cluster-v0"])
def test_the_committed_page_follows_from_its_rows(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same search in the committed rows plays nothing and writes the same page."""
    shutil.copytree(RESULTS / task, tmp_path / "results/capacity" / task)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "play_episode", pytest.fail)
    page = (RESULTS / task / "capacity.md").read_text("utf-8")
    command = next(line for line in page.splitlines() if line.startswith("`python"))
    with redirect_stdout(io.StringIO()) as printed:
        assert capacity.main(shlex.split(command.strip("`"))[2:]) == 0
    assert printed.getvalue().strip() == page.strip()


def test_the_summary_page_repeats_the_tables() -> None:
    page = (RESULTS / "README.md").read_text("utf-8")
    for task in ("Chat-v0", "Cluster-v0"):
        for line in (RESULTS / task / "capacity.md").read_text("utf-8").splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            if line.startswith("| `"):
                (row,) = (text for text in page.splitlines() if text.startswith(f"| {cells[1]}"))
                assert f"| {cells[2]} | {cells[3]} | {cells[7]}" in row or (
                    f"| {cells[2]} | {cells[3]} | {cells[8]}" in row
                )
