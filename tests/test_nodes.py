"""Calls on a cluster's workers, by a backend that makes them here: no result lost, all refusals one line."""

from __future__ import annotations

import importlib.util
import operator
import os
import re
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs import ServegymError, load_task
from servegym.envs.playing.evaluation import evaluate
from servegym.envs.playing.nodes import addresses, driver, worker
from servegym.envs.playing.nodes.addresses import connect, parse_address
from servegym.envs.playing.nodes.carry import packed, unpacked
from servegym.envs.playing.nodes.driver import Nodes
from servegym.envs.playing.nodes.identity import check_same, identity
from servegym.envs.task.sections import WorkloadConfig
from servegym.studies.policies import AGENTS
from servegym.studies.policies import make_policy as make_any_policy
from tests.test_scripts import refused

TINY = load_task("Tiny-v0")
TIMED = ["decision_ms_p50", "decision_ms_p99", "prepare_s"]
"""Columns that depend on the clock."""


class HereBackend:
    """Makes the calls in this process, when they are asked for; the last batch comes first."""

    address = "here"

    def __init__(self, slots: int = 2) -> None:
        self.workers = slots
        self.sizes: list[int] = []
        self.cancelled: list[Hashable] = []
        self.closed = False
        self._batches: dict[Hashable, tuple[bytes, bytes]] = {}

    def probe(self, function: Callable[[], Any]) -> Mapping[str, Any]:
        return {"w1": function()}

    def slots(self) -> int:
        return self.workers

    def share(self, job: bytes) -> bytes:
        return job

    def submit(self, shared: bytes, batch: bytes) -> Hashable:
        self.sizes.append(len(unpacked(batch)))
        self._batches[len(self.sizes)] = shared, batch
        return len(self.sizes)

    def finished(self, timeout_s: float) -> Collection[Hashable]:
        return list(self._batches)[-1:]

    def result(self, name: Hashable) -> bytes:
        return worker.work(*self._batches.pop(name))

    def cancel(self, names: Collection[Hashable]) -> None:
        self.cancelled += names

    def close(self) -> None:
        self.closed = True


class SlowRay(ModuleType):
    """Stands for the module of Ray, at a cluster that never lets anybody in."""

    def __init__(self) -> None:
        super().__init__("slow")

    class RayBackend(HereBackend):
        def __init__(self, address: str, target: str) -> None:
            time.sleep(1)
            raise ServegymError(f"{address}, {target}: too late")


def test_every_result_comes_once_in_any_order() -> None:
    results = list(Nodes(HereBackend()).run(operator.add, [(k, 1) for k in range(500)]))
    assert results != sorted(results)
    assert sorted(results) == list(range(1, 501))


def test_small_calls_go_in_batches_and_long_ones_alone() -> None:
    backend = HereBackend()
    list(Nodes(backend).run(operator.add, [(k, 1) for k in range(3000)]))
    assert backend.sizes[:2] == [1, 1]  # nothing is known of the first calls
    assert max(backend.sizes) == driver.MAX_BATCH
    assert len(backend.sizes) < 12
    pace = driver.Pace()
    pace.note(10, 10 * driver.LONG_S)
    assert (pace.depth, pace.batch(100, 2)) == (1, 1)
    pace.note(990, 0.0)  # 0.05 s a call from here on
    assert (pace.depth, pace.batch(100, 2)) == (2, 10)
    assert pace.batch(7, 2) == 2  # towards the end all workers get a share
    assert pace.batch(10**6, 600) == 120  # 6 s: the driver serves 600 workers


def test_arguments_may_be_added_while_results_come() -> None:
    waiting = deque([(3,)])
    seen = []
    for result in Nodes(HereBackend()).run(abs, waiting):
        seen.append(result)
        if result > 1:
            waiting.append((result - 1,))
    assert seen == [3, 2, 1]


def test_an_error_keeps_what_came_before_and_gives_up_the_rest() -> None:
    backend = HereBackend()
    results = Nodes(backend).run(operator.truediv, [(1, 1), (1, 0), (1, 2), (1, 4)])
    seen: list[float] = []
    with pytest.raises(ZeroDivisionError) as raised:
        seen.extend(results)
    assert "on worker" in raised.value.__notes__[0]
    assert seen == []  # the first batch to come is the second
    assert len(backend.cancelled) == 1


