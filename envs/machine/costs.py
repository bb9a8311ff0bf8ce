"""What a stage costs in seconds: three families of models behind one Protocol.

Every family is lowered to the same :class:`CostTables`, which the simulator's kernels read; there
is one implementation of the formulas (``simulator/stages.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import check_fields, field_types, whole_numbers
from servegym.envs.bundle import Bundle
from servegym.envs.errors import ServegymError, shown

MIN_COST_S: Final = 1e-30
"""Least cost that is not 0, in seconds (or seconds a token): ratios of such costs are no fractions of 0."""

MAX_COST_S: Final = 1e9
"""Greatest cost, in seconds; the makespan of the largest instance is then a finite number."""

MAX_SIZE: Final = 10**15
"""Most tokens of a level, greatest batch of a table: a whole number that a 64-bit float can hold."""


def _refuse_costs(where: str, **values: float) -> None:
    """Refuse costs that are neither 0 nor a number of seconds that sums and ratios can do with."""
    for key, value in values.items():
        if value != 0 and not MIN_COST_S <= value <= MAX_COST_S:
            name = f"{where}.{key}"
            raise ServegymError(
                f"{name} must be 0 or lie in {MIN_COST_S:g} … {MAX_COST_S:g} seconds, got {value}",
                name,
            )


def _refuse_durations(where: str, **values: float) -> None:
    """Refuse costs as ``_refuse_costs`` does, and 0, too."""
    for key, value in values.items():
        if not MIN_COST_S <= value <= MAX_COST_S:
            name = f"{where}.{key}"
            raise ServegymError(
                f"{name} must lie in {MIN_COST_S:g} … {MAX_COST_S:g} seconds, got {value}", name
            )


def _refuse_sizes(name: str, values: Sequence[int]) -> None:
    for value in values:
        if not 1 <= value <= MAX_SIZE:
            raise ServegymError(f"{name} must lie in 1 … {MAX_SIZE}, got {value}", name)


def _refuse_unsorted(name: str, values: Sequence[float]) -> None:
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise ServegymError(f"{name} must strictly increase", name)


def _refuse_decreasing(name: str, values: Sequence[float]) -> None:
    if any(later < earlier for earlier, later in pairwise(values)):
        raise ServegymError(f"{name} must not decrease", name)


RATES: Final = np.dtype(
    [
        ("decode_per_kv_token_s", np.float64),  # per cached token at the round's start
        ("prefill_base_s", np.float64),
        ("prefill_per_token_s", np.float64),  # per prompt token
        ("prefill_per_token_squared_s", np.float64),  # per Σ p² of the admitted prompts
        ("prefill_floor_s", np.float64),  # shortest stage
        ("overhead_base_s", np.float64),  # CPU time added to every prefill stage
        ("overhead_per_client_s", np.float64),  # … and per admitted request
        (
            "prefill_per_batch_token_squared_s",
            np.float64,
        ),  # per T², T all prompt tokens of the stage
        ("decode_per_client_kv_token_s", np.float64),  # per active client and cached token
    ]
)


_PREFILL_RATES: Final = tuple(name for name in RATES.names or () if name.startswith("prefill_"))


@dataclass(frozen=True, eq=False)
class CostTables(Bundle):
    """Cost of stages as arrays; R replicas, J clients, L prefill levels (0 unless levelled).

    Examples
    --------
    >>> from servegym.envs import cost_preset
    >>> cost_preset("tiny").costs.tables(clients=3).decode_base_s.shape
    (1, 4)
    """

    decode_base_s: NDArray[np.float64]  # (R, J + 1) round with n active clients, without its cache
    rates: Any  # (R,) RATES, records
    prefill_level_tokens: NDArray[np.int64]  # (R, L) capacity of each level, ascending
    prefill_level_s: NDArray[np.float64]  # (R, L) cost of each level
    # (R, M + 1) decode line of a mixed stage of n tokens in all, without its cache; M = −1: none
    pass_base_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros((1, 0)))


@runtime_checkable
class CostModel(Protocol):
    """A cost model is anything that can be lowered to tables for a number of clients.

    ``StageCosts`` is one; an object of a user's own class with this method is another. A task's hash
    takes in its model's: a dataclass as a model must be frozen.

    Examples
    --------
    >>> from dataclasses import replace
    >>> class Doubled:
    ...     def tables(self, clients):
    ...         tables = cost_preset("tiny").costs.tables(clients)
    ...         return replace(tables, decode_base_s=2 * tables.decode_base_s)
    >>> from servegym.envs import TaskConfig, cost_preset, lower
    >>> isinstance(Doubled(), CostModel), lower(TaskConfig("mine", cost=Doubled())).clients
    (True, 200)
    """

    def tables(self, clients: int) -> CostTables:
        """Return the tables of one replica with ``clients`` clients."""
        ...


def checked_tables(tables: CostTables, clients: int) -> CostTables:
    """Return a user's tables of one replica as kernels read them, or refuse them in one line.

    Raises
    ------
    ServegymError
        If they are no ``CostTables``, an array has another shape, a duration is not in
        ``MIN_COST_S`` … ``MAX_COST_S``, a rate is not in 0 … ``MAX_COST_S``, or a level's tokens are
        no whole number.
    """
    if not isinstance(tables, CostTables):
        raise ServegymError(f"tables() of a cost model must return CostTables, got {shown(tables)}")
    try:
        rounds = np.array(tables.decode_base_s, dtype=float)
        tokens = np.array(tables.prefill_level_tokens)
        seconds = np.array(tables.prefill_level_s, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise ServegymError(f"the tables of a cost model must hold numbers: {error}") from None
    rates = np.asarray(tables.rates)
    if rounds.shape != (1, clients + 1):
        raise ServegymError(
            f"decode_base_s must have the shape (1, clients + 1) = (1, {clients + 1}), got "
            f"{rounds.shape}"
        )
    if rates.shape != (1,) or rates.dtype != RATES:
        raise ServegymError(
            "rates must be one record of the type servegym.envs.machine.costs.RATES"
        )
    if tokens.shape != seconds.shape or tokens.ndim != 2 or len(tokens) != 1:
        raise ServegymError(
            "prefill_level_tokens and prefill_level_s must both have the shape (1, levels), got "
            f"{tokens.shape} and {seconds.shape}"
        )
    tokens = whole_numbers("prefill_level_tokens", tokens[0], 1, MAX_SIZE)[None]
    _refuse_unsorted("prefill_level_tokens", tokens[0].tolist())
    _refuse_decreasing("prefill_level_s", seconds[0].tolist())
    for name, durations in (("decode_base_s", rounds[0, 1:]), ("prefill_level_s", seconds[0])):
        for place, duration in enumerate(durations.tolist()):
            _refuse_durations(name, **{str(place): duration})
    _refuse_costs("rates", **{name: float(rates[name][0]) for name in RATES.names or ()})
    if not seconds.size and not any(rates[name][0] for name in _PREFILL_RATES):
        raise ServegymError(
            "a prefill stage must take time without its overhead, too: "
            f"{', '.join(_PREFILL_RATES)} are all 0"
        )
    return CostTables(rounds, rates.view(np.recarray), tokens, seconds)


def costs_of(tables: CostTables, replica: int) -> CostTables:
    """Return the tables of one replica alone."""
    one = slice(replica, replica + 1)
    return CostTables(
        decode_base_s=tables.decode_base_s[one],
        rates=tables.rates[one],
        prefill_level_tokens=tables.prefill_level_tokens[one],
        prefill_level_s=tables.prefill_level_s[one],
        pass_base_s=tables.pass_base_s[one],
    )


def slowed(tables: CostTables, factors: NDArray[np.float64]) -> CostTables:
    """Return the tables of one replica for many, all seconds multiplied by ``factors`` (R,)."""
    rates = np.repeat(np.asarray(tables.rates), len(factors))
    for name in RATES.names or ():
        rates[name] *= factors
    return CostTables(
        decode_base_s=tables.decode_base_s * factors[:, None],
        rates=rates.view(np.recarray),
        prefill_level_tokens=np.repeat(tables.prefill_level_tokens, len(factors), axis=0),
        prefill_level_s=tables.prefill_level_s * factors[:, None],
        pass_base_s=tables.pass_base_s * factors[:, None],
    )


@dataclass(frozen=True)
class EngineOverhead:
    """CPU time of the serving engine, added to every stage: base + per_client · n, in seconds.

    n is the number of active clients of a decode round, of admitted requests of a prefill stage.

    Examples
    --------
    >>> EngineOverhead(base=0.001)
    EngineOverhead(base=0.001, per_client=0.0)
    """

    base: float = 0.0
    per_client: float = 0.0

    def __post_init__(self) -> None:
        check_fields("engine_overhead", self)
        _refuse_costs("engine_overhead", base=self.base, per_client=self.per_client)


@dataclass(frozen=True)
class AffineDecode:
    """Seconds of a decode round: base + per_client · n + per_kv_token · kv (base > 0).

    An engine that packs a round into one dense row pays for attention of every client over the cache of
    all: ``per_client_kv_token`` · n · kv is added.

    Examples
    --------
    >>> AffineDecode(base=0.02, per_client=1e-4).base_seconds(2)
    array([0.02  , 0.0201, 0.0202])
    """

    base: float
    per_client: float = 0.0
    per_kv_token: float = 0.0
    per_client_kv_token: float = 0.0

    def __post_init__(self) -> None:
        check_fields("decode", self)
        _refuse_costs(
            "decode",
            per_client=self.per_client,
            per_kv_token=self.per_kv_token,
            per_client_kv_token=self.per_client_kv_token,
        )
        _refuse_durations("decode", base=self.base)

    def base_seconds(self, clients: int) -> NDArray[np.float64]:
        """Return the round's time without its cache for n = 0 … clients, shape (clients + 1,)."""
        return self.base + self.per_client * np.arange(clients + 1.0)


