"""Hyper-parameters searched by Optuna: what is tried, how a trial is trained, where trials are kept."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from filelock import FileLock

from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.envs.errors import ServegymError, not_installed
from servegym.envs.files import check_readable
from servegym.envs.playing.identity import compare, hash_of, notes_of
from servegym.envs.process.observation import OBSERVATION_VERSION
from servegym.envs.task.config import TaskConfig
from servegym.studies.agents.training import VALIDATION_SEED, make_plan_case, train_watched

if TYPE_CHECKING:
    import optuna

    from servegym.agents.callbacks import ServingCallback
    from servegym.agents.early_stopping import Evaluation, OnEvaluation

STUDY: Final = "servegym"
NOTES: Final = "notes"
DEFAULTS: Final = "defaults"
"""Attribute of the trial that has the numbers the search begins with."""
STARTUP_TRIALS: Final = 5
"""Trials before the sampler and the pruner go by the others; the first is of the defaults."""
HEARTBEAT_S: Final = 30
"""A trial whose process has not been heard of for twice as long is tried again by another."""


@dataclass(frozen=True)
class Range:
    """Where a number is looked for."""

    least: float
    most: float
    log: bool = True

    def suggest(self, trial: optuna.Trial, name: str, whole: bool) -> float:
        """Return the trial's value."""
        if whole:
            return trial.suggest_int(name, int(self.least), int(self.most), log=self.log)
        return trial.suggest_float(name, self.least, self.most, log=self.log)

    def clipped(self, value: float) -> float:
        """Return the nearest value inside."""
        return min(max(value, self.least), self.most)


SPACE: Final[dict[str, Range]] = {
    "learning_rate": Range(1e-4, 5e-3),
    "environments": Range(4, 64),
    "steps": Range(64, 1024),
    "minibatches": Range(1, 16),
    "epochs": Range(1, 16),
    "clip_range": Range(0.05, 0.4),
    "entropy": Range(1e-5, 0.03),
    "gae_decay": Range(5e-4, 0.1),
    "max_gradient_norm": Range(0.2, 5.0),
    "value_coefficient": Range(0.1, 1.0),
    "width": Range(32, 256),
}
"""What is tried. ``minibatches`` is rollout / batch_size, ``gae_decay`` is 1 − gae_lambda. After imitation
``learning_rate`` and ``clip_range`` are those of ``warm_learning_rate`` and ``warm_clip_range``."""

_WHOLE: Final = ("environments", "steps", "minibatches", "epochs", "width")


def numbers_of(h: Hyperparameters, names: Sequence[str]) -> dict[str, float]:
    """Return the numbers that stand for hyper-parameters, each moved into its range."""
    all_numbers = asdict(h) | {
        "minibatches": round(h.rollout / h.batch_size),
        "gae_decay": 1.0 - h.gae_lambda,
    }
    if h.warm:
        all_numbers["learning_rate"] = h.warm_learning_rate
        all_numbers["clip_range"] = h.warm_clip_range
    return {name: SPACE[name].clipped(all_numbers[name]) for name in names}


