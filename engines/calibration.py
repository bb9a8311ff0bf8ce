"""A cost model from the iterations of an engine, and how well it says what they took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from servegym.engines.iterations import Iteration
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import read_text
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts

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

    decode: AffineDecode
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


def fit_costs(log: pd.DataFrame, form: str = "best") -> Fit:
    """Fit a cost model to a log by non-negative least squares on relative errors.

    Parameters
    ----------
    log
        Columns as ``COLUMNS``, and ``prompt_squares`` for the form ``prompts``.
    form
        One of ``FORMS``; or ``best``, the one with the least mean squared error.

    Raises
    ------
    ServegymError
        If the log holds fewer than ``LEAST`` iterations of a kind, or lacks what the form needs.
    """
    if form not in (*FORMS, "best"):
        raise unknown("form of prefill", form, (*FORMS, "best"))
    for kind in KINDS:
        count = int((log["kind"] == kind).sum())
        if count < LEAST:
            raise ServegymError(
                f"the log has {count} iterations of kind {kind}, a fit needs {LEAST}"
            )
    if form == "prompts" and "prompt_squares" not in log:
        raise ServegymError("the form prompts needs the column prompt_squares in the log")
    decode, decode_quality, _ = _fitted(log[log["kind"] == "decode"], ("requests", "cached_tokens"))
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
    base, per_client, per_kv_token = map(float, decode)
    rounds = AffineDecode(max(base, _LEAST_S), per_client, per_kv_token)
    return Fit(rounds, prefill, best, decode_quality, prefill_quality)


def predicted_seconds(costs: StageCosts, log: pd.DataFrame) -> Floats:
    """Return what each iteration of a log takes by an affine cost model, without floor and overhead."""
    decode, prefill = costs.decode, costs.prefill
    if not isinstance(decode, AffineDecode) or not isinstance(prefill, AffinePrefill):
        raise ServegymError("only affine costs are compared with a log")
    rounds = _columns(log, ("requests", "cached_tokens")) @ [
        decode.base,
        decode.per_client,
        decode.per_kv_token,
    ]
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
    """Return the section ``[cost]`` of a task's TOML file for affine costs."""
    decode, prefill = costs.decode, costs.prefill
    if not isinstance(decode, AffineDecode) or not isinstance(prefill, AffinePrefill):
        raise ServegymError("only affine costs are written")
    parts = {
        "decode": {
            "base": decode.base,
            "per_client": decode.per_client,
            "per_kv_token": decode.per_kv_token,
        },
        "prefill": {
            "base": prefill.base,
            "per_token": prefill.per_token,
            "per_token_squared": prefill.per_token_squared,
            "per_batch_token_squared": prefill.per_batch_token_squared,
        },
    }
    lines = ["[cost]", 'model = "affine"']
    for name, values in parts.items():
        inner = ", ".join(f"{key} = {_rounded(value)!r}" for key, value in values.items())
        lines.append(f"{name} = {{{inner}}}")
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _columns(log: pd.DataFrame, names: Sequence[str]) -> Floats:
    """Return a column of ones and those named, shape (rows, 1 + names)."""
    tokens = log["tokens"].to_numpy(dtype=float)
    named = [
        tokens**2 if name == "tokens_squared" else log[name].to_numpy(dtype=float) for name in names
    ]
    return np.stack([np.ones(len(log)), *named], axis=1)


def _fitted(log: pd.DataFrame, names: Sequence[str]) -> tuple[Floats, Quality, float]:
    """Return coefficients of 1 and the named columns, their quality, and the mean squared error."""
    measured = log["seconds"].to_numpy(dtype=float)
    columns = _columns(log, names)
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
