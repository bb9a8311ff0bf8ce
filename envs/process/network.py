"""A trained network as kernels play it: what it observes, its layers, and the best legal action.

The policy object of an agent and the compiled loops call the same functions, so both choose the same actions
to the last bit. All arithmetic is exact IEEE arithmetic in a fixed order, without a library's tanh or matrix
product: the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numba.core import config
from numpy.typing import NDArray

from servegym.envs.bundle import Bundle
from servegym.envs.jit import kernel, shared_kernel, threaded_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.actions import Settings, apply, legal_actions
from servegym.envs.process.blocks import observe
from servegym.envs.simulator.events import advance, sleep
from servegym.envs.simulator.state import NOBODY, State

# tanh x ≈ x · P(x²) / Q(x²), fitted to the least relative error up to _END, where tanh rounds to 1. In
# double precision it is wrong by 2e-9: half a last place of float32.
_END: Final = 9.02
_P: Final = (
    0.9999999987046,
    0.1367989792399,
    0.003868305960848,
    2.800700375403e-05,
    3.058387818891e-08,
    -1.220258291812e-11,
)
_Q: Final = (1.0, 0.4701322999086, 0.02724575983748, 0.0003938592119389, 1.287334089786e-06)

_P0, _P1, _P2, _P3, _P4, _P5 = _P
_Q0, _Q1, _Q2, _Q3, _Q4 = _Q


@dataclass(frozen=True, eq=False)
class DenseLayers(Bundle):
    """Dense layers with tanh between them; arrays are as wide as the widest, and 0 beyond a layer's own."""

    weights: NDArray[np.float32]  # (layers, widest, widest) [k, i, j]: from input i to output j
    biases: NDArray[np.float32]  # (layers, widest)
    sizes: NDArray[np.int64]  # (layers + 1,) inputs, then outputs of every layer
    signals: NDArray[
        np.float32
    ]  # (layers + 1, widest) scratch: inputs, then outputs of every layer


def make_layers(
    layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> DenseLayers:
    """Return what kernels read of layers: weights (out, in) and biases (out,) of each."""
    sizes = [layers[0][0].shape[1], *(len(biases) for _, biases in layers)]
    widest = max(sizes)
    weights = np.zeros((len(layers), widest, widest), np.float32)
    biases = np.zeros((len(layers), widest), np.float32)
    for k, (of_layer, shifts) in enumerate(layers):
        weights[k, : sizes[k], : sizes[k + 1]] = of_layer.T
        biases[k, : sizes[k + 1]] = shifts
    signals = np.zeros((len(sizes), widest), np.float32)
    return DenseLayers(weights, biases, np.array(sizes, np.int64), signals)


@shared_kernel
def run_layers(layers: DenseLayers) -> None:
    """Compute all signals from ``signals[0]``; the last are the scores.

    Each output adds its inputs' shares to its bias, in the order of the inputs.
    """
    last = layers.sizes.size - 2
    for k in range(last + 1):
        _run_layer(layers, k)
        if k < last:
            _squash(layers.signals[k + 1], layers.sizes[k + 1])


@kernel
def _run_layer(layers: DenseLayers, k: int) -> None:
    weights, inputs, outputs = layers.weights[k], layers.signals[k], layers.signals[k + 1]
    width = layers.sizes[k + 1]
    for j in range(width):
        outputs[j] = layers.biases[k, j]
    count = layers.sizes[k]
    whole = count - count % _AT_ONCE
    for i in range(0, whole, _AT_ONCE):
        _add_several(outputs, weights, inputs, i, width)
    for i in range(whole, count):
        _add_scaled(outputs, weights[i], inputs[i], width)


_AT_ONCE: Final = 8
"""Inputs whose shares are added to an output in one go: it is read and written once."""


def _add_scaled(
    outputs: NDArray[np.float32], row: NDArray[np.float32], factor: np.float32, width: int
) -> None:
    """Add ``factor`` times the first entries of ``row`` to those of ``outputs``, rounding twice."""
    outputs[:width] += factor * row[:width]


def _add_several(
    outputs: NDArray[np.float32],
    weights: NDArray[np.float32],
    inputs: NDArray[np.float32],
    i: int,
    width: int,
) -> None:
    """Do so for the inputs from ``i`` on, one after another."""
    for k in range(i, i + _AT_ONCE):
        outputs[:width] += inputs[k] * weights[k, :width]


if not config.DISABLE_JIT:  # the same in loops, of which LLVM makes vector instructions

    @kernel
    def _add_scaled(
        outputs: NDArray[np.float32], row: NDArray[np.float32], factor: np.float32, width: int
    ) -> None:
        for j in range(width):
            outputs[j] += factor * row[j]

    @kernel
    def _add_several(
        outputs: NDArray[np.float32],
        weights: NDArray[np.float32],
        inputs: NDArray[np.float32],
        i: int,
        width: int,
    ) -> None:
        w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        w4, w5, w6, w7 = weights[i + 4], weights[i + 5], weights[i + 6], weights[i + 7]
        x0, x1, x2, x3 = inputs[i], inputs[i + 1], inputs[i + 2], inputs[i + 3]
        x4, x5, x6, x7 = inputs[i + 4], inputs[i + 5], inputs[i + 6], inputs[i + 7]
        for j in range(width):
            total = outputs[j] + x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]
            outputs[j] = total + x4 * w4[j] + x5 * w5[j] + x6 * w6[j] + x7 * w7[j]


