"""Which requests a prefill stage admits, in tiny instances solved by hand.

They are played by the environment and by the reference. A decode round takes 1 s and a prefill
stage 2 s. Requests are (prompt, output[, arrival]).
"""

from __future__ import annotations

import pytest

from tests.hand_solved_helpers import Played, Player
from tests.helpers import instance

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
    return {request: client for _, event, request, client in played.trace if event == "admit"}


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


def test_idle_clients_are_filled_in_order(play: Player) -> None:
    """Clients 0 and 2 fall idle together; the first waiting request goes to the lower one."""
    requests = instance((5, 2), (5, 9), (5, 2), (5, 1), (5, 1))
    played = play(requests, 3, ["fcfs", "fcfs"])
    assert clients_of(played) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 2}
