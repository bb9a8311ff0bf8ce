"""Stages, arrivals, costs and metrics of tiny instances solved by hand.

They are played by the environment and by the reference. Every time is a sum of powers of two, so all
comparisons are exact. Unless said otherwise a decode round takes 1 s and a prefill stage 2 s.
Requests are (prompt, output[, arrival]).
"""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs import Requests
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from tests.hand_solved_helpers import Player, number
from tests.helpers import inside, instance, make_env, start

# ---- stages ---------------------------------------------------------------------------------


def test_one_token_finishes_with_its_prefill(play: Player) -> None:
    played = play(instance((5, 1)), 1, ["fcfs"])
    assert played.trace == [(0, "admit", 0, 0), (2, "first", 0, 0), (2, "finish", 0, 0)]


def test_output_tokens_after_the_first_take_one_round_each(play: Player) -> None:
    played = play(instance((5, 4)), 1, ["fcfs"])
    assert played.trace == [(0, "admit", 0, 0), (2, "first", 0, 0), (5, "finish", 0, 0)]


def test_one_token_frees_its_client_for_the_next_stage(play: Player) -> None:
    """Two on one client: the second stage starts when the first ends, without a round between."""
    played = play(instance((5, 1), (5, 2)), 1, ["fcfs", "fcfs"])
    assert played.trace == [
        (0, "admit", 0, 0),
        (2, "first", 0, 0),
        (2, "finish", 0, 0),
        (2, "admit", 1, 0),
        (4, "first", 1, 0),
        (5, "finish", 1, 0),
    ]


def test_prefill_stalls_those_who_decode(play: Player) -> None:
    """Request 1 has two rounds left at 3 s and finishes two rounds after the stage of request 2."""
    requests = instance((5, 2), (5, 4), (5, 2))
    played = play(requests, 2, ["fcfs", "fcfs"])
    assert played.trace == [
        (0, "admit", 0, 0),
        (0, "admit", 1, 1),
        (2, "first", 0, 0),
        (2, "first", 1, 1),
        (3, "finish", 0, 0),
        (3, "admit", 2, 0),
        (5, "first", 2, 0),
        (6, "finish", 2, 0),
        (7, "finish", 1, 1),
    ]
    assert played.decisions == [(0, 0, 3), (3, 1, 1)]


def test_decoding_first_lets_the_others_finish(play: Player) -> None:
    """Decode runs on to the next finish, then the last request has the machine for itself."""
    requests = instance((5, 2), (5, 4), (5, 2))
    played = play(requests, 2, ["fcfs", "decode", "fcfs"])
    assert played.finishes() == [(3, 0), (5, 1), (8, 2)]
    assert played.decisions == [(0, 0, 3), (3, 1, 1), (5, 0, 1)]


def test_no_decision_while_all_clients_are_busy_or_nothing_waits(play: Player) -> None:
    """One decision at 0 and one at 11, when the first of the two long ones ends; none after it."""
    requests = instance((5, 10), (5, 20), (5, 30))
    played = play(requests, 2, ["fcfs", "fcfs"])
    assert played.decisions == [(0, 0, 3), (11, 1, 1)]
    assert played.finishes() == [(11, 0), (23, 1), (42, 2)]


def test_asking_at_every_round(play: Player) -> None:
    requests = instance((5, 2), (5, 5), (5, 2))
    played = play(requests, 2, ["fcfs", "decode", "decode", "fcfs"], every_round=True)
    assert played.decisions == [(0, 0, 3), (3, 1, 1), (4, 1, 1), (5, 1, 1)]
    assert played.finishes() == [(3, 0), (8, 1), (8, 2)]


def test_two_finish_in_one_round(play: Player) -> None:
    played = play(instance((5, 3), (5, 3), (5, 2)), 3, ["fcfs"])
    assert played.finishes() == [(3, 2), (4, 0), (4, 1)]


# ---- arrivals -------------------------------------------------------------------------------

ARRIVALS_SEEN = [
    (1.0, 2.0),  # during the prefill stage: at its end
    (2.0, 2.0),  # at the very end of a stage
    (2.25, 3.0),  # during a round: at its end
    (3.0, 3.0),  # between two rounds
    (4.5, 5.0),  # during the third round
    (7.0, 7.0),  # when the other has just finished
    (7.5, 7.5),  # while the machine is idle: at once
]


@pytest.mark.parametrize(("arrival_s", "seen_s"), ARRIVALS_SEEN)
def test_arrival_is_seen_at_the_end_of_the_stage(
    play: Player, arrival_s: float, seen_s: float
) -> None:
    """Request 0 runs from 0 to 7 on one of two clients; request 1 is admitted where it is seen."""
    played = play(instance((5, 6), (5, 1, arrival_s)), 2, ["fcfs", "fcfs"])
    assert played.decisions[1][0] == seen_s
    assert played.stages()[1] == (seen_s, seen_s + 2, [1])


