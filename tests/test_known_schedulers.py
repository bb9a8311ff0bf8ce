"""The table of the schedulers people know: committed tables, a second source, resuming, refusals."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest

from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.envs import TASKS, ServegymError, make_case, play
from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.playing.service import Window, service_rows
from servegym.envs.playing.summary import fixed
from servegym.studies import anew
from servegym.studies import known_schedulers as study
from servegym.studies.commands import cluster
from servegym.studies.known_schedulers import ENTRIES, ROWS, WHO, Entry, play_case
from tests.test_scripts import refused

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results/cluster"
COMMITTED = pd.read_csv(RESULTS / "rows.csv")

FEW = (
    Entry("Chat-v0", Window(60.0, 30.0), [name for name in WHO if name not in ("vllm", "fcfs")]),
    Entry("Rollout-v0", None, [name for name in WHO if name != "lpt"]),
)


# ---- committed results ---------------------------------------------------------------------------


def test_the_tables_follow_from_the_episodes() -> None:
    page = (RESULTS / "table.md").read_text("utf-8")
    (command,) = re.findall(r"^`(python .*)`$", page, re.M)
    assert study.report(COMMITTED, command) == page
    assert study.short_report(COMMITTED) == (RESULTS / "short.md").read_text("utf-8")
    assert "<!-- table: results/cluster/short.md -->" in (ROOT / "README.md").read_text("utf-8")
    played = COMMITTED.groupby("task")["policy"].unique()
    assert {entry.name: list(played[entry.name]) for entry in ENTRIES} == {
        entry.name: entry.policies for entry in ENTRIES
    }
    assert set(COMMITTED["seed"]) == set(range(HELD_OUT_SEED, HELD_OUT_SEED + 100))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_tables_of_tasks_say_the_same(entry: Entry) -> None:
    """They were played decision by decision by ``scripts/evaluate.py``."""
    page = (ROOT / "results/tasks" / entry.name / "summary.md").read_text("utf-8")
    column = "gap (%)" if entry.window is None else "SLO met (%)"
    told, place = {}, -1
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if "policy" in cells:
            place = cells.index(column) if column in cells else -1
        elif place > 0 and len(cells) > place:
            told[cells[1]] = cells[place]
    rows = COMMITTED[COMMITTED["task"] == entry.name]
    means = 100 * rows.groupby("policy")[["within_limits", "gap"]].mean()
    compared = [name for name in entry.policies if name in told]
    assert len(compared) > 6
    for name in compared:
        mean = float(means["gap" if entry.window is None else "within_limits"][name])
        assert told[name].partition(" ± ")[0] == fixed(mean, 2 if entry.window is None else 1)


def test_the_code_still_plays_what_is_committed() -> None:
    for entry in FEW:
        for row in play_case(entry, entry.policies, HELD_OUT_SEED):
            keys = ("task", "policy", "seed")
            chosen = (COMMITTED[list(keys)] == [row[key] for key in keys]).all(axis=1)
            for column in ("within_limits", "gap"):
                found = COMMITTED[chosen][column].item()
                assert found == pytest.approx(row[column], rel=1e-5, nan_ok=True)


# ---- plays ---------------------------------------------------------------------------------------


def test_sarathi_is_vllm_at_the_budget_of_the_task() -> None:
    assert make_trigger_policy("sarathi") == make_trigger_policy("vllm")


@pytest.mark.parametrize("name", ["vllm", "fcfs"])
def test_a_share_is_that_of_the_evaluation(name: str) -> None:
    task, window = TASKS["servegym/Chat-v0"], Window(60.0, 30.0)
    case = make_case(task, 3)
    episode = play(task, name, make_policy(name), case, 3)
    (row,) = play_case(FEW[0], [name], 3)
    served = service_rows(episode.records, case.requests, window, episode.elapsed_s)[0]
    assert row["within_limits"] == served["slo_attainment"]


def run(folder: Path, cases: int = 2) -> str:
    options = ["--cases", str(cases), "--jobs", "1", "--output", str(folder)]
    with redirect_stdout(io.StringIO()) as printed:
        assert cluster.main(options) == 0
    return printed.getvalue()


def test_an_interrupted_run_goes_on_and_a_finished_one_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cluster, study):
        monkeypatch.setattr(module, "ENTRIES", FEW)
    text, rows = run(tmp_path), tmp_path / "rows.csv"
    whole = rows.read_text("utf-8")
    assert len(whole.splitlines()) == 1 + 2 * 3
    assert not (tmp_path / anew.UNFINISHED).exists()

    anew.begin(tmp_path, {}, ())  # as if interrupted
    lines = whole.splitlines(keepends=True)
    marked = re.sub(r",[\d.]+,$", ",0.5,", lines[1].rstrip("\n")) + "\n"
    rows.write_text("".join([lines[0], marked, *lines[3:]]), "utf-8")
    assert run(tmp_path) != text  # the row that stood there was kept, the others were played
    assert rows.read_text("utf-8") == "".join([lines[0], marked, *lines[2:]])

    assert run(tmp_path) == text  # anew
    assert rows.read_text("utf-8") == whole


def test_rows_of_other_tasks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.open_rows(tmp_path)
    cluster.open_rows(tmp_path)
    monkeypatch.setattr(cluster, "ENTRIES", (FEW[0]._replace(window=Window(1.0, 1.0)),))
    with pytest.raises(ServegymError, match="holds episodes of another task, setting or version"):
        cluster.open_rows(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--cases", "1"], "--cases must lie in 2"), (["--jobs", "0"], "--jobs must lie in 1")],
)
def test_refusals(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused("cluster", tmp_path / "out", *options)


def test_the_schema_is_that_of_the_file() -> None:
    assert tuple(COMMITTED.columns) == tuple(ROWS.columns)
