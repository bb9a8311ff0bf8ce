"""How an agent is trained: two frozen dataclasses, with defaults per task. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from servegym.envs.errors import ServegymError, unknown

ALGORITHMS: Final = ("maskable-ppo", "ppo")
"""sb3-contrib's PPO, which knows the legal actions, and stable-baselines3's, which does not."""

IMITATED: Final = ("rollout", "rule")
"""Values of ``imitate``."""

MAX_SEED: Final = 799
SEEDS_PER_AGENT: Final = 1000
"""Agent seed s trains on environment seeds 1000 · s …, all below those of validation (900,000 …)."""


@dataclass(frozen=True)
class Hyperparameters:
    """Everything that, with the task, determines the trained weights.

    Examples
    --------
    >>> Hyperparameters(timesteps=100_000).algorithm
    'maskable-ppo'
    """

    algorithm: str = "maskable-ppo"
    """maskable-ppo or ppo."""
    seed: int = 0
    """Agent seed, 0 … 799: first weights, sampled actions, and training episodes: row e of the
    environments begins with seed 1000 · seed + e and then follows its own generator."""
    timesteps: int = 2_000_000
    """Decisions to train on, over all environments; rounded up to whole rollouts."""
    environments: int = 64
    """Environments that step together, 1 … 1000. scripts/train.py takes fewer, in proportion, for fewer
    timesteps than the task's default."""
    steps: int = 256
    """Steps of each environment in one rollout."""
    batch_size: int = 4096
    """Decisions in one gradient step. scripts/train.py takes a quarter of a rollout."""
    epochs: int = 4
    """Passes over a rollout."""
    learning_rate: float = 1e-3
    """Adam's learning rate at the start."""
    final_learning_rate: float = 0.1
    """Share of the learning rate that a linear decay over the timesteps ends at."""
    gamma: float = 1.0
    """Discount; 1 makes the return exactly minus the gap in percent."""
    gae_lambda: float = 0.998
    """Weight of later rewards in generalized advantage estimation. What a prefill costs shows only
    many decisions later: 0.95 learns far worse."""
    reference: str = ""
    """A rule that plays each training episode, too; the return is then what was gained on it. That takes
    the luck of unknown lengths out of the returns. Empty: none."""
    clip_range: float = 0.2
    """PPO's clip range of the probability ratio."""
    entropy: float = 0.003
    """Coefficient of the entropy bonus at the start."""
    final_entropy: float = 0.0
    """Share of the entropy coefficient that a linear decay over the timesteps ends at."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    max_gradient_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    width: int = 128
    """Units of a hidden layer (tanh); actor and critic have separate networks."""
    depth: int = 2
    """Hidden layers."""
    imitation_rounds: int = 0
    """Rounds of imitation before PPO, 0: none. Round 1 plays the expert, later ones the learner."""
    imitate: str = "rollout"
    """Whom to imitate: a rollout, what finishing episodes with the expert says of each action, or the
    rule, that is the expert itself."""
    expert: str = "aligned"
    """Rule that is imitated, or that the imitated rollout finishes episodes with."""
    imitation_states: int = 30_000
    """States that the expert labels in one round."""
    imitation_environments: int = 32
    """Environments that the labelled states come from, 1 … 1000."""
    imitation_epochs: int = 10
    """Passes over all states labelled so far, after each round."""
    imitation_batch_size: int = 512
    """States in one gradient step of imitation."""
    imitation_learning_rate: float = 1e-3
    """Adam's learning rate in imitation; decays linearly to 0 in each round."""
    imitation_temperature: float = 0.02
    """The learner imitates softmax(value / temperature); percentage points of the gap."""
    imitation_random: float = 0.05
    """Share of random actions while states are collected, for diversity."""
    warm_learning_rate: float = 2e-4
    """The learning rate at PPO's start, in place of learning_rate, where it follows imitation."""
    warm_clip_range: float = 0.1
    """The clip range, in place of clip_range, where PPO follows imitation."""
    value_warmup: int = 4
    """First updates after imitation, which train the value network only: PPO must not spoil what was
    imitated because the values are still poor."""
    evolution_updates: int = 0
    """Updates of the actor's output layer by an evolution strategy, after PPO; 0: none."""
    evolution_pairs: int = 1000
    """Pairs of episodes in one update, each of two opposite perturbations on the same case."""
    evolution_directions: int = 6
    """Directions that are perturbed: those along which the policy changes most."""
    evolution_spread: float = 1.0
    """Standard deviation of a perturbation along each, in logits at undecided states."""
    evolution_learning_rate: float = 100.0
    """Logits per percentage point of the gap's slope; decays as the learning rate does."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise unknown("algorithm", self.algorithm, ALGORITHMS)
        for item in fields(self):
            if item.name in _BOUNDS:
                _check(item.name, getattr(self, item.name), type(item.default))
        if self.imitate not in IMITATED:
            raise unknown("value of imitate:", self.imitate, IMITATED)
        if self.batch_size > self.environments * self.steps:
            raise ServegymError(
                f"batch_size must be at most environments · steps = "
                f"{self.environments * self.steps}, got {self.batch_size}"
            )

    @property
    def rollout(self) -> int:
        """Decisions between two updates."""
        return self.environments * self.steps

    @property
    def warm(self) -> bool:
        """Whether PPO goes on from an imitated expert."""
        return self.imitation_rounds > 0

    @property
    def evolves(self) -> bool:
        """Whether an evolution strategy follows PPO."""
        return self.evolution_updates > 0

    @property
    def first_environment_seed(self) -> int:
        """The seed of the first row."""
        return SEEDS_PER_AGENT * self.seed


@dataclass(frozen=True)
class Options:
    """What does not change the trained weights, but where and how long the training runs."""

    checkpoint_every: int = 10
    """Rollouts between two checkpoints."""
    max_minutes: float = 0.0
    """Stop after a rollout once training (without callbacks and imitation) has taken so long,
    counted from this start or resume; 0: never. The learning rate still follows the timesteps."""
    threads: int = 1
    """Torch's threads; other numbers may change the last bits of the weights."""
    tensorboard: bool = True
    """Write stable-baselines3's own scalars to ``tensorboard/``."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ServegymError(f"checkpoint_every must be ≥ 1, got {self.checkpoint_every}")
        if not 0 <= self.max_minutes < 1e9:
            raise ServegymError(f"max_minutes must lie in 0 … 1e9, got {self.max_minutes}")
        if not 1 <= self.threads <= 1024:
            raise ServegymError(f"threads must lie in 1 … 1024, got {self.threads}")


_WHOLE: Final = 10**12
_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "seed": (0, MAX_SEED),
    "timesteps": (1, _WHOLE),
    "environments": (1, SEEDS_PER_AGENT),
    "steps": (1, 10**6),
    "batch_size": (2, _WHOLE),
    "epochs": (1, 1000),
    "learning_rate": (0, 1),
    "final_learning_rate": (0, 1),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "clip_range": (1e-6, 1),
    "entropy": (0, 100),
    "final_entropy": (0, 1),
    "value_coefficient": (0, 100),
    "max_gradient_norm": (1e-9, 1e9),
    "width": (1, 8192),
    "depth": (0, 16),
    "warm_learning_rate": (0, 1),
    "warm_clip_range": (1e-6, 1),
    "value_warmup": (0, _WHOLE),
    "evolution_updates": (0, 10**6),
    "evolution_pairs": (1, 10**6),
    "evolution_directions": (1, 1000),
    "evolution_spread": (1e-6, 1e3),
    "evolution_learning_rate": (0, 1e6),
    "imitation_rounds": (0, 1000),
    "imitation_states": (1, 10**8),
    "imitation_environments": (1, SEEDS_PER_AGENT),
    "imitation_epochs": (1, 1000),
    "imitation_batch_size": (1, 10**8),
    "imitation_learning_rate": (0, 1),
    "imitation_temperature": (1e-6, 1e6),
    "imitation_random": (0, 1),
}
"""Least and greatest valid value of each number."""


def _check(name: str, value: Any, kind: type) -> None:
    least, most = _BOUNDS[name]
    words = "a whole number" if kind is int else "a number"
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not least <= value <= most:
        raise ServegymError(f"{name} must be {words} in {least:g} … {most:g}, got {value!r}")


_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    # Eight requests on three clients: an episode is a handful of decisions.
    "servegym/Tiny-v0": {"timesteps": 100_000, "width": 64, "environments": 16, "batch_size": 1024},
    # The luck of a case spreads its gap ten times as far as what timing can gain: returns are measured
    # from the best rule, training begins as that rule, steps are few and of many decisions, and what PPO
    # cannot tell from luck is left to an evolution strategy.
    "servegym/GSM8KPredicted-v0": {
        "timesteps": 3_000_000,
        "reference": "threshold-12",
        "imitation_rounds": 1,
        "imitate": "rule",
        "expert": "threshold-12",
        "value_warmup": 4,
        "steps": 1024,
        "batch_size": 16_384,
        "gae_lambda": 0.95,
        "evolution_updates": 40,
    },
}
"""What a task wants otherwise than the class says, by task id."""


def linear_decay(first: float, last_share: float) -> Callable[[float], float]:
    """Return first · (share of training that remains, brought from 0 … 1 to last_share … 1)."""
    return lambda remaining: first * (last_share + (1.0 - last_share) * max(remaining, 0.0))


def default_hyperparameters(task: str, timesteps: int | None = None) -> Hyperparameters:
    """Return the defaults of a task by its full id; other names get those of the class.

    Parameters
    ----------
    timesteps
        Decisions to train on, if not as many as the task's default. Where they are fewer, so are the
        environments and the batch, in proportion: the weights are updated as often as in the default
        run. With all environments 300,000 decisions are 19 updates, too few to tell states apart;
        what is learned then is to decode mostly, and the most probable action is always to decode.

    Examples
    --------
    >>> default_hyperparameters("servegym/Tiny-v0").algorithm
    'maskable-ppo'
    """
    usual = replace(Hyperparameters(), **_DEFAULTS.get(task, {}))
    if timesteps is None:
        return usual
    environments = max(1, round(usual.environments * min(1.0, timesteps / usual.timesteps)))
    return replace(
        usual,
        timesteps=timesteps,
        environments=environments,
        batch_size=usual_batch_size(environments * usual.steps),
    )


def usual_batch_size(rollout: int) -> int:
    """Return how many decisions one gradient step has unless told otherwise: a quarter of a rollout."""
    return max(2, rollout // 4)
