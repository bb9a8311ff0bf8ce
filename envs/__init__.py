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

from gymnasium.envs.registration import register, registry
from lazy_loader import attach_stub

from servegym.envs.task.registered import TASKS

# The names that __init__.pyi lists, each imported when it is first asked for: kernels load only
# where they are used.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

for _id in TASKS:
    if _id not in registry:  # it is there when this module is loaded again
        register(
            id=_id,
            entry_point="servegym.envs.serving_env:ServingEnv",
            vector_entry_point="servegym.envs.vector_env:ServingVectorEnv",
            kwargs={"task": _id},
        )
