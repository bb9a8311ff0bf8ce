"""Shared by the tests of the three checks: a small task, and cases whose times are easy to add up."""

from __future__ import annotations

from servegym.envs import TaskConfig
from servegym.envs.task.cases import Case
from servegym.envs.task.config import with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.registered import TASKS
from tests.helpers import instance, make_env

SMALL = with_overrides(
    TASKS["servegym/GSM8K-v0"], {"cluster": {"clients": 12}, "workload": {"requests": 60}}
)


def unit_case(clients: int, *rounds: int) -> tuple[TaskConfig, Case]:
    """A round is 1 s, a stage 2 s; requests of these decode rounds, all known."""
    task = make_env(clients).task
    requests = instance(*((5, 1 + count) for count in rounds))
    return task, bound_case(lower(task), requests)
