"""Cost models: what they refuse, what they are lowered to, and the shipped presets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.envs import ServegymError
from servegym.envs.machine.costs import (
    MAX_COST_S,
    MIN_COST_S,
    AffineDecode,
    AffinePrefill,
    EngineOverhead,
    LevelledPrefill,
    StageCosts,
    TableDecode,
    geometric_levels,
)
from servegym.envs.machine.presets import COST_PRESETS, cost_preset
from servegym.envs.simulator.seconds import decode_seconds, prefill_seconds
from tests.helpers import random_costs
from tests.reference_simulator import decode_round_s, prefill_stage_s

NAN, INF = float("nan"), float("inf")
TINY = MIN_COST_S


def rows_of(make: Callable[..., Any], good: dict[str, Any], *rows: tuple[str, Any, Any]) -> list:
    """Rows of (class, right arguments, key, bad value, legal neighbour) of one class."""
    return [(make, good, key, bad, legal) for key, bad, legal in rows]


BAD_COSTS = [
    *rows_of(
        AffineDecode,
        {"base": 1.0, "per_client": 1.0, "per_kv_token": 1.0},
        ("base", 0.0, TINY),  # a round takes time
        ("base", -1.0, 1.0),
        ("base", NAN, 1.0),
        ("base", INF, MAX_COST_S),
        ("per_client", -TINY, 0.0),
        ("per_client", NAN, 0.0),
        ("per_client", INF, 0.0),
        ("per_client", 1e308, MAX_COST_S),
        ("per_kv_token", -TINY, 0.0),
        ("per_kv_token", NAN, 0.0),
        ("per_kv_token", 5e-324, TINY),
        ("per_client_kv_token", -TINY, 0.0),
        ("per_client_kv_token", NAN, TINY),
        ("per_client_kv_token", 1.1e9, MAX_COST_S),
    ),
    *rows_of(
        TableDecode,
        {"batch": (1, 2), "seconds": (1.0, 2.0), "per_kv_token": 1.0},
        ("batch", (2, 2), (2, 3)),  # strictly increasing
        ("batch", (2, 1), (1, 2)),
        ("batch", (0, 1), (1, 2)),  # a batch has someone in it
        ("batch", (-1, 1), (1, 2)),
        ("batch", (1, 10**15 + 1), (1, 10**15)),
        ("batch", (1,), (1, 2)),  # as many batches as times
        ("seconds", (1.0,), (1.0, 2.0)),
        ("seconds", (0.0, 2.0), (TINY, 2.0)),
        ("seconds", (1.0, -1.0), (1.0, 0.5)),  # a dip is fine
        ("seconds", (NAN, 1.0), (1.0, 1.0)),
        ("seconds", (1.0, 1e308), (1.0, MAX_COST_S)),
        ("per_kv_token", -1.0, 0.0),
        ("per_kv_token", INF, 0.0),
        ("per_client_kv_token", -1.0, 0.0),
        ("per_client_kv_token", INF, TINY),
    ),
    *rows_of(
        AffinePrefill,
        {"base": 1.0, "per_token": 1.0, "per_token_squared": 1.0, "floor": 1.0},
        ("base", -TINY, 0.0),
        ("base", NAN, 0.0),
        ("per_token", -1.0, 0.0),
        ("per_token", INF, 0.0),
        ("per_token_squared", -1.0, 0.0),
        ("per_token_squared", NAN, 0.0),
        ("per_batch_token_squared", -1.0, 0.0),
        ("per_batch_token_squared", NAN, TINY),
        ("floor", -1.0, 0.0),
        ("floor", INF, 0.0),
        ("floor", 1.1e9, MAX_COST_S),
        ("per_token", 9e-31, TINY),
    ),
    *rows_of(
        LevelledPrefill,
        {"level_tokens": (4, 8), "level_seconds": (1.0, 2.0)},
        ("level_tokens", (4, 4), (4, 5)),
        ("level_tokens", (8, 4), (4, 8)),
        ("level_tokens", (0, 4), (1, 4)),  # a level holds at least one token
        ("level_tokens", (4, 2**63), (4, 10**15)),
        ("level_tokens", (4,), (4, 8)),
        ("level_seconds", (2.0, 1.0), (2.0, 2.0)),  # a larger stage is never cheaper
        ("level_seconds", (0.0, 1.0), (TINY, 1.0)),
        ("level_seconds", (NAN, 1.0), (1.0, 1.0)),
        ("level_seconds", (1.0, 1e300), (1.0, MAX_COST_S)),
    ),
    *rows_of(
        EngineOverhead,
        {"base": 1.0, "per_client": 1.0},
        ("base", -TINY, 0.0),
        ("base", NAN, 0.0),
        ("per_client", -1.0, 0.0),
        ("per_client", INF, 0.0),
    ),
]


@pytest.mark.parametrize(("make", "good", "key", "bad", "legal"), BAD_COSTS)
def test_bad_cost(
    make: Callable[..., Any], good: dict[str, Any], key: str, bad: Any, legal: Any
) -> None:
    with pytest.raises(ServegymError, match=key):
        make(**(good | {key: bad}))
    assert getattr(make(**(good | {key: legal})), key) == legal


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("make", [TableDecode, LevelledPrefill])
def test_every_time_of_a_table_is_finite(make: Callable[..., Any], bad: float) -> None:
    with pytest.raises(ServegymError):
        make((1, 2), (1.0, bad))


def test_empty_tables_are_refused() -> None:
    with pytest.raises(ServegymError, match="not empty, got 0 and 0"):
        TableDecode((), ())
    with pytest.raises(ServegymError, match="not empty, got 0 and 0"):
        LevelledPrefill((), ())


def test_a_stage_must_take_time() -> None:
    with pytest.raises(ServegymError, match=r"prefill .* per_token_squared and floor are all 0"):
        AffinePrefill(0.0, 0.0)
    for legal in [(TINY, 0), (0, TINY), (0, 0, TINY), (0, 0, 0, TINY), (0, 0, 0, 0, TINY)]:
        AffinePrefill(*legal)


# ---- lowering -------------------------------------------------------------------------------


def test_table_is_interpolated_and_clamped_with_one_warning() -> None:
    """One warning for the table, not one for every batch beyond it."""
    model = StageCosts(TableDecode((2, 4, 8), (1.0, 2.0, 1.0)), AffinePrefill(1.0, 0.0))
    with pytest.warns(UserWarning, match=r"decode table ends at batch 8; up to 20 ") as caught:
        tables = model.tables(20)
    assert len(caught) == 1
    expected = [1, 1, 1.5, 2, 1.75, 1.5, 1.25, 1, 1, 1]  # from 1 client on
    assert tables.decode_base_s[0, 1:11].tolist() == expected
    assert (tables.decode_base_s[0, 9:] == 1.0).all()


def test_table_that_reaches_far_enough_does_not_warn() -> None:
    model = StageCosts(TableDecode((2, 4, 8), (1.0, 2.0, 1.0)), AffinePrefill(1.0, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables = model.tables(8)
    assert tables.decode_base_s[0, 8] == 1.0
    assert tables.decode_base_s[0, 1] == 1.0  # below its first batch it is clamped without a word


@pytest.mark.parametrize("seed", range(40))
def test_formulas_agree_with_the_reference(seed: int) -> None:
    """The kernels' formulas against the obvious ones, on any model, batch and cache."""
    rng = np.random.default_rng(seed)
    clients = int(rng.integers(1, 30))
    model = random_costs(rng, clients, dyadic=False)
    shared = float(rng.choice([0.0, 1e-6, 1e-3]))
    model = replace(model, decode=replace(model.decode, per_client_kv_token=shared))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tables may end early
        tables = model.tables(clients)
    for _ in range(20):
        active, cached = int(rng.integers(1, clients + 1)), int(rng.integers(0, 10**6))
        rounds = int(rng.integers(1, 9))
        each = [decode_round_s(model, active, cached + k * active) for k in range(rounds)]
        assert decode_seconds(tables, 0, active, cached, rounds) == pytest.approx(sum(each))
        prompts = [int(p) for p in rng.integers(1, 200, int(rng.integers(1, 9)))]
        squares = sum(p * p for p in prompts)
        ours = prefill_seconds(tables, 0, sum(prompts), squares, len(prompts))
        assert ours == pytest.approx(prefill_stage_s(model, prompts))


