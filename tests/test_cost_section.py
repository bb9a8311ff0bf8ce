"""The [cost] section of task files: every family, what it refuses, and where messages point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from servegym.envs import ServegymError, load_task
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.machine.presets import cost_preset
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from tests.helpers import HUGE

Write = Callable[[str, str], Path]

AFFINE = 'model = "affine"\n'
TABLE = 'model = "table"\n'
LEVELS = 'model = "levelled"\n'
PREFILL = "prefill = {base = 1.0, per_token = 0.0}\n"

# The body of [cost], words of the message, and a legal neighbour.
BAD_COSTS = [
    # a part without a model: which family it belongs to is not guessed
    ("decode = {base = 1.0}\n", "cost.model is missing", AFFINE + "decode = {base = 1.0}\n"),
    # a part that is no table, or lacks a key, or has one too many
    (AFFINE + "decode = 1.0\n", "cost.decode must be a table", AFFINE + "decode = {base = 1}\n"),
    (AFFINE + "decode = {}\n", "cost.decode lacks 'base'", AFFINE + "decode = {base = 1.0}\n"),
    (
        AFFINE + "decode = {bsae = 1.0}\n",
        "unknown key 'cost.decode.bsae'; did you mean 'cost.decode.base'?",
        AFFINE + "decode = {base = 1.0}\n",
    ),
    (
        TABLE + "decode = {batch = [1, 2]}\n" + PREFILL,
        "cost.decode lacks 'seconds'",
        TABLE + "decode = {batch = [1, 2], seconds = [1, 2]}\n" + PREFILL,
    ),
    # another family needs its parts
    (TABLE, "cost.decode is missing for model 'table'", AFFINE),
    (
        LEVELS,
        "cost.prefill is missing for model 'levelled'",
        LEVELS + "prefill = {level_tokens = [9], level_seconds = [1]}\n",
    ),
    # values
    (
        AFFINE + "decode = {base = 0.0}\n",
        "decode.base must lie in 1e-30 … 1e+09 seconds, got 0.0",
        AFFINE + "decode = {base = 1e-9}\n",
    ),
    (
        AFFINE + "decode = {base = true}\n",
        "cost.decode.base must be a number, got True",
        AFFINE + "decode = {base = 1}\n",
    ),
    (
        AFFINE + "prefill = {base = 1.0, per_token = -0.1}\n",
        "prefill.per_token must be 0 or lie in 1e-30 … 1e+09 seconds, got -0.1",
        AFFINE + "prefill = {base = 1.0, per_token = 0.0}\n",
    ),
    (
        AFFINE + "prefill = {base = inf, per_token = 0.0}\n",
        "prefill.base must be 0 or lie in 1e-30 …",
        AFFINE + "prefill = {base = 1e9, per_token = 0.0}\n",
    ),
    (
        TABLE + "decode = {batch = [1, 2.5], seconds = [1, 2]}\n" + PREFILL,
        "cost.decode.batch[1] must be a whole number, got 2.5",
        TABLE + "decode = {batch = [1, 2], seconds = [1, 2]}\n" + PREFILL,
    ),
    (
        TABLE + "decode = {batch = 1, seconds = 1}\n" + PREFILL,
        "cost.decode.batch must be a list, got 1",
        TABLE + "decode = {batch = [1], seconds = [1]}\n" + PREFILL,
    ),
    (
        LEVELS + "prefill = {level_tokens = [9, 9], level_seconds = [1, 1]}\n",
        "prefill.level_tokens must strictly increase",
        LEVELS + "prefill = {level_tokens = [9, 10], level_seconds = [1, 1]}\n",
    ),
    (
        "engine_overhead = {base = -0.1}\n",
        "engine_overhead.base must be 0 or lie in 1e-30 …",
        "engine_overhead = {base = 0.0}\n",
    ),
    (
        "engine_overhead = 0.1\n",
        "cost.engine_overhead must be a table of keys, got 0.1",
        "engine_overhead = {base = 0.1}\n",
    ),
]


@pytest.mark.parametrize(("bad", "words", "good"), BAD_COSTS)
def test_bad_cost(write: Write, bad: str, words: str, good: str) -> None:
    path = write("bad.toml", "[cost]\n" + bad)
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith(f"{path}: line ")
    assert words in str(error.value)
    load_task(str(write("good.toml", "[cost]\n" + good)))


COST_LINES = [
    # the line that is wrong is the last one of the section
    "\n\n[cost]\n" + AFFINE + "decode = {base = 0.0}\n",
    "[cost]\n" + AFFINE + "\n" + PREFILL + "\ndecode = {base = 0.0}\n",
    "[cost]\n" + AFFINE + "[cost.decode]\nbase = 0.0\n",
    '[cluster]\nclients = 5\n\n[cost]\n# Which one?\n\npreset = "tyni"\n',
]


@pytest.mark.parametrize("text", COST_LINES)
def test_message_names_the_line_of_a_cost(write: Write, text: str) -> None:
    path = write("bad.toml", text + "\n[process]\nmax_decisions = 5\n")
    with pytest.raises(ServegymError, match=f": line {len(text.splitlines())}: "):
        load_task(str(path))


@pytest.mark.parametrize(
    "text",
    [
        f"[process]\nmax_seconds = {HUGE}\n",  # OverflowError
        f"[cost]\n{AFFINE}decode = {{base = {HUGE}}}\n",  # OverflowError
        '[cost]\nmodel = ["affine"]\n',  # TypeError: unhashable
    ],
)
def test_no_other_error_escapes(write: Write, text: str) -> None:
    with pytest.raises(ServegymError, match="line"):
        load_task(str(write("bad.toml", text)))


def test_cost_preset_with_a_part_replaced(write: Write) -> None:
    text = '[cost]\npreset = "llama2-7b-h100x1"\nmodel = "affine"\ndecode = {base = 0.5}\n'
    text += "engine_overhead = {per_client = 0.25}\n"
    preset = cost_preset("llama2-7b-h100x1").costs
    expected = StageCosts(AffineDecode(0.5), preset.prefill, EngineOverhead(0.0, 0.25))
    assert load_task(str(write("task.toml", text))).cost == expected


AFFINE_FILE = """
[cost]
model = "affine"
decode = {base = 1, per_client = 2, per_kv_token = 3}
prefill = {base = 1, per_token = 2, per_token_squared = 3, floor = 4}
"""
TABLE_FILE = """
[cost]
model = "table"
decode = {batch = [1, 8], seconds = [0.5, 1], per_kv_token = 0.25}
prefill = {base = 1, per_token = 2}
"""
LEVELLED_FILE = """
[cost]
model = "levelled"
[cost.decode]
base = 0.5
[cost.prefill]
level_tokens = [16, 64]
level_seconds = [2, 3]
"""
MODELS = [
    (AFFINE_FILE, StageCosts(AffineDecode(1.0, 2.0, 3.0), AffinePrefill(1.0, 2.0, 3.0, 4.0))),
    (TABLE_FILE, StageCosts(TableDecode((1, 8), (0.5, 1.0), 0.25), AffinePrefill(1.0, 2.0))),
    (LEVELLED_FILE, StageCosts(AffineDecode(0.5), LevelledPrefill((16, 64), (2.0, 3.0)))),
]


@pytest.mark.parametrize(("text", "expected"), MODELS)
def test_each_family(write: Write, text: str, expected: StageCosts) -> None:
    assert load_task(str(write("task.toml", text))).cost == expected


# What a mixed stage costs may stand in [cost], where engines have it, or in [cluster].

BAD_MIXED = [
    ('[cost]\nmixed = "both"\n', 2, "unknown value of cost.mixed: 'both'"),
    ("[cost]\n\nmixed = 1\n", 3, "cost.mixed must be a text, got 1"),
    ('[cluster]\nmixed = "sum"\n[cost]\nmixed = "sum"\n', 4, "cost.mixed and cluster.mixed are one"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "words"), BAD_MIXED)
def test_bad_mixed(write: Write, text: str, line: int, words: str) -> None:
    path = write("bad.toml", text)
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith(f"{path}: line {line}: {words}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", ["cost", "cluster"])
@pytest.mark.parametrize("mixed", ["one-pass", "sum"])
def test_mixed_in_either_section(write: Write, section: str, mixed: str) -> None:
    text = f'[{section}]\nmixed = "{mixed}"\n[cluster.link]\nlatency_s = 1\n'
    task = load_task(str(write("task.toml", text)))
    base = TASKS["servegym/GSM8K-v0"]
    assert (task.cluster.mixed, task.cost) == (mixed, base.cost)
    overrides = {"cost": {"preset": "tiny", "mixed": mixed}, "cluster": {"clients": 3}}
    for order in (1, -1):
        changed = with_overrides(base, dict(list(overrides.items())[::order]))
        assert (changed.cluster.mixed, changed.cluster.clients) == (mixed, 3)
        assert changed.cost == cost_preset("tiny").costs
