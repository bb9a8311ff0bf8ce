"""The study of agents: its runs, their processes, and tables of hand-made rows."""

from __future__ import annotations

import io
import json
import time
from contextlib import closing, redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servegym.agents.network import Network
from servegym.agents.policy import load_agent, save_agent
from servegym.envs import ServegymError, load_task
from servegym.envs.playing.nodes.driver import Nodes
from servegym.envs.process.observation import FEATURES
from servegym.studies.agents import processes, runs
from servegym.studies.agents.ablations import ablation_summary, ablation_table
from servegym.studies.agents.comparing import verdict
from servegym.studies.agents.play import CURVE_COLUMNS, evaluate_agents, settings
from servegym.studies.agents.report import (
    closed_by,
    minutes_to_pass,
    policy_table,
    reference_lines,
    seed_table,
    transfer_table,
)
from servegym.studies.agents.runs import Run, arguments, grid, train_all
from servegym.studies.cli import run
from servegym.studies.commands import study_agents, train
from servegym.studies.tuned import tuned_threshold
from tests.test_nodes import HereBackend
from tests.test_summary import episodes

TINY = load_task("Tiny-v0")


def default_grid() -> list[Run]:
    args = study_agents.Args()
    return study_agents.make_grid(args, args.tasks.split(","))


def test_the_grid_is_what_the_study_needs() -> None:
    """All tasks with five seeds; every round; each rule left out; with imitation; no masks."""
    runs = default_grid()
    names = [training.name for training in runs]
    tasks = ("GSM8K-v0", "Paper-v0", "Tiny-v0", "GSM8KPredicted-v0")
    main = [f"{task}/main/{seed}" for task in tasks for seed in range(5)]
    assert names[:20] == main  # the most valuable first
    rules = load_task("GSM8K-v0").process.rules
    variants = {"short", "imitation", "every-round", "ppo-unmasked"}
    variants |= {f"without-{rule}" for rule in rules}
    assert set(names[20:]) == {f"GSM8K-v0/{variant}/0" for variant in variants}
    assert [training.timesteps for training in runs[4:20:5]] == [
        8_000_000,
        50_000,
        300_000,
        3_000_000,
    ]
    assert {training.timesteps for training in runs[20:]} == {2_000_000}
    assert [training.policy for training in (runs[1], runs[20])] == ["ppo-1", "short-0"]


def test_ablations_are_of_one_task_only() -> None:
    assert grid(["Tiny-v0"], ["main", "short"], {"Tiny-v0": 9}, 1, 9, [0]) == [
        Run("Tiny-v0", "main", 0, 9)
    ]


