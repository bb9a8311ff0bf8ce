"""Trained agents: exported, read back without torch, refused when damaged, evaluated by name."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from servegym.agents.card import CARD_FILE, WEIGHTS_FILE
from servegym.agents.export import export_agent, policy_network
from servegym.agents.policy import LearnedPolicy, load_agent
from servegym.agents.validation import Validation
from servegym.envs import ServegymError, ServingEnv, TaskConfig, load_task
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.policy import Situation
from servegym.envs.process.blocks import features_of
from servegym.envs.process.metrics import METRICS
from servegym.envs.process.observation import FEATURES, OBSERVATION_SIZE, OBSERVATION_VERSION
from servegym.envs.task.config import with_overrides
from servegym.envs.vocabulary import OBSERVATION_BLOCKS
from servegym.studies import policies
from servegym.studies.cli import run
from servegym.studies.commands import evaluate
from tests.test_packaging import run_outside

TINY = load_task("Tiny-v0")
KNOWN = len(features_of(OBSERVATION_BLOCKS))
"""Features of all blocks."""
ALGORITHMS: list[Any] = [PPO, MaskablePPO]


def make_model(algorithm: Any = MaskablePPO, task: TaskConfig = TINY, **policy_kwargs: Any) -> Any:
    """A model of random weights, large enough that its scores differ clearly."""
    env = DummyVecEnv([lambda: gym.make("servegym/Tiny-v0", task=task)])
    model = algorithm("MlpPolicy", env, device="cpu", seed=1, policy_kwargs=policy_kwargs)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for values in model.policy.parameters():
            values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """The folder of an agent for Tiny-v0."""
    folder = tmp_path / "agent"
    export_agent(make_model(net_arch=[16, 8]), TINY, "python scripts/train.py", folder)
    return folder


def play_agent(policy: LearnedPolicy, task: TaskConfig, seed: int = 3) -> dict[str, Any]:
    return play(task, "agent", policy, make_case(task, seed), seed).row


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("net_arch", [[16, 8], {"pi": [128, 128], "vf": [4]}, []])
def test_numpy_scores_as_torch_does(
    tmp_path: Path, rng: np.random.Generator, algorithm: Any, net_arch: Any
) -> None:
    model = make_model(algorithm, net_arch=net_arch)
    export_agent(model, TINY, "", tmp_path)
    network = load_agent(tmp_path).network
    observations = rng.random((500, len(FEATURES)), dtype=np.float32)
    masks = rng.random((500, 7)) < 0.5
    masks[:, 0] |= ~masks.any(axis=1)
    policy = model.policy
    with torch.no_grad():
        features = policy.extract_features(
            torch.as_tensor(observations), policy.pi_features_extractor
        )
        scores = policy.action_net(policy.mlp_extractor.forward_actor(features)).numpy()
    assert np.allclose(network.scores(observations), scores, rtol=0, atol=1e-5)
    best = network.best(observations, masks)
    assert np.array_equal(best, np.where(masks, scores, -np.inf).argmax(axis=1))
    assert len(set(best)) > 3
    one_by_one = [int(network.best(*pair)) for pair in zip(observations, masks, strict=True)]
    assert np.array_equal(one_by_one, best)
    if algorithm is MaskablePPO:
        theirs, _ = model.predict(observations, action_masks=masks, deterministic=True)
        assert np.array_equal(theirs, best)


def test_the_card_tells_where_the_agent_comes_from(agent: Path) -> None:
    card = json.loads((agent / CARD_FILE).read_text())
    assert card["actions"] == list(TINY.actions)
    assert "rules" not in card
    assert card["features"] == list(FEATURES)
    assert card["layers"] == [OBSERVATION_SIZE, 16, 8, 7]
    assert card["task"]["cluster"]["clients"] == 3
    training = card["training"]
    assert training["command"] == "python scripts/train.py"
    assert training["algorithm"] == "MaskablePPO"
    assert set(training["versions"]) >= {"torch", "numpy", "sb3_contrib"}
    assert sorted(path.name for path in agent.iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_an_agent_of_the_usual_size_is_small(tmp_path: Path) -> None:
    export_agent(make_model(net_arch=[128, 128]), TINY, "", tmp_path)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 110_000


def test_exporting_again_replaces_the_agent(agent: Path) -> None:
    export_agent(make_model(net_arch=[4]), TINY, "again", agent)
    assert load_agent(agent).network.sizes == (OBSERVATION_SIZE, 4, 7)
    assert sorted(path.name for path in agent.iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_deployment_needs_no_torch(agent: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from servegym.agents.policy import load_agent
load_agent({str(agent)!r})
print(sorted({{"torch", "stable_baselines3", "tensorboard", "matplotlib"}} & set(sys.modules)))
"""
    assert run_outside(code, tmp_path).strip() == "[]"


