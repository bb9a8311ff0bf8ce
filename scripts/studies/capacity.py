"""The highest arrival rate that a policy sustains: bisection with episodes until each rate is decided.

At a rate episodes of held-out seeds are added until the interval of their mean attainment lies on one side of
the target, or there are as many as may be: then the rate stays undecided. Seeds are the same at every rate,
and so are a seed's requests and, in proportion, its gaps (bursts and days keep their seconds): rates are
compared on the same luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf, sqrt
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.playing.identity import check_unchanged, claim, hash_of, notes_of
from servegym.envs.playing.parallel import Workers, run_parallel
from servegym.envs.playing.policy import Policy
from servegym.envs.playing.service import Window, service_rows
from servegym.envs.playing.summary import CONFIDENCE, fixed, student_half
from servegym.envs.playing.tables import ResumableTable, Row, Schema
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.arrivals import Arrivals
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.studies.quick import play_quickly

STEP: Final = 1.5
"""Factor between rates until one is sustained and one is not."""

LEAST: Final = 1 / 64
"""Rates below this share of the fluid capacity are not looked at."""

MOST: Final = 64.0
"""Nor are those above so many times the fluid capacity."""

FIRST_LOOK: Final = 10
"""Episodes of a rate before its first interval; then as many again, and so on doubled."""

SUSTAINED, UNDECIDED, TOO_MUCH = 1, 0, -1

ROWS: Final = Schema(
    ("policy", "rate_per_s", "seed", "requests", "met_slo"),
    key=("policy", "rate_per_s", "seed"),
    whole=("seed", "requests", "met_slo"),
    texts=("policy",),
    if_deleted="its episode is played again",
)
"""What ``rows.csv`` must be: of each episode the requests that arrived in the window."""

Floats = NDArray[np.float64]


def check_task(task: TaskConfig) -> None:
    """Refuse a task of which no capacity can be said."""
    if not task.workload.draws_arrivals:
        raise ServegymError(
            f"--task {task.name} draws no arrivals, so it has no rate to vary; choose one that does, such as "
            "Chat-v0, or give workload.arrivals"
        )
    if not task.slo:
        raise ServegymError(
            f"--task {task.name} has no limits to meet; choose one that has, such as Chat-v0, or give "
            "slo.ttft_s or slo.tpot_s"
        )
    if task.process.max_decisions > 0 or task.process.max_seconds > 0:
        raise ServegymError(
            f"--task {task.name} cuts episodes short (process.max_decisions, max_seconds); a capacity needs "
            "whole ones"
        )


def with_requests(task: TaskConfig, requests: int) -> TaskConfig:
    """Return the task with so many requests an episode; a file brings its own."""
    if task.workload.source not in WORKLOAD_PRESETS:
        return task
    return replace(task, workload=replace(task.workload, requests=requests))


def at_rate(task: TaskConfig, rate: float) -> TaskConfig:
    """Return the task with other mean arrivals a second; a process keeps its shape.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> at_rate(TASKS["servegym/Chat-v0"], 3.0).workload.arrivals.rate_per_s
    3.0
    """
    arrivals = task.workload.arrivals or Arrivals()
    if arrivals.process == "on-off":
        burst, calm = arrivals.burst_rate_per_s or 0.0, arrivals.calm_rate_per_s or 0.0
        burst_s, calm_s = arrivals.burst_s or 0.0, arrivals.calm_s or 0.0
        factor = rate * (burst_s + calm_s) / (burst * burst_s + calm * calm_s)
        scaled = replace(
            arrivals, burst_rate_per_s=factor * burst, calm_rate_per_s=factor * calm or None
        )
    else:
        scaled = replace(arrivals, rate_per_s=rate)
    return replace(task, workload=replace(task.workload, arrivals=scaled, arrival_rate_per_s=0.0))


# ---- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bracket:
    """What the verdicts on rates say: sustained at ``low``, not at ``high``, undecided between."""

    low: float
    """0: no rate was sustained."""
    high: float
    """Infinite: every rate was."""
    undecided: tuple[float, ...] = ()

    @classmethod
    def of(cls, verdicts: Mapping[float, int]) -> Bracket:
        """Return the bracket; a rate above one that was too much does not count as sustained."""
        high = min((rate for rate, verdict in verdicts.items() if verdict == TOO_MUCH), default=inf)
        low = max(
            (rate for rate, verdict in verdicts.items() if verdict == SUSTAINED and rate < high),
            default=0.0,
        )
        between = (r for r, verdict in verdicts.items() if verdict == UNDECIDED and low < r < high)
        return cls(low, high, tuple(sorted(between)))


def next_rate(
    verdicts: Mapping[float, int], start: float, lowest: float, highest: float, narrow: float
) -> float | None:
    """Return the rate to look at next; None if the bracket is narrow enough or rates have run out.

    First outwards from ``start`` by ``STEP``, then the middle of the bracket. What is undecided is left
    out of the middle: then both its sides are narrowed.

    Examples
    --------
    >>> next_rate({4.0: 1, 6.0: -1}, 4.0, 0.1, 100.0, 0.02)
    4.899
    >>> next_rate({4.0: 1, 4.04: -1}, 4.0, 0.1, 100.0, 0.02) is None
    True
    """
    if not verdicts:
        return start
    bracket = Bracket.of(verdicts)
    if bracket.low == 0.0:
        return rounded(max(lowest, min(verdicts) / STEP)) if min(verdicts) > lowest else None
    if bracket.high == inf:
        return rounded(min(highest, max(verdicts) * STEP)) if max(verdicts) < highest else None
    marks = (bracket.low, *bracket.undecided, bracket.high)
    for low, high in (marks[:2], marks[-2:]):
        middle = rounded(sqrt(low * high))
        if high / low > 1.0 + narrow and middle not in verdicts:
            return middle
    return None


def rounded(rate: float) -> float:
    """Return a rate of four digits, as it stands in the table of rows."""
    return float(f"{rate:.4g}")


def shown(rate: float) -> str:
    """Format a rate with three digits.

    Examples
    --------
    >>> shown(4.5), shown(31.53), shown(123.4)
    ('4.50', '31.5', '123')
    """
    return f"{rate:#.3g}".rstrip(".")


def looks(most: int) -> list[int]:
    """Return the numbers of episodes after which a rate's interval is looked at.

    Examples
    --------
    >>> looks(50)
    [10, 20, 40, 50]
    """
    counts = [FIRST_LOOK]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return counts if most > FIRST_LOOK else [most]


def interval(shares: Floats, confidence: float) -> tuple[float, float]:
    """Return mean and half the width of its Student-t interval."""
    return float(np.mean(shares)), student_half(shares, confidence)


def verdict_of(shares: Floats, target: float, confidence: float) -> int:
    """Return on which side of the target the interval of the mean lies."""
    mean, half = interval(shares, confidence)
    if mean - half >= target:
        return SUSTAINED
    return TOO_MUCH if mean + half < target else UNDECIDED


# ---- episodes ------------------------------------------------------------------------------------


def play_episode(
    task: TaskConfig, name: str, window: Window, policy_of: Callable[[str], Policy], seed: int
) -> Row:
    """Return the row of one episode of a task at its rate."""
    case = make_case(task, seed)
    played = play_quickly(task, name, policy_of(name), case, seed)
    figures = service_rows(played.log, case.requests, window, played.elapsed_s)[0]
    return {"seed": seed, "requests": figures["requests"], "met_slo": figures["met_slo"]}


class Episodes:
    """The rows of a folder, and the share of each episode's requests that met their limits."""

    def __init__(self, table: ResumableTable) -> None:
        self.table = table
        self.shares = dict(map(self._share, table.rows))

    def add(self, row: Row) -> None:
        """Add a row."""
        self.table.add([row])
        key, share = self._share(row)
        self.shares[key] = share

    @staticmethod
    def _share(row: Row) -> tuple[tuple[str, float, int], float]:
        key = (str(row["policy"]), float(row["rate_per_s"]), int(row["seed"]))
        return key, row["met_slo"] / row["requests"]


