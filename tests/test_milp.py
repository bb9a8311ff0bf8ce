"""The mixed-integer program: agreement with the planner, starting plans, silence, Ctrl-C."""

from __future__ import annotations

import itertools
import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from servegym.baselines.planning.milp import FORMULATIONS, MAX_CELLS, solve_mip
from servegym.baselines.planning.planner import plan_offline
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.errors import ServegymError


def whole(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def load_of(rounds: NDArray[np.int64], client_of: NDArray[np.int64] | None, clients: int) -> int:
    assert client_of is not None
    assert client_of.shape == rounds.shape
    assert client_of.min() >= 0
    assert client_of.max() < clients
    return int(np.bincount(client_of, weights=rounds, minlength=clients).max())


VARIANTS = list(itertools.product(FORMULATIONS, [False, True]))


@pytest.mark.parametrize(("formulation", "break_symmetry"), VARIANTS)
def test_by_hand(formulation: str, break_symmetry: bool) -> None:
    """5 + 5 and 5 + 3: no better plan, although the area says 9."""
    rounds = whole(3, 5, 5, 5)
    solution = solve_mip(
        rounds, 2, time_limit_s=10, formulation=formulation, break_symmetry=break_symmetry
    )
    assert load_of(rounds, solution.client_of, 2) == solution.lower_bound == 10


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from(VARIANTS),
    st.booleans(),
)
def test_agrees_with_the_planner(
    lengths: list[int], clients: int, variant: tuple[str, bool], warm: bool
) -> None:
    rounds = whole(*lengths)
    planned = plan_offline(rounds, clients)
    start = np.arange(len(rounds)) % clients
    solution = solve_mip(
        rounds,
        clients,
        time_limit_s=20,
        start=start if warm else None,
        lower_bound=rounds_lower_bound(rounds, clients) if warm else 0,
        formulation=variant[0],
        break_symmetry=variant[1],
    )
    assert load_of(rounds, solution.client_of, clients) == solution.lower_bound == planned.load


HARD = np.random.default_rng(0).integers(100, 1000, 240)
"""On 60 clients: hopeless from nothing, done at once from a plan that meets the bound."""


@pytest.mark.parametrize(("formulation", "break_symmetry"), VARIANTS)
def test_a_start_is_kept_or_improved(formulation: str, break_symmetry: bool) -> None:
    planned = plan_offline(HARD, 60, time_limit_s=5)
    start = np.empty(len(HARD), dtype=np.int64)
    for client in range(60):
        start[planned.plan.queue(client)] = client
    solution = solve_mip(
        HARD,
        60,
        time_limit_s=0.5,
        start=start,
        lower_bound=planned.lower_bound,
        formulation=formulation,
        break_symmetry=break_symmetry,
    )
    assert load_of(HARD, solution.client_of, 60) <= planned.load
    assert solution.lower_bound >= planned.lower_bound


def test_cold_under_a_time_limit_is_worse() -> None:
    """The paper's program, started cold, has a poor plan after 1 s and does not call it optimal."""
    cold = plan_offline(HARD, 60, solver="milp-cold", time_limit_s=1)
    assert cold.load > plan_offline(HARD, 60).load
    assert cold.status == "feasible"


def test_no_time_no_plan() -> None:
    with pytest.raises(ServegymError, match="milp-cold found no plan in time"):
        plan_offline(HARD, 60, solver="milp-cold", time_limit_s=1e-6)


def test_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even the banner, which the solver prints past Python's stdout."""
    solve_mip(whole(3, 5, 5, 5), 2, time_limit_s=10)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_stops_the_solver() -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        solve_mip(HARD, 60, time_limit_s=300)
    timer.join()
    solve_mip(whole(3, 5), 2, time_limit_s=10)  # the next one is not disturbed


@pytest.mark.parametrize(
    ("clients", "formulation", "message"),
    [
        (2, "asignment", "did you mean 'assignment'"),
        (MAX_CELLS, "counts", "at most 5000000"),
    ],
)
def test_refuses(clients: int, formulation: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        solve_mip(whole(3, 5), clients, time_limit_s=1, formulation=formulation)
