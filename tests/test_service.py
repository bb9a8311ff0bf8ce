"""What users feel: limits of ``[slo]``, goodput, fairness, queues, idle clients; rewards; classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs import Requests, ServegymError, ServingEnv, make_requests, read_requests
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.process.service import jain_index
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import TASKS
from servegym.envs.task.slo import SloConfig
from servegym.envs.vector_env import ServingVectorEnv
from servegym.envs.workload.requests import MAX_CLASSES
from tests.cluster_helpers import play_any, play_eagerly, requests_of, shared_case, task_of
from tests.helpers import changed, instance, make_env, refused, start

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")

TINY = TASKS["servegym/Tiny-v0"]


# ---- limits ----------------------------------------------------------------------------------


def test_no_limit_is_none() -> None:
    assert not SloConfig()
    assert SloConfig(ttft_s=float("inf")) == SloConfig()
    assert SloConfig(tpot_s=2).limits == (np.inf, 2.0)
    assert SloConfig(tpot_s=2)


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1", True])
def test_limits_that_nothing_can_meet_are_refused(name: str, value: Any) -> None:
    refused(lambda: SloConfig(**{name: value}), f"slo.{name} must be")


LIMITS = [  # the stalled pair and what it meets: first tokens after 2, 2, 5 s; a token 1, 5/3, 1 s
    ({}, [1, 1, 1]),
    ({"ttft_s": 2.0}, [1, 1, 0]),
    ({"ttft_s": 1.999}, [0, 0, 0]),
    ({"ttft_s": 5.0}, [1, 1, 1]),
    ({"tpot_s": 1.0}, [1, 0, 1]),
    ({"tpot_s": 5 / 3}, [1, 1, 1]),
    ({"ttft_s": 2.0, "tpot_s": 1.0}, [1, 0, 0]),
]


@pytest.mark.parametrize(("limits", "met"), LIMITS)
def test_a_limit_is_met_where_it_is_reached(limits: dict[str, float], met: list[int]) -> None:
    env = ServingEnv(changed(make_env(2, reward="goodput").task, slo=limits))
    start(env, instance((5, 2), (5, 4), (5, 2)))
    total, info = play_eagerly(env, "prefill:fcfs")
    assert env.records().met_slo.tolist() == [bool(each) for each in met]
    assert total == sum(met)
    assert info["slo_attainment"] == sum(met) / 3
    assert info["goodput_per_s"] == sum(met) / 7


def test_one_token_has_no_time_per_token_and_meets_it() -> None:
    env = ServingEnv(changed(make_env(2).task, slo={"tpot_s": 1e-6}))
    start(env, instance((5, 1), (5, 2)))
    play_eagerly(env, "prefill:fcfs")
    assert env.records().met_slo.tolist() == [True, False]


# ---- every figure against a plain formula ----------------------------------------------------


def plainly(env: ServingEnv, log: EpisodeLog, info: dict[str, Any]) -> dict[str, float]:
    """The figures, written request by request and second by second."""
    assert env.state is not None
    limits, now_s = env.task.slo.limits, float(env.state.episodes[0].now_s)
    if log.rejected.any() and info["unfinished_requests"] == 0:
        now_s = max([0.0, *log.finished_s[~log.rejected]])
    met, rates, lasted, arrived = 0, [], [], 0
    for i in range(len(log.arrival_s)):
        arrived += log.arrival_s[i] <= float(env.state.episodes[0].now_s)
        e2e_s = log.finished_s[i] - log.arrival_s[i]
        if np.isfinite(e2e_s):
            first_s, rounds = log.first_token_s[i], log.decode_rounds[i]
            in_time = first_s - log.arrival_s[i] <= limits[0]
            met += in_time and (rounds == 0 or (log.finished_s[i] - first_s) / rounds <= limits[1])
            rates.append((rounds + 1) / e2e_s)
            lasted.append((e2e_s, e2e_s / (rounds + 1), log.preemptions[i] > 0))
        elif log.arrived[i] and not log.rejected[i]:
            rates.append(0.0)
    times = [0.0, now_s, *log.arrival_s, *log.admitted_s, *log.finished_s]
    times = sorted({time for time in times if time <= now_s})  # NaN is not
    peak, wasted_s = 0, 0.0
    for time, after in zip(times, [*times[1:], now_s], strict=True):
        there = (log.arrival_s <= time) & ~log.rejected
        waits = there & ~(log.admitted_s <= time)
        held = (log.admitted_s <= time) & ~(log.finished_s <= time)
        peak = max(peak, int(waits.sum()))
        wasted_s += min(waits.sum(), env.machine.clients - held.sum()) * (after - time)
    slow = [[token_s for _, token_s, was in lasted if was == which] for which in (True, False)]
    return {
        "slo_attainment": met / arrived,
        "goodput_per_s": met / now_s,
        "e2e_mean_s": float(np.mean([e2e_s for e2e_s, *_ in lasted])),
        "jain_fairness": sum(rates) ** 2 / len(rates) / sum(rate**2 for rate in rates),
        "peak_queue": peak,
        "idle_wait_share": wasted_s / now_s / env.machine.clients,
        "preempted_slowdown": float(np.mean(slow[0]) / np.mean(slow[1])) if all(slow) else np.nan,
        "memory_overrun_blocks": 0,
    }


@pytest.mark.parametrize("seed", range(40))
def test_figures_and_goodput_on_random_clusters(seed: int) -> None:
    rng = np.random.default_rng([seed, 21])
    case = shared_case(rng, dyadic=bool(seed % 2), moving=bool(seed % 3 == 0))
    limits = dict(zip(("ttft_s", "tpot_s"), rng.lognormal(1.0, 1.5, 2), strict=True))
    capped = {"max_seconds": float(rng.uniform(1, 40))} if seed % 4 == 0 else {}
    task = changed(task_of(case.spec, reward="goodput", **capped), slo=limits)
    env = ServingEnv(task)
    env.reset(options={"requests": requests_of(case)})
    total, info = play_any(env, rng, lambda: None, prefer="prefill")
    log = env.records()
    assert total == log.met_slo.sum()
    assert info["slo_attainment"] * log.arrived.sum() == pytest.approx(total, rel=1e-15)
    if np.isfinite(log.finished_s).any():
        expected = plainly(env, log, info)
        found = {name: info[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)
    assert 0 <= info["recompute_tax"] < 1 or np.isnan(info["recompute_tax"])


def test_rejected_and_late_requests_have_not_met() -> None:
    """One client, memory of 8: the second is rejected. Cut at 7 s the fourth waits, the last is to come."""
    cluster = {"kv_capacity_tokens": 8}
    env = ServingEnv(changed(make_env(1, reward="goodput", max_decisions=2).task, cluster=cluster))
    start(env, instance((2, 1), (20, 2), (2, 4), (2, 4), (2, 1, 9.0)))
    total, info = play_eagerly(env, "prefill:fcfs")
    assert total == 2
    assert info["unfinished_requests"] == 2
    assert info["slo_attainment"] == 2 / 4
    assert info["jain_fairness"] == pytest.approx((1 / 2 + 4 / 7) ** 2 / 3 / (1 / 4 + 16 / 49))


def test_jain_by_hand() -> None:
    assert jain_index(np.array([3.0, 3.0])) == 1.0
    assert jain_index(np.array([1.0, 0.0, 0.0, 0.0])) == 0.25
    assert np.isnan(jain_index(np.zeros(3)))
    assert np.isnan(jain_index(np.zeros(0)))


# ---- rewards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["goodput", "latency"])
def test_returns_of_a_vector_environment_are_the_metric(reward: str) -> None:
    """Goodput to the last bit, latency up to rounding; every row's episodes, one after another."""
    task = with_overrides(
        TINY,
        {
            "workload": {"requests": 10, "arrival_rate_per_s": 0.5},
            "slo": {"ttft_s": 6.0, "tpot_s": 2.0},
            "process": {"reward": reward},
        },
    )
    env = ServingVectorEnv(2, task, autoreset_mode="SameStep")
    env.reset(seed=5)
    rng, totals, ended, met = np.random.default_rng(0), np.zeros(2), 0, 0
    while ended < 6:
        masks = env.action_masks()
        actions = [int(rng.choice(np.flatnonzero(mask))) for mask in masks]
        _, rewards, terminated, _, infos = env.step(np.array(actions))
        totals += rewards
        for e in np.flatnonzero(terminated):
            final = {name: values[e] for name, values in infos["final_info"].items()}
            if reward == "goodput":
                assert totals[e] == final["slo_attainment"] * 10
                met += int(totals[e])
            else:
                assert totals[e] == pytest.approx(-final["e2e_mean_s"], rel=1e-12)
            totals[e], ended = 0.0, ended + 1
    assert reward == "latency" or 0 < met < 6 * 10