@dataclass(frozen=True)
class Study:
    """The capacities of a task under policies, with the rows of its folder."""

    task: TaskConfig
    target: float
    """Attainment, 0 … 1."""
    window: Window
    most_episodes: int
    narrow: float
    """The ratio of a bracket's ends that is narrow enough, less 1."""
    start: float
    """The first rate: the fluid capacity."""
    requests: int
    """Of an episode."""
    workers: Workers
    policy_of: Callable[[str], Policy]
    """Makes a policy by its name; picklable."""

    def __post_init__(self) -> None:
        cut_s = self.window.warmup_s + self.window.cooldown_s
        least = ceil(2.0 * cut_s * self.start)
        if self.requests < least:
            raise ServegymError(
                f"{self.requests} requests are too few: at the fluid capacity, {self.start:.3g} a second, "
                "warm-up and cool-down take more than half of their arrivals; take "
                f"{least} --requests or a shorter --warmup-s"
            )

    @property
    def confidence(self) -> float:
        """Of one look at a rate: all looks at it together err in 5 % of rates at most (Bonferroni)."""
        return 1.0 - (1.0 - CONFIDENCE) / len(looks(self.most_episodes))

    @property
    def highest(self) -> float:
        """The rate at which the window holds half of the time of arrivals."""
        cut_s = self.window.warmup_s + self.window.cooldown_s
        most = MOST * self.start
        return rounded(min(most, self.requests / (2.0 * cut_s)) if cut_s else most)

    @property
    def lowest(self) -> float:
        """The lowest rate that is looked at."""
        return rounded(LEAST * self.start)

    def open(self, folder: Path) -> Episodes:
        """Return the rows of a folder; refuse those of something else."""
        asked = {"task": notes_of(self.task), "window": self.window._asdict(), **hash_of(self.task)}
        claim(folder / "rows.json", asked, "rows", indent=1, tables=["rows.csv"])
        table = ResumableTable(
            folder / "rows.csv",
            ROWS,
            "remove the file or choose a new --output folder",
            ("policy", "rate_per_s", "seed"),
            order=lambda row: (row["policy"], row["rate_per_s"], row["seed"]),
        )
        return Episodes(table)

    def search(self, episodes: Episodes, name: str) -> pd.DataFrame:
        """Look at rates until the bracket is narrow; return a row a rate, with its verdict."""
        seen: dict[float, Row] = {}
        verdicts: dict[float, int] = {}
        with tqdm(desc=name, unit="episode") as bar:
            while True:
                rate = next_rate(
                    verdicts, rounded(self.start), self.lowest, self.highest, self.narrow
                )
                if rate is None:
                    break
                bar.set_postfix_str(f"{rate:g} a second")
                shares = self._decide(episodes, name, rate, bar.update)
                verdicts[rate] = verdict_of(shares, self.target, self.confidence)
                mean, half = interval(shares, self.confidence)
                seen[rate] = {
                    "rate_per_s": rate,
                    "episodes": len(shares),
                    "attainment": mean,
                    "half": half,
                    "verdict": verdicts[rate],
                }
        return pd.DataFrame([seen[rate] for rate in sorted(seen)])

    def _decide(
        self, episodes: Episodes, name: str, rate: float, played: Callable[[int], object]
    ) -> Floats:
        """Return shares of requests that met their limits, an episode each, as many as it needs."""
        shares: Floats = np.array([])
        for count in looks(self.most_episodes):
            seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + count)
            shares = self._shares(episodes, name, rate, seeds, played)
            if verdict_of(shares, self.target, self.confidence) != UNDECIDED:
                break
        return shares

    def _shares(
        self,
        episodes: Episodes,
        name: str,
        rate: float,
        seeds: range,
        played: Callable[[int], object],
    ) -> Floats:
        task, known = at_rate(self.task, rate), hash_of(self.task)
        missing = [seed for seed in seeds if (name, rate, seed) not in episodes.shares]
        play = partial(play_episode, task, name, self.window, self.policy_of)
        workers = self.workers
        if isinstance(workers, int):  # more has no meaning here: nothing is said of it
            workers = min(workers, max(1, len(missing)))
        with closing(run_parallel(play, [(seed,) for seed in missing], workers)) as results:
            for row in results:
                check_unchanged(self.task, known)
                episodes.add({"policy": name, "rate_per_s": rate} | row)
                played(1)
        return np.array([episodes.shares[name, rate, seed] for seed in seeds])


