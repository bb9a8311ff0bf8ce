"""A cost model from the iterations of an engine, and how well it says what they took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from servegym.engines.iterations import Iteration
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import read_text
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts, TableDecode

Floats = NDArray[np.float64]

KINDS: Final = ("prefill", "decode")

COLUMNS: Final = ("kind", "requests", "tokens", "cached_tokens", "seconds")
"""Of a log of iterations; ``prompt_squares``, Σp² of a prefill, may stand beside them."""

FORMS: Final = {
    "linear": ("tokens",),
    "prompts": ("tokens", "prompt_squares"),
    "batch": ("tokens", "tokens_squared"),
}
"""What a prefill's seconds grow with: tokens, and Σp² or T²."""

ROUNDS: Final = ("line", "table", "batch")
"""What decode rounds take beside a rate per cached token: a line in the clients, a table by them, or the line
and a rate per client and cached token."""

KNOTS: Final = 6
"""Most numbers of clients by which a table is fitted; between them it is interpolated."""

LEAST: Final = 10
"""Fewest iterations of a kind that are fitted."""

_LEAST_S: Final = 1e-9

_LIMITS: Final = {
    "requests": (1.0, 1e12),
    "tokens": (1.0, 1e12),
    "cached_tokens": (0.0, 1e15),
    "seconds": (_LEAST_S, 1e9),
    "prompt_squares": (0.0, 1e24),
}
"""Of a log's columns; squares and sums within them are finite."""

_PASSES: Final = 4
"""Errors are taken relative to the measured seconds, then to the predicted ones: the former alone would have
the noise of measuring make all predictions too low."""


@dataclass(frozen=True)
class Quality:
    """How well a fit says what iterations took. Errors are shares of the measured time."""

    iterations: int
    r_squared: float
    median_error: float
    worst_error: float


@dataclass(frozen=True)
class Fit:
    """A fitted cost model."""

    decode: AffineDecode | TableDecode
    prefill: AffinePrefill
    form: str
    """Which of ``FORMS`` prefill has."""
    decode_quality: Quality
    prefill_quality: Quality

    @property
    def costs(self) -> StageCosts:
        """What a task takes."""
        return StageCosts(self.decode, self.prefill)


def table_of(
    iterations: Iterable[Iteration], seconds: Literal["cpu", "wall"] = "cpu"
) -> pd.DataFrame:
    """Return a log of iterations, one a row, with ``prompt_squares``.

    Examples
    --------
    >>> print(table_of([Iteration("prefill", (0, 1), (3, 4), 0, cpu_s=0.5)]).to_string(index=False))
       kind  requests  tokens  cached_tokens  seconds  prompt_squares
    prefill         2       7              0      0.5              25
    """
    rows = [
        (
            each.kind,
            len(each.ids),
            sum(each.tokens),
            each.cached_tokens,
            each.cpu_s if seconds == "cpu" else each.wall_s,
            sum(tokens**2 for tokens in each.tokens) if each.kind == "prefill" else 0,
        )
        for each in iterations
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS, "prompt_squares"])


def read_log(path: Path) -> pd.DataFrame:
    """Read a log of iterations from a CSV.

    Raises
    ------
    ServegymError
        If it cannot be read, lacks a column, or a row holds what no iteration can be.
    """
    read_text(path, "log of iterations")  # refuses what is no file, or no text
    try:
        table = pd.read_csv(path)
    except (ValueError, pd.errors.ParserError) as error:
        raise ServegymError(f"{path}: not a CSV: {str(error).splitlines()[0]}") from None
    for name in COLUMNS:
        if name not in table:
            raise ServegymError(
                f"{path}: no column {name}; a log of iterations has {', '.join(COLUMNS)}"
            )
    numbers = [name for name in (*COLUMNS[1:], "prompt_squares") if name in table]
    for name in numbers:
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=float)
        least, most = _LIMITS[name]
        bad = ~((values >= least) & (values <= most))  # NaN, too
        if name != "seconds":
            bad |= values != np.floor(values)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            kind = "a number" if name == "seconds" else "a whole number"
            raise ServegymError(
                f"{path}: line {row + 2}: {name} must be {kind} in {least:g} … {most:g}, got "
                f"{table[name][row]}"
            )
        table[name] = values
    for row, kind in enumerate(table["kind"]):
        if kind not in KINDS:
            raise ServegymError(f"{path}: line {row + 2}: {unknown('kind', str(kind), KINDS)}")
    return table


