"""Tasks, actions and seeds from Python callers: what is refused in one line, and its legal twins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.envs import Requests, ServegymError, ServingEnv, TaskConfig, load_task
from servegym.envs.errors import shown
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import with_overrides
from servegym.envs.task.sections import ProcessConfig
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import make_env, refused, start

TINY = load_task("Tiny-v0")
ID_OR_PATH = "task must be an id, the path of a .toml file or a TaskConfig, got "


# Texts as a program may keep them; str() of one would be its name.
Choice = Enum("Choice", {"REWARD": "gap", "LENGTHS": "unknown"}, type=str)


# ---- tasks and overrides ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 3, {}, [], b"Tiny-v0", True, np.array([1, 2]), ServingEnv])
def test_a_task_of_a_wrong_type(bad: Any) -> None:
    refused(lambda: ServingEnv(bad), ID_OR_PATH + shown(bad))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "unknown task ''; choose from Tiny-v0"),
        ("a\0b.toml", r"'a\x00b.toml': is no name of a file"),
        ("nothing.toml", "nothing.toml: no such task file"),
        (Path("nothing.toml"), "nothing.toml: no such task file"),
        (Path("Tyni-v0"), "did you mean 'Tiny-v0'"),
    ],
)
def test_a_task_that_does_not_exist(bad: Any, words: str) -> None:
    refused(lambda: ServingEnv(bad), words)


def test_a_name_longer_than_a_file_may_have() -> None:
    with pytest.raises(ServegymError, match="unknown task"):
        load_task("x" * 5000)


def test_a_task_by_path_text_or_object(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text("[cluster]\nclients = 3\n")
    assert load_task(path) == load_task(str(path)) == load_task(np.str_(path))
    assert load_task(path).cluster.clients == 3
    assert load_task("Tiny-v0") is load_task(TINY)


# Overrides of numpy's and Python's types that mean the same: a section, a key, both values.
TWINS: list[tuple[str, str, Any, Any]] = [
    ("cluster", "clients", np.arange(10, 50, 10)[0], 10),
    ("cluster", "clients", np.uint8(5), 5),
    ("cluster", "clients", np.array(5), 5),
    ("workload", "requests", pd.Series([4, 5])[0], 4),
    ("workload", "arrival_rate_per_s", np.float32(0.1), float(np.float32(0.1))),
    ("workload", "arrival_rate_per_s", np.longdouble(0.5), 0.5),
    ("workload", "arrival_rate_per_s", np.int16(2), 2.0),
    ("workload", "arrival_rate_per_s", 2, 2.0),
    ("workload", "source", Path("tiny"), "tiny"),
    ("information", "output_lengths", np.str_("unknown"), "unknown"),
    ("process", "rules", np.array(["fcfs", "plan"]), ("fcfs", "plan")),
    ("process", "rules", ["fcfs", np.str_("plan")], ("fcfs", "plan")),
    ("cost", "preset", np.str_("tiny"), "tiny"),
    ("process", "reward", Choice.REWARD, "gap"),
    ("information", "output_lengths", Choice.LENGTHS, "unknown"),
]


@pytest.mark.parametrize(("section", "key", "other", "plain"), TWINS)
def test_numpys_values_become_pythons(section: str, key: str, other: Any, plain: Any) -> None:
    """Equal tasks, equal hashes, equal JSON, which numpy's integers cannot be written to."""
    task = ServingEnv("Tiny-v0", overrides={section: {key: other}}).task
    twin = ServingEnv("Tiny-v0", overrides={section: {key: plain}}).task
    assert task == twin
    assert hash(task) == hash(twin)
    assert json.dumps(asdict(task)) == json.dumps(asdict(twin))
    if section != "cost":
        assert type(getattr(getattr(task, section), key)) is type(plain)


def test_cost_tables_take_arrays() -> None:
    decode = {"batch": np.array([1, 2, 4]), "seconds": np.array([1, 2, 3])}
    prefill = {"base": np.float32(1), "per_token": np.int64(0)}
    task = with_overrides(TINY, {"cost": {"model": "table", "decode": decode, "prefill": prefill}})
    lists = {name: values.tolist() for name, values in decode.items()}
    twin = {"cost": {"model": "table", "decode": lists, "prefill": {"base": 1.0, "per_token": 0.0}}}
    assert task == with_overrides(TINY, twin)
    assert json.dumps(asdict(task)) == json.dumps(asdict(with_overrides(TINY, twin)))


def test_fields_built_directly_are_plain_too() -> None:
    three: Any = np.int64(3)
    cluster = ClusterConfig(clients=three)
    assert (cluster, type(cluster.clients)) == (ClusterConfig(clients=3), int)
    rules: Any = ["fcfs"]
    assert ProcessConfig(rules=rules) == ProcessConfig(rules=("fcfs",))


