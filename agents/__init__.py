"""Trained agents: training, policies, export and loading.

The only room that may import torch and stable_baselines3. It builds on ``servegym.envs`` and never
imports ``servegym.baselines``. Playing an agent (``load_agent``) needs neither.
"""

from lazy_loader import attach_stub

# The names that __init__.pyi lists, each imported when it is first asked for: kernels load only
# where they are used.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
