"""Baseline policies: names, triggers at their boundary, whole episodes played in two ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.catalogue import MIXED, REGISTRY
from servegym.baselines.registry import (
    make_policy,
    make_trigger_policy,
    policy_descriptions,
    split_policies,
)
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import RandomPolicy, TriggerPolicy
from servegym.envs.errors import ServegymError
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.policy import Briefing
from servegym.envs.process.metrics import METRICS
from servegym.envs.simulator.view import DecisionView
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from tests.helpers import UNIT_COSTS, instance, make_env, start

VIEW = DecisionView(
    clients=10,
    active=8,
    idle=2,
    waiting=5,
    arrived=20,
    finished=7,
    served_rounds=56,
    round=7,
    clock_s=9.0,
    idle_wait_s=3.0,
    round_s=0.5,
    rounds_to_finish=4,
    seconds_to_finish=2.0,
    prefill_s=1.0,
    prefill_fixed_s=0.25,
)
"""C_p = 8 · 1 s, its fixed part 8 · 0.25 = 2 s; waited 3 s, waiting on costs 2 · 2 = 4 s more."""

ALL_NAMES = [name for name, entry in REGISTRY.items() if not entry.required and name not in MIXED]
TRIGGERED = [name for name in ALL_NAMES if isinstance(REGISTRY[name].prototype, TriggerPolicy)]
NUMBERED = ["threshold-4", "hybrid-0.25", "lpt-0.5", "lookahead-2", "aligned-0.75"]


@pytest.mark.parametrize(
    ("trigger", "last_that_fires"),
    [
        (triggers.THRESHOLD, 2.0),  # idle
        (triggers.LAGRANGIAN, (3.0 + 4.0) / 8.0),  # (waited + expected) / C_p
        (triggers.MYOPIC, 2 * 0.5 / 8.0),  # idle · one round / C_p
        (triggers.LOOKAHEAD, 4.0 / 2.0),  # expected / fixed part of C_p
        (triggers.WAITED, 3.0 / 2.0),  # waited / fixed part of C_p
    ],
)
def test_a_trigger_fires_up_to_its_balance(trigger: int, last_that_fires: float) -> None:
    assert triggers.fires(trigger, last_that_fires, VIEW)
    assert not triggers.fires(trigger, np.nextafter(last_that_fires, 1e9), VIEW)


def test_eager_always_fires_and_drained_never() -> None:
    assert triggers.fires(triggers.EAGER, 0.0, VIEW)
    assert not triggers.fires(triggers.DRAINED, 0.0, VIEW)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fcsf", "did you mean 'fcfs'"),  # misspelt
        ("", "unknown policy"),  # empty
        ("threshold", "needs a whole K"),  # K missing
        ("threshold-K", "did you mean 'threshold"),  # K not filled in
        ("threshold-0", "needs a whole K"),  # below range
        ("threshold-2.5", "needs a whole K"),  # fractional
        ("threshold-1000001", "needs a whole K"),  # beyond range
        ("hybrid--1", "unknown policy"),  # negative
        ("hybrid-nan", "unknown policy"),  # not a number
        ("hybrid-1000001", "λ must lie"),  # beyond range
        ("fcfs-2", "unknown policy"),  # takes no number
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        make_policy(name)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("threshold-1", 1.0),  # the least K
        ("threshold-1000000", 1e6),  # the largest
        ("hybrid-0", 0.0),  # the least λ
        ("hybrid-1000000", 1e6),
        ("hybrid", 1.0),  # the default
        ("hybrid-myopic-0.5", 0.5),  # a name with a hyphen of its own
    ],
)
def test_good_names_carry_their_number(name: str, parameter: float) -> None:
    policy = make_policy(name)
    assert isinstance(policy, TriggerPolicy)
    assert policy.parameter == parameter


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fcsf(multiplier=1)", "did you mean 'fcfs'"),
        ("fcfs(multiplier=1)", "fcfs takes no parameters"),
        ("hybrid(multiplyer=1)", "did you mean 'multiplier'"),
        ("hybrid(0.5)", "write multiplier=VALUE"),
        ("hybrid(multiplier=)", "write multiplier=VALUE"),
        ("hybrid(multiplier=1, multiplier=2)", "given twice"),
        ("hybrid(multiplier=-1)", "multiplier must lie in 0"),
        ("hybrid(multiplier=nan)", "multiplier must lie in 0"),
        ("hybrid(multiplier=1_0)", "multiplier must lie in 0"),
        ("threshold()", "needs a whole K"),
        ("threshold(idle=0)", "idle must be a whole number"),
        ("threshold(idle=2.5)", "idle must be a whole number"),
        ("quantile(quantile=1)", "quantile must lie between"),
        ("mean-sd(deviations=101)", "deviations must lie"),
        ("offline-risk(risk=101)", "risk must lie"),
        ("offline-saa(scenarios=0)", "scenarios must be"),
        ("rollout(variations=-1)", "variations must be"),
        ("rollout(base=random)", "'random' has no trigger"),
        ("rollout(base=threshold(idle=0))", "idle must be"),
        ("hybrid(base=fcfs)", "choose from multiplier"),
        ("hybrid(multiplier=1", "unknown policy"),
        ("threshold(idle=12,idle=12)", "idle is given twice"),  # alike, too
        ("rollout(base=)", "write base=VALUE, not 'base='"),
        ("rollout(variations=)", "write variations=VALUE"),
        ("rollout(base)", "write base=VALUE"),
        ("hybrid(multiplier=1))", "a bracket has no partner"),
        ("rollout:threshold(idle=0)", "idle must be"),
        ("rollout:threshold(idle=3", "unknown policy"),
        ("rollout-6:threshold(idle=3,idle=3)", "idle is given twice"),
        ("fcfs:threshold(idle=3)", "unknown policy 'fcfs:threshold"),
        ("rollout: ", "needs a policy after the colon, as rollout:hybrid"),
        ("rollout-6:", "needs a policy after the colon, as rollout-6:hybrid"),
    ],
)
def test_bad_keys_are_refused(name: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message) as refusal:
        make_policy(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("fcfs()", "fcfs"),
        ("hybrid(multiplier=0)", "hybrid-0"),
        ("hybrid( multiplier = 1000000 )", "hybrid-1000000"),
        ("lpt(multiplier=1e-3)", "lpt-0.001"),
        ("threshold(idle=1)", "threshold-1"),
        ("rollout(variations=0)", "rollout-0"),
        ("rollout(variations=3, base=threshold(idle=4))", "rollout-3:threshold-4"),
        ("rollout(base=lpt)", "rollout:lpt"),
        ("rollout(base=threshold-3)", "rollout:threshold(idle=3)"),
        ("rollout(variations=6, base=threshold(idle=3))", "rollout-6:threshold(idle=3)"),
        ("rollout(base=hybrid( multiplier = 2 ))", "rollout : hybrid-2"),
        ("threshold (idle=12)", " threshold-12"),  # spaces around a name
        (" threshold(idle=12) ", "threshold-12 "),
    ],
)
def test_both_forms_of_a_name_mean_the_same(long: str, short: str) -> None:
    assert make_policy(long) == make_policy(short)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("own:P(b='('),fcfs", ["own:P(b='(')", "fcfs"]),
        ('own:P(b=")"),fcfs', ['own:P(b=")")', "fcfs"]),
        ("own:P(b=','),fcfs", ["own:P(b=',')", "fcfs"]),
        (r"own:P(b='\',('),fcfs", [r"own:P(b='\',(')", "fcfs"]),
        (r"own:P(b='\\'),fcfs", [r"own:P(b='\\')", "fcfs"]),
        ("""own:P(b="it's"),fcfs""", ["""own:P(b="it's")""", "fcfs"]),
        ("it's/agent, fcfs,", ["it's/agent", "fcfs"]),  # outside brackets a quote is a letter
        ("runs(1)/agent,fcfs", ["runs(1)/agent", "fcfs"]),
        ("", []),
    ],
)
def test_a_list_of_names_is_split(text: str, names: list[str]) -> None:
    assert split_policies(text) == names


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a),(b", "bracket"),
        ("fcfs,own:P(b=1", "bracket"),
        ("fcfs)", "bracket"),
        ("own:P(b='),fcfs", "quote '"),
        (r"own:P(b='\'),fcfs", "quote '"),
    ],
)
def test_a_list_without_all_its_brackets_and_quotes_is_refused(text: str, what: str) -> None:
    with pytest.raises(ServegymError, match=f"a {what} has no partner") as refusal:
        split_policies(text)
    assert "\n" not in str(refusal.value)


def test_keys_reach_planners_and_comparisons() -> None:
    for long, short in [
        ("quantile(quantile=0.9)", "quantile-0.9"),
        ("mean-sd(deviations=2)", "mean-sd-2"),
        ("offline-risk(risk=2)", "offline-risk-2"),
        ("offline-saa(scenarios=9)", "offline-saa-9"),
    ]:
        first, second = make_trigger_policy(long), make_trigger_policy(short)
        assert first.comparison == second.comparison
        assert getattr(first.planner, "keywords", None) == getattr(second.planner, "keywords", None)
    assert make_trigger_policy("quantile(quantile=0.9)").comparison["quantile"] == 0.9


def test_every_policy_has_a_line_and_is_made_anew() -> None:
    lines = policy_descriptions()
    assert len(lines) == len(REGISTRY)
    assert all(text and "\n" not in text for text in lines.values())
    assert make_policy("random") is not make_policy("random")
    assert make_policy("fcfs") is not make_policy("fcfs")


def test_compiled_code_plays_trigger_policies_only() -> None:
    assert make_trigger_policy("threshold-4").parameter == 4
    with pytest.raises(ServegymError, match="'random' has no trigger"):
        make_trigger_policy("random")


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_trigger_policy_refuses_a_bad_parameter(bad: float) -> None:
    with pytest.raises(ServegymError, match="must be ≥ 0"):
        TriggerPolicy("longest", triggers.THRESHOLD, bad)


def test_a_policy_says_which_rule_the_task_lacks() -> None:
    task = with_overrides(TASKS["servegym/Tiny-v0"], {"process": {"rules": ["fcfs"]}})
    with pytest.raises(ServegymError, match="admits by 'longest'"):
        play(task, "lpt", make_policy("lpt"), make_case(task, 0), 0)
    assert play(task, "fcfs", make_policy("fcfs"), make_case(task, 0), 0).row["requests"] == 8


def test_random_needs_its_briefing() -> None:
    with pytest.raises(ServegymError, match="prepare"):
        RandomPolicy().act(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TRIGGERED + NUMBERED)
@pytest.mark.parametrize("decisions", ["events", "rounds"])
def test_played_and_compiled_episodes_agree(name: str, decisions: str) -> None:
    """One rule, two callers: the policy object in the environment and the compiled loop."""
    overrides = {
        "cluster": {"clients": 12, "max_prefill_tokens": 400},
        "workload": {"requests": 60},
        "process": {"decisions": decisions},
    }
    task = with_overrides(TASKS["servegym/GSM8K-v0"], overrides)
    case = make_case(task, 3)
    policy = make_policy(name)
    assert isinstance(policy, TriggerPolicy)
    row = play(task, name, policy, case, 3).row
    compiled = play_compiled(task, policy, case)
    same = [metric for metric in METRICS if metric != "decisions"]  # forced moves count differently
    assert {metric: row[metric] for metric in same} == {metric: compiled[metric] for metric in same}


def test_the_parts_of_the_hybrid_pay_where_stages_are_dear() -> None:
    """With a fixed stage cost the iteration rule saves stages; first come, first served is worst."""
    task = replace(
        TASKS["servegym/GSM8K-v0"], cost=StageCosts(AffineDecode(0.05), AffinePrefill(0.3, 1e-4))
    )
    case = make_case(task, 0)
    gaps = {
        name: play(task, name, make_policy(name), case, 0).row["gap"]
        for name in ("fcfs", "offline-steal", "hybrid")
    }
    assert gaps["hybrid"] < gaps["offline-steal"] < gaps["fcfs"]


def trace(name: str, clients: int, rows: list[tuple[int, int]]) -> list[tuple[float, int, int]]:
    """Play an instance on unit costs; return (admitted, client, request) in order of admission."""
    env, policy = make_env(clients), make_policy(name)
    requests = instance(*rows)
    plan = policy.prepare(Briefing(env.task, requests, np.random.default_rng(0)))
    observation, _ = env.reset(options={"requests": requests, "plan": plan})
    ended = False
    while not ended:
        from servegym.envs.playing.policy import Situation

        action = policy.act(Situation(env.view(), observation, env.action_masks()))
        observation, _, ended, _, _ = env.step(action)
    log = env.records()
    return sorted(
        (float(at), int(client), request)
        for request, (at, client) in enumerate(zip(log.admitted_s, log.client, strict=True))
    )


ROWS = [(5, 2), (5, 5), (5, 4), (5, 3)]
"""Rounds 1, 4, 3, 2 on two clients; a stage takes 2 s, a round 1 s."""


def test_fcfs_by_hand() -> None:
    # 0–2 stage (0, 1); 2–3 a round, 0 done; 3–5 stage (2); three rounds, 1 and 2 done at 8;
    # 8–10 stage (3).
    assert trace("fcfs", 2, ROWS) == [(0, 0, 0), (0, 1, 1), (3, 0, 2), (8, 0, 3)]


def test_static_by_hand() -> None:
    # 0–2 stage (0, 1); four rounds to 6, when both are idle; 6–8 stage (2, 3).
    assert trace("static", 2, ROWS) == [(0, 0, 0), (0, 1, 1), (6, 0, 2), (6, 1, 3)]


def test_threshold_by_hand() -> None:
    # Longest first: 0–2 stage (1, 2); 2–5 three rounds, 2 done and one client idle.
    # K = 1 refills at 5 with request 3, and at 8 when 1 is done.
    assert trace("threshold-1", 2, ROWS) == [(0, 0, 1), (0, 1, 2), (5, 1, 3), (8, 0, 0)]
    # K = 2 waits for both: at 6 all are idle.
    assert trace("threshold-2", 2, ROWS) == [(0, 0, 1), (0, 1, 2), (6, 0, 3), (6, 1, 0)]


def test_offline_follows_its_plan() -> None:
    # The best plan has loads 5 and 5: (4 + 1) and (3 + 2).
    admitted = trace("offline", 2, ROWS)
    clients = {request: client for _, client, request in admitted}
    assert clients[0] == clients[1]
    assert clients[2] == clients[3]
    assert clients[0] != clients[2]


def test_start_helper_takes_plans() -> None:
    env = make_env(2, UNIT_COSTS)
    start(env, instance(*ROWS), [[3, 0], [1, 2]])
    env.step(1 + env.task.process.rules.index("plan"))
    assert [int(client) for client in env.records().client] == [-1, 1, -1, 0]