def test_no_rounds_take_no_time() -> None:
    tables = cost_preset("llama2-70b-a100x4").costs.tables(3)
    assert decode_seconds(tables, 0, 2, 1000, 0) == 0.0


def test_geometric_levels() -> None:
    """Tops grow by a constant factor, each costs what the line asks there, the floor holds."""
    line = AffinePrefill(1.0, 0.25, per_token_squared=9.0, floor=3.0)
    levels = geometric_levels(line, 5, 4, 1024)
    assert levels == LevelledPrefill((4, 16, 64, 256, 1024), (3.0, 5.0, 17.0, 65.0, 257.0))


def test_geometric_levels_that_round_to_one_are_one() -> None:
    levels = geometric_levels(AffinePrefill(1.0, 1.0), 9, 1, 4)
    assert levels.level_tokens == (1, 2, 3, 4)


# ---- presets --------------------------------------------------------------------------------

# The published fits, in the words of their table.
FITS = {
    "llama2-70b-a100x4": (0.03756, 1.050e-4, 5.940e-8, 0.02787, 1.704e-4, 4.826e-9, 0.0374),
    "llama2-70b-a100x8": (0.02432, 9.336e-5, 3.419e-8, 0.02109, 1.137e-4, 2.0e-10, 0.0253),
    "llama2-70b-h100x4": (0.02577, 1.880e-5, 2.601e-8, 0.01617, 6.108e-5, 2.100e-9, 0.0268),
    "llama2-70b-h100x8": (0.01708, 3.855e-5, 1.609e-8, 0.01515, 4.247e-5, 0.0, 0.0198),
    "llama3-8b-a100x1": (0.01066, 4.676e-5, 6.547e-8, 0.00611, 6.079e-5, 3.809e-9, 0.0113),
    "llama2-7b-a100x1": (0.00929, 4.587e-5, 3.143e-7, 0.00718, 5.478e-5, 5.060e-9, 0.0111),
    "llama2-7b-h100x1": (0.00601, 2.596e-5, 1.549e-7, 0.00663, 1.706e-5, 1.699e-9, 0.0074),
}


