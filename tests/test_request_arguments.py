"""Requests and plans from Python callers: refused columns, and their legal twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.envs import Plan, Requests
from servegym.envs.workload.plan import plan_from_queues
from servegym.envs.workload.requests import make_requests
from tests.helpers import refused

WHOLE = "must be whole numbers, got "
NO_COLUMNS: list[tuple[Any, str]] = [
    (5, "must be a list of whole numbers, got 5"),
    (np.array(5), "must be a list of whole numbers, got array(5)"),
    (None, "must be a list of whole numbers, got None"),
    ("56", "must be a list of whole numbers, got '56'"),
    ({5, 6}, "must be a list of whole numbers, got {5, 6}"),
    ([[5, 6]], "must be a list of whole numbers, got an array of shape (1, 2)"),
    (np.ones((2, 2)), "must be a list of whole numbers, got an array of shape (2, 2)"),
    ([[5], [6, 7]], "must be a list of whole numbers, got [[5], [6, 7]]"),
    (["5", "6"], WHOLE + "texts"),
    ([True, False], WHOLE + "booleans"),
    ([5 + 0j, 6], WHOLE + "complex numbers"),
    (np.array([5, 6], "M8[s]"), WHOLE + "dates"),
    (np.array([5, 6], "m8[ns]"), WHOLE + "durations"),
    (np.array([b"5", b"6"]), WHOLE + "bytes"),
    (np.ma.array([5, 6], mask=[False, True]), WHOLE + "masked entries"),
    ([5, None], WHOLE + "None (entry 1)"),
    (np.array([5, True], object), WHOLE + "True (entry 1)"),
    (pd.array([5, None], dtype="Int64"), WHOLE + "masked entries"),
    ([5, np.nan], WHOLE + "nan (entry 1)"),
    ([5, 6.5], WHOLE + "6.5 (entry 1)"),
    ([5, np.inf], "must lie in 1 … 10000000, got inf (entry 1)"),
    ([5, 1e300], "must lie in 1 … 10000000, got 1e+300 (entry 1)"),
    ([5, -3], "must lie in 1 … 10000000, got -3 (entry 1)"),
    ([5, 10**30], "must lie in 1 … 10000000, got 1e+30 (entry 1)"),
    ([5, -(10**400)], "must lie in 1 … 10000000, got -inf (entry 1)"),
    (np.array([5, 2**64 - 1], np.uint64), "must lie in 1 … 10000000, got 18446744073709551615"),
]


@pytest.mark.parametrize(("bad", "words"), NO_COLUMNS)
def test_columns_that_are_none(bad: Any, words: str) -> None:
    good = [5, 6]
    refused(lambda: make_requests(bad, good), f"prompt_tokens {words}")
    refused(lambda: make_requests(good, bad), f"output_tokens {words}")
    refused(
        lambda: Requests(np.zeros(2), bad, np.ones(2, int), np.ones(2, int)),
        f"prompt_tokens {words}",
    )
    if bad is not None:
        refused(lambda: make_requests(good, good, None, bad), f"predicted_output_tokens {words}")
    words = words.replace("1 … 10000000", "0 … 2147483647")
    refused(lambda: plan_from_queues([[1], bad]), f"queue of client 1 {words}")
    refused(lambda: Plan(bad, np.array([0, 2])), f"plan order {words}")
    refused(lambda: Plan(np.array([1, 2]), bad), f"plan offsets {words}")


NO_NUMBERS = [(bad, words) for bad, words in NO_COLUMNS if "entry" not in words]


@pytest.mark.parametrize(("bad", "words"), [row for row in NO_NUMBERS if "lie in" not in row[1]])
def test_times_and_spreads_that_are_none(bad: Any, words: str) -> None:
    good, words = [5, 6], words.replace("whole numbers", "numbers")
    if bad is not None:
        refused(lambda: make_requests(good, good, bad), f"arrival_s {words}")
        refused(lambda: make_requests(good, good, None, good, bad), f"predicted_spread {words}")
    refused(lambda: Requests(bad, *[np.ones(2, int)] * 3), f"arrival_s {words}")


GOOD_COLUMNS: list[Any] = [
    *([5, 6], (5, 6), range(5, 7), [5.0, 6.0], [np.int8(5), 6]),
    *(np.array([5, 6], dtype) for dtype in (np.uint8, ">i4", np.float16, np.longdouble, object)),
    *(
        pd.Series([5, 6]),
        pd.array([5, 6], dtype="Int64"),
        np.ma.array([5, 6]),
        np.array([5, 9, 6])[::2],
    ),
]


@pytest.mark.parametrize("good", GOOD_COLUMNS)
def test_columns_of_any_numbers(good: Any) -> None:
    made = make_requests(good, good, good, good)
    direct = Requests(good, good, good, good)
    for requests in (made, direct):
        for name in ("prompt_tokens", "output_tokens", "predicted_output_tokens", "arrival_s"):
            values = getattr(requests, name)
            assert values.tolist() == [5, 6]
            assert values.dtype == (np.float64 if name == "arrival_s" else np.int64)
    plan = plan_from_queues([good, []])
    assert plan.order.tolist() == [5, 6]
    assert plan.order.dtype == np.int64
    assert Plan(good, np.array([0, 2, 2])).order.tolist() == [5, 6]


def test_requests_do_not_share_the_callers_arrays() -> None:
    tokens = np.array([5, 6])
    requests = make_requests(tokens, tokens)
    tokens[:] = 1
    assert requests.prompt_tokens.tolist() == requests.output_tokens.tolist() == [5, 6]


@pytest.mark.parametrize("bad", [None, 5, "01", {1: [2]}, {1}, np.array(5)])
def test_a_plan_is_a_list_of_queues(bad: Any) -> None:
    refused(lambda: plan_from_queues(bad), "a plan is made from a list of request ids per client")


@pytest.mark.parametrize("queues", [[[0, 1], [1]], [[0, 0]]])
def test_a_plan_names_a_request_once(queues: list[list[int]]) -> None:
    refused(lambda: plan_from_queues(queues), "each request at most once")
