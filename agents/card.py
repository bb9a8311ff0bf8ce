"""``agent.json``: what an agent's network reads and chooses, and how it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from servegym.agents.actions import actions_of_rules, check_actions
from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import read_json
from servegym.envs.process.blocks import block_of, features_of
from servegym.envs.process.observation import FEATURES, OBSERVATION_VERSION
from servegym.envs.vocabulary import OBSERVATION_BLOCKS

AGENT_FORMAT: Final = "servegym-agent-1"
"""Named in ``agent.json``; raised when the layout of the files changes."""

CARD_FILE: Final = "agent.json"
WEIGHTS_FILE: Final = "agent.safetensors"

KIND: Final = f"file of an agent, whose folder holds {CARD_FILE} and {WEIGHTS_FILE}"


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
    """Name of the action of each output, in order, as in ``TaskConfig.actions``;
    :class:`~servegym.agents.policy.LearnedPolicy` finds them by name.
    In older files ``rules`` R1, R2 … stand for ``decode``, ``prefill:R1`` …"""
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
    """Name of the feature of each input, in order, found by name as well."""
    plan: str = ""
    """The policy whose offline plans the agent was trained on; empty, as in older files: greedy ones."""


def read_card(path: Path) -> AgentCard:
    """Read and check ``agent.json``."""
    try:
        content = read_json(path, KIND)
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
        blocks_of(card.features)
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


def blocks_of(features: Sequence[str]) -> tuple[str, ...]:
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
