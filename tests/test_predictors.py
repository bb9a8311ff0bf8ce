"""Predictors of output lengths: calibration, accuracy, and the user's own columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from servegym.envs import Requests, ServegymError, ServingEnv, make_requests
from servegym.envs.playing.evaluation import brief, make_case
from servegym.envs.task.cases import inform, sample_requests
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.workload.predictors import PREDICTORS, predict
from servegym.envs.workload.sources import output_lengths
from tests.information_helpers import KNOWN, SMALL, UNKNOWN, informed

Write = Callable[[str, str], Path]


# ---- predictors ------------------------------------------------------------------------------


def lognormal_requests(n: int = 20_000) -> Requests:
    rng = np.random.default_rng(1)
    lengths = np.rint(np.exp(6.0 + 0.5 * rng.standard_normal(n))).astype(int)
    return make_requests(np.ones(n, int), lengths)


@pytest.mark.parametrize("tau", [0.2, 0.4, 0.55, 0.69, 0.9])
def test_predictions_have_the_rank_correlation_asked_for(tau: float) -> None:
    """20,000 requests: the standard error of Kendall's tau is below 0.005; means within 1 %."""
    requests = lognormal_requests()
    rng = np.random.default_rng(2)
    predicted = predict(requests, tau, requests.output_tokens, rng)
    means, spread = predicted.predicted_output_tokens, predicted.predicted_spread
    assert spread is not None
    assert stats.kendalltau(means, requests.output_tokens).statistic == pytest.approx(tau, abs=0.02)
    for part in np.array_split(np.argsort(means), 5):  # calibrated where it is short, or long
        assert requests.output_tokens[part].mean() == pytest.approx(means[part].mean(), rel=0.03)
    medians = np.log(means) - spread**2 / 2
    assert np.std(np.log(requests.output_tokens) - medians) == pytest.approx(spread[0], rel=0.02)


def test_the_best_and_the_worst_predictor() -> None:
    requests = lognormal_requests(500)
    for tau, spread in ((1.0, 0.0), (0.0, np.log(requests.output_tokens).std())):
        rng = np.random.default_rng(0)
        predicted = predict(requests, tau, requests.output_tokens, rng)
        assert predicted.predicted_spread == pytest.approx(spread)
        same = predicted.predicted_output_tokens == requests.output_tokens
        assert same.all() if tau == 1 else np.ptp(predicted.predicted_output_tokens) == 0


@pytest.mark.parametrize("name", PREDICTORS)
def test_measured_predictors_are_calibrated(name: str) -> None:
    """Where a predictor says m the mean length is m, for the measured classifier, too."""
    requests = lognormal_requests()
    lengths = requests.output_tokens
    predicted = PREDICTORS[name].predict(requests, lengths, np.random.default_rng(3))
    means = predicted.predicted_output_tokens
    assert means.mean() == pytest.approx(lengths.mean(), rel=0.02)
    for part in np.array_split(np.argsort(means, kind="stable"), 4):
        assert lengths[part].mean() == pytest.approx(means[part].mean(), rel=0.05)


def test_the_classifier_errs_as_its_matrix_says() -> None:
    """Where every length is in one true class, the classes given are that row's shares."""
    predictor = PREDICTORS["bert-5class"]
    of_all = np.array([20, 100, 200, 400, 600])  # one length a class: five different predictions
    lengths = np.full(20_000, 100)
    requests = make_requests(np.ones(20_000, int), lengths)
    predicted = predictor.predict(requests, of_all, np.random.default_rng(4))
    _, counts = np.unique(predicted.predicted_output_tokens, return_counts=True)
    row = np.array(predictor.confusion[1])
    assert counts / 20_000 == pytest.approx(row / row.sum(), abs=0.01)
    assert len(predictor.thresholds) + 1 == len(predictor.confusion) == len(of_all)


def test_unknown_is_the_same_expectation_for_everyone() -> None:
    requests = sample_requests(UNKNOWN, np.random.default_rng(0))
    lengths = output_lengths(UNKNOWN.workload.source)
    assert set(requests.predicted_output_tokens) == {round(lengths.mean())}
    assert set(requests.predicted_spread.tolist()) == {np.log(lengths).std()}  # type: ignore[union-attr]


def test_the_same_lengths_whatever_is_known_of_them() -> None:
    drawn = [sample_requests(task, np.random.default_rng(5)) for task in (SMALL, KNOWN, UNKNOWN)]
    for requests in drawn:
        assert requests.output_tokens.tolist() == drawn[1].output_tokens.tolist()
    assert drawn[1].predicted_spread is None


