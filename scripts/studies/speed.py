"""Speed of the simulator, the environments, the policies, the planner and training. One core.

Every figure is a median over repeats. The speed of the machine itself is that of a plain Python loop,
timed between the measurements, so that runs on shared machines can be compared by ratios.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.baselines.planning.planner import plan_offline
from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_loaded
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.serving_env import ServingEnv
from servegym.envs.simulator.state import State, row_arrays
from servegym.envs.task.cases import Case
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.envs.task.registered import TASKS
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.vector_env import ServingVectorEnv
from servegym.envs.workload.sources import make_workload
from servegym.studies.policies import SHIPPED
from servegym.studies.policies import make_policy as make_any_policy

LARGE = TaskConfig(
    name="100,000 requests on 2,000 clients",
    cluster=ClusterConfig(clients=2000),
    workload=WorkloadConfig(requests=100_000),
)
CLUSTER = TaskConfig(
    name="1,000,000 requests, which come faster than 64 replicas serve them",
    cluster=ClusterConfig(replicas=64, clients=256),
    workload=WorkloadConfig(requests=1_000_000, arrival_rate_per_s=700.0),
)
LATENCY_POLICIES = ("fcfs", "hybrid", "threshold-12", "lookahead", "aligned", "random")
VECTOR_ROWS = 256
VECTOR_STEPS = 750  # about an episode
TASK_ROWS = 64  # as agents train
TASK_ACTION = "mixed:fcfs"  # vLLM's admission, which all of these tasks offer
OTHER_TASKS = ("Chat", "Elastic", "Cluster", "Disaggregated", "Rollout")
DECISION_POLICIES = {"rollout-0": "", "rollout": "≤ 5", SHIPPED: "≤ 0.2"}
"""Policies that search or learn; the target is of the median for ``rollout``, of p99 for the agent."""


_Chooser = Callable[[ServingVectorEnv], NDArray[np.int64]]
"""Returns an action for each row."""


@dataclass(frozen=True)
class Figure:
    """One measurement against its target."""

    what: str
    value: float
    unit: str
    target: str


def seconds(body: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def python_loop() -> float:
    """Return the time of ten million additions in plain Python: the machine's speed right now."""
    return seconds(lambda: sum(range(10_000_000)))


@dataclass
class CompiledEpisode:
    """An episode that a compiled rule plays again and again."""

    task: TaskConfig
    policy: TriggerPolicy
    case: Case
    state: State
    costs: CostTables

    def prepare(self) -> None:
        """Put the instance into the state (not timed)."""
        load_case(self.task, self.state, 0, self.case)

    def play(self) -> None:
        """Play it to its end."""
        play_loaded(self.state, self.costs, self.task, self.policy)

    def median_seconds(self, repeats: int) -> float:
        """Return the median time of an episode, after a first one that compiles."""
        times = []
        for _ in range(repeats + 1):
            self.prepare()
            times.append(seconds(self.play))
        return median(times[1:])


def compiled_episode(task: TaskConfig, name: str) -> CompiledEpisode:
    """Set up the first training case of a task under a trigger policy."""
    policy = make_trigger_policy(name)
    case = make_case(task, 0)
    state = make_task_state(task, 1, len(case.requests))
    return CompiledEpisode(task, policy, case, state, lower(task).costs)


