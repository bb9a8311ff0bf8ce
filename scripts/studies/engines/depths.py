"""What a stage costs by depth: a line through a few shallow models, checked at a deeper one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd

from servegym.engines.calibration import COLUMNS

COLUMNS_OF_CELLS: Final = (
    "kind",
    "mode",
    "requests",
    "cached",
    "new",
    "depth",
    "median_s",
    "p10_s",
    "p90_s",
)
"""Of a table of timed cells; ``cached`` and ``new`` tokens are those of each request."""

_CELL: Final = ["kind", "mode", "requests", "cached", "new"]

_SPLIT: Final = (128, 512)
"""Lengths of the prompts that make up a prefill, beside one prompt alone."""

LEAST_S: Final = 1e-9


class Cell(NamedTuple):
    """A stage: so many requests, each with cached tokens and new ones."""

    kind: str
    requests: int
    cached: int
    new: int

    @property
    def tokens(self) -> int:
        """What the keys and values of all its requests hold at its end."""
        return self.requests * (self.cached + self.new)


def cells(
    batches: Sequence[int], cached: Sequence[int], prompts: Sequence[int], most_tokens: int
) -> list[Cell]:
    """Return the decode rounds and prefills to be timed, without those that hold too many tokens.

    Examples
    --------
    >>> [tuple(cell)[1:] for cell in cells([1, 2], [7, 63], [16, 256], 128)]
    [(1, 7, 1), (1, 63, 1), (2, 7, 1), (2, 63, 1), (1, 0, 16)]
    >>> [tuple(cell)[1:] for cell in cells([], [], [256], 256)]
    [(1, 0, 256), (2, 0, 128)]
    """
    found = [Cell("decode", count, held, 1) for count in batches for held in cached]
    for tokens in prompts:
        lengths = [tokens, *(each for each in _SPLIT if each < tokens and tokens % each == 0)]
        found += [Cell("prefill", tokens // each, 0, each) for each in lengths]
    return [cell for cell in found if cell.tokens <= most_tokens]


def timed(
    todo: Iterable[Cell],
    depths: Sequence[int],
    modes: Sequence[str],
    measure: Callable[[Cell, int, str], Sequence[float]],
) -> Iterator[dict[str, object]]:
    """Yield a row of ``COLUMNS_OF_CELLS`` for each cell, mode and depth; prefills are ``eager`` alone."""
    for cell in todo:
        for mode in modes if cell.kind == "decode" else modes[:1]:
            for depth in depths:
                low, median, high = np.percentile(measure(cell, depth, mode), [10, 50, 90])
                values = (cell.kind, mode, *cell[1:], depth, median, low, high)
                yield dict(zip(COLUMNS_OF_CELLS, values, strict=True))


def extrapolated(table: pd.DataFrame, held_out: int, layers: int) -> pd.DataFrame:
    """Return a row a cell and mode: t(k) = t0 + k · layer, fitted without the depth held out.

    Columns besides the cell's: ``base_s``, ``layer_s`` ≥ 0, ``r_squared``, ``held_out_s`` as measured,
    ``predicted_s`` of it, and ``seconds`` at ``layers``.
    """
    rows = []
    for key, group in table.groupby(_CELL, sort=False):
        fitted = group[group["depth"] != held_out]
        depth, seconds = (fitted[name].to_numpy(dtype=float) for name in ("depth", "median_s"))
        slope, base = np.polyfit(depth, seconds, 1)
        slope = max(float(slope), 0.0)
        left = ((seconds - base - slope * depth) ** 2).sum()
        spread = ((seconds - seconds.mean()) ** 2).sum()
        deep = float(group.loc[group["depth"] == held_out, "median_s"].iloc[0])
        rows.append(
            dict(zip(_CELL, key, strict=True))
            | {"base_s": float(base), "layer_s": slope, "held_out_s": deep}
            | {"r_squared": 1.0 - left / spread if spread > 0 else float("nan")}
            | {
                "predicted_s": base + held_out * slope,
                "seconds": max(base + layers * slope, LEAST_S),
            }
        )
    return pd.DataFrame(rows)


def log_of(found: pd.DataFrame) -> pd.DataFrame:
    """Return the stages at full depth as a log of iterations, of which costs are fitted.

    Decode rounds are those replayed as a graph where there are such, else the eager ones.
    """
    graphs = bool((found["mode"] == "graph").any())
    decodes = found["kind"] == "decode"
    kept = found[~decodes | (found["mode"] == ("graph" if graphs else "eager"))]
    requests, prefill = kept["requests"], (kept["kind"] == "prefill")
    log = pd.DataFrame(
        {
            "kind": kept["kind"],
            "requests": requests,
            "tokens": requests * kept["new"],
            "cached_tokens": requests * (kept["cached"] + 1) * ~prefill,
            "seconds": kept["seconds"],
            "prompt_squares": requests * kept["new"] ** 2 * prefill,
        }
    )
    return log[[*COLUMNS, "prompt_squares"]].reset_index(drop=True)


def depth_table(found: pd.DataFrame, held_out: int) -> str:
    """Return how well lines say the depth held out, a row a kind and mode, in Markdown."""
    lines = [
        f"| stage | mode | cells | R² of the lines, least | error at depth {held_out}, median | worst |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for (kind, mode), group in found.groupby(["kind", "mode"], sort=False):
        errors = (group["predicted_s"] / group["held_out_s"] - 1).to_numpy()
        shown = np.median(errors), errors[np.abs(errors).argmax()]
        middle, worst = (round(float(error), 3) + 0.0 for error in shown)  # no −0
        lines.append(
            f"| {kind} | {mode} | {len(group)} | {group['r_squared'].min():.3f} | "
            f"{middle:+.1%} | {worst:+.1%} |"
        )
    return "\n".join(lines)
