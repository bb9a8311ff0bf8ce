"""Two local workers of dask and of Ray: the results of a local run, also when one of them is killed.

Skipped where the extra is not installed; ``.ci/clusters`` runs it in an environment that has both.
"""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

from servegym.baselines.registry import make_policy
from servegym.envs import ServegymError, load_task
from servegym.envs.playing.evaluation import evaluate
from servegym.envs.playing.nodes import driver
from servegym.envs.playing.nodes.driver import Nodes
from servegym.studies.agents.processes import Slice, files_in
from servegym.studies.agents.runs import Run, train_all
from tests.test_nodes import rows

TINY = load_task("Tiny-v0")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries and their processes


@pytest.fixture(scope="module")
def dask_nodes() -> Iterator[Nodes]:
    distributed = pytest.importorskip("distributed")
    from servegym.envs.playing.nodes.addresses import connect

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        connect(cluster.scheduler_address) as nodes,
    ):
        yield nodes


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray")
    from servegym.envs.playing.nodes.ray_backend import RayBackend

    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False
    )  # fmt: skip
    with Nodes(RayBackend("ray:test", None)) as nodes:
        yield nodes
    ray.shutdown()


@pytest.fixture(params=["dask", "ray"])
def nodes(request: pytest.FixtureRequest) -> Nodes:
    found: Nodes = request.getfixturevalue(f"{request.param}_nodes")
    return found


def name_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_results_are_those_of_a_local_run(nodes: Nodes, tmp_path: Path) -> None:
    tables = {}
    for name, crew in {"here": 1, "there": nodes}.items():
        options: dict[str, Any] = {"jobs": crew, "progress": False, "records": True}
        evaluate(TINY, make_policy, ["random", "hybrid"], range(30), tmp_path / name, **options)
        tables[name] = pd.read_csv(tmp_path / name / "episodes.csv")
    pd.testing.assert_frame_equal(rows(tables["here"]), rows(tables["there"]), check_exact=True)
    for path in (tmp_path / "here" / "records").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / "records" / path.name).read_bytes()


def test_a_worker_that_is_killed_loses_nothing(nodes: Nodes) -> None:
    results = []
    with closing(nodes.run(name_after, [(0.05,)] * 80)) as coming:
        for pid in coming:
            results.append(pid)
            if len(results) == 10:
                os.kill(pid, signal.SIGKILL)
    assert len(results) == 80
    assert len(set(results)) >= 2


def test_a_call_that_kills_its_workers_ends_the_run_in_a_line(nodes: Nodes) -> None:
    with pytest.raises(
        driver.WorkerLostError, match="a call has lost 4 workers one after the other"
    ):
        list(nodes.run(os._exit, [(3,)]))
    assert list(nodes.run(abs, [(-1,)])) == [1]


def test_an_error_comes_back_with_its_worker(nodes: Nodes) -> None:
    with pytest.raises(ServegymError, match="threshold-0"):
        list(nodes.run(make_policy, [("threshold-0",)]))
    with pytest.raises(ZeroDivisionError) as raised:
        list(nodes.run(divmod, [(1, 0)]))
    assert "on worker" in raised.value.__notes__[0]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra train")
def test_training_gives_the_files_of_a_local_run(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices, each of which goes on where the last one ended; but for times."""
    monkeypatch.setattr(Slice.__init__, "__defaults__", (0.0,))
    training = Run("Tiny-v0", "main", 0, 20_000)
    kept = {}
    crews: dict[str, Any] = {"here": 1, "there": nodes}
    for place, crew in crews.items():
        folder = tmp_path / place
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert train_all([training], Path("runs"), crew) == []
        kept[place] = files_in(folder / "runs" / training.name)
    assert kept["here"].keys() >= {"run.json", "final/agent.json", "agent/agent.safetensors"}
    timed = ("tensorboard", "evaluations.csv", "checkpoints")  # they note seconds
    for name, content in kept["here"].items():
        if not name.startswith(timed):
            assert content == kept["there"][name], name
    here, there = (
        pd.read_csv(io.BytesIO(files["evaluations.csv"])).drop(
            columns=["wall_s", "training_s", "decision_ms_p50", "decision_ms_p99"]
        )
        for files in kept.values()
    )
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    last = max(name for name in kept["here"] if name.startswith("checkpoints"))
    weights = [safetensors.numpy.load(files[last]) for files in kept.values()]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])
