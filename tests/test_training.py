"""Training: the SB3 environment, checkpoints that resume bit by bit, imitation, the command line."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from _cli import run as run_script
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecMonitor

from scripts import train as script
from servegym.agents import record, training
from servegym.agents.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from servegym.agents.hyperparameters import Hyperparameters, Options, default_hyperparameters
from servegym.agents.imitation import collect, imitate, soft_targets, spread_over_episodes
from servegym.agents.record import identity
from servegym.agents.sb3_vec_env import ServingSB3VecEnv
from servegym.agents.training import make_model, train
from servegym.envs import ServegymError, ServingEnv
from servegym.envs.cases import Case
from servegym.envs.config import with_overrides
from servegym.envs.metrics import METRICS
from servegym.envs.tasks import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import changed, weights

ROOT = Path(__file__).resolve().parent.parent
TINY = TASKS["servegym/Tiny-v0"]
SMALL = Hyperparameters(
    environments=4, steps=16, batch_size=32, epochs=2, width=8, timesteps=6 * 64, seed=3
)
QUIET = Options(checkpoint_every=2, tensorboard=False, progress=False)


def prefer_prefill(env: ServingVectorEnv) -> NDArray[np.float64]:
    """An expert that likes the last legal action best; what it says costs nothing to compute."""
    masks = env.action_masks()
    return np.where(masks, np.arange(masks.shape[1]) - 10.0, -np.inf)


def some_reference(case: Case) -> float:
    """A reference that is another for each case."""
    return float(case.requests.output_tokens.sum() % 17)


def test_a_reference_is_named_and_given_or_neither() -> None:
    with pytest.raises(ServegymError, match="or neither"):
        make_model(TINY, replace(SMALL, reference="fcfs"))
    with pytest.raises(ServegymError, match="or neither"):
        make_model(TINY, SMALL, some_reference)
    make_model(TINY, replace(SMALL, reference="fcfs"), some_reference)


class StopAt(BaseCallback):
    """Interrupts training in the middle of a rollout, as Ctrl-C does."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.timesteps:
            raise KeyboardInterrupt
        return True


# The environment


def test_rows_are_those_of_the_vector_environment() -> None:
    task = changed(TINY, process={"max_decisions": 3})
    env = VecMonitor(ServingSB3VecEnv(ServingVectorEnv(3, task, copy=False)))
    plain = ServingVectorEnv(3, task)
    rng = np.random.default_rng(0)
    env.seed(5)
    first, _ = plain.reset(seed=5)
    before = np.asarray(env.reset())
    assert before.tobytes() == first.tobytes()
    kept, seen = before.copy(), set()
    for _ in range(60):
        actions = rng.integers(0, 7, 3)
        stepped, rewards, dones, infos = env.step(actions)
        observations = np.asarray(stepped)
        wanted, wanted_rewards, terminated, truncated, wanted_infos = plain.step(actions)
        assert observations.tobytes() == wanted.tobytes()
        assert rewards.tobytes() == wanted_rewards.tobytes()
        assert np.array_equal(dones, terminated | truncated)
        assert np.array_equal(np.stack(env.env_method("action_masks")), plain.action_masks())
        for e, info in enumerate(infos):
            assert info.get("illegal_action", False) == wanted_infos["illegal_action"][e]
            assert ("terminal_observation" in info) == dones[e]
            if dones[e]:
                seen.add(info["TimeLimit.truncated"])
                assert info["TimeLimit.truncated"] == truncated[e]
                assert (
                    info["terminal_observation"].tobytes() == wanted_infos["final_obs"][e].tobytes()
                )
                assert tuple(info["serving"]) == METRICS
                gap = wanted_infos["final_info"]["gap"][e]
                assert info["serving"]["gap"] == gap or (truncated[e] and np.isnan(gap))
                assert info["episode"]["l"] == info["serving"]["decisions"]
        rewards += 1.0  # as SB3 does where an episode is truncated
    assert seen == {False, True}
    assert before.tobytes() == kept.tobytes()  # not overwritten by later steps


