"""What a policy's name on a command line stands for: a baseline, a trained agent, or its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from servegym.agents.card import CARD_FILE, read_card
from servegym.agents.policy import load_agent
from servegym.baselines import registry
from servegym.baselines.calendar.fitted import (
    CALENDAR_FILE,
    CalendarPlanner,
    calendar_policy,
    learned_hash,
    read_parameters,
)
from servegym.baselines.catalogue import REGISTRY
from servegym.baselines.rules.compiled import CompilablePolicy
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, read_bytes, read_json, write_file
from servegym.envs.playing.policy import Briefing, Policy
from servegym.envs.task.registered import NAMESPACE
from servegym.envs.workload.plan import Plan
from servegym.studies.cli import command_line
from servegym.studies.own_policies import is_own_policy, make_own_policy, source_hash

SHIPPED = "ppo"
"""The agent that is shipped for the task."""

_INSTALLED = Path(__file__).resolve().parents[1] / "shipped"

AGENTS = (
    _INSTALLED
    if _INSTALLED.is_dir()
    else Path(__file__).resolve().parents[2] / "results" / "agents"
)
"""The shipped agents, a folder a task: where the wheel has put them, or in the checkout's results."""

BEST = "agent"
"""Where a training run keeps its best agent, within its folder."""


def shipped() -> list[str]:
    """Return the tasks that an agent is shipped for, without the namespace."""
    return sorted(card.parent.name for card in AGENTS.glob(f"*/{CARD_FILE}"))


DESCRIPTIONS = {
    SHIPPED: f"the trained agent that is shipped for the task, of {', '.join(shipped())}",
    "FOLDER": f"a trained agent: a folder that holds {CARD_FILE} or {CALENDAR_FILE}, or that of a training "
    "run; a base of rollout, too, as ppo is: rollout:ppo",
    "MODULE:CLASS": "your own policy: a class of a module in this folder, also MODULE:CLASS(key=value)",
}


def make_policy(name: str, task_name: str, weights: Mapping[str, str] | None = None) -> Policy:
    """Return a new policy for a task.

    Parameters
    ----------
    name
        A baseline's name, ``ppo``, ``package.module:Class``, or a folder: anything with a ``/``, or
        what holds ``agent.json``. The folder of a training run stands for the best agent of that run.
        The base of ``rollout`` may be an agent, too: ``rollout:ppo``, ``rollout-4:runs/mine``.
    task_name
        Of the task to be played, which decides what ``ppo`` is.
    weights
        What :func:`note_agents` said: hashes of agents' weights by name, which must not change.

    Raises
    ------
    ServegymError
        If there is no such policy, or the agent's files are missing, refused or not those noted.
    """
    if registry.base_of(name) is not None:

        def make_base(base: str) -> CompilablePolicy:
            folder = agent_folder(base, task_name)
            if folder is None:
                return registry.make_trigger_policy(base)
            policy = _load_noted(name, folder, weights or {})
            assert isinstance(policy, CompilablePolicy)  # an agent, or a rule with its plan
            return policy

        return registry.make_policy(name, make_base)
    folder = agent_folder(name, task_name)
    if folder is not None:
        return _load_noted(name, folder, weights or {})
    if is_own_policy(name):
        _check_noted(name, name, source_hash(name), weights or {})
        return make_own_policy(name)
    return registry.make_policy(name)


def agent_folder(name: str, task_name: str) -> Path | None:
    """Return the folder of a trained agent; None for the name of a baseline."""
    if name == SHIPPED:
        return _shipped(task_name.removeprefix(f"{NAMESPACE}/"))
    for folder in (Path(name), Path(name) / BEST):
        if any((folder / file).is_file() for file in (CARD_FILE, CALENDAR_FILE)):
            return folder
    return Path(name) if "/" in name else None


def make_listed_policy(
    name: str, folders: Mapping[str, Path], weights: Mapping[str, str] | None = None
) -> Policy:
    """Return the agent whose folder is listed under the name, or the baseline of that name."""
    if name not in folders:
        return registry.make_policy(name)
    return _load_noted(name, folders[name], weights or {})


