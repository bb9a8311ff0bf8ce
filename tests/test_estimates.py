"""Wrong estimates of output lengths, and the distributions that the checks draw outputs from."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import Requests, ServegymError
from servegym.envs.playing.evaluation import make_case
from servegym.envs.task.cases import Case
from servegym.envs.task.config import with_overrides
from servegym.envs.task.distributions import OUTPUTS, check_outputs, make_constructed_case
from servegym.envs.task.estimates import (
    ESTIMATES,
    estimated_task,
    noisy,
    reversed_order,
    scaled,
    taken_as_exact,
)
from servegym.envs.workload.sources import output_lengths
from servegym.studies.checks.estimates import policies
from tests.checks_helpers import SMALL
from tests.helpers import instance


@pytest.mark.parametrize("name", OUTPUTS)
def test_constructed_outputs_have_the_papers_mean(name: str) -> None:
    task = with_overrides(SMALL, {"workload": {"requests": 20_000}})
    lengths = make_constructed_case(task, name, 0).requests.output_tokens
    assert lengths.mean() == pytest.approx(344, rel=0.03)
    assert lengths.min() >= 1
    same = make_constructed_case(task, name, 0).requests.output_tokens
    assert np.array_equal(lengths, same)


def test_a_preset_gives_the_tasks_own_case() -> None:
    drawn = make_case(SMALL, 5).requests.output_tokens
    made = make_constructed_case(SMALL, "gsm8k-lognormal", 5).requests.output_tokens
    assert np.array_equal(drawn, made)


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


@pytest.mark.parametrize("policy", policies(SMALL))
def test_perfect_estimates_are_known_lengths(policy: str) -> None:
    case = make_case(SMALL, 3)
    perfect = Case(scaled(case.requests, 1.0), case.bound)
    played = make_trigger_policy(policy)
    assert play_compiled(estimated_task(SMALL), played, perfect) == play_compiled(
        SMALL, played, case
    )


def test_a_common_factor_leaves_the_order_and_a_threshold_alone() -> None:
    """A common factor changes no order, so threshold stays as it is; hybrid uses the time to a finish."""
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
