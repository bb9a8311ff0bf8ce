"""Policies for uncertain lengths: the compared length, plans by risk and by samples, feedback."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from servegym.baselines.planning.sampled import mean_largest_load, plan_by_samples, sample_rounds
from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.plans import deal_in_turn, plan_at_risk, plan_expected, plan_sampled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs import Requests, ServegymError, ServingEnv, make_requests
from servegym.envs.playing.evaluation import brief, make_case, play
from servegym.envs.playing.policy import Briefing
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.envs.workload.comparison import compared_tokens, standard_deviations
from servegym.envs.workload.plan import plan_from_queues
from servegym.envs.workload.sources import make_workload
from servegym.studies import uncertainty
from servegym.studies.commands import study_uncertainty as study
from tests.helpers import make_env, start

MIXED = with_overrides(
    TASKS["servegym/GSM8KMixed-v0"], {"cluster": {"clients": 8}, "workload": {"requests": 40}}
)
KNOWN = with_overrides(MIXED, {"information": {"output_lengths": "known"}})


def predicted(*rows: tuple[int, float], outputs: list[int] | None = None) -> Requests:
    """Requests of one prompt token from rows of (mean, spread)."""
    means = [mean for mean, _ in rows]
    return make_requests(
        np.ones(len(rows), int), outputs or means, None, means, [spread for _, spread in rows]
    )


# ---- what counts as longest ------------------------------------------------------------------


def test_compared_tokens_are_those_of_the_lognormal() -> None:
    """Mean 100 and a spread of 0.8, against scipy's distribution; without spread nothing changes."""
    requests = predicted((100, 0.8), (120, 0.0))
    law = stats.lognorm(0.8, scale=100 * np.exp(-(0.8**2) / 2))
    assert law.mean() == pytest.approx(100)
    for q in (0.01, 0.5, 0.99):
        tokens = compared_tokens(requests, "quantile", q, 0.0)
        assert tokens.tolist() == [round(law.ppf(q)), 120]
    for k in (0.0, 1.0, 2.5):
        tokens = compared_tokens(requests, "mean-sd", 0.5, k)
        assert tokens.tolist() == [round(100 + k * law.std()), 120]
    assert standard_deviations(requests) == pytest.approx([law.std(), 0.0])
    assert compared_tokens(requests, "mean", 0.99, 1.0).tolist() == [100, 120]


def test_what_is_certain_counts_for_its_length() -> None:
    requests = make_requests([1, 1], [7, 9])
    for by in ("mean", "quantile", "mean-sd"):
        assert compared_tokens(requests, by, 0.99, 3.0).tolist() == [7, 9]
    assert standard_deviations(requests).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        ({}, 1),  # by the mean: 120 > 100
        ({"compare_by": "quantile", "quantile": 0.99}, 0),  # 467 > 120
        ({"compare_by": "quantile", "quantile": 0.3}, 1),  # 48 < 120
        ({"compare_by": "mean-sd", "deviations": 1.0}, 0),  # 195 > 120
        ({"compare_by": "mean-sd", "deviations": 0.2}, 1),  # 119 < 120
    ],
)
def test_longest_first_goes_by_the_comparison(keys: dict[str, str | float], first: int) -> None:
    """One client, a sure request of 120 and an unsure request of 100: which starts first?"""
    requests = predicted((100, 0.8), (120, 0.0), outputs=[3, 3])
    env = make_env(1, lengths="predicted")
    env = ServingEnv(with_overrides(env.task, {"information": keys}))
    start(env, requests)
    env.step(1 + env.task.process.rules.index("longest"))
    admitted = env.records().admitted_s
    assert int(np.argsort(admitted)[0]) == first
    # What is expected stays the mean, also where the order is another.
    assert env.state is not None
    assert set(env.state.requests[0]["expected_rounds"].tolist()) <= {2, 99, 119}


def test_buckets_hold_means_whatever_the_order() -> None:
    """The histogram of waiting lengths is of expected rounds, also when ranks are not."""
    rows = [(10, 1.0), (3, 0.0), (200, 0.0), (100, 0.9), (30, 0.0)]
    by_mean = make_env(1, lengths="predicted")
    keys = {"information": {"compare_by": "quantile"}}
    by_quantile = ServingEnv(with_overrides(by_mean.task, keys))
    for env in (by_mean, by_quantile):
        start(env, predicted(*rows))
    states = [env.state for env in (by_mean, by_quantile)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].waiting_lengths.tolist() == states[1].waiting_lengths.tolist()
    assert (np.diff(states[1].lengths[0]) >= 0).all()
    assert states[0].by_length.tolist() != states[1].by_length.tolist()


