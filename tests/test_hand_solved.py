"""Tiny instances solved by hand, played by the environment and by the reference.

Every time is a sum of powers of two, so all comparisons are exact. Unless said otherwise a decode
round takes 1 s and a prefill stage 2 s. Requests are (prompt, output[, arrival]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from servegym.envs import Requests
from servegym.envs.cost_models import (
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.metrics import Records
from tests.helpers import UNIT_COSTS, inside, instance, make_env, start, trace
from tests.reference_simulator import RULES, ReferenceSimulator, make_reference


@dataclass
class Played:
    """What an episode left behind."""

    trace: list[tuple[float, str, int, int]]  # (second, what, request, client)
    decisions: list[tuple[float, int, int]]  # (second, active, waiting) at every decision point

    def finishes(self) -> list[tuple[float, int]]:
        """(second, request) in order of finishing."""
        return [(second, request) for second, kind, request, _ in self.trace if kind == "finish"]

    def stages(self) -> list[tuple[float, float, list[int]]]:
        """(start, end, requests in order of their clients) of every prefill stage."""
        ends = {request: second for second, kind, request, _ in self.trace if kind == "first"}
        admitted = sorted((s, c, r) for s, kind, r, c in self.trace if kind == "admit")
        stages: dict[float, list[int]] = {}
        for second, _, request in admitted:
            stages.setdefault(second, []).append(request)
        return [(second, ends[ids[0]], ids) for second, ids in stages.items()]


Player = Callable[..., Played]


def number(name: str, rules: Sequence[str] = RULES) -> int:
    """The action called `name`."""
    return ("decode", *rules).index(name)


def play_env(
    requests: Requests,
    clients: int,
    actions: Sequence[str],
    costs: StageCosts = UNIT_COSTS,
    queues: Sequence[Sequence[int]] | None = None,
    max_prefill_tokens: int = 0,
    every_round: bool = False,
    rules: Sequence[str] = RULES,
) -> Played:
    """Take the named actions, which must be legal, in the environment."""
    mode = "rounds" if every_round else "events"
    env = make_env(clients, costs, max_prefill_tokens, decisions=mode, rules=tuple(rules))
    start(env, requests, queues)
    decisions = []
    for place, name in enumerate(actions):
        now = env.view()
        decisions.append((now.clock_s, now.active, now.waiting))
        assert env.action_masks()[number(name, rules)], f"{name} is illegal at decision {place}"
        env.step(np.int64(number(name, rules)))
    return Played(trace(env.records()), decisions)


def play_reference(
    requests: Requests,
    clients: int,
    actions: Sequence[str],
    costs: StageCosts = UNIT_COSTS,
    queues: Sequence[Sequence[int]] | None = None,
    rules: Sequence[str] = RULES,
    **settings: Any,
) -> Played:
    """Take the same actions in the reference simulator."""
    reference = make_reference(requests, clients, costs, queues, rules, **settings)
    decisions = []
    for name in actions:
        active, waiting = len(reference.running()), len(reference.waiting())
        decisions.append((reference.clock_s, active, waiting))
        reference.step(number(name, rules))
    return Played(trace(reference_records(reference)), decisions)


def reference_records(reference: ReferenceSimulator) -> Records:
    """The reference's records in the environment's form."""
    rows = reference.requests
    times = {
        name: np.array([getattr(row, name) for row in rows], dtype=float)
        for name in ("arrival_s", "admitted_s", "first_token_s", "finished_s")
    }
    whole = {"client": "client", "prompt_tokens": "prompt", "decode_rounds": "rounds"}
    ints = {
        name: np.array([-1 if (value := getattr(row, field)) is None else value for row in rows])
        for name, field in whole.items()
    }
    return Records(**times, **ints)


@pytest.fixture(params=[play_env, play_reference], ids=["env", "reference"])
def play(request: pytest.FixtureRequest) -> Player:
    """Both simulators: a wrong hand solution fails twice, a wrong simulator once."""
    player: Player = request.param
    return player


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


# ---- the token budget of a stage ------------------------------------------------------------

BUDGETS = [
    ((6, 4, 1), 10, [0, 1]),  # exactly full
    ((6, 5, 1), 10, [0]),  # the first that does not fit ends the stage: the third is not tried
    ((20, 1), 10, [0]),  # the first is never refused
    ((1, 20), 10, [0]),
    ((6, 4, 1), 11, [0, 1, 2]),
    ((6, 4, 1), 0, [0, 1, 2]),  # no budget
    ((1, 1, 1), 1, [0]),
]


@pytest.mark.parametrize(("prompts", "budget", "first_batch"), BUDGETS)
@pytest.mark.parametrize("rule", ["fcfs", "longest"])
def test_token_budget(
    play: Player, prompts: tuple[int, ...], budget: int, first_batch: list[int], rule: str
) -> None:
    requests = instance(*((prompt, 1) for prompt in prompts))
    played = play(requests, 3, [rule], max_prefill_tokens=budget)
    assert played.stages() == [(0, 2, first_batch)]


# ---- admission rules ------------------------------------------------------------------------


FIRST_BATCHES = [
    ("fcfs", (3, 9, 1, 5), [0, 1]),
    ("longest", (3, 9, 1, 5), [1, 3]),
    ("shortest", (3, 9, 1, 5), [2, 0]),
    ("longest", (4, 4, 4), [0, 1]),  # equal lengths: in order of arrival
    ("shortest", (4, 4, 4), [2, 1]),  # the reverse of longest first, all through
    ("aligned", (3, 9, 1, 5, 2, 2), [1, 3]),  # nobody runs: nothing to align with, longest first
]


@pytest.mark.parametrize(("rule", "outputs", "expected"), FIRST_BATCHES)
def test_first_batch(
    play: Player, rule: str, outputs: tuple[int, ...], expected: list[int]
) -> None:
    requests = instance(*((5, output) for output in outputs))
    assert play(requests, 2, [rule]).stages() == [(0, 2, expected)]


def test_fcfs_goes_by_arrival(play: Player) -> None:
    """Requests are numbered by arrival, so that the first of the list is the last to come."""
    requests = instance((5, 7, 4.0), (5, 8, 3.0), (5, 9, 0.0))
    played = play(requests, 1, ["fcfs", "fcfs", "fcfs"])
    assert played.finishes() == [(10, 0), (19, 1), (27, 2)]


def clients_of(played: Played) -> dict[int, int]:
    """The client that each request was admitted to."""
    return {request: client for _, kind, request, client in played.trace if kind == "admit"}


def test_greedy_plan(play: Player) -> None:
    """Rounds 6, 5, 4, 3, 3, each to the lighter client, of equal loads to the first.

    Loads of the clients after each: 6|0, 6|5, 6|9, 9|9, 12|9.
    """
    requests = instance((5, 4), (5, 6), (5, 4), (5, 7), (5, 5))
    played = play(requests, 2, ["plan", "plan"], rules=["plan"])
    assert clients_of(played) == {3: 0, 0: 0, 2: 0, 1: 1, 4: 1}
    assert played.stages() == [(0, 2, [3, 1]), (7, 9, [4]), (10, 12, [0]), (15, 17, [2])]


def test_plan_waits_for_its_own_queue(play: Player) -> None:
    """Client 1 is idle from 3 s on, but request 2 is planned on client 0: there is no choice."""
    requests = instance((5, 5), (5, 2), (5, 2))
    played = play(requests, 2, [], queues=[[0, 2], [1]], rules=["plan"])
    assert played.finishes() == [(3, 1), (6, 0), (9, 2)]
    assert played.stages() == [(0, 2, [0, 1]), (6, 8, [2])]


def test_unplanned_requests_join_the_least_loaded_client(play: Player) -> None:
    """Planned: 5 rounds on client 0. Request 1 (4 rounds) joins client 1, request 2 (2 rounds) too,
    since 4 < 5, and request 3 joins client 0, since 5 < 6.
    """
    requests = instance((5, 6), (5, 5), (5, 3), (5, 2))
    played = play(requests, 2, ["plan", "plan"], queues=[[0], []], rules=["plan"])
    assert clients_of(played) == {0: 0, 1: 1, 2: 1, 3: 0}


def test_an_arrival_joins_the_client_with_least_before_it(play: Player) -> None:
    """At 4 s client 0 has 6 rounds left, client 1 has 4 left and 1 queued: 5 < 6."""
    requests = instance((5, 9), (5, 7), (5, 2), (5, 3, 3.5))
    played = play(requests, 2, ["plan", "plan", "plan"], queues=[[0], [1, 2]])
    assert clients_of(played)[3] == 1
    assert played.stages() == [(0, 2, [0, 1]), (8, 10, [2]), (11, 13, [3])]


STEALS = [
    # Client 1 has 5 + 7 + 7 rounds, client 2 has 3 + 18: the longest of client 2 is stolen.
    ([[], [0, 1, 2], [3, 4]], (5, 7, 7, 3, 18), [4, 0, 3]),
    # Equal work: the first client is robbed; equal requests: the first in its queue.
    ([[], [0, 1, 2], [3, 4]], (5, 7, 7, 1, 18), [1, 0, 3]),
    # Two idle clients without a queue: the second robs client 2, which has 14 rounds left to 13.
    ([[], [], [0, 1, 2, 3]], (2, 9, 5, 7), [1, 3, 0]),
    # Its own queue comes first, even where another client has more work.
    ([[0], [1, 2], []], (1, 9, 9), [0, 1, 2]),
]


@pytest.mark.parametrize(("queues", "rounds", "expected"), STEALS)
def test_steal(
    play: Player, queues: list[list[int]], rounds: tuple[int, ...], expected: list[int]
) -> None:
    requests = instance(*((5, 1 + count) for count in rounds))
    assert play(requests, 3, ["steal"], queues=queues).stages() == [(0, 2, expected)]


def test_steal_counts_what_a_client_runs(play: Player) -> None:
    """At 3 s client 2 is idle. Client 0 runs 9 more rounds and queues 1; client 1 runs 2 and queues
    6: 10 > 8, so the single round of client 0 is stolen.
    """
    requests = instance((5, 11), (5, 4), (5, 2), (5, 2), (5, 7))
    queues = [[0, 3], [1, 4], [2]]
    played = play(requests, 3, ["plan", "steal"], queues=queues)
    assert played.stages()[1] == (3, 5, [3])


# Two clients run 5 more rounds each when the third falls idle, at 7 s: the only target is 5.
ALIGNED_ONE_TARGET = [
    ((9, 8, 6, 4, 3, 2, 1), 4),  # of the longer half 9, 8, 6, 4 only 4 finishes by the target
    ((9, 8, 6, 5, 3, 2, 1), 5),  # at the target
    ((9, 8, 7, 6, 5, 2, 1), 9),  # 5 is not in the longer half; nobody else fits: the longest
    ((9, 8, 6, 4, 3, 2), 9),  # six wait: the last two per client go longest first
    ((9, 5, 4, 5, 3, 2, 1), 5),
    ((9, 8, 7, 5, 4, 3, 2, 1), 5),  # of eight the longer four
    ((9, 8, 7, 6, 5, 4, 3, 2, 1), 5),  # of nine the longer five
]


@pytest.mark.parametrize(("waiting", "expected"), ALIGNED_ONE_TARGET)
def test_aligned_with_one_target(play: Player, waiting: tuple[int, ...], expected: int) -> None:
    rounds = (10, 10, 5, *waiting)
    requests = instance(*((5, 1 + count) for count in rounds))
    queues = [[0], [1], [2, *range(3, len(rounds))]]
    played = play(requests, 3, ["plan", "aligned"], queues=queues)
    (_, _, first), (at, _, second) = played.stages()
    assert (first, at) == ([0, 1, 2], 7)
    assert [rounds[request] for request in second] == [expected]
    assert second == [rounds.index(expected, 3)]  # of equal ones the first


# Five clients. At 3 s clients 3 and 4 fall idle; clients 0 … 2 have 9, 9 and 4 rounds left, or as
# said. More than ten wait.
ALIGNED_MORE = [
    # 9 finishes with the pair; then 8, with a pad of 1.
    ((9, 9, 4), (12, 11, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1), [9, 8]),
    # One client that finishes at 4 is no target: 4 has a pad of 5.
    ((9, 9, 4), (12, 11, 10, 8, 4, 4, 3, 3, 1, 1, 1, 1, 1), [8, 4]),
    # Three that finish together are one target.
    ((9, 9, 9), (12, 11, 10, 9, 8, 8, 1, 1, 1, 1, 1, 1, 1), [9, 8]),
    # No two finish together: longest first.
    ((9, 8, 7), (12, 11, 9, 9, 8, 8, 1, 1, 1, 1, 1, 1, 1), [12, 11]),
    # Zero-round requests cannot tie with anything: they are never in the longer half here.
    ((9, 9, 4), (12, 9, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0), [9, 9]),
]


@pytest.mark.parametrize(("left", "waiting", "expected"), ALIGNED_MORE)
def test_aligned_fills_two_clients(
    play: Player, left: tuple[int, ...], waiting: tuple[int, ...], expected: list[int]
) -> None:
    rounds = (*(count + 1 for count in left), 1, 1, *waiting)
    requests = instance(*((5, 1 + count) for count in rounds))
    queues = [[0], [1], [2], [3], [4, *range(5, len(rounds))]]
    played = play(requests, 5, ["plan", "aligned"], queues=queues)
    at, _, second = played.stages()[1]
    assert at == 3
    assert [rounds[request] for request in second] == expected


# Five clients: at 3 s the last one is idle, and each of two targets has two clients. At least eleven
# wait, so that the last two per client are not at hand.
TWO_TARGETS = [
    # 8 scores 8 − 3·1 = 5, as does 5 − 0: the longer one goes
    ((5, 9), (8, 7, 6, 5, 5, 5, 1, 1, 1, 1, 1), 8),
    # 8 scores 5, 6 scores 6
    ((6, 9), (8, 7, 6, 5, 5, 5, 1, 1, 1, 1, 1), 6),
    # 7 scores 7 − 3·2 = 1, 5 scores 5
    ((5, 9), (7, 7, 6, 5, 5, 5, 1, 1, 1, 1, 1), 5),
    # 12 finishes after both; 9 fits the second
    ((5, 9), (12, 9, 6, 5, 5, 5, 1, 1, 1, 1, 1), 9),
    # a score below 0 is still better than none: 7 scores 7 − 3·5, 6 less
    ((3, 12), (7, 7, 6, 6, 6, 6, 1, 1, 1, 1, 1), 7),
]


@pytest.mark.parametrize(("targets", "waiting", "expected"), TWO_TARGETS)
def test_aligned_with_two_targets(
    play: Player, targets: tuple[int, int], waiting: tuple[int, ...], expected: int
) -> None:
    soon, late = (target + 1 for target in targets)  # one round until the fifth client is idle
    rounds = (soon, soon, late, late, 1, *waiting)
    requests = instance(*((5, 1 + count) for count in rounds))
    queues = [[0], [1], [2], [3], [4, *range(5, len(rounds))]]
    played = play(requests, 5, ["plan", "aligned"], queues=queues)
    assert played.stages()[1] == (3, 5, [rounds.index(expected, 5)])


# ---- ties and totals ------------------------------------------------------------------------


def test_idle_clients_are_filled_in_order(play: Player) -> None:
    """Clients 0 and 2 fall idle together; the first waiting request goes to the lower one."""
    requests = instance((5, 2), (5, 9), (5, 2), (5, 1), (5, 1))
    played = play(requests, 3, ["fcfs", "fcfs"])
    assert clients_of(played) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 2}


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
