"""No leakage in a cluster: other true lengths change nothing on any replica before a finish.

Rejection goes by true lengths, and so does passing over a replica whose whole memory is too small; here
every replica can hold every request, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.expert import make_rollout_expert
from servegym.baselines.rules.compiled import compile_policy, run_episode
from servegym.envs import Requests, ServingEnv, ServingVectorEnv, make_requests, play
from servegym.envs.simulator.state import DECODE_RUN, FINISHED, IDLE
from servegym.envs.task.lowering import bound_case
from servegym.envs.task.sections import InformationConfig
from servegym.envs.vocabulary import ADMISSION_GUARDS, ADMISSION_RULES, OBSERVATION_BLOCKS, STEALS
from tests.cluster_helpers import informed, requests_of, shared_case, task_of
from tests.test_leakage import field_bytes, other_truth, revealed

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]

ROUTERS = ["least-tokens", "llumnix", "dynamo", "least-requests", "vllm-dp", "plan", "pool"]


def two_truths(
    rng: np.random.Generator,
    router: str,
    guard: str = "none",
    *,
    moving: bool = False,
    lengths: str = "predicted",
) -> tuple[list[ServingEnv], list[Requests]]:
    """Two environments of a cluster whose requests differ in true lengths behind equal predictions.

    With moves replicas also steal what the router lets them, have roles, or evict to the host.
    """
    dyadic = bool(rng.random() < 0.5)
    case = shared_case(rng, dyadic=dyadic, routers=["llumnix"], rejections=False, moving=moving)
    known = requests_of(case)
    n = len(known)
    predictions = np.minimum(rng.choice([2, 6, 12], n), known.output_tokens.max())
    if lengths == "unknown":
        predictions = np.full(n, predictions[0])
    spread = np.full(n, rng.choice([0.0, 0.3, 1.5]))
    truth = make_requests(
        known.prompt_tokens, known.output_tokens, known.arrival_s, predictions, spread
    )
    altered = other_truth(truth, rng, most=int(rng.choice([2, 5, 1000])))
    block = case.spec.kv_block_tokens
    most = int(known.prompt_tokens.max() + known.output_tokens.max()) + block
    parts = case.spec.replicas
    if len(parts) == 1:
        parts *= int(rng.integers(2, 4))
    parts = tuple(
        replace(part, kv_capacity_tokens=max(part.kv_capacity_tokens, most)) for part in parts
    )
    if router == "pool" and guard == "sglang":
        most = max(part.kv_capacity_tokens for part in parts)
        parts = tuple(replace(part, kv_capacity_tokens=most) for part in parts)
    if router in ("plan", "pool"):
        parts = tuple(replace(part, role="both") for part in parts)
    steals = STEALS if moving and router != "pool" and rng.random() < 0.7 else ()
    task = task_of(
        replace(case.spec, replicas=parts, admission_guard=guard, steals=steals),
        mixed_rules=ADMISSION_RULES,
        observe=OBSERVATION_BLOCKS,
        decisions=str(rng.choice(["events", "rounds"])),
    )
    task = replace(
        task,
        information=informed(lengths),
        cluster=replace(task.cluster, router=router),
    )
    return [ServingEnv(task), ServingEnv(task)], [truth, altered]


def side_by_side(
    envs: list[ServingEnv],
    requests: list[Requests],
    rng: np.random.Generator,
    prefer: str = "decode",
) -> Iterator[None]:
    """Take the same random legal actions in both, as long as no finish tells them apart."""
    kind = np.array([name.startswith(prefer) for name in envs[0].task.actions])
    for env, truth in zip(envs, requests, strict=True):
        env.reset(options={"requests": truth})
    while revealed(envs[0]) == revealed(envs[1]):
        yield
        mask = envs[0].action_masks()
        legal, first = np.flatnonzero(mask), np.flatnonzero(mask & kind)[:1]
        action = int([*first, *legal][0] if rng.random() < 0.5 else rng.choice(legal))
        ended = [env.step(np.int64(action))[2] for env in envs]
        if any(ended):
            break


def looks(env: ServingEnv) -> tuple[object, ...]:
    """What a scheduler sees: whose turn it is and when, the view, observation, mask, routes so far."""
    assert env.state is not None
    episode, requests = env.state.episodes[0], env.state.requests[0]
    transfers = env.state.transfers[0, : episode.transfers]
    return (
        int(episode.turn),
        float(episode.now_s),
        env.view(),
        env.rows.observations[0].tobytes(),
        env.action_masks().tolist(),
        requests.replica.tolist(),
        requests.preemptions.tolist(),
        env.state.queues[0].waiting.tolist(),
        requests.moves.tolist(),
        requests.stored.tolist(),
        transfers.tolist(),
    )


@pytest.mark.parametrize("guard", ADMISSION_GUARDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_leaks_between_replicas(router: str, guard: str) -> None:
    compared = differing = 0
    for seed in range(8):
        rng = np.random.default_rng([seed, 77, ROUTERS.index(router)])
        envs, requests = two_truths(rng, router, guard)
        differing += requests[0].output_tokens.tolist() != requests[1].output_tokens.tolist()
        for _ in side_by_side(envs, requests, rng):
            assert looks(envs[0]) == looks(envs[1])
            compared += 1
    assert differing >= 4
    assert compared >= 8


@pytest.mark.parametrize("lengths", ["predicted", "unknown"])
@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_leaks_where_requests_move(router: str, lengths: str) -> None:
    """Who is stolen, what is legal, and when who leaves and lands."""
    compared = moved = 0
    for seed in range(12):
        rng = np.random.default_rng([seed, 80, ROUTERS.index(router)])
        guard = ("none", "full", "peak")[seed % 3]  # SGLang's has no rule for moves
        envs, requests = two_truths(rng, router, guard, moving=True, lengths=lengths)
        for _ in side_by_side(envs, requests, rng, "steal"):
            assert looks(envs[0]) == looks(envs[1])
            compared += 1
        assert envs[0].state is not None
        moved += int(envs[0].state.requests[0].moves.sum())
    assert compared >= 12
    assert moved >= 5 or router == "pool"


def imagined(env: ServingEnv) -> list[bytes]:
    """Everything that the imagined episode holds, of every replica."""
    state = env.imagine()
    episode, parts = state.episodes[0], [state.episodes]
    parts += [state.requests[0, : episode.requests], state.by_length, state.lengths]
    parts += [state.waiting_tree, state.waiting_lengths, state.transfers[0, : episode.transfers]]
    for r, replica in enumerate(state.replicas[0]):
        sleeps = replica.stage == IDLE  # what its last stage was is past
        parts += [state.finishes[0, r, : replica.active], state.idle[0, r, : replica.idle]]
        parts += [state.clients[0, r], state.queues[0], state.residues[0, r]]
        parts += [] if sleeps else [state.replicas[0, r : r + 1], state.event_s[0, r : r + 1]]
    return field_bytes(parts)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("router", ["least-requests", "llumnix", "pool"])
def test_other_replicas_are_imagined_without_true_lengths(router: str, *, moving: bool) -> None:
    """A run of decode rounds goes on to its next true finish; imagination must not say when."""
    compared = running = 0
    policy = make_trigger_policy("fcfs")
    for seed in range(12):
        rng = np.random.default_rng([seed, 78, ROUTERS.index(router)])
        envs, requests = two_truths(rng, router, moving=moving)
        for _ in side_by_side(envs, requests, rng):
            assert imagined(envs[0]) == imagined(envs[1])
            state = envs[0].imagine()
            stages = state.replicas[0].stage.copy()
            now_s, ahead_s = float(state.episodes[0].now_s), state.event_s[0]
            assert (ahead_s[stages != IDLE] >= now_s).all()
            run_episode(state, envs[0].costs, 0, compile_policy(policy, envs[0].task))
            assert (state.requests[0, : state.episodes[0].requests].phase == FINISHED).all()
            assert (state.replicas[0].cached_tokens == 0).all()
            assert (state.replicas[0].used_blocks == 0).all()
            compared += 1
            running += int((stages == DECODE_RUN).sum())
    assert compared >= 12
    assert running >= 6


def test_a_rollout_plays_several_replicas_under_predictions() -> None:
    envs, requests = two_truths(np.random.default_rng(1), "least-requests")
    task = envs[0].task
    case = bound_case(envs[0].machine, requests[0])
    episode = play(task, "rollout:lpt", make_policy("rollout:lpt"), case, seed=0)
    assert episode.row["unfinished_requests"] == 0
    rows = ServingVectorEnv(2, task)
    rows.reset(seed=0)
    values = make_rollout_expert("lpt", task)(rows)
    assert (np.isfinite(values) == rows.action_masks()).all()


def test_the_leak_test_would_notice() -> None:
    """With known lengths the first difference is seen before a finish."""
    seen = 0
    for seed in range(8):
        rng = np.random.default_rng([seed, 79])
        envs, requests = two_truths(rng, "least-tokens")
        known = replace(envs[0].task, information=InformationConfig())
        envs = [ServingEnv(known), ServingEnv(known)]
        for _ in side_by_side(envs, requests, rng):
            if looks(envs[0]) != looks(envs[1]):
                seen += 1
                break
    assert seen >= 4
