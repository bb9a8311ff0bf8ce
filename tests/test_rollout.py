"""Rollout: imagined episodes, the values of actions, the policy and its name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import numba
import numpy as np
import pytest

from servegym.baselines.expert import make_rollout_expert, make_rule_expert
from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import Requests, ServingEnv
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import brief, make_case, play
from servegym.envs.playing.policy import Briefing, Policy, Situation
from servegym.envs.process.metrics import METRICS
from servegym.envs.simulator.state import RUNNING, WAITING, State, row_arrays
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import instance, make_env, start

TINY = TASKS["servegym/Tiny-v0"]
SMALL = with_overrides(
    TASKS["servegym/GSM8K-v0"], {"cluster": {"clients": 8}, "workload": {"requests": 40}}
)
ROUNDS = {"process": {"decisions": "rounds"}}
MIXING = with_overrides(TINY, {"cluster": {"chunk_tokens": 16}, "workload": {"requests": 14}})
"""Mixed stages may leave a prompt half computed."""

ROWS = [(5, 2 + 3 * k % 11) for k in range(12)]
MANY = instance(*ROWS)
"""Twelve requests of 1 to 11 tokens after the first, all present."""

PREDICTED = instance(*ROWS, predicted=[3 + k % 4 for k in range(12)])
"""The same; some of those that run have outlived their prediction when the first finishes."""


def middle(requests: Requests, lengths: Literal["known", "predicted"] = "known") -> ServingEnv:
    """An environment at its second decision point: of three clients one has finished."""
    env = make_env(3, lengths=lengths)
    start(env, requests)
    env.step(1 + env.task.process.rules.index("fcfs"))
    assert env.view().active == 2
    assert env.view().waiting > 1
    return env


def content(state: State) -> dict[str, Any]:
    """Everything that an imagined episode holds, by name."""
    active = int(state.replicas[0, 0]["active"])
    idle = int(state.replicas[0, 0]["idle"])
    arrays = row_arrays(state) | {
        "finishes": state.finishes[0, 0, :active],
        "expected": state.expected[0, 0, :active],
        "idle": state.idle[0, 0, :idle],
    }
    del arrays["times"]  # records of the past, not copied
    named: dict[str, Any] = {}
    for name, array in arrays.items():
        for part in array.dtype.names or ("",):
            named[f"{name} {part}"] = np.array(array[part] if part else array)
    return named


def assert_same(first: dict[str, Any], second: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if name not in but:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def state_of(env: ServingEnv) -> State:
    assert env.state is not None
    return env.state


def test_with_known_lengths_the_imagined_episode_is_the_real_one() -> None:
    env = middle(MANY)
    secrets = ("bound_s", "round_credit_s", "prompt_credit_s", "reported_loss", "random_bits")
    hidden = tuple(f"episodes {name}" for name in secrets)
    scratch = ("picked ", "keys ")
    imagined = content(env.imagine())
    assert_same(imagined, content(state_of(env)), but=(*hidden, *scratch))
    assert all(imagined[name] == 0 for name in hidden)


def test_the_imagined_episode_holds_no_true_length() -> None:
    env = middle(PREDICTED, "predicted")
    before = deepcopy(content(env.imagine()))
    state = state_of(env)
    rows = state.requests[0]
    waiting = np.flatnonzero(rows["phase"] == WAITING)
    running = np.flatnonzero(rows["phase"] == RUNNING)
    assert len(running) > 1
    # Another truth behind the same expectations: waiting lengths in another order, running ones
    # longer, by different amounts, so that they finish in another order, too.
    rows["decode_rounds"][waiting] = rows["decode_rounds"][waiting][::-1]
    replica = state.replicas[0, 0]
    finishes = state.finishes[0, 0, : replica["active"]]
    later = 100 * np.arange(1, len(running) + 1)
    rows["decode_rounds"][finishes["request"]] += later
    finishes["due"] += later
    finishes[:] = finishes[::-1].copy()
    state.episodes[0]["bound_s"] *= 2
    assert_same(before, content(env.imagine()))


def test_in_imagination_requests_finish_when_they_should() -> None:
    env = middle(PREDICTED, "predicted")
    state, imagined = state_of(env), env.imagine()
    active = env.view().active
    expected = state.expected[0, 0, :active]
    assert expected.tolist() == imagined.finishes[0, 0, :active].tolist()
    assert expected.tolist() != state.finishes[0, 0, :active].tolist()
    order = expected["request"]
    admitted = state.finishes[0, 0, :active]["due"].copy()  # decode clock of each one's stage
    truth = state.finishes[0, 0, :active]["request"]
    admitted -= state.requests[0]["decode_rounds"][truth]
    stage = dict(zip(truth.tolist(), admitted.tolist(), strict=True))
    lengths = imagined.requests[0]["decode_rounds"]
    assert [stage[i] + lengths[i] for i in order.tolist()] == expected["due"].tolist()


@pytest.mark.parametrize("lengths", ["predicted", "unknown"])
def test_an_imagined_episode_plays_to_its_end(lengths: str) -> None:
    """Under every rule's stages: nothing of the truth is left that could stall or end it early."""
    task = with_overrides(SMALL, {"information": {"output_lengths": lengths}})
    episode = play(task, "rollout", make_policy("rollout-2"), make_case(task, 3), 3)
    assert np.isfinite(episode.records.finished_s).all()


