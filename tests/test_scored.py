"""The admission rule ``scored``, the policy ``calendar`` and how it is learned."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.agents.dashboard import draw_training_dashboard
from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.calendar.fitted import (
    CALENDAR_FILE,
    CalendarParameters,
    CalendarPlanner,
    calendar_policy,
    lay_calendar,
    learned_parameters,
    read_parameters,
    write_parameters,
)
from servegym.baselines.calendar.learning import (
    CalendarSearch,
    Players,
    Search,
    first_vector,
    to_parameters,
)
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs import TASKS, ServegymError, ServingEnv, make_case, play
from servegym.envs.task.config import with_overrides
from servegym.envs.workload.plan import Plan, plan_by_scores
from servegym.envs.workload.scoring import ScoreWeights, Scoring
from servegym.studies.agents.rollouts import play_rollouts, rollouts_table
from servegym.studies.commands import train
from servegym.studies.policies import note_agents
from tests.helpers import UNIT_COSTS, instance, make_env, start

GSM8K = TASKS["servegym/GSM8K-v0"]
TINY = TASKS["servegym/Tiny-v0"]
SMALL = with_overrides(GSM8K, {"cluster": {"clients": 20}, "workload": {"requests": 150}})
FEW = Search(stages=5, population=6, cases=3, generations=4)


@pytest.mark.parametrize("seed", range(3))
def test_the_usual_weights_are_the_rule_aligned(seed: int) -> None:
    case = make_case(GSM8K, seed)
    aligned, scored = (
        play_compiled(GSM8K, TriggerPolicy(rule, triggers.LOOKAHEAD, 0.5), case)
        for rule in ("aligned", "scored")
    )
    assert scored == aligned
    assert aligned["gap"] < play_compiled(GSM8K, make_trigger_policy("lpt"), case)["gap"]


def test_a_hand_solved_stage() -> None:
    # Stages at 0, 4 and 6, the end at 10. Two clients, lengths of 3, 4, 6 and 9 rounds.
    # Pads now: 1, 0, 0, 1. Best pads later: 3 rounds end at 7 (from 4) or 9 (from 6): 1; 4 from 6: 0;
    # 6 from 4: 0; 9 only beyond the end: 13 − 10 = 3 rounds late. Later − now: 0, 0, 0, 2.
    requests = instance((1, 4), (1, 5), (1, 7), (1, 10))
    weights = ScoreWeights(length=0, pad=1, later=1, shortest_share=0, tail=0)
    env = make_env(2, UNIT_COSTS, rules=("scored",))
    start(env, requests, None, Scoring(weights, np.array([0, 4, 6, 10])))
    # 9 rounds first; of the equal others the longest. Those of 4 and 3 rounds wait for a client.
    log = env.records()
    assert log.admitted_s[2] == log.admitted_s[3] == 0.0
    assert np.isnan(log.admitted_s[:2]).all()


def test_python_and_compiled_episodes_are_equal() -> None:
    policy = calendar_policy(learned_parameters(GSM8K.name), 3)
    case = make_case(SMALL, 7)
    row = play(SMALL, "calendar", policy, case, seed=0).row
    metrics = play_compiled(SMALL, policy, case)
    for name in ("makespan_s", "prefill_stages", "ttft_p50_s"):
        assert row[name] == metrics[name]


def test_the_best_imagined_calendar_is_played() -> None:
    case = make_case(SMALL, 3)
    alone, several = (
        play_compiled(SMALL, calendar_policy(None, calendars), case)["makespan_s"]
        for calendars in (1, 20)
    )
    assert several <= alone


def test_the_shipped_calendar_beats_the_search() -> None:
    # results/gsm8k has the whole table; rollout's gap on these cases is 1.65 ± 0.02 %.
    gaps = [
        play_compiled(GSM8K, calendar_policy(), make_case(GSM8K, seed))["gap"]
        for seed in range(1_000_000, 1_000_005)
    ]
    assert np.mean(gaps) < 0.0155


def test_a_calendar_is_laid_out() -> None:
    clocks = lay_calendar(np.log([1.0, 2.0, 1.0]), 0.5, 80.0)
    assert clocks.tolist() == [0, 30, 90, 120]
    crowded = lay_calendar(np.array([0.0, -20.0, -20.0, 0.0]), 0.0, 1.0)
    assert crowded.tolist() == [0, 1, 2, 3, 4]  # a round apart, whatever the end


@pytest.mark.parametrize("task", ["Chat-v0", "Cluster-v0", "GSM8KPredicted-v0", "Tiny-v0"])
def test_every_kind_of_task_can_be_played(task: str) -> None:
    config = TASKS[f"servegym/{task}"]
    if config.workload.requests > 200:
        config = with_overrides(config, {"workload": {"requests": 120}})
    row = play(config, "calendar", calendar_policy(None, 2), make_case(config, 1), seed=1).row
    assert row["unfinished_requests"] == 0


def test_learning_is_resumed_by_its_fitness_alone() -> None:
    whole = CalendarSearch(SMALL, FEW)
    fitness = np.array([whole.step() for _ in range(4)])
    assert np.isfinite(fitness).all()
    again = CalendarSearch(SMALL, FEW)
    again.replay(fitness[:2])
    assert [again.step().tolist() for _ in range(2)] == fitness[2:].tolist()
    assert again.centre == whole.centre


def test_threads_change_no_gap() -> None:
    candidates = [to_parameters(first_vector(5) + 0.1 * k) for k in range(3)]
    seeds = np.array([0, 5])
    one, two = (Players(SMALL, 2, threads).gaps(candidates, seeds) for threads in (1, 2))
    assert one.tolist() == two.tolist()
    policy = calendar_policy(candidates[1], 1)
    assert play_compiled(SMALL, policy, make_case(SMALL, 5))["gap"] == pytest.approx(
        one[1, 1], abs=1e-12
    )


def test_parameters_are_read_as_written(tmp_path: Path) -> None:
    parameters = to_parameters(first_vector(4))
    write_parameters(parameters, tmp_path, "servegym/Tiny-v0")
    assert read_parameters(tmp_path / CALENDAR_FILE) == parameters


GOOD = json.dumps({"family": "calendar", "task": "t", **asdict(CalendarParameters((0.0, 1.0)))})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged|JSON|json"),
        (GOOD.replace('"calendar"', '"ppo"'), "must be of family 'calendar', got 'ppo'"),
        (GOOD.replace('"spare": 0.02', '"spare": NaN'), "spare must lie in"),
        (GOOD.replace('"pad": 3.0', '"pad": Infinity'), "pad must lie in"),
        (GOOD.replace('"pad": 3.0', '"padding": 3.0'), "damaged"),
        (GOOD.replace("[0.0, 1.0]", "[]"), "1 … 511 intervals, got 0"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / CALENDAR_FILE
    path.write_text(GOOD, encoding="utf-8")
    assert read_parameters(path).log_intervals == (0.0, 1.0)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ServegymError, match=message):
        read_parameters(path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"length": np.nan}, "length"),
        ({"urgent_scale": 0.0}, "urgent_scale must lie in"),
        ({"shortest_share": 1.0}, "leaves no candidates"),
        ({"shortest_share": -0.1}, "shortest_share must lie in 0 … 1"),
        ({"tail": -1.0}, "tail must be ≥ 0"),
    ],
)
def test_wrong_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        ScoreWeights(**weights)
    assert ScoreWeights(shortest_share=0.99, tail=0.0).tail == 0.0


@pytest.mark.parametrize("calendar", [[3], [4, 4], [5, 3], [-1, 4], [0.5, 2], list(range(513))])
def test_wrong_calendars(calendar: list[float]) -> None:
    with pytest.raises(ServegymError, match="calendar"):
        Scoring(calendar=np.array(calendar))
    assert Scoring(calendar=np.arange(512)).stages == 511


def test_a_plan_needs_queues_or_a_scoring() -> None:
    with pytest.raises(ServegymError, match="offsets"):
        Plan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    assert not plan_by_scores(Scoring()).has_queues


@pytest.mark.parametrize(
    "change", [{"stages": 0}, {"population": 3}, {"cases": 0}, {"seed": 800}, {"spread": 0.0}]
)
def test_wrong_searches(change: dict[str, Any]) -> None:
    with pytest.raises(ServegymError, match=next(iter(change))):
        replace(FEW, **change)


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ServegymError, match="known"):
        Players(TASKS["servegym/GSM8KPredicted-v0"], 1)
    arriving = with_overrides(SMALL, {"workload": {"arrival_rate_per_s": 5.0}})
    with pytest.raises(ServegymError, match="t = 0"):
        Players(arriving, 1).gaps([CalendarParameters((0.0,))], np.array([0]))


def test_names_of_the_policy() -> None:
    assert make_policy("calendar-30") == make_policy("calendar(calendars=30)")
    for name in ("calendar-0", "calendar(calendars=1.5)"):
        with pytest.raises(ServegymError, match="whole number in 1"):
            make_policy(name)
    with pytest.raises(ServegymError, match="variations must lie in 1"):
        CalendarPlanner(variations=0)


def test_an_action_may_bring_its_weight() -> None:
    process = {"rules": ("longest", "aligned", "scored"), "pads": (0.0, 3.0)}
    task = with_overrides(SMALL, {"process": process})
    assert task.actions[3:] == ("prefill:scored", "prefill:scored:pad=0", "prefill:scored:pad=3")
    case = make_case(task, 0)
    plan = plan_by_scores(Scoring(ScoreWeights(length=0.1, shortest_share=0.0, tail=0.0)))

    def admitted(action: int) -> list[float]:
        env = ServingEnv(task)
        env.reset(options={"requests": case.requests, "plan": plan})
        over = False
        while not over:
            mask = env.action_masks()
            over = env.step(action if mask[action] else 0)[2]
        return env.records().admitted_s.tolist()

    assert admitted(3) == admitted(5)
    assert admitted(4) != admitted(3)
    with pytest.raises(ServegymError, match="belongs to the rule 'scored'"):
        with_overrides(SMALL, {"process": {"pads": (1.0,)}})
    with pytest.raises(ServegymError, match=r"process\.pads must lie in 0"):
        with_overrides(task, {"process": {"pads": (-1.0,)}})


def test_training_says_whether_it_beats_the_rules_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--algorithm",
        "calendar",
        "--task",
        "Tiny-v0",
        "--stages",
        "4",
        "--population",
        "6",
        "--cases",
        "2",
    ]
    options += ["--generations", "4", "--evaluate-every", "2", "--validation-cases", "3"]
    options += ["--threads", "1", "--output", str(tmp_path / "run")]
    assert train.main(options) == 0
    said = capsys.readouterr().out
    assert "above the lower bound on 3 validation cases" in said
    with pytest.raises(ServegymError, match="holds a run"):
        train.main(options)
    assert train.main([*options, "--resume"]) == 0
    assert capsys.readouterr().out == said
    # Options that are not given are those of the run, its learner, too.
    assert train.main(["--output", str(tmp_path / "run"), "--resume"]) == 0
    assert capsys.readouterr().out == said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "\n".join(summary["text"]) + "\n" == said
    assert {rule["rule"] for rule in summary["rules"]} >= {"hybrid"}
    # TensorBoard has what it has of other learners, but for actions and decisions' times.
    figure = draw_training_dashboard(tmp_path / "run")
    charts = {axes.get_title(loc="left"): axes for axes in figure.axes}
    titles = {"gap to the proven lower bound (%)", "utilisation", "prefill stages an episode"}
    assert set(charts) == titles
    assert figure.get_suptitle().startswith("Tiny-v0: calendar, seed 0; best gap")
    labels = [line.get_label() for line in charts["gap to the proven lower bound (%)"].lines]
    assert {"training episodes", "agent, greedy, on validation cases"} <= set(map(str, labels))
    assert any(str(label).startswith("hybrid (") for label in labels)


def test_searches_over_agents_are_played_once(tmp_path: Path) -> None:
    path, names = tmp_path / "rollouts.csv", ["rollout:calendar-1", "rollout-2:calendar-1"]
    first = play_rollouts(TINY, names[:1], range(1_000_000, 1_000_002), path)
    both = play_rollouts(TINY, names, range(1_000_000, 1_000_003), path)
    assert len(both) == 6
    kept = both[(both["policy"] == names[0]) & (both["seed"] < 1_000_002)]
    assert kept["ms"].tolist() == first["ms"].tolist()  # not played again
    hybrid = [play(TINY, "x", make_policy("hybrid"), make_case(TINY, s), s) for s in first["seed"]]
    rival = pd.Series([each.row["gap"] for each in hybrid], index=first["seed"])
    table = rollouts_table(first, {"hybrid": rival})
    assert "`rollout:calendar-1`" in table
    assert "− hybrid (points)" in table


def test_a_search_over_a_calendar_is_noted_by_what_the_calendar_learned(tmp_path: Path) -> None:
    names = ["rollout:calendar", "calendar", "rollout:hybrid"]
    noted = note_agents(names, "servegym/GSM8K-v0", tmp_path)
    assert noted["rollout:calendar"] == noted["calendar"]
    assert set(noted) == {"rollout:calendar", "calendar"}