def fit_costs(log: pd.DataFrame, form: str = "best", rounds: str = "line") -> Fit:
    """Fit a cost model to a log by non-negative least squares on relative errors.

    Parameters
    ----------
    log
        Columns as ``COLUMNS``, and ``prompt_squares`` for the form ``prompts``.
    form
        One of ``FORMS``; or ``best``, the one with the least mean squared error.
    rounds
        One of ``ROUNDS``. A table needs a log in which few clients hold much as well as little.

    Raises
    ------
    ServegymError
        If the log holds fewer than ``LEAST`` iterations of a kind, or lacks what the form needs.
    """
    if form not in (*FORMS, "best"):
        raise unknown("form of prefill", form, (*FORMS, "best"))
    if rounds not in ROUNDS:
        raise unknown("form of decode rounds", rounds, ROUNDS)
    for kind in KINDS:
        count = int((log["kind"] == kind).sum())
        if count < LEAST:
            raise ServegymError(
                f"the log has {count} iterations of kind {kind}, a fit needs {LEAST}"
            )
    if form == "prompts" and "prompt_squares" not in log:
        raise ServegymError("the form prompts needs the column prompt_squares in the log")
    decode, decode_quality = _fitted_rounds(log[log["kind"] == "decode"], rounds)
    prefills = log[log["kind"] == "prefill"]
    forms = (
        [form]
        if form != "best"
        else [name for name in FORMS if name != "prompts" or "prompt_squares" in log]
    )
    fits = {name: _fitted(prefills, FORMS[name]) for name in forms}
    best = min(fits, key=lambda name: fits[name][2])
    coefficients, prefill_quality, _ = fits[best]
    squared = float(coefficients[2]) if len(coefficients) > 2 else 0.0
    prefill = AffinePrefill(
        max(float(coefficients[0]), _LEAST_S),
        float(coefficients[1]),
        squared if best == "prompts" else 0.0,
        0.0,
        squared if best == "batch" else 0.0,
    )
    return Fit(decode, prefill, best, decode_quality, prefill_quality)


def predicted_seconds(costs: StageCosts, log: pd.DataFrame) -> Floats:
    """Return what each iteration of a log takes by an affine prefill, without floor and overhead."""
    decode, prefill = costs.decode, costs.prefill
    if not isinstance(prefill, AffinePrefill):
        raise ServegymError("only costs with an affine prefill are compared with a log")
    requests = log["requests"].to_numpy(dtype=float)
    if isinstance(decode, TableDecode):
        rounds = np.interp(requests, decode.batch, decode.seconds)
    else:
        rounds = decode.base + decode.per_client * requests
    token_s = decode.per_kv_token + decode.per_client_kv_token * requests
    rounds = rounds + token_s * log["cached_tokens"].to_numpy(dtype=float)
    stages = _columns(log, ("tokens", "tokens_squared")) @ [
        prefill.base,
        prefill.per_token,
        prefill.per_batch_token_squared,
    ]
    if prefill.per_token_squared > 0:
        stages = stages + prefill.per_token_squared * log["prompt_squares"].to_numpy(dtype=float)
    return np.where(log["kind"] == "decode", rounds, stages)


def quality(measured: Floats, predicted: Floats) -> Quality:
    """Return R² and errors of a prediction."""
    errors = np.abs(predicted / measured - 1.0)
    spread = float(((measured - measured.mean()) ** 2).sum())
    left = float(((measured - predicted) ** 2).sum())
    return Quality(
        len(measured),
        1.0 - left / spread if spread > 0 else float("nan"),
        float(np.median(errors)),
        float(errors.max()),
    )