def test_what_has_not_arrived_is_not_imagined() -> None:
    present = [(5, 4), (5, 9), (5, 3), (5, 6), (5, 7)]
    futures = [[(5, 2, 50.0), (5, 30, 60.0)], [(90, 5, 70.0), (7, 8, 71.0)]]
    imagined = []
    for future in futures:
        env = middle(instance(*present, *future))
        imagined.append(deepcopy(content(env.imagine())))
    assert_same(imagined[0], imagined[1])
    assert imagined[0]["episodes requests"] == 5


def slow_value(env: ServingEnv, action: int, base: Policy) -> float:
    """Minus the gap in percent if `action` is taken and the policy object plays on, in a copy."""
    env = deepcopy(env)
    observation, _, ended, _, info = env.step(action)
    while not ended:
        situation = Situation(env.view(), observation, env.action_masks())
        observation, _, ended, _, info = env.step(base.act(situation))
    return -100 * float(info["gap"])


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("aligned-lookahead-0.7", TINY),
        ("threshold-2", TINY),
        ("hybrid", TINY),
        ("static", with_overrides(TINY, ROUNDS)),
        ("aligned", with_overrides(SMALL, ROUNDS)),
        ("lookahead", with_overrides(SMALL, {"process": {"rules": ["longest", "fcfs"]}})),
        ("vllm", MIXING),
    ],
)
def test_values_are_those_of_branches_in_the_real_environment(name: str, task: TaskConfig) -> None:
    rows = 2
    together = ServingVectorEnv(rows, task)
    together.reset(seed=5)
    alone = [ServingEnv(task) for _ in range(rows)]
    for e, env in enumerate(alone):
        env.reset(seed=5 + e)
    base = make_trigger_policy(name)
    base.prepare(brief(task, make_case(task, 0), 0))
    expert = make_rollout_expert(name, task)
    rng = np.random.default_rng(0)
    for step in range(12):
        values = expert(together)
        assert values.shape == together.rows.masks.shape
        for e, env in enumerate(alone):
            mask = env.action_masks()
            assert np.all(np.isneginf(values[e, ~mask]))
            if step % 4:
                continue
            for action in np.flatnonzero(mask):
                slow = slow_value(env, int(action), base)
                assert values[e, action] == pytest.approx(slow, rel=1e-9, abs=1e-9)
        actions = [int(rng.choice(np.flatnonzero(env.action_masks()))) for env in alone]
        ended = [env.step(action)[2] for env, action in zip(alone, actions, strict=True)]
        if any(ended):
            break
        together.step(actions)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread only")
def test_values_do_not_depend_on_threads() -> None:
    env = ServingVectorEnv(5, TINY)
    env.reset(seed=0)
    serial, parallel = (make_rollout_expert("lpt", TINY, threads)(env) for threads in (1, 2))
    np.testing.assert_array_equal(serial, parallel)


def test_the_expert_leaves_the_environment_as_it_was() -> None:
    env = ServingVectorEnv(2, TINY)
    env.reset(seed=0)
    before = deepcopy(env.state)
    make_rollout_expert("hybrid", TINY)(env)
    for name, array in row_arrays(before).items():  # field by field: padding is not copied
        for part in array.dtype.names or (...,):
            np.testing.assert_array_equal(array[part], getattr(env.state, name)[part], name)