def _load_noted(name: str, folder: Path, weights: Mapping[str, str]) -> Policy:
    if _holds_calendar(folder):
        policy: Policy = calendar_policy(read_parameters(folder / CALENDAR_FILE))
    else:
        policy = load_agent(folder, planner_of)
    _check_noted(name, str(folder), _hash(folder), weights)
    return policy


def _holds_calendar(folder: Path) -> bool:
    return (folder / CALENDAR_FILE).is_file() and not (folder / CARD_FILE).exists()


def _hash(folder: Path) -> str:
    """Return the hash of the weights of a trained agent, or of its calendar."""
    if _holds_calendar(folder):
        return hashlib.sha256(read_bytes(folder / CALENDAR_FILE)).hexdigest()
    return read_card(folder / CARD_FILE).weights_sha256


def planner_of(name: str) -> Callable[[Briefing], Plan | None]:
    """Return what makes the offline plans of a policy, for an agent that follows them.

    Raises
    ------
    ServegymError
        If there is no such policy, or it plans nothing.
    """
    policy = registry.make_policy(name)
    if getattr(policy, "planner", None) is None:
        planned = [
            each
            for each, entry in REGISTRY.items()
            if getattr(entry.prototype, "planner", None) is not None
        ]
        raise ServegymError(f"policy {name!r} makes no offline plan; {', '.join(planned)} do")
    return policy.prepare


def _check_noted(name: str, place: str, digest: str, weights: Mapping[str, str]) -> None:
    if weights.get(name, digest) != digest:
        what = "source has" if is_own_policy(name) else f"weights of {name!r} have"
        raise ServegymError(
            f"{place}: the {what} changed while it played; choose a new --output folder"
        )


def weights_of(names: Sequence[str], task_name: str) -> dict[str, str]:
    """Return what may change behind a name, as hashes: weights, users' sources, what ``calendar`` learned."""
    folders = {name: agent_folder(registry.base_of(name) or name, task_name) for name in names}
    hashes = _hashes({name: folder for name, folder in folders.items() if folder is not None})
    own = [name for name in names if name not in hashes and is_own_policy(name)]
    hashes |= {name: source_hash(name) for name in own}
    rest = [name for name in names if name not in hashes]
    return hashes | {name: learned_hash(task_name) for name in rest if _is_calendar(name)}


def _is_calendar(name: str) -> bool:
    """Return whether a baseline plays a calendar that is shipped, itself or as the base of a search."""
    policy = registry.make_policy(registry.base_of(name) or name)
    return isinstance(getattr(policy, "planner", None), CalendarPlanner)


def note_agents(names: Sequence[str], task_name: str, output: Path) -> dict[str, str]:
    """Keep the hashes of :func:`weights_of` in ``output``; refuse a name whose hash changed."""
    return _note(weights_of(names, task_name), output)


def note_weights(folders: Mapping[str, Path], output: Path) -> dict[str, str]:
    """Keep the hashes of the weights of listed agents in ``output``; refuse a name whose hash changed."""
    return _note(_hashes(folders), output)


def _hashes(folders: Mapping[str, Path]) -> dict[str, str]:
    return {name: _hash(folder) for name, folder in folders.items()}


def _note(hashes: dict[str, str], output: Path) -> dict[str, str]:
    """Keep hashes by name in ``agents.json``; return them.

    Finished episodes are not played again, so an agent that was trained anew under the same name
    would get the rows of the old one.
    """
    if not hashes:
        return {}
    path = output / "agents.json"
    try:
        known = dict(read_json(path)) if path.exists() else {}
    except (TypeError, ValueError):
        raise ServegymError(f"{path}: damaged; choose a new --output folder") from None
    for name, digest in hashes.items():
        if known.get(name, digest) != digest:
            what = "another source" if is_own_policy(name) else "other weights"
            raise ServegymError(
                f"{output} holds episodes of {what} of {name!r}; choose a new --output folder"
            )
    make_folder(output)
    write_file(path, json.dumps(known | hashes, indent=2) + "\n")
    return hashes


def _shipped(task: str) -> Path:
    folder = AGENTS / task
    if not (folder / CARD_FILE).is_file():
        raise ServegymError(
            f"policy {SHIPPED!r}: no agent is shipped for {task}; train one with "
            f"`{command_line('train', task=task)}` and give its folder instead"
        )
    return folder
