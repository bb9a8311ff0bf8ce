"""Shared by the tests of training: a small run, experts, Ctrl-C, and the script's refusals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr

import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.envs.task.cases import Case
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from servegym.studies.cli import run as run_script
from servegym.studies.commands import train as script

TINY = TASKS["servegym/Tiny-v0"]
SMALL = Hyperparameters(
    environments=4, steps=16, batch_size=32, epochs=2, width=8, timesteps=6 * 64, seed=3
)
QUIET = Options(checkpoint_every=2, tensorboard=False, progress=False)


def prefer_prefill(env: ServingVectorEnv) -> NDArray[np.float64]:
    """An expert that prefers the last legal action; it takes no time."""
    masks = env.action_masks()
    return np.where(masks, np.arange(masks.shape[1]) - 10.0, -np.inf)


def some_reference(case: Case) -> float:
    """A reference gap that differs between cases."""
    return float(case.requests.output_tokens.sum() % 17) / 100


class StopAt(BaseCallback):
    """Interrupts training in the middle of a rollout, as Ctrl-C does."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.timesteps:
            raise KeyboardInterrupt
        return True


def refusal(options: Sequence[str]) -> str:
    """Run the script, which must refuse: status 2 and one line, which is returned."""
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        run_script(script.main, options)
    assert stop.value.code == 2
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]