# ---- the page ------------------------------------------------------------------------------------


def table_of(
    rates: Mapping[str, pd.DataFrame], target: float, fluid: float, known: float
) -> pd.DataFrame:
    """Return a row a policy from the rates that were looked at; μ is left out where it is 0."""
    table = []
    for name, seen in rates.items():
        bracket = bracket_of(seen)
        row = {
            "policy": f"`{name}`",
            "rate (1/s)": "",
            "bracket": "",
            "undecided": "",
            "met at the bracket's ends (%)": "",
            "rates": str(len(seen)),
            "episodes": str(int(seen["episodes"].sum())),
            "rate / fluid": "",
            "rate / μ": "",
        }
        if bracket.low == 0.0:
            row["bracket"] = f"below {shown(seen['rate_per_s'].min())}"
        elif bracket.high == inf:
            row["bracket"] = f"above {shown(seen['rate_per_s'].max())}"
        else:
            met = seen.set_index("rate_per_s")["attainment"]
            rate = crossing(seen, bracket, target)
            row |= {
                "rate (1/s)": shown(rate),
                "bracket": f"{shown(bracket.low)} … {shown(bracket.high)}",
                "undecided": _ends(bracket.undecided),
                "met at the bracket's ends (%)": " / ".join(
                    fixed(100 * met[end], 1) for end in (bracket.low, bracket.high)
                ),
                "rate / fluid": fixed(rate / fluid),
                "rate / μ": fixed(rate / known) if known > 0 else "",
            }
        table.append(row)
    frame = pd.DataFrame(table)
    return frame if known > 0 else frame.drop(columns=["rate / μ"])


