"""What the tables of the study of agents are made of: intervals, paired differences, learning curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.playing.summary import (
    by_case,
    fixed,
    mean_interval,
    stratified_interval,
    with_interval,
)


def differences(episodes: pd.DataFrame, names: Sequence[str], rival: str) -> NDArray[np.float64]:
    """Return gap − gap of ``rival`` in points, case by case, shape (names, cases)."""
    return np.stack([np.subtract(*by_case(episodes, [name, rival])) for name in names])


def shown_interval(values: NDArray[np.float64]) -> str:
    """Format values of shape (runs, cases): Student's interval of one run, a bootstrap of several."""
    if len(values) == 1 or values.size == 0:
        return with_interval(values.ravel())
    mean, low, high = stratified_interval(values)
    return f"{fixed(mean)} [{fixed(low)}, {fixed(high)}]"


def curve_of(curves: pd.DataFrame, variant: str, seed: int) -> pd.DataFrame:
    """Return the evaluations of one training run, in order."""
    chosen = curves[(curves["variant"] == variant) & (curves["seed"] == seed)]
    if len(chosen) == 0:
        raise ServegymError(
            f"curves.csv: no evaluation of {variant}, seed {seed}; play again with --parts evaluate"
        )
    return chosen.sort_values("timesteps")


def verdict(differences: NDArray[np.float64]) -> str:
    """Format paired differences and say whether their 95 % interval excludes 0."""
    mean, half = mean_interval(differences)
    if abs(mean) > half:  # never for a single case: its interval is NaN
        return f"{with_interval(differences)} {'better' if mean < 0 else 'worse'}"
    return f"{with_interval(differences)} not clear"