# ---- the user's own predictions -----------------------------------------------------------------

COLUMNS = "prompt_tokens,output_tokens,predicted_output_tokens"


def column_task(path: Path) -> TaskConfig:
    task = with_overrides(SMALL, {"workload": {"source": str(path)}})
    return informed(task, predictor="column")


def test_own_predictions(write: Write) -> None:
    text = f"{COLUMNS},predicted_spread\n5,6,9,0.5\n5,8,4,0\n"
    requests = sample_requests(column_task(write("own.csv", text)), np.random.default_rng(0))
    assert requests.predicted_output_tokens.tolist() == [9, 4]
    assert requests.predicted_spread.tolist() == [0.5, 0.0]  # type: ignore[union-attr]
    # Another predictor does not look at them.
    other = informed(column_task(write("own.csv", text)), predictor="oracle")
    requests = sample_requests(other, np.random.default_rng(0))
    assert requests.predicted_output_tokens.tolist() == [6, 8]


def test_own_predictions_without_a_spread_get_the_usual_error(write: Write) -> None:
    path = write("own.csv", f"{COLUMNS}\n5,6,12\n5,8,4\n")
    requests = sample_requests(column_task(path), np.random.default_rng(0))
    assert requests.predicted_spread == pytest.approx([np.log(2)] * 2)


def test_own_predictions_that_are_not_there(write: Write) -> None:
    path = write("none.csv", "prompt_tokens,output_tokens\n5,6\n")
    with pytest.raises(ServegymError, match="needs a workload with the column 'predicted_outp"):
        ServingEnv(column_task(path)).reset(seed=0)
    with pytest.raises(ServegymError, match="predictor 'column' needs a workload"):
        ServingEnv(informed(SMALL, predictor="column")).reset(seed=0)
    ServingEnv(column_task(write("own.csv", f"{COLUMNS}\n5,6,6\n"))).reset(seed=0)


BAD_SPREADS = [("-0.1", "0"), ("5.1", "5"), ("nan", "0.3"), ("", "1"), ("wide", "1e-3")]


@pytest.mark.parametrize(("bad", "good"), BAD_SPREADS)
def test_bad_spread(write: Write, bad: str, good: str) -> None:
    text = f"{COLUMNS},predicted_spread\n5,6,6,{{}}\n"
    with pytest.raises(ServegymError, match=r"line 2: predicted_spread must be a number in 0 … 5"):
        sample_requests(column_task(write("bad.csv", text.format(bad))), np.random.default_rng(0))
    task = column_task(write("good.csv", text.format(good)))
    assert len(sample_requests(task, np.random.default_rng(0))) == 1


def test_a_hole_in_the_column(write: Write) -> None:
    path = write("hole.csv", f"{COLUMNS}\n5,6,6\n5,6,\n")
    with pytest.raises(ServegymError, match="line 3: predicted_output_tokens must be a whole"):
        sample_requests(column_task(path), np.random.default_rng(0))


def test_a_spread_without_a_prediction(write: Write) -> None:
    path = write("bad.csv", "prompt_tokens,output_tokens,predicted_spread\n5,6,0.5\n")
    with pytest.raises(ServegymError, match="line 1: column 'predicted_spread' needs 'predicted_o"):
        sample_requests(column_task(path), np.random.default_rng(0))
    with pytest.raises(ServegymError, match="predicted_spread needs predicted_output_tokens"):
        make_requests([5], [6], predicted_spread=[0.5])
    with pytest.raises(ServegymError, match="equally long"):
        make_requests([5], [6], None, [6], [0.5, 0.5])
    with pytest.raises(ServegymError, match="predicted_spread must lie in 0 … 5"):
        make_requests([5], [6], None, [6], [5.5])


def test_requests_given_to_reset_are_predicted_as_the_task_says() -> None:
    requests = sample_requests(KNOWN, np.random.default_rng(0))
    env = ServingEnv(SMALL)
    first, _ = env.reset(seed=0, options={"requests": requests})
    informed = inform(SMALL, requests, np.random.default_rng(0))
    second, _ = env.reset(seed=0, options={"requests": informed})
    oracle, _ = ServingEnv(KNOWN).reset(seed=0, options={"requests": requests})
    assert not np.array_equal(first, oracle)
    assert not np.array_equal(second, oracle)
    with pytest.raises(ServegymError, match="no predicted output lengths"):
        brief(SMALL, replace(make_case(KNOWN, 0)), 0)
