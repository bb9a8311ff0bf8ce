"""Play policies on the same cases and tabulate what came of it.

One row per episode in ``DIR/episodes.csv``, if asked for also one per request in ``DIR/records``;
finished episodes are never run again, so an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
import pandas as pd
from gymnasium.utils import seeding
from tqdm import tqdm

from servegym.envs.errors import ServegymError
from servegym.envs.playing.identity import check_unchanged, claim_task, hash_of
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import Workers, run_parallel
from servegym.envs.playing.policy import Briefing, Policy, Situation, asked_task
from servegym.envs.playing.records import records_path, records_text, write_records
from servegym.envs.playing.service import SERVICE, Window, check_window, service_rows
from servegym.envs.playing.tables import ResumableTable, Row, Schema, read_rows
from servegym.envs.process.metrics import METRIC_DEFAULTS, METRICS, EpisodeLog
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.cases import Case, sample_requests
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, lower

UNFINISHED: Final = "unfinished_requests"

_COUNTS: Final = (
    "replicas",
    "mixed_stages",
    "preemptions",
    "recomputed_tokens",
    "rejected",
    "moves",
    "shed",
)
_LATER: Final = METRICS[METRICS.index(UNFINISHED) :]  # behind the first tables' columns

COLUMNS: Final = (
    "task",
    "policy",
    "seed",
    *(metric for metric in METRICS if metric not in _LATER),
    "decision_ms_p50",
    "decision_ms_p99",
    "decision_points",
    "prepare_s",
    *_LATER,
)
"""Columns of ``episodes.csv``."""

EPISODES: Final = Schema(
    COLUMNS,
    key=("policy", "seed"),
    whole=("seed", UNFINISHED, *_COUNTS),
    texts=("task", "policy", "decision_points"),
    optional=("makespan_s", "gap", *(name for name in METRIC_DEFAULTS if name not in _COUNTS)),
    defaults=METRIC_DEFAULTS,
)
"""What ``episodes.csv`` must be; an empty cell is a metric that has no value or was not measured."""

BEST_KNOWN: Final = Schema(
    ("task", "seed", "best_known_s"),
    others=True,
    key=("task", "seed"),
    texts=("task", "found_by"),
    optional=None,
    if_deleted="search its case again with scripts/best_known.py",
)
"""What ``best_known.csv`` must be; a policy's makespan is NaN where it was cut short."""

_REMEDY: Final = "remove the file or choose a new folder"

NO_CUT: Final = Window()

HELD_OUT_SEED: Final = 1_000_000
"""Seeds below are for training and tuning, seeds from here on for held-out evaluation."""


@dataclass(frozen=True)
class Episode:
    """One policy on one case: its row of the table and its per-request records.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> episode = play(task, "fcfs", make_policy("fcfs"), make_case(task, 0), seed=0)
    >>> episode.records.finished_s.max() == episode.row["makespan_s"]
    np.True_
    """

    row: dict[str, Any]
    records: EpisodeLog
    elapsed_s: float
    """When it ended, also where it was cut short."""


def make_case(task: TaskConfig, seed: int) -> Case:
    """Return the case that ``env.reset(seed=seed)`` of the task plays.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> case = make_case(TASKS["servegym/Tiny-v0"], seed=0)
    >>> len(case.requests), round(case.bound.seconds, 2)
    (8, 21.08)
    """
    requests = sample_requests(task, seeding.np_random(seed)[0])
    return bound_case(lower(task), requests)


def play(task: TaskConfig, name: str, policy: Policy, case: Case, seed: int) -> Episode:
    """Play one episode and time every decision.

    The task is asked as the policy declares; the column ``decision_points`` says where.

    Raises
    ------
    ServegymError
        If the policy declares what no task can have, refuses the task, or returns a plan that does not
        fit the case or no legal action. The message names the policy.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> episode = play(task, "fcfs", make_policy("fcfs"), make_case(task, 0), seed=0)
    >>> round(episode.row["makespan_s"], 2), round(episode.row["gap"], 3)
    (28.0, 0.328)
    """
    with _naming(name):
        task = asked_task(task, policy)
    env = ServingEnv(task)
    nanoseconds: list[int] = []
    ended = False
    info: dict[str, Any] = {}
    with _naming(name):
        started = perf_counter_ns()
        plan = policy.prepare(brief(task, case, seed))
        prepare_s = (perf_counter_ns() - started) / 1e9
        options = {"requests": case.requests, "bound": case.bound, "plan": plan}
        observation, _ = env.reset(seed=seed, options=options)
        while not ended:
            started = perf_counter_ns()
            mask = env.action_masks()
            action = policy.act(Situation(env.view(), observation, mask, env.imagine, env.outlook))
            nanoseconds.append(perf_counter_ns() - started)
            observation, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated or info["illegal_action"]
    if info["illegal_action"]:
        raise ServegymError(f"policy {name} chose illegal action {action}")
    row = {"task": task.name, "policy": name, "seed": seed}
    row |= {metric: info[metric] for metric in METRICS}
    row["decision_ms_p50"], row["decision_ms_p99"] = np.percentile(nanoseconds, [50, 99]) / 1e6
    row["decision_points"] = task.process.decisions
    row["prepare_s"] = prepare_s
    assert env.state is not None
    return Episode(row, env.records(), float(env.state.episodes["now_s"][0]))


