"""What a policy declares without effect on a task, in a line each: it then plays as the rule without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from servegym.envs.playing.policy import Policy, asked_task
from servegym.envs.task.config import TaskConfig


def remarks(
    task: TaskConfig, make_policy: Callable[[str], Policy], names: Iterable[str]
) -> list[str]:
    """Return a line for each policy that declares what has no effect on the task.

    Nothing is wrong with such an episode, so nobody is refused; but two rows of a table are then equal, and
    a reader would look for the reason.

    Parameters
    ----------
    task, make_policy, names
        As :func:`servegym.envs.playing.evaluation.check_policies` takes them, after that has passed.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS
    >>> remarks(TASKS["servegym/Tiny-v0"], make_policy, ["fcfs", "edf"])
    ['Note: edf goes by arrival: all requests of servegym/Tiny-v0 have the same slo.ttft_s, or none.']
    """
    return [
        f"Note: {name} {text}."
        for name in names
        for text in _without_effect(task, make_policy(name))
    ]


def _without_effect(task: TaskConfig, policy: Policy) -> Iterator[str]:
    declared, asked = policy.cluster, asked_task(task, policy)
    limits_s = {task.slo.limits[0]}
    limits_s |= {own.ttft_s for own in task.slo.classes if own.ttft_s is not None}
    if declared.get("shed_at", 0) > 0 and limits_s == {float("inf")}:
        yield f"turns nobody away: {task.name} has no slo.ttft_s"
    if declared.get("shortest_by") == "deadline" and len(limits_s) == 1:
        yield f"goes by arrival: all requests of {task.name} have the same slo.ttft_s, or none"
    kinds = [
        kind
        for kind, key in (("waiting", "steal_share"), ("running", "migrate"))
        if key in declared and kind not in task.process.steals
    ]
    if kinds:
        lacks = f"process.steals of {task.name} does not name {' and '.join(map(repr, kinds))}"
        if task.cluster.replicas == 1:
            lacks = f"{task.name} has one replica"
        yield f"steals no {' or '.join(kinds)} requests: {lacks}"
    tables = asked.cluster.replica_tables()
    guarded = declared.get("admission_guard", "none") != "none"
    if guarded and all(table.kv_capacity_tokens == 0 for table in tables):
        yield f"keeps nobody back by memory: {task.name} has no limit of it"
    expects = asked.information.compare_by != "mean" or asked.information.expect != "mean"
    if policy.comparison and expects and task.information.output_lengths == "known":
        yield f"goes by the lengths themselves: {task.name} has them known"