def test_sb3_contrib_finds_the_masks() -> None:
    env = VecMonitor(ServingSB3VecEnv(ServingVectorEnv(2, TINY)))
    env.reset()
    assert is_masking_supported(env)
    assert get_action_masks(env).shape == (2, 7)
    assert env.env_method("action_masks", indices=1)[0].shape == (7,)
    assert not env.has_attr("no such thing")
    assert env.get_attr("num_envs", [0]) == [2]
    with pytest.raises(ServegymError, match="cannot be set"):
        env.set_attr("num_envs", 3)
    env.set_options({"plan": None})
    with pytest.raises(ServegymError, match="no reset options"):
        env.reset()


# Hyper-parameters


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"algorithm": "maskable_ppo"}, {"algorithm": "ppo"}),
        ({"seed": 800}, {"seed": 799}),  # its environments would be validation's
        ({"environments": 1001, "steps": 10}, {"environments": 1000, "steps": 10}),
        ({"batch_size": 64 * 256 + 1}, {"batch_size": 64 * 256}),  # more than a rollout
        ({"batch_size": 4096.0}, {"batch_size": 4096}),
        ({"learning_rate": float("nan")}, {"learning_rate": 0.0}),
        ({"gamma": 1.1}, {"gamma": 1}),
        ({"epochs": True}, {"epochs": 1}),
        ({"imitation_temperature": 0.0}, {"imitation_temperature": 1e-6}),
        ({"depth": -1}, {"depth": 0}),
        ({"evolution_updates": -1}, {"evolution_updates": 0}),
        ({"evolution_pairs": 0}, {"evolution_pairs": 1}),
        ({"evolution_directions": 0}, {"evolution_directions": 1}),
        ({"evolution_spread": 0.0}, {"evolution_spread": 1e-6}),
        ({"evolution_learning_rate": -1.0}, {"evolution_learning_rate": 0.0}),
    ],
)
def test_hyperparameters_cannot_be_wrong(bad: dict[str, Any], good: dict[str, Any]) -> None:
    with pytest.raises(ServegymError, match=next(iter(bad))):
        Hyperparameters(**bad)
    Hyperparameters(**good)


def test_defaults_by_task() -> None:
    assert default_hyperparameters("my.toml") == Hyperparameters()
    for name in TASKS:
        default_hyperparameters(name)


# Training and resuming


def test_training_begins_with_the_seeds_of_the_agent() -> None:
    model = make_model(TINY, SMALL)
    env = model.get_env()
    assert env is not None
    for e, row in enumerate(np.asarray(env.reset())):
        assert row.tobytes() == ServingEnv(TINY).reset(seed=3000 + e)[0].tobytes()


@pytest.mark.parametrize("algorithm", ["ppo", "maskable-ppo"])
def test_resumed_training_ends_in_the_same_weights(algorithm: str, tmp_path: Path) -> None:
    """Stopped after an imitated start, inside the value warm-up, then once more, later."""
    h = replace(
        SMALL,
        algorithm=algorithm,
        value_warmup=3,
        imitation_rounds=2,
        imitation_states=40,
        imitation_environments=4,
        imitation_batch_size=16,
        imitation_epochs=2,
    )
    h = replace(h, reference="made up")
    task = changed(TINY, process={"max_decisions": 4})  # truncation bootstraps from the critic
    whole = train(
        *(task, h, tmp_path / "whole"),
        expert=prefer_prefill,
        reference=some_reference,
        options=QUIET,
    )
    folder = tmp_path / "stopped"
    for stop in (2 * 64 + 20, 5 * 64 + 60):
        with pytest.raises(KeyboardInterrupt):
            train(
                task,
                h,
                folder,
                callbacks=[StopAt(stop)],
                expert=prefer_prefill,
                reference=some_reference,
                resume=folder.exists(),
                options=QUIET,
            )
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002 (whatever else draws from the global generators)
    assert len(checkpoints(folder / "checkpoints")) == 2
    # No expert: a finished imitation stands in the checkpoint.
    resumed = train(task, h, folder, reference=some_reference, resume=True, options=QUIET)
    assert resumed.num_timesteps == whole.num_timesteps == 6 * 64
    assert weights(resumed) == weights(whole)
    ends = [load_file(checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "whole", folder)]
    assert ends[0].keys() == ends[1].keys()
    for name, array in ends[0].items():
        assert array.tobytes() == ends[1][name].tobytes(), name