@dataclass(frozen=True)
class TableDecode:
    """Decode time by batch size n, linearly interpolated, plus (per_kv_token + per_client_kv_token · n) · kv.

    Outside the measured batches the nearest measured time holds, with one warning.

    Examples
    --------
    >>> table = TableDecode(batch=(1, 100), seconds=(0.02, 0.05))
    >>> table.base_seconds(2)
    array([0.02      , 0.02      , 0.02030303])
    """

    batch: tuple[int, ...]
    seconds: tuple[float, ...]
    per_kv_token: float = 0.0
    per_client_kv_token: float = 0.0

    def __post_init__(self) -> None:
        check_fields("decode", self)
        if len(self.batch) != len(self.seconds) or not self.batch:
            raise ServegymError(
                "decode.batch and decode.seconds must be equally long and not empty, got "
                f"{len(self.batch)} and {len(self.seconds)}"
            )
        _refuse_unsorted("decode.batch", self.batch)
        _refuse_sizes("decode.batch", self.batch)
        for seconds in self.seconds:
            _refuse_durations("decode", seconds=seconds)
        _refuse_costs(
            "decode",
            per_kv_token=self.per_kv_token,
            per_client_kv_token=self.per_client_kv_token,
        )

    def base_seconds(self, clients: int) -> NDArray[np.float64]:
        """Return the round's time without its cache for n = 0 … clients, shape (clients + 1,)."""
        if clients > self.batch[-1]:
            warnings.warn(
                f"decode table ends at batch {self.batch[-1]}; up to {clients} clients its last "
                "time is used",
                stacklevel=2,
            )
        return np.interp(np.arange(clients + 1.0), self.batch, self.seconds)