def simulator_figures(repeats: int) -> list[Figure]:
    """Episodes under compiled rules: event-driven, asked at every round, and large."""
    small = compiled_episode(TASKS["servegym/GSM8K-v0"], "threshold-12")
    events = small.median_seconds(20 * repeats)
    asked = {"process": {"decisions": "rounds"}}
    every = compiled_episode(with_overrides(TASKS["servegym/GSM8K-v0"], asked), "threshold-12")
    rounds = every.median_seconds(20 * repeats)
    large = compiled_episode(LARGE, "threshold-120")
    episode = large.median_seconds(repeats)
    per_request = sum(
        array.nbytes
        for array in row_arrays(large.state).values()
        if array.ndim > 1 and array.shape[1] >= 100_000
    ) / len(large.case.requests)
    cluster = compiled_episode(CLUSTER, "fcfs")
    arriving = cluster.median_seconds(max(repeats // 2, 1))
    in_all = sum(array.nbytes for array in row_arrays(cluster.state).values())
    return [
        Figure("episode, 1319 requests × 200 clients", 1e3 * events, "ms", "≤ 5"),
        Figure(
            "decode rounds, event-driven",
            every.state.replicas[0, 0].rounds / events / 1e6,
            "M/s",
            "≥ 1",
        ),
        Figure(
            "decode rounds, asked at each",
            every.state.replicas[0, 0].rounds / rounds / 1e6,
            "M/s",
            "",
        ),
        Figure("episode, 100,000 requests × 2,000 clients", episode, "s", "≤ 2"),
        Figure("memory per request", per_request, "bytes", "≤ 200"),
        Figure("1,000,000 arriving requests, 64 replicas × 256 clients", arriving, "s", "≤ 5"),
        Figure("… all of its memory per request", in_all / 1e6, "bytes", "≤ 200"),
    ]


def environment_figures(repeats: int) -> list[Figure]:
    """Time steps of the single Gymnasium environment, random legal actions."""
    env = ServingEnv("servegym/GSM8K-v0")
    case = make_case(env.task, 0)
    rng = np.random.default_rng(0)
    rates, steps = [], 0

    def episode() -> None:
        nonlocal steps
        env.reset(seed=0, options={"requests": case.requests, "bound": case.bound})
        steps, ended = 0, False
        while not ended:
            *_, ended, _, _ = env.step(rng.choice(np.flatnonzero(env.action_masks())))
            steps += 1

    for _ in range(3 * repeats):
        taken = seconds(episode)
        rates.append(steps / taken)
    return [Figure("ServingEnv.step, random legal actions", median(rates) / 1e3, "k/s", "")]


def vector_figures(repeats: int) -> list[Figure]:
    """Time the vector environment with new episodes included; choosing the actions is not timed.

    Actions are uniform over the legal ones of all rules. A repeat is about as long as an episode, so
    that each holds as many new episodes. A step with new episodes takes longer: the median of this
    time by episode is that of a new episode.
    """
    figures = []
    what = f"ServingVectorEnv, {VECTOR_ROWS} rows, random legal actions"
    for threads in (1, 2):
        env = ServingVectorEnv(VECTOR_ROWS, "servegym/GSM8K-v0", threads=threads, copy=False)
        env.reset(seed=0)
        rng = np.random.default_rng(0)
        means, shares = [], []
        for _ in range(repeats + 1):
            times, begun = np.zeros(VECTOR_STEPS), np.zeros(VECTOR_STEPS)
            for step in range(VECTOR_STEPS):
                actions = _random_actions(env, rng)
                times[step] = seconds(partial(env.step, actions))
                begun[step] = env.rows.terminated.sum()
            any_new = begun > 0
            plain = np.median(times[~any_new])
            beginning = np.median((times[any_new] - plain) / begun[any_new]) * begun.sum()
            means.append(times.mean())
            shares.append(beginning / (VECTOR_STEPS * plain + beginning))
        # The first repeat compiles and lets the rows fall out of step.
        name = f"{what}, {threads} thread{'s' * (threads > 1)}"
        rate = float(VECTOR_ROWS / median(means[1:]))
        figures.append(Figure(name, rate / 1e3, "k/s", "≥ 300" if threads == 1 else ""))
        figures.append(Figure("… of it in new episodes", 100 * float(median(shares[1:])), "%", ""))
    return figures


def task_figures(repeats: int) -> list[Figure]:
    """Time the vector environment on the other tasks, and before each of them on GSM8K-v0 as above.

    Each task is played by random legal actions and by one rule, GSM8K-v0 by random ones. Choosing the actions
    is not timed. A repeat lasts as many episodes as there are rows. The machine's speed changes while this
    runs, so each repeat has a ratio to a GSM8K-v0 of its own.
    """
    rng = np.random.default_rng(0)
    usual = ServingVectorEnv(VECTOR_ROWS, "servegym/GSM8K-v0", copy=False)
    ways: list[tuple[str, _Chooser]] = [
        ("random legal actions", partial(_random_actions, rng=rng)),
        (f"`{TASK_ACTION}` wherever it is legal", _rule_actions),
    ]
    played = [
        (ServingVectorEnv(TASK_ROWS, f"servegym/{name}-v0", copy=False), how, choose)
        for name in OTHER_TASKS
        for how, choose in ways
    ]
    for env in (usual, *(env for env, _, _ in played)):
        env.reset(seed=0)
    rates, ratios = np.zeros((2, repeats + 1, len(played)))
    for repeat in tqdm(range(repeats + 1), desc="tasks", leave=False):
        for k, (env, _, choose) in enumerate(played):
            before = _decisions_per_s(usual, ways[0][1])
            rates[repeat, k] = _decisions_per_s(env, choose)
            ratios[repeat, k] = rates[repeat, k] / before
    figures = []
    for k, (env, how, _) in enumerate(played):  # the first repeat lets the rows fall out of step
        what = f"ServingVectorEnv, {TASK_ROWS} rows, 1 thread, {env.task.name}, {how}"
        figures.append(Figure(what, float(np.median(rates[1:, k])) / 1e3, "k/s", "≥ 200"))
        ratio = float(np.median(ratios[1:, k]))
        what = f"… against GSM8K-v0, {VECTOR_ROWS} rows, random legal actions, just before"
        figures.append(Figure(what, ratio, "×", ""))
    return figures


def _decisions_per_s(env: ServingVectorEnv, choose: _Chooser) -> float:
    """Step as many episodes to their ends as there are rows; return decisions a second."""
    taken, steps, ended = 0.0, 0, 0
    while ended < env.num_envs:
        actions = choose(env)
        taken += seconds(partial(env.step, actions))
        ended += int(env.rows.terminated.sum())
        steps += 1
    return env.num_envs * steps / taken


def _random_actions(env: ServingVectorEnv, rng: np.random.Generator) -> NDArray[np.int64]:
    return (rng.random(env.rows.masks.shape) * env.rows.masks).argmax(axis=1)


def _rule_actions(env: ServingVectorEnv) -> NDArray[np.int64]:
    """Return ``TASK_ACTION`` where it is legal, else the first legal action: to decode, if it may."""
    place, masks = env.task.actions.index(TASK_ACTION), env.rows.masks
    return np.where(masks[:, place], place, masks.argmax(axis=1))


def latency_figures() -> list[Figure]:
    """Decision latency of policies as evaluation measures it: view, observation, mask and rule."""
    figures = []
    for clients, requests in ((200, 1319), (2000, 13190)):
        task = replace(
            TASKS["servegym/GSM8K-v0"],
            cluster=ClusterConfig(clients=clients),
            workload=WorkloadConfig(requests=requests),
        )
        case = make_case(task, 0)
        for name in LATENCY_POLICIES:
            p99_ms = play(task, name, make_policy(name), case, seed=0).row["decision_ms_p99"]
            what = f"decision p99, {name}, {clients} clients"
            figures.append(Figure(what, p99_ms, "ms", "≤ 1"))
    return figures


def decision_figures() -> list[Figure]:
    """Decision latency of policies that search or learn, on GSM8K-v0."""
    task = TASKS["servegym/GSM8K-v0"]
    case = make_case(task, 0)
    figures = []
    for name, target in DECISION_POLICIES.items():
        row = play(task, name, make_any_policy(name, task.name), case, seed=0).row
        percentile = "p99" if name == SHIPPED else "p50"
        value = row[f"decision_ms_{percentile}"]
        figures.append(Figure(f"decision {percentile}, {name}, 200 clients", value, "ms", target))
    return figures


def training_figures(repeats: int) -> list[Figure]:
    """Speed of PPO's training with GSM8K-v0's defaults on one torch thread."""
    from servegym.agents.hyperparameters import default_hyperparameters
    from servegym.agents.speed import training_speed

    task = TASKS["servegym/GSM8K-v0"]
    hyperparameters = default_hyperparameters(task.name)
    rate, share = training_speed(task, hyperparameters, repeats)
    what = f"{hyperparameters.algorithm}, {hyperparameters.environments} environments, training"
    return [
        Figure(what, rate / 1e3, "k decisions/s", ""),
        Figure("… of it in the environment", 100 * share, "%", "≤ 15"),
    ]


def planner_figures(plans: int) -> list[Figure]:
    """Time and proofs of the offline planner on both output families, and a large instance."""
    figures = []
    for source in ("gsm8k-lognormal", "gsm8k-cap512"):
        times, proven = [], 0
        for seed in tqdm(range(plans), desc=f"plans, {source}", leave=False):
            requests = make_workload(source, 1319, 0.0, np.random.default_rng(seed))
            plan = plan_offline(requests.decode_rounds, 200)
            times.append(plan.seconds)
            proven += plan.status == "optimal"
        what = f"plan 1319 × 200, {source}"
        figures.append(Figure(f"{what}, median", 1e3 * median(times), "ms", "≤ 10"))
        figures.append(Figure(f"{what}, proven optimal", proven, f"of {plans}", f"{plans}"))
    large = make_workload("gsm8k-lognormal", 20_000, 0.0, np.random.default_rng(0))
    plan = plan_offline(large.decode_rounds, 2000)
    figures.append(Figure("plan 20,000 × 2,000", plan.seconds, f"s ({plan.status})", "≤ 1"))
    return figures


def machine() -> str:
    """Return processor, Python and numpy versions in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line for line in info.read_text("utf-8").splitlines() if line.startswith("model name")
        ]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, Python {platform.python_version()}, numpy {np.__version__}"


def commit() -> str:
    """Return the short commit of the checkout; ``unknown`` outside one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
