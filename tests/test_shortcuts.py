"""Where kernels answer in fewer steps than the definition takes, the answer is the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs import TASKS, ServingEnv, lower
from servegym.envs.simulator.busiest import begin_thefts, busiest
from servegym.envs.simulator.memory import all_fit, blocks_of_rounds, fits, rounds_to_full
from servegym.envs.simulator.seconds import decode_seconds
from servegym.envs.simulator.stages import rounds_until
from servegym.envs.simulator.state import DECODE_RUN, UNLIMITED_BLOCKS, State
from servegym.envs.task.lowering import make_task_state
from tests.cluster_helpers import play_any, requests_of, shared_case, task_of
from tests.helpers import changed
from tests.recount import Row, waiting_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]

LIMITED = changed(TASKS["servegym/Tiny-v0"], cluster={"clients": 12, "kv_capacity_tokens": 100})
CHAT = TASKS["servegym/Chat-v0"]
COSTS = lower(CHAT).costs
MANY_ROUNDS = 40


@given(
    active=st.integers(1, 256),
    cached=st.integers(0, 10**7),
    run=st.integers(1, 3000),
    share=st.floats(-0.1, 1.1),
    at_boundary=st.booleans(),
    scale=st.sampled_from([1.0, 1e-12, 1e-13, 2e-14, 0.0]),
)
def test_the_rounds_until_a_time(
    active: int, cached: int, run: int, share: float, *, at_boundary: bool, scale: float
) -> None:
    """The fewest that reach it, at most the whole run; also if a round is shorter than the clock's step."""
    rates = COSTS.rates.copy()
    rates["decode_per_kv_token_s"] *= scale
    costs = replace(COSTS, decode_base_s=COSTS.decode_base_s * scale, rates=rates)
    state = make_task_state(CHAT, 1, 1)
    replica = state.replicas[0, 0]
    replica.stage, replica.active, replica.cached_tokens = DECODE_RUN, active, cached
    replica.run_rounds, replica.clock_s = run, 17.3
    ends_s = [17.3 + decode_seconds(costs, 0, active, cached, n) for n in range(1, run + 1)]
    then_s = 17.3 + share * (ends_s[-1] - 17.3)
    if at_boundary:
        then_s = ends_s[int(np.clip(share, 0.0, 0.999) * run)]
    reach = np.flatnonzero(np.array(ends_s) >= then_s)
    fewest = int(reach[0]) + 1 if len(reach) else run
    assert rounds_until(state, costs, 0, 0, then_s) == fewest


@pytest.mark.parametrize("moving", [False, True])
def test_memory_at_a_glance(*, moving: bool) -> None:
    """Blocks of rounds, rounds until memory is full, and whether all who wait fit."""
    answers = Counter[bool]()
    for seed in range(30):
        rng = np.random.default_rng([seed, 21])
        case = shared_case(rng, dyadic=bool(seed % 2), moving=moving)
        env = ServingEnv(task_of(replace(case.spec, admission_guard="none")))
        env.reset(options={"requests": requests_of(case)})
        assert env.state is not None
        play_any(env, rng, partial(look_at_memory, env.state, answers))
    assert min(answers[True], answers[False]) > 50


def look_at_memory(state: State, answers: Counter[bool]) -> None:
    row = Row.of(state)
    queues = [waiting_in(row, q)[0] for q in range(len(row.queues))]
    for r, (replica, machine) in enumerate(zip(row.replicas, row.machines, strict=True)):
        if machine.blocks == UNLIMITED_BLOCKS:
            continue
        if replica.active > 0:
            recount_rounds(row, r)
        for taken in (0, 2):
            all_do = all_fit(state, 0, r, taken)
            answers[all_do] += 1
            for i in queues[min(r, len(queues) - 1)]:
                running = machine.clients - replica.idle
                assert fits(state, 0, r, i, taken, running) or not all_do


def recount_rounds(row: Row, r: int) -> None:
    replica, requests = row.replicas[r], row.requests
    held = [
        requests[finish.request].prompt_tokens
        + requests[finish.request].decode_rounds
        - (finish.due - replica.rounds)
        for finish in row.finishes[r]
    ]
    free, full = row.machines[r].blocks - replica.used_blocks, 0
    for rounds in range(1, MANY_ROUNDS):
        blocks = sum(row.blocks(tokens + rounds) - row.blocks(tokens) for tokens in held)
        assert blocks_of_rounds(row.state, 0, r, rounds) == blocks
        full += int(blocks <= free)
    if free >= 0 and full < MANY_ROUNDS - 1:
        assert rounds_to_full(row.state, 0, r) == full


@pytest.mark.parametrize("idle", [3, 12])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=11, max_size=11))
def test_victims_by_work(idle: int, queued: list[tuple[int, int]]) -> None:
    """Most work, then the lowest number, as one theft follows another.

    Between two thefts an idle client may take or fetch a request of its own: as much work is left.
    """
    state = make_task_state(LIMITED, 1, 1)
    clients = state.clients[0, 0]
    clients.queue_rounds = [0, *(rounds for rounds, _ in queued)]  # the thief has none
    clients.queue_requests = [0, *(requests for _, requests in queued)]
    state.replicas[0, 0].idle = idle
    begin_thefts(state, 0)
    while clients.queue_requests.any():
        all_work = clients.queue_rounds + np.maximum(-1 - clients.expected_end, 0)
        work = np.where(clients.queue_requests > 0, all_work, -1)
        victim = int(busiest(state, 0, 0))
        assert victim == int(work.argmax())
        clients.queue_requests[victim] -= 1
        clients.queue_rounds[victim] //= 2
        second = int(np.argsort(work)[-2])
        if clients.queue_requests[second] > 1 and clients.expected_end[second] == 0:
            rounds = clients.queue_rounds[second] // 3
            clients.queue_requests[second] -= 1
            clients.queue_rounds[second] -= rounds
            clients.expected_end[second] = -1 - rounds
