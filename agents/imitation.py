"""A warm start: imitation of an expert before PPO.

Round 1 is behaviour cloning: the states come from playing the expert's best action. In later rounds
they come from playing the learner, and the expert labels them (DAgger, Ross et al. 2011), so that
the learner also learns from states after its own mistakes. All labelled states are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tqdm import tqdm

from servegym.agents.hyperparameters import Hyperparameters
from servegym.envs.errors import ServegymError
from servegym.envs.simulator.state import row_arrays
from servegym.envs.task.cases import PlanCase
from servegym.envs.task.config import TaskConfig
from servegym.envs.vector_env import ServingVectorEnv

Expert = Callable[[ServingVectorEnv], NDArray[np.float64]]
"""Values every action in the current state of every row, shape (num_envs, actions): the return of the
whole episode, −100 · gap, if the action is taken now and a rule finishes the episode; −∞ where illegal."""

_Actor = Callable[[ServingVectorEnv, NDArray[np.float64] | None], NDArray[np.int64]]
_OPENING_RATES: Final = (0.01, 0.3)


class Labelled(NamedTuple):
    """States and their labels from the expert."""

    observations: NDArray[np.float32]  # (states, features)
    masks: NDArray[np.bool_]  # (states, actions)
    targets: NDArray[np.float32]  # (states, actions) probabilities to imitate
    returns: NDArray[np.float32]  # (states,) reward from here on


def imitate(
    model: OnPolicyAlgorithm,
    task: TaskConfig,
    expert: Expert,
    hyperparameters: Hyperparameters,
    *,
    plan_case: PlanCase | None = None,
    progress: bool = False,
) -> None:
    """Train actor and critic of ``model`` on labels of ``expert``; its environments are not stepped.

    The labelled episodes follow the plans of ``plan_case``, or greedy ones.

    Raises
    ------
    ServegymError
        If the task's reward is not ``gap``: an expert's values are returns of that reward.
    """
    h = hyperparameters
    if task.process.reward != "gap":
        raise ServegymError(
            f"imitation needs process.reward = 'gap', the task has {task.process.reward!r}"
        )
    env = ServingVectorEnv(h.imitation_environments, task, copy=False)
    env.plan_case = plan_case
    env.reset(seed=h.first_environment_seed)
    rng = np.random.default_rng(h.seed)
    steps = -(-h.imitation_states // h.imitation_environments)
    rounds: list[Labelled] = []
    with tqdm(
        total=h.imitation_rounds * steps * h.imitation_environments,
        desc="imitation",
        unit="state",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for round_ in range(h.imitation_rounds):
            if round_ == 0:
                spread_over_episodes(env, _opening(rng, env.num_envs))
                actor = _expert_actor(rng, h.imitation_random)
            else:
                actor = _learner(model, rng, h.imitation_random)
                spread_over_episodes(env, actor)
            rounds.append(collect(env, expert, actor, steps, h.imitation_temperature, bar.update))
            bar.set_postfix_str(f"loss {fit(model, _joined(rounds), h, rng):.4f}")


def collect(
    env: ServingVectorEnv,
    expert: Expert,
    actor: _Actor,
    steps: int,
    temperature: float,
    tell: Callable[[int], object] = lambda _: None,
) -> Labelled:
    """Play ``actor`` for ``steps`` steps of every row and let the expert label every state."""
    labelled = []
    for _ in range(steps):
        values = expert(env)
        observations, masks = env.rows.observations.copy(), env.action_masks().copy()
        targets = soft_targets(values, temperature)
        # The return to go is −100 · gap plus the loss that earlier rewards have reported already.
        mean = (targets * np.where(masks, values, 0.0)).sum(axis=1)
        returns = mean + env.state.episodes["reported_loss"]
        labelled.append(
            Labelled(observations, masks, targets.astype(np.float32), returns.astype(np.float32))
        )
        env.step(actor(env, values))
        tell(env.num_envs)
    return _joined(labelled)


def soft_targets(values: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return softmax(values / temperature) of each row; −inf becomes 0."""
    shares = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
    return shares / shares.sum(axis=1, keepdims=True)


