"""Verdicts on single decisions: solved by hand, judged by branches, and what cannot be judged."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.lookahead.verdicts import (
    Verdict,
    VerdictPolicy,
    balance,
    judge_episode,
    tally,
)
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import ServegymError
from servegym.envs.playing.evaluation import make_case
from servegym.envs.task.cases import Case
from servegym.envs.task.estimates import estimated_task, scaled
from servegym.studies.checks.iteration_rule import multiplier_of
from tests.checks_helpers import SMALL, unit_case
from tests.test_policies import VIEW


def judged(name: str, clients: int, *rounds: int) -> tuple[float, list[Verdict]]:
    """The makespan of a one-queue rule and all its verdicts; judges are the rule and ``fcfs``."""
    task, case = unit_case(clients, *rounds)
    policy = make_trigger_policy(name)
    judges = (policy, make_trigger_policy("threshold-1"))
    row, verdicts = judge_episode(task, case, policy, judges, 10, seed=0)
    return row["makespan_s"], verdicts


def test_prefilling_is_better_where_it_fills_a_round_that_runs_anyway() -> None:
    # 0–2 stage of 10 and 9 rounds; at 11 the 9 is done, one round is left and a request of 1 waits.
    # Prefill: stage to 13, one round for both, 14. Decode on: 12, stage to 14, its round, 15.
    # C_d = 1 client · 1 s, C_p = 1 client · 2 s.
    makespan, verdicts = judged("lpt", 2, 1, 10, 9)
    assert verdicts == [Verdict(0, False, 0.5, (15.0, 15.0), (14.0, 14.0))]
    assert makespan == 15
    counts = tally(verdicts, [0])
    assert (counts["late"], counts["early"], counts["regret_s"], counts["stake_s"]) == (
        1,
        0,
        1.0,
        1.0,
    )
    makespan, verdicts = judged("lpt-0.5", 2, 1, 10, 9)  # the λ that just fires
    assert makespan == 14
    assert verdicts[0].prefills
    assert tally(verdicts, [0, 1])["regret_s"] == 0


def test_decoding_on_is_better_where_one_stage_then_serves_two() -> None:
    # 0–2 stage of 10, 5 and 4 rounds; 3 and 3 wait. At round 4 one client is idle, at 5 two are.
    # One stage at round 5: 10 rounds and 2 stages, 14. A stage at 4 and another: 16.
    # At round 5, decoding on to round 10 and then a stage and 3 rounds: 13 + 4 = 17.
    # C_d / C_p: 1 · 1 / (2 · 2), then (1 + 2 · 5) / (1 · 2).
    makespan, verdicts = judged("lpt", 3, 10, 5, 4, 3, 3)
    assert makespan == 14
    assert verdicts == [
        Verdict(0, False, 0.25, (14.0, 14.0), (16.0, 16.0)),
        Verdict(1, True, 5.5, (17.0, 17.0), (14.0, 14.0)),
    ]
    expected = {"ties": 0, "prefill_better": 1, "early": 0, "late": 0}
    seconds = {"stake_s": 5, "regret_s": 0, "early_s": 0, "decode_regret_s": 3}
    assert tally(verdicts, [0]) == expected | seconds | {"auc": 1}


def test_too_early_and_a_tie() -> None:
    # As above, but λ = 0.2 prefills at round 4. At round 5 the other one waits for nothing that
    # matters: admitted there or at round 7 it ends before the long one, 10 rounds and 3 stages.
    makespan, verdicts = judged("lpt-0.2", 3, 10, 5, 4, 3, 3)
    assert makespan == 16
    assert [verdict.prefills for verdict in verdicts] == [True, True]
    assert [verdict.lost_s([0]) for verdict in verdicts] == [-2, 0]
    counts = tally(verdicts, [0])
    assert (counts["ties"], counts["early"]) == (1, 1)
    assert (counts["regret_s"], counts["early_s"], counts["decode_regret_s"]) == (2, 2, 0)
    assert np.isnan(counts["auc"])  # prefilling was never better


def test_several_judges_count_by_their_mean() -> None:
    verdict = Verdict(0, True, 1.0, (10.0, 14.0), (12.0, 11.0))
    assert verdict.lost_s([0]) == -2
    assert verdict.lost_s([1]) == 3
    assert verdict.lost_s([0, 1]) == 0.5
    assert tally([verdict], [0])["early"] == 1
    assert tally([verdict], [0, 1])["early"] == 0


@pytest.mark.parametrize(
    "name", ["hybrid", "hybrid-plan-0.2", "lookahead-0.7", "aligned-lookahead"]
)
def test_the_branch_taken_ends_as_the_episode_did(name: str) -> None:
    """With the rule itself as judge one branch is the rest of the episode, to the last bit."""
    policy = make_trigger_policy(name)
    case = make_case(SMALL, 3)
    row, verdicts = judge_episode(SMALL, case, policy, [policy], 1000, seed=3)
    assert len(verdicts) == row["decisions"] > 10
    assert row["makespan_s"] == play_compiled(SMALL, policy, case)["makespan_s"]
    for verdict in verdicts:
        taken = verdict.prefill_s if verdict.prefills else verdict.decode_s
        assert taken == (row["makespan_s"],)
        assert verdict.prefills == (verdict.balance >= policy.parameter)


def test_samples_are_spread_evenly() -> None:
    policy = make_trigger_policy("hybrid")
    case = make_case(SMALL, 3)
    row, verdicts = judge_episode(SMALL, case, policy, [policy], 3, seed=3)
    last = int(row["decisions"]) - 1
    assert [verdict.decision for verdict in verdicts] == [0, round(last / 2), last]


def test_noise_is_repeated_by_its_seed_and_moves_decisions() -> None:
    policy = make_trigger_policy("hybrid-0.2")
    case = make_case(SMALL, 3)
    first, again, other, none = (
        judge_episode(SMALL, case, policy, [policy], 1000, seed, noise)[1]
        for seed, noise in [(3, 0.5), (3, 0.5), (4, 0.5), (3, 0.0)]
    )
    assert first == again
    assert first != other
    assert first != none


def test_without_a_choice_there_is_no_verdict() -> None:
    _, verdicts = judged("lpt", 2, 4, 4, 4, 4)  # both clients fall idle at once
    assert verdicts == []
    assert tally(verdicts, [0])["stake_s"] == 0


@pytest.mark.parametrize("trigger", [triggers.LAGRANGIAN, triggers.LOOKAHEAD])
def test_the_balance_is_the_last_multiplier_that_fires(trigger: int) -> None:
    last = balance(trigger, VIEW)
    assert triggers.fires(trigger, last, VIEW)
    assert not triggers.fires(trigger, np.nextafter(last, 1e9), VIEW)


@pytest.mark.parametrize("x", [-0.5, -0.25, 0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("multiplier", [0.25, 0.5, 0.75, 0.875, 1.0, 1.5])
def test_an_error_of_an_estimate_is_another_multiplier(x: float, multiplier: float) -> None:
    """The derivation: scale what C_p or C_d is made of, or λ; the decision is the same."""
    dear = VIEW._replace(prefill_s=VIEW.prefill_s * (1 + x))
    slow = VIEW._replace(
        idle_wait_s=VIEW.idle_wait_s * (1 + x), seconds_to_finish=VIEW.seconds_to_finish * (1 + x)
    )
    for estimate, view in (("C_p", dear), ("C_d", slow)):
        as_another = multiplier * multiplier_of(x, estimate)
        assert triggers.fires(triggers.LAGRANGIAN, multiplier, view) == triggers.fires(
            triggers.LAGRANGIAN, as_another, VIEW
        )


@pytest.mark.parametrize(
    ("name", "noise", "message"),
    [
        ("threshold-2", 0.0, "can be judged"),  # compares no costs
        ("aligned", 0.0, "can be judged"),  # between events
        ("hybrid", -0.1, "noise must be"),
        ("hybrid", np.nan, "noise must be"),
    ],
)
def test_what_cannot_be_judged(name: str, noise: float, message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        VerdictPolicy(make_trigger_policy(name), (), (), noise)
    with pytest.raises(ServegymError, match="compare costs"):
        balance(triggers.EAGER, VIEW)


def test_verdicts_need_known_lengths_and_a_sample() -> None:
    policy = make_trigger_policy("lpt")
    task = estimated_task(SMALL)
    case = make_case(SMALL, 3)
    with pytest.raises(ServegymError, match="samples must be"):
        judge_episode(SMALL, case, policy, [policy], 0, seed=3)
    perfect = Case(scaled(case.requests, 1.0), case.bound)
    with pytest.raises(ServegymError, match="known output lengths"):
        judge_episode(task, perfect, policy, [policy], 1, seed=3)
    assert len(judge_episode(SMALL, case, policy, [policy], 1, seed=3)[1]) == 1
