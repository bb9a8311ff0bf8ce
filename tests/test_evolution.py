"""The evolution strategy after PPO: perturbed weights, played cases, and the state that a resume keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from servegym.agents import evolution as module
from servegym.agents.checkpoints import checkpoints
from servegym.agents.evolution import Evolution, clipped, leading_directions
from servegym.agents.export import policy_network
from servegym.agents.hyperparameters import Hyperparameters, Options, default_hyperparameters
from servegym.agents.training import make_model, train
from servegym.agents.validation import Validation
from servegym.envs import ServegymError, make_case
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import train as script
from tests.helpers import changed, weights

TINY = TASKS["servegym/Tiny-v0"]
SMALL = changed(
    TASKS["servegym/GSM8KPredicted-v0"],
    cluster={"clients": 10},
    workload={"requests": 60},
    process={"rules": ("longest", "shortest")},
)
H = Hyperparameters(
    environments=4,
    steps=16,
    batch_size=32,
    epochs=1,
    width=8,
    timesteps=128,
    seed=3,
    evolution_updates=4,
    evolution_pairs=70,  # a whole batch and a part of one
    evolution_directions=3,
)
QUIET = Options(tensorboard=False, progress=False)


def layer(model: OnPolicyAlgorithm) -> NDArray[np.float32]:
    net: Any = model.policy.action_net
    return np.hstack([net.weight.detach().numpy(), net.bias.detach().numpy()[:, None]])


def mean_gap_percent(model: OnPolicyAlgorithm, seeds: range) -> float:
    episodes = Validation(SMALL, seeds).play(policy_network(model).best).episodes
    return float(100 * episodes["gap"].mean())


def test_the_gap_falls_on_cases_that_were_not_played() -> None:
    h = replace(H, evolution_updates=6, evolution_pairs=64)
    model = make_model(SMALL, h)
    with torch.no_grad():  # prefers the shortest and prefills at once, far from optimal
        net: Any = model.policy.action_net
        net.bias.copy_(torch.tensor([-2.0, 0.0, 1.0]))
    unseen = range(900_000, 900_060)
    before = mean_gap_percent(model, unseen)
    evolution = Evolution(model, SMALL, h)
    for number in range(h.evolution_updates):
        update = evolution.update(number)
        assert 0 < update.step <= 1
        assert update.decisions > 2 * 64
    assert mean_gap_percent(model, unseen) < before - 2.0


def test_an_update_depends_on_its_number_and_the_weights_alone() -> None:
    first, second = make_model(SMALL, H), make_model(SMALL, H)
    evolution = Evolution(first, SMALL, H)
    start = weights(first)
    once = evolution.update(1)
    changed_parts = {name for name, value in weights(first).items() if value != start[name]}
    assert changed_parts == {"action_net.weight", "action_net.bias"}
    torch.rand(3)  # something else draws from the global generator
    assert Evolution(second, SMALL, H).update(1) == once
    assert weights(second) == weights(first)
    third = make_model(SMALL, H)
    Evolution(third, SMALL, H).update(2)
    assert weights(third) != weights(first)


def test_a_pair_plays_the_same_case_as_the_exported_agent_would() -> None:
    model = make_model(SMALL, H)
    evolution = Evolution(model, SMALL, H)
    candidates = np.repeat(layer(model)[None], 6, axis=0)
    candidates[4:, 0] += 1.0  # the last pair likes to decode
    seeds = [3005, 3017, 3999]
    cases = [make_case(SMALL, seed) for seed in seeds]
    gaps_percent, decisions = evolution.play_pairs(candidates, cases)
    played = Validation(SMALL, seeds).play(policy_network(model).best)
    assert gaps_percent[:4].tolist() == np.repeat(100 * played.episodes["gap"][:2], 2).tolist()
    assert gaps_percent[4] == gaps_percent[5] != pytest.approx(100 * played.episodes["gap"][2])
    assert decisions > 2 * played.episodes["decisions"][:2].sum()
    for threads in (2, 7):  # more than one candidate each, and fewer
        again = Evolution(model, SMALL, H, threads).play_pairs(candidates, cases)
        assert again[0].tolist() == gaps_percent.tolist()
        assert again[1] == decisions


def test_an_update_plays_pairs_on_cases_of_the_agents_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Perturbations too small to change an action: the median gap is that of the exported agent."""
    drawn = Mock(wraps=make_case)
    monkeypatch.setattr(module, "make_case", drawn)
    h = replace(H, evolution_spread=1e-6)
    model = make_model(SMALL, h)
    with torch.no_grad():  # scores of untrained networks are almost equal
        net: Any = model.policy.action_net
        net.weight.mul_(1000)
    network = policy_network(model)
    evolution = Evolution(model, SMALL, h)
    update = evolution.update(0)
    seeds = [call.args[1] for call in drawn.call_args_list][-h.evolution_pairs :]
    assert set(seeds) <= set(range(3000, 4000))
    assert len(set(seeds)) > 60
    played = Validation(SMALL, seeds).play(network.best).episodes
    assert update.gap_percent == np.median(np.repeat(100 * played["gap"], 2))


