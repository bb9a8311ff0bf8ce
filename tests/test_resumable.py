"""Tables that a run resumes: missing rows, saved rows, and the committed tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from servegym.baselines.exact.optima import OPTIMA
from servegym.envs.errors import ServegymError
from servegym.envs.playing import tables
from servegym.envs.playing.evaluation import BEST_KNOWN, EPISODES, read_best_known, read_episodes
from servegym.envs.playing.tables import ResumableTable, Row, Schema, read_rows
from servegym.envs.task.registered import TASKS
from servegym.studies.agents.play import CURVES, EVALUATIONS

RESULTS = Path(__file__).parents[1] / "results"
SCHEMA = Schema(("name", "seed", "x"), key=("name", "seed"), texts=("name",))


def table_of(path: Path) -> ResumableTable:
    return ResumableTable(
        path, SCHEMA, "remove it", ("name", "seed"), order=lambda row: row["seed"]
    )


def row(name: str, seed: int, x: float) -> Row:
    return {"name": name, "seed": seed, "x": x}


def test_what_is_missing_is_what_has_no_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("name,seed,x\na,1,0.1\n")
    table = table_of(path)
    assert table.missing([("b", 1), ("a", 1), ("a", 0)]) == [("b", 1), ("a", 0)]
    table.add([row("a", 0, 0.5)])
    assert table.missing([("b", 1), ("a", 1), ("a", 0)]) == [("b", 1)]


def test_a_key_of_one_column_is_its_cell_and_may_have_several_rows(tmp_path: Path) -> None:
    table = ResumableTable(tmp_path / "t.csv", replace(SCHEMA, key=()), "remove it", ("seed",))
    assert table.missing(range(2)) == [0, 1]
    table.add([row("a", 1, 0.1), row("b", 1, 0.2)])
    assert table.missing(range(2)) == [0]


def test_rows_are_sorted_and_equal_ones_stand_as_they_came(tmp_path: Path) -> None:
    with table_of(tmp_path / "t.csv") as table:
        table.add([row("b", 2, 0.25), row("b", 1, 1.0)])
        table.add([row("a", 1, 2.0)])
    assert (tmp_path / "t.csv").read_text() == "name,seed,x\nb,1,1.0\na,1,2.0\nb,2,0.25\n"


def test_new_rows_of_a_key_take_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("name,seed,x\na,1,0.1\nb,1,0.2\n")
    with table_of(path) as table:
        table.add([row("a", 1, 0.3)])
    assert path.read_text() == "name,seed,x\nb,1,0.2\na,1,0.3\n"


def stopped(path: Path) -> None:
    with table_of(path) as table:
        table.add([row("a", 1, 0.1)])
        raise KeyboardInterrupt


def test_an_exception_saves_what_was_added(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "name,seed,x\na,1,0.1\n"


def test_without_a_new_row_nothing_is_written(tmp_path: Path) -> None:
    with table_of(tmp_path / "t.csv"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_rows_are_saved_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(tables, "monotonic", lambda: now[0])
    path, saved = tmp_path / "t.csv", []
    with table_of(path) as table:
        for seed, moment in enumerate((101.0, 102.5, 103.0, 104.6)):
            now[0] = moment
            table.add([row("a", seed, 0.5)])
            saved.append(len(path.read_text().splitlines()) - 1 if path.exists() else 0)
    assert saved == [0, 2, 2, 4]


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("separator", "name"), [(";", "';'"), ("\t", "tabs"), ("|", r"'\|'")])
def test_another_separator_is_named(tmp_path: Path, separator: str, name: str) -> None:
    """As a spreadsheet saves it where the comma is the decimal point, which adds cells to rows."""
    path = tmp_path / "episodes.csv"
    path.write_text(separator.join(EPISODES.columns) + "\nt" + separator + "0,5\n")
    with pytest.raises(ServegymError, match=f"line 1: its columns are separated by {name}; save"):
        read_episodes(path)
    path.write_text(",".join(EPISODES.columns) + "\n")
    assert len(read_episodes(path)) == 0


def test_a_table_of_one_column_has_no_separator(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("seed\n1\n")
    assert list(read_rows(path, Schema(("seed",)), "remove it")["seed"]) == [1]


def test_what_follows_from_deleting_a_line_is_true(tmp_path: Path) -> None:
    """Evaluations of a training run and best-known schedules are not made again by their reader."""
    path = tmp_path / "evaluations.csv"
    path.write_text("timesteps,training_s,gap_percent\n0,x,1\n")
    with pytest.raises(ServegymError, match="delete this line, and the curve is drawn without"):
        read_rows(path, EVALUATIONS, "train this run anew")
    path.write_text("timesteps,training_s,gap_percent\n0,1\n")
    with pytest.raises(ServegymError, match="delete this line, and the curve is drawn without"):
        read_rows(path, EVALUATIONS, "train this run anew")
    path = tmp_path / "best_known.csv"
    path.write_text("task,seed,best_known_s\nservegym/Tiny-v0,nan,9\n")
    empty = read_episodes(tmp_path / "none.csv")
    with pytest.raises(ServegymError, match=r"and search its case again with scripts/best_known"):
        read_best_known(path, TASKS["servegym/Tiny-v0"].name, empty)


# ---- committed tables ----------------------------------------------------------------------------

COLLECTED = Schema(("seed",), others=True, texts=("family", "estimate", "tau"), optional=None)
COMMITTED = [
    *((path, OPTIMA, None) for path in RESULTS.rglob("optima.csv")),
    *((path, CURVES, None) for path in RESULTS.rglob("curves.csv")),
    *((path, BEST_KNOWN, None) for path in RESULTS.rglob("best_known.csv")),
    *(
        (path, COLLECTED, "%.7g")
        for path in (RESULTS / "uncertainty").rglob("*.csv")
        if path.name != "episodes.csv"  # tested with all tables of episodes
    ),
    *((path, COLLECTED, "%.7g") for path in (RESULTS / "checks").glob("[ies]*/*.csv")),
]


@pytest.mark.parametrize(("path", "schema", "float_format"), COMMITTED, ids=str)
def test_committed_tables_are_written_again_as_they_are(
    path: Path, schema: Schema, float_format: str | None, tmp_path: Path
) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    if path.parts[-3:-1] != ("checks", "stealing"):
        schema = replace(schema, texts=[name for name in schema.texts if name != "tau"])
    key = ("variant", "seed") if schema.columns == CURVES.columns else ("seed",)
    ResumableTable(copy, schema, "remove it", key, float_format=float_format).save()
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("episodes.csv")), ids=str)
def test_committed_episodes_are_written_again_as_they_are(path: Path, tmp_path: Path) -> None:
    """Earlier versions had no columns of sheds, which are last, of service, clusters, unfinished requests."""
    copy, before = tmp_path / "episodes.csv", path.read_text()
    copy.write_text(before)
    ResumableTable(copy, EPISODES, "remove it", ("policy", "seed")).save()
    after = copy.read_text()
    later = (
        ("shed", ",0"),
        ("goodput_per_s", 11 * ","),
        ("replicas", ",1,0,0,0,0,0,,"),
        ("unfinished_requests", ",0"),
    )
    for first, cells in later:
        if f",{first}" not in before:
            header, *rows = after.splitlines()
            header = header[: header.index(f",{first}")]
            assert all(row.endswith(cells) for row in rows)
            after = "\n".join([header, *(row.removesuffix(cells) for row in rows), ""])
    assert after == before
