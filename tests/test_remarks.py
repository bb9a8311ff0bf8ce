"""Before anything is played: policies that the task refuses, and what they declare without effect on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.agents.card import AgentCard
from servegym.agents.network import Network
from servegym.agents.policy import LearnedPolicy
from servegym.baselines.lookahead.verdicts import VerdictPolicy
from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.envs import Policy, TaskConfig, make_case, play
from servegym.envs.playing.evaluation import evaluate
from servegym.envs.playing.remarks import remarks
from servegym.envs.playing.service import COLUMNS, Window
from servegym.envs.process.observation import FEATURES
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import evaluate as command
from tests.helpers import refused

TINY, CHAT, CLUSTER = (TASKS[f"servegym/{name}-v0"] for name in ("Tiny", "Chat", "Cluster"))
MIXED = {"cluster": {"chunk_tokens": 64}, "process": {"mixed_rules": ["fcfs"]}}
CLASSES = {"slo": {"ttft_s": 9.0, "classes": [{"name": "chat", "ttft_s": 2.0}]}}


def rules(*names: str) -> TaskConfig:
    return with_overrides(TINY, {"process": {"rules": list(names)}})


def agent(action: str) -> LearnedPolicy:
    layer = np.zeros((2, len(FEATURES)), np.float32), np.zeros(2, np.float32)
    return LearnedPolicy(
        Network([layer]), AgentCard(("decode", action), "events", (len(FEATURES), 2), "")
    )


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("lpt", rules("fcfs"), "admits by 'longest', which process.rules of servegym/Tiny-v0"),
        ("fixed-count", rules("longest"), "admits by 'fcfs', which process.rules"),
        ("slai", rules("fcfs"), "admits by 'shortest', which process.rules"),
        ("rollout(variations=1, base=lpt)", rules("fcfs"), "admits by 'longest'"),
        (
            "vllm",
            with_overrides(TINY, MIXED | {"process": {"mixed_rules": ["longest"]}}),
            "admits by 'fcfs', which process.mixed_rules",
        ),
    ],
)
def test_a_rule_that_the_task_lacks_leaves_no_folder(
    name: str, task: TaskConfig, words: str, tmp_path: Path
) -> None:
    """The mended task is played into the same folder."""
    folder = tmp_path / "out"
    refused(
        partial(evaluate, task, make_policy, ["random", name], [0], folder, progress=False), words
    )
    assert not folder.exists()
    mended = with_overrides(TINY, MIXED) if name == "vllm" else TINY
    table = evaluate(mended, make_policy, [name], [0], folder, progress=False)
    assert table["unfinished_requests"].tolist() == [0]


def test_agents_and_judged_rules_are_refused_as_early(tmp_path: Path) -> None:
    judged = VerdictPolicy(make_trigger_policy("lpt"), [make_trigger_policy("lpt")], ())
    unknown = with_overrides(TINY, {"information": {"output_lengths": "unknown"}})
    trials: list[tuple[Policy, TaskConfig, str]] = [
        (agent("prefill:longest"), rules("fcfs"), "may choose 'prefill:longest'"),
        (judged, rules("fcfs"), "admits by 'longest'"),
        (judged, unknown, "verdicts need known output lengths"),
    ]
    for policy, task, words in trials:

        def chosen(_: str, policy: Policy = policy) -> Policy:
            return policy

        refused(partial(evaluate, task, chosen, ["x"], [0], tmp_path / "out"), words)
        assert not (tmp_path / "out").exists()
        assert play(TINY, "x", policy, make_case(TINY, 0), 0).row["unfinished_requests"] == 0


def test_what_derives_from_nothing_is_played_as_before(tmp_path: Path) -> None:
    class Bare:
        decisions, comparison, cluster = None, dict[str, Any](), dict[str, Any]()

        def prepare(self, briefing: Any) -> None:
            self.task = briefing.task

        def act(self, situation: Any) -> int:
            return int(situation.mask.argmax())

    bare: Any = Bare
    table = evaluate(TINY, lambda _: bare(), ["bare"], [0], tmp_path, progress=False)
    assert table["unfinished_requests"].tolist() == [0]


@pytest.mark.parametrize(
    ("name", "task", "legal", "words"),
    [
        ("shed", with_overrides(TINY, MIXED), with_overrides(TINY, MIXED | {"slo": {"ttft_s": 9.0}}),
         "turns nobody away: servegym/Tiny-v0 has no slo.ttft_s"),
        ("edf", TINY, with_overrides(TINY, CLASSES), "goes by arrival: all requests"),
        ("edf", with_overrides(TINY, {"slo": {"ttft_s": 9.0}}), with_overrides(TINY, CLASSES),
         "the same slo.ttft_s"),
        ("llumnix", with_overrides(TINY, MIXED), CLUSTER,
         "steals no running requests: servegym/Tiny-v0 has one replica"),
        ("steal-half", with_overrides(CLUSTER, {"process": {"steals": ["running"]}}), CLUSTER,
         "steals no waiting requests: process.steals of servegym/Cluster-v0 does not name 'waiting'"),
        ("steal-half", with_overrides(CLUSTER, {"process": {"steals": []}}), CLUSTER,
         "steals no waiting or running requests: process.steals of servegym/Cluster-v0 does not name"),
        ("mc-sf", TINY, with_overrides(TINY, {"cluster": {"kv_capacity_tokens": 4096}}),
         "keeps nobody back by memory"),
        ("quantile", TINY, with_overrides(TINY, {"information": {"output_lengths": "predicted"}}),
         "goes by the lengths themselves"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(
    name: str, task: TaskConfig, legal: TaskConfig, words: str
) -> None:
    (line,) = remarks(task, make_policy, ["fcfs", name])
    assert line.startswith(f"Note: {name} ")
    assert words in line
    assert not remarks(legal, make_policy, ["fcfs", name])


def test_the_command_says_so_before_it_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "Tiny-v0", "--policies", "fcfs,edf", "--seeds", "0", "--jobs", "1"]
    assert command.main([*words, "--output", str(tmp_path / "out"), "--optimum-limit", "0"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Note: edf goes by arrival")


def test_shed_requests_are_named_where_there_are_any() -> None:
    row = {"policy": "shed", "class": "*", "seed": 0, "requests": 2, "finished": 1, "met_slo": 1}
    served = pd.DataFrame([row], columns=list(COLUMNS))
    assert "is rejected, shed or left unfinished" in command.service_text(served, Window(), True)
    assert "is rejected or left unfinished" in command.service_text(served, Window(), False)
    assert command.service_text(served.iloc[:0], Window(), True) == ""
