"""An engine, the simulator by itself, ``play`` and plain generation, on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from servegym.engines.iterations import Iteration, first_difference, simulate
from servegym.engines.twin import Twin
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.playing.evaluation import play
from servegym.envs.playing.policy import Policy
from servegym.envs.playing.tables import ResumableTable, Schema
from servegym.envs.playing.tables import Row as TableRow
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.registered import load_task
from servegym.envs.workload.requests import Requests
from servegym.studies.engines.loads import Load, engine_policy, random_prompts

COSTS = StageCosts(
    AffineDecode(2.2e-3, 1.1e-4, 1.9e-6), AffinePrefill(3.6e-3, 6.9e-5, 0.0, 0.0, 6.3e-8)
)
"""About those of the tiny model on one core; the same in every run, so that decisions are, too."""

KNOWN = ("fcfs", "threshold-4", "lookahead", "aligned", "hybrid", "offline-steal", "rollout", "ppo")
PREDICTED = ("fcfs", "hybrid", "quantile", "feedback", "ppo")


@dataclass(frozen=True)
class Setting:
    """What is known of requests and when they come."""

    name: str
    policies: tuple[str, ...]
    predicted: bool = False
    rate: float = 0.0
    ends: bool = False
    """Whether a token ends a text; which ones depends on what the model says."""


SETTINGS = (
    Setting("lengths known, all present", KNOWN),
    Setting("lengths known, arriving", KNOWN, rate=60.0),
    Setting("lengths predicted, all present", PREDICTED, predicted=True),
    Setting("lengths predicted, arriving", PREDICTED, predicted=True, rate=60.0),
    Setting("texts end by themselves, arriving", PREDICTED, predicted=True, rate=60.0, ends=True),
)


@dataclass(frozen=True)
class Row:
    """One engine run."""

    setting: str
    policy: str
    iterations: int
    difference: int | None
    """Where the simulator's trace first differs; None: nowhere."""
    unequal: tuple[str, ...]
    """Columns of the records that differ from those of ``play`` in any bit."""
    tokens_equal: int
    """Requests whose tokens are those of ``generate``."""
    requests: int
    asked: int

    @property
    def same(self) -> bool:
        """Whether iterations, records and tokens are all as they are to be."""
        return self.difference is None and not self.unequal and self.tokens_equal == self.requests


_NONE: Final = "none"
_SCHEMA: Final = Schema(
    columns=tuple(item.name for item in fields(Row)),
    key=("setting", "policy"),
    whole=("iterations", "tokens_equal", "requests", "asked"),
    texts=("setting", "policy", "unequal"),
    optional=("difference",),
    if_deleted="its run is made again",
)


def open_rows(path: Path) -> ResumableTable:
    """Return the engine runs that a folder has."""
    return ResumableTable(path, _SCHEMA, "remove the file", ("setting", "policy"))


def to_table(row: Row) -> TableRow:
    """Return a row as it stands in a table."""
    difference = np.nan if row.difference is None else row.difference
    return asdict(row) | {"unequal": " ".join(row.unequal) or _NONE, "difference": difference}


def from_table(row: TableRow) -> Row:
    """Return a row of a table."""
    unequal = () if row["unequal"] == _NONE else tuple(str(row["unequal"]).split())
    difference = None if np.isnan(row["difference"]) else int(row["difference"])
    return Row(**row | {"unequal": unequal, "difference": difference})


def setting_task(setting: Setting, clients: int) -> TaskConfig:
    """Return the task of a setting."""
    task = load_task("GSM8KPredicted-v0" if setting.predicted else "GSM8K-v0")
    rate = {"workload": {"arrival_rate_per_s": setting.rate}} if setting.rate > 0 else {}
    task = with_overrides(task, {"cluster": {"clients": clients}} | rate)
    return replace(task, cost=COSTS)