def hyperparameters_of(usual: Hyperparameters, numbers: Mapping[str, float]) -> Hyperparameters:
    """Return the hyper-parameters with the tried numbers in them.

    What is not tried stays as it usually is, and so does the number of gradient steps in a pass over a
    rollout.

    Examples
    --------
    >>> hyperparameters_of(Hyperparameters(), {"steps": 512, "minibatches": 8}).batch_size
    4096
    """
    values: dict[str, Any] = dict(numbers)
    minibatches = int(values.pop("minibatches", round(usual.rollout / usual.batch_size)))
    if "gae_decay" in values:
        values["gae_lambda"] = 1.0 - values.pop("gae_decay")
    if usual.warm:
        for name in ("learning_rate", "clip_range"):
            if name in values:
                values[f"warm_{name}"] = values.pop(name)
    rollout = int(values.get("environments", usual.environments))
    rollout *= int(values.get("steps", usual.steps))
    return replace(usual, **values, batch_size=max(2, rollout // minibatches))


@dataclass(frozen=True)
class Search:
    """What one study of hyper-parameters is; its notes identify it in the storage."""

    task: TaskConfig
    usual: Hyperparameters
    names: tuple[str, ...]
    cases: int
    evaluations: int
    folder: Path
    storage: str
    trials: int
    sampler_seed: int

    @property
    def every(self) -> int:
        """Timesteps between two evaluations."""
        return max(1, self.usual.timesteps // self.evaluations)

    @property
    def notes(self) -> dict[str, Any]:
        """What a trial's value depends on, beside the numbers tried."""
        return {
            "task": notes_of(self.task),
            "hyperparameters": asdict(self.usual),
            "parameters": list(self.names),
            "validation_cases": self.cases,
            "evaluations": self.evaluations,
            "observation_version": OBSERVATION_VERSION,
        } | hash_of(self.task)


def import_optuna() -> Any:
    """Return Optuna, quiet; refuse in one line where it is missing."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise not_installed(error.name or "optuna", "tune") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(search: Search) -> optuna.Study:
    """Open the study in the storage, made if missing; refuse a storage that holds another."""
    optuna = import_optuna()
    with _storage_errors(search, ImportError, RuntimeError, ValueError):
        if search.storage.startswith("sqlite:///"):
            path = Path(search.storage.removeprefix("sqlite:///"))
            if path.exists():
                check_readable(path, "storage of trials")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(
                search.storage,
                heartbeat_interval=HEARTBEAT_S,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                    max_retry=3
                ),
                engine_kwargs={"connect_args": {"timeout": 60}}
                if search.storage.startswith("sqlite")
                else None,
            )
            study = optuna.create_study(
                storage=storage,
                study_name=STUDY,
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=STARTUP_TRIALS, n_warmup_steps=max(1, search.evaluations // 4)
                ),
            )
        found = study.user_attrs.get(NOTES)
        if found is None:
            if study.get_trials(deepcopy=False):
                raise ServegymError(
                    f"{search.storage}: holds trials of another program; choose another --output"
                )
            study.set_user_attr(NOTES, search.notes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)  # of processes that were killed
    if found is not None:
        compare(
            search.storage,
            "tuned with {name} {old}, this one has {new}",
            found,
            search.notes,
            "choose another --output",
        )
    return study


@contextmanager
def _storage_errors(search: Search, *others: type[Exception]) -> Iterator[None]:
    """Turn what a damaged or unreachable storage causes, and other errors, into one line."""
    import_optuna()
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ServegymError:
        raise
    except (SQLAlchemyError, StorageInternalError, *others) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()
        raise ServegymError(
            f"{search.storage}: cannot be used as a storage of trials: {' '.join(reason[:1])}; "
            "choose another --output, or mend it"
        ) from None


ENDED: Final = ("COMPLETE", "PRUNED")


def finished(study: optuna.Study) -> list[Any]:
    """Return the trials that have come to an end: complete or pruned."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ENDED]


def running(study: optuna.Study) -> int:
    """Return how many trials are under way."""
    return sum(trial.state.name == "RUNNING" for trial in study.get_trials(deepcopy=False))


def begun(study: optuna.Study) -> int:
    """Return how many trials have ended or are under way."""
    return len(finished(study)) + running(study)


def run_trial(search: Search, index: int) -> str:
    """Train one trial, unless others have begun all that is left; return a line about it, or nothing.

    With one process a trial depends on ``index`` and the trials before it alone, so that a study that
    was interrupted goes on as if it had not been.
    """
    optuna = import_optuna()
    study = open_study(search)
    with _storage_errors(search):
        if begun(study) >= search.trials:
            return ""
        with FileLock(search.folder / ".first.lock"):  # two processes may begin at once
            states = {trial.state.name for trial in study.get_trials(deepcopy=False)}
            if begun(study) == 0 and "WAITING" not in states:
                study.enqueue_trial(_first(search), user_attrs={DEFAULTS: True})
        entropy = [search.sampler_seed, index]
        if "RUNNING" in states:
            entropy.append(os.getpid())  # two processes must not draw the same numbers
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, seed=seed
        )
        ended: list[Any] = []
        study.optimize(
            partial(objective, search),
            n_trials=1,
            callbacks=[lambda _, trial: ended.append(trial)],
        )
    return describe(study, ended[0])


def _first(search: Search) -> dict[str, float]:
    """Return the numbers of the first trial: the defaults."""
    numbers = numbers_of(search.usual, search.names)
    return {name: int(x) if name in _WHOLE else x for name, x in numbers.items()}


def objective(search: Search, trial: optuna.Trial) -> float:
    """Train with a trial's numbers; return the best agent's gap in percent on the validation cases."""
    optuna = import_optuna()
    numbers = {name: SPACE[name].suggest(trial, name, name in _WHOLE) for name in search.names}
    hyperparameters = hyperparameters_of(search.usual, numbers)
    folder = search.folder / "trials" / str(trial.number)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    started = perf_counter()
    try:
        callback = train_with(search, hyperparameters, folder, pruning(trial))
    except ServegymError as error:
        if "no longer finite" not in str(error):
            raise
        raise optuna.TrialPruned(str(error)) from None
    finally:
        trial.set_user_attr("seconds", perf_counter() - started)
    best = callback.best
    trial.set_user_attr("timesteps", int(callback.evaluations.last_timesteps))
    if best is None or best["unfinished"]:
        return float("inf")
    return float(best["gap_percent"])


def train_with(
    search: Search,
    hyperparameters: Hyperparameters,
    folder: Path,
    on_evaluation: OnEvaluation | None = None,
) -> ServingCallback:
    """Train as every trial is trained, in an empty folder; return the callback, which knows the best."""
    from servegym.agents.callbacks import ServingCallback

    callback = ServingCallback(
        search.task,
        range(VALIDATION_SEED, VALIDATION_SEED + search.cases),
        search.every,
        {},
        asdict(hyperparameters),
        folder,
        plan_case=make_plan_case(hyperparameters, search.task),
        on_evaluation=on_evaluation,
    )
    quiet = Options(checkpoint_every=10**9, tensorboard=False, progress=False)
    try:
        train_watched(search.task, hyperparameters, folder, [callback], options=quiet)
    finally:
        for part in ("checkpoints", "tensorboard"):
            shutil.rmtree(folder / part, ignore_errors=True)
    return callback


def pruning(trial: optuna.Trial) -> Callable[[Evaluation], None]:
    """Return the hook that tells Optuna of an evaluation and ends a trial that it would prune."""
    optuna = import_optuna()

    def hook(evaluation: Evaluation) -> None:
        trial.set_user_attr("timesteps", evaluation.timesteps)
        gap_percent = evaluation.gap_percent
        trial.report(float("inf") if np.isnan(gap_percent) else gap_percent, evaluation.number)
        if not evaluation.last and trial.should_prune():
            raise optuna.TrialPruned

    return hook


def describe(study: optuna.Study, trial: Any) -> str:
    """Return in a line what a trial has come to, and which is the best."""
    best = best_of(study)
    tail = f"; best {best.value:.2f} % (trial {best.number})" if best is not None else ""
    if trial.state.name == "PRUNED":
        steps = trial.user_attrs.get("timesteps", 0)
        return f"trial {trial.number}: pruned after {steps:,} decisions{tail}"
    return f"trial {trial.number}: {trial.value:.2f} %{tail}"


def best_of(study: optuna.Study) -> Any:
    """Return the trial of the smallest gap; None while none is complete."""
    complete = [trial for trial in finished(study) if trial.state.name == "COMPLETE"]
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)
