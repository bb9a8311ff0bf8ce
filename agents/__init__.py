"""Trained agents: training, policies, export and loading.

The only room that may import torch and stable_baselines3. It builds on ``servegym.envs`` and never
imports ``servegym.baselines``. Playing an agent (``load_agent``) needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servegym.agents.hyperparameters import Hyperparameters as Hyperparameters
    from servegym.agents.hyperparameters import default_hyperparameters as default_hyperparameters
    from servegym.agents.policy import AgentCard as AgentCard
    from servegym.agents.policy import LearnedPolicy as LearnedPolicy
    from servegym.agents.policy import load_agent as load_agent
    from servegym.agents.training import train as train

_HOMES = {
    "hyperparameters": (
        "Hyperparameters",
        "default_hyperparameters",
    ),
    "policy": (
        "AgentCard",
        "LearnedPolicy",
        "load_agent",
    ),
    "training": ("train",),
}
"""Modules by the names that they give to this package."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AgentCard",
    "Hyperparameters",
    "LearnedPolicy",
    "default_hyperparameters",
    "load_agent",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: kernels load only where they are used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