def test_an_episode_without_a_choice_has_a_value() -> None:
    task = with_overrides(TINY, {"cluster": {"clients": 1}, "process": {"rules": ["fcfs"]}})
    env = ServingVectorEnv(1, task)
    env.reset(seed=0)
    value, illegal = make_rollout_expert("fcfs", task)(env)[0]
    gap = play_compiled(task, make_trigger_policy("fcfs"), make_case(task, 0))["gap"]
    assert value == pytest.approx(-100 * gap)
    assert illegal == -np.inf


def test_the_expert_refuses_what_does_not_fit() -> None:
    with pytest.raises(ServegymError, match="did you mean 'aligned'"):
        make_rollout_expert("alined", TINY)
    with pytest.raises(ServegymError, match="threads must lie"):
        make_rollout_expert("aligned", TINY, threads=0)
    task = with_overrides(TINY, {"process": {"rules": ["fcfs"]}})
    with pytest.raises(ServegymError, match="leaves out"):
        make_rollout_expert("aligned", task)
    with pytest.raises(ServegymError, match="another task"):
        make_rollout_expert("fcfs", task)(ServingVectorEnv(1, TINY))
    with pytest.raises(ServegymError, match="as it is; for edf give servegym/Tiny-v0"):
        make_rollout_expert("edf", TINY)
    make_rollout_expert("edf", with_overrides(TINY, {"cluster": {"shortest_by": "deadline"}}))


@pytest.mark.parametrize("name", ["aligned-lookahead-0.7", "aligned", "fcfs", "hybrid", "static"])
@pytest.mark.parametrize("variations", [0, 4])
def test_a_rollout_never_ends_later_than_its_base(name: str, variations: int) -> None:
    better = 0
    for seed in range(8):
        case = make_case(TINY, seed)
        base = make_trigger_policy(name)
        rollout = RolloutPolicy(make_trigger_policy(name), variations)
        ours, theirs = (
            play(TINY, "policy", policy, case, seed).row["makespan_s"] for policy in (rollout, base)
        )
        assert ours <= theirs * (1 + 1e-12)
        better += ours < theirs * (1 - 1e-6)
    if name == "fcfs":
        assert better >= 4


@pytest.mark.parametrize("seed", range(4))
def test_a_rollout_admits_in_mixed_stages_as_its_base(seed: int) -> None:
    """It tries decoding and prefill stages instead of them."""
    case = make_case(MIXING, seed)
    base = play(MIXING, "base", make_policy("vllm"), case, seed).row
    ours = play(MIXING, "ours", make_policy("rollout:vllm"), case, seed).row
    assert ours["makespan_s"] <= base["makespan_s"] * (1 + 1e-9)
    assert ours["mixed_stages"] > 0


def test_a_base_of_prefill_stages_goes_on_with_a_half_computed_prompt() -> None:
    """Where an action that is valued mixes, nobody but a mixed stage can end the prompt."""
    env = ServingVectorEnv(2, MIXING)
    env.reset(seed=0)
    expert, mixed = make_rollout_expert("fcfs", MIXING), MIXING.actions.index("mixed:fcfs")
    begun = False
    for _ in range(6):
        values, masks = expert(env), env.action_masks()
        assert np.isfinite(values[masks]).all()
        env.step(np.where(masks[:, mixed], mixed, 0))
        begun |= bool((env.state.replicas["partial"] >= 0).any())
    assert begun


def test_variations_improve_on_first_actions() -> None:
    gaps = {}
    for name in ("aligned-lookahead-0.7", "rollout-0", "rollout-6"):
        rows = [play(SMALL, name, make_policy(name), make_case(SMALL, s), s).row for s in range(4)]
        gaps[name] = np.mean([row["gap"] for row in rows])
    assert gaps["rollout-6"] < gaps["rollout-0"] < gaps["aligned-lookahead-0.7"]


def test_the_same_seed_gives_the_same_episode_and_objects_can_be_used_again() -> None:
    policy = make_policy("rollout-2")
    case = make_case(SMALL, 1)
    first = play(SMALL, "rollout-2", policy, case, 1)
    play(TINY, "rollout-2", policy, make_case(TINY, 0), 0)
    again = play(SMALL, "rollout-2", policy, case, 1)
    assert {metric: first.row[metric] for metric in METRICS} == {
        metric: again.row[metric] for metric in METRICS
    }


def test_arrivals_over_time_can_be_played() -> None:
    task = with_overrides(SMALL, {"workload": {"arrival_rate_per_s": 2.0}})
    row = play(task, "rollout-2", make_policy("rollout-2"), make_case(task, 0), 0).row
    assert row["requests"] == 40


