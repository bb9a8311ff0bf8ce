"""Trained agents as policies: read from safetensors and JSON, run by kernels, without torch.

An agent is a folder of two files. ``agent.safetensors`` holds the weights ``0.weight``, ``0.bias``,
``1.weight`` … of a tanh network, float32. ``agent.json`` names the agent's features and actions, and
records its training. Nothing in either file can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from servegym.agents.actions import places_of
from servegym.agents.card import CARD_FILE, WEIGHTS_FILE, AgentCard, blocks_of, read_card
from servegym.agents.network import Network, read_network, to_safetensors
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.policy import Briefing, Policy, Situation
from servegym.envs.process.blocks import features_of
from servegym.envs.process.network import (
    CompiledAgent,
    DenseLayers,
    NetworkChoice,
    choose,
    make_agent,
    make_choice,
)
from servegym.envs.process.observation import FEATURES
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.workload.plan import Plan

Planner = Callable[[Briefing], Plan | None]
"""Makes the offline plan of an episode."""


class LearnedPolicy(Policy):
    """The legal action that a trained network scores highest.

    Runs on any number of clients: the size of the observation does not depend on that number.
    Actions are matched by their names, so a task may offer more of them, or in another order.
    Inputs are matched by the names of the features, so a task may observe more blocks, and a later
    servegym more features, or in another order, as long as its ``OBSERVATION_VERSION`` is the card's: that
    number says what the named features mean, and :func:`load_agent` refuses another.

    Parameters
    ----------
    network
        Scores the actions of ``card.actions``.
    card
        Names the features and the actions of the network.
    planner
        Plans as the policy ``card.plan`` does; needed only where the card names one, and to play.

    Raises
    ------
    ServegymError
        If no block of the observation has a feature of the card.

    Examples
    --------
    >>> card = AgentCard(("decode", "prefill:fcfs"), "events", (len(FEATURES), 2), "")
    >>> layer = (np.zeros((2, len(FEATURES)), np.float32), np.zeros(2, np.float32))
    >>> from servegym.envs import TASKS, make_case, play
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> policy = LearnedPolicy(Network([layer]), card)
    >>> round(play(task, "zeros", policy, make_case(task, 0), seed=0).row["gap"], 3)
    0.423
    """

    def __init__(self, network: Network, card: AgentCard, planner: Planner | None = None) -> None:
        self.network = network
        self.card = card
        self.planner = planner
        self.blocks = blocks_of(card.features)
        """Blocks of the observation that it reads; before ``prepare`` it expects just these."""
        columns = _columns_of(card.features, features_of(self.blocks))
        self._choice = make_choice(network.lowered, columns, np.arange(len(card.actions)))

    @property
    def decisions(self) -> Literal["rounds"] | None:
        """``rounds`` if the agent was trained on these; else the task's."""
        return "rounds" if self.card.decisions == "rounds" else None

    def check_task(self, task: TaskConfig) -> None:
        """Refuse a task that lacks one of the actions, or does not observe a block that the agent reads."""
        observed = task.process.observe
        if lacking := [block for block in self.blocks if block not in observed]:
            raise ServegymError(
                f"this agent observes {_listed(lacking)}, which process.observe of "
                f"{task.name} leaves out; add {'it' if len(lacking) == 1 else 'them'} there"
            )
        places_of(self.card.actions, task)

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Find the agent's actions and features in this task.

        Raises
        ------
        ServegymError
            As :meth:`check_task` does, or if the agent follows plans and has no planner.
        """
        self._choice = self._choice_in(briefing.task, self.network.lowered)
        if not self.card.plan:
            return None
        if self.planner is None:
            raise ServegymError(
                f"this agent follows the offline plans of {self.card.plan!r}: give load_agent a planner, as "
                "servegym.studies.policies.make_policy does"
            )
        return self.planner(briefing)

    def act(self, situation: Situation) -> int:
        """Return the best of its own actions that are legal; where none is, the first legal one."""
        return choose(self._choice, situation.observation, situation.mask, 0)

    def compiled(self, task: TaskConfig) -> CompiledAgent:
        """Return the agent as compiled loops play it in a task, with scratch of its own.

        Raises
        ------
        ServegymError
            If the task lacks one of the actions, or does not observe a block that the agent reads.
        """
        machine, layers = lower(task), self.network.lowered
        layers = replace(layers, signals=np.zeros_like(layers.signals))
        choice = self._choice_in(task, layers)
        return make_agent(choice, machine.settings, len(machine.features), len(task.actions))

    def _choice_in(self, task: TaskConfig, layers: DenseLayers) -> NetworkChoice:
        self.check_task(task)
        columns = _columns_of(self.card.features, features_of(task.process.observe))
        return make_choice(layers, columns, places_of(self.card.actions, task))


def _listed(blocks: Sequence[str]) -> str:
    return ("block " if len(blocks) == 1 else "blocks ") + " and ".join(map(repr, blocks))


def _columns_of(features: Sequence[str], observed: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each feature in the observation."""
    place = {name: k for k, name in enumerate(observed)}
    return np.array([place[name] for name in features], np.int64)


def save_agent(
    network: Network,
    folder: Path,
    actions: Sequence[str],
    decisions: str,
    task: dict[str, Any],
    training: dict[str, Any],
    features: Sequence[str] = FEATURES,
    plan: str = "",
) -> None:
    """Write an agent's two files into ``folder``, each under a temporary name first, the card last.

    A reader between the two writes finds a card whose hash does not fit, and refuses the agent.
    """
    data = to_safetensors(network)
    digest = hashlib.sha256(data).hexdigest()
    names, inputs = tuple(actions), tuple(features)
    card = AgentCard(
        names, decisions, network.sizes, digest, task, training, features=inputs, plan=plan
    )
    make_folder(folder)
    write_file(folder / WEIGHTS_FILE, data)
    write_file(folder / CARD_FILE, json.dumps(asdict(card), indent=2, default=str) + "\n")


def load_agent(
    folder: str | Path, planner_of: Callable[[str], Planner] | None = None
) -> LearnedPolicy:
    """Return the agent of a folder.

    ``planner_of`` returns the planner of a policy by name; it is asked where the agent follows plans.

    Raises
    ------
    ServegymError
        If a file is missing, damaged or was changed after it was written, if it is of another format
        or of another version of the observation, or names an action or a feature that does not exist.

    Examples
    --------
    >>> import tempfile
    >>> layer = (np.zeros((2, len(FEATURES)), np.float32), np.zeros(2, np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_agent(Network([layer]), Path(folder), ["decode", "prefill:fcfs"], "events", {}, {})
    ...     load_agent(folder).card.actions
    ('decode', 'prefill:fcfs')
    """
    folder = Path(folder)
    card = read_card(folder / CARD_FILE)
    network = read_network(folder / WEIGHTS_FILE, card)
    planner = planner_of(card.plan) if planner_of is not None and card.plan else None
    return LearnedPolicy(network, card, planner)
