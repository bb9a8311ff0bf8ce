"""The policy ``calendar``: a calendar of prefill stages, and requests that are fitted to it.

``baselines.calendar.planner`` anneals a calendar and the stage of every request for minutes. This policy
keeps the form of such schedules and nothing else: stages at irregular intervals, so that between some two
of them nearly every length fits, and at each stage the requests that fit best now and worst later
(the admission rule ``scored``). Intervals and weights are learned (``learning``), for all cases of a task at
once. Before an episode some variations of the intervals are played in imagination, which takes a
millisecond each, and the best is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.rules.compiled import CompiledPolicy, compile_policy, run_episode
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import CALENDAR
from servegym.envs.arguments import check_fields
from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import read_json, write_file
from servegym.envs.playing.policy import Briefing
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.state import State, make_state
from servegym.envs.task.lowering import lay_out, lower
from servegym.envs.workload.plan import Plan, plan_by_scores
from servegym.envs.workload.requests import Requests
from servegym.envs.workload.scoring import MOST_STAGES, ScoreWeights, Scoring

LOOK_AHEAD: Final = 0.5
"""Multiplier of the lookahead trigger behind the calendar's last stage."""

CALENDAR_FILE: Final = "calendar.json"
"""Name of a file of learned parameters, within an agent's folder."""

FAMILY: Final = "calendar"

_SEED: Final = (0, 1)
"""Of the variations, the same in every episode: a case has one calendar, whoever plays it."""

USUAL_TASK: Final = "servegym/GSM8K-v0"

_SHIPPED: Final = "learned.json"

SHARE: Final = 0.1
"""Share of the intervals that a variation changes."""

SPREAD: Final = 0.2
"""Standard deviation by which it changes the logarithm of one. Both from ten cases: five and three times
as wide found as much."""


@dataclass(frozen=True)
class CalendarParameters:
    """What is learned: intervals between stages, when the end is, and weights.

    Examples
    --------
    >>> parameters = CalendarParameters(log_intervals=(0.0, 0.0), spare=0.1)
    >>> parameters.scoring(100.0).calendar
    array([  0,  55, 110])
    """

    log_intervals: tuple[float, ...]
    """Logarithms of the intervals from each stage to the next and from the last to the end; only their
    differences count."""
    spare: float = 0.02
    """The end is at the mean decode rounds of a client times 1 + this."""
    weights: ScoreWeights = field(default_factory=ScoreWeights)

    def __post_init__(self) -> None:
        check_fields("calendar", self)
        if not 1 <= len(self.log_intervals) <= MOST_STAGES:
            raise ServegymError(
                f"a calendar has 1 … {MOST_STAGES} intervals, got {len(self.log_intervals)}"
            )
        if not all(abs(value) <= 50 for value in self.log_intervals):
            raise ServegymError("log_intervals must lie in -50 … 50")
        if not -0.9 <= self.spare <= 10:
            raise ServegymError(f"spare must lie in -0.9 … 10, got {self.spare}")

    def scoring(self, mean_rounds: float, varied: NDArray[np.float64] | None = None) -> Scoring:
        """Return the scoring of an episode.

        Parameters
        ----------
        mean_rounds
            Expected decode rounds of all requests per client.
        varied
            Added to the logarithms of the intervals.
        """
        logs = np.array(self.log_intervals)
        if varied is not None:
            logs = logs + varied
        return Scoring(self.weights, lay_calendar(logs, self.spare, mean_rounds))


def lay_calendar(
    log_intervals: NDArray[np.float64], spare: float, mean_rounds: float
) -> NDArray[np.int64]:
    """Return the decode clocks of the stages, the first at 0, and of the end: at least a round apart."""
    shares = np.cumsum(np.exp(log_intervals - log_intervals.max()))
    clocks = np.rint(shares / shares[-1] * mean_rounds * (1 + spare)).astype(np.int64)
    places = np.arange(len(clocks))
    clocks = places + 1 + np.maximum.accumulate(clocks - places - 1).clip(min=0)
    return np.concatenate([[0], clocks])