def test_without_time_the_base_policy_plays() -> None:
    """`play` refuses an illegal action, so these are all legal."""
    for seed in range(4):
        case = make_case(SMALL, seed)
        rollout = RolloutPolicy(make_trigger_policy("lookahead"), 4, budget_s=0.0)
        ours = play(SMALL, "rollout", rollout, case, seed).row
        theirs = play(SMALL, "lookahead", make_policy("lookahead"), case, seed).row
        assert ours["makespan_s"] == theirs["makespan_s"]


def test_a_time_budget_ends_the_search() -> None:
    rollout = RolloutPolicy(make_trigger_policy("fcfs"), variations=10**9, budget_s=0.002)
    row = play(TINY, "rollout", rollout, make_case(TINY, 0), 0).row
    base = play(TINY, "fcfs", make_policy("fcfs"), make_case(TINY, 0), 0).row
    assert row["makespan_s"] <= base["makespan_s"]
    assert row["decision_ms_p50"] < 100  # a shared machine may lose time between two trials


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rolout", "did you mean 'rollout'"),
        ("rollout:alined", "did you mean 'aligned'"),
        ("rollout:", "'rollout:' needs a policy after the colon"),
        ("rollout:random", "'random' has no trigger"),
        ("rollout:rollout", "'rollout' has no trigger"),
        ("rollout:threshold", "needs a whole K"),
        ("rollout-2.5", "N must be a whole number"),
        ("rollout-1000001", "N must be a whole number"),
        ("lookahead:fcfs", "unknown policy"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        make_policy(name)


@pytest.mark.parametrize(
    ("name", "variations", "base"),
    [
        ("rollout", 6, "aligned-lookahead-0.7"),
        ("rollout-0", 0, "aligned-lookahead-0.7"),
        ("rollout:aligned", 6, "aligned"),
        ("rollout-12:threshold-4", 12, "threshold-4"),
    ],
)
def test_good_names_say_what_is_tried(name: str, variations: int, base: str) -> None:
    assert make_policy(name) == RolloutPolicy(make_trigger_policy(base), variations)


def test_a_rollout_needs_its_briefing_and_a_model() -> None:
    policy = make_policy("rollout")
    env = make_env(3)
    observation, _ = start(env, MANY)
    situation = Situation(env.view(), observation, env.action_masks())
    with pytest.raises(ServegymError, match="prepare"):
        policy.act(situation)
    policy.prepare(Briefing(env.task, MANY, np.random.default_rng(0)))
    with pytest.raises(ServegymError, match="no model of the future"):
        policy.act(situation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variations": -1}, "variations must be ≥ 0"),
        ({"budget_s": -0.5}, "budget must be ≥ 0"),
        ({"budget_s": np.nan}, "budget must be ≥ 0"),
        ({"rules": ("longst",)}, "did you mean 'longest'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        RolloutPolicy(make_trigger_policy("fcfs"), **settings)


@pytest.mark.parametrize("name", ["threshold-2", "lagrangian"])
def test_the_rule_as_an_expert_likes_what_the_rule_does(name: str) -> None:
    """Played by its values every row ends as under the rule, to the last bit."""
    env = ServingVectorEnv(3, TINY)
    env.reset(seed=0)
    expert = make_rule_expert(name, TINY)
    gaps: dict[int, float] = {}
    while len(gaps) < 3:
        values = expert(env)
        assert np.array_equal(np.isfinite(values), env.action_masks())
        assert set(values[np.isfinite(values)].tolist()) <= {0.0, -1.0}
        assert ((values == 0).sum(axis=1) == 1).all()
        _, _, terminated, _, info = env.step(values.argmax(axis=1))
        for e in np.flatnonzero(terminated).tolist():
            gaps.setdefault(e, float(info["final_info"]["gap"][e]))
    policy = make_trigger_policy(name)
    for seed, gap in gaps.items():
        assert gap == play_compiled(TINY, policy, make_case(TINY, seed))["gap"]


@pytest.mark.parametrize("name", ["hybrid", "aligned", "quantile"])
def test_rules_that_want_more_than_the_task_are_no_experts(name: str) -> None:
    with pytest.raises(ServegymError, match="cannot be imitated"):
        make_rule_expert(name, TINY)
    make_rule_expert("aligned-lookahead", TINY)