def crossing(seen: pd.DataFrame, bracket: Bracket, target: float) -> float:
    """Return where a line through the mean attainments in a bracket first falls below the target.

    Examples
    --------
    >>> seen = pd.DataFrame({"rate_per_s": [4.0, 5.0, 6.0], "attainment": [0.95, 0.91, 0.89]})
    >>> round(crossing(seen, Bracket(4.0, 6.0, (5.0,)), 0.9), 3)
    5.5
    """
    within = seen[seen["rate_per_s"].between(bracket.low, bracket.high)].sort_values("rate_per_s")
    rates, means = within["rate_per_s"].to_numpy(float), within["attainment"].to_numpy(float)
    k = int(np.argmax(means < target))  # the mean at the bracket's high end is
    return float(np.interp(target, means[[k, k - 1]], rates[[k, k - 1]]))


def _ends(rates: Sequence[float]) -> str:
    """Format the first and the last of some rates."""
    return " … ".join(shown(rate) for rate in dict.fromkeys((*rates[:1], *rates[-1:])))


def bracket_of(seen: pd.DataFrame) -> Bracket:
    """Return the bracket of the rates that were looked at."""
    return Bracket.of(dict(zip(seen["rate_per_s"], seen["verdict"], strict=True)))


def without_capacity(rates: Mapping[str, pd.DataFrame], target: float) -> Sequence[str]:
    """Return a line for each policy that sustains no rate, or every rate, of those looked at."""
    lines = []
    for name, seen in rates.items():
        bracket = bracket_of(seen)
        if bracket.low == 0.0:
            least = seen.iloc[0]
            lines.append(
                f"policy {name} never meets {100 * target:g} % of the limits: "
                f"{100 * least['attainment']:.1f} % at {least['rate_per_s']:g} a second, the lowest rate; "
                "ask for a lower --attainment"
            )
        elif bracket.high == inf:
            most = seen.iloc[-1]
            lines.append(
                f"policy {name} always meets {100 * target:g} % of the limits: "
                f"{100 * most['attainment']:.1f} % at {most['rate_per_s']:g} a second, the highest rate that "
                "--requests allows; ask for a higher --attainment or more --requests"
            )
    return lines