def test_first_arrival_after_a_while(play: Player) -> None:
    played = play(instance((5, 2, 8.5), (5, 1, 8.75)), 2, ["fcfs", "fcfs"])
    assert played.decisions == [(8.5, 0, 1), (10.5, 1, 1)]
    assert played.finishes() == [(12.5, 1), (13.5, 0)]


def test_idle_between_two_arrivals(play: Player) -> None:
    played = play(instance((5, 1), (5, 1, 64.0)), 1, ["fcfs", "fcfs"])
    assert played.finishes() == [(2, 0), (66, 1)]


def test_arrivals_at_one_time_come_together(play: Player) -> None:
    requests = instance((5, 1, 4.0), (5, 1, 4.0), (5, 1, 4.0))
    played = play(requests, 2, ["fcfs", "fcfs"])
    assert played.stages() == [(4, 6, [0, 1]), (6, 8, [2])]


def test_decode_stops_at_an_arrival(play: Player) -> None:
    """At 3 s request 2 waits; decoding on is interrupted at 5 s by request 3, which has arrived."""
    requests = instance((5, 9), (5, 2), (5, 2), (5, 2, 4.5))
    played = play(requests, 2, ["fcfs", "decode", "fcfs", "fcfs"])
    assert [second for second, _, _ in played.decisions] == [0, 3, 5, 8]
    assert played.stages() == [(0, 2, [0, 1]), (5, 7, [2]), (8, 10, [3])]


def test_arrivals_while_all_are_busy_do_not_ask(play: Player) -> None:
    requests = instance((5, 9), (5, 2, 3.0), (5, 2, 4.0))
    played = play(requests, 1, ["fcfs", "fcfs", "fcfs"])
    assert played.decisions == [(0, 0, 1), (10, 0, 2), (13, 0, 1)]


# ---- costs ----------------------------------------------------------------------------------


def makespan(play: Player, requests: Requests, clients: int, costs: StageCosts) -> float:
    """Admit everything in one stage and decode to the end."""
    played = play(requests, clients, ["fcfs"], costs)
    return played.finishes()[-1][0]


AFFINE_STAGES = [
    ((8,), 0.5 + 8 * 0.125 + 64 / 1024),
    ((8, 4), 0.5 + 12 * 0.125 + 80 / 1024),  # squares of each prompt, not of the sum
    ((2,), 1.0),  # 0.5 + 0.25 + 4/1024 is below the floor
]


@pytest.mark.parametrize(("prompts", "seconds"), AFFINE_STAGES)
def test_affine_prefill(play: Player, prompts: tuple[int, ...], seconds: float) -> None:
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.5, 0.125, 1 / 1024, floor=1.0))
    requests = instance(*((prompt, 1) for prompt in prompts))
    assert makespan(play, requests, 2, costs) == seconds


def test_affine_decode_counts_clients_and_cache(play: Player) -> None:
    """Prompts 3 and 5, outputs 3 and 2; the cache is 4 + 6, then (one is done) 5 tokens."""
    costs = StageCosts(AffineDecode(1.0, 0.5, 1 / 64), AffinePrefill(2.0, 0.0))
    first = 1.0 + 2 * 0.5 + 10 / 64
    second = 1.0 + 1 * 0.5 + 5 / 64
    assert makespan(play, instance((3, 3), (5, 2)), 2, costs) == 2 + first + second


TABLE_ROUNDS = [
    (1, 4.0),
    (2, 1.0),  # a dip, as measured tables have
    (3, 2.0),  # halfway between 2 and 4
    (4, 3.0),
    (5, 3.0),  # beyond the table its last time holds
]


@pytest.mark.parametrize(("active", "seconds"), TABLE_ROUNDS)
@pytest.mark.filterwarnings("ignore:decode table ends at batch 4")
def test_table_decode(play: Player, active: int, seconds: float) -> None:
    costs = StageCosts(TableDecode((1, 2, 4), (4.0, 1.0, 3.0)), AffinePrefill(2.0, 0.0))
    requests = instance(*[(5, 2)] * active)
    assert makespan(play, requests, 5, costs) == 2 + seconds


def test_table_below_its_first_batch_and_with_cache(play: Player) -> None:
    costs = StageCosts(TableDecode((2, 4), (1.0, 3.0), 1 / 8), AffinePrefill(2.0, 0.0))
    assert makespan(play, instance((7, 2)), 1, costs) == 2 + 1.0 + 8 / 8


LEVELS = [
    (1, 1.0),
    (4, 1.0),  # a level holds as many tokens as it says
    (5, 1.5),
    (8, 1.5),
    (9, 1.5 + 1.0),  # beyond the top level: a whole top level and one for the rest
    (12, 1.5 + 1.0),
    (13, 1.5 + 1.5),
    (16, 1.5 + 1.5),  # two whole top levels and no rest
    (17, 1.5 + 1.5 + 1.0),
]


