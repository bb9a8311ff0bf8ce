"""Fixtures that many files share, and the settings of hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from servegym.envs import Requests, ServingEnv
from servegym.envs.compilation import NOTICE
from tests.hand_solved_helpers import Player, play_env, play_reference
from tests.helpers import instance, make_env

# Tests read what commands say; on a first run some kernels are compiled meanwhile.
NOTICE.silent = True

# Read when torch is imported. Tests run side by side, and its threads would wait for one another's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads of parallel kernels sleep while they wait: else they turn until the other worker leaves their core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples in every run, and no deadline: the first example may load the kernels.
settings.register_profile(
    "servegym",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("servegym")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text under a name in a fresh folder and returns its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write_file


@pytest.fixture
def three_on_two() -> Requests:
    """The smallest instance with a real choice: three requests, two clients, one falls idle first.

    Rounds 1, 3 and 1: at 3 s client 0 is idle, request 1 runs and request 2 waits.
    """
    return instance((5, 2), (5, 4), (5, 2))


@pytest.fixture
def lone_rule_env() -> ServingEnv:
    """One client and one rule: without a choice the episode ends in reset."""
    return make_env(1, rules=("fcfs",))


@pytest.fixture(params=[play_env, play_reference], ids=["env", "reference"])
def play(request: pytest.FixtureRequest) -> Player:
    """Both simulators: a wrong hand solution fails twice, a wrong simulator once."""
    player: Player = request.param
    return player