def fit(
    model: OnPolicyAlgorithm, data: Labelled, h: Hyperparameters, rng: np.random.Generator
) -> float:
    """Train on all labelled states; return the mean loss of the last pass.

    The loss is the cross entropy to the targets, so that a wrong action weighs as much as it costs,
    plus the squared error of the value.
    """
    policy = model.policy
    policy.set_training_mode(True)
    tensors = [torch.from_numpy(array) for array in data]
    # An optimizer of its own: PPO begins with fresh moments.
    optimizer = torch.optim.Adam(policy.parameters(), h.imitation_learning_rate, eps=1e-5)
    batches = -(-len(data.returns) // h.imitation_batch_size)
    decay = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, total_iters=batches * h.imitation_epochs
    )
    total = 0.0
    for _ in range(h.imitation_epochs):
        order = torch.from_numpy(rng.permutation(len(data.returns)))
        total = 0.0
        for chosen in torch.split(order, h.imitation_batch_size):
            observations, masks, targets, returns = (tensor[chosen] for tensor in tensors)
            actor_features, critic_features = policy.mlp_extractor(observations)
            logits = policy.action_net(actor_features)
            if h.algorithm == "maskable-ppo":
                logits = logits.where(masks, torch.tensor(-1e8))
            cross_entropy = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
            errors = policy.value_net(critic_features).flatten() - returns
            loss = cross_entropy + h.value_coefficient * errors.square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), h.max_gradient_norm)
            optimizer.step()
            decay.step()
            total += float(loss.detach()) * len(chosen)
    return total / len(data.returns)


def spread_over_episodes(env: ServingVectorEnv, actor: _Actor) -> None:
    """Bring row e to where a share e / num_envs of its requests has finished.

    All rows play ``actor``. Then each row is set back to the first state with that share, or to the
    beginning of its next episode if its episode ended before.
    """
    arrays = [
        np.asarray(array)
        for array in (*row_arrays(env.state).values(), *env.rows.by_name().values())
    ]
    kept = [array.copy() for array in arrays]
    episodes = env.state.episodes
    wanted = np.arange(env.num_envs) / env.num_envs
    missing = wanted > 0
    while missing.any():
        env.step(actor(env, None))
        ended = env.rows.terminated | env.rows.truncated
        reached = missing & (ended | (episodes["finished"] >= wanted * episodes["requests"]))
        for array, copy in zip(arrays, kept, strict=True):
            copy[reached] = array[reached]
        missing &= ~reached
    for array, copy in zip(arrays, kept, strict=True):
        array[:] = copy


def _opening(rng: np.random.Generator, rows: int) -> _Actor:
    """Return an actor for round 1, before anything is learned: each row prefills at its own rate."""
    least, most = np.log(_OPENING_RATES)
    rates = np.exp(rng.uniform(least, most, rows))

    def act(env: ServingVectorEnv, _: NDArray[np.float64] | None) -> NDArray[np.int64]:
        masks = env.action_masks()
        decode = masks[:, 0] & (rng.random(rows) >= rates)
        return np.where(decode, 0, _random_legal(rng, masks))

    return act


def _expert_actor(rng: np.random.Generator, random_share: float) -> _Actor:
    """Return an actor that plays the expert's best action."""

    def act(env: ServingVectorEnv, values: NDArray[np.float64] | None) -> NDArray[np.int64]:
        assert values is not None
        return _sometimes_random(rng, env, values.argmax(axis=1), random_share)

    return act


def _learner(model: OnPolicyAlgorithm, rng: np.random.Generator, random_share: float) -> _Actor:
    """Return an actor that samples from the policy learned so far."""

    def act(env: ServingVectorEnv, _: NDArray[np.float64] | None) -> NDArray[np.int64]:
        observations, masks = env.rows.observations, env.action_masks()
        if isinstance(model, MaskablePPO):
            actions, _state = model.predict(observations, action_masks=masks)
        else:
            actions, _state = model.predict(observations)
        return _sometimes_random(rng, env, actions, random_share)

    return act


def _sometimes_random(
    rng: np.random.Generator, env: ServingVectorEnv, actions: NDArray[np.int64], share: float
) -> NDArray[np.int64]:
    random = rng.random(env.num_envs) < share
    return np.where(random, _random_legal(rng, env.action_masks()), actions)


def _random_legal(rng: np.random.Generator, masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return one of the legal actions of each row."""
    return np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1)


def _joined(parts: Sequence[Labelled]) -> Labelled:
    return Labelled(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
