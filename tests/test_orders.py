"""Orders of the rule `shortest` and the published policies that go by them: reference, by hand, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import TASKS, Requests, ServingEnv, make_requests
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.process.actions import apply
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.slo import ClassSlo, SloConfig
from servegym.envs.vocabulary import ORDERS
from servegym.studies.checks.intervals import INTERVALS, draw_outputs, mean_latency
from tests.against_cluster import compare_cluster
from tests.cluster_helpers import interval_case, ordered_case
from tests.helpers import changed, instance, refused
from tests.test_shortest import machine, served

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]

LIMITED = changed(
    TASKS["servegym/Tiny-v0"],
    cluster={"clients": 8, "kv_capacity_tokens": 60},
    workload={"requests": 30},
)


# ---- against the reference ------------------------------------------------------------------


@pytest.mark.parametrize("by", list(ORDERS)[1:])
def test_every_order_equals_the_reference(by: str) -> None:
    for seed in range(9):
        rng = np.random.default_rng([seed, len(by)])
        case = ordered_case(rng, by, dyadic=bool(seed % 2), moving=None if seed > 6 else False)
        compare_cluster(case, "shortest")


def test_intervals_equal_the_reference() -> None:
    """Lengths are known by one end: who outlives it is expected to end next, at each round anew."""
    preemptions = 0
    for seed in range(18):
        rng = np.random.default_rng([seed, 5])
        case, ends = interval_case(rng, dyadic=bool(seed % 2))
        preemptions += compare_cluster(case, "shortest", ends).preemptions
    assert preemptions > 5  # bounds were outlived where memory was full


# ---- by hand --------------------------------------------------------------------------------
# One client, a stage of 2 s, rounds of 1 s: an output of o takes o + 1 seconds.


@pytest.mark.parametrize(
    ("name", "admitted"),
    [
        ("fcfs", [0, 4, 8, 10]),
        ("edf", [0, 4, 8, 10]),
        ("mc-sf", [8, 4, 2, 0]),  # of equal outputs the later one
        ("sorted-f", [4, 8, 0, 2]),
        ("slai", [8, 4, 0, 2]),  # by prompt: 2, 4, 8, 9
        ("mlfq-4", [8, 0, 4, 6]),  # levels 2, 0, 0, 1
        ("mlfq-16", [0, 4, 8, 10]),  # all of one level
    ],
)
def test_orders_by_hand(name: str, admitted: list[float]) -> None:
    rows = instance((9, 3), (4, 3), (2, 1), (8, 1))
    if name == "slai":
        rows = instance((9, 3), (4, 3), (2, 1), (3, 1))
    log = play(machine(1, 0), name, make_policy(name), _case(machine(1, 0), rows), seed=0).records
    assert log.admitted_s.tolist() == admitted


def _case(task: TaskConfig, requests: Requests) -> Any:
    return bound_case(lower(task), requests)


def test_batches_let_a_long_prompt_wait() -> None:
    """12 tokens hold it and one of the others, (1 + 2) / 4; or the four others, (4 · 2) / 16."""
    task, rows = machine(8, 12), [(9, 1, 0.0), *[(2, 2, 0.0)] * 4]
    assert served(task, "mc-sf", *rows).admitted_s[0] == 0
    assert served(task, "sorted-f", *rows).admitted_s.tolist() == [3, 0, 0, 0, 0]


def test_a_batch_is_made_when_its_requests_come() -> None:
    """Also where memory holds all who wait, and nobody is admitted then.

    At 9 s the patience of the second ends, who goes first. The batch was made before, of all three: it
    holds the second and the fourth, (10 + 10) / 4, so that the third waits for both.
    """
    task = changed(
        TASKS["servegym/Tiny-v0"],
        cluster={
            "clients": 4,
            "kv_capacity_tokens": 100,
            "kv_block_tokens": 1,
            "shortest_by": "batch",
            "max_prefill_tokens": 12,
            "patience_s": 8.0,
        },
        process={"rules": ("shortest",)},
    )
    rows = [(5, 20, 0.0), (10, 10, 1.0), (85, 9, 6.0), (10, 10, 6.0)]
    env = ServingEnv(task)
    env.reset(options={"requests": make_requests(*map(np.array, zip(*rows, strict=True)))})
    over = False
    while not over:
        mask, early = env.action_masks(), env.view().clock_s < 9.0
        action = 0 if mask[0] and early else int(np.flatnonzero(mask)[-1])
        _, _, terminated, truncated, _ = env.step(np.int64(action))
        over = terminated or truncated
    assert env.records().admitted_s.tolist() == [0, 9, 25, 11]


def test_the_preempted_keep_their_deadline_but_not_their_level() -> None:
    """Memory for 8 tokens: at 4 s the second is evicted; it comes back at 6 s, and the third behind it.

    Feedback has the third first, at the next boundary: it is of a lower level.
    """
    rows = (2, 5, 0.0), (2, 5, 0.0), (1, 1, 0.5)
    for name, admitted_s in (("edf", 6.0), ("fcfs", 6.0), ("mlfq-2", 5.0)):
        log = served(machine(2, 8), name, *rows)
        assert log.preemptions.tolist() == [0, 1, 0]
        assert log.admitted_s[2] == admitted_s, name


def test_the_smallest_lower_bound_gives_way() -> None:
    """Lower ends of 8 and 2: the second is admitted first, and has a bound of 5 when memory is full."""
    task = changed(machine(2, 12), information={"output_lengths": "predicted"})
    requests = make_requests([3, 3], [8, 8], None, [8, 2], [0.0, 0.0])
    for preempt, evicted in (("fewest-expected", [0, 1]), ("newest", [1, 0])):
        policy = make_trigger_policy("a-min")
        policy = replace(policy, comparison={}, cluster={**policy.cluster, "preempt": preempt})
        log = play(task, "a-min", policy, _case(task, requests), seed=0).records
        assert log.preemptions.tolist() == evicted, preempt


# ---- A_min, A_max ---------------------------------------------------------------------------


def test_known_lengths_make_the_three_one() -> None:
    case = make_case(LIMITED, 3)
    played = [
        play_compiled(LIMITED, make_trigger_policy(n), case) for n in ("mc-sf", "a-max", "a-min")
    ]
    assert played[0] == played[1] == played[2]


def test_the_ends_of_an_interval_are_quantiles() -> None:
    """A mean of 100 and a spread of 0.5: the median is 100 exp(−1/8), 90 % lie within exp(± 0.82)."""
    task = changed(machine(8, 0), information={"output_lengths": "predicted"})
    requests = make_requests([5], [40], None, [100], [0.5])
    for name, tokens in (("a-min", 39), ("a-max", 201), ("a-max-0.5", 124), ("mc-sf", 100)):
        seen: list[int] = []
        policy = make_policy(name)
        act = policy.act

        def look(situation: Any, act: Any = act, seen: list[int] = seen) -> int:
            seen.append(int(situation.imagine().requests[0, 0].decode_rounds) + 1)
            return int(act(situation))

        policy.act = look  # type: ignore[method-assign]
        play(task, name, policy, _case(task, requests), seed=0)
        assert seen[0] == tokens, name


@pytest.mark.parametrize("uniform", [True, False])
def test_a_min_is_better_where_intervals_are_wide(uniform: bool) -> None:
    """The paper's ordering; equal at points. a-max never evicts: no output exceeds its upper end."""
    outputs = draw_outputs(uniform, 60, np.random.default_rng(1))
    for name, ends in INTERVALS.items():
        lower_end, upper_end = ends(outputs)
        bold, _ = mean_latency("a-min", outputs, lower_end, 250)
        careful, evictions = mean_latency("a-max", outputs, upper_end, 250)
        assert evictions == 0
        if name == "points":
            assert bold == careful == mean_latency("mc-sf", outputs, outputs, 250)[0]
        else:
            assert bold < careful, name


