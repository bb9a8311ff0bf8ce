"""How the admission rule ``scored`` ranks waiting requests: weights, and a calendar of stages to fit to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import check_fields, whole_numbers
from servegym.envs.errors import ServegymError

MOST_STAGES: Final = 511
"""Most prefill stages of a calendar."""

_LATEST: Final = 1 << 40  # decode clock of a calendar's end


@dataclass(frozen=True)
class ScoreWeights:
    """Weights of the score of a waiting request of L expected rounds, at a stage at decode clock t.

    The request would finish at t + L and idle until the next *target*. Targets are the stages of the calendar
    and its end; without a calendar they are the decode clocks at which two running requests or more are
    expected to finish together.

        score = (length + length_slope · h) · L − pad · sat(now, pad_scale)
              + (later + later_slope · h) · sat(best, later_scale) + count · n
              + (urgent + urgent_slope · h) · u

        now   rounds from t + L to the next target; beyond the calendar's end, ``late`` times the rounds
              past it; without a calendar, no request that finishes beyond the last target is a candidate
        best  the least such rounds if it began at a later stage of the calendar instead
        n     requests of this length that wait
        u     1 if it would finish at the calendar's end or later, else (s / (s + d))² where it would finish
              d rounds before the end and s is ``urgent_scale``
        h     t as a share of the calendar's end
        sat   sat(x, s) = x / (1 + x / s)

    Terms of the calendar are 0 without one. Equal scores: the longer goes first.

    The defaults are the rule ``aligned``.

    Examples
    --------
    >>> ScoreWeights(pad=2.0).length
    1.0
    """

    length: float = 1.0
    length_slope: float = 0.0
    pad: float = 3.0
    pad_scale: float = 1e12
    later: float = 0.0
    later_slope: float = 0.0
    later_scale: float = 1e12
    count: float = 0.0
    urgent: float = 0.0
    urgent_slope: float = 0.0
    urgent_scale: float = 1.0
    late: float = 1.0
    shortest_share: float = 0.5
    """So large a share of those waiting, the shortest, are no candidates."""
    tail: float = 2.0
    """The longest goes first once no more than this many requests wait per client."""

    def __post_init__(self) -> None:
        check_fields("weights", self)
        for name in ("pad_scale", "later_scale", "urgent_scale"):
            if not 1e-6 <= getattr(self, name) <= 1e12:
                raise ServegymError(f"{name} must lie in 1e-6 … 1e12, got {getattr(self, name)}")
        for item in fields(self):
            if not abs(getattr(self, item.name)) <= 1e12:  # not finite, too
                value = getattr(self, item.name)
                raise ServegymError(f"{item.name} must lie in -1e12 … 1e12, got {value}")
        if not 0 <= self.shortest_share <= 1:
            raise ServegymError(f"shortest_share must lie in 0 … 1, got {self.shortest_share}")
        if self.shortest_share == 1:
            raise ServegymError("shortest_share 1 leaves no candidates; it must be below 1")
        if self.tail < 0:
            raise ServegymError(f"tail must be ≥ 0, got {self.tail}")

    def as_array(self) -> NDArray[np.float64]:
        """Return the weights in the order of the fields, shape (``WEIGHTS``,)."""
        return np.array([getattr(self, item.name) for item in fields(self)])


WEIGHTS: Final = len(fields(ScoreWeights))
"""How many weights there are."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """What ``scored`` goes by in one episode.

    Parameters
    ----------
    weights
        Of the score.
    calendar
        Decode clocks at which prefill stages should happen, then that of the end: whole numbers, ascending,
        the first ≥ 0. Empty: none. Each replica goes by its own decode clock.

    Raises
    ------
    ServegymError
        If the calendar has one entry only, more than ``MOST_STAGES`` stages, or does not ascend.

    Examples
    --------
    >>> Scoring(ScoreWeights(), np.array([0, 40, 90, 120])).stages
    3
    """

    weights: ScoreWeights = field(default_factory=ScoreWeights)
    calendar: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        calendar = whole_numbers("calendar", self.calendar, 0, _LATEST)
        object.__setattr__(self, "calendar", calendar)
        if len(calendar) == 1:
            raise ServegymError("a calendar holds at least one stage and the end, got one entry")
        if len(calendar) > MOST_STAGES + 1:
            raise ServegymError(f"a calendar holds up to {MOST_STAGES} stages, got {self.stages}")
        if np.any(np.diff(calendar) <= 0):
            raise ServegymError("a calendar must strictly ascend")

    @property
    def stages(self) -> int:
        """How many stages the calendar has."""
        return max(len(self.calendar) - 1, 0)