@kernel
def _squash(signals: NDArray[np.float32], count: int) -> None:
    """Replace the first signals by their tanh."""
    for j in range(count):
        x = np.float64(signals[j])
        x = min(max(x, -_END), _END)
        u = x * x
        p = ((((_P5 * u + _P4) * u + _P3) * u + _P2) * u + _P1) * u + _P0
        q = (((_Q4 * u + _Q3) * u + _Q2) * u + _Q1) * u + _Q0
        signals[j] = x * np.divide(p, q)


@shared_kernel
def score_rows(
    layers: DenseLayers, observations: NDArray[np.float32], scores: NDArray[np.float32]
) -> None:
    """Write the scores (rows, outputs) of observations (rows, inputs)."""
    for row in range(observations.shape[0]):
        for i in range(layers.sizes[0]):
            layers.signals[0, i] = observations[row, i]
        run_layers(layers)
        for j in range(layers.sizes[-1]):
            scores[row, j] = layers.signals[layers.sizes.size - 1, j]


@dataclass(frozen=True, eq=False)
class NetworkChoice(Bundle):
    """A network, and where a task has its features and actions."""

    layers: DenseLayers
    columns: NDArray[np.int64]  # (inputs,) place of each input in the task's observation
    actions: NDArray[np.int64]  # (outputs,) the task's number of each action
    bonuses: NDArray[
        np.float32
    ]  # (stages, outputs) added to the scores for a replica's k-th stage;
    # the last row goes on


def make_choice(
    layers: DenseLayers, columns: NDArray[np.int64], actions: NDArray[np.int64]
) -> NetworkChoice:
    """Return a network that chooses by its scores alone."""
    return NetworkChoice(layers, columns, actions, np.zeros((1, len(actions)), np.float32))


@shared_kernel
def choose(
    network: NetworkChoice, observation: NDArray[np.float32], mask: NDArray[np.bool_], stage: int
) -> int:
    """Return the legal one of its actions with the highest score and bonus, the first of equals.

    Where none of its own is legal, that is the first legal one. ``stage``: how many stages that admit the
    replica has begun so far.
    """
    layers = network.layers
    inputs, scores = layers.signals[0], layers.signals[layers.sizes.size - 1]
    for i in range(network.columns.size):
        inputs[i] = observation[network.columns[i]]
    run_layers(layers)
    row = min(stage, network.bonuses.shape[0] - 1)
    best, highest = NOBODY, np.float32(0.0)
    for k in range(network.actions.size):
        score = scores[k] + network.bonuses[row, k]
        if mask[network.actions[k]] and (best == NOBODY or score > highest):
            best, highest = k, score
    return int(np.argmax(mask)) if best == NOBODY else network.actions[best]


@dataclass(frozen=True, eq=False)
class CompiledAgent(Bundle):
    """An agent in a task as compiled loops play it. Each thread needs one of its own: it holds scratch."""

    network: NetworkChoice
    settings: Settings
    observation: NDArray[np.float32]  # (features of the task,) scratch
    mask: NDArray[np.bool_]  # (actions of the task,) scratch
    taken: NDArray[np.int64]  # (actions of the task,) how often it has chosen each


def make_agent(
    network: NetworkChoice, settings: Settings, features: int, actions: int
) -> CompiledAgent:
    """Return an agent with scratch for an observation and a mask of so many features and actions."""
    scratch = np.zeros(features, np.float32), np.zeros(actions, np.bool_)
    return CompiledAgent(network, settings, *scratch, np.zeros(actions, np.int64))


@kernel
def stages_of(state: State, e: int, r: int) -> int:
    """Return how many stages that admit replica ``r`` has begun."""
    return state.replicas[e, r].prefill_stages + state.replicas[e, r].mixed_stages


@shared_kernel
def take_choice(state: State, costs: CostTables, e: int, r: int, agent: CompiledAgent) -> bool:
    """Do what an agent chooses at the turn of replica ``r``; False where the task cuts the episode short.

    The same steps as ``steps.run_to_choice`` and ``steps.run``. What is legal is left in ``agent.mask``.
    """
    settings, episode = agent.settings, state.episodes[e]
    legal = legal_actions(state, costs, settings, e, r, agent.mask)
    if legal == 0:
        sleep(state, e, r)
        return True
    action = int(np.argmax(agent.mask))
    if legal > 1:
        late = 0 < settings.max_seconds < episode.now_s
        many = 0 < settings.max_decisions <= episode.decisions
        if episode.decisions > 0 and (late or many):  # the first decision comes with the reset
            return False
        episode.decisions += 1
        observe(state, costs, settings, e, r, agent.observation)
        stage = stages_of(state, e, r)
        action = choose(agent.network, agent.observation, agent.mask, stage)
        agent.taken[action] += 1
    apply(state, costs, settings, e, r, action)
    return True


@threaded_kernel
def run_agent(state: State, costs: CostTables, e: int, agent: CompiledAgent) -> None:
    """Run the loaded episode of row ``e`` to its end, or to where the task cuts it short, under an agent."""
    while True:
        r = advance(state, costs, e)
        if r == NOBODY or not take_choice(state, costs, e, r, agent):
            break
