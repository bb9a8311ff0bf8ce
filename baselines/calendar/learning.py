"""Learn the policy ``calendar`` for a task: search over whole episodes in compiled code, usually by CMA-ES.

One generation plays each candidate on the same training cases, drawn anew each time. An
optimiser (``optimizers``) goes by their mean gaps. A gap counts at most
``CLIPPED`` times the generation's median: a request that is left to the end costs several points, and the
policy's variations avoid just that.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.calendar.fitted import (
    CalendarParameters,
    calendar_policy,
    lay_calendar,
)
from servegym.baselines.calendar.optimizers import OPTIMIZERS, make_optimizer
from servegym.baselines.rules.compiled import CompiledPolicy, compile_policy, run_episode
from servegym.envs.arguments import whole_number
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.jit import threaded_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.policy import asked_task
from servegym.envs.simulator.imagination import copy_row, forget_fits
from servegym.envs.simulator.state import State, make_alike
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.envs.workload.scoring import ScoreWeights

CLIPPED: Final = 1.5
"""A gap counts at most so many times the median of its generation."""

USUAL_OPTIMIZER: Final = "cma"

SEEDS_PER_SEARCH: Final = 1000
"""Search seed s plays training cases of environment seeds 1000 · s … 1000 · s + 999."""

# The first candidates: intervals around the mean by the golden ratio, so that their sums differ.
_GOLDEN: Final = 0.6180339887
_FIRST_SPREAD: Final = 0.8
_FIRST_INTERVAL: Final = 2.0  # nobody has finished yet


@dataclass(frozen=True)
class Search:
    """How long and how wide the search is.

    Parameters
    ----------
    stages
        Prefill stages of the calendar.
    seed
        Of the search; cases are those of environment seeds 1000 · seed … 1000 · seed + 999.
    generations
        Generations.
    population
        Candidates of a generation.
    cases
        Cases that each plays.
    spread
        First standard deviation of the search, in logarithms of intervals.
    optimizer
        cma, sep-cma or es, see ``optimizers``.
    """

    stages: int = 36
    seed: int = 0
    generations: int = 1500
    population: int = 24
    cases: int = 12
    spread: float = 0.2
    optimizer: str = USUAL_OPTIMIZER

    def __post_init__(self) -> None:
        bounds = {
            "stages": (1, 500),
            "seed": (0, 799),
            "generations": (1, 10**7),
            "population": (4, 10**5),
            "cases": (1, 1000),
        }
        for name, (least, most) in bounds.items():
            whole_number(name, getattr(self, name), least, most)
        if not 1e-6 <= self.spread <= 10:
            raise ServegymError(f"spread must lie in 1e-6 … 10, got {self.spread}")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "es" and self.population % 2:
            raise ServegymError(
                f"optimizer es needs an even population, got {self.population}; "
                f"take {self.population + 1}"
            )


# Of a vector: the logarithms of the intervals, then these. Scales are logarithms.
_NAMES: Final = (
    "spare",
    "length",
    "length_slope",
    "later",
    "later_slope",
    "count",
    "urgent",
    "urgent_slope",
    "late",
    "pad_scale",
    "later_scale",
    "urgent_scale",
)
_UNITS: Final = {"length": 0.01, "length_slope": 0.01, "urgent": 10.0, "urgent_slope": 10.0}
"""A step of 1 of the vector, where it is not 1; of scales a factor e."""

# Rounded from a search that began at the weights 1 (seed 1): one begun here takes a third of the time.
_START: Final = {
    "spare": 0.0,
    "length": 0.01,
    "length_slope": 0.02,
    "later": 0.7,
    "later_slope": -0.3,
    "urgent": 10.0,
    "urgent_slope": 10.0,
    "late": 5.0,
    "pad_scale": 40.0,
    "later_scale": 1000.0,
    "urgent_scale": 8.0,
}


def first_vector(stages: int) -> NDArray[np.float64]:
    """Return the vector that a search begins at, shape (stages + 12,)."""
    intervals = 1 + _FIRST_SPREAD * (2 * (np.arange(stages) * _GOLDEN % 1) - 1)
    intervals[0] *= _FIRST_INTERVAL
    return np.concatenate([np.log(intervals), _to_units(_START)])


def _to_units(values: dict[str, float]) -> NDArray[np.float64]:
    found = [values.get(name, 0.0) for name in _NAMES]
    return np.array(
        [
            np.log(value) if name.endswith("scale") else value / _UNITS.get(name, 1.0)
            for name, value in zip(_NAMES, found, strict=True)
        ]
    )


def to_parameters(vector: NDArray[np.float64]) -> CalendarParameters:
    """Return what a vector of the search stands for; what lies beyond its bounds is brought to them."""
    intervals = len(vector) - len(_NAMES)
    values = {
        name: float(
            np.exp(np.clip(value, -12.0, 25.0))
            if name.endswith("scale")
            else np.clip(value, -1e6, 1e6) * _UNITS.get(name, 1.0)
        )
        for name, value in zip(_NAMES, vector[intervals:], strict=True)
    }
    spare = float(np.clip(values.pop("spare"), -0.5, 5.0))
    weights = ScoreWeights(pad=1.0, shortest_share=0.0, tail=0.0, **values)
    logs = np.clip(vector[:intervals] - vector[:intervals].max(), -20.0, 0.0)
    return CalendarParameters(tuple(logs.tolist()), spare, weights)


def to_vector(parameters: CalendarParameters) -> NDArray[np.float64]:
    """Return the vector that stands for parameters whose weight ``pad`` is 1; see ``to_parameters``."""
    values = {"spare": parameters.spare} | {
        name: getattr(parameters.weights, name) for name in _NAMES if name != "spare"
    }
    return np.concatenate([np.array(parameters.log_intervals), _to_units(values)])


class Players:
    """Plays candidates on cases, in threads."""

    def __init__(self, task: TaskConfig, cases: int, threads: int = 1) -> None:
        if task.information.output_lengths != "known":
            raise ServegymError(
                f"a calendar is learned where output lengths are known, {task.name} has predicted ones"
            )
        if not 1 <= threads <= 64:
            raise ServegymError(f"threads must lie in 1 … 64, got {threads}")
        self.task = asked_task(task, calendar_policy())
        self._machine = lower(self.task)
        requests = make_case(self.task, 0).requests
        if np.any(requests.arrival_s > 0):
            raise ServegymError(
                f"a calendar is learned where all requests are present at t = 0, those of {task.name} arrive "
                "over time"
            )
        self._loaded = make_task_state(self.task, cases, len(requests))
        self._policy = compile_policy(calendar_policy(), self.task)
        self._scratch = [make_alike(self._loaded, 1) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def gaps(
        self, candidates: list[CalendarParameters], seeds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the gap of each candidate on each case, shape (candidates, seeds)."""
        count = len(seeds)
        bounds, means = np.zeros(count), np.zeros(count)
        for m, seed in enumerate(seeds.tolist()):
            case = make_case(self.task, seed)
            load_case(self.task, self._loaded, m, case)
            bounds[m] = case.bound.seconds
            means[m] = case.requests.decode_rounds.sum() / self._machine.clients
        stages = len(candidates[0].log_intervals)
        calendars = np.array(
            [
                [lay_calendar(np.array(each.log_intervals), each.spare, mean) for mean in means]
                for each in candidates
            ]
        )
        weights = np.array([each.weights.as_array() for each in candidates])
        seconds = np.zeros((len(candidates), count))
        threads = len(self._scratch)
        shares = np.array_split(np.arange(len(candidates)), threads)

        def play(thread: int) -> None:
            own = shares[thread]
            if len(own) == 0:
                return
            own_seconds = np.zeros((len(own), count))
            _play(
                self._loaded,
                self._scratch[thread],
                self._machine.costs,
                self._policy,
                np.ascontiguousarray(calendars[own]),
                np.ascontiguousarray(weights[own]),
                stages,
                own_seconds,
            )
            seconds[own] = own_seconds

        if self._pool is None:
            play(0)
        else:
            list(self._pool.map(play, range(threads)))
        return seconds / bounds - 1