@pytest.mark.parametrize("training", default_grid(), ids=lambda run: str(run.name))
def test_train_reads_the_arguments_as_they_are_meant(training: Run, tmp_path: Path) -> None:
    args = train.read_args(arguments(training, tmp_path))
    task, home = load_task(args.task), load_task(training.task)
    assert (args.seed, args.timesteps, args.output) == (
        training.seed,
        training.timesteps,
        tmp_path / training.name,
    )
    assert task.cost == home.cost
    assert task.workload == home.workload
    left_out = set(home.process.rules) - set(task.process.rules)
    assert left_out == {training.variant.removeprefix("without-")} & set(home.process.rules)
    assert task.process.decisions == ("rounds" if training.variant == "every-round" else "events")
    assert args.algorithm == ("ppo" if training.variant == "ppo-unmasked" else "maskable-ppo")
    imitated = (args.imitation_rounds, args.imitation_states, args.expert)
    assert (imitated == (2, 15000, "aligned-lookahead-0.7")) == (training.variant == "imitation")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces train.py: notes the arguments, writes the files of a run; seed 1 fails."""
    script = tmp_path / "train.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "words = sys.argv[1:]\n"
        "folder = pathlib.Path(words[words.index('--output') + 1])\n"
        "(folder / 'final').mkdir(parents=True, exist_ok=True)\n"
        "timesteps = int(words[words.index('--timesteps') + 1])\n"
        "content = {'hyperparameters': {'timesteps': timesteps}, 'words': words, 'task': {}}\n"
        "content |= {'observation_version': 2, 'command': ''}\n"
        "(folder / 'run.json').write_text(json.dumps(content))\n"
        "if words[words.index('--seed') + 1] == '1': sys.exit('no luck')\n"
        "(folder / 'final' / 'agent.json').write_text('')\n"
    )
    monkeypatch.setattr(runs, "TRAIN", (str(script),))
    return script


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stop_ends_what_runs(jobs: int, stub: Path, tmp_path: Path) -> None:
    """Closing the runs, as Ctrl-C does, leaves no training behind."""
    stub.write_text(
        "import os, pathlib, sys, time\n"
        "words = sys.argv[1:]\n"
        "if words[words.index('--seed') + 1] == '0': sys.exit()\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    waiting = [Run("Tiny-v0", "main", seed, 100) for seed in range(2)]
    pid = tmp_path / "pid"
    with closing(runs._train_here(waiting, tmp_path / "runs", jobs)) as ended:
        assert next(ended) == (waiting[0], 0)
        if jobs == 2:
            while not (pid.is_file() and pid.read_text()):
                time.sleep(0.01)
    if jobs == 2:
        deadline = time.monotonic() + 20
        while Path("/proc", pid.read_text()).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path("/proc", pid.read_text()).exists()
    else:
        assert not pid.exists()  # no more are started


@pytest.mark.usefixtures("stub")
def test_runs_are_resumed_or_skipped_and_failures_named(tmp_path: Path) -> None:
    runs = [Run("Tiny-v0", "main", seed, 100) for seed in range(3)]

    def resumed(seed: int) -> bool:
        record = json.loads((tmp_path / runs[seed].name / "run.json").read_text())
        return "--resume" in record["words"]

    log = tmp_path / "Tiny-v0" / "main" / "1.log"
    assert train_all(runs, tmp_path, 2) == [f"Tiny-v0/main/1 failed; see {log}"]
    assert log.read_text() == "no luck\n"
    assert not resumed(1)
    assert len(train_all(runs, tmp_path, 2)) == 1
    assert [resumed(seed) for seed in range(3)] == [False, True, False]
    with pytest.raises(ServegymError, match="a run of 100 timesteps, not 200"):
        train_all([Run("Tiny-v0", "main", 0, 200)], tmp_path, 1)


SLICED = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
assert not folder.is_absolute()
begun = folder / "run.json"
print("resumed" if "--resume" in sys.argv else "begun", flush=True)
assert begun.is_file() == ("--resume" in sys.argv)
old = sorted(folder.glob("checkpoints/*"))
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / ".x.tmp").write_text("")
begun.write_text("{}")
if len(old) < 2:
    (folder / "checkpoints" / f"{len(old)}.safetensors").write_text("")
    time.sleep(60)
old[0].unlink()
(folder / "final").mkdir()
(folder / "final" / "agent.json").write_text(folder.as_posix())
"""
"""Stands for train.py: keeps a checkpoint a slice and is finished with the third."""


