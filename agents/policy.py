"""Trained agents as policies: read from safetensors and JSON, run by kernels, without torch.

An agent is a folder of two files. ``agent.safetensors`` holds the weights ``0.weight``, ``0.bias``,
``1.weight`` … of a tanh network, float32. ``agent.json`` names the agent's features and actions, and
records its training. Nothing in either file can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from servegym.agents.actions import actions_of_rules, check_actions, places_of
from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import WRONG_VALUES, make_folder, read_bytes, read_json, write_file
from servegym.envs.playing.policy import Briefing, Policy, Situation
from servegym.envs.process.blocks import block_of, features_of
from servegym.envs.process.network import (
    CompiledAgent,
    DenseLayers,
    NetworkChoice,
    choose,
    make_agent,
    make_choice,
    make_layers,
    score_rows,
)
from servegym.envs.process.observation import FEATURES, OBSERVATION_VERSION
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.vocabulary import OBSERVATION_BLOCKS
from servegym.envs.workload.plan import Plan

AGENT_FORMAT: Final = "servegym-agent-1"
"""Named in ``agent.json``; raised when the layout of the files changes."""

CARD_FILE: Final = "agent.json"
WEIGHTS_FILE: Final = "agent.safetensors"

_KIND: Final = f"file of an agent, whose folder holds {CARD_FILE} and {WEIGHTS_FILE}"


class Network:
    """A multi-layer perceptron with tanh between its layers.

    Parameters
    ----------
    layers
        (weights (out, in), biases (out,)) from the first layer to the last, float32.
    """

    def __init__(self, layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        self.layers = list(layers)
        self.lowered = make_layers(self.layers)
        """The layers as kernels read them; they hold the scratch of one call at a time."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of inputs and of outputs of every layer."""
        return (self.layers[0][0].shape[1], *(len(biases) for _, biases in self.layers))

    def scores(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the score of every action, shape (…, actions), of observations (…, features)."""
        rows = np.ascontiguousarray(observations, np.float32).reshape(-1, self.sizes[0])
        scores = np.empty((len(rows), self.sizes[-1]), np.float32)
        score_rows(self.lowered, rows, scores)
        return scores.reshape(*observations.shape[:-1], self.sizes[-1])

    def best(self, observations: NDArray[np.float32], masks: NDArray[np.bool_]) -> Any:
        """Return the legal action with the highest score, the first of equals, shape (…)."""
        return best_legal(self.scores(observations), masks)

    def sampled(
        self,
        observations: NDArray[np.float32],
        masks: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> Any:
        """Return a legal action drawn with the policy's probabilities, as in training, shape (…)."""
        scores = self.scores(observations)
        # The largest of scores with Gumbel noise is a draw from their softmax.
        return best_legal(scores + rng.gumbel(size=scores.shape), masks)


def best_legal(scores: NDArray[np.floating[Any]], masks: NDArray[np.bool_]) -> Any:
    """Return the legal action with the highest score, the first of equals, shape (…)."""
    return np.where(masks, scores, -np.inf).argmax(axis=-1)


@dataclass(frozen=True)
class AgentCard:
    """The contents of ``agent.json``.

    Examples
    --------
    >>> actions = "decode", "prefill:fcfs"
    >>> AgentCard(actions, decisions="events", layers=(65, 2), weights_sha256="").actions
    ('decode', 'prefill:fcfs')
    """

    actions: tuple[str, ...]
    """Name of the action of each output, in order, as in ``TaskConfig.actions``; :class:`LearnedPolicy`
    finds them by name. In older files ``rules`` R1, R2 … stand for ``decode``, ``prefill:R1`` …"""
    decisions: str
    """``process.decisions`` of the agent's task: decisions at events or at every round."""
    layers: tuple[int, ...]
    """Number of inputs, then of outputs of every layer."""
    weights_sha256: str
    """SHA-256 of ``agent.safetensors``, in hexadecimal."""
    task: dict[str, Any] = field(default_factory=dict)
    """The task of the training, in full."""
    training: dict[str, Any] = field(default_factory=dict)
    """Command, commit, algorithm, steps and versions of libraries."""
    format: str = AGENT_FORMAT
    observation_version: int = OBSERVATION_VERSION
    features: tuple[str, ...] = FEATURES
    """Name of the feature of each input, in order; :class:`LearnedPolicy` finds them by name."""
    plan: str = ""
    """The policy whose offline plans the agent was trained on; empty, as in older files: greedy ones."""


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
        self.blocks = _blocks_of(card.features)
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


def _blocks_of(features: Sequence[str]) -> tuple[str, ...]:
    """Return the blocks of the observation that have these features.

    Raises
    ------
    ServegymError
        If no block has a feature.
    """
    found = {feature: block_of(feature) for feature in features}
    for feature, block in found.items():
        if block is None:
            raise ServegymError(
                f"of the agent's {len(features)} features, feature {shown(feature)} is not among the "
                f"{len(features_of(OBSERVATION_BLOCKS))} of this version; train it again"
            )
    return tuple(block for block in OBSERVATION_BLOCKS if block in found.values())


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
    tensors = {}
    for k, (weights, biases) in enumerate(network.layers):
        tensors[f"{k}.weight"] = np.ascontiguousarray(weights)
        tensors[f"{k}.bias"] = np.ascontiguousarray(biases)
    data = save(tensors)
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
    network = _read_network(folder / WEIGHTS_FILE, card)
    planner = planner_of(card.plan) if planner_of is not None and card.plan else None
    return LearnedPolicy(network, card, planner)


def read_card(path: Path) -> AgentCard:
    """Read and check ``agent.json``."""
    try:
        content = read_json(path, _KIND)
    except ServegymError as error:
        raise ServegymError(f"{error}; export the agent again") from None
    if not isinstance(content, dict) or content.get("format") != AGENT_FORMAT:
        name = content.get("format") if isinstance(content, dict) else None
        raise ServegymError(
            f"{path}: unknown agent format {shown(name)}; this version reads {AGENT_FORMAT!r}"
        )
    version = content.get("observation_version")
    if version != OBSERVATION_VERSION:
        raise ServegymError(
            f"{path}: the agent observes version {shown(version)} of the features, this servegym gives "
            f"version {OBSERVATION_VERSION}; train it again"
        )
    card = AgentCard(
        actions=_actions(path, content),
        decisions=content.get("decisions", ""),
        layers=_sizes(path, content),
        weights_sha256=str(content.get("weights_sha256")),
        task=_table(path, content, "task"),
        training=_table(path, content, "training"),
        features=_texts(path, content, "features"),
        plan=_text(path, content, "plan"),
    )
    _check(path, card)
    return card


def _check(path: Path, card: AgentCard) -> None:
    """Refuse a card that this version of the environment cannot serve."""
    try:
        _blocks_of(card.features)
    except ServegymError as error:
        raise ServegymError(f"{path}: {error}") from None
    if len(set(card.features)) != len(card.features):
        raise ServegymError(f"{path}: features must name each feature once")
    if card.decisions not in ("events", "rounds"):
        raise ServegymError(
            f"{path}: decisions must be 'events' or 'rounds', got {shown(card.decisions)}"
        )
    ends = (len(card.features), len(card.actions))
    if (card.layers[0], card.layers[-1]) != ends:
        raise ServegymError(
            f"{path}: layers must lead from {ends[0]} features to {ends[1]} actions, "
            f"got {shown(card.layers)}"
        )


def _read_network(path: Path, card: AgentCard) -> Network:
    data = read_bytes(path, _KIND)
    if hashlib.sha256(data).hexdigest() != card.weights_sha256:
        raise ServegymError(
            f"{path}: not the weights that {CARD_FILE} describes (its SHA-256 differs): truncated "
            "or changed; export the agent again"
        )
    try:
        tensors = load(data)
    except (SafetensorError, *WRONG_VALUES) as error:
        raise ServegymError(
            f"{path}: not a safetensors file: {shown(str(error))}; export the agent again"
        ) from None
    shapes: dict[str, tuple[int, ...]] = {}
    for k, (inputs, outputs) in enumerate(zip(card.layers[:-1], card.layers[1:], strict=True)):
        shapes |= {f"{k}.weight": (outputs, inputs), f"{k}.bias": (outputs,)}
    for name in sorted(shapes.keys() | tensors.keys()):
        _check_tensor(path, name, shapes.get(name), tensors.get(name))
    pairs = [(tensors[f"{k}.weight"], tensors[f"{k}.bias"]) for k in range(len(card.layers) - 1)]
    return Network(pairs)


def _check_tensor(
    path: Path, name: str, shape: tuple[int, ...] | None, tensor: NDArray[Any] | None
) -> None:
    if shape is None or tensor is None:
        what = "lacks" if tensor is None else "has an unknown"
        raise ServegymError(f"{path}: {what} tensor {shown(name)}; {CARD_FILE} describes others")
    if tensor.shape != shape or tensor.dtype != np.float32:
        raise ServegymError(
            f"{path}: tensor {name!r} must be float32 of shape {shape}, "
            f"got {tensor.dtype} of {tensor.shape}"
        )
    if not np.isfinite(tensor).all():
        raise ServegymError(f"{path}: tensor {name!r} holds NaN or infinity; train the agent again")


def _actions(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Return the card's actions; the first versions noted admission rules only."""
    key = "actions" if "actions" in content else "rules"
    names = _texts(path, content, key)
    if not names or len(set(names)) != len(names):
        raise ServegymError(f"{path}: {key} must name at least one of the {key}, each once")
    actions = names if key == "actions" else actions_of_rules(names)
    try:
        check_actions(actions)
    except ServegymError as error:
        raise ServegymError(f"{path}: {error}") from None
    return actions


def _texts(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    values = content.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ServegymError(f"{path}: {key} must be a list of texts, got {shown(values)}")
    return tuple(values)


def _text(path: Path, content: dict[str, Any], key: str) -> str:
    """Return a text; empty where an older file lacks it."""
    value = content.get(key, "")
    if not isinstance(value, str):
        raise ServegymError(f"{path}: {key} must be a text, got {shown(value)}")
    return value


def _sizes(path: Path, content: dict[str, Any]) -> tuple[int, ...]:
    values = content.get("layers")
    if (
        not isinstance(values, list)
        or len(values) < 2
        or not all(type(value) is int and value > 0 for value in values)
    ):
        raise ServegymError(
            f"{path}: layers must be two or more whole numbers, got {shown(values)}"
        )
    return tuple(values)


def _table(path: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    values = content.get(key)
    if not isinstance(values, dict):
        raise ServegymError(f"{path}: {key} must be a table, got {shown(values)}")
    return values