def cost_section(costs: StageCosts) -> str:
    """Return the section ``[cost]`` of a task's TOML file for costs with an affine prefill."""
    decode, prefill = costs.decode, costs.prefill
    if not isinstance(prefill, AffinePrefill):
        raise ServegymError("only costs with an affine prefill are written")
    model = "table" if isinstance(decode, TableDecode) else "affine"
    lines = ["[cost]", f'model = "{model}"']
    for name, part in (("decode", decode), ("prefill", prefill)):
        values = {key: _rounded(value) for key, value in asdict(part).items()}
        inner = ", ".join(f"{key} = {value!r}" for key, value in values.items())
        lines.append(f"{name} = {{{inner}}}")
    return "\n".join(lines) + "\n"


def _rounded(value: Any) -> Any:
    """Return numbers to six digits, and lists of them."""
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _columns(log: pd.DataFrame, names: Sequence[str]) -> Floats:
    """Return a column of ones and those named, shape (rows, 1 + names)."""
    return np.stack([np.ones(len(log)), *(_column(log, name) for name in names)], axis=1)


def _column(log: pd.DataFrame, name: str) -> Floats:
    """Return what iterations have of what their seconds may grow with, shape (rows,)."""
    if name == "tokens_squared":
        return _column(log, "tokens") ** 2
    if name == "client_tokens":
        return _column(log, "requests") * _column(log, "cached_tokens")
    return log[name].to_numpy(dtype=float)


def _fitted_rounds(log: pd.DataFrame, form: str) -> tuple[AffineDecode | TableDecode, Quality]:
    """Return what decode rounds cost, and how well that says it."""
    if form != "table":
        names = ("requests", "cached_tokens", *(["client_tokens"] if form == "batch" else []))
        found, said, _ = _fitted(log, names)
        base, *rates = map(float, found)
        return AffineDecode(max(base, _LEAST_S), *rates), said
    requests = log["requests"].to_numpy(dtype=float)
    knots = _knots(requests)
    shares = [np.interp(requests, knots, row) for row in np.eye(len(knots))]
    kv = log["cached_tokens"].to_numpy(dtype=float)
    found, said, _ = _solved(np.stack([*shares, kv], axis=1), log["seconds"].to_numpy(dtype=float))
    seconds = tuple(max(float(each), _LEAST_S) for each in found[:-1])
    return TableDecode(tuple(int(knot) for knot in knots), seconds, float(found[-1])), said


def _knots(requests: Floats) -> Floats:
    """Return numbers of clients that have been seen ``LEAST`` times, from the least to the most, by factors.

    Examples
    --------
    >>> _knots(np.repeat([1.0, 2.0, 3.0, 16.0], [10, 3, 10, 10]))
    array([ 1.,  3., 16.])
    """
    values, counts = np.unique(requests, return_counts=True)
    often = values[counts >= LEAST]
    often = often if len(often) else values
    wanted = np.geomspace(often[0], often[-1], KNOTS)
    return np.unique([often[np.abs(np.log(often / each)).argmin()] for each in wanted])


def _fitted(log: pd.DataFrame, names: Sequence[str]) -> tuple[Floats, Quality, float]:
    """Return coefficients of 1 and the named columns, their quality, and the mean squared error."""
    return _solved(_columns(log, names), log["seconds"].to_numpy(dtype=float))


def _solved(columns: Floats, measured: Floats) -> tuple[Floats, Quality, float]:
    """Return coefficients of columns, their quality, and the mean squared error."""
    predicted = measured
    for _ in range(_PASSES):
        coefficients = _weighted(columns, measured, 1.0 / predicted)
        predicted = np.maximum(columns @ coefficients, _LEAST_S)
    squared = float(((predicted / measured - 1.0) ** 2).mean())
    return coefficients, quality(measured, predicted), squared


def _weighted(columns: Floats, measured: Floats, weights: Floats) -> Floats:
    """Return non-negative coefficients with the least Σ (weight · (measured − predicted))²."""
    rows = columns * weights[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)  # so that the solver sees numbers of one size
    return np.asarray(nnls(rows / scale, measured * weights)[0] / scale)