# ---- SLAI -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "admitted", "worst"),
    [
        (0.5, [0, 7, 9], 1.0),  # nobody is prefilled while another decodes
        (3.0, [0, 3, 6], 3.0),  # a stage of 2 s and a round of 1 s
        (4.9, [0, 3, 6], 3.0),
        (5.0, [0, 3, 5], 5.0),  # two stages before a round
        (None, [0, 3, 5], 5.0),
    ],
)
def test_slai_by_hand(gap: float | None, admitted: list[float], worst: float) -> None:
    """Stages of 2 s, one prompt each; the others come at 2.5 s, when the first decodes."""
    task = changed(machine(3, 0), cluster={"max_prefill_tokens": 1})
    task = replace(task, slo=SloConfig(ttft_s=1.0))  # so that gaps are noted
    name = "slai" if gap is None else f"slai-{gap}"
    case = _case(task, instance((5, 6), (5, 1, 2.5), (4, 1, 2.5)))
    log = play(task, name, make_policy(name), case, seed=0).records
    assert sorted(log.admitted_s.tolist()) == admitted
    assert log.worst_gap_s[0] == worst


@pytest.mark.parametrize("by_class", [False, True])
def test_slai_takes_the_limit_of_the_task_and_mixed_stages(by_class: bool) -> None:
    task = changed(machine(3, 0), cluster={"chunk_tokens": 4})
    own = SloConfig(tpot_s=9.0, classes=(ClassSlo("a", tpot_s=1.0), ClassSlo("b")))
    task = replace(task, slo=own if by_class else SloConfig(tpot_s=1.0))
    requests = make_requests([5, 5], [6, 1], [0.0, 2.5], classes=["a", "b"])
    row = play(task, "slai", make_policy("slai"), _case(task, requests), seed=0).row
    assert (row["prefill_stages"], row["mixed_stages"]) == (1, 2)


