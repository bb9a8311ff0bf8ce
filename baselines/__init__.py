"""Baseline policies, planners and exact optima.

Examples
--------
>>> from servegym.baselines import make_policy, play_compiled
>>> from servegym.envs import TASKS, make_case
>>> task = TASKS["servegym/Tiny-v0"]
>>> round(play_compiled(task, make_policy("hybrid"), make_case(task, 0))["gap"], 3)
0.186
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servegym.baselines.calendar.planner import plan_jointly as plan_jointly
    from servegym.baselines.exact.optimum import exact_optimum as exact_optimum
    from servegym.baselines.expert import make_rollout_expert as make_rollout_expert
    from servegym.baselines.lookahead.rollout import RolloutPolicy as RolloutPolicy
    from servegym.baselines.planning.planner import CertifiedPlan as CertifiedPlan
    from servegym.baselines.planning.planner import plan_offline as plan_offline
    from servegym.baselines.registry import make_policy as make_policy
    from servegym.baselines.registry import make_trigger_policy as make_trigger_policy
    from servegym.baselines.registry import policy_descriptions as policy_descriptions
    from servegym.baselines.rules.compiled import play_compiled as play_compiled
    from servegym.baselines.rules.policies import RandomPolicy as RandomPolicy
    from servegym.baselines.rules.policies import TriggerPolicy as TriggerPolicy

_HOMES = {
    "calendar.planner": ("plan_jointly",),
    "exact.optimum": ("exact_optimum",),
    "expert": ("make_rollout_expert",),
    "lookahead.rollout": ("RolloutPolicy",),
    "planning.planner": (
        "CertifiedPlan",
        "plan_offline",
    ),
    "registry": (
        "make_policy",
        "make_trigger_policy",
        "policy_descriptions",
    ),
    "rules.compiled": ("play_compiled",),
    "rules.policies": (
        "RandomPolicy",
        "TriggerPolicy",
    ),
}
"""Modules by the names that they give to this package."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CertifiedPlan",
    "RandomPolicy",
    "RolloutPolicy",
    "TriggerPolicy",
    "exact_optimum",
    "make_policy",
    "make_rollout_expert",
    "make_trigger_policy",
    "plan_jointly",
    "plan_offline",
    "play_compiled",
    "policy_descriptions",
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
