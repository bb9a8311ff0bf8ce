"""Train the policy ``calendar`` in a folder: generations, evaluations, and going on after a kill."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.agents.record import RECORD, check_unused
from servegym.baselines.calendar.fitted import (
    CALENDAR_FILE,
    FAMILY,
    CalendarParameters,
    calendar_policy,
    write_parameters,
)
from servegym.baselines.calendar.learning import USUAL_OPTIMIZER, CalendarSearch, Search
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, read_bytes, read_json, write_file
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.identity import hash_of, notes_of
from servegym.envs.playing.summary import student_half
from servegym.envs.task.config import TaskConfig
from servegym.studies.agents.training import VALIDATION_SEED, references

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

    def train(self, progress: bool = True) -> None:
        """Run the generations that are left; saves at an interrupt."""
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

    def outcome(self) -> str:
        """Return in one line whether the policy beats the rules on the validation cases."""
        best = self.best
        if best is None:
            return "no evaluation: nothing is known of the policy"
        rules = references(self.task, self._seeds)
        gaps = {name: float(rows["gap"].mean()) for name, rows in rules.items()}
        name, gap = min(gaps.items(), key=lambda pair: pair[1])
        better = "ahead of" if best["gap_percent"] < 100 * gap else "not ahead of"
        return (
            f"{self.folder / CALENDAR_FILE}: of generation {best['generation']}, "
            f"{best['gap_percent']:.2f} ± {best['gap_percent_half']:.2f} % above the lower bound on "
            f"{best['cases']} validation cases, {better} {name} ({100 * gap:.2f} %)"
        )

    def _postfix(self) -> dict[str, str]:
        shown = {"median": f"{100 * float(np.median(self._fitness[-1])):.2f} %"}
        best = self.best
        return shown | ({"best": f"{best['gap_percent']:.2f} %"} if best else {})

    def _evaluate(self, number: int, training_s: float) -> None:
        centre = self.search.centre
        alone, several = (self._gaps_percent(centre, calendars) for calendars in BOTH)
        half = student_half(several) if len(several) > 1 else float("nan")
        row = Evaluation(
            number, training_s, len(several), float(several.mean()), half, float(alone.mean())
        )
        best = self.best
        self.rows.append(asdict(row))
        if best is None or row.gap_percent < best["gap_percent"]:
            write_parameters(centre, self.folder, self.task.name)
        write_file(self.folder / EVALUATIONS_FILE, pd.DataFrame(self.rows).to_csv(index=False))

    def _gaps_percent(self, parameters: CalendarParameters, calendars: int) -> NDArray[np.float64]:
        policy = calendar_policy(parameters, calendars)
        gaps = [play_compiled(self.task, policy, case)["gap"] for case in self._cases]
        return 100 * np.array(gaps)

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


def _notes_of(how: Search) -> dict[str, Any]:
    """Return a search's fields; the usual optimiser goes unsaid, as in runs from before there were others."""
    notes = asdict(how)
    if how.optimizer == USUAL_OPTIMIZER:
        del notes["optimizer"]
    return notes


def _number(column: str, text: str) -> int | float:
    return int(text) if column in ("generation", "cases") else float(text or "nan")
