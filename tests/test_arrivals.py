"""Arrival processes: their rates and spreads, what they refuse, and where their defaults come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import load_task
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.workload.arrivals import MAX_SHARES, PROCESSES, Arrivals, Measured
from servegym.envs.workload.sources import make_workload
from tests.helpers import refused

Write = Callable[[str, str], Path]
DRAWN = 40_000

# The process, and the variance of its counts over their mean in bins that are long against its gaps.
BURSTY: dict[str, Any] = {"burst_rate_per_s": 8.0, "burst_s": 2.0, "calm_s": 6.0}
PROCESSES_DRAWN: list[tuple[Arrivals, float]] = [
    (Arrivals(rate_per_s=2.0), 1.0),
    (Arrivals("gamma", rate_per_s=2.0, cv=2.0), 4.0),
    (Arrivals("gamma", rate_per_s=2.0, shape=4.0), 0.25),
    (Arrivals("weibull", rate_per_s=2.0, cv=2.0), 4.0),
    (Arrivals("weibull", rate_per_s=2.0, shape=0.5), 5.0),  # cv² = Γ(5)/Γ(3)² − 1
    (Arrivals("weibull", rate_per_s=2.0, shape=1.0), 1.0),
    # 1 + 2·(8 − 0)²·(1/2)·(1/6) / ((1/2 + 1/6)²·(8/6)): the Markov-modulated process's limit
    (Arrivals("on-off", **BURSTY), 19.0),
    (Arrivals("on-off", calm_rate_per_s=8.0, **BURSTY), 1.0),  # no difference: Poisson
]


@pytest.mark.parametrize(("process", "dispersion"), PROCESSES_DRAWN)
def test_rate_and_dispersion(process: Arrivals, dispersion: float) -> None:
    """Means within 4 standard errors; dispersions, of 100 bins and more, within a half."""
    process.check(DRAWN)
    times_s = process.sample(DRAWN, np.random.default_rng(1))
    assert times_s.shape == (DRAWN,)
    assert times_s[0] > 0
    assert (np.diff(times_s) >= 0).all()
    error = math.sqrt(max(dispersion, 1.0) / DRAWN)
    assert times_s[-1] * process.mean_rate_per_s / DRAWN == pytest.approx(1.0, abs=4 * error)
    counts = np.histogram(times_s, bins=int(times_s[-1] / 100))[0]
    assert counts.var() / counts.mean() == pytest.approx(dispersion, rel=0.5)


def test_gaps_have_the_cv_that_is_asked_for(rng: np.random.Generator) -> None:
    for process in ("gamma", "weibull"):
        for cv in (0.3, 1.0, 2.0):
            gaps_s = np.diff(Arrivals(process, rate_per_s=5.0, cv=cv).sample(DRAWN, rng))
            assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.08)


DAYS = [
    # a peak at 25 s: the quarters around 12.5, 37.5, … s hold 1 ± the sine's mean of 2/π
    ({"amplitude": 1.0, "peak_s": 25.0}, [1 + 2 / np.pi, 1 + 2 / np.pi, 1 - 2 / np.pi, 1 - 2 / np.pi]),
    ({"amplitude": 0.0}, [1.0, 1.0, 1.0, 1.0]),
    # half of a swing, highest in the middle; a quarter's mean is 1 ± 0.5·2/π
    ({}, [1 - 1 / np.pi, 1 + 1 / np.pi, 1 + 1 / np.pi, 1 - 1 / np.pi]),
    ({"shares": (3.0, 1.0, 0.0, 4.0)}, [1.5, 0.5, 0.0, 2.0]),
    ({"shares": (3.0, 1.0, 0.0, 4.0), "start_s": 75.0}, [2.0, 1.5, 0.5, 0.0]),
    ({"amplitude": 1.0, "peak_s": 25.0, "start_s": 150.0}, [1 - 2 / np.pi] * 2 + [1 + 2 / np.pi] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "heights"), DAYS)
def test_day_curve(keys: dict[str, Any], heights: list[float]) -> None:
    """The mean over many periods of 100 s, in quarters; one has a standard error of 1 %."""
    process = Arrivals("day", rate_per_s=20.0, period_s=100.0, **keys)
    times_s = process.sample(DRAWN, np.random.default_rng(2))
    assert (np.diff(times_s) >= 0).all()
    whole = times_s[times_s < 100.0 * np.floor(times_s[-1] / 100.0)]
    quarters = np.histogram(whole % 100.0, bins=4, range=(0.0, 100.0))[0] / len(whole) * 4
    assert quarters.tolist() == pytest.approx(heights, abs=0.05)


@pytest.mark.parametrize("process", [process for process, _ in PROCESSES_DRAWN])
@pytest.mark.parametrize("requests", [1, 2, 17])
def test_few_requests_and_the_same_seed(process: Arrivals, requests: int) -> None:
    first, again, other = (
        process.sample(requests, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert len(first) == requests
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_short_form_is_poisson() -> None:
    short, long = (
        make_workload("tiny", 50, rate, np.random.default_rng(0), process)
        for rate, process in ((2.0, None), (0.0, Arrivals(rate_per_s=2.0)))
    )
    assert np.array_equal(short.arrival_s, long.arrival_s)
    assert np.array_equal(short.output_tokens, long.output_tokens)


GAMMA = {"process": "gamma", "rate_per_s": 2.0, "cv": 3.0}
ON_OFF = {"process": "on-off", **BURSTY}
DAY = {"process": "day", "rate_per_s": 1.0}

# Keys that are refused, the words of the refusal, keys that are legal and nearest to them.
BAD_KEYS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"process": "gama", "rate_per_s": 1.0}, "did you mean 'gamma'?", GAMMA),
    ({"rate_pers": 1.0}, "did you mean 'workload.arrivals.rate_per_s'?", {"rate_per_s": 1.0}),
    ({"rate_per_s": 0.0}, "rate_per_s must lie in 1e-09 … 1e+09, got 0.0", {"rate_per_s": 1e9}),
    ({"rate_per_s": -1.0}, "got -1.0", {"rate_per_s": 1.0}),
    ({"rate_per_s": math.nan}, "got nan", {"rate_per_s": 1}),
    ({"rate_per_s": math.inf}, "got inf", {"rate_per_s": 1e9}),
    ({"rate_per_s": "fast"}, "must be a number, got 'fast'", {"rate_per_s": 7.0}),
    ({"rate_per_s": True}, "must be a number, got True", {"rate_per_s": 1}),
    # too slow for the requests, not for one
    ({"rate_per_s": 1e-7}, "may arrive until", {"rate_per_s": 1e-6}),
    ({}, "rate_per_s is missing: tiny brings no rate of its own", {"rate_per_s": 1.0}),
    # a key of another process
    ({"rate_per_s": 1.0, "cv": 2.0}, "cv has no meaning for 'poisson', which takes rate_per_s", GAMMA),
    (GAMMA | {"burst_s": 1.0}, "burst_s has no meaning for 'gamma'", GAMMA),
    (ON_OFF | {"rate_per_s": 1.0}, "rate_per_s has no meaning for 'on-off'", ON_OFF),
    # spreads
    ({"process": "gamma", "rate_per_s": 1.0}, "cv is missing: tiny brings none", GAMMA),
    (GAMMA | {"shape": 1.0}, "has both cv and shape", GAMMA),
    (GAMMA | {"cv": 0.0}, "cv must lie in 0.01 … 100, got 0.0", GAMMA | {"cv": 0.01}),
    (GAMMA | {"cv": 101}, "got 101", GAMMA | {"cv": 100}),
    ({"process": "weibull", "rate_per_s": 9.0, "shape": 0.09}, "shape must lie in 0.1 … 200",
     {"process": "weibull", "rate_per_s": 1e9, "shape": 0.1}),
    # bursts
    ({"process": "on-off", "burst_s": 1.0, "calm_s": 1.0}, "burst_rate_per_s is missing", ON_OFF),
    ({"process": "on-off", "burst_rate_per_s": 1.0, "calm_s": 1.0}, "burst_s is missing", ON_OFF),
    (ON_OFF | {"calm_rate_per_s": 9.0}, "must be at most burst_rate_per_s 8.0, got 9.0",
     ON_OFF | {"calm_rate_per_s": 8.0}),
    (ON_OFF | {"burst_s": 0.0}, "burst_s must lie in 1e-06 … 1e+09", ON_OFF | {"burst_s": 1e-4}),
    (ON_OFF | {"burst_s": 1e-6}, "bursts and calms, more than 10000000; make them longer", ON_OFF),
    # days
    (DAY | {"amplitude": 1.01}, "amplitude must lie in 0 … 1, got 1.01", DAY | {"amplitude": 1}),
    (DAY | {"peak_s": 90_000.0}, "in the period, 0 … 86400, got", DAY | {"peak_s": 86_400.0}),
    (DAY | {"period_s": 0.0}, "period_s must lie in 0.001", DAY | {"period_s": 0.001}),
    (DAY | {"shares": [0, 0]}, "not all 0, got [0.0, 0.0]", DAY | {"shares": [0, 1]}),
    (DAY | {"shares": [1, -1]}, "shares must lie in 0 … 1e9", DAY | {"shares": [1, 0]}),
    (DAY | {"shares": [1, math.nan]}, "shares must lie in", DAY | {"shares": [1]}),
    (DAY | {"shares": 3}, "shares must be a list, got 3", DAY | {"shares": [3]}),
    (DAY | {"shares": [1] * (MAX_SHARES + 1)}, "at most 10000 parts", DAY | {"shares": [1] * 9}),
    (DAY | {"shares": [1], "amplitude": 0.5}, "has both shares and a sinusoid", DAY),
]  # fmt: skip


def task_with(**workload: Any) -> TaskConfig:
    """The small task with keys of its workload replaced."""
    return with_overrides(load_task("Tiny-v0"), {"workload": workload})


@pytest.mark.parametrize(("bad", "words", "good"), BAD_KEYS)
def test_bad_keys(bad: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    refused(lambda: task_with(arrivals=bad, requests=100), words)
    workload = task_with(arrivals=good, requests=20).workload
    requests = make_workload("tiny", 20, 0.0, np.random.default_rng(0), workload.arrivals)
    assert (requests.arrival_s >= 0).all()


@pytest.mark.parametrize("bad", [3.0, "gamma", [GAMMA]])
def test_arrivals_are_a_table(bad: Any) -> None:
    refused(lambda: task_with(arrivals=bad), "workload.arrivals must be a table of keys, got")
    assert task_with(arrivals=GAMMA).workload.arrivals == Arrivals("gamma", 2.0, cv=3.0)


def test_a_rate_and_a_process_are_one_too_many() -> None:
    words = "workload has both arrivals and arrival_rate_per_s"
    refused(lambda: task_with(arrivals=GAMMA, arrival_rate_per_s=2.0), words)
    assert task_with(arrivals=GAMMA).workload.draws_arrivals
    assert task_with(arrival_rate_per_s=2.0).workload.draws_arrivals
    assert not task_with().workload.draws_arrivals


def test_a_preset_brings_what_was_measured_on_it() -> None:
    process = Arrivals("gamma")
    drawn = WorkloadConfig("azure-conv", 4000, arrivals=process)
    assert drawn.arrivals is process
    requests = make_workload("azure-conv", 4000, 0.0, np.random.default_rng(0), process)
    gaps_s = np.diff(requests.arrival_s)
    assert 1 / gaps_s.mean() == pytest.approx(5.53, rel=0.08)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.094, rel=0.08)
    own = process.with_defaults(Measured(3.0, 2.0), "it")
    assert own == Arrivals("gamma", rate_per_s=3.0, cv=2.0)
    assert Arrivals("gamma", 9.0, shape=2.0).with_defaults(Measured(3.0, 2.0), "it").cv is None
    refused(lambda: WorkloadConfig("servegen-m-mid", arrivals=process), "cv is missing")


TOML = [
    ('[workload]\nsource = "tiny"\narrivals = {process = "gamma", rate_per_s = -2.0}\n', 3),
    ('[workload]\narrivals = {rate_per_s = 1e-7}\nsource = "tiny"\nrequests = 100\n', 2),
    ('[workload]\nrequests = 100\n[workload.arrivals]\nprocess = "on-off"\nburst_s = -1\n', 5),
    ("[workload]\narrival_rate_per_s = 1.0\n\narrivals = {rate_per_s = 1.0}\n", 4),
]


@pytest.mark.parametrize(("text", "line"), TOML)
def test_the_line_in_a_task_file(write: Write, text: str, line: int) -> None:
    path = write("task.toml", text)
    refused(lambda: load_task(str(path)), f"{path}: line {line}: workload")
    good = text.replace("-2.0", "2.0, cv = 2.0").replace("1e-7", "1.0").replace("arrival_rate", "#")
    good = good.replace("burst_s = -1", "burst_s = 1\nburst_rate_per_s = 2\ncalm_s = 3")
    assert load_task(str(write("good.toml", good))).workload.arrivals is not None


def test_every_process_is_listed() -> None:
    assert {process.process for process, _ in PROCESSES_DRAWN} | {"day"} == set(PROCESSES)