@pytest.mark.parametrize("name", ["quantile", "mean-sd-2"])
def test_with_equal_spreads_it_is_longest_first(name: str) -> None:
    task = with_overrides(
        TASKS["servegym/GSM8KPredicted-v0"],
        {"cluster": {"clients": 8}, "workload": {"requests": 40}},
    )
    case = make_case(task, 1)
    plain = TriggerPolicy("longest", triggers.FEEDBACK, 0.5)
    assert play_compiled(task, plain, case) == play_compiled(task, make_trigger_policy(name), case)


@pytest.mark.parametrize(
    "name", ["quantile", "mean-sd", "feedback", "offline-saa-4", "round-robin"]
)
@pytest.mark.parametrize("task", [MIXED, KNOWN])
def test_object_and_compiled_play_agree(name: str, task: object) -> None:
    assert task in (MIXED, KNOWN)
    chosen = MIXED if task is MIXED else KNOWN
    case = make_case(chosen, 3)
    row = play(chosen, name, make_policy(name), case, 0).row
    compiled = play_compiled(chosen, make_trigger_policy(name), case)
    same = [metric for metric in METRICS if metric != "decisions"]
    assert str([row[metric] for metric in same]) == str([compiled[metric] for metric in same])


def test_pulling_by_a_high_quantile_pays_where_some_are_guesses() -> None:
    """Twenty training cases of the task itself; the study has the held-out figures."""
    task = TASKS["servegym/GSM8KMixed-v0"]
    cases = [make_case(task, seed) for seed in range(20)]
    gaps = {
        name: np.mean(
            [play_compiled(task, make_trigger_policy(name), case)["gap"] for case in cases]
        )
        for name in ("quantile", "mean-sd-3", "mean-sd-0")
    }
    assert gaps["quantile"] < gaps["mean-sd-0"] / 2
    assert gaps["mean-sd-3"] < gaps["mean-sd-0"] / 2


def test_the_mixed_workload_is_what_it_says() -> None:
    """20,000 requests: medians and spreads of log(true / predicted), each to two standard errors."""
    requests = make_workload("gsm8k-mixed", 20_000, 0.0, np.random.default_rng(0))
    assert requests.predicted_spread is not None
    free = (requests.predicted_output_tokens < 300) & (requests.predicted_output_tokens > 150)
    for spread in (0.1, 0.8):
        chosen = free & (requests.predicted_spread == spread)
        assert chosen.sum() == pytest.approx(free.sum() / 2, rel=0.05)
        errors = np.log(requests.output_tokens[chosen] / requests.predicted_output_tokens[chosen])
        assert np.median(errors) == pytest.approx(-(spread**2) / 2, abs=0.04)
        quartiles = np.subtract(*np.percentile(errors, [75, 25])) / 1.349  # the limit cuts the tail
        assert quartiles == pytest.approx(spread, rel=0.05)
    assert requests.output_tokens.max() == 1024


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words", "good"),
    [
        ("quantile-0", "q must lie between 0 and 1", "quantile-0.001"),
        ("quantile-1", "q must lie between 0 and 1", "quantile-0.999"),
        ("quantile-99", "q must lie between 0 and 1", "quantile-0.5"),
        ("mean-sd-100.5", "k must lie in 0 … 100", "mean-sd-100"),
        ("offline-risk-101", "k must lie in 0 … 100", "offline-risk-0"),
        ("offline-saa-0", "S must be a whole number in 1 … 10000", "offline-saa-1"),
        ("offline-saa-2.5", "S must be a whole number", "offline-saa-2"),
        ("offline-saa-10001", "S must be a whole number", "offline-saa-10000"),
        ("feedback-1000001", "λ must lie in 0", "feedback-1000000"),
        ("round-robin-2", "unknown policy", "round-robin"),
        ("quantil", "did you mean 'quantile'", "quantile"),
    ],
)
def test_bad_numbers_and_their_legal_twins(bad: str, words: str, good: str) -> None:
    with pytest.raises(ServegymError, match=words):
        make_policy(bad)
    make_policy(good)


# ---- plans -------------------------------------------------------------------------------------


def briefing(requests: Requests, clients: int) -> Briefing:
    task = make_env(clients, lengths="predicted").task
    return Briefing(task, requests, np.random.default_rng(0))