def test_slai_says_which_rule_it_needs() -> None:
    task = changed(machine(3, 0), process={"rules": ("fcfs",)})
    case = _case(task, instance((5, 6)))
    refused(lambda: play(task, "slai", make_policy("slai"), case, seed=0), "admits by 'shortest'")


# ---- copies for look-ahead, and bad input ---------------------------------------------------


@pytest.mark.parametrize("name", ["sorted-f", "edf", "mlfq-8"])
def test_an_imagined_episode_keeps_the_order(name: str) -> None:
    """With known lengths a rollout never ends later than its base: the copy admits whom the base would."""
    case = make_case(LIMITED, 4)
    base = play(LIMITED, name, make_policy(name), case, seed=0).row
    better = play(LIMITED, "rollout", make_policy(f"rollout-0:{name}"), case, seed=0).row
    assert better["makespan_s"] <= base["makespan_s"] * (1 + 1e-9)


def test_patience_ends_in_imagination_as_it_does() -> None:
    """At 7 s who came at 5 s has waited for 2 s: with a patience of 2 s it goes before a shorter one."""
    for patience_s, first in ((2.0, 1), (2.5, 2)):
        task = changed(machine(1, 0), cluster={"patience_s": patience_s})
        env = ServingEnv(task)
        env.reset(options={"requests": instance((5, 6), (5, 4, 5.0), (5, 2, 5.5))})
        rule = task.actions.index("prefill:shortest")
        env.step(rule)
        assert env.view().clock_s == 7.0
        copy, lowered = env.imagine(), lower(task)
        apply(copy, lowered.costs, lowered.settings, 0, 0, rule)
        assert copy.picked[0, 0, 0] == first


@pytest.mark.parametrize(
    ("name", "message", "legal"),
    [
        ("a-min-0", "q must lie between 0 and 1, as in a-min-0.9", "a-min-0.001"),
        ("a-max-1", "q must lie between 0 and 1", "a-max-0.999"),
        ("a-max(quantile=0.9)", "parameter of a-max: 'quantile'", "a-max(interval=0.9)"),
        ("slai-0", "G must be > 0 and at most 1000000000", "slai-0.001"),
        ("mlfq-0", "Q must be a whole number in 1 … 1000000", "mlfq-1"),
        ("mlfq(level=1.5)", "level must be a whole number", "mlfq(level=2)"),
        ("sorted-f-2", "unknown policy", "sorted-f"),
        ("edf(1)", "takes no parameters", "edf()"),
    ],
)
def test_bad_names(name: str, message: str, legal: str) -> None:
    refused(lambda: make_policy(name), message)
    make_policy(legal)


def test_names_carry_their_numbers() -> None:
    assert make_trigger_policy("a-min-0.5").comparison == {"expect": "lower", "interval": 0.5}
    assert make_trigger_policy("mlfq-64").cluster["level_tokens"] == 64
    assert make_policy("slai(gap=0.2)") == replace(make_policy("slai"), gap_s=0.2)  # type: ignore[type-var]