BAD_OVERRIDES: list[tuple[Any, str]] = [
    (0, "overrides must be a table of sections"),
    ([], "overrides must be a table of sections"),
    ("cluster", "overrides must be a table of sections"),
    ([("cluster", {})], "overrides must be a table of sections"),
    ({3: {}}, "unknown section '3'"),
    ({"cluster": {3: 4}}, "unknown key 'cluster.3'"),
    ({"cluster": None}, "cluster must be a table of keys, got None"),
    ({"cluster": {"clients": np.float64(5)}}, "a whole number, got 5.0"),
    ({"cluster": {"clients": np.True_}}, "a whole number, got True"),
    ({"cluster": {"clients": np.array([5])}}, "a whole number, got [5]"),
    ({"cluster": {"clients": np.zeros((40, 40))}}, "a whole number, got [[0.0"),
    ({"cluster": {"clients": np.timedelta64(5, "ns")}}, "a whole number, got np.timedelta64"),
    ({"cluster": {"clients": 10**5000}}, "in 1 … 1000000, got a value of type int"),
    ({"workload": {"arrival_rate_per_s": "fast"}}, "a number, got 'fast'"),
    ({"workload": {"arrival_rate_per_s": Path("1")}}, "a number, got '1'"),
    ({"workload": {"source": b"w.csv"}}, "a text, got b'w.csv'"),
    ({"workload": {"source": Path("w.csv")}}, "w.csv: no such workload file"),
    ({"process": {"rules": {"fcfs"}}}, "a list, got {'fcfs'}"),
    ({"process": {"rules": np.array("fcfs")}}, "a list, got 'fcfs'"),
    ({"information": {"output_lengths": np.array(["known"])}}, "unknown value"),
    ({"information": {"output_lengths": np.array(["known", "x"], object)}}, "unknown value"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_OVERRIDES)
def test_bad_overrides(bad: Any, words: str) -> None:
    refused(lambda: ServingEnv("Tiny-v0", overrides=bad), words)


@pytest.mark.parametrize("section", ["cluster", "cost", "workload", "information", "process"])
def test_a_task_is_made_of_its_sections(section: str) -> None:
    table: Any = {section: {}}
    refused(lambda: TaskConfig("test", **table), f"{section} must be a ")
    number: Any = 3
    refused(lambda: TaskConfig(number), "name must be a text, got 3")
    TaskConfig("test", **{section: getattr(TINY, section)})


BAD_COSTS: list[tuple[type, dict[str, Any], str]] = [
    (AffineDecode, {"base": "1"}, "decode.base must be a number, got '1'"),
    (AffineDecode, {"base": None}, "decode.base must be a number, got None"),
    (AffineDecode, {"base": True}, "decode.base must be a number, got True"),
    (AffineDecode, {"base": np.array([1.0, 2.0])}, "decode.base must be a number, got [1.0, 2.0]"),
    (AffineDecode, {"base": 10**400}, "decode.base is too large a number"),
    (TableDecode, {"batch": 1, "seconds": [1.0]}, "decode.batch must be a list, got 1"),
    (TableDecode, {"batch": [1.5], "seconds": [1.0]}, "decode.batch[0] must be a whole number"),
    (AffinePrefill, {"base": 1, "per_token": []}, "prefill.per_token must be a number, got []"),
    (LevelledPrefill, {"level_tokens": "12", "level_seconds": [1]}, "level_tokens must be a list"),
    (EngineOverhead, {"base": "0"}, "engine_overhead.base must be a number"),
    (StageCosts, {"decode": 1, "prefill": AffinePrefill(1, 1)}, "be a AffineDecode or TableDecode"),
    (StageCosts, {"decode": AffineDecode(1), "prefill": None}, "prefill must be a AffinePrefill"),
]


@pytest.mark.parametrize(("cls", "fields", "words"), BAD_COSTS)
def test_costs_of_a_wrong_type(cls: type, fields: dict[str, Any], words: str) -> None:
    refused(lambda: cls(**fields), words)


def test_costs_built_directly_are_plain_too() -> None:
    batch: Any = np.array([1, 2])
    seconds: Any = np.array([1, 2])
    half: Any = np.float32(0.5)
    table = TableDecode(batch, seconds, half)
    assert table == TableDecode((1, 2), (1.0, 2.0), 0.5)
    assert hash(table) == hash(TableDecode((1, 2), (1.0, 2.0), 0.5))
    assert (
        json.dumps(asdict(table))
        == '{"batch": [1, 2], "seconds": [1.0, 2.0], "per_kv_token": 0.5, '
        '"per_client_kv_token": 0.0}'
    )


# ---- actions ---------------------------------------------------------------------------------

NO_WHOLE_NUMBERS: list[Any] = [
    *(3.0, np.float32(3), float("nan"), 3 + 0j, Fraction(3)),
    *("3", b"3", None, [3], np.array([3]), object()),
    *(True, np.True_, np.timedelta64(3, "s"), np.datetime64("2020-01-01")),
]


@pytest.mark.parametrize("bad", NO_WHOLE_NUMBERS)
def test_an_action_is_a_whole_number(bad: Any) -> None:
    env = ServingEnv("Tiny-v0")
    env.reset(seed=0)
    refused(lambda: env.step(bad), "action must be a whole number, got ")


@pytest.mark.parametrize(("bad", "good"), [(-1, 1), (7, 6), (10**30, 0)])
def test_action_out_of_range(bad: int, good: int, three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    refused(lambda: env.step(bad), f"action must lie in 0 … 6, got {bad}")
    env.step(good)


@pytest.mark.parametrize("make", [int, np.int8, np.uint64, np.int64, np.array])
def test_actions_of_any_integer_type(make: Callable[[int], Any], three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    env.step(make(5))
    assert env.view().active == 1


BAD_ROWS: list[tuple[Any, str]] = [
    ([1.7, 2], "be whole numbers, got [1.7, 2]"),
    ([3.0, 3.0], "be whole numbers"),
    (np.array([np.nan, 3]), "be whole numbers"),
    (["2", "3"], "be whole numbers, got ['2', '3']"),
    ("23", "be whole numbers, got '23'"),
    ([True, False], "be whole numbers"),
    ([None, 3], "be whole numbers"),
    (None, "be whole numbers, got None"),
    (np.array([3, 3], object), "be whole numbers"),
    ([10**30, 3], "be whole numbers"),
    ([[3], [3, 4]], "be whole numbers"),
    ({3, 4}, "be whole numbers"),
    (np.array([3, 3], "m8[s]"), "be whole numbers"),
    (3, "have shape (2,), got ()"),
    ([3], "have shape (2,), got (1,)"),
    ([3, 3, 3], "have shape (2,), got (3,)"),
    ([[3, 3]], "have shape (2,), got (1, 2)"),
    ([0, 7], "lie in 0 … 6, got 0 … 7"),
    ([-1, 0], "lie in 0 … 6, got -1 … 0"),
    (np.array([2**63, 0], np.uint64), "lie in 0 … 6"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_ROWS)
def test_bad_actions_of_rows(bad: Any, words: str) -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    refused(lambda: env.step([3, 3]), "call reset() before step()")
    env.reset(seed=0)
    refused(lambda: env.step(bad), f"actions must {words}")


@pytest.mark.parametrize(
    "good",
    [(3, 3), np.array([3, 3], np.int8), np.array([3, 9, 3])[::2], np.array([3, 3], ">u4")],
)
def test_good_actions_of_rows(good: Any) -> None:
    env, twin = ServingVectorEnv(2, "Tiny-v0"), ServingVectorEnv(2, "Tiny-v0")
    env.reset(seed=0)
    twin.reset(seed=0)
    assert env.step(good)[0].tobytes() == twin.step([3, 3])[0].tobytes()


# ---- seeds and reset options -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [*NO_WHOLE_NUMBERS, -1, np.int64(-1), [1, 2], {}])
def test_bad_seeds(bad: Any) -> None:
    env = ServingEnv("Tiny-v0")
    if bad is not None:  # draw one
        refused(lambda: env.reset(seed=bad), "seed must be ")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        *((bad, "seed must be a whole number") for bad in ("12", 1.0, True, {1, 2}, [1.0, 2])),
        *((bad, "seed must be ≥ 0, got -1") for bad in (-1, [1, -1], np.array([-1, 2]))),
        *(
            (bad, "2 environments need as many seeds, got ")
            for bad in ([1], [[1, 2]], [], (1, 2, 3))
        ),
    ],
)
def test_bad_seeds_of_rows(bad: Any, words: str) -> None:
    """If one seed is bad, no row is reset."""
    env = ServingVectorEnv(2, "Tiny-v0")
    env.reset(seed=3)
    before = env.state.episodes["bound_s"].copy()
    refused(lambda: env.reset(seed=bad), words)
    assert np.array_equal(env.state.episodes["bound_s"], before)


@pytest.mark.parametrize(
    "seed", [3, np.int64(3), [3, 4], (3, np.uint8(4)), np.array([3, 4]), range(3, 5)]
)
def test_good_seeds(seed: Any) -> None:
    rows, _ = ServingVectorEnv(2, "Tiny-v0").reset(seed=seed)
    for e in range(2):
        single, _ = ServingEnv("Tiny-v0").reset(seed=np.int16(3 + e))
        assert single.tobytes() == rows[e].tobytes()


@pytest.mark.parametrize("bad", [0, "", [], [1], "requests", 3, False])
def test_reset_options_are_a_table(bad: Any) -> None:
    refused(lambda: ServingEnv("Tiny-v0").reset(options=bad), "reset options must be a table")
    refused(lambda: ServingVectorEnv(2, "Tiny-v0").reset(options=bad), "takes no reset options but")
