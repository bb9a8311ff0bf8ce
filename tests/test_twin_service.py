"""The twin in service: measured seconds, ends nobody foresaw, cancellations, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.registry import make_policy
from servegym.engines import Twin, Work
from servegym.envs import Plan, Policy, ServegymError, Situation, TaskConfig, load_task
from servegym.envs.playing.policy import Briefing
from servegym.envs.task.config import with_overrides
from servegym.envs.workload.plan import plan_from_queues
from tests.helpers import refused

PREDICTED = {"information": {"output_lengths": "predicted"}}


def task(clients: int = 2, **overrides: Any) -> TaskConfig:
    cluster = {"clients": clients} | overrides.pop("cluster", {})
    return with_overrides(load_task("Tiny-v0"), PREDICTED | {"cluster": cluster} | overrides)


def make_twin(policy: str = "fcfs", clients: int = 2, capacity: int = 20) -> Twin:
    return Twin(task(clients), make_policy(policy), capacity=capacity)


def run(twin: Twin, *finished: int, seconds: float | None = 1.0) -> Work | None:
    """One iteration: the next work, which ends these requests."""
    work = twin.work()
    if work is not None:
        twin.ran(finished, seconds)
    return work


def test_measured_seconds_by_hand() -> None:
    twin = make_twin()
    twin.submit(5, 4, now_s=0.0)
    assert run(twin, seconds=2.0) == ("prefill", (0,))  # 0 … 2 s
    assert run(twin, seconds=0.5) == ("decode", (0,))  # … 2.5 s
    assert twin.work() == ("decode", (0,))
    assert twin.submit(7, 3, now_s=2.75) == 1  # while the engine runs
    twin.ran(seconds=1.0)  # … 3.5 s
    assert twin.clock_s == 3.5
    assert run(twin, seconds=2.0) == ("prefill", (1,))  # … 5.5 s; 0 stalls
    assert run(twin, 0, seconds=0.25) == ("decode", (0, 1))  # … 5.75 s
    assert twin.work(now_s=6.0) == ("decode", (1,))  # the engine was busy elsewhere for 0.25 s
    twin.ran([1], seconds=0.5)
    assert twin.work(now_s=9.0) is None
    log = twin.records()
    assert log.admitted_s.tolist() == [0.0, 3.5]
    assert log.first_token_s.tolist() == [2.0, 5.5]
    assert log.finished_s.tolist() == [5.75, 6.5]
    assert log.decode_rounds.tolist() == [3, 2]
    assert twin.submit(5, 2, now_s=10.0) == 2  # later somebody comes
    assert twin.work() is None  # not yet
    assert twin.work(now_s=10.5) == ("prefill", (2,))
    assert twin.clock_s == 10.5


def test_time_between_two_rounds_of_a_run_counts() -> None:
    twin = make_twin()
    twin.submit(5, 4, now_s=0.0)
    run(twin, seconds=1.0)
    run(twin, seconds=1.0)
    assert twin.work(now_s=5.0) == ("decode", (0,))
    assert twin.clock_s == 5.0
    twin.ran([0], seconds=1.0)
    twin.work()
    assert twin.records().finished_s.tolist() == [6.0]


def test_worst_gaps_are_the_measured_ones() -> None:
    config = task(workload={"arrival_rate_per_s": 1.0})  # gaps are noted where requests arrive
    twin = Twin(config, make_policy("fcfs"))
    twin.submit(5, 9, now_s=0.0)
    for seconds in (1.0, 0.25, 2.5, 0.5):
        run(twin, seconds=seconds)
    run(twin, 0, seconds=0.125)
    twin.work()
    assert twin.records().worst_gap_s.tolist() == [2.5]


def test_who_has_all_its_tokens_has_finished_told_or_not() -> None:
    twin = make_twin()
    twin.submit(5, 9, most_tokens=3)
    twin.submit(5, 9, most_tokens=1)
    assert [run(twin), run(twin), run(twin), run(twin)] == [
        ("prefill", (0, 1)),
        ("decode", (0,)),
        ("decode", (0,)),
        None,
    ]
    assert twin.records().decode_rounds.tolist() == [2, 0]


def test_who_outlives_its_prediction_is_expected_later() -> None:
    twin = make_twin("hybrid")
    twin.submit(5, 2, spread=0.5)
    for _ in range(6):
        assert run(twin) is not None
    twin.submit(5, 2, spread=0.5, now_s=twin.clock_s)
    twin.cancel(1)  # ends the run, so that beliefs are revised
    assert twin.situation().view.rounds_to_finish > 0
    run(twin, 0)
    assert run(twin) is None
    assert twin.records().decode_rounds.tolist() == [6, -1]


@pytest.mark.parametrize("most", [4, 8, 1_000_000])
def test_an_iteration_with_cancellations_at_every_place(most: int) -> None:
    twin = make_twin()
    for _ in range(5):
        twin.submit(5, 4, most_tokens=most)
    twin.cancel(4)  # before anything
    assert run(twin) == ("prefill", (0, 1))
    twin.cancel(0)  # its prefill has just ended
    twin.cancel(2)  # it waits
    twin.cancel(2)  # twice is as good as once
    assert run(twin) == ("prefill", (3,))
    assert run(twin) == ("decode", (1, 3))
    twin.cancel(1)  # it decodes
    assert run(twin) == ("decode", (3,))
    twin.cancel(1)  # it has gone already
    twin.submit(5, 4, now_s=100.0)
    twin.cancel(5)  # it is still to come
    assert run(twin, 3) == ("decode", (3,))
    assert twin.work() is None
    assert twin.work(now_s=200.0) is None
    log = twin.records()
    assert log.decode_rounds.tolist() == [0, 1, -1, 3, -1, -1]
    assert np.isfinite(log.finished_s).tolist() == [True, True, False, True, False, False]
    assert np.isnan(log.admitted_s).tolist() == [False, False, True, False, True, True]


def test_who_has_been_told_finished_is_not_ended_again() -> None:
    twin = make_twin()
    twin.submit(5, 4)
    run(twin)
    run(twin, 0)
    twin.cancel(0)
    assert twin.work() is None
    assert twin.records().decode_rounds.tolist() == [1]


def test_a_policy_that_fails_can_be_asked_again() -> None:
    class Fails(Policy):
        calls = 0

        def act(self, situation: Situation) -> int:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("not today")
            return int(situation.mask.argmax())

    twin = Twin(task(clients=2), Fails())
    twin.submit(5, 4)
    with pytest.raises(RuntimeError, match="not today"):
        twin.work()
    assert twin.work() is not None
    twin.ran()
    twin.submit(5, 4, now_s=twin.clock_s)
    twin.policy.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="not today"):
        twin.work()
    twin.cancel(0)  # it decodes, and no stage is under way
    assert twin.work() == ("prefill", (1,))


def test_a_situation_is_a_look() -> None:
    twin, other = make_twin("aligned"), make_twin("aligned")
    for each in (twin, other):
        for length in (3, 4, 9, 2):
            each.submit(5, length, 0.4)
    for step in range(30):
        twin.situation()
        twin.records()
        work = twin.work()
        assert twin.situation().imagine().episodes[0].lengths_known == 1
        assert work == other.work()
        if work is None:
            break
        finished = list(work.ids[:1]) if step % 3 == 2 else []
        twin.ran(finished)
        other.ran(finished)
    assert work is None
    assert twin.records().finished_s.tolist() == other.records().finished_s.tolist()


def test_a_situation_shows_the_rounds_of_an_open_run() -> None:
    twin = make_twin()
    twin.submit(5, 9)
    for _ in range(4):
        run(twin)
    view = twin.situation().view
    assert (view.round, view.active, view.clock_s) == (3, 1, 4.0)
    assert twin.situation().mask.tolist()[0] is True


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_happens_everybody_is_served_or_gone(data: st.DataObject) -> None:
    """Requests come, end and go at any time: all are accounted for, and nothing is left behind."""
    clients = data.draw(st.integers(1, 3))
    policy = data.draw(
        st.sampled_from(["fcfs", "aligned", "hybrid", "quantile", "random", "static"])
    )
    twin = make_twin(policy, clients)
    tokens: dict[int, int] = {}
    gone: set[int] = set()
    length = st.integers(1, 9)
    for step in range(60):
        happening = data.draw(st.integers(0, 4)) if step < 30 else 5
        if happening == 0 and len(tokens) < 20:
            late = data.draw(st.sampled_from([None, 0.0, twin.clock_s + 1.5]))
            i = twin.submit(data.draw(length), data.draw(length), 0.5, data.draw(length) + 3, late)
            tokens[i] = 0
        elif happening == 1 and tokens:
            i = data.draw(st.sampled_from(sorted(tokens)))
            twin.cancel(i)
            gone.add(i)
        work = twin.work(now_s=1e6 + step if step > 30 else None)
        if work is None:
            continue
        assert 0 < len(work.ids) <= clients
        assert not gone & set(work.ids)
        for i in work.ids:
            assert (tokens[i] == 0) == (work.kind == "prefill")
            tokens[i] += 1
        ended = set(data.draw(st.sets(st.sampled_from(work.ids)))) if step < 40 else set(work.ids)
        twin.ran(ended, data.draw(st.sampled_from([None, 0.0, 0.75])))
        gone |= ended
    assert twin.work() is None
    log = twin.records()
    assert (log.decode_rounds + 1).tolist() == list(tokens.values())
    served = np.array(list(tokens.values())) > 0
    assert (np.isfinite(log.finished_s) == served).all()
    assert (log.first_token_s[served] <= log.finished_s[served]).all()
    view = twin.situation().view
    assert (view.active, view.idle, view.waiting) == (0, clients, 0)
    assert view.finished == view.arrived == len(tokens)
    replica, queue = twin._state.replicas[0, 0], twin._state.queues[0, 0]
    assert replica["cached_tokens"] == replica["due_sum"] == 0
    assert queue["rounds"] == queue["tokens"] == queue["squares_low"] == 0
    assert twin._state.episodes[0]["in_system"] == 0
    assert twin._state.clients["queue_rounds"].sum() == 0
    assert twin._state.waiting_tree.sum() == 0


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "prompt_tokens must lie in 1 … 10000000, got 0"),
        ((5, 1.5), "expected_output_tokens must be a whole number, got 1.5"),
        ((5, 5, -1.0), "spread must lie in 0 … 5, got -1"),
        ((5, 5, float("nan")), "spread must lie in 0 … 5, got nan"),
        ((5, 5, 0.1, 0), "most_tokens must lie in 1 … 10000000, got 0"),
        ((5, 5, 0.1, 9, "soon"), "now_s must be a number, got 'soon'"),
        ((5, 5, 0.1, 9, float("inf")), "now_s must lie in 0 … 1e+09, got inf"),
    ],
)
def test_a_bad_request_is_refused_and_changes_nothing(
    arguments: tuple[Any, ...], message: str
) -> None:
    twin = make_twin()
    with pytest.raises(ServegymError) as caught:
        twin.submit(*arguments)
    assert str(caught.value) == message
    numbers: list[Any] = [np.int64(5), np.int32(5), np.float32(0.5), 9, 1]
    assert twin.submit(*numbers) == 0  # the legal twin


def test_an_uncertain_length_is_refused_where_lengths_are_known() -> None:
    twin = Twin(load_task("Tiny-v0"), make_policy("fcfs"))
    with pytest.raises(ServegymError, match=r"spread must be 0, got 0.5: lengths are known in"):
        twin.submit(5, 5, 0.5)
    assert twin.submit(5, 5, 0) == 0


def test_a_full_twin_says_so() -> None:
    twin = make_twin(capacity=1)
    twin.submit(5, 5)
    with pytest.raises(ServegymError, match=r"the twin holds 1 requests, which is its capacity; "):
        twin.submit(5, 5)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"replicas": 2}, "a twin has one replica, servegym/Tiny-v0 has 2"),
        ({"kv_capacity_tokens": 5000}, "a twin has no limit of KV memory"),
        ({"chunk_tokens": 64}, "a twin has no mixed stages; set cluster.chunk_tokens to 0"),
        ({"shed_at": 1.0}, "a twin turns nobody away .* set cluster.shed_at to 0"),
    ],
)
def test_a_task_that_has_more_is_refused(cluster: dict[str, float], message: str) -> None:
    with pytest.raises(ServegymError, match=message) as caught:
        Twin(task(cluster=cluster), make_policy("fcfs"))
    assert "\n" not in str(caught.value)


def test_limits_of_classes_are_refused() -> None:
    """Nobody says what class a request is of: the limits would count for nothing."""
    refused(
        lambda: Twin(task(slo={"classes": [{"name": "chat"}]}), make_policy("edf")), "slo.classes"
    )
    Twin(task(slo={"ttft_s": 1.0}), make_policy("edf"))


def test_a_policy_of_mixed_stages_is_refused() -> None:
    with pytest.raises(ServegymError, match="this policy needs mixed stages"):
        Twin(task(), make_policy("vllm"))


@pytest.mark.parametrize(("capacity", "seed"), [(0, 0), (True, 0), (5, -1)])
def test_numbers_of_a_twin_are_checked(capacity: int, seed: int) -> None:
    with pytest.raises(ServegymError, match=r"must (lie|be)"):
        Twin(task(), make_policy("fcfs"), capacity=capacity, seed=seed)


def test_calls_out_of_turn_are_refused() -> None:
    twin = make_twin()
    with pytest.raises(ServegymError, match="no iteration is under way; call work"):
        twin.ran()
    with pytest.raises(ServegymError, match="nobody has been submitted, so 0 cannot be cancelled"):
        twin.cancel(0)
    twin.submit(5, 5)
    with pytest.raises(ServegymError, match=r"request must lie in 0 … 0, got 1"):
        twin.cancel(1)
    twin.work()
    with pytest.raises(ServegymError, match=r"an iteration is under way; call ran\(\) before work"):
        twin.work()
    with pytest.raises(ServegymError, match=r"an iteration is under way; call ran\(\) before can"):
        twin.cancel(0)
    with pytest.raises(ServegymError, match="finished names 1, which this prefill does not serve"):
        twin.ran([0, 1])
    with pytest.raises(ServegymError, match="finished must be a list of requests, got 0"):
        twin.ran(0)  # type: ignore[arg-type]
    with pytest.raises(ServegymError, match="seconds must lie in 0"):
        twin.ran([0], seconds=-1.0)
    twin.ran([0], seconds=0)  # what was refused has changed nothing
    assert twin.work() is None


class Says(Policy):
    """A policy that answers what it is given."""

    def __init__(self, action: Any, plan: Any = None) -> None:
        self.action, self.plan = action, plan

    def prepare(self, briefing: Briefing) -> Plan | None:
        return self.plan

    def act(self, situation: Situation) -> int:
        return self.action


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Says(0), "the policy chose illegal action 0; legal are 1, 2"),
        (Says(99), "the policy's action must lie in 0 … 6, got 99"),
        (Says(None), "the policy's action must be a whole number, got None"),
        (Says(1, [0]), r"the policy's plan must be a Plan or None, got \[0\]"),
        (Says(1, plan_from_queues([[0], [7]])), "the plan names requests outside 0 … 0"),
        (Says(1, plan_from_queues([[0]])), "the plan is for 1 clients, the task has 2"),
    ],
)
def test_what_a_policy_must_not_say_is_refused(policy: Policy, message: str) -> None:
    twin = Twin(task(), policy)
    twin.submit(5, 5)
    with pytest.raises(ServegymError, match=message):
        twin.work()
