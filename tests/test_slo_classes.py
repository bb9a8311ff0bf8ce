"""Classes with limits of their own in [slo]: who has met them, who is due first, wrong tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.baselines import make_policy
from servegym.envs import (
    Requests,
    ServingEnv,
    ServingVectorEnv,
    TaskConfig,
    evaluate,
    load_task,
    make_requests,
    play,
)
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import with_overrides
from servegym.envs.task.lowering import bound_case, lower
from tests.helpers import refused
from tests.test_shortest import machine

CLASSES = [{"name": "chat", "ttft_s": 4.0}, {"name": "batch", "tpot_s": float("inf")}]
SLO = {"ttft_s": 20.0, "tpot_s": 1.5, "classes": CLASSES}
ROWS = [("batch", 5, 3, 0.0), ("batch", 5, 3, 0.0), ("chat", 5, 3, 0.5), ("other", 5, 1, 0.5)]
"""One client serves each in 4 s, the last in 2 s."""


def requests_of(rows: list[tuple[str, int, int, float]]) -> Requests:
    classes, prompts, outputs, arrivals = zip(*rows, strict=True)
    return make_requests(prompts, outputs, arrivals, classes=classes)


def posed(**slo: Any) -> TaskConfig:
    return with_overrides(machine(1, 0), {"slo": SLO | slo})


def played(task: TaskConfig, name: str) -> tuple[EpisodeLog, dict[str, Any]]:
    case = bound_case(lower(task), requests_of(ROWS))
    episode = play(task, name, make_policy(name), case, seed=0)
    return episode.records, episode.row


def test_who_is_due_first_goes_first() -> None:
    """Due at 20, 20, 4.5 and 20.5 s; under fcfs chat gets its first token 10 − 0.5 s after it came."""
    log, row = played(posed(), "edf")
    assert log.admitted_s.tolist() == [0, 8, 4, 12]
    assert log.met_slo.tolist() == [True, True, False, True]
    assert row["slo_attainment"] == 0.75
    log, _ = played(posed(classes=[{"name": "chat", "ttft_s": 5.5}]), "edf")
    assert log.met_slo.all()
    log, _ = played(posed(), "fcfs")
    assert log.admitted_s.tolist() == [0, 4, 8, 12]
    assert not log.met_slo[2]


def test_without_classes_it_is_first_come_first_served() -> None:
    for limit in (SLO["ttft_s"], None):
        log, _ = played(posed(classes=[], ttft_s=limit), "edf")
        assert log.admitted_s.tolist() == [0, 4, 8, 12]


def test_a_class_may_have_any_time_per_token() -> None:
    """On two clients the second stage stalls the first request: 4 s for 2 tokens are more than 1.5 s each."""
    rows = [("batch", 5, 3, 0.0), ("chat", 5, 3, 0.5)]
    for classes, met in ((CLASSES, [True, True]), ([], [False, True])):
        task = with_overrides(machine(2, 0), {"slo": SLO | {"classes": classes}})
        case = bound_case(lower(task), requests_of(rows))
        log = play(task, "fcfs", make_policy("fcfs"), case, seed=0).records
        assert log.met_slo.tolist() == met


@pytest.mark.parametrize("name", ["fcfs", "edf"])
def test_goodput_counts_each_by_its_own_limits(name: str) -> None:
    task = with_overrides(posed(), {"process": {"reward": "goodput", "observe": ["latency"]}})
    env = ServingEnv(task)
    env.reset(options={"requests": requests_of(ROWS)})
    total, over = 0.0, False
    rule = env.task.actions.index("prefill:shortest" if name == "edf" else "prefill:fcfs")
    while not over:
        mask = env.action_masks()
        _, reward, over, _, _ = env.step(rule if mask[rule] else int(mask.argmax()))
        total += float(reward)
    assert total == env.records().met_slo.sum()


def test_the_observation_goes_by_the_limit_of_each() -> None:
    """At 4 s both wait for 3.5 s: chat has its last quarter left, other is in its first."""
    task = with_overrides(posed(), {"process": {"observe": ["latency"], "decisions": "rounds"}})
    env = ServingEnv(task)
    observation, _ = env.reset(options={"requests": requests_of([ROWS[0], *ROWS[2:]])})
    rule = env.task.actions.index("prefill:fcfs")
    while env.view().clock_s < 4:
        observation, *_ = env.step(rule)
    assert observation[2] == pytest.approx(3.5 / 7.5)
    assert observation[3:8].tolist() == [0.5, 0.0, 0.0, 0.5, 0.0]


def test_a_file_has_a_table_for_each_class(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[slo]\nttft_s = 1.0\n[[slo.classes]]\nname = "batch"\nttft_s = inf\n', "utf-8")
    task = load_task(path)
    assert task.slo.limits_of(requests_of(ROWS))[:, 0].tolist() == [np.inf, np.inf, 1.0, 1.0]
    assert hash(task) == hash(load_task(path))


@pytest.mark.parametrize(
    ("classes", "message", "legal"),
    [
        ([{"ttft_s": 1.0}], "must name a class, got ''", [{"name": "chat", "ttft_s": 1.0}]),
        ([{"name": ""}], "slo.classes[0].name must name a class, got ''", [{"name": "chat"}]),
        ([{"name": "*"}], "must name a class, got '*'", [{"name": "chat"}]),
        ([{"name": 5}], "a text, got 5", [{"name": "chat"}]),
        (
            [{"name": "chat", "ttft_s": 0}],
            "> 0 seconds, got 0.0",
            [{"name": "chat", "ttft_s": 1e-9}],
        ),
        (
            [{"name": "chat", "tpot_s": -1}],
            "> 0 seconds, got -1.0",
            [{"name": "chat", "tpot_s": 1}],
        ),
        ([{"name": "chat", "ttfs_s": 1}], "did you mean", [{"name": "chat", "ttft_s": 1}]),
        ([{"name": "chat"}] * 2, "once, got 'chat' twice", [{"name": "chat"}, {"name": "batch"}]),
        ({"chat": 1.0}, "must be a list", []),
    ],
)
def test_wrong_tables(classes: Any, message: str, legal: Any) -> None:
    refused(lambda: posed(classes=classes), message)
    posed(classes=legal)


def test_a_class_of_no_workload_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    task, folder = posed(classes=[{"name": "chat"}]), tmp_path / "out"
    refused(lambda: evaluate(task, make_policy, ["fcfs"], range(2), folder), "has no classes")
    assert not folder.exists()
    refused(lambda: ServingEnv(task).reset(seed=0), "has no classes")
    refused(lambda: ServingVectorEnv(2, task), "has no classes")


def test_classes_that_nobody_is_of() -> None:
    """A class without requests is legal if the workload names it; a misspelt one is not."""
    refused(lambda: played(posed(classes=[{"name": "chta"}]), "fcfs"), "did you mean 'chat'?")
    task = posed()
    plain = make_requests([5], [3])
    case = bound_case(lower(task), plain)
    refused(lambda: play(task, "fcfs", make_policy("fcfs"), case, seed=0), "has no classes")
    kept = requests_of(ROWS).first(2)
    assert kept is not None
    assert task.slo.limits_of(kept).tolist() == [[20.0, np.inf]] * 2
