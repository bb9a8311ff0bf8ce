"""The picture of a training run: its charts of known event files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.lines import Line2D
from torch.utils.tensorboard import SummaryWriter

from servegym.agents.dashboard import draw_training_dashboard
from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.record import begin_run
from servegym.envs import ServegymError
from servegym.envs.pictures import to_png
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import dashboard as script

REFERENCES = {"hybrid": 6.0, "threshold-15": 3.0}
GAPS_PERCENT = {0: 40.0, 1000: 5.0, 2000: 2.0}
PICTURE = np.full((90, 1100, 3), 127, np.uint8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it: three evaluations, two rollouts, two references."""
    folder = tmp_path_factory.mktemp("run")
    begin_run(TASKS["servegym/Tiny-v0"], Hyperparameters(seed=7), folder, "", resume=False)
    with SummaryWriter(str(folder / "tensorboard")) as log:
        for step, gap in GAPS_PERCENT.items():
            log.add_scalar("serving/gap", gap, step)
            log.add_scalar("serving/prefill_stages", gap + 1, step)
            log.add_scalar("serving/client_utilization", 0.9, step)
            log.add_scalar("serving/decode_utilization", 0.8, step)
            log.add_scalar("serving/decision_ms_p99", 0.02, step)
            log.add_image("serving/gantt", PICTURE, step, dataformats="HWC")
        for step in (1000, 2000):
            log.add_scalar("serving/train_gap", 9.0, step)
            for action, share in (("decode", 0.7), ("fcfs", 0.2), ("longest", 0.1)):
                log.add_scalar(f"serving/train_action_share/{action}", share, step)
    for policy, value in REFERENCES.items():
        with SummaryWriter(str(folder / "tensorboard" / f"reference-{policy}")) as log:
            log.add_scalar("serving/gap", value, 0)
    return folder


def heights(line: Line2D, axis: Literal["x", "y"] = "y") -> list[float]:
    data = line.get_xdata() if axis == "x" else line.get_ydata()
    return [float(value) for value in np.asarray(data)]


def test_charts_show_the_events(finished: Path) -> None:
    figure = draw_training_dashboard(finished)
    charts = {axes.get_title(loc="left"): axes for axes in figure.axes}
    gap = charts["gap to the proven lower bound (%)"]
    lines = {str(line.get_label()): line for line in gap.get_lines()}
    agent = lines["agent, greedy, on validation cases"]
    assert dict(zip(heights(agent, "x"), heights(agent), strict=True)) == GAPS_PERCENT
    assert heights(lines["training episodes"]) == [9, 9]
    assert set(heights(lines["hybrid (6.00 %)"])) == {6}
    assert set(heights(lines["threshold-15 (3.00 %)"])) == {3}
    assert gap.get_ylim() == (0, 18)  # three times the hybrid's; higher gaps are written there
    assert [text.get_text() for text in gap.texts] == ["↑ 40 %"]
    stages = charts["prefill stages an episode"].get_lines()
    assert [heights(line) for line in stages] == [[41, 6, 3]]
    latency = charts["one decision (µs)"].get_lines()
    assert [heights(line) for line in latency] == [pytest.approx([20, 20, 20])]
    rules = charts["actions chosen, share of decisions"]
    assert [bands.get_label() for bands in rules.collections] == ["fcfs", "longest"]
    tops = [bands.get_datalim(rules.transData).ymax for bands in rules.collections]
    assert tops == pytest.approx([0.2, 0.3])
    title = figure.get_suptitle()
    assert title == "Tiny-v0: maskable-ppo, seed 7; best gap 2.00 % after 2,000 decisions"


def test_the_best_may_be_the_first_gap_that_was_logged(tmp_path: Path) -> None:
    begin_run(TASKS["servegym/Tiny-v0"], Hyperparameters(seed=7), tmp_path, "", resume=False)
    with SummaryWriter(str(tmp_path / "tensorboard")) as log:  # at step 0 cases were cut short
        for step, gap in {1000: 2.0, 2000: 5.0}.items():
            log.add_scalar("serving/gap", gap, step)
    title = draw_training_dashboard(tmp_path).get_suptitle()
    assert title.endswith("best gap 2.00 % after 1,000 decisions")


def test_the_last_gantt_chart_is_there_pixel_by_pixel(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "run.png"
    assert script.main(["--run", str(finished), "--output", str(output)]) == 0
    pixels = imread(output)
    assert pixels.shape[:2] == (600 + 90, 1100)
    assert np.allclose(pixels[-90:, :, :3], 127 / 255)
    assert [path.name for path in output.parent.iterdir()] == ["run.png"]


def test_a_run_without_evaluations(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "run.json", tmp_path)
    with SummaryWriter(str(tmp_path / "tensorboard")) as log:
        log.add_scalar("serving/train_gap", 9.0, 1000)
    figure = draw_training_dashboard(tmp_path)
    assert figure.get_suptitle() == "Tiny-v0: maskable-ppo, seed 7"
    assert to_png(figure).startswith(b"\x89PNG")


def test_bad_input(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    output = tmp_path / "out" / "run.png"
    options = ["--run", str(run), "--output", str(output)]
    with pytest.raises(ServegymError, match=r"must end in \.png"):
        script.main([*options[:3], str(tmp_path / "run.jpg")])
    (run / "run.json").write_text(json.dumps({"task": 1}))
    with pytest.raises(ServegymError, match="not the record of a run"):
        script.main(options)
    shutil.rmtree(run / "tensorboard")
    with pytest.raises(ServegymError, match="tensorboard: no event files"):
        script.main(options)
    assert not output.parent.exists()
