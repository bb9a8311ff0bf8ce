"""The same seed gives the same episode to the last bit: again, copied, pickled and uncompiled."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs import TASKS, ServingEnv
from tests.helpers import instance, play_randomly, random_legal_action, start

Transition = tuple[bytes, float, bool, bool, dict[str, Any], list[bool]]


def rollout(env: ServingEnv, seed: int, steps: int | None = None) -> list[Transition]:
    """Reset and take random legal actions; return each transition exactly."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    rows: list[Transition] = [
        (observation.tobytes(), 0.0, False, False, info, env.action_masks().tolist())
    ]
    return rows + go_on(env, rng, steps)


def go_on(env: ServingEnv, rng: np.random.Generator, steps: int | None = None) -> list[Transition]:
    """Take random legal actions, at most `steps`."""
    rows: list[Transition] = []
    while not (rows and (rows[-1][2] or rows[-1][3])) and (steps is None or len(rows) < steps):
        step = env.step(np.int64(random_legal_action(env, rng)))
        observation, reward, terminated, truncated, info = step
        mask = env.action_masks().tolist()
        rows.append((observation.tobytes(), float(reward), terminated, truncated, info, mask))
    return rows


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_two_environments_agree_to_the_last_bit(name: str, seed: int) -> None:
    assert rollout(ServingEnv(name), seed) == rollout(ServingEnv(name), seed)


def test_nothing_is_left_from_the_episode_before() -> None:
    """A used environment, cut short in the middle, plays like a new one."""
    used = ServingEnv("GSM8K-v0")
    rollout(used, 3, steps=50)
    start(used, instance((5, 2), (5, 4), (5, 2)))
    play_randomly(used, np.random.default_rng(0))
    assert rollout(used, 4) == rollout(ServingEnv("GSM8K-v0"), 4)


def test_seed_decides_and_later_episodes_differ() -> None:
    first, second = ServingEnv("Tiny-v0"), ServingEnv("Tiny-v0")
    outputs = []
    for env in (first, second):
        env.reset(seed=5)
        episodes = [env.records().decode_rounds.tolist()]
        for _ in range(3):
            env.reset()
            episodes.append(env.records().decode_rounds.tolist())
        outputs.append(episodes)
    assert outputs[0] == outputs[1]
    assert len({tuple(episode) for episode in outputs[0]}) == 4
    first.reset(seed=6)
    assert first.records().decode_rounds.tolist() != outputs[0][0]


def copied(env: ServingEnv) -> ServingEnv:
    return copy.deepcopy(env)


def pickled(env: ServingEnv) -> ServingEnv:
    twin: ServingEnv = pickle.loads(pickle.dumps(env))
    return twin


@pytest.mark.parametrize("duplicate", [copied, pickled])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_goes_on_identically(
    duplicate: Callable[[ServingEnv], ServingEnv], steps: int
) -> None:
    """A copy made in mid-episode plays on by itself as the original does, into the next episode."""
    env = ServingEnv("GSM8K-v0")
    rollout(env, 1, steps)
    twin = duplicate(env)
    rows = go_on(env, np.random.default_rng(2))
    assert go_on(twin, np.random.default_rng(2)) == rows
    assert env.reset()[0].tobytes() == twin.reset()[0].tobytes()


def test_a_new_environment_can_be_pickled() -> None:
    env = ServingEnv("Tiny-v0")
    assert rollout(pickled(env), 1) == rollout(env, 1)


def test_task_by_file_and_by_object(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("[workload]\nrequests = 5\nsource = 'tiny'\n[cluster]\nclients = 2\n")
    by_file = ServingEnv(str(path))
    by_object = ServingEnv(by_file.task)
    assert rollout(by_file, 1) == rollout(by_object, 1)


PLAY_TINY = """
import hashlib, sys
import numpy as np
from servegym.envs import ServingEnv
digest, steps = hashlib.sha256(), 0
for seed in range(20):
    rng = np.random.default_rng(seed)
    rate = {"workload": {"arrival_rate_per_s": 0.25 * (seed % 2)}}
    mode = {"process": {"decisions": ["events", "rounds"][seed // 2 % 2]}}
    env = ServingEnv("servegym/Tiny-v0", overrides=rate | mode)
    observation, info = env.reset(seed=seed)
    over = False
    while not over:
        action = rng.choice(np.flatnonzero(env.action_masks()))
        observation, reward, over, _, info = env.step(action)
        digest.update(observation.tobytes() + repr((float(reward), over, info)).encode())
        steps += 1
    for values in vars(env.records()).values():
        digest.update(values.tobytes())
print(steps, digest.hexdigest())
"""


def printed(code: str) -> str:
    """What code prints in this process, where kernels are compiled."""
    with redirect_stdout(io.StringIO()) as shown:
        exec(code, {})
    return shown.getvalue()


def printed_uncompiled(code: str) -> str:
    """What code prints in a process where kernels are plain Python; warnings are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    ).stdout


def test_the_same_without_the_compiler() -> None:
    """NUMBA_DISABLE_JIT=1 runs the same kernels as plain Python, to the last bit."""
    compiled = printed(PLAY_TINY)
    assert compiled == printed_uncompiled(PLAY_TINY)
    assert int(compiled.split()[0]) > 100


PLAY_LONG = """
import numpy as np
from servegym.envs import ServingEnv, make_requests
env = ServingEnv("GSM8K-v0", overrides={"cluster": {"clients": 300}, "process": {"rules": ["fcfs"]}})
outputs = 9_000_000 + 1000 * np.arange(300)
env.reset(options={"requests": make_requests(np.full(300, 7), outputs)})
print(env.step(0)[4]["makespan_s"].hex())
"""


def test_the_longest_outputs_without_the_compiler() -> None:
    """Rounds and requests each fit 32 bits in the records; their product does not."""
    assert printed(PLAY_LONG) == printed_uncompiled(PLAY_LONG) != ""