def test_resume_before_the_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    h = replace(SMALL, imitation_rounds=1, imitation_states=8, imitation_environments=4)

    def killed(_: ServingVectorEnv) -> NDArray[np.float64]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, h, tmp_path / "run", expert=killed, options=QUIET)
    resumed = train(TINY, h, tmp_path / "run", expert=prefer_prefill, resume=True, options=QUIET)
    whole = train(TINY, h, tmp_path / "whole", expert=prefer_prefill, options=QUIET)
    assert weights(resumed) == weights(whole)


def test_a_time_limit_stops_after_a_rollout_and_can_be_gone_on_from(tmp_path: Path) -> None:
    soon = replace(QUIET, max_minutes=1e-9)
    assert train(TINY, SMALL, tmp_path / "run", options=soon).num_timesteps == 64
    resumed = train(TINY, SMALL, tmp_path / "run", resume=True, options=QUIET)
    assert weights(resumed) == weights(train(TINY, SMALL, tmp_path / "whole", options=QUIET))


def test_callbacks_are_not_training_time(tmp_path: Path) -> None:
    class Slow(BaseCallback):
        def _on_step(self) -> bool:
            time.sleep(0.02)
            return True

    options = replace(QUIET, max_minutes=0.4 / 60)  # the callback alone takes 0.64 s
    h = replace(SMALL, timesteps=128)
    assert (
        train(TINY, h, tmp_path / "run", callbacks=[Slow()], options=options).num_timesteps == 128
    )


def test_schedules_end_where_they_should(tmp_path: Path) -> None:
    h = replace(SMALL, learning_rate=0.01, final_learning_rate=0.2, entropy=0.1, final_entropy=0.5)
    model = train(TINY, h, tmp_path / "run", options=QUIET)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.002)
    assert model.ent_coef == pytest.approx(0.05)


def test_value_warmup_leaves_the_actor_alone(tmp_path: Path) -> None:
    h = replace(SMALL, timesteps=128, imitation_rounds=1, imitation_states=4, value_warmup=2)
    imitated = make_model(TINY, h)
    imitate(imitated, TINY, prefer_prefill, h)
    first = weights(imitated)
    last = weights(train(TINY, h, tmp_path, expert=prefer_prefill, options=QUIET))
    changed_parts = {name.rpartition(".")[0] for name in first if first[name] != last[name]}
    assert changed_parts == {"mlp_extractor.value_net.0", "mlp_extractor.value_net.2", "value_net"}


def test_a_warm_start_is_followed_by_smaller_steps() -> None:
    h = replace(
        SMALL, learning_rate=0.1, clip_range=0.3, warm_learning_rate=0.2, warm_clip_range=0.4
    )
    for rounds, rate, clip in ((0, 0.1, 0.3), (1, 0.2, 0.4)):
        model = make_model(TINY, replace(h, imitation_rounds=rounds))
        assert model.lr_schedule(1.0) == pytest.approx(rate)
        assert model.__dict__["clip_range"](1.0) == pytest.approx(clip)


# Checkpoints and folders that do not fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short finished run of SMALL."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(TINY, replace(SMALL, timesteps=64), folder, options=QUIET)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder: Path, task: Any = TINY, **other: Any) -> OnPolicyAlgorithm:
    h = replace(SMALL, **{"timesteps": 64, **other})
    return train(task, h, folder, resume=True, options=QUIET)


def test_a_finished_run_is_resumed_without_another_step(run: Path) -> None:
    unfinished = run / "checkpoints" / ".000000000064.safetensors.1.tmp"
    unfinished.touch()
    assert resume(run).num_timesteps == 64
    assert not unfinished.exists()


def test_runs_of_others_are_not_resumed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServegymError, match=r"a run with name 'servegym/Tiny-v0', this one has"):
        resume(run, task=TASKS["servegym/Paper-v0"])
    with pytest.raises(ServegymError, match=r"a run with learning_rate 0\.001, this one has 0\.5"):
        resume(run, learning_rate=0.5)
    monkeypatch.setattr(record, "OBSERVATION_VERSION", 0)
    with pytest.raises(ServegymError, match="observation_version"):
        resume(run)


