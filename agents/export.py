"""From a Stable-Baselines3 model to an agent that needs neither torch nor pickle."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from servegym.agents.network import Network
from servegym.agents.policy import save_agent
from servegym.envs.errors import ServegymError
from servegym.envs.playing.identity import notes_of
from servegym.envs.process.blocks import features_of
from servegym.envs.task.config import TaskConfig

_LIBRARIES: Final = ("servegym", "numpy", "torch", "stable_baselines3", "sb3_contrib")


def policy_network(model: OnPolicyAlgorithm) -> Network:
    """Copy the policy network of PPO or MaskablePPO.

    Raises
    ------
    ServegymError
        If it is anything but SB3's ``MlpPolicy`` with tanh on the plain observation.
    """
    policy: Any = model.policy
    if not isinstance(getattr(policy, "features_extractor", None), FlattenExtractor):
        raise ServegymError(f"cannot export {type(policy).__name__}: only MlpPolicy")
    normaliser = model.get_vec_normalize_env()
    if normaliser is not None and normaliser.norm_obs:
        raise ServegymError("cannot export an agent of normalised observations: set norm_obs=False")
    modules = list(policy.mlp_extractor.policy_net)
    expected = [nn.Linear, nn.Tanh] * (len(modules) // 2)
    if len(modules) != len(expected) or not all(map(isinstance, modules, expected)):
        raise ServegymError("cannot export a policy network that is not linear layers and tanh")
    linear = [*modules[::2], policy.action_net]
    return Network(
        [
            (layer.weight.detach().cpu().numpy().copy(), layer.bias.detach().cpu().numpy().copy())
            for layer in linear
        ]
    )


def export_agent(
    model: OnPolicyAlgorithm, task: TaskConfig, command: str, folder: Path, plan: str = ""
) -> None:
    """Write the policy of a model as ``agent.safetensors`` and ``agent.json``.

    Parameters
    ----------
    model
        PPO of stable-baselines3 or MaskablePPO of sb3-contrib, with ``MlpPolicy`` and tanh.
    task
        What it was trained on; its actions, decisions and features are the agent's.
    command
        The command line that trained it, kept for the reader.
    folder
        Made if it is missing; an agent in it is replaced.
    plan
        The policy whose offline plans it was trained on; empty: greedy ones.
    """
    network = policy_network(model)
    features = features_of(task.process.observe)
    ends = (len(features), len(task.actions))
    if (network.sizes[0], network.sizes[-1]) != ends:
        raise ServegymError(
            f"cannot export: the network leads from {network.sizes[0]} to {network.sizes[-1]}, "
            f"{task.name} has {ends[0]} features and {ends[1]} actions"
        )
    training = {
        "command": command,
        "commit": _commit(),
        "algorithm": type(model).__name__,
        "timesteps": model.num_timesteps,
        "versions": {"python": platform.python_version()} | _versions(),
    }
    decisions = task.process.decisions
    notes = notes_of(task)
    save_agent(network, folder, task.actions, decisions, notes, training, features, plan)


def _versions() -> dict[str, Any]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _commit() -> str:
    """Return the commit of the checkout, ``-dirty`` behind it if there are changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"