def test_directions_are_the_leading_ones_of_the_information(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the matrix written out, state by state, of the states that an update finds them from."""
    monkeypatch.setattr(module, "STATES", 200)
    asked = Mock(wraps=leading_directions)
    monkeypatch.setattr(module, "leading_directions", asked)
    model = make_model(SMALL, H)
    weights = layer(model).astype(float)
    Evolution(model, SMALL, H).update(0)
    (given, features, masks, count, start), _ = asked.call_args
    assert np.array_equal(given, weights)
    assert features.shape == (200, 9)
    assert (features[:, -1] == 1).all()
    assert masks.any(axis=1).all()
    size = weights.size
    for temperature, least in ((3.0, 1e-3), (1.0, 0.5)):
        matrix, undecided = np.zeros((size, size)), 0.0
        for state, mask in zip(features, masks, strict=True):
            scores = np.where(mask, np.exp(weights @ state / temperature), 0.0)
            p = scores / scores.sum()
            matrix += np.kron(np.diag(p) - np.outer(p, p), np.outer(state, state))
            undecided += 1 - np.square(p).sum()
        values, vectors = np.linalg.eigh(matrix / undecided)
        directions = leading_directions(weights, features, masks, count, start, temperature, least)
        assert directions.shape == (3, *weights.shape)
        floor = least * values[-1]
        for direction in directions.reshape(3, size):
            length = np.linalg.norm(direction)
            along = vectors.T @ (direction / length)
            k = int(np.argmax(np.abs(along)))
            assert k >= size - 3
            assert abs(along[k]) == pytest.approx(1.0)
            assert length == pytest.approx(1 / np.sqrt(max(values[k], floor)))


def test_what_chance_adds_is_clipped() -> None:
    assert clipped(np.zeros(3)).tolist() == [0, 0, 0]
    differences = np.array([0.0, 0.0, 0.0, 0.1, -0.1, 0.1, 30.0, -30.0, 0.1])
    assert clipped(differences).tolist() == pytest.approx([0, 0, 0, 0.1, -0.1, 0.1, 0.2, -0.2, 0.1])


def test_equal_candidates_move_nothing() -> None:
    """One client and one rule leave no choice: every gap is the same."""
    task = changed(
        TINY,
        cluster={"clients": 1},
        workload={"requests": 2},
        process={"rules": ("longest", "fcfs")},
    )
    model = make_model(task, H)
    before = weights(model)
    update = Evolution(model, task, H).update(0)
    assert update.step == 0
    assert weights(model) == before


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_evolution_ends_in_the_same_weights(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(TINY, H, tmp_path / "whole", options=QUIET)
    update = Evolution.update

    def interrupted(self: Evolution, number: int) -> module.Update:
        if number == stop:
            raise KeyboardInterrupt
        return update(self, number)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Evolution, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, H, folder, options=QUIET)
    resumed = train(TINY, H, folder, resume=True, options=QUIET)
    assert resumed.num_timesteps == whole.num_timesteps > 128
    assert weights(resumed) == weights(whole)
    ends = [load_file(checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "whole", folder)]
    assert all(array.tobytes() == ends[1][name].tobytes() for name, array in ends[0].items())
    # A finished evolution has nothing left to do.
    again = train(TINY, H, folder, resume=True, options=QUIET)
    assert weights(again) == weights(whole)


def test_a_time_limit_stops_an_evolution(tmp_path: Path) -> None:
    short = replace(QUIET, max_minutes=1e-9)
    h = replace(H, timesteps=64)
    assert train(TINY, h, tmp_path / "run", options=short).num_timesteps == 64  # late after PPO
    limited = train(TINY, h, tmp_path / "run", resume=True, options=short)
    assert limited.num_timesteps > 64  # after one update
    resumed = train(TINY, h, tmp_path / "run", resume=True, options=QUIET)
    assert weights(resumed) == weights(train(TINY, h, tmp_path / "whole", options=QUIET))


def test_evolution_wants_the_gap(tmp_path: Path) -> None:
    task = changed(TINY, process={"reward": "latency"})
    with pytest.raises(ServegymError, match=r"evolution needs process\.reward = 'gap'"):
        train(task, H, tmp_path / "run", options=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_command_line_shows_and_keeps_an_evolution(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [
        *("--task", "Tiny-v0", "--environments", "4", "--steps", "16", "--batch-size", "64"),
        *("--timesteps", "64", "--validation-cases", "3", "--evaluate-every", "1"),
        *("--evolution-updates", "2", "--evolution-pairs", "4", "--output", str(folder)),
    ]
    assert script.main(options) == 0
    rows = pd.read_csv(folder / "evaluations.csv")
    assert rows["timesteps"].is_monotonic_increasing
    assert len(rows) == 4  # before, after PPO, after each update
    card = json.loads((folder / "final" / "agent.json").read_text())
    assert card["training"]["timesteps"] == rows["timesteps"].iloc[-1] > 64


def test_a_task_whose_agents_evolve_is_validated_on_many_cases() -> None:
    assert default_hyperparameters("servegym/GSM8KPredicted-v0").evolves
    assert script.read_args(["--task", "GSM8KPredicted-v0"]).validation_cases == 300
    words = ["--task", "GSM8KPredicted-v0", "--validation-cases", "7"]
    assert script.read_args(words).validation_cases == 7
    assert script.read_args(["--task", "GSM8K-v0"]).validation_cases == 20
