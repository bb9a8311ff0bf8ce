"""What makes training cheaper changes no results but the last bits; the table of ways to train."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from servegym.agents.activation import Tanh
from servegym.agents.hyperparameters import default_hyperparameters
from servegym.agents.speed import make_plain, training_costs
from servegym.agents.training import make_model
from servegym.envs import load_task
from servegym.studies.agents.play import CURVE_COLUMNS
from servegym.studies.agents.runs import WAYS, Run, arguments
from servegym.studies.agents.training_speed import SHOWN, comparison, with_cpu_time
from servegym.studies.cli import run
from servegym.studies.commands import study_training_speed, train
from tests.test_summary import episodes

TINY = load_task("Tiny-v0")
SMALL = replace(
    default_hyperparameters(TINY.name), environments=4, steps=8, batch_size=16, epochs=1, width=8
)


def test_tanh_and_its_gradient_are_those_of_torch() -> None:
    values = torch.linspace(-12, 12, 100_001)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    result, expected = Tanh()(ours), torch.tanh(theirs)
    assert (result - expected).abs().max() <= 2.4e-7
    torch.autograd.backward((result * values).sum())
    torch.autograd.backward((expected * values).sum())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= 1e-5  # of up to 12
    extremes = torch.tensor([-torch.inf, -1e30, 0.0, 1e30, torch.inf])
    assert Tanh()(extremes).tolist() == [-1, -1, 0, 1, 1]
    assert Tanh()(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_masked_policy_is_that_of_sb3_contrib(deterministic: bool) -> None:
    """Same values, actions, log probabilities and entropies; nothing illegal is drawn."""
    model = make_model(TINY, SMALL)
    generator = np.random.default_rng(0)
    inputs, outputs = model.observation_space.shape, int(model.action_space.n)  # type: ignore[attr-defined]
    assert inputs is not None
    observations = torch.from_numpy(generator.normal(size=(500, *inputs)).astype(np.float32))
    masks = generator.random((500, outputs)) < 0.5
    masks[np.arange(500), generator.integers(outputs, size=500)] = True
    with torch.no_grad():
        model.policy.action_net.weight.mul_(300)  # type: ignore[operator]

    def play() -> list[torch.Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            taken = model.policy(observations, deterministic=deterministic, action_masks=masks)
            learnt = model.policy.evaluate_actions(
                observations,
                taken[0],
                action_masks=torch.from_numpy(masks),  # type: ignore[call-arg]
            )
        return [*taken, *learnt]

    ours = play()
    make_plain(model)
    theirs = play()
    assert torch.equal(ours[0], theirs[0])
    assert masks[np.arange(500), ours[0].numpy()].all()
    assert ours[2].std() > 0.1  # not all alike
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-5


def test_costs_are_measured_of_each_way() -> None:
    costs = training_costs(TINY, {"one": SMALL, "plain": SMALL}, 2, plain=["plain"])
    assert list(costs) == ["one", "plain"]
    assert all(part > 0 for parts in costs.values() for part in parts)


COSTS = pd.DataFrame(
    [("slow", 32, 256, 2048, 4, 128, 40.0, 60.0), ("fast", 128, 64, 2048, 2, 64, 10.0, 10.0)],
    columns=["way", *SHOWN, "collect_us", "learn_us"],
)
CURVES = pd.DataFrame(
    [
        *(
            ("fast", seed, steps, 9.0, gap)
            for seed in (0, 1)
            for steps, gap in ((0, 1), (10**6, 4))
        ),
        *(
            ("slow", seed, steps, 9.0, gap + seed)
            for seed in (0, 1)
            for steps, gap in ((0, 1), (200_000, 5), (10**6, 3))
        ),
    ],
    columns=list(CURVE_COLUMNS),
)


def test_the_comparison_of_hand_made_rows() -> None:
    curves = with_cpu_time(CURVES, COSTS)
    assert list(dict.fromkeys(curves["variant"])) == ["slow", "fast"]
    rows = episodes(
        {
            "slow-0": [0.02, 0.02],
            "slow-1": [0.04, 0.04],
            "fast-0": [0.02, 0.04],
            "fast-1": [0.02, 0.04],
        }
    )
    table = comparison(COSTS, curves, rows).set_index("way")
    slow, fast = table.loc["slow"], table.loc["fast"]
    assert (slow["decisions a CPU second"], fast["decisions a CPU second"]) == ("10,000", "50,000")
    assert (slow["CPU s of the run"], fast["CPU s of the run"]) == ("100", "20")
    # The untrained agent's gap of 1 % does not count; slow had done 200,000 decisions in 20 s.
    equal = "validation gap in 20 CPU s (%)"
    assert (slow[equal], fast[equal]) == ("5.50", "4.00")
    assert slow["at the end (%)"] == "3.50"
    few = comparison(COSTS, curves[curves["timesteps"] != 200_000], rows).set_index("way")
    assert few.loc["slow", equal] == "not evaluated"
    below = "every seed below 3.0 % (CPU s)"
    assert (slow[below], fast[below]) == ("0", "0")  # untrained agents of 1 %
    higher = curves.assign(gap_percent=curves["gap_percent"].where(curves["timesteps"] > 0, 99))
    higher = higher.assign(gap_percent=higher["gap_percent"] - 1)
    table = comparison(COSTS, higher, rows).set_index("way")
    assert table.loc["slow", below] == "never"  # the second seed ends at 3 %
    assert slow["held-out gap (%), over cases"] == "3.00 ± 0.00"
    assert slow["over training seeds (%)"] == "3.00 ± 12.71 (n = 2)"
    assert fast["held-out gap (%), over cases"] == "3.00 ± 12.71"
    assert fast["over training seeds (%)"] == "3.00 ± 0.00 (n = 2)"
    assert slow["each training seed (%)"] == "2.00, 4.00"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "defualt"], "did you mean 'default'"),
        (["--parts", "trian"], "did you mean 'train'"),
        (["--repeats", "0"], "--repeats must lie in 1"),
        (["--parts", "evaluate"], "begin with --parts train"),
        (["--parts", "measure"], "begin with --parts train"),
        (["--parts", "report"], "begin with --parts measure,evaluate"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        run(study_training_speed.main, [*folders, *options])
    assert stop.value.code == 2
    assert message in errors.getvalue()
    assert len(errors.getvalue().strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_train_reads_the_ways_as_they_are_meant(tmp_path: Path) -> None:
    """By default 600,000 timesteps have 19 environments; a batch is a quarter of a rollout."""
    read = {
        way: train.read_args(arguments(Run("GSM8K-v0", way, 1, 600_000), tmp_path)) for way in WAYS
    }
    shapes = {way: (h.environments, h.steps, h.batch_size) for way, h in read.items()}
    assert shapes["default"] == (19, 256, 1216)
    assert shapes["segments-64-width-64-epochs-2"] == (76, 64, 1216)
    nets = {way: (h.width, h.epochs) for way, h in read.items()}
    assert nets.pop("default") == (128, 4)
    assert set(nets.values()) == {(64, 2)}
    assert {h.evaluate_every for h in read.values()} == {75_000}
