"""A user's own cost model: a class with one method, in the place of ``StageCosts``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs import ServegymError, ServingEnv
from servegym.envs.machine.costs import (
    MIN_COST_S,
    RATES,
    AffineDecode,
    AffinePrefill,
    CostModel,
    CostTables,
    StageCosts,
)
from servegym.envs.playing.evaluation import evaluate, make_case
from servegym.envs.playing.identity import claim_task
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import lower
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv

TINY = TASKS["servegym/Tiny-v0"]


class Imitation:
    """Has the tables of a task's model, made by hand; ``changes`` are put in their place."""

    def __init__(self, task: TaskConfig = TINY, **changes: Any) -> None:
        self.model, self.changes = task.cost, changes

    def tables(self, clients: int) -> CostTables:
        tables = self.model.tables(clients)
        rates = np.zeros(1, RATES)
        for name in RATES.names or ():
            rates[name] = tables.rates[name]
        own: dict[str, Any] = {"decode_base_s": tables.decode_base_s.copy(), "rates": rates}
        return replace(tables, **own | self.changes)


def with_model(model: Any, task: TaskConfig = TINY) -> TaskConfig:
    return replace(task, cost=model)


def test_it_is_a_cost_model() -> None:
    assert isinstance(Imitation(), CostModel)


@pytest.mark.parametrize("name", ["Tiny-v0", "Paper-v0"])
@pytest.mark.parametrize("policy", ["hybrid", "aligned"])
def test_episodes_are_those_of_the_model_that_it_imitates(name: str, policy: str) -> None:
    task = TASKS[f"servegym/{name}"]
    trigger = make_policy(policy)
    assert isinstance(trigger, TriggerPolicy)
    same = with_model(Imitation(task), task)
    assert make_case(same, 0).bound == make_case(task, 0).bound
    metrics = play_compiled(task, trigger, make_case(task, 0))
    assert play_compiled(same, trigger, make_case(same, 0)) == metrics
    assert metrics["makespan_s"] > 0


def test_environments_take_it() -> None:
    task = with_model(Imitation())
    single, many = ServingEnv(task), ServingVectorEnv(2, task)
    assert np.array_equal(single.reset(seed=3)[0], many.reset(seed=[3, 4])[0][0])


def test_it_is_evaluated_and_noted_by_its_tables(tmp_path: Path) -> None:
    task = with_model(Imitation())
    for _ in range(2):  # the second time goes on
        rows = evaluate(task, make_policy, ["fcfs"], range(3), tmp_path)
    usual = evaluate(TINY, make_policy, ["fcfs"], range(3), tmp_path / "usual")
    pd.testing.assert_series_equal(rows["makespan_s"], usual["makespan_s"])
    tables = TINY.cost.tables(3)
    slower = with_model(Imitation(decode_base_s=2 * tables.decode_base_s))
    with pytest.raises(ServegymError, match="tables_sha256"):
        evaluate(slower, make_policy, ["fcfs"], range(3), tmp_path)


@pytest.mark.parametrize("own_first", [True, False])
def test_a_changed_kind_of_model_is_named_as_a_whole(own_first: bool, tmp_path: Path) -> None:
    tasks = (with_model(Imitation()), TINY)
    first, second = tasks if own_first else tasks[::-1]
    assert claim_task(first, tmp_path) == claim_task(first, tmp_path)
    old, new = ("{'class': ", "{'decode': ") if own_first else ("{'decode': ", "{'class': ")
    with pytest.raises(ServegymError, match=f"\\(cost {old}.*, now {new}") as refusal:
        claim_task(second, tmp_path)
    assert "\n" not in str(refusal.value)
    faster = with_overrides(TINY, {"cost": {"engine_overhead": {"base": 1.0}}})
    if not own_first:  # the parts of ours are named as before
        with pytest.raises(ServegymError, match=r"\(base 0\.\d+, now 1\.0\)"):
            claim_task(faster, tmp_path)


@dataclass(frozen=True)
class Frozen:
    """A user's model that is equal where its fields are."""

    slower: float = 1.0

    def tables(self, clients: int) -> CostTables:
        tables = TINY.cost.tables(clients)
        return replace(tables, decode_base_s=self.slower * tables.decode_base_s)


def test_a_frozen_dataclass_makes_tasks_that_are_hashed_and_equal() -> None:
    assert with_model(Frozen(2.0)) == with_model(Frozen(2.0)) != with_model(Frozen())
    assert hash(with_model(Frozen(2.0))) == hash(with_model(Frozen(2.0)))
    assert lower(with_model(Frozen(2.0))).costs.decode_base_s[0, 1] == (
        2 * lower(TINY).costs.decode_base_s[0, 1]
    )


ROUNDS = np.full((1, 4), 0.5)
LEVELS = {"prefill_level_tokens": np.array([[5, 9]]), "prefill_level_s": np.array([[1.0, 2.0]])}

NO_LEVELS = {"prefill_level_tokens": np.zeros((1, 0)), "prefill_level_s": np.zeros((1, 0))}