def test_the_plan_at_risk_gives_the_unsure_one_room() -> None:
    """Two clients. By means 6 + 2 against 4 + 4; with a deviation of 5 the unsure 4 stands alone."""
    unsure = float(np.sqrt(np.log1p((5 / 4) ** 2)))  # spread whose deviation is 5 at a mean of 4
    requests = predicted((7, 0.0), (3, 0.0), (5, 0.0), (4, unsure), outputs=[7, 3, 5, 4])
    assert standard_deviations(requests)[3] == pytest.approx(5.0)
    expected = plan_expected(requests, briefing(requests, 2)).loads(requests.decode_rounds)
    assert sorted(expected.tolist()) == [7, 8]  # rounds 6, 2, 4, 3
    risky = plan_at_risk(requests, briefing(requests, 2), 1.0)
    with_unsure = next(queue for queue in map(risky.queue, range(2)) if 3 in queue)
    assert sorted(with_unsure.tolist()) == [1, 3]  # 2 + (3 + 5) = 10 against 6 + 4


def test_dealing_in_turn() -> None:
    requests = predicted(*[(5, 0.0)] * 5)
    plan = deal_in_turn(requests, briefing(requests, 2))
    assert [plan.queue(client).tolist() for client in range(2)] == [[0, 2, 4], [1, 3]]


