"""Tables of results: read to the last bit, or refused with the line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from servegym.baselines.exact.optima import find_optima
from servegym.baselines.registry import make_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import COLUMNS, evaluate, read_best_known, read_episodes
from servegym.envs.playing.tables import Schema, read_rows
from servegym.envs.task.registered import TASKS

TINY = TASKS["servegym/Tiny-v0"]
RESULTS = Path(__file__).parents[1] / "results"
SCHEMA = Schema(
    ("name", "seed", "x", "y", "proven"),
    key=("name", "seed"),
    texts=("name",),
    flags=("proven",),
    optional=("y",),
    defaults={"y": 7.0},
)
HEADER = "name,seed,x,y,proven\n"
Write = Callable[[str, str], Path]


def read(path: Path) -> pd.DataFrame:
    return read_rows(path, SCHEMA, "remove the file")


def test_every_cell_is_what_it_was(write: Write) -> None:
    text = HEADER + "a,0,0.1,,True\nb,12345678901234567,1e-300,0.30000000000000004,False\n"
    table = read(write("t.csv", text))
    assert list(table["seed"]) == [0, 12345678901234567]
    assert list(table["x"]) == [0.1, 1e-300]
    assert math.isnan(table["y"][0])
    assert table["y"][1] == 0.1 + 0.2
    assert list(table["proven"]) == [True, False]
    assert table.to_csv(index=False) == text


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (HEADER, 0),  # only a header: nothing was finished yet
        (HEADER.strip(), 0),
        (HEADER + "a,0,1,2,True\na,0,1,2,True\n", 1),  # a doubled row is taken once
        (HEADER + "a,0,1,2,True\n\n\n", 1),  # blank lines
        ("\ufeff" + HEADER + "a,0,1,2,True\r\n", 1),  # as some editors save it
        ("name,seed,x,proven\na,0,1,True\n", 1),  # of an earlier version
    ],
)
def test_what_is_read(write: Write, text: str, rows: int) -> None:
    table = read(write("t.csv", text))
    assert list(table.columns) == list(SCHEMA.columns)
    assert len(table) == rows


def test_no_file_is_a_table_without_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv").shape == (0, 5)


def test_a_column_of_an_earlier_version_has_its_default(write: Write) -> None:
    assert list(read(write("t.csv", "name,seed,x,proven\na,0,1,True\n"))["y"]) == [7.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; remove the file"),
        ("\n\n", "empty; remove the file"),
        ("a,b\n1,2\n", "not a table of this version: no column 'name'; remove the file"),
        (HEADER.replace("x", "z"), "not a table of this version: no column 'x'"),
        (
            HEADER.replace("\n", ",z\n"),
            "not a table of this version: column 'z' is not one of its columns; remove the file",
        ),
        (
            HEADER.replace("x,y", "y,x"),
            "not a table of this version: its columns are in another order",
        ),
        (HEADER.replace("y", "x"), "not a table of this version: a column stands there twice"),
        (
            HEADER + "a,0,1,2,True\nb,1,1",
            "line 3: 3 cells where the header has 5; delete this line",
        ),
        (HEADER + "a,0,1,2,True,9\n", "line 2: 6 cells"),
        (HEADER + "a,0,1,2,Tr", "line 2: cut off"),
        (HEADER + "a,0,1,2,True\na,0,1.5,2,True\n", "lines 2 and 3: two different rows of name a"),
        (HEADER + "a,0,x,2,True\n", "line 2: x must be a number, got 'x'"),
        (HEADER + "a,0,,2,True\n", "line 2: x must be a number, got ''"),
        (HEADER + "a,0,nan,2,True\n", "line 2: x must be a number, got 'nan'"),
        (HEADER + "a,0,1,inf,True\n", "line 2: y must be a number, got 'inf'"),
        (HEADER + "a,0,1_0.0,2,True\n", "line 2: x must be a number"),
        (HEADER + "a,,1,2,True\n", "line 2: seed must be a whole number ≥ 0, got ''"),
        (HEADER + "a,nan,1,2,True\n", "line 2: seed must be"),
        (HEADER + "a,1.0,1,2,True\n", "line 2: seed must be"),
        (HEADER + "a,-1,1,2,True\n", "line 2: seed must be"),
        (HEADER + "a,9999999999999999999,1,2,True\n", "line 2: seed must be"),
        (HEADER + ",0,1,2,True\n", "line 2: name must be a text"),
        (HEADER + "a,0,1,2,yes\n", "line 2: proven must be True or False, got 'yes'"),
        (HEADER + '"a,0,1,2,True\n', "line 2: not a row of a table"),
        (HEADER + "a,0,1,2,True\n\0\0\0\n", "line 3: 1 cells"),
    ],
)
def test_what_is_refused(write: Write, text: str, message: str) -> None:
    path = write("t.csv", text)
    with pytest.raises(ServegymError) as refused:
        read(path)
    refusal = str(refused.value)
    assert refusal.startswith(f"{path}: {message}")
    assert "\n" not in refusal


def test_what_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        ServegymError, match=r"t\.csv: is in UTF-16; save it as UTF-8; remove the file"
    ):
        read(tmp_path / "t.csv")
    with pytest.raises(
        ServegymError, match="cannot be read: is a folder, not a table; remove the file"
    ):
        read(tmp_path)


# ---- the tables themselves -------------------------------------------------------------------


def cut_last_line(text: str) -> str:
    return text[:-20]


def drop_cell(text: str) -> str:
    return text.rsplit(",", 1)[0] + "\n"


def change_seed(text: str) -> str:
    head, _, last = text.rstrip("\n").rpartition("\n")
    return f"{head}\n{last}\n{last.replace('fcfs,1,', 'fcfs,nan,')}\n"


def other_row(text: str) -> str:
    return text + text.splitlines()[-1].replace("events,", "events,1") + "\n"


def test_a_row_that_is_deleted_is_played_again(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    evaluate(TINY, make_policy, ["fcfs"], range(2), tmp_path, progress=False)
    whole = path.read_text()
    for damage in (cut_last_line, drop_cell, change_seed, other_row):
        path.write_text(damage(whole))
        before = path.read_bytes()
        with pytest.raises(ServegymError, match=r"episodes\.csv: lines? .*; delete") as refused:
            evaluate(TINY, make_policy, ["fcfs"], range(2), tmp_path, progress=False)
        assert path.read_bytes() == before, refused
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    evaluate(TINY, make_policy, ["fcfs"], range(2), tmp_path, progress=False)
    again = path.read_text()
    assert again.splitlines()[:2] == whole.splitlines()[:2]
    assert [line.split(",")[:7] for line in again.splitlines()] == [
        line.split(",")[:7] for line in whole.splitlines()
    ]


@pytest.mark.parametrize(
    ("gap", "makespan", "unfinished"),
    [("", "5.0", 0), ("", "", 0), ("0.1", "", 2), ("-0.95", "9", 0)],
)
def test_a_row_that_cannot_be_is_refused(
    tmp_path: Path, gap: str, makespan: str, unfinished: int
) -> None:
    """The last one is what an episode cut short had before its unfinished requests were counted."""
    path = tmp_path / "episodes.csv"
    rows = evaluate(TINY, make_policy, ["fcfs"], range(1), tmp_path, progress=False)
    cells = dict(zip(COLUMNS, path.read_text().splitlines()[1].split(","), strict=True))
    cells |= {"gap": gap, "makespan_s": makespan, "unfinished_requests": str(unfinished)}
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(cells.values()) + "\n")
    assert len(rows) == 1
    with pytest.raises(
        ServegymError, match=r"the row of policy fcfs, seed 0: a gap of .* cannot be"
    ):
        read_episodes(path)


def test_damaged_optima_are_named_by_their_line(tmp_path: Path) -> None:
    find_optima(TINY, range(2), tmp_path, 5.0, progress=False)
    path = tmp_path / "optima.csv"
    path.write_text(path.read_text() + "2,1.0,1.0,perhaps,5.0,0.1\n")
    with pytest.raises(ServegymError, match=r"optima\.csv: line 4: proven must be True or False"):
        find_optima(TINY, range(2), tmp_path, 5.0, progress=False)


def test_damaged_best_known_schedules_are_named_by_their_line(tmp_path: Path) -> None:
    rows = evaluate(TINY, make_policy, ["fcfs"], range(1), tmp_path, progress=False)
    path = tmp_path / "best_known.csv"
    path.write_text("task,seed,best_known_s\nservegym/Tiny-v0,nan,9\n")
    with pytest.raises(ServegymError, match=r"best_known\.csv: line 2: seed must be"):
        read_best_known(path, TINY.name, rows)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("episodes.csv")), ids=str)
def test_committed_episodes_are_read_to_the_last_bit(path: Path) -> None:
    table = read_episodes(path)
    assert (table["unfinished_requests"] == 0).all()
    shown = table[
        [name for name in COLUMNS if name in path.read_text().split("\n", 1)[0].split(",")]
    ]
    assert shown.to_csv(index=False) == path.read_text()