@pytest.mark.parametrize("clients", [1, 2, 30])
def test_the_same_weights_serve_any_number_of_clients(agent: Path, clients: int) -> None:
    overrides = {"cluster": {"clients": clients}, "workload": {"requests": 60}}
    assert play_agent(load_agent(agent), with_overrides(TINY, overrides))["gap"] >= 0


def test_rules_are_found_by_name(agent: Path) -> None:
    policy = load_agent(agent)
    expected = play_agent(policy, TINY)["makespan_s"]
    turned = with_overrides(TINY, {"process": {"rules": TINY.process.rules[::-1]}})
    assert play_agent(policy, turned)["makespan_s"] == expected
    assert play_agent(policy, TINY)["makespan_s"] == expected
    fewer = with_overrides(TINY, {"process": {"rules": TINY.process.rules[1:]}})
    with pytest.raises(ServegymError, match=f"may choose 'prefill:{TINY.process.rules[0]}'"):
        play_agent(policy, fewer)


def test_more_rules_than_the_agent_knows(tmp_path: Path) -> None:
    """The agent takes a rule that it does not know only where no other action is legal."""
    task = with_overrides(TINY, {"process": {"rules": ("plan", "longest")}})
    export_agent(make_model(task=task), task, "", tmp_path)
    policy = load_agent(tmp_path)
    assert play_agent(policy, TINY)["gap"] == play_agent(policy, task)["gap"]
    env = ServingEnv(TINY)
    observation, _ = env.reset(seed=0)
    mask = np.arange(7) == TINY.process.rules.index("fcfs") + 1
    assert policy.act(Situation(env.view(), observation, mask)) == mask.argmax()


def test_an_agent_of_every_round_is_asked_at_every_round(tmp_path: Path) -> None:
    task = with_overrides(TINY, {"process": {"decisions": "rounds"}})
    export_agent(make_model(task=task), task, "", tmp_path)
    assert play_agent(load_agent(tmp_path), TINY)["decision_points"] == "rounds"


def edited(**changes: Any) -> Callable[[Path], None]:
    """Replace entries of the card; None removes one."""

    def edit(folder: Path) -> None:
        card = json.loads((folder / CARD_FILE).read_text()) | changes
        kept = {key: value for key, value in card.items() if value is not None}
        (folder / CARD_FILE).write_text(json.dumps(kept))

    return edit


def with_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change tensors and fit the card's hash to them, so that only the check of tensors can refuse."""

    def edit(folder: Path) -> None:
        tensors = {
            f"{k}.{kind}": values
            for k, layer in enumerate(load_agent(folder).network.layers)
            for kind, values in zip(("weight", "bias"), layer, strict=True)
        }
        change(tensors)
        data = save({name: np.ascontiguousarray(values) for name, values in tensors.items()})
        (folder / WEIGHTS_FILE).write_bytes(data)
        edited(weights_sha256=hashlib.sha256(data).hexdigest())(folder)

    return edit


