"""What every action is worth in each state of a vector environment: labels for imitation learning."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numba
import numpy as np
from numpy.typing import NDArray

from servegym.baselines.lookahead.rollout import action_values
from servegym.baselines.lookahead.sampled import Futures
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import CompiledPolicy, compile_policy
from servegym.envs.errors import ServegymError, shown
from servegym.envs.jit import threaded_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.policy import Briefing, Situation, asked_task
from servegym.envs.process.actions import Settings
from servegym.envs.simulator.imagination import imagine_row
from servegym.envs.simulator.outlook import outlook
from servegym.envs.simulator.state import State, make_alike
from servegym.envs.simulator.view import deciding, view
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.vector_env import ServingVectorEnv

Expert = Callable[[ServingVectorEnv], NDArray[np.float64]]


def make_rollout_expert(
    base_name: str, task: TaskConfig, threads: int = 1, samples: int = 0, seed: int = 0
) -> Expert:
    """Return a function that values every action in the present states of a vector environment.

    Parameters
    ----------
    base_name
        The policy that finishes the episodes: any of the registry that has a trigger. Where it is
        planned, it follows the plan that each row already has.
    task
        The task of the environments that will be given.
    threads
        Threads that share the rows. The values do not depend on it. With samples one thread plays.
    samples
        Where lengths are not known: futures drawn from the beliefs, whose mean an action is worth
        (``lookahead.sampled``); 0, and where lengths are known: one future, of expected lengths.
    seed
        Of the draws.

    Returns
    -------
    Callable
        Takes the environment and returns values, shape (num_envs, actions): the return of the whole
        episode, −100 · gap as its scheduler believes, if the action is taken now and the base policy
        goes on; −∞ where it is illegal.

    Raises
    ------
    ServegymError
        If there is no such policy, its rule is not among the task's, it wants other keys of the scheduler
        than the task has, or ``threads`` is out of range; when called, if the environment is not of the task.

    Examples
    --------
    >>> from servegym.envs import TASKS, ServingVectorEnv
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> env = ServingVectorEnv(2, task)
    >>> _ = env.reset(seed=0)
    >>> make_rollout_expert("aligned", task)(env).shape  # a value for each action
    (2, 7)
    """
    if not 1 <= threads <= numba.config.NUMBA_NUM_THREADS:
        raise ServegymError(
            f"threads must lie in 1 … {numba.config.NUMBA_NUM_THREADS}, got {threads}"
        )
    policy = make_trigger_policy(base_name)
    if policy.rule not in task.process.rules:
        raise ServegymError(
            f"{base_name} admits by {policy.rule!r}, which process.rules of {task.name} leaves out"
        )
    if policy.priced:
        raise ServegymError(
            "an expert's base has no prices of memory or slo: imagined episodes have no limits to miss"
        )
    asked = asked_task(task, policy)
    if (asked.cluster, asked.information) != (task.cluster, task.information):
        wanted = {**policy.cluster, **policy.comparison}
        raise ServegymError(
            f"an expert plays the task as it is; for {base_name} give {task.name} the keys {shown(wanted)}"
        )
    base = compile_policy(policy, task)
    if samples < 0:
        raise ServegymError(f"samples must be ≥ 0, got {samples}")
    if samples > 0 and task.information.output_lengths != "known":
        return _make_sampled_expert(task, base, samples, seed)
    scratch: State | None = None

    def value_actions(env: ServingVectorEnv) -> NDArray[np.float64]:
        nonlocal scratch
        _check_task(env, task)
        _, requests = env.state.requests.shape
        if scratch is None or scratch.requests.shape[1] != requests:
            scratch = make_alike(env.state, 2 * threads)
        values = np.empty(env.rows.masks.shape)
        arguments = (env.state, env.costs, env.settings, base, env.rows.masks, scratch, values)
        if threads == 1:
            _value_share(*arguments, 0, 1)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda t: _value_share(*arguments, t, threads), range(threads)))
        return values

    return value_actions


def _make_sampled_expert(task: TaskConfig, base: CompiledPolicy, samples: int, seed: int) -> Expert:
    """Return the expert that values actions by sampled futures."""
    machine = lower(task)
    if len(machine.layout.clients) > 1:
        raise ServegymError(
            f"an expert's samples are for one replica, {task.name} has {len(machine.layout.clients)}"
        )
    futures = Futures(machine.costs, machine.settings, base, samples)
    rng = np.random.default_rng(seed)
    imagined: State | None = None

    def value_actions(env: ServingVectorEnv) -> NDArray[np.float64]:
        nonlocal imagined
        _check_task(env, task)
        if imagined is None or imagined.requests.shape[1] != env.state.requests.shape[1]:
            imagined = make_alike(env.state, 1)
        values = np.full(env.rows.masks.shape, -np.inf)
        for e, mask in enumerate(env.rows.masks):
            legal = np.flatnonzero(mask)
            if len(legal) > 0:
                imagine_row(env.state, env.costs, e, imagined, 0)
                ends_s = futures.mean_ends(imagined, legal, rng)
                values[e, legal] = 100.0 * (1.0 - ends_s / env.state.episodes[e].bound_s)
        return values

    return value_actions


def _check_task(env: ServingVectorEnv, task: TaskConfig) -> None:
    if env.task != task:
        raise ServegymError(f"the expert is for {task.name}, the environment for another task")


def make_rule_expert(name: str, task: TaskConfig, plan: str = "") -> Expert:
    """Return a function that values a rule's own action at 0 and every other one at −1.

    Use this to start training from a rule. Rollouts assume expected lengths, so under uncertainty they
    can be worse than the rule itself. 0 is what the rule gains on itself, so the values fit a training
    with the rule as its reference. ``plan`` names the policy whose plans the environments follow.

    Raises
    ------
    ServegymError
        If there is no such policy, its rule is not among the task's, it follows another plan or wants to be
        asked otherwise than the task asks.
    """
    policy = make_trigger_policy(name)
    followed = make_trigger_policy(plan).planner if plan else None
    if policy.planner not in (None, followed) or asked_task(task, policy) != task:
        raise ServegymError(
            f"{name} cannot be imitated in {task.name}: it follows a plan, which plan = {plan!r} is not, or "
            "wants another task"
        )
    policy.prepare(Briefing(task, None, np.random.default_rng(0)))

    def value_actions(env: ServingVectorEnv) -> NDArray[np.float64]:
        _check_task(env, task)
        values = np.where(env.rows.masks, -1.0, -np.inf)
        for e in range(env.num_envs):
            r = deciding(env.state, e)
            seen = view(env.state, env.costs, e, r)
            ahead = partial(outlook, env.state, env.costs, e, r, seen)
            row = env.rows.observations[e], env.rows.masks[e]
            values[e, policy.act(Situation(seen, *row, outlook=ahead))] = 0.0
        return values

    return value_actions


@threaded_kernel
def _value_share(
    state: State,
    costs: CostTables,
    settings: Settings,
    base: CompiledPolicy,
    masks: NDArray[np.bool_],
    scratch: State,
    values: NDArray[np.float64],
    t: int,
    threads: int,
) -> None:
    """Value the actions in every ``threads``-th row, from row ``t`` on."""
    for e in range(t, masks.shape[0], threads):
        action_values(state, costs, settings, base, e, masks[e], scratch, t, values[e])
