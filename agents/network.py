"""An agent's network: tanh layers that kernels score, read from and written to safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from servegym.agents.card import CARD_FILE, KIND, AgentCard
from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import WRONG_VALUES, read_bytes
from servegym.envs.process.network import make_layers, score_rows


class Network:
    """A multi-layer perceptron with tanh between its layers.

    Parameters
    ----------
    layers
        (weights (out, in), biases (out,)) from the first layer to the last, float32.
    """

    def __init__(self, layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        self.layers = list(layers)
        self.lowered = make_layers(self.layers)
        """The layers as kernels read them; they hold the scratch of one call at a time."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of inputs and of outputs of every layer."""
        return (self.layers[0][0].shape[1], *(len(biases) for _, biases in self.layers))

    def scores(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the score of every action, shape (…, actions), of observations (…, features)."""
        rows = np.ascontiguousarray(observations, np.float32).reshape(-1, self.sizes[0])
        scores = np.empty((len(rows), self.sizes[-1]), np.float32)
        score_rows(self.lowered, rows, scores)
        return scores.reshape(*observations.shape[:-1], self.sizes[-1])

    def best(self, observations: NDArray[np.float32], masks: NDArray[np.bool_]) -> Any:
        """Return the legal action with the highest score, the first of equals, shape (…)."""
        return best_legal(self.scores(observations), masks)

    def sampled(
        self,
        observations: NDArray[np.float32],
        masks: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> Any:
        """Return a legal action drawn with the policy's probabilities, as in training, shape (…)."""
        scores = self.scores(observations)
        # The largest of scores with Gumbel noise is a draw from their softmax.
        return best_legal(scores + rng.gumbel(size=scores.shape), masks)


def best_legal(scores: NDArray[np.floating[Any]], masks: NDArray[np.bool_]) -> Any:
    """Return the legal action with the highest score, the first of equals, shape (…)."""
    return np.where(masks, scores, -np.inf).argmax(axis=-1)


def to_safetensors(network: Network) -> bytes:
    """Return the weights as the content of ``agent.safetensors``."""
    tensors = {}
    for k, (weights, biases) in enumerate(network.layers):
        tensors[f"{k}.weight"] = np.ascontiguousarray(weights)
        tensors[f"{k}.bias"] = np.ascontiguousarray(biases)
    return save(tensors)


def read_network(path: Path, card: AgentCard) -> Network:
    """Read ``agent.safetensors``; refuse all but the weights that the card describes."""
    data = read_bytes(path, KIND)
    if hashlib.sha256(data).hexdigest() != card.weights_sha256:
        raise ServegymError(
            f"{path}: not the weights that {CARD_FILE} describes (its SHA-256 differs): truncated "
            "or changed; export the agent again"
        )
    try:
        tensors = load(data)
    except (SafetensorError, *WRONG_VALUES) as error:
        raise ServegymError(
            f"{path}: not a safetensors file: {shown(str(error))}; export the agent again"
        ) from None
    shapes: dict[str, tuple[int, ...]] = {}
    for k, (inputs, outputs) in enumerate(zip(card.layers[:-1], card.layers[1:], strict=True)):
        shapes |= {f"{k}.weight": (outputs, inputs), f"{k}.bias": (outputs,)}
    for name in sorted(shapes.keys() | tensors.keys()):
        _check_tensor(path, name, shapes.get(name), tensors.get(name))
    pairs = [(tensors[f"{k}.weight"], tensors[f"{k}.bias"]) for k in range(len(card.layers) - 1)]
    return Network(pairs)


def _check_tensor(
    path: Path, name: str, shape: tuple[int, ...] | None, tensor: NDArray[Any] | None
) -> None:
    if shape is None or tensor is None:
        what = "lacks" if tensor is None else "has an unknown"
        raise ServegymError(f"{path}: {what} tensor {shown(name)}; {CARD_FILE} describes others")
    if tensor.shape != shape or tensor.dtype != np.float32:
        raise ServegymError(
            f"{path}: tensor {name!r} must be float32 of shape {shape}, "
            f"got {tensor.dtype} of {tensor.shape}"
        )
    if not np.isfinite(tensor).all():
        raise ServegymError(f"{path}: tensor {name!r} holds NaN or infinity; train the agent again")