@dataclass(frozen=True)
class AffinePrefill:
    """Seconds of a prefill stage: max(floor, base + per_token · T + per_token_squared · Σp²).

    An engine that packs a stage into one dense row pays for attention between all of its prompts, too:
    ``per_batch_token_squared`` · T² is added to the line before the floor.

    Examples
    --------
    >>> AffinePrefill(base=0.03, per_token=1e-4)
    AffinePrefill(base=0.03, per_token=0.0001, per_token_squared=0.0, floor=0.0, per_batch_token_squared=0.0)
    """

    base: float
    per_token: float
    per_token_squared: float = 0.0
    floor: float = 0.0
    per_batch_token_squared: float = 0.0

    def __post_init__(self) -> None:
        check_fields("prefill", self)
        _refuse_costs(
            "prefill",
            base=self.base,
            per_token=self.per_token,
            per_token_squared=self.per_token_squared,
            floor=self.floor,
            per_batch_token_squared=self.per_batch_token_squared,
        )
        squared = self.per_token_squared + self.per_batch_token_squared
        if self.base + self.per_token + squared + self.floor == 0:
            raise ServegymError(
                "prefill must cost something: base, per_token, per_token_squared and floor are all 0"
            )


@dataclass(frozen=True)
class LevelledPrefill:
    """The paper's prefill: a stage of T tokens costs the lowest level that holds T (Section IV).

    More tokens than the top level holds run as whole top levels plus a level for the rest.

    Examples
    --------
    >>> LevelledPrefill(level_tokens=(512, 1024), level_seconds=(0.1, 0.2))
    LevelledPrefill(level_tokens=(512, 1024), level_seconds=(0.1, 0.2))
    """

    level_tokens: tuple[int, ...]
    level_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields("prefill", self)
        if len(self.level_tokens) != len(self.level_seconds) or not self.level_tokens:
            raise ServegymError(
                "prefill.level_tokens and prefill.level_seconds must be equally long and not "
                f"empty, got {len(self.level_tokens)} and {len(self.level_seconds)}"
            )
        _refuse_unsorted("prefill.level_tokens", self.level_tokens)
        _refuse_sizes("prefill.level_tokens", self.level_tokens)
        for seconds in self.level_seconds:
            _refuse_durations("prefill", level_seconds=seconds)
        _refuse_decreasing("prefill.level_seconds", self.level_seconds)


