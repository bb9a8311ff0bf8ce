"""Evolution strategies after PPO: play whole episodes with the actor's output layer perturbed.

Where chance decides much of a return, PPO cannot measure what timing gains: PPO explores anew at every
decision, so exploration averages out over an episode, and chance does not. A perturbation of the weights
lasts for a whole episode, and two opposite perturbations on the same case have the same chance (Salimans
et al. 2017, arXiv 1703.03864).

A pair of episodes carries too little information about thousands of weights. So only a few directions
are perturbed, those along which the policy changes most: the leading eigenvectors of the output layer's
Fisher information. Each is scaled to change the policy equally. This is a natural evolution strategy
(Wierstra et al. 2014, arXiv 1106.4487) in few dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from servegym.agents.export import policy_network
from servegym.agents.hyperparameters import SEEDS_PER_AGENT, Hyperparameters, linear_decay
from servegym.agents.imitation import soft_targets
from servegym.agents.network import best_legal
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.side_by_side import SideBySide
from servegym.envs.process.metrics import gap_of
from servegym.envs.process.network import CompiledAgent, make_agent, make_choice, run_agent
from servegym.envs.task.cases import Case, PlanCase
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import Machine, load_case, lower, make_task_state

STATES: Final = 8192
"""Directions are found from at most so many states."""

_PAIRS_AT_ONCE: Final = 64
_CASES_OF_STATES: Final = 64
_SHIFT: Final = 3.0  # standard deviation of an action's bonus in logits, for collecting states
_LONGEST_STEP: Final = 1.0  # in the unit of the perturbation, over all directions


class Update(NamedTuple):
    """The outcome of one update."""

    gap_percent: float
    """Median gap of the candidates; the mean would be that of a few very bad ones."""
    step: float
    """Length of the step, in root mean square logits at undecided states."""
    decisions: int
    """Decisions played for the update."""


class Evolution:
    """Improves the actor of a model in place; an update depends on its number and the weights only.

    Parameters
    ----------
    model
        PPO or MaskablePPO with an MLP actor.
    task
        Its gap is what the updates reduce.
    hyperparameters
        Those that begin with ``evolution``, and ``final_learning_rate``. Cases are those of seeds
        ``1000 · seed`` … ``1000 · seed + 999``.
    threads
        Threads that share the candidates. The updates do not depend on it.
    plan_case
        Plans each case; None: all have the greedy plan.
    """

    def __init__(
        self,
        model: OnPolicyAlgorithm,
        task: TaskConfig,
        hyperparameters: Hyperparameters,
        threads: int = 1,
        plan_case: PlanCase | None = None,
    ) -> None:
        self.model = model
        self.policy: Any = model.policy
        self.task = task
        self.hyperparameters = hyperparameters
        requests = len(self._case(0).requests)
        self._plan_case = plan_case
        self._rows = SideBySide(task, _CASES_OF_STATES, requests, plan_case)
        # All that a thread's kernels read is its own: bundles write their tables when they are first read.
        self._seats = [
            (lower(task), make_task_state(task, 1, requests))
            for _ in range(min(threads, 2 * _PAIRS_AT_ONCE))
        ]

    @torch.no_grad()
    def update(self, number: int) -> Update:
        """Do the update of a number, from 0 on."""
        h = self.hyperparameters
        rng = np.random.default_rng([h.seed, number])
        layer = self._layer()
        features, masks, decisions = self._states(layer, rng)
        count = min(h.evolution_directions, layer.size - 1)
        start = rng.standard_normal(layer.size)
        directions = leading_directions(layer, features, masks, count, start)
        steps = rng.standard_normal((h.evolution_pairs, len(directions)))
        gains_percent, gaps_percent = [], []
        for first in range(0, h.evolution_pairs, _PAIRS_AT_ONCE):
            chosen = steps[first : first + _PAIRS_AT_ONCE]
            signed = h.evolution_spread * np.stack([chosen, -chosen], axis=1)
            candidates = layer + np.tensordot(signed.reshape(-1, len(directions)), directions, 1)
            cases = self._cases(len(chosen), rng)
            played_percent, played = self.play_pairs(candidates.astype(np.float32), cases)
            gains_percent.append(played_percent[1::2] - played_percent[::2])
            gaps_percent.append(played_percent)
            decisions += played
        gain_percent = clipped(np.concatenate(gains_percent))
        decay = linear_decay(h.evolution_learning_rate, h.final_learning_rate)
        rate = decay(1.0 - number / h.evolution_updates)
        step = rate * (gain_percent @ steps) / (2 * h.evolution_spread * h.evolution_pairs)
        length = float(np.linalg.norm(step))
        step *= min(1.0, _LONGEST_STEP / max(length, 1e-12))
        self._set_layer(layer + np.tensordot(step, directions, 1))
        gap_percent = float(np.median(np.concatenate(gaps_percent)))
        return Update(gap_percent, min(length, _LONGEST_STEP), decisions)

    def _states(
        self, layer: NDArray[np.float64], rng: np.random.Generator
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
        """Return features and masks of some states, and how many decisions were played for them.

        In each row every action has its own bonus for the whole episode, so that there are states on
        both sides of the boundaries between the policy's actions.
        """
        bonus = torch.from_numpy(
            rng.normal(0.0, _SHIFT, (_CASES_OF_STATES, len(layer))).astype(np.float32)
        )
        weights = torch.from_numpy(layer.astype(np.float32))
        features: list[NDArray[np.float32]] = []
        kept: list[NDArray[np.bool_]] = []

        def predict(
            observations: NDArray[np.float32], masks: NDArray[np.bool_]
        ) -> NDArray[np.int64]:
            seen = self._features(observations)
            features.append(seen.numpy())
            kept.append(masks.copy())
            return best_legal((seen @ weights.T + bonus).numpy(), masks)

        cases = self._cases(_CASES_OF_STATES, rng)
        met = np.stack([step.played for step in self._rows.play(cases, predict)])
        chosen = rng.permutation(np.flatnonzero(met))[:STATES]
        flat = np.concatenate(features)[chosen].astype(np.float64)
        return flat, np.concatenate(kept)[chosen], int(met.sum())

    def play_pairs(
        self, candidates: NDArray[np.float32], cases: Sequence[Case]
    ) -> tuple[NDArray[np.float64], int]:
        """Play two candidates on each case, in compiled code.

        Parameters
        ----------
        candidates
            Output layers, shape (2 · cases, actions, features + 1): those of case i are 2i and 2i + 1.

        Returns
        -------
        gaps_percent
            Shape (2 · cases,). A candidate whose episode was cut short has twice the largest gap.
        decisions
            Decisions played.
        """
        gaps_percent = np.zeros(len(candidates))
        decisions = np.zeros(len(candidates), np.int64)
        threads = len(self._seats)
        plans = [None if self._plan_case is None else self._plan_case(case) for case in cases]

        def play_share(t: int) -> None:
            """Play every ``threads``-th candidate, from candidate ``t`` on."""
            machine, state = self._seats[t]
            agent = self._make_agent(machine)
            for k in range(t, len(candidates), threads):
                _put_output_layer(agent, candidates[k])
                load_case(self.task, state, 0, cases[k // 2], plans[k // 2])
                run_agent(state, machine.costs, 0, agent)
                gaps_percent[k] = 100.0 * gap_of(state, 0)
                decisions[k] = state.episodes[0].decisions

        if threads == 1:
            play_share(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(play_share, range(threads)))
        # A candidate whose episode was cut short is worse than all others; clipping limits by how much.
        cut_short = np.isnan(gaps_percent)
        gaps_percent[cut_short] = 2.0 * gaps_percent[~cut_short].max(initial=100.0)
        return gaps_percent, int(decisions.sum())

    def _make_agent(self, machine: Machine) -> CompiledAgent:
        """Return the present policy as compiled code plays it, with scratch of its own."""
        network = policy_network(self.model)
        features, actions = len(machine.features), len(self.task.actions)
        choice = make_choice(network.lowered, np.arange(features), np.arange(actions))
        return make_agent(choice, machine.settings, features, actions)

    def _features(self, observations: NDArray[np.float32]) -> torch.Tensor:
        """Return the inputs of the output layer and, for its biases, a 1: (cases, features + 1)."""
        hidden = self.policy.mlp_extractor.forward_actor(torch.from_numpy(observations))
        return torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)

    def _layer(self) -> NDArray[np.float64]:
        """Return the output layer's weights and biases, (actions, features + 1)."""
        net = self.policy.action_net
        return torch.cat([net.weight, net.bias.unsqueeze(1)], dim=1).numpy().astype(np.float64)

    def _set_layer(self, layer: NDArray[np.float64]) -> None:
        new = torch.from_numpy(layer.astype(np.float32))
        self.policy.action_net.weight.copy_(new[:, :-1])
        self.policy.action_net.bias.copy_(new[:, -1])

    def _cases(self, count: int, rng: np.random.Generator) -> list[Case]:
        return [self._case(int(k)) for k in rng.integers(SEEDS_PER_AGENT, size=count)]

    def _case(self, number: int) -> Case:
        return make_case(self.task, self.hyperparameters.first_environment_seed + number)