@pytest.mark.parametrize("name", FITS)
def test_preset_holds_the_published_fit(name: str) -> None:
    expected = StageCosts(AffineDecode(*FITS[name][:3]), AffinePrefill(*FITS[name][3:]))
    assert cost_preset(name).costs == expected


MEASURED_MS = (
    "1:40.1 8:40.5 16:41.4 24:36.2 32:35.1 48:40.0 64:42.8 96:47.3 128:47.9 144:55.2 160:57.8 "
    "176:59.4 200:64.1"
)


def test_table_preset_holds_the_measured_times() -> None:
    tables = cost_preset("llama2-70b-a100x4-table").costs.tables(200)
    assert tables.rates[0].decode_per_kv_token_s == 5.973e-8
    for pair in MEASURED_MS.split():
        batch, milliseconds = pair.split(":")
        assert tables.decode_base_s[0, int(batch)] == pytest.approx(float(milliseconds) / 1000)


@pytest.mark.parametrize("name", COST_PRESETS)
def test_every_preset_can_be_used_and_names_its_source(name: str) -> None:
    preset = cost_preset(name)
    assert preset.source
    tables = preset.costs.tables(200)
    assert (tables.decode_base_s[0] > 0).all()
    assert prefill_seconds(tables, 0, 70, 4900, 1) > 0


def test_unknown_preset() -> None:
    with pytest.raises(ServegymError, match="unknown cost preset 'llama2-70b-a100'; did you mean "):
        cost_preset("llama2-70b-a100")
