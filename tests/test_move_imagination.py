"""Episodes with transfers under way, copied and imagined: they go on as the original would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines import make_trigger_policy
from servegym.baselines.rules.compiled import compile_policy, run_episode
from servegym.envs import Requests, ServingEnv, make_requests
from servegym.envs.simulator.imagination import copy_row
from servegym.envs.simulator.state import (
    FINISHED,
    NOBODY,
    REJECTED,
    State,
    make_alike,
)
from servegym.envs.task.sections import InformationConfig
from servegym.envs.vocabulary import MOVES, USUAL_RULES
from tests.cluster_helpers import requests_of, shared_case, stealing_case, task_of
from tests.random_clusters import ClusterCase
from tests.test_leakage import imagined_bytes, other_truth, revealed

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]


def kinds(state: State) -> set[int]:
    """What transfers under way wait for."""
    under_way = state.transfers[0, : int(state.episodes[0].transfers)]
    return set(under_way.kind.tolist())


def choose(env: ServingEnv, rng: np.random.Generator) -> np.int64:
    """Steal half of the time, else anything that is legal."""
    legal = np.flatnonzero(env.action_masks())
    steals = [k for k in legal if env.task.actions[k].startswith("steal")]
    return np.int64(rng.choice(steals if steals and rng.random() < 0.5 else legal))


def finish(env: ServingEnv, state: State, name: str) -> None:
    """Run a row to its end under a policy by name."""
    policy = make_trigger_policy(name)
    run_episode(state, env.costs, 0, compile_policy(policy, env.task))


def results(state: State, left: np.ndarray) -> list[list[float]]:
    """What has come of the requests that were left, and of the stages of every replica."""
    requests, replicas, times = state.requests[0][left], state.replicas[0], state.times[0]
    names = ("replica", "client", "moves", "preemptions", "prefilled_tokens")
    columns = [requests[name].tolist() for name in names]
    stages = ("rounds", "prefill_stages", "mixed_stages", "preemptions", "busy_decode_s")
    columns += [replicas[name].tolist() for name in stages]
    return [*columns, times.finished_s[left].tolist(), [float(state.episodes[0].now_s)]]


@pytest.mark.parametrize("name", ["fcfs", "lpt", "vllm"])
def test_a_copied_row_goes_on_as_the_original(name: str) -> None:
    met, compared = set[int](), 0
    for seed in range(60):
        rng = np.random.default_rng([seed, 31])
        case = stealing_case(rng, dyadic=bool(seed % 2), chunked=name == "vllm")
        rows = [(arrival / 8, prompt, output) for arrival, prompt, output in case.requests]
        spec = replace(case.spec, move_by=tuple(MOVES)[seed % 2])
        env = ServingEnv(task_of(spec, mixed_rules=USUAL_RULES))
        env.reset(options={"requests": requests_of(ClusterCase(rows, spec))})
        state, over = env.state, False
        assert state is not None
        patience = int(rng.integers(1, 6))  # decisions with transfers that are let go by
        while not over:
            episode = state.episodes[0]
            if episode.routed == episode.requests and episode.transfers:
                patience -= 1
                if patience == 0 or kinds(state) - met:
                    break
            over = env.step(choose(env, rng))[2]
        if over:
            continue
        met |= kinds(state)
        left = np.flatnonzero(~np.isin(state.requests[0].phase, (FINISHED, REJECTED)))
        imagined = env.imagine()
        copy = make_alike(imagined, 1)
        copy_row(imagined, 0, copy, 0)
        for row in (state, imagined, copy):
            finish(env, row, name)
        assert results(state, left) == results(imagined, left) == results(copy, left)
        compared += 1
    assert compared > 15
    assert len(met) >= 4  # kinds of transfers


def one_replica(rng: np.random.Generator) -> tuple[list[ServingEnv], list[Requests]]:
    """A replica that evicts to its host; requests differ in true lengths behind equal predictions."""
    case = shared_case(rng, dyadic=True, chunked=False, routers=["llumnix"], rejections=False)
    known = requests_of(case)
    n = len(known)
    longest = int(known.output_tokens.max())
    predictions = np.minimum(rng.choice([2, 6, 12], n), longest)
    spread = np.full(n, rng.choice([0.0, 0.3, 1.5]))
    truth = make_requests(
        known.prompt_tokens, known.output_tokens, np.zeros(n), predictions, spread
    )
    memory = int(known.prompt_tokens.max()) + longest + case.spec.kv_block_tokens
    part = replace(case.spec.replicas[0], clients=8, kv_capacity_tokens=memory)
    spec = replace(
        case.spec,
        replicas=(part,),
        router="round-robin",
        admission_guard="none",
        preempt_to="host",
        host_latency_s=float(rng.choice([0.0, 1.0, 5.0])),
    )
    task = task_of(spec, mixed_rules=USUAL_RULES, decisions="rounds")
    task = replace(task, information=InformationConfig(output_lengths="predicted"))
    altered = other_truth(truth, rng, most=int(rng.choice([2, 5, 1000])))
    return [ServingEnv(task), ServingEnv(task)], [truth, altered]


def test_imagination_of_what_is_fetched_knows_no_true_lengths() -> None:
    """Whatever is on its way to or from the host, the imagined episodes are equal, and they end."""
    compared = under_way = stored = 0
    for seed in range(30):
        rng = np.random.default_rng([seed, 32])
        envs, requests = one_replica(rng)
        for env, truth in zip(envs, requests, strict=True):
            env.reset(options={"requests": truth})
        over = False
        while not over and revealed(envs[0]) == revealed(envs[1]):
            assert imagined_bytes(envs[0]) == imagined_bytes(envs[1])
            first, second = (env.imagine() for env in envs)
            count = int(first.episodes[0].transfers)
            assert first.transfers[0, :count].tolist() == second.transfers[0, :count].tolist()
            compared += 1
            under_way += count
            stored += int((first.requests[0].stored != NOBODY).sum())
            finish(envs[0], first, "fcfs")
            assert (first.requests[0].phase == FINISHED).all()
            assert first.episodes[0].transfers == 0
            action = choose(envs[0], rng)
            ended = [env.step(action)[2] for env in envs]
            over = any(ended)
    assert compared > 100
    assert under_way > 3
    assert stored > 3