def test_a_generator_that_is_closed_gives_up_what_is_under_way() -> None:
    backend = HereBackend()
    with closing(Nodes(backend).run(abs, [(k,) for k in range(9)])) as results:
        next(results)
    assert backend.cancelled


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_without_workers_ends_after_a_while(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_S", 0.0)
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.0)
    nodes = Nodes(HereBackend(left))
    if left:
        assert list(nodes.run(abs, [(-1,)])) == [1]
        return
    with pytest.raises(ServegymError, match=r"^here: no worker is left; what is finished is kept"):
        list(nodes.run(abs, [(-1,)]))


# ---- which workers are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            ModuleNotFoundError("No module named 'servegym'"),
            r"worker w2 lacks servegym \(No module",
        ),
        (RuntimeError("two\nlines"), "worker w2 cannot run servegym: RuntimeError: two lines"),
        ({"servegym": "0.0.9"}, r"worker w2 has servegym 0.0.9, here .*; install the same there"),
        ({"numpy": "1.0"}, "worker w2 has numpy 1.0, here "),
        ({"sources": "abc"}, r"worker w2 has servegym .* of other sources \(abc, here "),
        ({}, ""),
    ],
)
def test_a_worker_of_another_version_is_refused(
    found: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = HereBackend()
    other = found if isinstance(found, Exception) else identity() | found
    monkeypatch.setattr(backend, "probe", lambda function: {"w1": identity(), "w2": other})
    if not line:
        Nodes(backend)
        return
    with pytest.raises(ServegymError, match=line) as raised:
        Nodes(backend)
    assert "\n" not in str(raised.value)
    assert backend.closed


def test_a_worker_that_comes_later_is_checked_before_it_reads_a_function() -> None:
    job = unpacked(worker.pack_job(abs, ""))
    job["identity"]["numba"] = "0.1"
    outcome = unpacked(worker.work(packed(job | {"function": b"unreadable"}), packed([(1,)])))
    assert "numba" in str(outcome.error)
    assert "here 0.1; install the same there" in str(outcome.error)


def test_the_identity_knows_what_results_depend_on() -> None:
    assert set(identity()) == {
        "servegym",
        "numpy",
        "numba",
        "scipy",
        "highspy",
        "Python",
        "sources",
    }
    check_same("w", identity(), identity())


def test_a_module_that_a_worker_lacks_is_one_line() -> None:
    def call() -> None:
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(ServegymError, match=r"worker .* No module named 'no_such_module'; install"):
        list(Nodes(HereBackend()).run(call, [()]))


# ---- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "target"),
    [
        ("tcp://10.0.0.1:8786", "dask", "tcp://10.0.0.1:8786"),
        ("tls://node-1:1", "dask", "tls://node-1:1"),
        ("tcp://[::1]:65535", "dask", "tcp://[::1]:65535"),
        ("ray://head:10001", "ray", "ray://head:10001"),
        ("ray:auto", "ray", "auto"),
        ("ray:10.0.0.1:6379", "ray", "10.0.0.1:6379"),
    ],
)
def test_addresses(text: str, kind: str, target: str) -> None:
    assert parse_address(text)[:2] == (kind, target)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "10.0.0.1:8786",
            r"is no address; did you mean tcp://10.0.0.1:8786 or ray:10.0.0.1:8786\?",
        ),
        ("auto", r"is no address; write tcp://HOST:PORT of a dask scheduler, "),
        ("http://head:80", "is no address; write tcp"),
        ("tcp://head", "must end in HOST:PORT with a port in 1 … 65535"),
        ("tcp://head:0", "must end in HOST:PORT with a port in 1 … 65535"),
        ("tcp://head:65536", "must end in HOST:PORT with a port in 1 … 65535"),
        ("tcp://:8786", "must end in HOST:PORT"),
        ("ray:", "must end in HOST:PORT"),
        ("ray://head:" + "9" * 400, "must end in HOST:PORT"),
    ],
)
def test_wrong_addresses(text: str, line: str, tmp_path: Path) -> None:
    said = refused("evaluate", tmp_path / "out", "--cluster", text, "--task", "Tiny-v0")
    assert re.search(line, said)
    assert len(said) < 450


@pytest.mark.parametrize(("text", "extra"), [("tcp://head:1", "cluster"), ("ray:auto", "ray")])
def test_an_extra_that_is_missing_says_how_to_get_it(
    text: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServegymError, match=rf"pip install 'servegym\[{extra}\]'`$"):
        connect(text)