def test_a_run_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="--resume"):
        train(TINY, SMALL, run, options=QUIET)
    (run / "run.json").unlink()
    with pytest.raises(ServegymError, match="not empty"):
        train(TINY, SMALL, run, options=QUIET)
    with pytest.raises(ServegymError, match="holds no run"):
        train(TINY, SMALL, tmp_path / "none", resume=True, options=QUIET)
    (run / "run.json").write_text("[]")
    with pytest.raises(ServegymError, match="not the record"):
        resume(run)


def test_damaged_checkpoints_are_refused(run: Path) -> None:
    path = checkpoints(run / "checkpoints")[-1]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b""):
        path.write_bytes(damaged)
        with pytest.raises(ServegymError, match="damaged") as caught:
            resume(run)
        assert "\n" not in str(caught.value)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ServegymError, match="not a servegym checkpoint"):
        resume(run)
    path.unlink()
    assert resume(run).num_timesteps == 64  # from the one before


def test_a_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    for h, words in ((replace(SMALL, timesteps=64, width=9), "width 9"), (SMALL, "timesteps 384")):
        model = make_model(TINY, h)
        model._setup_learn(1)
        path = save_checkpoint(model, identity(TINY, h), tmp_path / words)
        target = checkpoints(run / "checkpoints")[-1]
        target.write_bytes(path.read_bytes())
        with pytest.raises(ServegymError, match=words):
            resume(run)


def test_a_checkpoint_that_lies_about_its_run_is_refused(tmp_path: Path) -> None:
    """The names agree, the arrays do not fit: one line all the same."""
    own = identity(TINY, SMALL)
    for other in (replace(SMALL, width=9), replace(SMALL, environments=2)):
        model = make_model(TINY, other)
        model._setup_learn(1)
        path = save_checkpoint(model, own, tmp_path)
        with pytest.raises(ServegymError, match=r"damaged|other environments") as caught:
            load_checkpoint(make_model(TINY, SMALL), own, path)
        assert "\n" not in str(caught.value)


# Imitation


def test_soft_targets() -> None:
    values = np.array([[0.0, np.log(3.0), -np.inf], [-np.inf, -5.0, -np.inf]])
    assert soft_targets(values, 1.0) == pytest.approx(np.array([[0.25, 0.75, 0], [0, 1, 0]]))
    assert soft_targets(values, 0.5)[0] == pytest.approx(np.array([0.1, 0.9, 0]))


def test_labels_hold_the_reward_from_here_on() -> None:
    """An expert that knows the gap at the end: value targets are the true returns to go."""
    env = ServingVectorEnv(1, TINY)

    def act(env: ServingVectorEnv, _: object = None) -> NDArray[np.int64]:
        return env.action_masks()[:, ::-1].argmax(axis=1) * -1 + 6

    env.reset(seed=0)
    rewards: list[float] = []
    gap, over = 0.0, False
    while not over:
        _, reward, terminated, _, infos = env.step(act(env))
        rewards.append(float(reward[0]))
        over = bool(terminated[0])
        if over:
            gap = 100 * float(infos["final_info"]["gap"][0])
    assert len(rewards) > 2
    env.reset(seed=0)

    def expert(env: ServingVectorEnv) -> NDArray[np.float64]:
        return np.where(env.action_masks(), -gap, -np.inf)

    labelled = collect(env, expert, act, len(rewards), 0.02)
    to_go = np.cumsum(rewards[::-1])[::-1]
    assert labelled.returns == pytest.approx(to_go, abs=1e-4)
    assert labelled.targets.sum(axis=1) == pytest.approx(1.0)
    assert (labelled.targets[~labelled.masks] == 0).all()


def test_rows_are_spread_over_their_episodes() -> None:
    task = changed(TINY, workload={"requests": 200}, cluster={"clients": 4})
    env = ServingVectorEnv(5, task, copy=False)
    env.reset(seed=0)
    spread_over_episodes(env, lambda env, _: env.action_masks().argmax(axis=1))
    shares = env.state.episodes["finished"] / 200
    assert (shares >= np.arange(5) / 5).all()
    assert (shares < np.arange(5) / 5 + 0.1).all()
    observations, masks = env.rows.observations.copy(), env.action_masks().copy()
    assert observations[:, 4] == pytest.approx(shares)
    assert masks.any(axis=1).all()


