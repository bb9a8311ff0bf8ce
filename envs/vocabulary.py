"""The names that tasks, policies and kernels share: admission rules, rewards and their numbers.

Nothing is imported here, so that reading a task loads no kernels.
"""

from __future__ import annotations

from typing import Final

ADMISSION_RULES: Final = ("plan", "steal", "longest", "shortest", "fcfs", "aligned")
"""Names of the admission rules; kernels know a rule by its place here."""

PLAN: Final = 0
STEAL: Final = 1
LONGEST: Final = 2
SHORTEST: Final = 3
FCFS: Final = 4
ALIGNED: Final = 5

REWARDS: Final = ("gap", "latency")
"""Names of the rewards; kernels know a reward by its place here."""

GAP: Final = 0
