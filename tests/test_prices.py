"""Prices of memory and of missed limits in the Lagrangian rule: by hand, and counted round by round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import TASKS, ServingEnv, make_requests
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.process.metrics import METRICS
from servegym.envs.simulator.outlook import Outlook
from tests.helpers import UNIT_COSTS, changed
from tests.test_policies import VIEW

TINY = replace(TASKS["servegym/Tiny-v0"], cost=UNIT_COSTS)  # a stage of 2 s, rounds of 1 s

# C_d = 3 + 4, C_p = 8 as VIEW says; C_m = (8 + 2) · 0.5.
AHEAD = Outlook(admitted=2, overflow_tokens=9, recompute_s=0.5, saved=2, lost=1)


@pytest.mark.parametrize(
    ("memory", "slo", "last_that_fires"),
    [
        (0.0, 0.0, 7 / 8),  # as without prices
        (1.0, 0.0, (7 - 5) / 8),
        (0.25, 0.0, (7 - 1.25) / 8),
        (0.0, 3.0, (7 + 2 * 3 - 3) / 8),
        (1.0, 3.0, (7 + 2 * 3 - 5 - 3) / 8),
    ],
)
def test_prices_move_the_balance(memory: float, slo: float, last_that_fires: float) -> None:
    assert triggers.priced(last_that_fires, memory, slo, VIEW, AHEAD)
    assert not triggers.priced(last_that_fires + 1e-9, memory, slo, VIEW, AHEAD)


@pytest.mark.parametrize("name", ["lpt", "hybrid"])
def test_without_prices_nothing_changes(name: str) -> None:
    case = make_case(TINY, seed=3)
    plain = play_compiled(TINY, make_trigger_policy(name), case)
    zero = play_compiled(TINY, make_trigger_policy(f"{name}(memory=0, slo=0)"), case)
    np.testing.assert_equal(plain, zero)


def test_both_ways_to_play_agree_on_prices() -> None:
    cluster = {"clients": 6, "kv_capacity_tokens": 60}
    task = changed(TINY, cluster=cluster, slo={"ttft_s": 9.0, "tpot_s": 1.5})
    policy, case = make_trigger_policy("lagrangian(memory=2, slo=5)"), make_case(task, seed=1)
    row = play(task, "lagrangian", make_policy("lagrangian(memory=2, slo=5)"), case, seed=1).row
    compiled = play_compiled(task, policy, case)
    names = [name for name in METRICS if name != "decisions"]
    np.testing.assert_equal({k: row[k] for k in names}, {k: compiled[k] for k in names})


def overflow(env: ServingEnv, admitted: int, memory: int) -> int:
    """Count it round by round: each of the running and the admitted holds a token more a round."""
    state = env.state
    assert state is not None
    queue, clock = state.queues[0, 0], int(state.replicas[0, 0].rounds)
    running = []  # (tokens now, rounds left)
    for place in range(int(state.replicas[0, 0].active)):
        finish = state.expected[0, 0, place]
        left = int(finish.due) - clock
        request = state.requests[0, finish.request]
        running.append((int(request.prompt_tokens) + int(request.expected_rounds) - left, left))
    mean = int(queue.tokens // queue.waiting), int(queue.rounds // queue.waiting)
    beyond = []
    for group in (running, running + [mean] * admitted):
        ends = range(max(left for _, left in group) + 1)
        most = max(sum(held + t for held, left in group if left >= t) for t in ends)
        beyond.append(max(most - memory, 0))
    return beyond[1] - beyond[0]


@pytest.mark.parametrize("seed", range(8))
def test_the_overflow_is_that_of_a_count(seed: int) -> None:
    rng = np.random.default_rng([51, seed])
    rows = rng.integers(1, 9, 20), rng.integers(2, 20, 20)
    task = changed(TINY, cluster={"clients": 5, "kv_capacity_tokens": 40})
    env = ServingEnv(task)
    env.reset(options={"requests": make_requests(*rows)})
    over, seen = False, 0
    while not over:
        view, ahead = env.view(), env.outlook()
        if view.active > 0 and view.idle > 0:
            assert ahead.overflow_tokens == overflow(env, ahead.admitted, 40)
            assert (ahead.recompute_s > 0) == (ahead.overflow_tokens > 0)
            seen += ahead.overflow_tokens > 0
        legal = np.flatnonzero(env.action_masks())
        _, _, terminated, truncated, _ = env.step(rng.choice(legal))
        over = terminated or truncated
    assert seen > 0


def test_who_is_saved_and_who_is_lost_by_hand() -> None:
    """At 4 s one decodes since 2 s with 6 rounds left of 8, and one that came at 3 s waits."""
    rows = [(5, 9, 0.0), (5, 9, 3.0)]
    found = []
    for ttft_s, tpot_s in [(4.0, 1.25), (4.0, 1.24), (2.99, 9.0), (8.99, 0.99), (9.0, None)]:
        task = changed(TINY, cluster={"clients": 2}, slo={"ttft_s": ttft_s, "tpot_s": tpot_s})
        env = ServingEnv(changed(task, process={"decisions": "rounds"}))
        columns = (np.array(column) for column in zip(*rows, strict=True))
        env.reset(options={"requests": make_requests(*columns)})
        while env.view().clock_s < 3.0:
            env.step(int(np.flatnonzero(env.action_masks())[-1]))
        view, ahead = env.view(), env.outlook()
        assert (view.clock_s, view.seconds_to_finish, view.prefill_s) == (3.0, 7.0, 2.0)
        found.append((ahead.saved, ahead.lost))
    # A first token in 2 s now, in 9 s at the next chance; the running one needs 8 s, with a stage 10 s.
    assert found == [(1, 0), (1, 1), (1, 0), (1, 0), (0, 0)]
