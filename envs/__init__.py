"""The environment and everything it is made of; imports neither baselines nor agents.

Importing this package registers the tasks with Gymnasium::

    import gymnasium
    import servegym.envs

    env = gymnasium.make("servegym/Paper-v0")
"""

from gymnasium.envs.registration import register, registry

from servegym.envs.errors import ServegymError
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import TASKS, load_task
from servegym.envs.workload.csv import read_requests
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests, make_requests

__all__ = [
    "TASKS",
    "Plan",
    "Requests",
    "ServegymError",
    "ServingEnv",
    "TaskConfig",
    "load_task",
    "make_requests",
    "read_requests",
]

for _id in TASKS:
    if _id not in registry:  # it is there when this module is loaded again
        register(
            id=_id,
            entry_point="servegym.envs.serving_env:ServingEnv",
            vector_entry_point="servegym.envs.vector_env:ServingVectorEnv",
            kwargs={"task": _id},
        )