@threaded_kernel
def _play(
    source: State,
    target: State,
    costs: CostTables,
    policy: CompiledPolicy,
    calendars: NDArray[np.int64],
    weights: NDArray[np.float64],
    stages: int,
    seconds: NDArray[np.float64],
) -> None:
    """Play each candidate on each loaded case; write when the last replica ends."""
    for candidate in range(seconds.shape[0]):
        for case in range(seconds.shape[1]):
            copy_row(source, case, target, 0)
            for k in range(weights.shape[1]):
                target.weights[0, k] = weights[candidate, k]
            for k in range(stages + 1):
                target.calendar[0, k] = calendars[candidate, case, k]
            target.episodes[0].stages = stages
            forget_fits(target, 0)
            run_episode(target, costs, 0, policy)
            end_s = 0.0
            for r in range(target.replicas.shape[1]):
                end_s = max(end_s, target.replicas[0, r].clock_s)
            seconds[candidate, case] = end_s


class CalendarSearch:
    """A search under way.

    Parameters
    ----------
    task
        Its output lengths are known and all requests are present at t = 0.
    how
        See ``Search``.
    threads
        Play the candidates side by side; their number changes no result.
    first
        What the search begins at, with ``how.stages`` intervals; None: ``first_vector``.

    Raises
    ------
    ServegymError
        If ``cmaes`` is not installed, or a calendar cannot be learned for the task.
    """

    def __init__(
        self,
        task: TaskConfig,
        how: Search,
        threads: int = 1,
        first: CalendarParameters | None = None,
    ) -> None:
        self.how = how
        self.players = Players(task, how.cases, threads)
        vector = first_vector(how.stages) if first is None else to_vector(first)
        if len(vector) != how.stages + len(_NAMES):
            raise ServegymError(
                f"the search has {how.stages} stages, what it begins at "
                f"{len(vector) - len(_NAMES)}; they must be as many"
            )
        self._optimizer = make_optimizer(
            how.optimizer, vector, how.spread, how.population, how.seed
        )

    @property
    def generation(self) -> int:
        """How many generations are done."""
        return int(self._optimizer.generation)

    @property
    def centre(self) -> CalendarParameters:
        """The parameters that the search is at."""
        return to_parameters(self._optimizer.mean)

    def replay(self, fitness: NDArray[np.float64]) -> None:
        """Do the first generations again without playing: what is known of each candidate is its fitness.

        Parameters
        ----------
        fitness
            What ``step`` has returned so far, shape (generations, population).
        """
        for row in fitness:
            vectors = [self._optimizer.ask() for _ in range(self.how.population)]
            self._optimizer.tell(list(zip(vectors, row.tolist(), strict=True)))

    def step(self) -> NDArray[np.float64]:
        """Do one generation; return the fitness of its candidates, shape (population,)."""
        how = self.how
        rng = np.random.default_rng([how.seed, self.generation + 1])
        seeds = SEEDS_PER_SEARCH * how.seed + rng.choice(SEEDS_PER_SEARCH, how.cases, replace=False)
        vectors = [self._optimizer.ask() for _ in range(how.population)]
        gaps = self.players.gaps([to_parameters(vector) for vector in vectors], seeds)
        fitness = np.minimum(gaps, CLIPPED * np.median(gaps)).mean(axis=1)
        self._optimizer.tell(list(zip(vectors, fitness.tolist(), strict=True)))
        return fitness
