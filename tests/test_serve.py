"""``scripts/serve.py``: what it refuses before anything is made, and how it ends when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from servegym.engines.iterations import next_in_lockstep
from servegym.envs import Policy, ServegymError, Situation
from servegym.studies.commands import serve

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FEW = ["--requests", "3", "--clients", "2"]


def run(output: Path, *options: str) -> int:
    return serve.main([*FEW, "--output", str(output), *options])


def files(output: Path) -> list[str]:
    return sorted(str(each.relative_to(output)) for each in output.rglob("*") if each.is_file())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "Chat-v0"], "a twin has no limit of KV memory"),
        (["--task", "Cluster-v0"], "a twin has one replica"),
        (["--model", "smollm2"], "take --task GSM8KPredicted-v0"),
        (["--model", "nowhere"], "no such folder"),
        (["--clock", "wall", "--compare", "fcfs,ppo"], "take --clock busy"),
        (["--port", "8000"], "leave out --requests"),
        (["--prompts", __file__], "tiny has none"),
        (["--workload", "long.csv"], "exceed the model's context of 4096"),
        (["--workload", "long.csv", "--clock", "wall"], "exceed the model's context of 4096"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_a_folder_is_made(
    tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.csv").write_text("prompt_tokens,output_tokens\n9,9\n4090,7\n")
    with pytest.raises(ServegymError, match=message):
        run(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Let the given step of all engines end with an error."""
    steps = iter(range(step))

    def advance(engines: Any) -> Any:
        if next(steps, None) is None:
            raise error
        return next_in_lockstep(engines)

    monkeypatch.setattr("servegym.studies.commands.serve.next_in_lockstep", advance)


@pytest.mark.parametrize("step", [0, 1, 9])
def test_an_interruption_leaves_records_of_all_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """After the first step the second engine has not seen its requests yet."""
    stop_at(monkeypatch, step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"^records so far are in"):
        run(tmp_path, "--compare", "fcfs,hybrid")
    folders = ("iterations", "records")
    records = [f"{f}/{p}-0.csv" for f in folders for p in ("fcfs", "hybrid")]
    assert files(tmp_path) == [*records, "serve.json"]


def test_a_fault_leaves_no_records_that_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 1, ServegymError("no plan"))
    with pytest.raises(ServegymError, match="no plan"):
        run(tmp_path, "--compare", "fcfs,hybrid")
    assert files(tmp_path) == []


@pytest.mark.parametrize("clock", ["model", "wall"])
def test_a_prompt_that_fills_the_context_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    """The legal twin of the one that is refused; the model is not asked to compute it."""
    monkeypatch.setattr(serve, "by_hand", lambda *_: {})
    monkeypatch.setattr(serve, "in_service", lambda *_: {})
    monkeypatch.setattr(serve, "summary", lambda *_, **__: "")
    (tmp_path / "fits.csv").write_text("prompt_tokens,output_tokens\n4089,7\n")
    output = tmp_path / "out"
    assert run(output, "--workload", f"{tmp_path}/fits.csv", "--clock", clock) == 0
    assert files(output) == ["serve.json", "serve.md"]


def test_a_run_takes_the_place_of_the_last_one_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "few.csv").write_text("prompt_tokens,output_tokens\n9,2\n7,3\n")
    few, output = ["--workload", f"{tmp_path}/few.csv"], tmp_path / "out"
    assert run(output, *few, "--compare", "fcfs,hybrid") == 0
    mine = output / "records" / "mine.csv"
    mine.write_text("not of serve.py")
    assert run(output, *few, "--policy", "lookahead", "--seed", "3") == 0
    new = ["iterations/lookahead-3.csv", "records/lookahead-3.csv", "records/mine.csv"]
    assert files(output) == [*new, "serve.json", "serve.md"]
    stop_at(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(output, *few, "--policy", "fcfs")
    new = ["iterations/fcfs-0.csv", "records/fcfs-0.csv", "records/mine.csv"]
    assert files(output) == [*new, "serve.json"]  # no page of another run


def test_records_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    with pytest.raises(
        ServegymError, match=r"holds records that serve\.py has not written; choose"
    ):
        run(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "note", ['{"files": ["../x"]}', '{"files": ["/x"]}', '{"files": [""]}', "[]", '{"files": [1]}']
)
def test_a_note_of_other_files_is_refused(tmp_path: Path, note: str) -> None:
    (tmp_path / "serve.json").write_text(note)
    with pytest.raises(ServegymError, match=r"not a list of what serve\.py has written; remove"):
        run(tmp_path)


# ---- over HTTP ----------------------------------------------------------------------------------


FAULT = "the engine has failed: ZeroDivisionError: no idea"


class Faulty(Policy):
    """A policy that fails at its second decision; it waits until somebody is decoding."""

    asked = 0

    def act(self, situation: Situation) -> int:
        self.asked += 1
        if self.asked > 1:
            raise ZeroDivisionError("no idea")
        return int(situation.mask.argmax())


def post(port: int, first: Callable[[], None] = lambda: None, **body: Any) -> tuple[int, str]:
    """Ask for a completion; return the answer's status and text. ``first`` is called at its first line."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode()
    )
    until = time.perf_counter() + 60
    while time.perf_counter() < until:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                line = answer.readline()
                first()
                return answer.status, (line + answer.read()).decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()
        except urllib.error.URLError:  # it starts
            time.sleep(0.02)
    raise TimeoutError


def test_a_fault_of_the_engine_ends_the_server_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(serve, "engine_policy", lambda *_: Faulty())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as clients:
        answers: list[Future[tuple[int, str]]] = []

        def ask_again() -> None:
            """While the first decodes another comes, at whose sight the policy fails."""
            answers.append(clients.submit(post, port, prompt=[3]))

        body = {"prompt": [1, 2], "max_tokens": 2000, "stream": True}
        answers.append(clients.submit(post, port, ask_again, **body))
        options = ["--port", str(port), "--task", "GSM8KPredicted-v0", "--output", str(tmp_path)]
        limit = Timer(120, os.kill, (os.getpid(), signal.SIGINT))
        limit.start()
        try:
            with pytest.raises(ServegymError, match=rf"^{FAULT}$"):
                serve.main([*options, "--most-tokens", "2000", "--clients", "2"])
        finally:
            limit.cancel()
    codes, texts = zip(*(answer.result() for answer in answers), strict=True)
    assert codes == (200, 500)  # the head of a stream is sent before
    assert all(FAULT in text for text in texts)
    assert "[DONE]" not in texts[0]
    assert files(tmp_path)[0].startswith("iterations/")