def geometric_levels(
    prefill: AffinePrefill, levels: int, smallest_tokens: int, largest_tokens: int
) -> LevelledPrefill:
    """Return ``levels`` geometrically placed levels, each costing what ``prefill`` asks at its top."""
    tops = np.unique(np.geomspace(smallest_tokens, largest_tokens, levels).round().astype(int))
    seconds = np.maximum(prefill.floor, prefill.base + prefill.per_token * tops)
    return LevelledPrefill(tuple(int(top) for top in tops), tuple(float(s) for s in seconds))


@dataclass(frozen=True)
class StageCosts:
    """A cost model made of a decode part, a prefill part and the engine's overhead.

    Examples
    --------
    >>> costs = StageCosts(AffineDecode(0.02), AffinePrefill(0.03, 1e-4))
    >>> costs.tables(clients=2).decode_base_s
    array([[0.02, 0.02, 0.02]])
    """

    decode: AffineDecode | TableDecode
    prefill: AffinePrefill | LevelledPrefill
    engine_overhead: EngineOverhead = EngineOverhead()

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            part = getattr(self, name)
            if not isinstance(part, hint):
                raise ServegymError(f"{name} must be a {_named(hint)}, got {shown(part)}", name)

    def tables(self, clients: int) -> CostTables:
        """Lower to the kernels' tables for one replica of ``clients`` clients."""
        overhead = self.engine_overhead
        decode = self.decode.base_seconds(clients) + overhead.base
        decode += overhead.per_client * np.arange(clients + 1.0)
        prefill, levels = self.prefill, LevelledPrefill((1,), (1.0,))
        level_count = 0
        if isinstance(prefill, LevelledPrefill):
            levels, level_count = prefill, len(prefill.level_tokens)
            prefill = _proportional(levels)
        rates = (
            self.decode.per_kv_token,
            prefill.base,
            prefill.per_token,
            prefill.per_token_squared,
            prefill.floor,
            overhead.base,
            overhead.per_client,
            prefill.per_batch_token_squared,
            self.decode.per_client_kv_token,
        )
        return CostTables(
            decode_base_s=decode[None, :],
            rates=np.array([rates], dtype=RATES).view(np.recarray),
            prefill_level_tokens=np.array([levels.level_tokens[:level_count]], dtype=np.int64),
            prefill_level_s=np.array([levels.level_seconds[:level_count]], dtype=float),
        )


def _named(hint: Any) -> str:
    return " or ".join(cls.__name__ for cls in get_args(hint) or (hint,))


def _proportional(levels: LevelledPrefill) -> AffinePrefill:
    """Return the line below all levels: what a token costs where levels are best filled.

    The rest of a level's cost is what a stage costs for being a stage (its fixed part).
    """
    rate = min(s / t for s, t in zip(levels.level_seconds, levels.level_tokens, strict=True))
    return AffinePrefill(0.0, max(rate, MIN_COST_S))
