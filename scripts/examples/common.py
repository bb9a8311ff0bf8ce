"""What the examples share: their task and network, and the gap of a trained actor on held-out cases."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from servegym.agents.validation import Validation
from servegym.baselines import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import load_task, make_case

TASK = "GSM8K-v0"
ENVS, STEPS = 10, 256
ROLLOUT = ENVS * STEPS
SEEDS = range(1_000_000, 1_000_020)


def decisions(usual: int) -> int:
    """Return how many decisions to train on, whole rollouts: the first argument, or the usual number."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else usual
    return -(-wanted // ROLLOUT) * ROLLOUT


def network(inputs: int, outputs: int) -> nn.Sequential:
    """Return a network of two hidden layers, as the agents that servegym trains itself have."""
    hidden = nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(128, outputs))


def report(actor: Callable[[torch.Tensor], torch.Tensor], decisions: int, seconds: float) -> None:
    """Play the held-out cases greedily; ``actor`` returns logits, (rows, actions), of observations."""

    def greedy(observations: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        with torch.no_grad():
            logits = actor(torch.from_numpy(observations)).numpy()
        return np.where(masks, logits, -np.inf).argmax(axis=1)

    task = load_task(TASK)
    gaps = Validation(task, SEEDS).play(greedy).episodes["gap"]
    hybrid = make_trigger_policy("hybrid")
    theirs = np.mean([play_compiled(task, hybrid, make_case(task, seed))["gap"] for seed in SEEDS])
    print(
        f"{decisions:,} decisions in {seconds:.0f} s of CPU time, {decisions / seconds:,.0f} a second"
    )
    print(f"gap {gaps.mean():.2%}, the hybrid's {theirs:.2%}, on {len(SEEDS)} held-out cases")