def setting_load(setting: Setting, count: int, vocabulary: int, seed: int) -> Load:
    """Return the requests of a setting; prompts and most tokens are the same in all of them."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(10, 81, count), rng.integers(8, 81, count)
    spread = np.full(count, 0.5)
    noise = np.exp(0.5 * rng.standard_normal(count) - 0.125)
    gaps = rng.exponential(1.0, count)
    requests = Requests(
        np.cumsum(gaps) / setting.rate if setting.rate > 0 else np.zeros(count),
        prompts,
        outputs,
        np.maximum(np.rint(outputs * noise), 1).astype(int) if setting.predicted else outputs,
        spread if setting.predicted else None,
    )
    return random_prompts(requests, vocabulary, seed)


_outputs: dict[Any, list[list[int]]] = {}


def plain_outputs(model: Any, load: Load) -> list[list[int]]:
    """Return what ``generate`` says to each prompt; the same question is not asked twice."""
    from servegym.engines.huggingface import generate

    most = load.requests.output_tokens.tolist()
    asked = (id(model), load.prompts, tuple(most), load.ends)
    if asked not in _outputs:
        pairs = zip(load.prompts, most, strict=True)
        _outputs[asked] = [generate(model, prompt, count, load.ends) for prompt, count in pairs]
    return _outputs[asked]


def found_ends(outputs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return token ids that end every other of these outputs somewhere before its middle, or others."""
    return tuple(sorted({output[len(output) // 2] for output in outputs[::2]}))


def unequal_columns(one: EpisodeLog, other: EpisodeLog) -> tuple[str, ...]:
    """Return the columns of two logs that differ in any bit."""
    names = [item.name for item in fields(EpisodeLog)]
    return tuple(n for n in names if getattr(one, n).tobytes() != getattr(other, n).tobytes())


class Run(NamedTuple):
    """What an engine has done."""

    iterations: Sequence[Iteration]
    tokens: dict[int, list[int]]
    twin: Twin


Serve = Callable[[Load, TaskConfig, Policy, int], Run]
"""Serves a load of a task under a policy, with a seed."""


def by_transformers(model: Any) -> Serve:
    """Return what serves by an engine of transformers."""

    def serve(load: Load, task: TaskConfig, policy: Policy, seed: int) -> Run:
        engine = load.engine(model, task, policy, seed=seed)
        while engine.step() is not None:
            pass
        return Run(engine.iterations, engine.tokens(), engine.twin)

    return serve


def run_setting(
    model: Any,
    setting: Setting,
    count: int,
    clients: int,
    seed: int,
    serve: Serve | None = None,
) -> Iterator[Row]:
    """Serve a setting under its policies, one engine run each; ``model`` says what is right."""
    serve = serve or by_transformers(model)
    task = setting_task(setting, clients)
    load = setting_load(setting, count, int(model.config.vocab_size), seed)
    plain = plain_outputs(model, load)
    if setting.ends:
        load = replace(load, ends=found_ends(plain))
        plain = plain_outputs(model, load)
    for name in setting.policies:
        iterations, tokens, twin = serve(load, task, engine_policy(name, task), seed)
        found = load.revealed(tokens)
        simulated, _ = simulate(task, engine_policy(name, task), found, seed)
        case = bound_case(lower(task), found)
        episode = play(task, name, engine_policy(name, task), case, seed)
        yield Row(
            setting.name,
            name,
            len(iterations),
            first_difference(iterations, simulated),
            unequal_columns(twin.records(), episode.records),
            sum(tokens[i] == answer for i, answer in enumerate(plain)),
            count,
            int(episode.row["decisions"]),
        )


def equality_table(rows: Sequence[Row]) -> str:
    """Return a row a run, as a table in Markdown."""
    lines = [
        "| setting | policy | decisions | iterations | equal | records | tokens as `generate` |",
        "|:--|:--|--:|--:|:--|:--|--:|",
    ]
    for row in rows:
        equal = "all" if row.difference is None else f"until {row.difference}"
        records = ", ".join(row.unequal) or "to the last bit"
        lines.append(
            f"| {row.setting} | {row.policy} | {row.asked} | {row.iterations} | {equal} | {records} | "
            f"{row.tokens_equal} of {row.requests} |"
        )
    return "\n".join(lines)
