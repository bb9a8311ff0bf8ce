"""Training with PPO, from the first weights to the last, through kills and resumes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecMonitor

from servegym.agents.activation import Tanh
from servegym.agents.checkpoints import (
    Progress,
    Snapshot,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    take_snapshot,
)
from servegym.agents.clock import Clock, TimedCallbacks
from servegym.agents.evolution import Evolution
from servegym.agents.hyperparameters import Hyperparameters, Options, linear_decay
from servegym.agents.imitation import Expert, imitate
from servegym.agents.masked_policy import MaskedPolicy
from servegym.agents.progress import ProgressLine
from servegym.agents.record import begin_run, check_run, identity
from servegym.agents.sb3_vec_env import Reference, ServingSB3VecEnv
from servegym.envs.errors import ServegymError
from servegym.envs.playing.identity import HASH, check_unchanged
from servegym.envs.playing.locks import locked
from servegym.envs.task.cases import PlanCase
from servegym.envs.task.config import TaskConfig
from servegym.envs.vector_env import ServingVectorEnv

_CLASSES: Final[dict[str, Callable[..., OnPolicyAlgorithm]]] = {
    "maskable-ppo": MaskablePPO,
    "ppo": PPO,
}
_POLICIES: Final[dict[str, Any]] = {"maskable-ppo": MaskedPolicy, "ppo": "MlpPolicy"}


def make_model(
    task: TaskConfig,
    hyperparameters: Hyperparameters,
    reference: Reference | None = None,
    plan_case: PlanCase | None = None,
) -> OnPolicyAlgorithm:
    """Build an untrained agent with its environments."""
    h = hyperparameters
    if bool(h.plan) != (plan_case is not None):
        raise ServegymError(f"plan {h.plan!r} needs the function that plans, or neither")
    if bool(h.reference) != (reference is not None):
        raise ServegymError(
            f"reference {h.reference!r} needs the function that plays it, or neither"
        )
    rows = ServingVectorEnv(h.environments, task, copy=False)
    rows.plan_case = plan_case
    environment = ServingSB3VecEnv(rows, reference)
    # Checking every distribution that is built costs a tenth of the time.
    torch.distributions.Distribution.set_default_validate_args(False)
    layers = [h.width] * h.depth
    model = _CLASSES[h.algorithm](
        policy=_POLICIES[h.algorithm],
        env=VecMonitor(environment),
        learning_rate=linear_decay(
            h.warm_learning_rate if h.warm else h.learning_rate, h.final_learning_rate
        ),
        n_steps=h.steps,
        batch_size=h.batch_size,
        n_epochs=h.epochs,
        gamma=h.gamma,
        gae_lambda=h.gae_lambda,
        clip_range=h.warm_clip_range if h.warm else h.clip_range,
        ent_coef=h.entropy,
        vf_coef=h.value_coefficient,
        max_grad_norm=h.max_gradient_norm,
        policy_kwargs={
            "net_arch": {"pi": layers, "vf": layers},
            "activation_fn": Tanh,
        },
        seed=h.seed,
        device="cpu",
    )
    # Without this logger, SB3 leaves an empty folder a run in the system's temporary folder.
    model.set_logger(Logger(folder=None, output_formats=[]))
    environment.seed(h.first_environment_seed)
    return model


def train(
    task: TaskConfig,
    hyperparameters: Hyperparameters,
    folder: Path,
    *,
    callbacks: Sequence[BaseCallback] = (),
    expert: Expert | None = None,
    reference: Reference | None = None,
    plan_case: PlanCase | None = None,
    resume: bool = False,
    command: str = "",
    options: Options | None = None,
    checked: bool = False,
) -> OnPolicyAlgorithm:
    """Train an agent; return it with its last weights.

    Parameters
    ----------
    folder
        Where ``run.json``, ``checkpoints/`` and ``tensorboard/`` are written.
    callbacks
        Called as by ``model.learn``; they must not draw from the global generators. One that returns
        False ends training as it ends ``model.learn``: the rollout under way teaches nothing, an
        evolution does not follow, and ``on_training_end`` is called. The checkpoint is of the
        rollout's beginning; a resume goes on from there. A
        :class:`~servegym.agents.callbacks.ServingCallback` evaluates the agent, and its
        ``on_evaluation`` is the hook for pruning and early stopping.
    expert
        Is imitated first, where ``imitation_rounds`` is not 0.
    reference
        Plays ``hyperparameters.reference``, where that is not empty.
    plan_case
        Plans each episode as ``hyperparameters.plan`` does, where that is not empty.
    resume
        Go on from the last checkpoint in ``folder``: the weights in the end are those of the run
        that was never stopped, bit for bit. A run that was stopped before its first checkpoint
        (during imitation) begins anew.
    command
        What to note in ``run.json``.
    checked
        Whether :func:`check_run` has found the folder fit since the caller locked it.

    Raises
    ------
    ServegymError
        If the folder does not fit (see :func:`check_run`) or another process trains in it, a checkpoint
        is damaged or another run's, no episode of the task offers a choice, the task's workload file
        changes meanwhile, weights become infinite, or a file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from dataclasses import replace
    >>> from servegym.agents import default_hyperparameters
    >>> from servegym.envs import TASKS
    >>> short = replace(default_hyperparameters("servegym/Tiny-v0"), timesteps=256)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(TASKS["servegym/Tiny-v0"], short, Path(folder)).num_timesteps >= 256
    True
    """
    with locked(folder):
        if not checked:
            check_run(task, hyperparameters, folder, resume)
        return _train(
            task,
            hyperparameters,
            folder,
            callbacks,
            expert,
            reference,
            plan_case,
            resume,
            command,
            options or Options(),
        )


def _train(
    task: TaskConfig,
    hyperparameters: Hyperparameters,
    folder: Path,
    callbacks: Sequence[BaseCallback],
    expert: Expert | None,
    reference: Reference | None,
    plan_case: PlanCase | None,
    resume: bool,
    command: str,
    options: Options,
) -> OnPolicyAlgorithm:
    torch.set_num_threads(options.threads)
    model = make_model(task, hyperparameters, reference, plan_case)
    _refuse_without_choice(model, task, hyperparameters)
    begin_run(task, hyperparameters, folder, command, resume)
    known = identity(task, hyperparameters)
    run = _Run(model, hyperparameters, known, task, folder, options, plan_case)
    saved = checkpoints(run.checkpoint_folder)
    earlier = Progress()
    if saved:
        earlier = load_checkpoint(model, run.identity, saved[-1])
    elif hyperparameters.warm:
        if expert is None:
            raise ServegymError("imitation_rounds is not 0, but there is no expert to imitate")
        started = perf_counter()
        progress = options.progress
        imitate(model, task, expert, hyperparameters, plan_case=plan_case, progress=progress)
        earlier = Progress(training_s=perf_counter() - started)
    if options.tensorboard:
        model.set_logger(configure(str(folder / "tensorboard"), ["tensorboard"]))
    with _write_errors_as_one_line(folder):
        run.learn(CallbackList(list(callbacks)), anew=not saved, earlier=earlier)
    return model


@contextmanager
def _write_errors_as_one_line(folder: Path) -> Iterator[None]:
    """Raise ServegymError where TensorBoard cannot write; write_file does so itself.

    TensorBoard writes in separate threads, and the next flush raises their errors again: a traceback
    of the thread is not needed.
    """
    usual = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not issubclass(error.exc_type, OSError):
            usual(error)

    threading.excepthook = hook
    try:
        yield
    except OSError as error:
        raise ServegymError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; "
            "go on by --resume once it can"
        ) from None
    finally:
        threading.excepthook = usual


@dataclass
class _Run:
    model: OnPolicyAlgorithm
    hyperparameters: Hyperparameters
    identity: dict[str, Any]
    task: TaskConfig
    folder: Path
    options: Options
    plan_case: PlanCase | None

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    def learn(self, callbacks: CallbackList, *, anew: bool, earlier: Progress) -> None:
        """Do PPO, as ``model.learn`` does, with checkpoints in between; then let the actor evolve."""
        model, h = self.model, self.hyperparameters
        timed = TimedCallbacks(callbacks)
        left = h.timesteps if anew else h.timesteps - model.num_timesteps
        total, callback = model._setup_learn(left, timed, anew, h.algorithm, False)
        if anew:
            self._save(earlier)
        callback.on_training_start(
            {"self": model, "total_timesteps": total, "training_s": earlier.training_s}, {}
        )
        clock = Clock(timed, earlier.training_s, 60 * self.options.max_minutes)
        if self._learn_by_ppo(callback, total, clock):
            self._evolve(callback, earlier.evolved, clock)
        callback.on_training_end()

    def _learn_by_ppo(self, callback: BaseCallback, total: int, clock: Clock) -> bool:
        """Alternate rollouts and updates; return whether nothing has stopped it."""
        model, h = self.model, self.hyperparameters
        with ProgressLine(
            -(-total // h.rollout) * h.rollout,
            model.num_timesteps,
            "timesteps",
            clock.callbacks.status,
            shown=self.options.progress and model.num_timesteps < total,
        ) as line:
            while model.num_timesteps < total:
                before = take_snapshot(model)
                if not self._learn_from_one_rollout(callback, total):
                    self._save(Progress(clock.training_s), before)
                    return False
                status = clock.callbacks.status
                line.update(h.rollout, status, "" if status else _recent_return(model))
                rollouts = model.num_timesteps // h.rollout
                late = clock.late
                done = late or model.num_timesteps >= total
                if done or rollouts % self.options.checkpoint_every == 0:
                    self._save(Progress(clock.training_s))
                if late:
                    return False
        return True

    def _evolve(self, callback: BaseCallback, evolved: int, clock: Clock) -> None:
        """Do the updates of the evolution strategy that are left, each with a checkpoint."""
        model, h = self.model, self.hyperparameters
        if evolved == h.evolution_updates:
            return
        evolution = Evolution(model, self.task, h, self.options.threads, self.plan_case)
        callbacks = clock.callbacks
        with ProgressLine(
            h.evolution_updates,
            evolved,
            "updates of evolution",
            callbacks.status,
            shown=self.options.progress,
        ) as line:
            for number in range(evolved, h.evolution_updates):
                callback.on_rollout_start()
                if callbacks.stopped:
                    break
                update = evolution.update(number)
                model.num_timesteps += update.decisions
                model.logger.record("train/evolution_gap", update.gap_percent)
                model.logger.record("train/evolution_step", update.step)
                model.logger.dump(model.num_timesteps)
                # No environment was stepped, but callbacks learn the time by it.
                callback.update_locals({"dones": np.zeros(0, np.bool_), "infos": []})
                goes_on = callback.on_step()
                line.update(1, callbacks.status, f"in training {update.gap_percent:.3f} %")
                late = clock.late
                self._refuse_infinite()
                self._save(Progress(clock.training_s, number + 1))
                if late or not goes_on:
                    break

    def _learn_from_one_rollout(self, callback: BaseCallback, total: int) -> bool:
        """Collect a rollout and learn from it; return False if a callback has stopped it."""
        model, h = self.model, self.hyperparameters
        environments = model.get_env()
        assert environments is not None
        if not model.collect_rollouts(environments, callback, model.rollout_buffer, h.steps):
            return False
        model._update_current_progress_remaining(model.num_timesteps, total)
        remaining = model._current_progress_remaining
        model.ent_coef = linear_decay(h.entropy, h.final_entropy)(remaining)
        rollouts = model.num_timesteps // h.rollout
        _freeze_actor(model, h.warm and rollouts <= h.value_warmup)
        model.dump_logs(rollouts)
        model.train()
        self._refuse_infinite()
        return True

    def _refuse_infinite(self) -> None:
        model, h = self.model, self.hyperparameters
        if not all(bool(weights.isfinite().all()) for weights in model.policy.parameters()):
            rate = "warm_learning_rate" if h.warm else "learning_rate"
            raise ServegymError(
                f"weights are no longer finite after {model.num_timesteps:,} timesteps; begin a run "
                f"in another folder with a {rate} below {getattr(h, rate):g}"
            )

    def _save(self, progress: Progress, snapshot: Snapshot | None = None) -> None:
        known = {HASH: self.identity[HASH]} if HASH in self.identity else {}
        check_unchanged(self.task, known)
        save_checkpoint(self.model, self.identity, self.checkpoint_folder, progress, snapshot)


def _refuse_without_choice(
    model: OnPolicyAlgorithm, task: TaskConfig, hyperparameters: Hyperparameters
) -> None:
    """Refuse a task whose first episodes offer one action at a time: there is nothing to learn."""
    environments = model.get_env()
    assert environments is not None
    environments.reset()
    masks = np.stack(environments.env_method("action_masks"))
    environments.seed(hyperparameters.first_environment_seed)  # training begins with these episodes
    if not (masks.sum(axis=1) > 1).any():
        raise ServegymError(
            f"{task.name}: its episodes offer no choice, there is nothing to learn; offer several "
            "process.rules or more requests than clients"
        )


def _freeze_actor(model: OnPolicyAlgorithm, frozen: bool) -> None:
    """Leave the actor out of gradient steps, or not; actor and critic share no weights."""
    for part in (model.policy.mlp_extractor.policy_net, model.policy.action_net):
        part.requires_grad_(not frozen)


def _recent_return(model: OnPolicyAlgorithm) -> str:
    episodes = model.ep_info_buffer
    return f"return {np.mean([item['r'] for item in episodes]):z.3f}" if episodes else ""