@pytest.mark.parametrize(("tokens", "seconds"), LEVELS)
def test_levelled_prefill(play: Player, tokens: int, seconds: float) -> None:
    costs = StageCosts(AffineDecode(1.0), LevelledPrefill((4, 8), (1.0, 1.5)))
    assert makespan(play, instance((tokens, 1)), 1, costs) == seconds


def test_levelled_prefill_looks_at_the_sum_of_the_prompts(play: Player) -> None:
    costs = StageCosts(AffineDecode(1.0), LevelledPrefill((4, 8), (1.0, 1.5)))
    assert makespan(play, instance((4, 1), (4, 1)), 2, costs) == 1.5


def test_engine_overhead_is_paid_by_every_stage(play: Player) -> None:
    """A stage of 2: 2 + 0.25 + 2·0.5; a round of 2: 1 + 0.25 + 2·0.5; a round of 1: 1 + 0.75."""
    overhead = EngineOverhead(0.25, 0.5)
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(2.0, 0.0), overhead)
    assert makespan(play, instance((5, 3), (5, 2)), 2, costs) == 3.25 + 2.25 + 1.75


def test_engine_overhead_on_levels_and_tables(play: Player) -> None:
    """The overhead comes once a stage, also where the stage runs as two levels."""
    overhead = EngineOverhead(0.25, 0.5)
    costs = StageCosts(TableDecode((1,), (4.0,)), LevelledPrefill((4,), (1.0,)), overhead)
    assert makespan(play, instance((8, 2)), 1, costs) == 2 * 1.0 + 0.75 + 4.75


# ---- metrics ---------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    """The stalled pair of `test_prefill_stalls_those_who_decode`, 7 s on two clients.

    Held: 3 s by request 0, 7 s by 1, 3 s by 2. Rounds: 2–3 s with two, 5–6 s with two, 6–7 s with
    one. First tokens after 2, 2 and 5 s; seconds per further token 1, 5/3 and 1. The bound: 5 rounds
    of requests on two clients take at least 3 rounds; three requests two stages of 2 s.
    """
    env = make_env(2)
    start(env, instance((5, 2), (5, 4), (5, 2)))
    env.step(np.int64(number("fcfs")))
    *_, info = env.step(np.int64(number("fcfs")))
    assert info == {
        "replica": 0,  # the one of the last observation
        "illegal_action": False,
        "requests": 3,
        "makespan_s": 7.0,
        "lower_bound_s": 7.0,
        "gap": 0.0,
        "client_utilization": 13 / 14,
        "decode_utilization": 2.5 / 7,
        "decode_rounds": 3,
        "prefill_stages": 2,
        "prefill_s": 4.0,
        "output_tokens_per_s": 8 / 7,
        "ttft_p50_s": 2.0,
        "ttft_p99_s": pytest.approx(4.94),
        "tpot_p50_s": 1.0,
        "tpot_p99_s": pytest.approx(1.0 + 0.98 * (2 / 3)),
        "decisions": 2,
        "unfinished_requests": 0,
        "replicas": 1,
        "mixed_stages": 0,
        "preemptions": 0,
        "recomputed_tokens": 0,
        "rejected": 0,
        "moves": 0,
        "e2e_p50_s": 6.0,  # they end at 3, 6 and 7 s
        "e2e_p99_s": pytest.approx(6.98),
        "goodput_per_s": 3 / 7,
        "slo_attainment": 1.0,
        "gap_between_tokens_p50_s": pytest.approx(np.nan, nan_ok=True),  # not noted
        "gap_between_tokens_p99_s": pytest.approx(np.nan, nan_ok=True),
        "e2e_mean_s": 16 / 3,
        "jain_fairness": pytest.approx(1089 / 1167),  # of 2/3, 4/7 and 1/3 tokens a second
        "peak_queue": 1.0,
        "idle_wait_share": 0.0,
        "preempted_slowdown": pytest.approx(np.nan, nan_ok=True),
        "shed": 0,
        "recompute_tax": 0.0,
        "memory_overrun_blocks": 0.0,
    }


def test_idle_wait_by_hand() -> None:
    """Idle client-seconds while work waits: one idle client in the round from 3 to 4 s and the next
    from 4 to 5 s; a stage clears it; what nobody waits for is not counted.
    """
    env = make_env(2, decisions="rounds")
    start(env, instance((5, 2), (5, 9), (5, 2)))
    waits = []
    for name in ("fcfs", "decode", "decode", "fcfs"):
        waits.append(env.view().idle_wait_s)
        env.step(np.int64(number(name)))
    assert waits == [0.0, 0.0, 1.0, 2.0]
    assert inside(env).totals_s["idle_wait_s"] == 0.0