def best_mean(rounds: np.ndarray, clients: int) -> float:
    """The least mean largest load over all assignments, by trying each."""
    n = rounds.shape[1]
    return min(
        mean_largest_load(
            plan_from_queues([[i for i in range(n) if at[i] == c] for c in range(clients)]), rounds
        )
        for at in product(range(clients), repeat=n)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_sampled_plan_is_a_plan_and_nearly_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients, n, scenarios = (
        int(rng.integers(1, 4)),
        int(rng.integers(1, 7)),
        int(rng.integers(1, 5)),
    )
    requests = predicted(
        *[(int(rng.integers(1, 20)), float(rng.choice([0.1, 0.8]))) for _ in range(n)]
    )
    rounds = sample_rounds(requests, scenarios, rng)
    sampled = plan_by_samples(requests, clients, rounds, rng)
    assert sorted(sampled.plan.order.tolist()) == list(range(n))
    assert sampled.plan.clients == clients
    assert sampled.in_sample_rounds == pytest.approx(mean_largest_load(sampled.plan, rounds))
    best = best_mean(rounds, clients)
    assert best - 1e-9 <= sampled.in_sample_rounds
    greedy = plan_by_samples(requests, clients, rounds, np.random.default_rng(0))
    assert min(sampled.in_sample_rounds, greedy.in_sample_rounds) <= 1.25 * best + 2


def test_samples_see_what_means_do_not() -> None:
    """Two sure requests of 10 and two of 0 or 20 that are long in turn; two clients.

    By means everything is alike. In either scenario the loads are even, 20 and 20, only where both of
    the unsure are at one client (0 + 20 against 10 + 10).
    """
    requests = predicted((11, 0.0), (11, 0.0), (11, 0.5), (11, 0.5))
    rounds = np.array([[10, 10, 0, 20], [10, 10, 20, 0]])
    sampled = plan_by_samples(requests, 2, rounds, np.random.default_rng(0))
    assert sampled.in_sample_rounds == 20.0
    assert sorted(sorted(sampled.plan.queue(c).tolist()) for c in range(2)) == [[0, 1], [2, 3]]


def test_scenarios_are_drawn_from_the_predictions() -> None:
    requests = predicted((50, 0.4), (80, 0.0))
    rounds = sample_rounds(requests, 20_000, np.random.default_rng(1))
    assert rounds.shape == (20_000, 2)
    assert rounds[:, 0].mean() == pytest.approx(49, rel=0.01)
    assert np.log(rounds[:, 0] + 1.0).std() == pytest.approx(0.4, rel=0.03)
    assert set(rounds[:, 1].tolist()) == {79}
    sure = make_requests([1, 1], [4, 9])
    assert sample_rounds(sure, 3, np.random.default_rng(0)).tolist() == [[3, 8]] * 3


@pytest.mark.parametrize(
    "scenarios", [np.zeros((0, 2), int), np.zeros((1, 3), int), np.zeros(2, int)]
)
def test_scenarios_of_another_shape_are_refused(scenarios: np.ndarray) -> None:
    requests = predicted((5, 0.1), (6, 0.1))
    with pytest.raises(ServegymError, match=r"shape \(any, 2\)"):
        plan_by_samples(requests, 1, scenarios, np.random.default_rng(0))
    with pytest.raises(ServegymError, match="clients must be ≥ 1"):
        plan_by_samples(requests, 0, np.zeros((1, 2), int), np.random.default_rng(0))
    plan_by_samples(requests, 1, np.zeros((1, 2), int), np.random.default_rng(0))


def test_a_sampled_plan_beats_the_means_on_scenarios_it_has_not_seen() -> None:
    task = with_overrides(TASKS["servegym/GSM8KMixed-v0"], {"cluster": {"clients": 50}})
    task = with_overrides(task, {"workload": {"requests": 300}})
    case = make_case(task, 0)
    requests = brief(task, case, 0).requests
    assert requests is not None
    fresh = sample_rounds(requests, 300, np.random.default_rng(99))
    how = Briefing(task, requests, np.random.default_rng(0))
    by_means = mean_largest_load(plan_expected(requests, how), fresh)
    by_samples = mean_largest_load(plan_sampled(requests, how, 64), fresh)
    assert by_samples < 0.99 * by_means


# ---- feedback --------------------------------------------------------------------------------------


def test_feedback_waits_for_what_has_come_so_far() -> None:
    """By hand: see the view. 56 request-rounds over 7 finishes, 8 active: one a round.

    Idling costs 2 clients · 1 round · 0.5 s = 1 s, the fixed part of a stall 8 · 0.25 s = 2 s.
    """
    from tests.test_policies import VIEW

    assert triggers.fires(triggers.FEEDBACK, 0.5, VIEW)
    assert not triggers.fires(triggers.FEEDBACK, np.nextafter(0.5, 1), VIEW)
    assert triggers.fires(triggers.FEEDBACK, 1e6, VIEW._replace(finished=0))


def test_feedback_does_not_look_at_predictions() -> None:
    case = make_case(MIXED, 0)
    requests = case.requests
    noise = np.random.default_rng(0).integers(1, 1000, len(requests))
    others = replace(requests, predicted_output_tokens=noise)
    policy = make_trigger_policy("feedback")
    first, second = (
        play_compiled(MIXED, policy, replace(case, requests=informed))
        for informed in (requests, others)
    )
    assert first == second


# ---- the study -------------------------------------------------------------------------------------

RESULTS = Path(__file__).parents[1] / "results" / "uncertainty"
CASES = ["--cases", "2", "--slow-cases", "2", "--jobs", "1"]


def test_the_reports_follow_from_their_rows() -> None:
    def rows(name: str) -> pd.DataFrame:
        return pd.read_csv(RESULTS / f"{name}.csv")

    quality = rows("GSM8KPredicted-v0-quality"), rows("GSM8KPredicted-v0-slow")
    plans = {name: rows(f"plans/{name}") for name in (uncertainty.PREDICTED, uncertainty.MIXED)}
    bodies = {
        "quality": uncertainty.report_quality(*quality),
        "mixed": uncertainty.report_mixed(rows(uncertainty.MIXED)),
        "plans": uncertainty.report_plans(plans),
    }
    for part, body in bodies.items():
        assert (RESULTS / f"{part}.md").read_text().endswith(body)
    for table in (*quality, rows(uncertainty.MIXED), *plans.values()):
        assert table["seed"].min() == 1_000_000


def test_a_study_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A second run, of more cases, keeps the first one's rows; the tables are those of one run."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    more = ["--cases", "3", "--slow-cases", "3", "--jobs", "1"]
    assert study.main(["--parts", "mixed", "--output", str(whole), *more]) == 0
    for cases in (CASES, more):
        assert study.main(["--parts", "mixed", "--output", str(pieces), *cases]) == 0
    written = [(folder / "GSM8KMixed-v0.csv").read_bytes() for folder in (whole, pieces)]
    assert written[0] == written[1]
    assert "quantile-0.999" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["--parts", "mixd"], "did you mean 'mixed'"),
        (["--parts", ""], "names nothing"),
        (["--cases", "1"], "must lie in 2"),
        (["--slow-cases", "0"], "--slow-cases must lie in 2"),
        (["--foresight-cases", "1"], "--foresight-cases must lie in 2"),
        (["--sampled-cases", "1"], "--sampled-cases must lie in 2"),
        (["--jobs", "0"], "--jobs must lie in 1"),
    ],
)
def test_bad_options_write_nothing(bad: list[str], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    with pytest.raises(ServegymError, match=words):
        study.main(["--parts", "mixed", "--output", str(folder), *CASES, *bad])
    assert not folder.exists()
