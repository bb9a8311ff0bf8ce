"""``ServingVectorEnv`` as a Stable-Baselines3 vector environment: one compiled call steps all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from servegym.envs.errors import ServegymError, shown
from servegym.envs.process.metrics import METRICS
from servegym.envs.simulator.state import row_arrays
from servegym.envs.task.cases import Case
from servegym.envs.vector_env import ServingVectorEnv

Reference = Callable[[Case], float]
"""Returns the gap, a fraction, of the policy that returns are measured from."""

Infos = list[dict[str, Any]]
Indices = Iterable[int] | int | None


def _sizes(arrays: Mapping[str, NDArray[np.uint8]]) -> dict[str, int]:
    """Return the bytes of each array, without empty ones: another version may have others."""
    return {name: array.size for name, array in arrays.items() if array.size > 0}


class ServingSB3VecEnv(VecEnv):
    """The rows of a :class:`ServingVectorEnv`, as Stable-Baselines3 asks for them.

    What a row's ``info`` holds: ``replica``, the replica that its observation is of (also in
    ``reset_infos``); ``illegal_action`` where its action was replaced; of a row whose
    episode ended also ``terminal_observation``, ``TimeLimit.truncated`` and ``serving``, the
    episode's metrics (``servegym.envs.process.metrics.METRICS``). sb3-contrib finds the legal actions by
    ``env_method("action_masks")``.

    Parameters
    ----------
    env
        Begins the next episode in the step that ends one, as SB3 expects. With a reference its
        ``on_case`` is set.
    reference
        Returns some policy's gap on a case, a control variate: 100 · gap is added to the last reward
        of an episode, so that the return is what was gained on that policy. Which policy is best does
        not change, but the luck of a case, which both policies have, leaves the return.

    Raises
    ------
    ServegymError
        If ``env`` has another ``autoreset_mode``, or with a reference another reward than ``gap``.
    """

    def __init__(self, env: ServingVectorEnv, reference: Reference | None = None) -> None:
        if env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ServegymError(
                "Stable-Baselines3 needs autoreset_mode 'SameStep', got "
                f"{env.autoreset_mode.value!r}"
            )
        if not (reference is None or callable(reference)):
            raise ServegymError(f"reference must be a function of a case, got {shown(reference)}")
        if reference is not None and env.task.process.reward != "gap":
            raise ServegymError(
                f"a reference needs process.reward 'gap', got {env.task.process.reward!r}"
            )
        self.env = env
        self.reference = reference
        self.reference_gaps_percent = np.zeros(env.num_envs)  # on the cases that are being played
        if reference is not None:
            env.on_case = self._refer
        self._actions = np.zeros(env.num_envs, np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Begin a new episode in every row, from the seeds of :meth:`seed` where it was called."""
        if any(self._options):
            raise ServegymError("the vector environment takes no reset options")
        observations, infos = self.env.reset(seed=list(self._seeds))
        self._reset_seeds()
        self.reset_infos = [{"replica": replica} for replica in infos["replica"].tolist()]
        # A copy: the caller keeps it while the rows are stepped.
        return observations.copy()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Remember the actions; :meth:`step_wait` takes the step."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], Infos]:
        """Step every row; rows that end begin their next episode at once."""
        reference_gaps_percent = self.reference_gaps_percent.copy()  # before next cases begin
        observations, rewards, terminated, truncated, all_infos = self.env.step(self._actions)
        dones = terminated | truncated
        rewards = rewards.copy()  # SB3 adds to them
        # What would have followed on an episode that was cut short holds its reference's gap already.
        rewards[terminated] += reference_gaps_percent[terminated]
        infos: Infos = [{"replica": replica} for replica in all_infos["replica"].tolist()]
        for e in np.flatnonzero(self.env.rows.illegal):
            infos[e]["illegal_action"] = True
        for e in np.flatnonzero(dones):
            infos[e]["terminal_observation"] = all_infos["final_obs"][e]
            infos[e]["TimeLimit.truncated"] = bool(truncated[e] and not terminated[e])
            metrics = all_infos["final_info"]
            infos[e]["serving"] = {name: float(metrics[name][e]) for name in METRICS}
        # A copy: SB3 keeps the observations while the rows are stepped.
        return observations.copy(), rewards, dones, infos

    def _refer(self, e: int, case: Case) -> None:
        """Let the reference play the case that a row begins."""
        assert self.reference is not None
        self.reference_gaps_percent[e] = 100.0 * self.reference(case)

    def close(self) -> None:
        """Nothing to release."""

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment that returns an array over rows."""
        values = getattr(self.env, method_name)(*method_args, **method_kwargs)
        # A list of the rows, without a loop where all are asked for.
        return list(values) if indices is None else [values[e] for e in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute that all rows share, once per row."""
        value = getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Refuse: rows share everything but their episodes."""
        raise ServegymError(f"rows share their attributes, {attr_name!r} cannot be set")

    def env_is_wrapped(self, wrapper_class: type, indices: Indices = None) -> list[bool]:
        """Return False for every row: there are no single environments to wrap."""
        return [False for _ in self._get_indices(indices)]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Give row e the seed ``seed`` + e at the next reset; None leaves its generator as it is."""
        self._seeds = [None if seed is None else seed + e for e in range(self.num_envs)]
        return self._seeds

    def get_state(self) -> tuple[dict[str, NDArray[np.uint8]], list[Any]]:
        """Return all arrays of the rows as bytes, and the state of each row's generator (JSON)."""
        arrays = {name: array.copy() for name, array in self._arrays().items()}
        return arrays, [rng.bit_generator.state for rng in self.env.rngs]

    def set_state(self, arrays: Mapping[str, NDArray[np.uint8]], rngs: Sequence[Any]) -> None:
        """Put the rows where :meth:`get_state` found them; call :meth:`reset` before.

        Raises
        ------
        ServegymError
            If it is the state of other environments.
        """
        current = self._arrays()
        if _sizes(current) != _sizes(arrays) or len(rngs) != len(self.env.rngs):
            raise ServegymError("it holds the state of other environments")
        for name in _sizes(current):
            current[name][:] = arrays[name]
        for rng, state in zip(self.env.rngs, rngs, strict=True):
            rng.bit_generator.state = state

    def _arrays(self) -> dict[str, NDArray[np.uint8]]:
        """Return every array of the rows as the bytes it consists of, not copied."""
        named = row_arrays(self.env.state) | self.env.rows.by_name()
        if self.reference is not None:
            named["reference_gaps"] = self.reference_gaps_percent  # its name in all checkpoints
        if self.env.max_episode_steps:
            named["steps"] = self.env.steps
        return {name: np.asarray(array).reshape(-1).view(np.uint8) for name, array in named.items()}