def test_imagination_counts_nothing() -> None:
    env = ServingEnv(changed(TINY, process={"reward": "goodput"}, slo={"ttft_s": 5.0}))
    env.reset(seed=0)
    imagined = env.imagine()
    assert env.state is not None
    assert env.state.episodes[0].counts_slo == env.state.episodes[0].keeps_gaps == 1
    assert imagined.episodes[0].counts_slo == imagined.episodes[0].keeps_gaps == 0


# ---- classes ---------------------------------------------------------------------------------

CLASSES = [  # cells of the column, and the names in order
    (["chat", "batch", "chat"], ("batch", "chat")),
    (["10", "2", "2"], ("2", "10")),
    ([" a", "a ", "b"], ("a", "b")),
    (["10", "2", "x"], ("10", "2", "x")),
]


@pytest.mark.parametrize(("cells", "names"), CLASSES)
def test_classes_of_a_file(write: Callable[[str, str], Path], cells: Any, names: Any) -> None:
    rows = [f"7,8,{9 - k},{cell}" for k, cell in enumerate(cells)]
    text = "\n".join(["prompt_tokens,output_tokens,arrival_s,class", *rows])
    requests = read_requests(write("work.csv", text))
    assert requests.class_names == names
    assert requests.class_of is not None
    found = [names[place] for place in requests.class_of]  # by arrival: the last row comes first
    assert found == [cell.strip() for cell in cells[::-1]]
    first = requests.first(2)
    assert first is not None
    assert first.class_names == names
    assert len(first.class_of if first.class_of is not None else ()) == 2