def test_spreading_ends_where_episodes_are_too_short() -> None:
    env = ServingVectorEnv(40, TINY, copy=False)  # eight requests: no state at 39/40
    env.reset(seed=0)
    spread_over_episodes(env, lambda env, _: env.action_masks().argmax(axis=1))
    assert (env.state.episodes["finished"] < 8).all()


@pytest.mark.parametrize("algorithm", ["ppo", "maskable-ppo"])
def test_the_learner_comes_to_do_what_the_expert_does(algorithm: str) -> None:
    h = replace(
        SMALL,
        algorithm=algorithm,
        width=32,
        imitation_rounds=2,
        imitation_states=600,
        imitation_environments=8,
        imitation_batch_size=64,
        imitation_epochs=15,
        imitation_learning_rate=3e-3,
    )
    rule = 3  # longest first, else decode

    def expert(env: ServingVectorEnv) -> NDArray[np.float64]:
        masks = env.action_masks()
        crowded = env.rows.observations[:, 0] < 0.5
        values = np.where(
            np.arange(masks.shape[1]) == np.where(crowded, rule, 0)[:, None], -1.0, -2
        )
        return np.where(masks, values, -np.inf)

    model = make_model(TINY, h)
    imitate(model, TINY, expert, h)
    env = ServingVectorEnv(16, TINY)
    env.reset(seed=900_000)
    agreed = []
    for _ in range(20):
        legal: Any = {"action_masks": env.action_masks()} if algorithm == "maskable-ppo" else {}
        actions, _ = model.predict(env.rows.observations, deterministic=True, **legal)
        agreed.append(actions == expert(env).argmax(axis=1))
        env.step(actions)
    assert np.mean(agreed) > 0.97


def test_imitation_wants_an_expert_and_the_gap(tmp_path: Path) -> None:
    h = replace(SMALL, imitation_rounds=1)
    with pytest.raises(ServegymError, match="no expert"):
        train(TINY, h, tmp_path / "run", options=QUIET)
    task = changed(TINY, process={"reward": "latency"})
    with pytest.raises(ServegymError, match="gap"):
        imitate(make_model(task, h), task, prefer_prefill, h)
    with pytest.raises(ServegymError, match="gap"):
        train(task, h, tmp_path / "other", expert=prefer_prefill, options=QUIET)
    assert not (tmp_path / "other").exists()


# The command line


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("--task", "Tiny-v0", "--environments", "4", "--steps", "16", "--batch-size", "64"),
        *("--validation-cases", "0", "--output", str(folder), *more),
    ]


def test_train_and_resume_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert script.main(arguments(folder, "--timesteps", "128", "--epochs", "2")) == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["hyperparameters"]["epochs"] == 2
    assert record["hyperparameters"]["width"] == default_hyperparameters(TINY.name).width
    assert "--epochs 2" in record["command"]
    assert list((folder / "tensorboard").glob("events.*"))
    # Options that are not given are those of the run.
    assert script.main(["--output", str(folder), "--resume"]) == 0
    assert "128 timesteps" in capsys.readouterr().out
    with pytest.raises(ServegymError, match="epochs 2, this one has 3"):
        script.main(["--output", str(folder), "--resume", "--epochs", "3"])


