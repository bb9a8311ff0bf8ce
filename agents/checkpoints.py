"""Checkpoints: the whole state of a training, without pickle; a resume ends in the same weights.

A checkpoint is one safetensors file: arrays as tensors, everything else as JSON in its header. It is
taken between two rollouts, so that no half-filled buffer belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecMonitor

from servegym.agents.record import check_identity
from servegym.agents.sb3_vec_env import ServingSB3VecEnv
from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import WRONG_VALUES, check_readable, make_folder, write_file
from servegym.envs.process.observation import FEATURES

KEEP: Final = 2
"""How many checkpoints a folder keeps."""

_FORMAT: Final = "servegym checkpoint 1"
_DIGEST: Final = "sha256"

Arrays = dict[str, NDArray[Any]]


class Progress(NamedTuple):
    """How far training has come, beside the model's own counters."""

    training_s: float = 0.0
    """Seconds of training so far."""
    evolved: int = 0
    """Finished updates of the evolution strategy."""


class Snapshot(NamedTuple):
    """The state of training between two rollouts; weights are shared with the model."""

    arrays: Arrays
    values: dict[str, Any]


def save_checkpoint(
    model: OnPolicyAlgorithm,
    identity: Mapping[str, Any],
    folder: Path,
    progress: Progress | None = None,
    snapshot: Snapshot | None = None,
) -> Path:
    """Write a checkpoint whole or not at all; forget all but the last two.

    ``identity`` is JSON that :func:`load_checkpoint` compares: a checkpoint of another run is not
    gone on from. It holds the state of ``snapshot``, where that is given, else that of the model now.
    """
    make_folder(folder)
    arrays, values = snapshot or take_snapshot(model)
    values = values | (progress or Progress())._asdict()
    header = {"format": _FORMAT, "identity": json.dumps(identity), "values": json.dumps(values)}
    header[_DIGEST] = _digest(arrays, header)
    path = folder / f"{values['num_timesteps']:012d}.safetensors"
    write_file(path, save(arrays, header))
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def load_checkpoint(model: OnPolicyAlgorithm, identity: Mapping[str, Any], path: Path) -> Progress:
    """Put ``model`` and its environments where they stood; return how far training had come.

    Raises
    ------
    ServegymError
        If the file is damaged, no checkpoint, or one of another run or of a version with another state.
    """
    advice = "delete it to go on from the one before"
    try:
        check_readable(path, "checkpoint")
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ServegymError as error:
        raise ServegymError(f"{error}; {advice}") from None
    except (OSError, SafetensorError, *WRONG_VALUES) as error:
        words = f"damaged or no checkpoint ({shown(str(error))})"
        raise ServegymError(f"{path}: {words}; {advice}") from None
    if header.get("format") != _FORMAT:
        raise ServegymError(f"{path}: not a {_FORMAT}; {advice}")
    if header.get(_DIGEST) not in (None, _digest(arrays, header)):  # the first versions had none
        raise ServegymError(f"{path}: damaged (its SHA-256 differs); {advice}")
    try:
        found, values = (json.loads(header[part]) for part in ("identity", "values"))
        check_identity(str(path), found, identity)
        # Weights and observations in it are by place, without names; the first versions noted none.
        observed = list(_environments(model)[1].env.features)
        if values.get("features", list(FEATURES)) != observed:
            raise ServegymError(
                f"{path}: the run observes other features, or in another order, than this version; "
                "begin a run in another folder"
            )
        try:
            _restore(model, arrays, values)
        except ServegymError as error:  # it is this run's
            raise ServegymError(
                f"{path}: {error}, those of another version; begin a run in another folder"
            ) from None
        return Progress(float(values["training_s"]), int(values["evolved"]))
    except WRONG_VALUES as error:
        if isinstance(error, ServegymError):
            raise
        words = shown(" ".join(str(error).split()))
        raise ServegymError(f"{path}: damaged ({words}); {advice}") from None


def _digest(arrays: Arrays, header: Mapping[str, str]) -> str:
    """Return the SHA-256 of a checkpoint's contents: a flipped bit in the state may crash a kernel."""
    total = hashlib.sha256()
    for part in ("identity", "values"):
        total.update(header.get(part, "").encode())
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return total.hexdigest()


def _environments(model: OnPolicyAlgorithm) -> tuple[VecMonitor, ServingSB3VecEnv]:
    monitor = model.get_env()
    assert isinstance(monitor, VecMonitor)
    environment = monitor.venv
    assert isinstance(environment, ServingSB3VecEnv)
    return monitor, environment


def take_snapshot(model: OnPolicyAlgorithm) -> Snapshot:
    """Return what makes up the state of training; it stays the same until the next update."""
    monitor, environment = _environments(model)
    rows, row_rngs = environment.get_state()
    _, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002 (what SB3 draws from)
    arrays: Arrays = {
        "last_observations": np.asarray(model._last_obs),
        "last_episode_starts": np.asarray(model._last_episode_starts),
        "episode_returns": monitor.episode_returns.copy(),  # added to in place, unlike the others
        "episode_lengths": monitor.episode_lengths.copy(),
        "torch_rng": torch.get_rng_state().numpy(),
        "numpy_rng": np.asarray(numpy_keys),
    }
    arrays |= {f"rows.{name}": array for name, array in rows.items()}
    arrays |= {f"policy.{name}": value.numpy() for name, value in _weights(model).items()}
    for parameter, slots in model.policy.optimizer.state_dict()["state"].items():
        arrays |= {f"optimizer.{parameter}.{slot}": value.numpy() for slot, value in slots.items()}
    values = {
        "features": list(environment.env.features),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "episode_count": monitor.episode_count,
        "recent_episodes": [
            {key: float(value) for key, value in episode.items()}
            for episode in model.ep_info_buffer or ()
        ],
        "row_rngs": row_rngs,
        "numpy_rng": numpy_rest,
        "python_rng": random.getstate(),
    }
    # safetensors writes memory as it lies there.
    return Snapshot({name: np.ascontiguousarray(array) for name, array in arrays.items()}, values)


def _restore(model: OnPolicyAlgorithm, arrays: Arrays, values: Mapping[str, Any]) -> None:
    monitor, environment = _environments(model)
    monitor.reset()
    environment.set_state(_under("rows.", arrays), values["row_rngs"])
    model._last_obs = arrays["last_observations"]
    model._last_episode_starts = arrays["last_episode_starts"]
    monitor.episode_returns = arrays["episode_returns"]
    monitor.episode_lengths = arrays["episode_lengths"]
    monitor.episode_count = values["episode_count"]
    model.policy.load_state_dict(
        {name: torch.from_numpy(array) for name, array in _under("policy.", arrays).items()}
    )
    optimizer = model.policy.optimizer
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, array in _under("optimizer.", arrays).items():
        parameter, _, slot = name.partition(".")
        slots.setdefault(int(parameter), {})[slot] = torch.from_numpy(array)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    model.num_timesteps = values["num_timesteps"]
    model._n_updates = values["n_updates"]
    model.ep_info_buffer = deque(values["recent_episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    torch.set_rng_state(torch.from_numpy(arrays["torch_rng"]))
    np.random.set_state(("MT19937", arrays["numpy_rng"], *values["numpy_rng"]))  # noqa: NPY002
    version, state, gauss = values["python_rng"]
    random.setstate((version, tuple(state), gauss))


def _weights(model: OnPolicyAlgorithm) -> dict[str, torch.Tensor]:
    return dict(model.policy.state_dict())


def _under(prefix: str, arrays: Arrays) -> Arrays:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