def test_bad_classes_of_a_file(write: Callable[[str, str], Path]) -> None:
    head = "prompt_tokens,output_tokens,class\n"
    path = write("bad.csv", f"{head}7,8,a\n7,8, \n")
    refused(lambda: read_requests(path), "bad.csv: line 3: class must be a text or a number")
    path = write("star.csv", f"{head}7,8,*\n")
    refused(lambda: read_requests(path), "star.csv: line 2: class must be")
    rows = [f"7,8,{k}" for k in range(MAX_CLASSES + 1)]
    path = write("many.csv", head + "\n".join(rows))
    refused(lambda: read_requests(path), f"many.csv: line {MAX_CLASSES + 2}: class '100' is one")
    assert len(read_requests(write("good.csv", head + "\n".join(rows[1:]))).class_names) == 100


BAD_CLASSES: list[tuple[dict[str, Any], str]] = [
    ({"class_of": np.array([0, 1])}, "both be given"),
    ({"class_names": ("a",)}, "both be given"),
    ({"class_of": np.array([0, 2]), "class_names": ("a", "b")}, "class_of must lie in 0 … 1"),
    ({"class_of": np.array([0]), "class_names": ("a",)}, "class_of has 1 entries"),
    ({"class_of": np.array([0, 0]), "class_names": ("a", "a")}, "each class once"),
    ({"class_of": np.array([0, 0]), "class_names": ("*",)}, "other than '*'"),
    ({"class_of": np.array([0, 0]), "class_names": ("a", "")}, "none empty"),
    ({"class_of": np.array([0, 0]), "class_names": (1,)}, "class_names[0] must be a text"),
]


@pytest.mark.parametrize(("columns", "words"), BAD_CLASSES)
def test_bad_classes_of_requests(columns: dict[str, Any], words: str) -> None:
    ones = np.ones(2, np.int64)
    refused(lambda: Requests(np.zeros(2), ones, ones, ones, **columns), words)
    good = Requests(
        np.zeros(2), ones, ones, ones, class_of=np.array([2, 0]), class_names=("a", "b", "c")
    )
    assert good.as_predicted if good.predicted_spread is not None else good.class_of is not None


@pytest.mark.parametrize("bad", [[1, None], [1, 2.5], [True, 1], ["", "a"], [1], "abc"])
def test_bad_labels(bad: Any) -> None:
    with pytest.raises(ServegymError, match="classes must"):
        make_requests([1, 2], [3, 4], classes=bad)
    assert make_requests([1, 2], [3, 4], classes=[1, "b"]).class_names == ("1", "b")


def test_a_task_with_limits_is_another_task() -> None:
    task = TaskConfig("x", slo=SloConfig(ttft_s=1.0))
    assert task != TaskConfig("x")
    assert with_overrides(task, {"slo": {"ttft_s": float("inf")}}) == TaskConfig("x")
