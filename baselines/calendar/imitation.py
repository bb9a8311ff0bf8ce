"""Imitation of the joint planner: a calendar and weights that admit what its schedules admit.

The planner knows the case it plans, a learned calendar must do for all. So the weights are fitted to the
choices of all schedules: at each stage, each request that was admitted against some that were left. The
score of a request (``workload.scoring``) is taken with the schedule's own stages as calendar, and the
weights are those of the logistic model in which the higher score is admitted. Of the intervals, those of
each schedule and their mean are played with these weights; the best are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from servegym.baselines.calendar.fitted import CalendarParameters
from servegym.baselines.calendar.planner import plan_jointly
from servegym.baselines.schedules import Stage
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import make_case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.workload.requests import Requests
from servegym.envs.workload.scoring import MOST_STAGES, ScoreWeights

LATE: Final = 5.0
"""Weight ``late``, which no schedule shows: none ends a request after its own end."""

PAIRS_PER_CASE: Final = 4000
"""Of a request admitted and one left, drawn from a schedule."""

MOVES_PER_REQUEST: Final = 50_000
"""Of the planner's search, for each schedule."""

_FAR: Final = 1e9
_RIDGE: Final = 1e-4
_UNITS: Final = np.array([0.01, 0.01, 1.0, 1.0, 1.0, 1.0, 10.0, 10.0])
_NAMES: Final = (
    "length",
    "length_slope",
    "pad",
    "later",
    "later_slope",
    "count",
    "urgent",
    "urgent_slope",
)
_SCALES: Final = ("pad_scale", "later_scale", "urgent_scale")
_FIRST: Final = (1.0, 0.0, 0.3, 0.1, 0.0, 0.0, 0.1, 0.0)  # in units
_FIRST_SCALES: Final = (40.0, 1000.0, 8.0)
_LEAST_PAD: Final = 1e-3


@dataclass(frozen=True, eq=False)
class Example:
    """A schedule as something to imitate.

    Parameters
    ----------
    clocks
        Decode clocks of the stages, the first at 0, then that of the end; shape (stages + 1,).
    mean_rounds
        Decode rounds of all requests per client.
    pairs
        Features of requests that were admitted and of ones left at the same stage, shape (2, pairs, 6):
        rounds, rounds to the next target, the least such at a later stage, requests of the same
        length that wait, rounds before the end, the stage's clock as a share of the end.
    """

    clocks: NDArray[np.int64]
    mean_rounds: float
    pairs: NDArray[np.float64]

    @property
    def log_intervals(self) -> NDArray[np.float64]:
        """Logarithms of the intervals, shape (stages,)."""
        return np.log(np.diff(self.clocks))

    @property
    def spare(self) -> float:
        """The end over ``mean_rounds``, − 1."""
        return float(self.clocks[-1] / self.mean_rounds - 1)


def make_example(
    requests: Requests, clients: int, stages: Sequence[Stage], rng: np.random.Generator
) -> Example:
    """Return what a schedule shows; ``rng`` draws the pairs.

    Raises
    ------
    ServegymError
        If no calendar has such stages.
    """
    lengths = requests.decode_rounds.astype(np.int64)
    stage_of = np.zeros(len(lengths), np.int64)
    for number, stage in enumerate(stages):
        stage_of[list(stage.requests)] = number
    # Stages without a round between them are one in a calendar.
    clocks, place_of = np.unique([stage.clock for stage in stages], return_inverse=True)
    starts = place_of[stage_of]
    if len(clocks) > MOST_STAGES or clocks[0] != 0:
        raise ServegymError(
            f"a schedule to imitate begins at 0 and has up to {MOST_STAGES} stages, got {len(clocks)} from "
            f"{clocks[0]} on"
        )
    # A request without decode rounds may end with the last stage.
    end = max(int((clocks[starts] + lengths).max()), int(clocks[-1]) + 1)
    clocks = np.append(clocks, end)
    return Example(clocks, float(lengths.sum()) / clients, _pairs(lengths, starts, clocks, rng))