@contextmanager
def _naming(policy: str) -> Iterator[None]:
    """Name the policy in a refusal of what it declares or returns, and in its own refusals."""
    try:
        yield
    except ServegymError as error:
        raise ServegymError(f"policy {policy}: {error}") from None


def check_policies(
    task: TaskConfig, make_policy: Callable[[str], Policy], names: Iterable[str]
) -> None:
    """Refuse policies that are unknown, declare what the task cannot have or cannot play it.

    Raises
    ------
    ServegymError
        Naming the first of them.
    """
    for name in names:
        policy = make_policy(name)
        with _naming(name):
            asked = asked_task(task, policy)
            if check := getattr(policy, "check_task", None):  # of what derives from Policy
                check(asked)


def brief(task: TaskConfig, case: Case, seed: int) -> Briefing:
    """Return what a policy is told before it plays a case: expected, never true, output lengths."""
    known = task.information.output_lengths == "known"
    requests = case.requests if known else case.requests.as_predicted()
    present = int(np.searchsorted(requests.arrival_s, 0.0, side="right"))
    # Apart from the workload's stream, so that a policy's luck and the instance are independent.
    rng = np.random.default_rng([seed, 1])
    return Briefing(task, requests.first(present), rng)


def evaluate(
    task: TaskConfig,
    make_policy: Callable[[str], Policy],
    names: Sequence[str],
    seeds: Iterable[int],
    output: Path,
    *,
    jobs: Workers = 1,
    progress: bool = True,
    records: bool = False,
    window: Window = NO_CUT,
) -> pd.DataFrame:
    """Play every policy on every seed and return these episodes, sorted by policy and seed.

    Parameters
    ----------
    task, names, seeds
        What to play. Policies meet the same instance under the same seed.
    make_policy
        Makes a policy by name; must be picklable, as it runs in worker processes.
    output
        Folder for ``episodes.csv`` and ``task.json``; made if missing. Episodes that stand in it are
        kept there, also those of policies and seeds not asked for now.
    jobs
        Worker processes, of which no more are started than can be busy; or the workers of a cluster.
    progress
        Whether to show a bar on stderr.
    records
        Whether to write a row per request to ``records/POLICY-SEED.csv``, too; an episode without
        that file is played again. See :mod:`servegym.envs.playing.records`.
    window
        What is left out of the arrivals in ``service.csv``, which is written where anything is, and where
        requests have classes; see :mod:`servegym.envs.playing.service`.

    Raises
    ------
    ServegymError
        If a policy is unknown, the folder cannot be written, holds another task's episodes or is
        written to by another process, if the task's workload file changes meanwhile, or if no request of
        an episode arrives in the window.

    Examples
    --------
    >>> import tempfile
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = evaluate(task, make_policy, ["fcfs", "lpt"], range(3), Path(folder), progress=False)
    >>> table[["policy", "seed", "gap"]].round(3).values.tolist()[:2]
    [['fcfs', 0, 0.328], ['fcfs', 1, 0.337]]
    """
    # Refuse an unknown policy or a bad workload file before anything is written.
    check_policies(task, make_policy, names)
    requests = sample_requests(task, np.random.default_rng(0))
    check_window(window)
    serves = window if window.cuts or requests.class_of is not None else None
    names, seeds = list(dict.fromkeys(names)), list(dict.fromkeys(seeds))
    with locked(output):
        return _evaluate(
            claim_task(task, output),
            make_policy,
            names,
            seeds,
            output,
            jobs,
            progress,
            records,
            serves,
        )


def _evaluate(
    task: TaskConfig,
    make_policy: Callable[[str], Policy],
    names: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    workers: Workers,
    progress: bool,
    records: bool,
    window: Window | None,
) -> pd.DataFrame:
    place = {name: k for k, name in enumerate(names)}

    def order(row: Row) -> tuple[int, str, int]:
        """Sort by the order of ``names``, then by seed; other policies come last."""
        return place.get(row["policy"], len(place)), row["policy"], row["seed"]

    path = output / "episodes.csv"
    table = ResumableTable(path, EPISODES, _REMEDY, ("policy", "seed"), order=order)
    _check_episodes(path, table.frame())
    service = read_service(output, order)
    cases: list[tuple[int, list[str], set[str]]] = []
    any_records = records_path(output, "", 0).parent.is_dir()
    for seed in seeds:
        unplayed = set(table.missing((name, seed) for name in names))
        recorded = {x for x in names if any_records and records_path(output, x, seed).exists()}
        pending = [
            name
            for name in names
            if (name, seed) in unplayed
            or (records and name not in recorded)
            or (window is not None and service.missing([(name, seed, *window)]))
        ]
        if pending:
            cases.append((seed, pending, set(names) if records else recorded))
    if not isinstance(workers, int):
        make_policy = workers.carried(make_policy, names)
    play_case = partial(_play_case, task, hash_of(task), make_policy, window)
    results = run_parallel(play_case, cases, workers)
    bar = tqdm(total=sum(len(pending) for _, pending, _ in cases), disable=not progress)
    with bar, closing(results), table, service:  # saved first: to stop the workers may take a while
        for played in results:
            for name, text in played.records.items():
                write_records(records_path(output, name, played.seed), text)
            if played.served:
                service.add(played.served)
            table.add(played.rows)
            bar.update(len(played.rows))
    asked = {(name, seed) for name in names for seed in seeds}
    rows = [row for row in table.rows if (row["policy"], row["seed"]) in asked]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass
