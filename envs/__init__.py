"""The environment and everything it is made of; imports neither baselines nor agents.

Importing this package registers the tasks with Gymnasium.

Examples
--------
>>> import gymnasium
>>> import servegym.envs
>>> env = gymnasium.make("servegym/Tiny-v0")
>>> observation, info = env.reset(seed=0)
>>> observation.shape, env.action_space.n
((65,), np.int64(7))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

from servegym.envs.task.registered import TASKS

if TYPE_CHECKING:
    from servegym.envs.bounds.batch import LowerBound as LowerBound
    from servegym.envs.bounds.batch import lower_bound as lower_bound
    from servegym.envs.errors import ServegymError as ServegymError
    from servegym.envs.machine.costs import AffineDecode as AffineDecode
    from servegym.envs.machine.costs import AffinePrefill as AffinePrefill
    from servegym.envs.machine.costs import CostModel as CostModel
    from servegym.envs.machine.costs import CostTables as CostTables
    from servegym.envs.machine.costs import EngineOverhead as EngineOverhead
    from servegym.envs.machine.costs import LevelledPrefill as LevelledPrefill
    from servegym.envs.machine.costs import StageCosts as StageCosts
    from servegym.envs.machine.costs import TableDecode as TableDecode
    from servegym.envs.machine.presets import cost_preset as cost_preset
    from servegym.envs.playing.evaluation import Episode as Episode
    from servegym.envs.playing.evaluation import evaluate as evaluate
    from servegym.envs.playing.evaluation import make_case as make_case
    from servegym.envs.playing.evaluation import play as play
    from servegym.envs.playing.policy import Briefing as Briefing
    from servegym.envs.playing.policy import Policy as Policy
    from servegym.envs.playing.policy import Situation as Situation
    from servegym.envs.playing.summary import summarise as summarise
    from servegym.envs.process.metrics import METRICS as METRICS
    from servegym.envs.process.observation import FEATURES as FEATURES
    from servegym.envs.serving_env import ServingEnv as ServingEnv
    from servegym.envs.simulator.view import DecisionView as DecisionView
    from servegym.envs.task.cases import Case as Case
    from servegym.envs.task.config import ClusterConfig as ClusterConfig
    from servegym.envs.task.config import InformationConfig as InformationConfig
    from servegym.envs.task.config import ProcessConfig as ProcessConfig
    from servegym.envs.task.config import TaskConfig as TaskConfig
    from servegym.envs.task.config import WorkloadConfig as WorkloadConfig
    from servegym.envs.task.config import with_overrides as with_overrides
    from servegym.envs.task.lowering import Machine as Machine
    from servegym.envs.task.lowering import lower as lower
    from servegym.envs.task.registered import load_task as load_task
    from servegym.envs.task.toml import read_task as read_task
    from servegym.envs.vector_env import ServingVectorEnv as ServingVectorEnv
    from servegym.envs.workload.csv import read_requests as read_requests
    from servegym.envs.workload.plan import Plan as Plan
    from servegym.envs.workload.plan import plan_from_queues as plan_from_queues
    from servegym.envs.workload.presets import make_workload as make_workload
    from servegym.envs.workload.requests import Requests as Requests
    from servegym.envs.workload.requests import make_requests as make_requests

_HOMES = {
    "bounds.batch": (
        "LowerBound",
        "lower_bound",
    ),
    "errors": ("ServegymError",),
    "machine.costs": (
        "AffineDecode",
        "AffinePrefill",
        "CostModel",
        "CostTables",
        "EngineOverhead",
        "LevelledPrefill",
        "StageCosts",
        "TableDecode",
    ),
    "machine.presets": ("cost_preset",),
    "playing.evaluation": (
        "Episode",
        "evaluate",
        "make_case",
        "play",
    ),
    "playing.policy": (
        "Briefing",
        "Policy",
        "Situation",
    ),
    "playing.summary": ("summarise",),
    "process.metrics": ("METRICS",),
    "process.observation": ("FEATURES",),
    "serving_env": ("ServingEnv",),
    "simulator.view": ("DecisionView",),
    "task.cases": ("Case",),
    "task.config": (
        "ClusterConfig",
        "InformationConfig",
        "ProcessConfig",
        "TaskConfig",
        "WorkloadConfig",
        "with_overrides",
    ),
    "task.lowering": (
        "Machine",
        "lower",
    ),
    "task.registered": ("load_task",),
    "task.toml": ("read_task",),
    "vector_env": ("ServingVectorEnv",),
    "workload.csv": ("read_requests",),
    "workload.plan": (
        "Plan",
        "plan_from_queues",
    ),
    "workload.presets": ("make_workload",),
    "workload.requests": (
        "Requests",
        "make_requests",
    ),
}
"""Modules by the names that they give to this package."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FEATURES",
    "METRICS",
    "TASKS",
    "AffineDecode",
    "AffinePrefill",
    "Briefing",
    "Case",
    "ClusterConfig",
    "CostModel",
    "CostTables",
    "DecisionView",
    "EngineOverhead",
    "Episode",
    "InformationConfig",
    "LevelledPrefill",
    "LowerBound",
    "Machine",
    "Plan",
    "Policy",
    "ProcessConfig",
    "Requests",
    "ServegymError",
    "ServingEnv",
    "ServingVectorEnv",
    "Situation",
    "StageCosts",
    "TableDecode",
    "TaskConfig",
    "WorkloadConfig",
    "cost_preset",
    "evaluate",
    "load_task",
    "lower",
    "lower_bound",
    "make_case",
    "make_requests",
    "make_workload",
    "plan_from_queues",
    "play",
    "read_requests",
    "read_task",
    "summarise",
    "with_overrides",
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


for _id in TASKS:
    if _id not in registry:  # it is there when this module is loaded again
        register(
            id=_id,
            entry_point="servegym.envs.serving_env:ServingEnv",
            vector_entry_point="servegym.envs.vector_env:ServingVectorEnv",
            kwargs={"task": _id},
        )
