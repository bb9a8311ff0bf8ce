"""How an agent is trained: two frozen dataclasses, with defaults per task. Imports no torch."""

from __future__ import annotations

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
"""Agent seed s trains on environment seeds 1000 · s … 1000 · s + 999; validation's begin at 900,000."""


@dataclass(frozen=True)
class Hyperparameters:
    """What determines the trained weights, together with the task.

    Examples
    --------
    >>> Hyperparameters(timesteps=100_000).algorithm
    'maskable-ppo'
    """

    algorithm: str = "maskable-ppo"
    """maskable-ppo or ppo."""
    seed: int = 0
    """Agent seed, 0 … 799, of first weights, sampled actions and training episodes. Row e of the
    environments begins with seed 1000 · seed + e; its generator draws the later episodes."""
    timesteps: int = 2_000_000
    """Decisions to train on, over all environments; rounded up to whole rollouts."""
    environments: int = 64
    """Environments that step together, 1 … 1000. With fewer timesteps than the task's default,
    the command ``train`` takes proportionally fewer."""
    steps: int = 256
    """Steps of each environment in one rollout."""
    batch_size: int = 4096
    """Decisions in one gradient step. The command ``train`` takes a quarter of a rollout."""
    epochs: int = 4
    """Passes over a rollout."""
    learning_rate: float = 1e-3
    """Adam's learning rate at the start."""
    final_learning_rate: float = 0.1
    """The learning rate decays linearly over the timesteps to this share of its start."""
    gamma: float = 1.0
    """Discount; 1 makes the return exactly minus the gap in percent."""
    gae_lambda: float = 0.998
    """Weight of later rewards in generalized advantage estimation. The cost of a prefill shows only
    many decisions later, so 0.95 learns far worse."""
    reference: str = ""
    """A rule that also plays each training episode. Its gap is added to the return, which cancels much
    of the chance of unknown lengths. Empty: none."""
    plan: str = ""
    """The policy whose offline plans the rules plan and steal follow, as offline; it plans each episode
    of training and of play. Empty: the greedy longest-first plan."""
    clip_range: float = 0.2
    """PPO's clip range of the probability ratio."""
    entropy: float = 0.003
    """Coefficient of the entropy bonus at the start."""
    final_entropy: float = 0.0
    """The entropy coefficient decays linearly over the timesteps to this share of its start."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    max_gradient_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    width: int = 128
    """Units of a hidden layer (tanh); actor and critic have separate networks."""
    depth: int = 2
    """Hidden layers."""
    imitation_rounds: int = 0
    """Rounds of imitation before PPO; 0: none. Round 1 plays the expert, later rounds the learner."""
    imitate: str = "rollout"
    """What is imitated. rollout: each action is valued by an episode that the expert finishes; rule: the
    expert's own actions."""
    expert: str = "aligned"
    """The rule that is imitated, or that finishes the rollout's episodes."""
    imitation_samples: int = 0
    """Where lengths are not known: sampled futures that an imitated rollout values each action by; 0: one
    future, of expected lengths."""
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
    """The learner imitates softmax(value / temperature); in percentage points of the gap."""
    imitation_random: float = 0.05
    """Share of random actions while states are collected, for diversity."""
    warm_learning_rate: float = 2e-4
    """PPO's first learning rate after imitation, in place of learning_rate."""
    warm_clip_range: float = 0.1
    """PPO's clip range after imitation, in place of clip_range."""
    value_warmup: int = 4
    """First updates after imitation, which train the value network only: while its values are poor, PPO
    would spoil what was imitated."""
    evolution_updates: int = 0
    """Updates of the actor's output layer by an evolution strategy, after PPO; 0: none."""
    evolution_pairs: int = 1000
    """Pairs of episodes in one update: two opposite perturbations play the same case."""
    evolution_directions: int = 6
    """Directions that are perturbed: those along which the policy changes most."""
    evolution_spread: float = 1.0
    """Standard deviation of a perturbation along each direction, in logits at undecided states."""
    evolution_learning_rate: float = 100.0
    """Step in logits per percentage point of the gap's slope; decays as the learning rate does."""

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
    """How long and with what output training runs. Only ``threads`` may change a finished run's weights."""

    checkpoint_every: int = 10
    """Rollouts between two checkpoints."""
    max_minutes: float = 0.0
    """Minutes of training, without callbacks and imitation, since this start or resume, after which the
    rollout under way is the last; 0: no limit. The learning rate still follows the timesteps."""
    threads: int = 1
    """Threads of evolution's episodes and of torch, where another number may change the last bits."""
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
    "imitation_samples": (0, 10_000),
    "imitation_states": (1, 10**8),
    "imitation_environments": (1, SEEDS_PER_AGENT),
    "imitation_epochs": (1, 1000),
    "imitation_batch_size": (1, 10**8),
    "imitation_learning_rate": (0, 1),
    "imitation_temperature": (1e-6, 1e6),
    "imitation_random": (0, 1),
}
"""Least and greatest valid value of each number."""


def check_value(name: str, value: Any) -> None:
    """Refuse a value of a hyper-parameter that could never be one, whatever the others are."""
    kind = next(type(item.default) for item in fields(Hyperparameters) if item.name == name)
    if kind is str:
        if not isinstance(value, str):
            raise ServegymError(f"{name} must be a text, got {value!r}")
        known = {"algorithm": ALGORITHMS, "imitate": IMITATED}.get(name)
        if known is not None and value not in known:
            raise unknown(f"value of {name}:", value, known)
    else:
        _check(name, value, kind)


def _check(name: str, value: Any, kind: type) -> None:
    least, most = _BOUNDS[name]
    words = "a whole number" if kind is int else "a number"
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits or not least <= value <= most:  # no NaN, nothing infinite
        raise ServegymError(f"{name} must be {words} in {least:g} … {most:g}, got {value!r}")


_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    # Eight requests on three clients: an episode has few decisions.
    "servegym/Tiny-v0": {"timesteps": 100_000, "width": 64, "environments": 16, "batch_size": 1024},
    # An optimal plan is worth more than all that agents find in its place. So they follow it, and training
    # begins as the rule that does nothing else.
    "servegym/Paper-v0": {
        "timesteps": 50_000,
        "environments": 16,
        "batch_size": 1024,
        "plan": "offline",
        "reference": "offline",
        "imitation_rounds": 1,
        "imitate": "rule",
        "imitation_states": 10_000,
        "expert": "offline",
    },
    # Chance spreads the gaps of cases ten times as far as timing can gain. So returns are measured from
    # the best rule, training begins as that rule, updates are few and of many decisions each, and an
    # evolution strategy learns what PPO cannot tell from chance.
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
"""Where a task's defaults differ from those of the class, by task id."""


def linear_decay(first: float, last_share: float) -> Callable[[float], float]:
    """Return a linear function of the remaining share of training: first at 1, first · last_share at 0."""
    return lambda remaining: first * (last_share + (1.0 - last_share) * max(remaining, 0.0))


def default_hyperparameters(task: str, timesteps: int | None = None) -> Hyperparameters:
    """Return the defaults of a task, named by its full id; any other name has those of the class.

    Parameters
    ----------
    timesteps
        Decisions to train on; None: the task's default. With fewer, environments and batch shrink in
        proportion, so that the weights are updated as often as in the default run. With all
        environments, 300,000 decisions are 19 updates, too few to tell states apart: the most
        probable action is then always to decode.

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
    """Return the usual number of decisions in one gradient step: a quarter of a rollout."""
    return max(2, rollout // 4)