def cut(name: str, share: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return edit


def flipped(folder: Path) -> None:
    """Flip one bit of one weight."""
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(bytes(data))


def not_safetensors(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"pickle")
    edited(weights_sha256=hashlib.sha256(b"pickle").hexdigest())(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CARD_FILE).unlink(), r"agent\.json: no such file"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), "safetensors: no such file"),
        (cut(CARD_FILE, 0.9), "not JSON"),  # truncated
        (cut(CARD_FILE, 0.0), "not JSON"),  # empty
        (lambda folder: (folder / CARD_FILE).write_bytes(b"\xff\xfe\x00"), "is in UTF-16"),
        (lambda folder: (folder / CARD_FILE).write_text("[]"), "unknown agent format None"),
        (edited(format="servegym-agent-2"), "unknown agent format 'servegym-agent-2'"),
        (
            edited(observation_version=OBSERVATION_VERSION - 1),
            f"observes version .* gives version {OBSERVATION_VERSION}; train it again",
        ),
        (edited(observation_version=None), "observes version None"),
        (edited(features=["weather", *FEATURES[1:]]), "'weather' is not among"),
        (
            edited(features=["weather", *FEATURES[2:]]),
            f"of the agent's {len(FEATURES) - 1} features, .* is not among the {KNOWN} of",
        ),
        (edited(features=list(FEATURES[:-1])), "layers must lead from 64 features to 7 actions"),
        (edited(features=[*FEATURES[:-1], FEATURES[0]]), "must name each feature once"),
        (edited(features=7), "features must be a list"),
        (edited(actions=["decode", "prefill:longset"]), "did you mean 'longest'"),
        (edited(actions=["decode", "prefil:longest"]), "unknown action 'prefil:longest'"),
        (edited(actions=["decode", "steal:sitting"]), "unknown kind of steal 'sitting'"),
        (edited(actions=["decode", "prefill"]), "unknown action 'prefill'"),
        (edited(actions=[]), "actions must name at least one"),
        (edited(actions=["decode", "decode"]), "actions .* each once"),
        (edited(actions=["decode", "mixed:fcfs"]), "layers must lead from .* to 2 actions"),
        (edited(actions="decode"), "actions must be a list"),
        (edited(actions=None), "rules must be a list"),
        (edited(actions=None, rules=["plan", "longset"]), "did you mean 'longest'"),
        (edited(actions=None, rules=[]), "rules must name at least one"),
        (edited(actions=None, rules=["plan", "plan"]), "rules .* each once"),
        (edited(actions=None, rules=["plan", "longest"]), "layers must lead from .* to 3 actions"),
        (edited(decisions="hourly"), "decisions must be"),
        (edited(layers=[OBSERVATION_SIZE]), "layers must be two or more"),
        (edited(layers=[OBSERVATION_SIZE, "x", 7]), "layers must be two or more"),
        (edited(layers=[OBSERVATION_SIZE, 16, 9, 7]), "must be float32 of shape"),
        (edited(layers=[OBSERVATION_SIZE, 16, 7]), "safetensors: "),
        (edited(task=None), "task must be a table"),
        (edited(weights_sha256=None), "SHA-256 differs"),
        (cut(WEIGHTS_FILE, 0.99), "SHA-256 differs"),  # truncated
        (flipped, "SHA-256 differs"),
        (not_safetensors, "not a safetensors file"),
        (with_weights(lambda t: t["0.bias"].__setitem__(0, np.nan)), "NaN"),
        (with_weights(lambda t: t.update({"0.bias": np.zeros(16)})), "must be float32"),
        (with_weights(lambda t: t.pop("1.bias")), "lacks tensor '1.bias'"),
        (with_weights(lambda t: t.update(more=np.zeros(1))), "unknown tensor 'more'"),
    ],
)
def test_a_damaged_agent_is_refused(
    agent: Path, damage: Callable[[Path], Any], message: str
) -> None:
    load_agent(agent)
    damage(agent)
    with pytest.raises(ServegymError, match=message) as refusal:
        load_agent(agent)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(agent) in str(refusal.value)