@pytest.mark.parametrize(
    ("bad", "words", "good"),
    [
        (("--algorithm", "maskableppo"), "did you mean 'maskable-ppo'", ("--algorithm", "ppo")),
        (("--algorithm", "dqn"), "choose from maskable-ppo, ppo", ("--algorithm", "maskable-ppo")),
        (("--task", "GSM8k"), "did you mean 'GSM8K-v0'", ("--task", "GSM8K-v0")),
        (("--task", "missing.toml"), "no such task file", ("--task", "servegym/Tiny-v0")),
        (("--learning-rat", "1"), "did you mean '--learning-rate'", ("--learning-rate", "1")),
        (("--learning-rate", "nan"), "learning_rate must be a number", ("--learning-rate", "0")),
        (("--timesteps", "many"), "many", ("--timesteps", "1")),
        (("--timesteps", "1e6"), "not a whole number: '1e6'", ("--timesteps", "1000000")),
        (("--timesteps", "0"), "timesteps must be a whole number in 1", ("--timesteps", "1")),
        (("--seed", "800"), "seed must be a whole number in 0 … 799", ("--seed", "799")),
        (("--evaluate-every", "0"), "--evaluate-every must be", ("--evaluate-every", "1")),
        (("--validation-cases", "-1"), "--validation-cases must", ("--validation-cases", "0")),
        (("--checkpoint-every", "0"), "checkpoint_every must be", ("--checkpoint-every", "1")),
        (("--max-minutes", "nan"), "max_minutes must lie", ("--max-minutes", "0")),
        (("--threads", "0"), "threads must lie", ("--threads", "1")),
        (("--expert", "algined"), "did you mean 'aligned'", ("--expert", "lookahead-0.7")),
        (("--resume",), "holds no run to resume", ()),
    ],
)
def test_bad_options(
    bad: Sequence[str],
    words: str,
    good: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before torch is imported, with nothing written; the nearest valid option is taken."""
    common = ["--validation-cases", "0", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "servegym.agents.training", None)  # importing it fails
        assert words in refusal([*common, *bad])
    assert not (tmp_path / "run").exists()
    begun = Mock()
    monkeypatch.setattr(training, "train", begun)
    assert script.main([*common, *good]) == 0
    begun.assert_called_once()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "holds a run; go on with it by --resume, or name another"),
        (("--resume", "--task", "Paper-v0"), "a run with name 'servegym/Tiny-v0', this one has"),
        (("--resume", "--width", "9"), "a run with width 8, this one has 9"),
    ],
)
def test_folders_of_other_runs(
    options: Sequence[str], words: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    monkeypatch.setitem(sys.modules, "servegym.agents.training", None)
    assert words in refusal(["--output", str(run), "--task", "Tiny-v0", *options])
    assert contents(run) == before


def test_a_truncated_checkpoint_from_the_command_line(run: Path) -> None:
    path = checkpoints(run / "checkpoints")[-1]
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(run)
    options = ["--task", "Tiny-v0", "--output", str(run), "--resume", "--validation-cases", "0"]
    words = refusal(options)
    assert "delete it to go on from the one before" in words
    assert contents(run) == before


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"task": {}, "hyperparameters": 3, "observation_version": 2, "command": "x"}',
    ],
)
def test_a_damaged_record_from_the_command_line(record: str, run: Path) -> None:
    (run / "run.json").write_text(record)
    assert "run.json" in refusal(["--output", str(run), "--resume"])


def refusal(options: Sequence[str]) -> str:
    """Run the script, which must refuse: status 2 and one line, which is returned."""
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        run_script(script.main, options)
    assert stop.value.code == 2
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ctrl_c_leaves_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = StopAt(20)
    monkeypatch.setattr(script, "make_callbacks", lambda *_: [interrupt])
    with pytest.raises(SystemExit) as caught:
        run_script(script.main, arguments(tmp_path / "run"))
    assert caught.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(
        f"go on from the last checkpoint with --output {tmp_path / 'run'} --resume"
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "000000000000.safetensors"
    ]


def test_killed_training_leaves_a_checkpoint_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--timesteps", "100000000", "--checkpoint-every", "1")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments(folder, *more)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 60
    while _steps(folder) < 256 and process.poll() is None:
        assert time.monotonic() < patience
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    saved = checkpoints(folder / "checkpoints")
    # A temporary file may be left, and one checkpoint more if it was killed before forgetting it.
    assert 2 <= len(saved) <= 3
    h = Hyperparameters(**json.loads((folder / "run.json").read_text())["hyperparameters"])
    model = make_model(TINY, h)
    load_checkpoint(model, identity(TINY, h), saved[-1])
    assert model.num_timesteps == int(saved[-1].stem) >= 256


def _steps(folder: Path) -> int:
    found = checkpoints(folder / "checkpoints")
    return int(found[-1].stem) if found else -1


def test_references_admit_by_rules_that_the_agent_lacks() -> None:
    task = with_overrides(TASKS["servegym/Tiny-v0"], {"process": {"rules": ["fcfs"]}})
    names = list(script.references(task, [900_000]))
    assert names[0] == "hybrid"
    assert names[1].startswith("threshold-")