def _put_output_layer(agent: CompiledAgent, layer: NDArray[np.float32]) -> None:
    """Replace an agent's output layer by weights and biases, (actions, features + 1)."""
    layers, (actions, inputs) = agent.network.layers, layer.shape
    layers.weights[-1, : inputs - 1, :actions] = layer[:, :-1].T
    layers.biases[-1, :actions] = layer[:, -1]


def leading_directions(
    layer: NDArray[np.float64],
    features: NDArray[np.float64],
    masks: NDArray[np.bool_],
    count: int,
    start: NDArray[np.float64],
    temperature: float = 3.0,
    least_information: float = 1e-3,
) -> NDArray[np.float64]:
    """Return the directions of an output layer along which the policy changes most.

    A step of 1 along one of them shifts logits by 1 (root mean square over states, weighted by how
    undecided the flattened policy is).

    Parameters
    ----------
    layer
        Weights and biases, shape (actions, features + 1).
    features, masks
        Inputs of the layer, with a 1 for its biases, and legal actions: (states, features + 1) and
        (states, actions).
    count
        How many directions; fewer than the layer has numbers.
    start
        Where the search for eigenvectors begins, shape (actions · (features + 1),).
    temperature
        Flattens the policy, so that states far from its boundaries count, too.
    least_information
        A direction is scaled as if it had at least this share of the leading one's information.

    Returns
    -------
    ndarray
        Shape (count, actions, features + 1).
    """
    shares = soft_targets(np.where(masks, features @ layer.T, -np.inf), temperature)
    undecided = float((1.0 - np.square(shares).sum(axis=1)).sum())

    def information(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        # Fisher information of a softmax over linear scores: Σ (diag(p) − p·pᵀ) ⊗ f·fᵀ.
        change = features @ vector.reshape(layer.shape).T
        change = shares * (change - (shares * change).sum(axis=1, keepdims=True))
        return (change.T @ features).ravel() / undecided

    operator = LinearOperator((layer.size, layer.size), matvec=information, dtype=np.float64)
    values, vectors = eigsh(operator, k=count, v0=start)
    values = np.maximum(values, least_information * values.max())
    return (vectors / np.sqrt(values)).T.reshape(count, *layer.shape)


def clipped(differences: NDArray[np.float64], medians: float = 2.0) -> NDArray[np.float64]:
    """Return differences clipped at a few medians of those that are not 0: some candidates never prefill."""
    sizes = np.abs(differences[differences != 0])
    limit = medians * float(np.median(sizes)) if len(sizes) else 0.0
    return np.clip(differences, -limit, limit)
