"""The rule ``scored`` as its docstring says it, request by request (``workload.scoring``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.envs.workload.scoring import ScoreWeights, Scoring


def saturated(x: float, scale: float) -> float:
    return x / (1 + x / scale)


def rounds_to_target(finish: int, targets: Sequence[int], late: float) -> float:
    """From a finish to the first target at or after it; past the last one, so many times the rounds."""
    after = [target - finish for target in targets if target >= finish]
    return min(after) if after else late * (finish - max(targets))


def score(
    rounds: int, count: int, clock: int, scoring: Scoring, together: Sequence[int]
) -> float | None:
    """Of a request of so many rounds at a decode clock; None: it is no candidate.

    ``together``: decode clocks at which several running requests finish, which count without a calendar.
    """
    w, calendar = scoring.weights, scoring.calendar.tolist()
    if not calendar:
        if not any(target >= clock + rounds for target in together):
            return None
        now = rounds_to_target(clock + rounds, together, w.late)
        return w.length * rounds - w.pad * saturated(now, w.pad_scale) + w.count * count
    end = calendar[-1]
    h = min(clock / end, 1.0)
    now = rounds_to_target(clock + rounds, calendar, w.late)
    later = [
        rounds_to_target(stage + rounds, calendar, w.late)
        for stage in calendar[:-1]
        if stage > clock
    ]
    total = (w.length + w.length_slope * h) * rounds - w.pad * saturated(now, w.pad_scale)
    total += (w.later + w.later_slope * h) * saturated(min(later, default=1e9), w.later_scale)
    total += w.count * count
    before_end = end - (clock + rounds)
    near = 1.0 if before_end <= 0 else w.urgent_scale / (w.urgent_scale + before_end)
    return total + (w.urgent + w.urgent_slope * h) * near**2


def random_scoring(rng: np.random.Generator) -> Scoring:
    """Weights that are whole numbers, so that sums are exact, but for slopes; half without a calendar."""
    whole = {name: float(rng.integers(-3, 4)) for name in ("length", "later", "count", "urgent")}
    weights = ScoreWeights(
        pad=float(rng.integers(0, 5)),
        late=float(rng.integers(0, 4)),
        length_slope=float(rng.choice([0.0, 0.37])),
        later_slope=float(rng.choice([0.0, -0.53])),
        urgent_slope=float(rng.choice([0.0, 1.7])),
        pad_scale=float(rng.choice([7.3, 1e12])),
        later_scale=float(rng.choice([5.1, 1e12])),
        urgent_scale=float(rng.choice([3.3, 40.0])),
        shortest_share=float(rng.choice([0.0, 0.25, 0.5])),
        tail=float(rng.choice([0.0, 0.5, 2.0])),
        **whole,
    )
    if rng.random() < 0.3:
        return Scoring(weights)
    steps = rng.integers(1, 12, int(rng.integers(2, 12)))
    return Scoring(weights, np.cumsum(steps) - int(rng.random() < 0.7) * steps[0])