def rates(**seconds: float) -> dict[str, Any]:
    """Tables' rates that are 0 except those given."""
    record = np.zeros(1, RATES)
    for name, value in seconds.items():
        record[name] = value
    return {"rates": record}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_base_s": np.full((1, 3), 0.5)}, r"shape \(1, clients \+ 1\) = \(1, 4\)"),
        ({"decode_base_s": np.full(4, 0.5)}, "decode_base_s must have the shape"),
        ({"decode_base_s": -ROUNDS}, "decode_base_s.0 must lie in"),
        ({"decode_base_s": ROUNDS * np.nan}, "decode_base_s.0 must lie in"),
        ({"decode_base_s": [["a"]]}, "must hold numbers"),
        ({"rates": np.zeros(2, RATES)}, "one record"),
        ({"rates": np.zeros(1)}, "one record"),
        (
            {"rates": np.array([(-1.0,) * len(RATES.names or ())], RATES)},
            "rates.decode_per_kv_token_s must be 0 or",
        ),
        (
            NO_LEVELS | {"rates": np.zeros(1, RATES)},
            "must take time without its overhead, too: prefill_base_s, ",
        ),
        (
            NO_LEVELS | rates(overhead_base_s=1.0),
            "take time without its overhead, too: prefill_base",
        ),
        (LEVELS | {"prefill_level_s": np.array([[2.0, 1.0]])}, "prefill_level_s must not decrease"),
        ({"prefill_level_s": np.array([[1.0]])}, r"shape \(1, levels\)"),
        (LEVELS | {"prefill_level_tokens": np.array([[9, 5]])}, "strictly increase"),
        (LEVELS | {"prefill_level_tokens": np.array([[0, 5]])}, "must lie in 1"),
        (LEVELS | {"prefill_level_tokens": [[10.9, 20.2]]}, "whole numbers, got 10.9"),
        (LEVELS | {"prefill_level_tokens": [[5.0, np.nan]]}, "whole numbers, got nan"),
        (
            LEVELS | {"prefill_level_tokens": [["a", "b"]]},
            "prefill_level_tokens must be whole numbers",
        ),
        (LEVELS | {"prefill_level_tokens": [[5], [9, 1]]}, "must hold numbers"),
        (LEVELS | {"prefill_level_s": [[1.0, np.nan]]}, "prefill_level_s.1 must lie in"),
        (rates(prefill_base_s=np.nan), "rates.prefill_base_s must be 0 or lie in"),
        (LEVELS | {"prefill_level_s": np.array([[0.0, 2.0]])}, "prefill_level_s.0 must lie in"),
    ],
)
def test_malformed_tables_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ServegymError, match=message) as refusal:
        ServingEnv(with_model(Imitation(**changes)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_base_s": ROUNDS},
        LEVELS,
        LEVELS | {"prefill_level_s": np.array([[2.0, 2.0]])},
        LEVELS | {"prefill_level_tokens": [[5.0, 9.0]]},
        LEVELS | rates(),  # levels take time
        *[
            NO_LEVELS | rates(**{f"prefill_{name}_s": MIN_COST_S})
            for name in ("base", "per_token", "per_token_squared", "floor")
        ],
    ],
)
def test_their_legal_twins_are_taken(changes: dict[str, Any]) -> None:
    tables = lower(with_model(Imitation(**changes))).costs
    for name, value in changes.items():
        assert np.array_equal(getattr(tables, name), value)
    assert tables.prefill_level_tokens.dtype == np.int64


def test_prefill_may_cost_by_squared_tokens_alone() -> None:
    """A user's tables may be whatever AffinePrefill takes."""
    costs = StageCosts(AffineDecode(0.5), AffinePrefill(0.0, 0.0, per_token_squared=0.25))
    task = replace(TINY, cost=costs)
    same = with_model(Imitation(task), task)
    trigger = make_policy("hybrid")
    assert isinstance(trigger, TriggerPolicy)
    metrics = play_compiled(task, trigger, make_case(task, 0))
    assert play_compiled(same, trigger, make_case(same, 0)) == metrics
    assert metrics["prefill_s"] > 0
    assert metrics["gap"] >= 0


def test_no_tables_at_all() -> None:
    class Wrong(Imitation):
        def tables(self, clients: int) -> Any:
            return None

    with pytest.raises(ServegymError, match="must return CostTables, got None"):
        ServingEnv(with_model(Wrong()))
    with pytest.raises(ServegymError, match="cost must be a CostModel"):
        with_model(7)


def test_its_parts_are_not_overridden_from_outside() -> None:
    task = with_model(Imitation())
    with pytest.raises(ServegymError, match="parts of a Imitation"):
        with_overrides(task, {"cost": {"engine_overhead": {"base": 1.0}}})
    assert with_overrides(task, {"cost": {}}) == task
    named = with_overrides(task, {"cost": {"preset": "tiny"}})
    assert named.cost == TINY.cost


def test_a_class_in_place_of_an_object_is_refused() -> None:
    with pytest.raises(ServegymError, match="cost must be an object, got the class Imitation"):
        with_model(Imitation)
    assert lower(with_model(Imitation())).clients == 3
