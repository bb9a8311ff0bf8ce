"""What schedulers know of output lengths: predictors, revised expectations, and no leakage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.special import log_ndtr

from servegym.baselines.episodes import play_compiled
from servegym.baselines.registry import REGISTRY, make_policy, make_trigger_policy
from servegym.envs import Requests, ServegymError, ServingEnv, load_task, make_requests
from servegym.envs.cases import inform, sample_requests
from servegym.envs.config import TaskConfig, with_overrides
from servegym.envs.evaluation import brief, make_case, play
from servegym.envs.metrics import METRICS
from servegym.envs.policy import Situation
from servegym.envs.predictors import PREDICTORS, expect_alike, predict
from servegym.envs.requests import MAX_TOKENS
from servegym.envs.simulator.beliefs import expected_output_tokens
from servegym.envs.simulator.state import FINISHED, FUTURE, RUNNING, WAITING
from servegym.envs.tasks import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from servegym.envs.workloads import output_lengths
from tests.helpers import instance, make_env, random_legal_action, start

Write = Callable[[str, str], Path]

SMALL = with_overrides(
    TASKS["servegym/GSM8KPredicted-v0"], {"cluster": {"clients": 8}, "workload": {"requests": 40}}
)


def informed(task: TaskConfig, **keys: Any) -> TaskConfig:
    return with_overrides(task, {"information": keys})


KNOWN = informed(SMALL, output_lengths="known")
UNKNOWN = informed(SMALL, output_lengths="unknown")


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
    own = inform(SMALL, requests, np.random.default_rng(0))
    second, _ = env.reset(seed=0, options={"requests": own})
    oracle, _ = ServingEnv(KNOWN).reset(seed=0, options={"requests": requests})
    assert not np.array_equal(first, oracle)
    assert not np.array_equal(second, oracle)
    with pytest.raises(ServegymError, match="no predicted output lengths"):
        brief(SMALL, replace(make_case(KNOWN, 0)), 0)


# ---- revised expectations -----------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("emitted", [1, 90, 100, 200, 2_000, 100_000])
def test_the_conditional_mean(spread: float, emitted: int) -> None:
    """Against scipy's logarithms of the normal distribution, which do not underflow."""
    log_median = np.log(100.0)
    z = (np.log(emitted) - log_median) / spread
    log_mean = log_median + spread**2 / 2 + log_ndtr(spread - z) - log_ndtr(-z)
    expected = np.clip(np.exp(log_mean), emitted + 1, MAX_TOKENS)
    # The asymptote of far tails is off by 1 / z² of the distance.
    error = 1.0 + 0.02 * (expected - emitted)
    assert expected_output_tokens(log_median, spread, emitted) == pytest.approx(expected, abs=error)


def test_a_certain_prediction_is_revised_by_one_round() -> None:
    assert expected_output_tokens(np.log(100.0), 0.0, 250) == 251


def test_an_outlived_prediction_by_hand() -> None:
    """Two clients. Request 0 is predicted 3 tokens and takes 9, request 1 both 6 and 7."""
    requests = replace(
        instance((5, 9), (5, 6), (5, 5), predicted=[3, 7, 7]),
        predicted_spread=np.array([0.5, 0.5, 0.5]),
    )
    env = make_env(2, lengths="predicted", decisions="rounds")
    start(env, requests)
    env.step(1 + env.task.process.rules.index("fcfs"))
    # The stage emits a token, the finish of request 1 after five rounds is the first choice.
    assert env.view().round == 5
    assert env.view().active == 1
    log_median = np.log(3) - 0.5**2 / 2
    expected = expected_output_tokens(log_median, 0.5, 6)  # six tokens are out
    assert env.view().rounds_to_finish == expected - 6 > 0
    assert env.observation_space.contains(env.rows.observations[0])
    while env.view().round < expected - 1:  # rounds = tokens − 1
        assert env.view().rounds_to_finish == expected - 1 - env.view().round
        env.step(0)
    assert (
        env.view().rounds_to_finish == expected_output_tokens(log_median, 0.5, expected) - expected
    )


ROWS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(1, 12),  # output
        st.one_of(st.just(0.0), st.floats(0.0, 50.0)),  # arrival
        st.sampled_from([1, 4, 9]),  # prediction
        st.sampled_from([0.0, 0.3, 1.5]),  # spread
    ),
    min_size=2,
    max_size=25,
)