class _Played:
    """What came of a case: a row a policy, its rows of ``service.csv``, the content of its records."""

    seed: int
    rows: list[Row] = field(default_factory=list)
    served: list[Row] = field(default_factory=list)
    records: dict[str, str] = field(default_factory=dict)


def _play_case(
    task: TaskConfig,
    known: Mapping[str, str],
    make_policy: Callable[[str], Policy],
    window: Window | None,
    seed: int,
    names: Sequence[str],
    recorded: Collection[str],
) -> _Played:
    """Play a case under each policy; refuse another workload file.

    Rows of ``service.csv`` are made for a window, records for the policies in ``recorded``. They are written
    before the rows are: an episode with a row has its records. Those that stand in the folder are written
    again with their row, also where none were asked for.
    """
    check_unchanged(task, known)
    case = make_case(task, seed)
    episodes = [play(task, name, make_policy(name), case, seed) for name in names]
    check_unchanged(task, known)
    played = _Played(seed, [episode.row for episode in episodes])
    for name, episode in zip(names, episodes, strict=True):
        if name in recorded:
            played.records[name] = records_text(episode.records, case.requests)
        if window is not None:
            rows = service_rows(episode.records, case.requests, window, episode.elapsed_s)
            played.served += [{"policy": name, "seed": seed} | row for row in rows]
    return played


def read_service(
    output: Path, order: Callable[[Row], tuple[int, str, int]] | None = None
) -> ResumableTable:
    """Return the ``service.csv`` of a folder, without rows where there is none.

    Raises
    ------
    ServegymError
        One line naming file and line of what is damaged or of another version.
    """
    key = ("policy", "seed", "warmup_s", "cooldown_s")
    return ResumableTable(output / "service.csv", SERVICE, _REMEDY, key, order=order)


def read_episodes(path: Path) -> pd.DataFrame:
    """Return an ``episodes.csv``, without rows where there is no file.

    Raises
    ------
    ServegymError
        One line naming file and line of what is damaged or of another version.
    """
    table = read_rows(path, EPISODES, _REMEDY)
    _check_episodes(path, table)
    return table


def _check_episodes(path: Path, table: pd.DataFrame) -> None:
    """Refuse a row whose gap no episode has."""
    cut_short = table[UNFINISHED] > 0
    no_gap = cut_short | (table["shed"] > 0)
    wrong = (table["gap"].isna() != no_gap) | (table["makespan_s"].isna() != cut_short)
    # No schedule is below the bound, rounding apart: such an episode was cut short.
    wrong |= table["gap"] < -1e-6
    if wrong.any():
        row = table.iloc[int(np.argmax(wrong))]
        raise ServegymError(
            f"{path}: the row of policy {row['policy']}, seed {row['seed']}: a gap of {row['gap']:.4g} "
            f"with {row[UNFINISHED]} unfinished requests cannot be; delete it, and it is played again"
        )


def read_best_known(path: Path, task_name: str, episodes: pd.DataFrame) -> pd.DataFrame | None:
    """Return a ``best_known.csv`` for :func:`servegym.envs.playing.summary.summarise`; None without the file.

    Parameters
    ----------
    path
        As ``scripts/best_known.py`` writes it; the columns ``task``, ``seed`` and ``best_known_s`` are
        enough. ``lower_bound_s`` is compared with the episodes', if it is there.
    task_name, episodes
        What it must be of.

    Raises
    ------
    ServegymError
        If the file is no such table, or of another task or version.
    """
    if not path.exists():
        return None
    table = read_rows(path, BEST_KNOWN, "remove the file")
    if not (table["task"] == task_name).all() or not table["seed"].is_unique:
        raise ServegymError(f"{path}: must hold every case of {task_name} once and no other task")
    ours = episodes.groupby("seed")["lower_bound_s"].first()
    both = table[table["seed"].isin(ours.index)]
    bounds_s = ours.loc[both["seed"]].to_numpy()
    theirs_s = both["lower_bound_s"] if "lower_bound_s" in table.columns else bounds_s
    if (
        not np.allclose(theirs_s, bounds_s, rtol=1e-9)
        or (both["best_known_s"] < (1 - 1e-9) * bounds_s).any()
    ):
        raise ServegymError(f"{path}: best-known schedules of another task or version")
    return table
