"""Train the policy ``calendar`` in a folder: generations, evaluations, and going on after a kill."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.agents.outcome import compare, describe, write_summary
from servegym.agents.record import RECORD, check_unused
from servegym.baselines.calendar.fitted import (
    CALENDAR_FILE,
    FAMILY,
    CalendarParameters,
    calendar_policy,
    read_parameters,
    write_parameters,
)
from servegym.baselines.calendar.learning import USUAL_OPTIMIZER, CalendarSearch, Search
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.errors import ServegymError, not_installed
from servegym.envs.files import make_folder, read_bytes, read_json, write_file
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.identity import hash_of, notes_of
from servegym.envs.playing.summary import student_half
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.studies.agents.training import VALIDATION_SEED, mean_metrics, references
from servegym.studies.terminal import say

if TYPE_CHECKING:
    from servegym.agents.search_charts import SearchCharts

FITNESS_FILE: Final = "fitness.npy"
"""The fitness of every candidate so far, shape (generations, population): the search is done again by it."""

EVALUATIONS_FILE: Final = "evaluations.csv"

BOTH: Final = (1, 30)
"""Calendars tried before an episode: none but the learned one, and as the policy does by default."""

_SAVED_EVERY_S: Final = 20.0


@dataclass(frozen=True)
class Evaluation:
    """Means over the validation cases, gaps in percent."""

    generation: int
    training_s: float
    cases: int
    gap_percent: float
    gap_percent_half: float
    """Half of the 95 % interval over cases."""
    gap_percent_alone: float
    """Of the learned calendar without variations."""


class CalendarTraining:
    """A run in a folder: trains to the last generation, or goes on where it stopped.

    Parameters
    ----------
    task, how, folder
        What is learned, by which search, and where.
    validation_cases, evaluate_every
        Cases of seeds 900000 …, and generations between two evaluations.
    resume
        Go on with the run in the folder.
    """

    def __init__(
        self,
        task: TaskConfig,
        how: Search,
        folder: Path,
        command: str,
        *,
        validation_cases: int = 20,
        evaluate_every: int = 250,
        threads: int = 1,
        resume: bool = False,
    ) -> None:
        self.task, self.how, self.folder = task, how, folder
        self.evaluate_every = evaluate_every
        self._seeds = range(VALIDATION_SEED, VALIDATION_SEED + validation_cases)
        self._identity = {
            "algorithm": FAMILY,
            "task": notes_of(task),
            "search": _notes_of(how),
        } | hash_of(task)
        self._check(resume)
        self._cases = [make_case(task, seed) for seed in self._seeds]
        self.search = CalendarSearch(task, how, threads)
        self.rows: list[dict[str, Any]] = []
        self.outcome: list[str] = []
        """After training: what came of it, a line each."""
        self._charts: SearchCharts | None = None
        self._shown: dict[str, str] = {}  # gaps of the rules
        self._fitness: list[NDArray[np.float64]] = []
        self._before_s = 0.0
        if resume:
            self._read()
        else:
            make_folder(folder)
            content = self._identity | {"command": command}
            write_file(folder / RECORD, json.dumps(content, indent=2) + "\n")

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the smallest gap; None before the first."""
        return min(self.rows, key=lambda row: row["gap_percent"], default=None)

    @property
    def episodes(self) -> int:
        """How many training episodes were played so far."""
        return self.search.generation * self.how.population * self.how.cases

    def train(self, progress: bool = True) -> None:
        """Run the generations that are left; saves at an interrupt."""
        rules = references(self.task, self._seeds)
        self._shown = {name: f"{100 * rows['gap'].mean():.2f} %" for name, rows in rules.items()}
        self._charts = _open_charts(self.folder, rules, self.episodes)
        started = saved = perf_counter()
        evaluating_s = 0.0
        bar = tqdm(
            total=self.how.generations,
            initial=self.search.generation,
            unit="generation",
            disable=None if progress else True,
        )
        try:
            while self.search.generation < self.how.generations:
                self._fitness.append(self.search.step())
                if self._charts is not None:
                    median = 100 * float(np.median(self._fitness[-1]))
                    self._charts.log_generation(median, self.episodes)
                bar.update()
                number = self.search.generation
                now = perf_counter()
                if number % self.evaluate_every == 0 or number == self.how.generations:
                    self._evaluate(number, self._before_s + now - started - evaluating_s)
                    evaluating_s += perf_counter() - now
                    saved = 0.0
                bar.set_postfix(self._postfix(), refresh=False)
                if now - saved > _SAVED_EVERY_S:
                    self._save()
                    saved = now
        finally:
            bar.close()
            self._save()
            if self._charts is not None:
                self._charts.close()
        self._conclude(rules)

    def _conclude(self, rules: Mapping[str, pd.DataFrame]) -> None:
        """Compare the best calendar with the rules on the validation cases; write the summary."""
        best = self.best
        if best is None:  # no evaluation yet
            return
        policy = calendar_policy(read_parameters(self.folder / CALENDAR_FILE), BOTH[-1])
        gaps = self._play(policy)["gap"].to_numpy(float)
        comparisons = compare(gaps, {name: list(rows["gap"]) for name, rows in rules.items()})
        taken = (
            f"{self.folder}: taken after generation {best['generation']}, {best['gap_percent']:.2f} % "
            f"above the lower bound on {best['cases']} validation cases"
        )
        self.outcome = [taken, describe(comparisons)]
        state = {"generation": self.search.generation, "generations": self.how.generations}
        write_summary(self.folder, state, best, comparisons, self.outcome)

    def _postfix(self) -> dict[str, str]:
        shown = {"median": f"{100 * float(np.median(self._fitness[-1])):.2f} %"}
        best = self.best
        found = {"best": f"{best['gap_percent']:.2f} %"} if best else {}
        return shown | found | self._shown

    def _evaluate(self, number: int, training_s: float) -> None:
        centre = self.search.centre
        alone, several = (self._play(calendar_policy(centre, calendars)) for calendars in BOTH)
        gaps_percent = 100 * several["gap"].to_numpy(float)
        row = Evaluation(
            number,
            training_s,
            len(gaps_percent),
            float(gaps_percent.mean()),
            student_half(gaps_percent) if len(gaps_percent) > 1 else float("nan"),
            100 * float(alone["gap"].mean()),
        )
        if self._charts is not None:
            self._log(self._charts, centre, several)
        best = self.best
        self.rows.append(asdict(row))
        if best is None or row.gap_percent < best["gap_percent"]:
            write_parameters(centre, self.folder, self.task.name)
        write_file(self.folder / EVALUATIONS_FILE, pd.DataFrame(self.rows).to_csv(index=False))

    def _play(self, policy: TriggerPolicy) -> pd.DataFrame:
        """Return the metrics of the validation cases, a row a case."""
        return pd.DataFrame([play_compiled(self.task, policy, case) for case in self._cases])

    def _log(self, charts: SearchCharts, centre: CalendarParameters, metrics: pd.DataFrame) -> None:
        """Log an evaluation, and the schedule of the first validation case."""
        charts.log_evaluation(mean_metrics(metrics), self.episodes)
        seed = self._seeds[0]
        policy = calendar_policy(centre, BOTH[-1])
        played = play(self.task, FAMILY, policy, self._cases[0], seed)
        title = (
            f"seed {seed} after {self.episodes:,} episodes: {played.row['makespan_s']:.1f} s, "
            f"{100 * played.row['gap']:.2f} % above the lower bound, "
            f"{int(played.row['prefill_stages'])} prefill stages"
        )
        charts.log_schedule(played.records, lower(self.task).layout.clients, title, self.episodes)

    def _save(self) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._fitness).reshape(-1, self.how.population))
        write_file(self.folder / FITNESS_FILE, buffer.getvalue())

    def _check(self, resume: bool) -> None:
        record = self.folder / RECORD
        if not resume:
            check_unused(self.folder)
            return
        if not record.is_file():
            raise ServegymError(f"{self.folder}: holds no run to resume")
        content = read_json(record)
        wanted = json.loads(json.dumps(self._identity))
        found = content if isinstance(content, dict) else {}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ServegymError(
                    f"{record}: belongs to a run with another {key}; resume with the same, or begin a run "
                    "in another folder"
                )

    def _read(self) -> None:
        """Read how far the run has come, and do its generations again."""
        path = self.folder / FITNESS_FILE
        if not path.exists():
            return
        try:
            fitness = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
            if fitness.ndim != 2 or fitness.shape[1] != self.how.population:
                raise ValueError
            if fitness.dtype != np.float64 or not np.isfinite(fitness).all():
                raise ValueError
        except ValueError:
            raise ServegymError(f"{path}: damaged; begin a run in another folder") from None
        self.search.replay(fitness)
        self._fitness = list(fitness)
        table = self.folder / EVALUATIONS_FILE
        if table.exists():
            try:
                # As Python reads numbers: pandas' parser may change a last digit.
                texts = pd.read_csv(table, dtype=str, keep_default_na=False).to_dict("records")
                rows = [{str(key): _number(str(key), row[key]) for key in row} for row in texts]
                kept = [row for row in rows if row["generation"] <= len(fitness)]
                self.rows = [asdict(Evaluation(**row)) for row in kept]  # type: ignore[arg-type]
            except (ValueError, KeyError, TypeError):
                raise ServegymError(f"{table}: damaged; begin a run in another folder") from None
            self._before_s = max((row["training_s"] for row in self.rows), default=0.0)


def _open_charts(
    folder: Path, rules: Mapping[str, pd.DataFrame], episodes: int
) -> SearchCharts | None:
    """Return what writes for TensorBoard; None, with a line, where the extra is not installed."""
    try:
        from servegym.agents.search_charts import SearchCharts
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        say(f"nothing is written for TensorBoard: {not_installed(missing, 'train')}")
        return None
    means = {name: mean_metrics(rows) for name, rows in rules.items()}
    return SearchCharts(folder / "tensorboard", means, episodes + 1 if episodes else None)


def _notes_of(how: Search) -> dict[str, Any]:
    """Return a search's fields; the usual optimiser goes unsaid, as in runs from before there were others."""
    notes = asdict(how)
    if how.optimizer == USUAL_OPTIMIZER:
        del notes["optimizer"]
    return notes


def _number(column: str, text: str) -> int | float:
    return int(text) if column in ("generation", "cases") else float(text or "nan")