@dataclass(frozen=True)
class CalendarPlanner:
    """Chooses the scoring of an episode by imagined makespan: each variation changes the best so far.

    Parameters
    ----------
    parameters
        What has been learned; None: what is shipped for the task, or for ``USUAL_TASK``.
    variations
        Calendars tried, the unvaried one included, ≥ 1.
    """

    parameters: CalendarParameters | None = None
    variations: int = 30

    def __post_init__(self) -> None:
        if not 1 <= self.variations <= 100_000:
            raise ServegymError(f"variations must lie in 1 … 100,000, got {self.variations}")

    def __call__(self, requests: Requests, briefing: Briefing) -> Plan:
        """Return a plan that holds the scoring."""
        layout = lay_out(briefing.task)
        parameters = self.parameters or learned_parameters(briefing.task.name)
        mean_rounds = float(requests.decode_rounds.sum()) / sum(layout.clients)
        if mean_rounds == 0:
            return plan_by_scores(Scoring(parameters.weights))
        best = plan_by_scores(parameters.scoring(mean_rounds))
        if self.variations == 1:
            return best
        costs, state = lower(briefing.task).costs, make_state(1, len(requests), layout)
        policy = compile_policy(calendar_policy(), briefing.task)
        least_s = _imagined_seconds(state, costs, requests, best, policy)
        kept = np.zeros(len(parameters.log_intervals))
        rng = np.random.default_rng(_SEED)
        for _ in range(self.variations - 1):
            varied = kept + np.where(
                rng.random(len(kept)) < SHARE, rng.normal(0, SPREAD, len(kept)), 0
            )
            plan = plan_by_scores(parameters.scoring(mean_rounds, varied))
            seconds = _imagined_seconds(state, costs, requests, plan, policy)
            if seconds < least_s:
                best, least_s, kept = plan, seconds, varied
        return best


def _imagined_seconds(
    state: State, costs: Any, requests: Requests, plan: Plan, policy: CompiledPolicy
) -> float:
    load(state, 0, requests, plan)
    run_episode(state, costs, 0, policy)
    return float(state.replicas["clock_s"][0].max())


def calendar_policy(
    parameters: CalendarParameters | None = None, variations: int = 30
) -> TriggerPolicy:
    """Return the policy of learned parameters; see ``CalendarPlanner``.

    Examples
    --------
    >>> from servegym.envs import TASKS, make_case, play
    >>> policy = calendar_policy(CalendarParameters((0.0,) * 4, 0.1))
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> play(task, "calendar", policy, make_case(task, 0), seed=0).row["unfinished_requests"]
    0
    """
    planner = CalendarPlanner(parameters, variations)
    return TriggerPolicy("scored", CALENDAR, LOOK_AHEAD, planner=planner)


def learned_parameters(task_name: str) -> CalendarParameters:
    """Return what is shipped for a task, by its id; for ``USUAL_TASK`` where nothing is.

    Examples
    --------
    >>> learned_parameters("servegym/Tiny-v0") == learned_parameters("servegym/GSM8K-v0")
    True
    """
    shipped = _shipped()
    return shipped.get(task_name, shipped[USUAL_TASK])


def learned_hash(task_name: str) -> str:
    """Return the SHA-256 of what is shipped for a task, so that a table of episodes can note it."""
    content = json.dumps(asdict(learned_parameters(task_name)))
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def _shipped() -> dict[str, CalendarParameters]:
    text = resources.files(__package__).joinpath(_SHIPPED).read_text(encoding="utf-8")
    return {name: _from_json(values) for name, values in json.loads(text).items()}


def _from_json(values: Any) -> CalendarParameters:
    """Return parameters of JSON; raises what ``WRONG_VALUES`` lists if it is none."""
    weights = ScoreWeights(**values["weights"])
    logs = tuple(float(value) for value in values["log_intervals"])
    return CalendarParameters(logs, float(values["spare"]), weights)


def write_parameters(parameters: CalendarParameters, folder: Path, task_name: str) -> None:
    """Write learned parameters into ``folder`` as ``CALENDAR_FILE``."""
    content = {"family": FAMILY, "task": task_name, **asdict(parameters)}
    write_file(folder / CALENDAR_FILE, json.dumps(content, indent=2) + "\n")


def read_parameters(path: Path) -> CalendarParameters:
    """Read what ``write_parameters`` wrote.

    Raises
    ------
    ServegymError
        If the file is missing, damaged or of another family of agents.
    """
    try:
        content = dict(read_json(path))
        family = content.get("family")
        if family == FAMILY:
            return _from_json(content)
    except ServegymError as error:
        raise ServegymError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ServegymError(f"{path}: damaged; train the agent again") from None
    raise ServegymError(f"{path}: must be of family {FAMILY!r}, got {shown(family)}")
