"""The three checks of the method: verdicts, estimates and stealing by hand, and what scripts refuse."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from _checks import TUNED, Collection, held_out, load_tasks, short_name

from scripts import check_estimates, check_iteration_rule, check_stealing
from servegym.baselines import triggers
from servegym.baselines.distributions import OUTPUTS, check_outputs, make_constructed_case
from servegym.baselines.episodes import play_compiled
from servegym.baselines.estimates import (
    ESTIMATES,
    estimated_task,
    noisy,
    reversed_order,
    scaled,
    taken_as_exact,
)
from servegym.baselines.plans import plan_expected
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.verdicts import JudgedPolicy, Verdict, balance, judge_episode, tally
from servegym.envs import Requests, ServegymError, TaskConfig, load_task
from servegym.envs.cases import Case, bound_case
from servegym.envs.config import with_overrides
from servegym.envs.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.tasks import TASKS
from servegym.envs.workloads import output_lengths
from tests.helpers import instance, make_env
from tests.test_policies import VIEW
from tests.test_scripts import refused

ROOT = Path(__file__).parents[1]
SMALL = with_overrides(
    TASKS["servegym/GSM8K-v0"], {"cluster": {"clients": 12}, "workload": {"requests": 60}}
)
SCRIPTS = ("check_iteration_rule", "check_estimates", "check_stealing")


def unit_case(clients: int, *rounds: int) -> tuple[TaskConfig, Case]:
    """A round is 1 s, a stage 2 s; requests of these decode rounds, all known."""
    task = make_env(clients).task
    requests = instance(*((5, 1 + count) for count in rounds))
    return task, bound_case(task, task.cost.tables(clients), requests)


def judged(name: str, clients: int, *rounds: int) -> tuple[float, list[Verdict]]:
    """The makespan of a one-queue rule and all its verdicts; judges are the rule and ``fcfs``."""
    task, case = unit_case(clients, *rounds)
    policy = make_trigger_policy(name)
    judges = (policy, make_trigger_policy("threshold-1"))
    row, verdicts = judge_episode(task, case, policy, judges, 10, seed=0)
    return row["makespan_s"], verdicts


# ---- verdicts ------------------------------------------------------------------------------------


def test_prefilling_is_better_where_it_fills_a_round_that_runs_anyway() -> None:
    # 0–2 stage of 10 and 9 rounds; at 11 the 9 is done, one round is left and a request of 1 waits.
    # Prefill: stage to 13, one round for both, 14. Decode on: 12, stage to 14, its round, 15.
    # C_d = 1 client · 1 s, C_p = 1 client · 2 s.
    makespan, verdicts = judged("lpt", 2, 1, 10, 9)
    assert verdicts == [Verdict(0, False, 0.5, (15.0, 15.0), (14.0, 14.0))]
    assert makespan == 15
    said = tally(verdicts, [0])
    assert (said["late"], said["early"], said["regret_s"], said["stake_s"]) == (1, 0, 1.0, 1.0)
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
    said = tally(verdicts, [0])
    assert (said["ties"], said["early"]) == (1, 1)
    assert (said["regret_s"], said["early_s"], said["decode_regret_s"]) == (2, 2, 0)
    assert np.isnan(said["auc"])  # prefilling was never better


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
    one, two, other, none = (
        judge_episode(SMALL, case, policy, [policy], 1000, seed, noise)[1]
        for seed, noise in [(3, 0.5), (3, 0.5), (4, 0.5), (3, 0.0)]
    )
    assert one == two
    assert one != other
    assert one != none


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
        as_another = multiplier * check_iteration_rule.multiplier_of(x, estimate)
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
        JudgedPolicy(make_trigger_policy(name), (), (), noise)
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


# ---- distributions and estimates -----------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_constructed_outputs_have_the_papers_mean(name: str) -> None:
    task = with_overrides(SMALL, {"workload": {"requests": 20_000}})
    lengths = make_constructed_case(task, name, 0).requests.output_tokens
    assert lengths.mean() == pytest.approx(344, rel=0.03)
    assert lengths.min() >= 1
    same = make_constructed_case(task, name, 0).requests.output_tokens
    assert np.array_equal(lengths, same)


def test_a_preset_gives_the_tasks_own_case() -> None:
    own = make_case(SMALL, 5).requests.output_tokens
    made = make_constructed_case(SMALL, "gsm8k-lognormal", 5).requests.output_tokens
    assert np.array_equal(own, made)


@pytest.mark.parametrize(
    ("bad", "good"), [("unifrom", "uniform"), ("gsm8k-logormal", "gsm8k-lognormal"), ("", "tiny")]
)
def test_unknown_distributions_are_refused(bad: str, good: str) -> None:
    with pytest.raises(ServegymError, match="unknown distribution of outputs"):
        check_outputs(bad)
    check_outputs(good)


def lengths_of(*outputs: int) -> Requests:
    return instance(*((5, output) for output in outputs))


@pytest.mark.parametrize(
    ("estimated", "predicted", "spread"),
    [
        (scaled(lengths_of(2, 8, 4), 1.0), [2, 8, 4], 0.0),
        (scaled(lengths_of(2, 8, 4), 0.5), [1, 4, 2], np.log(2)),
        (scaled(lengths_of(2, 8, 4), 1.5), [3, 12, 6], np.log(1.5)),
        (scaled(lengths_of(2, 2), 0.1), [1, 1], np.log(2)),  # a request has a token
        (reversed_order(lengths_of(2, 8, 4)), [8, 2, 4], np.log(4) * np.sqrt(2 / 3)),
        (reversed_order(lengths_of(3, 3, 5)), [5, 3, 3], np.log(5 / 3) * np.sqrt(2 / 3)),
        (reversed_order(lengths_of(7)), [7], 0.0),
        (taken_as_exact(scaled(lengths_of(2, 8, 4), 0.5)), [1, 4, 2], 0.0),
    ],
)
def test_estimates_by_hand(estimated: Requests, predicted: list[int], spread: float) -> None:
    assert estimated.predicted_output_tokens.tolist() == predicted
    assert estimated.predicted_spread is not None
    assert estimated.predicted_spread == pytest.approx(np.full(len(predicted), spread))


def test_random_errors_have_mean_one_and_the_deviation_asked_for() -> None:
    requests = lengths_of(*[10_000] * 20_000)
    errors = noisy(requests, 0.5, np.random.default_rng(0)).predicted_output_tokens / 10_000
    assert errors.mean() == pytest.approx(1, abs=0.02)
    assert np.log(errors).std() == pytest.approx(0.5, abs=0.01)
    exact = noisy(requests, 0.0, np.random.default_rng(0))
    assert np.array_equal(exact.predicted_output_tokens, requests.output_tokens)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_bad_factors_and_deviations_are_refused(bad: float) -> None:
    with pytest.raises(ServegymError, match="must be > 0"):
        scaled(lengths_of(2), bad)
    if bad != 0:
        with pytest.raises(ServegymError, match="must be ≥ 0"):
            noisy(lengths_of(2), bad, np.random.default_rng(0))


@pytest.mark.parametrize("policy", check_estimates.policies(SMALL))
def test_perfect_estimates_are_known_lengths(policy: str) -> None:
    case = make_case(SMALL, 3)
    perfect = Case(scaled(case.requests, 1.0), case.bound)
    played = make_trigger_policy(policy)
    assert play_compiled(estimated_task(SMALL), played, perfect) == play_compiled(
        SMALL, played, case
    )


def test_a_common_factor_leaves_the_order_and_a_threshold_alone() -> None:
    """Admission by order alone does not feel a bias; what cuts time to the next finish does."""
    case = make_case(SMALL, 3)
    gaps = {
        name: [
            play_compiled(
                estimated_task(SMALL),
                make_trigger_policy(name),
                Case(scaled(case.requests, factor), case.bound),
            )["gap"]
            for factor in (1.0, 2.0)
        ]
        for name in ("threshold-3", "hybrid")
    }
    assert gaps["threshold-3"][0] == gaps["threshold-3"][1]
    assert gaps["hybrid"][0] != gaps["hybrid"][1]


def test_every_estimate_keeps_the_true_lengths() -> None:
    case = make_case(SMALL, 3)
    lengths = output_lengths(SMALL.workload.source)
    for estimate in ESTIMATES.values():
        requests = estimate(case.requests, lengths, np.random.default_rng(0))
        assert np.array_equal(requests.output_tokens, case.requests.output_tokens)
        assert requests.predicted_spread is not None


# ---- stealing ------------------------------------------------------------------------------------


def test_with_a_perfect_plan_nothing_is_left_to_steal() -> None:
    task, case = unit_case(2, 1, 4, 3, 2)  # queues 4, 1 and 3, 2: both clients end at round 5
    without, stealing = (
        check_stealing.play_stealing(task, make_trigger_policy(name), case)
        for name in ("offline", "offline-steal")
    )
    assert without == stealing
    assert stealing["stolen"] == 0
    assert without["makespan_s"] == 5 + 3 * 2  # stages at rounds 0, 3 and 4


def test_what_stealing_saves_by_hand() -> None:
    # Predicted alike, so requests 0 and 2 (1 round each) go to client 0, 1 and 3 (9 each) to client 1.
    # Own queues: stages at rounds 0, 1 and 9, the last request ends at round 18.
    # Stealing: client 0 is through at round 2 and takes request 3, which ends at round 11.
    task, case = unit_case(2, 1, 9, 1, 9)
    requests = instance((5, 2), (5, 10), (5, 2), (5, 10), predicted=[5, 5, 5, 5])
    informed, case = estimated_task(task), Case(requests, case.bound)
    played = {
        name: check_stealing.play_stealing(informed, make_trigger_policy(name), case)
        for name in ("offline", "offline-steal")
    }
    assert played["offline"]["makespan_s"] == 18 + 3 * 2
    assert played["offline"]["stolen"] == 0
    assert played["offline-steal"]["makespan_s"] == 11 + 3 * 2
    assert played["offline-steal"]["stolen"] == 0.25


def test_hybrid_without_stealing_serves_own_queues_only() -> None:
    policy = make_trigger_policy("hybrid-plan-0.2")
    assert (policy.rule, policy.planner, policy.parameter) == ("plan", plan_expected, 0.2)
    assert check_stealing.play_stealing(SMALL, policy, make_case(SMALL, 3))["stolen"] == 0


# ---- scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "Tyni-v0"], "did you mean 'Tiny-v0'"),  # misspelt
        (["--tasks", ","], "names no task"),
        (["--tasks", "GSM8KPredicted-v0"], "the check itself says what is known"),
        (["--cases", "1"], "--cases must lie"),
        (["--cases", "1000001"], "--cases must lie"),
        (["--cases", "two"], "two"),
        (["--jobs", "0"], "--jobs must lie in 1"),
        (["--case", "2"], "did you mean '--cases'"),  # unknown option
    ],
)
def test_checks_refuse(tmp_path: Path, script: str, options: list[str], message: str) -> None:
    assert message in refused(script, tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outputs", "unifrom"], "did you mean 'uniform'"),
        (["--outputs", ","], "names no distribution"),
        (["--samples", "0"], "--samples must lie in 1"),
    ],
)
def test_the_iteration_check_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused("check_iteration_rule", tmp_path / "out", *options)


def test_tasks_with_arrivals_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "late.toml"
    path.write_text("[workload]\narrival_rate_per_s = 1.0\n")
    with pytest.raises(ServegymError, match="has arrivals"):
        load_tasks(str(path))
    path.write_text("[workload]\nrequests = 9\n")
    assert [short_name(task) for task in load_tasks(f"{path},Tiny-v0")] == ["late", "Tiny-v0"]
    with pytest.raises(ServegymError, match="same file"):
        load_tasks("Tiny-v0,servegym/Tiny-v0")


def test_the_least_that_is_legal() -> None:
    assert held_out(2, 1) == range(HELD_OUT_SEED, HELD_OUT_SEED + 2)
    assert held_out(HELD_OUT_SEED, 1)[-1] == 2 * HELD_OUT_SEED - 1
    assert check_iteration_rule.parse_outputs(" tiny,uniform,tiny ") == ("tiny", "uniform")


def fake_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    return [{"seed": seed, "kind": kind, "gap": seed / 3} for kind in ("a", "b")]


def test_a_collection_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """Stopped in the middle, or asked for more later: the same file as in one go."""
    task, seeds = load_task("Tiny-v0"), range(5, 9)

    def stopped(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
        if seed == 7:
            raise KeyboardInterrupt
        return fake_case(task, seed)

    whole, parts = (Collection(tmp_path / name, {}, texts=("kind",)) for name in ("whole", "parts"))
    for collection in (whole, parts):
        collection.open([task])
    table = whole.rows(task, seeds, fake_case, 1)
    with pytest.raises(KeyboardInterrupt):
        parts.rows(task, seeds, stopped, 1)
    assert list(pd.read_csv(tmp_path / "parts/Tiny-v0.csv")["seed"]) == [5, 5, 6, 6]
    pd.testing.assert_frame_equal(parts.rows(task, seeds, fake_case, 1), table)
    one, two = ((tmp_path / name / "Tiny-v0.csv").read_bytes() for name in ("whole", "parts"))
    assert one == two
    assert list(parts.rows(task, seeds[:1], fake_case, 1)["kind"]) == ["a", "b"]


def test_a_collection_refuses_rows_of_something_else(tmp_path: Path) -> None:
    task = load_task("Tiny-v0")
    Collection(tmp_path, {"samples": 5}).open([task])
    Collection(tmp_path, {"samples": 5}).open([task])  # the same again
    with pytest.raises(ServegymError, match="another task, setting or version"):
        Collection(tmp_path, {"samples": 6}).open([task])
    for damage in ("", "nonsense\n1\n", "seed,gap\n0,x\n", "seed,gap\n0,1\n0,2\n1,1\n"):
        (tmp_path / "Tiny-v0.csv").write_text(damage)
        with pytest.raises(ServegymError, match=r"Tiny-v0\.csv: (empty|not a table|line 2|seed 1)"):
            Collection(tmp_path, {"samples": 5}).rows(task, range(2), fake_case, 1)


def run_check(script: str, output: Path, cases: int) -> None:
    task = output.parent / "small.toml"  # where a plan meets its bound at once; Tiny-v0's do not
    task.write_text("[cluster]\nclients = 8\n[workload]\nrequests = 40\n")
    options = ["--tasks", str(task), "--cases", str(cases), "--jobs", "1", "--output", str(output)]
    if script == "check_iteration_rule":
        options += ["--outputs", "uniform,constant", "--samples", "4"]
    module = {
        "check_iteration_rule": check_iteration_rule,
        "check_estimates": check_estimates,
        "check_stealing": check_stealing,
    }[script]
    with redirect_stdout(io.StringIO()):
        assert module.main(options) == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_cases_later_give_the_same_tables(tmp_path: Path, script: str) -> None:
    output = tmp_path / "out"
    run_check(script, output, 2)
    run_check(script, output, 3)
    resumed = {path.name: path.read_bytes() for path in output.iterdir()}
    for path in output.iterdir():
        path.unlink()
    run_check(script, output, 3)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == resumed
    text = (output / f"{script.removeprefix('check_')}.md").read_text()
    assert f"`python scripts/{script}.py --tasks {tmp_path}" in text
    assert "## Costs of small" in text or "## small" in text
    assert "nan" not in text


# ---- results -------------------------------------------------------------------------------------


def committed(check: str, task: str, part: str = "") -> pd.DataFrame:
    name = f"{task}-{part}" if part else task
    path = ROOT / "results/checks" / check / f"{name}.csv"
    table = pd.read_csv(path)
    assert table["seed"].min() >= HELD_OUT_SEED
    return table


def test_the_reports_follow_from_their_rows() -> None:
    tasks = {name: load_task(name) for name in ("GSM8K-v0", "Paper-v0")}
    texts = {
        "estimates": check_estimates.report(
            {name: (task, committed("estimates", name)) for name, task in tasks.items()},
            check_estimates.command_of(check_estimates.Args()),
        ),
        "stealing": check_stealing.report(
            {name: (task, committed("stealing", name)) for name, task in tasks.items()},
            check_stealing.command_of(check_stealing.Args()),
        ),
    }
    args = check_iteration_rule.Args()
    judged = {}
    for name, task in tasks.items():
        parts = [
            committed("iteration_rule", name, outputs).assign(outputs=outputs)
            for outputs in check_iteration_rule.parse_outputs(args.outputs)
        ]
        judged[name] = task, pd.concat(parts, ignore_index=True)
    texts["iteration_rule"] = check_iteration_rule.report(judged, args)
    for check, text in texts.items():
        assert (ROOT / "results/checks" / check / f"{check}.md").read_text() == text


@pytest.mark.parametrize("task", TUNED)
def test_tuned_multipliers_are_those_of_the_tuning(task: str) -> None:
    text = (ROOT / "results/tuning" / task / "tuning.md").read_text()
    for family, multiplier in TUNED[task].items():
        found = re.search(rf"\| {family}-([\d.]+) ", text)
        assert found is not None
        assert float(found[1]) == multiplier