def _pairs(
    lengths: NDArray[np.int64],
    starts: NDArray[np.int64],
    clocks: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    stages, end = len(clocks) - 1, int(clocks[-1])
    pads = _rounds_to_target(lengths, clocks)
    later = np.full((stages + 1, len(lengths)), _FAR)
    later[:stages] = np.minimum.accumulate(pads[::-1], axis=0)[::-1]
    # Stages count by the requests that they admit.
    admitted = rng.permutation(np.flatnonzero(starts < starts.max()))
    admitted = np.resize(admitted, PAIRS_PER_CASE) if len(admitted) else admitted
    found = np.zeros((2, len(admitted), 6))
    for stage in np.unique(starts[admitted]).tolist():
        places = np.flatnonzero(starts[admitted] == stage)
        left = rng.choice(np.flatnonzero(starts > stage), len(places))
        waiting = np.bincount(lengths[starts >= stage], minlength=int(lengths.max()) + 1)
        for side, chosen in enumerate((admitted[places], left)):
            rounds = lengths[chosen]
            found[side, places] = np.column_stack(
                [
                    rounds,
                    pads[stage, chosen],
                    later[stage + 1, chosen],
                    waiting[rounds],
                    end - clocks[stage] - rounds,
                    np.full(len(chosen), clocks[stage] / end),
                ]
            )
    return found


def _rounds_to_target(lengths: NDArray[np.int64], clocks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, by stage and request, the rounds from its finish to the next target: (stages, requests)."""
    finishes = clocks[:-1, None] + lengths
    targets = clocks[np.searchsorted(clocks, finishes).clip(max=len(clocks) - 1)]
    rounds = (targets - finishes).astype(float)
    return np.where(rounds < 0, -LATE * rounds, rounds)


def score(parameters: NDArray[np.float64], features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the score of requests.

    Parameters
    ----------
    parameters
        Weights in their units, then logarithms of scales, shape (11,).
    features
        As in ``Example``, shape (…, 6).
    """
    length, length_slope, pad, later, later_slope, count, urgent, urgent_slope = (
        parameters[:8] * _UNITS
    )
    pad_scale, later_scale, urgent_scale = np.exp(parameters[8:])
    rounds, now, best, waiting, before, h = np.moveaxis(features, -1, 0)
    near = np.where(before > 0, urgent_scale / (urgent_scale + before.clip(min=0)), 1.0)
    return np.asarray(
        (length + length_slope * h) * rounds
        - pad * now / (1 + now / pad_scale)
        + (later + later_slope * h) * best / (1 + best / later_scale)
        + count * waiting
        + (urgent + urgent_slope * h) * near**2
    )


def fit_weights(examples: Sequence[Example]) -> ScoreWeights:
    """Return the weights that order the examples' pairs best, with ``pad`` = 1.

    Raises
    ------
    ServegymError
        Without a pair: at no stage is anybody left.
    """
    pairs = np.concatenate([example.pairs for example in examples], axis=1)
    if pairs.shape[1] == 0:
        raise ServegymError("the schedules have one stage each: they show no choice to imitate")
    first = np.concatenate([_FIRST, np.log(_FIRST_SCALES)])

    def loss(parameters: NDArray[np.float64]) -> float:
        margin = score(parameters, pairs[0]) - score(parameters, pairs[1])
        return float(np.logaddexp(0, -margin).mean() + _RIDGE * np.square(parameters[:8]).sum())

    bounds: list[Any] = [(-100, 100)] * 8 + [(0.0, 12.0)] * 3
    bounds[_NAMES.index("pad")] = (_LEAST_PAD, 100)
    fitted = minimize(loss, first, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}).x
    weights = fitted[:8] * _UNITS / fitted[_NAMES.index("pad")]
    values = dict(zip(_NAMES, weights.tolist(), strict=True))
    scales = dict(zip(_SCALES, np.exp(fitted[8:]).tolist(), strict=True))
    return ScoreWeights(late=LATE, shortest_share=0.0, tail=0.0, **values, **scales)


def agreement(weights: ScoreWeights, example: Example) -> float:
    """Return the share of an example's pairs whose admitted request has the higher score; ties count half."""
    linear = np.array([getattr(weights, name) for name in _NAMES]) / _UNITS
    scales = np.log([getattr(weights, name) for name in _SCALES])
    parameters = np.concatenate([linear, scales])
    margin = score(parameters, example.pairs[0]) - score(parameters, example.pairs[1])
    return float(np.heaviside(margin, 0.5).mean())


def calendars(examples: Sequence[Example], weights: ScoreWeights) -> list[CalendarParameters]:
    """Return the calendar of each example and, of several, their mean, all with these weights.

    The mean has as many stages as the median example: the clock of each, as a share of the end, is that
    of the same share of the stages, averaged over the examples.
    """
    found = [
        CalendarParameters(
            tuple(example.log_intervals.tolist()), np.clip(example.spare, -0.5, 5.0), weights
        )
        for example in examples
    ]
    if len(examples) > 1:
        stages = int(np.median([len(example.clocks) - 1 for example in examples]))
        places = np.linspace(0, 1, stages + 1)
        shares = np.mean(
            [
                np.interp(places, np.linspace(0, 1, len(e.clocks)), e.clocks / e.clocks[-1])
                for e in examples
            ],
            axis=0,
        )
        spare = float(np.mean([example.spare for example in examples]).clip(-0.5, 5.0))
        logs = np.log(np.diff(shares))
        found.append(CalendarParameters(tuple(logs.tolist()), spare, weights))
    return found


def plan_example(
    task: TaskConfig, seed: int, moves_per_request: int = MOVES_PER_REQUEST
) -> Example:
    """Return what the joint planner's schedule of a case shows; equal arguments give equal examples.

    Raises
    ------
    ServegymError
        If the planner or a calendar cannot do the task's cases.
    """
    if task.cluster.replicas != 1:
        raise ServegymError(f"schedules are imitated on one replica, got {task.cluster.replicas}")
    case, machine = make_case(task, seed), lower(task)
    moves = moves_per_request * len(case.requests)
    plan = plan_jointly(case.requests, machine.clients, machine.costs, seed=seed, moves=moves)
    return make_example(case.requests, machine.clients, plan.stages, np.random.default_rng(seed))