@pytest.mark.parametrize("start", ["tcp://", "ray://", "ray:"])
def test_nobody_answers(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ServegymError, match=rf"--cluster {start}.*: nobody answers there: "):
        connect(f"{start}127.0.0.1:{port}")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kept", [False, True])
def test_rays_client_shows_the_token_that_this_machine_has(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if kept:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(addresses.LIMITS_S, "ray", 0.2)
    monkeypatch.setitem(sys.modules, "servegym.envs.playing.nodes.ray_backend", SlowRay())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            ServegymError, match=r"not answer as a Ray cluster; where it asks for a token, copy"
        ):
            connect(f"ray://127.0.0.1:{port}")
        assert os.environ.get("RAY_AUTH_MODE") == ("token" if kept else None)
        with pytest.raises(ServegymError, match=r"not answer as a Ray cluster$"):
            connect(f"ray:127.0.0.1:{port}")


# ---- what goes along -------------------------------------------------------------------------------


def rows(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=TIMED)


def test_results_are_those_of_a_local_run(tmp_path: Path) -> None:
    """Also those of an agent and a workload file that are gone when the worker plays, and the records."""
    agent, file = tmp_path / "agent", tmp_path / "requests.csv"
    shutil.copytree(AGENTS / "Tiny-v0", agent, ignore=shutil.ignore_patterns("seeds", "validation"))
    file.write_text("prompt_tokens,output_tokens\n70,3\n55,12\n90,5\n40,20\n10,9\n")
    task = replace(TINY, workload=WorkloadConfig(source=str(file)))
    names = ["random", "hybrid", str(agent)]

    class Forgetful(HereBackend):
        def result(self, name: Hashable) -> bytes:
            for path in (agent, file):
                path.rename(tmp_path / f"gone-{path.name}")
            try:
                return super().result(name)
            finally:
                for path in (agent, file):
                    (tmp_path / f"gone-{path.name}").rename(path)

    def policy_of(name: str) -> Any:
        return make_any_policy(name, task.name)

    crews: dict[str, Any] = {"here": 1, "there": Nodes(Forgetful())}
    for name, crew in crews.items():
        evaluate(
            *(task, policy_of, names, range(4), tmp_path / name),
            jobs=crew, progress=False, records=True,
        )  # fmt: skip
    here, there = tmp_path / "here", tmp_path / "there"
    tables = [pd.read_csv(folder / "episodes.csv") for folder in (here, there)]
    pd.testing.assert_frame_equal(rows(tables[0]), rows(tables[1]), check_exact=True)
    for path in [here / "task.json", *(here / "records").iterdir()]:
        assert path.read_bytes() == (there / path.relative_to(here)).read_bytes()
    assert len(list((there / "records").iterdir())) == 12


def test_a_users_policy_goes_along_with_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_nodes.py").write_text(
        "from servegym.envs import Policy\n\n\nclass First(Policy):\n"
        "    def act(self, situation):\n        return int(situation.mask.argmax())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    nodes = Nodes(HereBackend())
    policy_of = nodes.carried(
        lambda name: make_any_policy(name, TINY.name), ["mine_of_nodes:First"]
    )
    del sys.modules["mine_of_nodes"]
    (tmp_path / "mine_of_nodes.py").unlink()
    assert type(policy_of("mine_of_nodes:First")).__name__ == "First"


def test_a_resumed_run_plays_only_what_is_missing(tmp_path: Path) -> None:
    backend = HereBackend()
    for count in (3, 5):
        evaluate(
            *(TINY, make_policy, ["fcfs"], range(count), tmp_path),
            jobs=Nodes(backend), progress=False,
        )  # fmt: skip
    assert sum(backend.sizes) == 5


# ---- kernels, once a node --------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "compiled"), [(0, 1), (3, 2)])
def test_kernels_are_compiled_once_a_node(
    status: int, compiled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "warms.py").write_text(
        f"import os, sys\nopen({str(tmp_path / 'log')!r}, 'a').write('x')\n"
        f"assert os.environ['SERVEGYM_PARENT']\nsys.exit({status})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMBA_DISABLE_JIT", raising=False)
    for _ in range(2):  # two processes of a node
        worker.compile_once.__wrapped__("warms")
    assert (tmp_path / "log").read_text() == "x" * compiled  # a failure is tried again
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    worker.compile_once.__wrapped__("nowhere")


def test_a_call_is_wanted_outside_of_dask() -> None:
    assert worker.is_wanted()