def test_other_networks_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="not linear layers and tanh"):
        export_agent(make_model(activation_fn=torch.nn.ReLU), TINY, "", tmp_path / "agent")
    model = make_model()
    model.policy.features_extractor = torch.nn.Identity()
    with pytest.raises(ServegymError, match="only MlpPolicy"):
        export_agent(model, TINY, "", tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


def test_normalised_observations_are_not_exported() -> None:
    env = DummyVecEnv([lambda: gym.make("servegym/Tiny-v0")])
    with pytest.raises(ServegymError, match="norm_obs=False"):
        policy_network(PPO("MlpPolicy", VecNormalize(env), device="cpu"))
    policy_network(PPO("MlpPolicy", VecNormalize(env, norm_obs=False), device="cpu"))


def test_another_task_than_the_model_was_made_for(tmp_path: Path) -> None:
    task = with_overrides(TINY, {"process": {"rules": ("plan",)}})
    with pytest.raises(ServegymError, match=r"has \d+ features and 2 actions"):
        export_agent(make_model(), task, "", tmp_path)


@pytest.mark.parametrize("process", [{}, {"max_decisions": 4}, {"decisions": "rounds"}])
def test_validation_plays_what_evaluation_plays(agent: Path, process: dict[str, Any]) -> None:
    task = with_overrides(TINY, {"process": process, "workload": {"requests": 20}})
    policy = load_agent(agent)
    validation = Validation(task, [7, 3, 11])
    for _ in range(2):  # the second run starts anew
        result = validation.play(policy.network.best)
        assert list(result.episodes["seed"]) == [7, 3, 11]
        for _, row in result.episodes.iterrows():
            played = play_agent(policy, task, int(row["seed"]))
            assert [row[name] for name in METRICS] == pytest.approx(
                [played[name] for name in METRICS], rel=0, abs=0, nan_ok=True
            )
        trace = result.trace
        assert len(trace.rewards) == result.episodes["decisions"].iloc[0]
        assert (np.diff(trace.clock_s) >= 0).all()
        if "max_decisions" not in process:
            assert trace.rewards.sum() == pytest.approx(-100 * result.episodes["gap"].iloc[0])
    assert result.action_shares.sum() == pytest.approx(1)


def test_validation_wants_cases() -> None:
    with pytest.raises(ServegymError, match="at least one seed"):
        Validation(TINY, [])


def evaluate_with(policies: str, output: Path, jobs: int = 1) -> int:
    options = ["--task", "Tiny-v0", "--policies", policies, "--seeds", "1000000:1000003"]
    return evaluate.main([*options, "--output", str(output), "--jobs", str(jobs)])


def test_evaluate_takes_an_agent_by_path(agent: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert evaluate_with(f"fcfs,{agent}", output, jobs=2) == 0
    table = pd.read_csv(output / "episodes.csv")
    assert list(table["policy"]) == ["fcfs"] * 3 + [str(agent)] * 3
    expected = [play_agent(load_agent(agent), TINY, seed)["gap"] for seed in table["seed"][3:]]
    assert list(table["gap"][3:]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["agent", "run", "./run", "run/agent/"])
def test_folders_of_agents_and_of_runs(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No slash is needed, and a run's folder stands for its best agent."""
    if "run" in name:
        (tmp_path / "run").mkdir()
        agent.rename(tmp_path / "run" / "agent")
    monkeypatch.chdir(tmp_path)
    assert evaluate_with(name, tmp_path / "out") == 0
    assert set(pd.read_csv(tmp_path / "out" / "episodes.csv")["policy"]) == {name}


def test_ppo_is_the_shipped_agent_of_the_task(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "AGENTS", tmp_path / "agents")
    agent.rename(tmp_path / "moved")
    with pytest.raises(ServegymError, match=r"train\.py --task Tiny-v0") as refusal:
        evaluate_with("ppo", tmp_path / "out")
    assert "no agent is shipped for Tiny-v0" in str(refusal.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "agents").mkdir()
    (tmp_path / "moved").rename(tmp_path / "agents" / "Tiny-v0")
    assert evaluate_with("ppo", tmp_path / "out") == 0
    assert set(pd.read_csv(tmp_path / "out" / "episodes.csv")["policy"]) == {"ppo"}


def test_other_weights_under_the_same_name_are_not_mixed(agent: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert evaluate_with(str(agent), output) == 0
    assert evaluate_with(str(agent), output) == 0
    export_agent(make_model(net_arch=[4]), TINY, "", agent)
    before = (output / "episodes.csv").read_bytes()
    with pytest.raises(ServegymError, match=r"other weights of .*choose a new --output"):
        evaluate_with(str(agent), output)
    assert (output / "episodes.csv").read_bytes() == before
    (output / "agents.json").write_text("{")
    with pytest.raises(ServegymError, match="damaged"):
        evaluate_with(str(agent), output)


@pytest.mark.parametrize("name", ["missing/agent", "./fcfs"])
def test_evaluate_refuses_a_path_without_an_agent(tmp_path: Path, name: str) -> None:
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        run(evaluate.main, ["--policies", name, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "agent.json: no such file" in errors.getvalue()
    assert len(errors.getvalue().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_agents_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--list-policies"]) == 0
    shown = capsys.readouterr().out
    assert "\nppo " in shown
    assert "agent.json" in shown
