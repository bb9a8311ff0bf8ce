"""Shared by the tests of predicted and unknown output lengths: tasks, and rows of requests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from servegym.envs import Requests, make_requests
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import TASKS

SMALL = with_overrides(
    TASKS["servegym/GSM8KPredicted-v0"], {"cluster": {"clients": 8}, "workload": {"requests": 40}}
)


def informed(task: TaskConfig, **keys: Any) -> TaskConfig:
    return with_overrides(task, {"information": keys})


KNOWN = informed(SMALL, output_lengths="known")
UNKNOWN = informed(SMALL, output_lengths="unknown")

ROWS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(1, 12),  # output
        st.one_of(st.just(0.0), st.floats(0.0, 50.0)),  # arrival
        st.sampled_from([1, 4, 9]),  # prediction
        st.sampled_from([0.0, 0.3, 1.5]),  # spread
    ),
    min_size=2,
    max_size=25,
)


def make(rows: list[tuple[int, int, float, int, float]]) -> Requests:
    prompts, outputs, arrivals, predictions, spreads = zip(*rows, strict=True)
    return make_requests(prompts, outputs, arrivals, predictions, spreads)
