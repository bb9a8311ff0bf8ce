"""Baseline policies, planners and exact optima.

Examples
--------
>>> from servegym.baselines import make_policy, play_compiled
>>> from servegym.envs import TASKS, make_case
>>> task = TASKS["servegym/Tiny-v0"]
>>> round(play_compiled(task, make_policy("hybrid"), make_case(task, 0))["gap"], 3)
0.186
"""

from lazy_loader import attach_stub

# The names that __init__.pyi lists, each imported when it is first asked for: kernels load only
# where they are used.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
