"""The mask of legal actions as a part of the observation, for libraries that look for it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, shown
from servegym.envs.vector_env import ServingVectorEnv

Masked = dict[str, NDArray[Any]]
"""The observation and the mask, by their keys."""


class MaskInObservation(
    gym.ObservationWrapper[Masked, np.int64, NDArray[np.float32]], RecordConstructorArgs
):
    """An environment whose observation is a Dict: what it was before, and which actions are legal.

    The mask is 1 where an action is legal: int8 in a ``MultiBinary`` space, as ``Discrete.sample`` takes it.
    After the end of an episode only the first action is.

    | library | keys |
    |---|---|
    | PettingZoo's convention, TorchRL | ``"observation"``, ``"action_mask"``: as they are |
    | RLlib's ``ActionMaskingTorchRLModule`` | ``observation_key="observations"`` |
    | Tianshou | ``observation_key="obs", mask_key="mask"`` |

    Parameters
    ----------
    env
        An environment of ``Discrete`` actions with ``action_masks()``, such as :class:`ServingEnv`,
        which other wrappers may stand around.
    observation_key, mask_key
        Two keys of the Dict.

    Raises
    ------
    ServegymError
        If the environment has no masks, or the keys are equal or no texts.

    Examples
    --------
    >>> import gymnasium
    >>> import servegym.envs
    >>> env = servegym.envs.MaskInObservation(gymnasium.make("servegym/Tiny-v0"))
    >>> observation, _ = env.reset(seed=0)
    >>> observation["observation"].shape, observation["action_mask"].tolist()
    ((65,), [0, 1, 1, 1, 1, 1, 1])
    >>> action = env.action_space.sample(mask=observation["action_mask"])
    """

    def __init__(
        self,
        env: gym.Env[NDArray[np.float32], np.int64],
        observation_key: str = "observation",
        mask_key: str = "action_mask",
    ) -> None:
        RecordConstructorArgs.__init__(self, observation_key=observation_key, mask_key=mask_key)
        _check_keys(observation_key, mask_key)
        if not isinstance(env, gym.Env):
            raise ServegymError(
                "MaskInObservation needs a single environment, as ServingEnv, "
                f"got {shown(env)}; for a ServingVectorEnv take VectorMaskInObservation"
            )
        actions = env.action_space
        if not (env.has_wrapper_attr("action_masks") and isinstance(actions, spaces.Discrete)):
            raise ServegymError(
                "MaskInObservation needs Discrete actions and action_masks(), as ServingEnv has, "
                f"got {shown(env)}"
            )
        super().__init__(env)
        self.observation_key, self.mask_key = observation_key, mask_key
        self._masks = env.get_wrapper_attr("action_masks")
        self.observation_space: Any = _masked_space(env.observation_space, actions, self._keys)

    @property
    def _keys(self) -> tuple[str, str]:
        return self.observation_key, self.mask_key

    def observation(self, observation: NDArray[np.float32]) -> Masked:
        """Return the observation and the mask of the decision it is of."""
        return _masked(self._keys, observation, self._masks())


# Without type arguments: VectorWrapper takes none before gymnasium 1.4.
class VectorMaskInObservation(VectorWrapper, RecordConstructorArgs):
    """:class:`MaskInObservation` of every row of a :class:`ServingVectorEnv`.

    Observations, infos and, in same-step mode, each dict in ``infos["final_obs"]`` are those of a
    ``SyncVectorEnv`` of wrapped single environments.

    Parameters
    ----------
    env
        A :class:`ServingVectorEnv`, which wrappers may stand around.
    observation_key, mask_key
        As in :class:`MaskInObservation`.

    Examples
    --------
    >>> env = VectorMaskInObservation(ServingVectorEnv(4, "Tiny-v0", autoreset_mode="NextStep"))
    >>> env.reset(seed=0)[0]["action_mask"].shape
    (4, 7)
    """

    def __init__(
        self,
        env: VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]],
        observation_key: str = "observation",
        mask_key: str = "action_mask",
    ) -> None:
        RecordConstructorArgs.__init__(self, observation_key=observation_key, mask_key=mask_key)
        _check_keys(observation_key, mask_key)
        rows: Any = getattr(env, "unwrapped", None)
        if not isinstance(rows, ServingVectorEnv):
            raise ServegymError(
                f"VectorMaskInObservation needs a ServingVectorEnv, got {shown(env)}; "
                "put MaskInObservation around each single environment"
            )
        super().__init__(env)
        self._rows = rows
        self.observation_key, self.mask_key = observation_key, mask_key
        single = _masked_space(
            env.single_observation_space, env.single_action_space, (observation_key, mask_key)
        )
        self.single_observation_space = single
        self.observation_space = batch_space(single, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Masked, dict[str, Any]]:
        """Reset as the environment does."""
        observations, infos = self.env.reset(
            seed=seed, options=None if options is None else dict(options)
        )
        return self._masked(observations, self._rows.action_masks()), infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Masked, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Step as the environment does."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos and self.autoreset_mode == AutoresetMode.SAME_STEP:
            final = infos["final_obs"]
            for e in np.flatnonzero(infos["_final_obs"]):
                final[e] = self._masked(final[e], self._rows.final_masks[e])
        masked = self._masked(observations, self._rows.action_masks())
        return masked, rewards, terminated, truncated, infos

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The environment's; TorchRL asks the outermost wrapper for it."""
        return self._rows.autoreset_mode

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which actions are legal now, shape (num_envs, actions)."""
        return self._rows.action_masks()

    def _masked(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> Masked:
        return _masked((self.observation_key, self.mask_key), observation, mask)


def _masked(
    keys: tuple[str, str], observation: NDArray[np.float32], mask: NDArray[np.bool_]
) -> Masked:
    return {keys[0]: observation, keys[1]: mask.astype(np.int8)}


def _masked_space(observation: Any, actions: Any, keys: tuple[str, str]) -> spaces.Dict:
    """Return the Dict space of an observation and a mask of Discrete actions."""
    return spaces.Dict({keys[0]: observation, keys[1]: spaces.MultiBinary(int(actions.n))})


def _check_keys(observation_key: Any, mask_key: Any) -> None:
    for name, key in (("observation_key", observation_key), ("mask_key", mask_key)):
        if not (isinstance(key, str) and key):
            raise ServegymError(f"{name} must be a text that is not empty, got {shown(key)}")
    if observation_key == mask_key:
        raise ServegymError(f"observation_key and mask_key must differ, both are {mask_key!r}")
