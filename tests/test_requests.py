"""Requests and workload files: every bad input has a legal twin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs import Requests, ServegymError, make_requests, read_requests
from servegym.envs.errors import shown
from servegym.envs.workload.requests import MAX_ARRIVAL_S, MAX_TOKENS

Write = Callable[[str, str], Path]
HEADER = "prompt_tokens,output_tokens\n"

# The second line of the file, the column at fault, and the neighbour that is right.
BAD_COUNTS = [
    ("0", "1"),  # a prompt has at least one token
    ("-3", "3"),
    ("2.5", "2.0"),  # whole, however written
    ("10000001", "10000000"),  # MAX_TOKENS itself is fine
    ("1e8", "1e7"),
    ("1" + "0" * 400, "1" + "0" * 7),  # beyond every float
    ("nan", "1"),
    ("inf", "1"),
    ("-inf", "1"),
    ("", "1"),
    ("many", "1"),
    ("True", "1"),  # a bool is not a count
    ("0x10", "16"),
    ("1_000", "1000"),
    ("5 6", " 5 "),  # spaces around a number do no harm
    ("5\x00", "5"),
]


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens", "predicted_output_tokens"])
@pytest.mark.parametrize(("bad", "good"), BAD_COUNTS)
def test_bad_count(write: Write, column: str, bad: str, good: str) -> None:
    columns = ["prompt_tokens", "output_tokens", "predicted_output_tokens"]
    header = ",".join(columns)

    def rows(value: str) -> str:
        return "\n".join(
            [header, "7,7,7", ",".join(value if c == column else "7" for c in columns)]
        )

    path = write("bad.csv", rows(bad))
    with pytest.raises(ServegymError) as error:
        read_requests(path)
    message = str(error.value)
    rule = "must be a whole number in 1 … 10000000"
    assert message == f"{path}: line 3: {column} {rule}, got {shown(bad)}"
    assert len(read_requests(write("good.csv", rows(good)))) == 2


BAD_ARRIVALS = [
    ("-0.001", "0"),
    ("nan", "0"),
    ("inf", "1e9"),
    ("1.001e9", "1e9"),
    ("", "0.0"),
    ("soon", "0.25"),
    ("2020-01-01", "2020.01"),
]


@pytest.mark.parametrize(("bad", "good"), BAD_ARRIVALS)
def test_bad_arrival(write: Write, bad: str, good: str) -> None:
    text = f"arrival_s,{HEADER}{{}},5,6\n"
    path = write("bad.csv", text.format(bad))
    with pytest.raises(ServegymError) as error:
        read_requests(path)
    rule = "arrival_s must be a time in seconds, 0 … 1e+09"
    assert str(error.value) == f"{path}: line 2: {rule}, got {bad!r}"
    assert read_requests(write("good.csv", text.format(good))).arrival_s[0] == float(good)


BAD_FILES = [
    # nothing at all
    ("", "the file is empty; a header and one row are needed"),
    ("\n\n", "the file is empty; a header and one row are needed"),
    # a header only
    (HEADER, "the file has a header but no request; add at least one row"),
    # a column is missing
    ("prompt_tokens\n5\n", "line 1: column 'output_tokens' is missing; "),
    ("5,6\n7,8\n", "line 1: column 'prompt_tokens' is missing; "),
    # a column too many; the nearest name is named
    ("prompt_tokens,output_tokens,arrivals\n5,6,7\n", "line 1: unknown column 'arrivals'; "),
    ("prompt_tokens,output_tokens,arrivals\n5,6,7\n", "; did you mean 'arrival_s'?"),
    # a column twice
    (
        "prompt_tokens,output_tokens,prompt_tokens\n5,6,7\n",
        "line 1: column 'prompt_tokens' stands there twice",
    ),
    # another separator
    ("prompt_tokens;output_tokens\n5;6\n", "line 1: uses ';' between fields; a workload uses ','"),
    ("output_tokens\tprompt_tokens\n5\t6\n", "uses a tab between fields"),
    ('"prompt_tokens";"output_tokens"\n5;6\n', "uses ';' between fields"),
    ("prompt_tokens | output_tokens\n5|6\n", "uses '|' between fields"),
    ("prompt_tokens output_tokens\n5 6\n", "uses a space between fields"),
    # a row that is too short, or too long
    (HEADER + "5\n", "line 2: 1 fields where the header has 2"),
    (HEADER + "5,6\n5,6,7\n", "line 3"),
    # an empty row between others
    (HEADER + "5,6\n\n7,8\n", "line 3: 0 fields where the header has 2"),
    # a quotation mark that is never closed
    (HEADER + '"5,6\n7,8\n', "not a CSV file"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES)
def test_bad_file(write: Write, text: str, words: str) -> None:
    path = write("bad.csv", text)
    with pytest.raises(ServegymError) as error:
        read_requests(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_not_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.csv"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ServegymError, match="is in UTF-16; save it as UTF-8"):
        read_requests(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match=r"nothing\.csv: no such workload file"):
        read_requests(tmp_path / "nothing.csv")
    with pytest.raises(ServegymError, match="is a folder, not a workload file"):
        read_requests(tmp_path)


def test_rows_that_are_all_too_long(write: Write) -> None:
    with pytest.raises(ServegymError, match="line 2"):
        read_requests(write("bad.csv", HEADER + "5,6,7\n8,9,10\n"))


GOOD_FILES = [
    # no newline at the end
    HEADER + "5,6\n7,8",
    # Windows
    HEADER.replace("\n", "\r\n") + "5,6\r\n7,8\r\n",
    # with the mark that Excel writes
    "\ufeff" + HEADER + "5,6\n7,8\n",
    # columns in another order
    "output_tokens,prompt_tokens\n6,5\n8,7\n",
    # quoted, padded, with a plus, with an exponent
    HEADER + '"5","6"\n 7 ,+8\n',
    HEADER + "5.0,6\n7,0.8e1\n",
]


@pytest.mark.parametrize("text", GOOD_FILES)
def test_good_file(write: Write, text: str) -> None:
    requests = read_requests(write("good.csv", text))
    assert requests.prompt_tokens.tolist() == [5, 7]
    assert requests.output_tokens.tolist() == [6, 8]
    assert requests.arrival_s.tolist() == [0, 0]
    assert requests.predicted_output_tokens.tolist() == [6, 8]


def test_file_is_sorted_by_arrival_and_ties_keep_their_order(write: Write) -> None:
    rows = "3.5,1,11,21\n1,2,12,22\n1.0,3,13,23\n0,4,14,24\n"
    header = "arrival_s,prompt_tokens,output_tokens,predicted_output_tokens\n"
    requests = read_requests(str(write("good.csv", header + rows)))
    assert requests.arrival_s.tolist() == [0, 1, 1, 3.5]
    assert requests.prompt_tokens.tolist() == [4, 2, 3, 1]
    assert requests.output_tokens.tolist() == [14, 12, 13, 11]
    assert requests.predicted_output_tokens.tolist() == [24, 22, 23, 21]
    assert requests.decode_rounds.tolist() == [13, 11, 12, 10]
    assert len(requests) == 4


# Columns of make_requests: prompts, outputs, arrivals, predictions.
BAD_ARRAYS = [
    # no request; one is enough
    (([], []), "at least one request", ([1], [1])),
    # counts out of range
    (([0], [1]), "prompt_tokens must lie in 1 … 10000000", ([1], [1])),
    (([1], [0]), "output_tokens must lie in", ([1], [1])),
    (([MAX_TOKENS + 1], [1]), "prompt_tokens must lie in", ([MAX_TOKENS], [1])),
    (([1], [MAX_TOKENS + 1]), "output_tokens must lie in", ([1], [MAX_TOKENS])),
    (([1], [1], [0.0], [0]), "predicted_output_tokens must lie in", ([1], [1], [0.0], [1])),
    # arrivals
    (([1], [1], [-0.5]), "arrival_s must be finite and ≥ 0", ([1], [1], [0.0])),
    (([1], [1], [np.inf]), "arrival_s must be finite", ([1], [1], [MAX_ARRIVAL_S])),
    (([1, 1], [1, 1], [np.nan, 0]), "arrival_s must be finite", ([1, 1], [1, 1], [1.0, 0])),
]


@pytest.mark.parametrize(("bad", "words", "good"), BAD_ARRAYS)
def test_bad_arrays(bad: Any, words: str, good: Any) -> None:
    with pytest.raises(ServegymError, match=words):
        make_requests(*map(np.array, bad))
    assert len(make_requests(*map(np.array, good))) == len(good[0])


UNEQUAL_ARRAYS = [
    ([1, 2], [3, 4, 5]),  # an output too many
    ([1, 2, 3], [4, 5]),  # one too few
    ([1, 2], [3, 4], [0.0]),
    ([1, 2], [3, 4], [0.0, 0.0], [3, 4, 5]),
]


@pytest.mark.parametrize("arrays", UNEQUAL_ARRAYS)
def test_unequal_arrays(arrays: Any) -> None:
    with pytest.raises(ServegymError, match="equally long"):
        make_requests(*map(np.array, arrays))


def test_fractions_of_tokens_are_refused() -> None:
    with pytest.raises(ServegymError, match="prompt_tokens"):
        make_requests(np.array([1.5]), np.array([2]))


def test_unsorted_or_unequal_fields_cannot_be_built() -> None:
    single, pair = np.ones(1, dtype=np.int64), np.ones(2, dtype=np.int64)
    with pytest.raises(ServegymError, match="arrival_s must not decrease; sort the requests first"):
        Requests(np.array([1.0, 0.5]), pair, pair, pair)
    with pytest.raises(ServegymError, match="output_tokens has 1 entries, arrival_s has 2"):
        Requests(np.zeros(2), pair, single, pair)
    assert len(Requests(np.array([0.5, 0.5]), pair, pair, pair)) == 2


def test_predictions_default_to_the_truth() -> None:
    requests = make_requests(np.array([1, 2]), np.array([3, 4]))
    assert requests.predicted_output_tokens.tolist() == [3, 4]