def make(rows: list[tuple[int, int, float, int, float]]) -> Requests:
    prompts, outputs, arrivals, predictions, spreads = zip(*rows, strict=True)
    return make_requests(prompts, outputs, arrivals, predictions, spreads)


@given(ROWS, st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_expectations_are_kept_in_order(
    rows: list[tuple[int, int, float, int, float]], clients: int, every_round: bool, seed: int
) -> None:
    requests = make(rows)
    env = make_env(clients, lengths="predicted", decisions="rounds" if every_round else "events")
    start(env, requests)
    rng = np.random.default_rng(seed)
    over = False
    while not over:
        check_expectations(env, requests)
        over = env.step(random_legal_action(env, rng))[2]
    check_expectations(env, requests)


def check_expectations(env: ServingEnv, requests: Requests) -> None:
    """The arrays of what is believed agree with each other, and with the truth once it is out."""
    assert env.state is not None
    state, replica = env.state, env.state.replicas[0, 0]
    rows, held = state.requests[0], state.clients[0, 0]
    n, now = int(replica["active"]), int(replica["rounds"])
    expected = state.expected[0, 0, :n]
    running = np.flatnonzero(rows["phase"] == RUNNING)
    assert sorted(expected["request"].tolist()) == running.tolist()
    keys = list(zip(expected["due"].tolist(), expected["request"].tolist(), strict=True))
    assert keys == sorted(keys, reverse=True)
    assert all(due > now for due, _ in keys)
    assert (
        expected["due"].tolist()
        == held["expected_end"][rows["client"][expected["request"]]].tolist()
    )
    assert replica["due_sum"] == expected["due"].sum()
    arrived = rows["phase"] != FUTURE
    assert state.episodes[0]["arrived_rounds"] == rows["expected_rounds"][arrived].sum()
    predicted = requests.predicted_output_tokens - 1
    waiting = rows["phase"] <= WAITING
    assert np.array_equal(rows["expected_rounds"][waiting], predicted[waiting])
    done = rows["phase"] == FINISHED
    assert np.array_equal(rows["expected_rounds"][done], requests.decode_rounds[done])
    truth = state.finishes[0, 0, :n]
    stage = truth["due"] - rows["decode_rounds"][truth["request"]]
    for i, began in zip(truth["request"].tolist(), stage.tolist(), strict=True):
        believed = int(held[rows["client"][i]]["expected_end"])
        assert believed == began + rows["expected_rounds"][i]
        assert believed == began + predicted[i] or predicted[i] <= now - began
    assert env.observation_space.contains(env.rows.observations[0])


@pytest.mark.parametrize("decisions", ["events", "rounds"])
def test_a_perfect_predictor_is_the_same_as_knowing(decisions: str) -> None:
    """To the last bit: every observation, mask and metric, under random actions."""
    task = with_overrides(informed(SMALL, kendall_tau=1.0), {"process": {"decisions": decisions}})
    envs = [ServingEnv(task), ServingEnv(informed(task, output_lengths="known"))]
    rng = np.random.default_rng(0)
    seen = [env.reset(seed=7)[0] for env in envs]
    over, infos = False, [dict[str, Any]()] * 2
    while not over:
        assert seen[0].tobytes() == seen[1].tobytes()
        assert envs[0].view() == envs[1].view()
        action = random_legal_action(envs[0], rng)
        steps = [env.step(action) for env in envs]
        assert steps[0][1:3] == steps[1][1:3]
        seen, over, infos = [step[0] for step in steps], steps[0][2], [step[4] for step in steps]
    assert {name: infos[0][name] for name in METRICS} == {name: infos[1][name] for name in METRICS}


# ---- no leakage -----------------------------------------------------------------------------------


def other_truth(requests: Requests, rng: np.random.Generator, most: int = 1000) -> Requests:
    """The same requests with true lengths permuted behind equal predictions, `most` of each."""
    outputs = requests.output_tokens.copy()
    assert requests.predicted_spread is not None
    keys = np.stack([requests.predicted_output_tokens, requests.predicted_spread])
    for key in np.unique(keys, axis=1).T:
        alike = rng.permutation(np.flatnonzero((key == keys.T).all(axis=1)))[:most]
        outputs[alike] = outputs[rng.permutation(alike)]
    return replace(requests, output_tokens=outputs)


def revealed(env: ServingEnv) -> list[tuple[int, float]]:
    """What completions have told: who has finished, and when."""
    log = env.records()
    return [(int(i), float(log.finished_s[i])) for i in np.flatnonzero(np.isfinite(log.finished_s))]


def imagined_bytes(env: ServingEnv) -> list[bytes]:
    """Everything that the imagined episode holds."""
    state = env.imagine()
    n = int(state.replicas[0, 0]["active"])
    clients = state.clients.shape[2]
    parts: list[NDArray[Any]] = [state.finishes[0, 0, :n], state.idle[0, 0, : clients - n]]
    names = ("episodes", "requests", "by_length", "lengths", "waiting_lengths", "waiting_tree")
    parts += [getattr(state, name) for name in (*names, "replicas", "clients")]
    return [
        np.ascontiguousarray(part[name]).tobytes()
        for part in parts
        for name in part.dtype.names or (...,)
    ]


def in_step(envs: list[ServingEnv]) -> Iterator[list[Situation]]:
    """The situations of two environments side by side, as long as nothing tells them apart."""
    while revealed(envs[0]) == revealed(envs[1]):
        yield [
            Situation(env.view(), env.rows.observations[0], env.action_masks(), env.imagine)
            for env in envs
        ]


def assert_alike(envs: list[ServingEnv], situations: list[Situation]) -> None:
    one, other = situations
    assert one.view == other.view
    assert one.observation.tobytes() == other.observation.tobytes()
    assert one.mask.tolist() == other.mask.tolist()
    assert imagined_bytes(envs[0]) == imagined_bytes(envs[1])


TRIALS = 6
NAMES = [{"threshold": "threshold-2", "rollout": "rollout-2"}.get(name, name) for name in REGISTRY]


@pytest.mark.parametrize("lengths", ["predicted", "unknown"])
@pytest.mark.parametrize("name", NAMES)
def test_no_policy_sees_true_lengths(name: str, lengths: str) -> None:
    """Another truth behind the same predictions: the same actions until a completion tells."""
    policies = [make_policy(name), make_policy(name)]
    task = informed(SMALL, output_lengths=lengths)
    task = policies[0].adapt(task)
    compared = trials = 0
    for seed in range(TRIALS):
        rng = np.random.default_rng([seed, 9])
        requests = sample_requests(task, rng)
        if lengths == "predicted":  # predictions in steps of 150 tokens, so that many are equal
            coarse = requests.predicted_output_tokens // 150 * 150 + 75
            requests = replace(requests, predicted_output_tokens=coarse)
        # A swap of a few is told of late, one of many soon.
        other = other_truth(requests, rng, most=(2, 5, 1000)[seed % 3])
        trials += not np.array_equal(other.output_tokens, requests.output_tokens)
        envs = [ServingEnv(task), ServingEnv(task)]
        for env, policy, truth in zip(envs, policies, (requests, other), strict=True):
            case = replace(make_case(task, seed), requests=truth)
            plan = policy.prepare(brief(task, case, seed))
            env.reset(seed=seed, options={"requests": truth, "plan": plan})
        for situations in in_step(envs):
            assert_alike(envs, situations)
            actions = [
                policy.act(situation)
                for policy, situation in zip(policies, situations, strict=True)
            ]
            assert actions[0] == actions[1]
            compared += 1
            ended = [env.step(action)[2] for env, action in zip(envs, actions, strict=True)]
            if any(ended):
                break
    assert trials >= TRIALS - 2
    assert compared >= 2 * TRIALS


def test_the_leak_test_would_notice() -> None:
    """With known lengths another truth is seen at once."""
    requests = sample_requests(UNKNOWN, np.random.default_rng(0))
    other = other_truth(requests, np.random.default_rng(1))
    half = np.arange(len(requests)) % 2 == 0
    longer = replace(other, output_tokens=np.where(half, 700, 20))
    alike = [ServingEnv(UNKNOWN).reset(options={"requests": r})[0] for r in (requests, longer)]
    assert alike[0].tobytes() == alike[1].tobytes()
    told = [ServingEnv(KNOWN).reset(options={"requests": r})[0] for r in (requests, longer)]
    assert told[0].tobytes() != told[1].tobytes()


@given(ROWS, st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_nothing_leaks_under_any_actions(
    rows: list[tuple[int, int, float, int, float]], clients: int, every_round: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mode = "rounds" if every_round else "events"
    truth = make(rows)
    envs = [make_env(clients, lengths="predicted", decisions=mode) for _ in range(2)]
    for env, requests in zip(envs, (truth, other_truth(truth, rng)), strict=True):
        start(env, requests)
    for situations in in_step(envs):
        assert_alike(envs, situations)
        action = random_legal_action(envs[0], rng)
        ended = [env.step(action)[2] for env in envs]
        if any(ended):
            break


def test_aligned_aims_at_expected_finishes() -> None:
    """Two that run truly finish together, or not; the rule picks the same request."""
    predicted = [3, 20, 20, *range(4, 9), *range(4, 9), 12, 13]
    envs = []
    for together in (9, 12):
        outputs = [2, 9, together, *predicted[3:]]
        rows = [(5, output) for output in outputs]
        env = make_env(3, lengths="predicted", decisions="rounds")
        start(env, instance(*rows, predicted=predicted))
        env.step(1 + env.task.process.rules.index("fcfs"))
        assert env.view().idle == 1
        env.step(1 + env.task.process.rules.index("aligned"))
        envs.append(env)
    admitted = [np.flatnonzero(np.isfinite(env.records().admitted_s)).tolist() for env in envs]
    assert admitted[0] == admitted[1] == [0, 1, 2, len(predicted) - 1]


def test_a_briefing_holds_predictions_only() -> None:
    case = make_case(SMALL, 0)
    told = brief(SMALL, case, 0).requests
    assert told is not None
    assert told.output_tokens.tolist() == case.requests.predicted_output_tokens.tolist()
    known = brief(KNOWN, make_case(KNOWN, 0), 0).requests
    assert known is not None
    assert known.output_tokens.tolist() == case.requests.output_tokens.tolist()


# ---- the whole way ----------------------------------------------------------------------------------


def test_the_task() -> None:
    task = load_task("GSM8KPredicted-v0")
    base = load_task("GSM8K-v0")
    assert informed(task, output_lengths="known") == replace(base, name=task.name)
    assert task.information.kendall_tau == 0.55


@pytest.mark.parametrize("task", [SMALL, UNKNOWN])
@pytest.mark.parametrize("name", ["hybrid", "aligned-lookahead", "aligned"])
def test_compiled_and_object_play_agree(task: TaskConfig, name: str) -> None:
    case = make_case(task, 2)
    row = play(task, name, make_policy(name), case, 2).row
    compiled = play_compiled(task, make_trigger_policy(name), case)
    for metric in METRICS:
        assert metric == "decisions" or row[metric] == compiled[metric]


def test_the_vector_environment_knows_no_more() -> None:
    vector = ServingVectorEnv(2, SMALL)
    alone = [ServingEnv(SMALL) for _ in range(2)]
    first, _ = vector.reset(seed=4)
    seen = [env.reset(seed=4 + e)[0] for e, env in enumerate(alone)]
    assert np.array_equal(first, seen)
    rng = np.random.default_rng(0)
    for _ in range(15):
        actions = [random_legal_action(env, rng) for env in alone]
        together = vector.step(actions)[0]
        assert np.array_equal(
            together, [env.step(action)[0] for env, action in zip(alone, actions, strict=True)]
        )


def test_better_predictions_make_better_schedules() -> None:
    """Mean gap of a rule over ten cases; none, the task's and a perfect predictor."""
    gaps = [
        np.mean(
            [
                play_compiled(
                    (task := informed(SMALL, kendall_tau=tau)),
                    make_trigger_policy("threshold-1"),
                    make_case(task, seed),
                )["gap"]
                for seed in range(10)
            ]
        )
        for tau in (1.0, 0.55, 0.0)
    ]
    assert gaps == sorted(gaps)
    assert expect_alike(sample_requests(KNOWN, np.random.default_rng(0)), np.array([3])).first(1)
