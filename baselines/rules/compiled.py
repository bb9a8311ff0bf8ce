"""A whole episode under one rule or agent, in compiled code: for searches, studies, tuning and speed."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import fires, priced
from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.evaluation import brief, play
from servegym.envs.playing.policy import Policy, asked_task
from servegym.envs.process.metrics import METRICS, episode_metrics
from servegym.envs.process.network import CompiledAgent, take_choice
from servegym.envs.simulator.admission import admits, mixes
from servegym.envs.simulator.events import advance, decode, mix, prefill, sleep, steal
from servegym.envs.simulator.outlook import outlook
from servegym.envs.simulator.state import NOBODY, State
from servegym.envs.simulator.stealing import fullest_queue, stealable
from servegym.envs.simulator.view import view
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.envs.vocabulary import ADMISSION_RULES, GUARD_SGLANG, STEAL_RUNNING, STEAL_WAITING
from servegym.envs.workload.plan import Plan


@runtime_checkable
class Agent(Policy, Protocol):
    """A policy that a network decides, as ``servegym.agents.policy.LearnedPolicy``."""

    blocks: tuple[str, ...]
    """Blocks of the observation that it reads."""

    def compiled(self, task: TaskConfig) -> CompiledAgent:
        """Return what kernels read of it in a task, with scratch of its own."""


CompilablePolicy = TriggerPolicy | Agent
"""A policy that compiled code can play."""


class CompiledPolicy(NamedTuple):
    """What kernels read of a trigger policy, or of an agent, and the task that it plays."""

    rule: int  # place in ADMISSION_RULES
    trigger: int
    parameter: float  # of the trigger
    every_round: bool  # asks after each decode round, not only at events
    max_prefill_tokens: int  # of a stage; 0: no limit
    mixed: bool = False  # admits in mixed stages, not in prefill stages
    steals_waiting: bool = True  # where it may
    steals_running: bool = True
    memory: float = 0.0  # prices of the Lagrangian rule
    slo: float = 0.0
    # Decides in place of all that, where there is one. Its type differs from None's, so that kernels which
    # play a rule hold no code of networks.
    agent: CompiledAgent | None = None


def compile_policy(policy: CompilablePolicy, task: TaskConfig) -> CompiledPolicy:
    """Lower a policy to what kernels read.

    Raises
    ------
    ServegymError
        If it is an agent that the task has not the features or the actions for.
    """
    if not isinstance(policy, TriggerPolicy):
        return CompiledPolicy(0, 0, 0.0, False, 0, agent=policy.compiled(task))
    return CompiledPolicy(
        ADMISSION_RULES.index(policy.rule),
        policy.trigger,
        policy.parameter,
        policy.decisions == "rounds" or task.process.decisions == "rounds",
        task.cluster.max_prefill_tokens,
        policy.mixed,
        policy.takes("waiting"),
        policy.takes("running"),
        policy.memory,
        policy.slo,
    )


@kernel
def take_turn(state: State, costs: CostTables, e: int, r: int, policy: CompiledPolicy) -> bool:
    """Do what a policy says at the turn of replica ``r``: steal, admit, decode on, or sleep.

    Returns False where an agent's task cuts the episode short; a rule does not look at its caps.
    """
    return _take_turn(state, costs, e, r, policy, policy.agent)


@kernel
def _take_turn(
    state: State,
    costs: CostTables,
    e: int,
    r: int,
    policy: CompiledPolicy,
    agent: CompiledAgent | None,
) -> bool:
    if agent is None:  # known from the argument's type: the other branch is not compiled
        follow_rule(state, costs, e, r, policy)
        return True
    return take_choice(state, costs, e, r, agent)


@kernel
def follow_rule(state: State, costs: CostTables, e: int, r: int, policy: CompiledPolicy) -> None:
    """Do what a trigger policy says at the turn of replica ``r``."""
    if state.cluster.moves and _steals(state, costs, e, r, policy):
        return
    # What another's mixed stage has begun goes on in mixed stages only, except under SGLang's guard.
    begun = state.replicas[e, r].partial != NOBODY and state.cluster.guard != GUARD_SGLANG
    mixed = policy.mixed or begun
    chosen = mixes(state, e, r, policy.rule) if mixed else admits(state, e, r, policy.rule)
    active = state.replicas[e, r].active > 0
    if chosen and active:
        state.episodes[e].decisions += 1
        seen = view(state, costs, e, r)
        if policy.memory > 0.0 or policy.slo > 0.0:
            ahead = outlook(state, costs, e, r, seen)
            chosen = priced(policy.parameter, policy.memory, policy.slo, seen, ahead)
        else:
            chosen = fires(policy.trigger, policy.parameter, seen)
    if chosen and mixed:
        mix(state, costs, e, r, policy.rule)
    elif chosen:
        prefill(state, costs, e, r, policy.rule, policy.max_prefill_tokens)
    elif active:
        decode(state, costs, e, r, policy.every_round)
    else:
        sleep(state, e, r)


@shared_kernel
def _steals(state: State, costs: CostTables, e: int, r: int, policy: CompiledPolicy) -> bool:
    """Let replica ``r`` steal what the policy does if it may; waiting requests come first."""
    if policy.steals_waiting and fullest_queue(state, e, r) != NOBODY:
        steal(state, costs, e, r, STEAL_WAITING)
    elif policy.steals_running and stealable(state, costs, e, r) != NOBODY:
        steal(state, costs, e, r, STEAL_RUNNING)
    else:
        return False
    state.episodes[e].decisions += 1
    return True


@shared_kernel
def run_episode(state: State, costs: CostTables, e: int, policy: CompiledPolicy) -> None:
    """Run the loaded episode of row ``e`` to its end under a policy."""
    while True:
        r = advance(state, costs, e)
        if r == NOBODY or not take_turn(state, costs, e, r, policy):
            break


def play_compiled(
    task: TaskConfig, policy: CompilablePolicy, case: Case, plan: Plan | None = None
) -> dict[str, float]:
    """Return the metrics of one episode under a rule or an agent, played in compiled code.

    ``plan``, where the policy plans and its plan is known already, saves making it anew.

    The numbers equal those of ``servegym.envs.playing.evaluation.play``, which also times decisions.
    That function plays a rule's episode if the task may cut it short: compiled code counts only the
    decisions at which the rule has a choice. An agent is asked at every one.

    Examples
    --------
    >>> from servegym.baselines import make_trigger_policy
    >>> from servegym.envs import TASKS, make_case
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> metrics = play_compiled(task, make_trigger_policy("lpt"), make_case(task, 0))
    >>> round(metrics["makespan_s"], 2)
    26.0
    """
    capped = task.process.max_decisions > 0 or task.process.max_seconds > 0
    if capped and isinstance(policy, TriggerPolicy):
        row = play(task, "compiled", policy, case, seed=0).row
        return {metric: row[metric] for metric in METRICS}
    task = asked_task(task, policy)
    state = make_task_state(task, 1, len(case.requests))
    if plan is None:
        plan = policy.prepare(brief(task, case, seed=0))
    load_case(task, state, 0, case, plan)
    play_loaded(state, lower(task).costs, task, policy)
    return episode_metrics(state, 0)


def play_loaded(
    state: State, costs: CostTables, task: TaskConfig, policy: CompilablePolicy
) -> None:
    """Play the episode loaded into row 0 to its end; ``costs`` are the task's tables.

    ``task`` must be what ``asked_task`` returns for the policy.
    """
    run_episode(state, costs, 0, compile_policy(policy, task))