def test_a_run_on_a_cluster_goes_from_slice_to_slice(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files go along and come back; the driver's folder is that of a local run in the end."""
    stub.write_text(SLICED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes.Slice.__init__, "__defaults__", (0.0,))
    for folder in (Path("runs"), tmp_path / "more"):
        training = Run("Tiny-v0", "main", 0, 100)
        assert train_all([training], folder, Nodes(HereBackend())) == []
        kept = sorted(processes.files_in(folder / training.name))
        assert kept == [
            *("checkpoints/1.safetensors", "final/agent.json", "run.json"),
        ]
        noted = (folder / training.name / "final" / "agent.json").read_text()
        assert noted == processes.without_root(folder / training.name).as_posix()
        log = (folder / "Tiny-v0" / "main" / "0.log").read_text()
        assert log == "begun\nresumed\nresumed\n"


def test_a_worker_that_cannot_train_is_refused(stub: Path, tmp_path: Path) -> None:
    part = runs._slice(0, Run("Tiny-v0", "main", 0, 100), tmp_path)
    part = replace(part, versions={**part.versions, "torch": "0.1"})
    with pytest.raises(ServegymError, match=r"worker .* has torch .*, here 0.1; install the same"):
        list(Nodes(HereBackend()).run(processes.train_slice, [(part,)]))


def make_run(training: Run, runs: Path, gap_percent: float) -> None:
    """What a finished run of random weights leaves."""
    generator = np.random.default_rng(training.seed)
    weights = generator.normal(size=(7, len(FEATURES))).astype(np.float32)
    network = Network([(weights, np.zeros(7, np.float32))])
    for name in ("agent", "final"):
        save_agent(network, runs / training.name / name, TINY.actions, "events", {}, {})
    rows = {"timesteps": [0, training.timesteps], "wall_s": [0.0, 9.0], "training_s": [0.0, 6.0]}
    table = pd.DataFrame(rows).assign(gap_percent=[90.0, gap_percent])
    table.to_csv(runs / training.name / "evaluations.csv", index=False)


def test_agents_are_copied_played_and_tabulated(tmp_path: Path) -> None:
    runs, output = tmp_path / "runs", tmp_path / "out"
    chosen = [Run("Tiny-v0", "main", seed, 100) for seed in range(3)]
    for training, gap_percent in zip(chosen[:2], (30.0, 25.0), strict=True):
        make_run(training, runs, gap_percent)
    evaluate_agents("Tiny-v0", chosen, runs, output, 2, 1)  # seed 2 is not finished
    folder = output / "Tiny-v0"
    digests = [
        load_agent(path).card.weights_sha256
        for path in (folder, folder / "seeds/1", folder / "seeds/0")
    ]
    assert digests[0] == digests[1] != digests[2]  # seed 1 is the best by validation
    curves = pd.read_csv(folder / "curves.csv")
    assert tuple(curves.columns) == CURVE_COLUMNS
    assert len(curves) == 4
    options = ["--parts", "report", "--tasks", "Tiny-v0", "--output", str(output)]
    assert study_agents.main([*options, "--runs", str(tmp_path / "gone")]) == 0
    for name, words in (("table.md", "**ppo (2 seeds)**"), ("seeds.md", "never")):
        text = (folder / name).read_text()
        assert text.startswith("# Tiny-v0")
        assert "`python scripts/study_agents.py --parts report" in text
        assert words in text
    picture = (folder / "learning_curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000
    # Other weights under a name that has been played are refused, and nothing is overwritten.
    make_run(Run("Tiny-v0", "main", 5, 100), runs, 1.0)
    (runs / "Tiny-v0/main/1/agent").rename(runs / "old")
    (runs / "Tiny-v0/main/5/agent").rename(runs / "Tiny-v0/main/1/agent")
    with pytest.raises(ServegymError, match="other weights of 'ppo-1'"):
        evaluate_agents("Tiny-v0", chosen, runs, output, 2, 1)
    assert load_agent(folder / "seeds/1").card.weights_sha256 == digests[1]


ROWS = episodes(
    {
        "hybrid": [0.06, 0.08],
        "threshold-12": [0.03, 0.03],
        "rollout": [0.01, 0.01],
        "ppo-0": [0.02, 0.04],
        "ppo-1": [0.02, 0.02],
        "without-plan-0": [0.03, 0.05],
        "short-0": [0.04, 0.06],
    }
)
CURVES = pd.DataFrame(
    [
        ("main", 0, 0, 0.0, 50.0),
        ("main", 0, 100, 60.0, 4.0),
        ("main", 0, 200, 120.0, 3.0),
        ("main", 1, 200, 120.0, 8.0),
        ("without-plan", 0, 100, 90.0, 5.0),
        ("short", 0, 100, 60.0, 4.5),
    ],
    columns=list(CURVE_COLUMNS),
)


def test_the_policy_table_of_hand_made_rows() -> None:
    table = policy_table(ROWS).set_index("policy")
    names = ["hybrid", "threshold-12", "rollout", "**ppo (2 seeds)**", "ppo-0", "ppo-1"]
    assert list(table.index) == names  # no ablations
    both = table.loc["**ppo (2 seeds)**"]
    # With seeds drawn anew the first case always has 2 %, the second 2, 3 or 4 %.
    assert both["gap (%)"] == "2.50 [2.00, 3.00]"
    assert both["− hybrid (points)"] == "-4.50 [-5.00, -4.00]"
    # The best simple rule; rollout searches, so it is none.
    assert both["− threshold-12 (points)"] == "-0.50 [-1.00, 0.00]"
    assert both["of hybrid's gap closed (%)"] == "64"  # 1 − 2.5 / 7
    assert table.loc["threshold-12", "− threshold-12 (points)"] == ""
    assert table.loc["ppo-0", "gap (%)"] == "3.00 ± 12.71"


def test_the_seed_table_of_hand_made_rows() -> None:
    table = seed_table(ROWS, CURVES, episodes({"hybrid": [0.05, 0.05]}))
    assert list(table["passes hybrid's 5.00 % (min)"]) == ["1.0", "never"]
    assert list(table["closed in 15 min (%)"]) == ["40", "-60"]
    assert list(table["best validation gap (%)"]) == ["3.00", "8.00"]
    assert list(table["− hybrid (points)"]) == ["-4.00 ± 0.00 better", "-5.00 ± 12.71 not clear"]
    assert not any("aligned" in str(column) for column in table)  # nobody played it


def test_the_ablation_table_of_hand_made_rows() -> None:
    table = ablation_table(ROWS, CURVES).set_index("variant")
    row = table.loc["without-plan"]
    assert row["timesteps"] == "100"
    assert row["best validation gap (%)"] == "5.00"
    assert row["main's until then (%)"] == "4.00"  # not the 3 % it has at 200
    assert row["− short (points)"] == "-1.00 ± 0.00 better"
    assert row["− main (points)"] == "1.00 ± 0.00 worse"
    assert table.loc["short", "− short (points)"] == ""


def test_the_ablation_summary_names_both_kinds_of_interval_apart() -> None:
    rows = episodes(
        {
            "short-0": [0.01, 0.03],
            "short-1": [0.03, 0.05],
            "without-plan-0": [0.03, 0.05],
            "without-plan-1": [0.05, 0.07],
            "without-plan-2": [0.50, 0.50],  # no short run of that seed to be paired with
            "every-round-0": [0.01, 0.01],
        }
    )
    table = ablation_summary(rows).set_index("variant")
    assert list(table.index) == ["short", "every-round", "without-plan"]
    assert list(table["training seeds"]) == ["2", "1", "2"]
    plan = table.loc["without-plan"]
    # Of two values that lie 2 apart the interval is 12.706 wide to each side.
    assert plan["held-out gap (%), over cases"] == "5.00 ± 12.71"
    assert plan["held-out gap (%), over training seeds"] == "5.00 ± 12.71"
    assert plan["− short (points), over cases"] == "2.00 ± 0.00 worse"
    assert plan["− short (points), over training seeds"] == "2.00 ± 0.00 worse"
    assert table.loc["short", "− short (points), over cases"] == ""
    one = table.loc["every-round"]
    assert one["held-out gap (%), over training seeds"] == "one seed"
    assert one["− short (points), over cases"] == "-1.00 ± 12.71 not clear"


def test_seeds_are_added_to_those_whose_runs_are_gone() -> None:
    args = study_agents.Args(variants="short", ablation_seeds=3, first_ablation_seed=1)
    runs = study_agents.make_grid(args, ["GSM8K-v0"])
    assert [run.name for run in runs] == ["GSM8K-v0/short/1", "GSM8K-v0/short/2"]


def test_the_transfer_table_of_hand_made_rows() -> None:
    rows = episodes({"hybrid": [0.06, 0.08], "threshold-3": [0.03, 0.03], "ppo": [0.01, 0.01]})
    (row,) = transfer_table({"clients-50": rows}).to_dict("records")
    assert (row["K"], row["best rule"], row["n"]) == ("3", "threshold-K", "2")
    assert row["ppo − best rule (points)"] == "-2.00 ± 0.00 better"


def test_a_verdict_needs_an_interval() -> None:
    assert verdict(np.array([-3.0])) == "-3.00 not clear"
    assert verdict(np.array([-3.0, -2.0, -2.5])).endswith("better")
    assert verdict(np.array([-3.0, 3.0])).endswith("not clear")


def test_passing_is_the_first_evaluation_below() -> None:
    curve = pd.DataFrame({"training_s": [0.0, 60.0, 90.0], "gap_percent": [9.0, 5.0, 4.9]})
    assert minutes_to_pass(curve, 5.0) == "1.5"
    assert minutes_to_pass(curve, 4.9) == "never"


def test_what_is_closed_in_time_counts_the_best_agent_until_then() -> None:
    curve = pd.DataFrame({"training_s": [0.0, 60.0, 90.0, 150.0], "gap_percent": [9, 5, 6, 1]})
    assert closed_by(curve, 10.0, 2) == "50"


def test_curves_are_drawn_with_the_best_threshold() -> None:
    rows = episodes({"threshold-1": [0.05], "threshold-12": [0.03], "hybrid": [0.07]})
    assert reference_lines(rows) == pytest.approx({"hybrid": 7.0, "threshold-12": 3.0})


def test_the_settings_of_transfer_scale_with_the_clients() -> None:
    tasks = settings()
    sizes = [(task.cluster.clients, task.workload.requests) for task in tasks.values()]
    assert sizes == [(50, 330), (500, 3298), (2000, 13190), *[(200, 1319)] * 3]
    assert tasks["outputs-cap512"].workload.source == "gsm8k-cap512"
    assert len({task.cost for task in tasks.values()}) == 3
    assert len({task.name for task in tasks.values()}) == 6


def test_thresholds_are_tuned_on_the_setting_itself() -> None:
    # Three clients leave K of 1 and 2 to try.
    assert tuned_threshold(TINY, 3, 1) in {"threshold-1", "threshold-2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "trian"], "did you mean 'train'"),
        (["--parts", ","], "--parts names nothing"),
        (["--tasks", "GSM8K-v1"], "did you mean 'GSM8K-v0'"),
        (["--variants", "every-rund"], "did you mean 'every-round'"),
        (["--seeds", "0"], "--seeds must lie in 1"),
        (["--first-ablation-seed", "1"], "--first-ablation-seed must lie in 0 … 0"),
        (["--cases", "1"], "--cases must lie in 2"),
        (["--jobs", "0"], "--jobs must lie"),
        (["--parts", "evaluate"], "begin with --parts train"),
        (["--parts", "transfer"], "begin with --parts train,evaluate"),
        (["--parts", "report"], "begin with --parts evaluate"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        run(study_agents.main, [*folders, *options])
    assert stop.value.code == 2
    assert message in errors.getvalue()
    assert len(errors.getvalue().strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
