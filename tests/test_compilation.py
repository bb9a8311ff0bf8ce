"""The first run: a kernel is compiled by one process, and whoever waits is told."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from servegym.envs import compilation
from servegym.envs.compilation import Notice, Turn
from tests.helpers import Terminal
from tests.test_kernel_cache import Sources


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    folders = Sources(tmp_path, "kernel")
    monkeypatch.syspath_prepend(folders.folder)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders.users))
    return folders


@contextlib.contextmanager
def another_process(lock: Path, files: dict[Path, Path]) -> Iterator[None]:
    """Hold the lock as a process does that compiles, for a fifth of a second; its files are there then."""
    held, begun = FileLock(lock, thread_local=False), threading.Event()

    def work() -> None:
        with held:
            begun.set()
            time.sleep(0.2)
            for path, content in files.items():
                shutil.copy(content, path)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    yield
    thread.join()


@pytest.mark.parametrize("finishes", [True, False])
def test_a_process_waits_for_another_that_compiles_the_same(
    sources: Sources, finishes: bool, tmp_path: Path
) -> None:
    """It takes what the other has made; where the other was killed, it compiles."""
    sources.run()
    kept = {path: tmp_path / path.name for path in sources.files()}
    for path, copy in kept.items():
        shutil.move(path, copy)
    (lock,) = sources.folder.rglob("caller.triple*.lock")
    started = time.monotonic()
    with another_process(lock, kept if finishes else {}):
        assert sources.run() == (21, int(finishes))
    assert time.monotonic() - started > 0.2


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "PATIENCE_S", 0.01)
    with FileLock(tmp_path / "x.lock"):
        turn = Turn([tmp_path / "x.lock"])
        assert not turn.take()
        turn.give_back()
    turn = Turn([tmp_path / "x.lock"])
    assert turn.take()
    turn.give_back()
    assert not Turn([tmp_path / "no such folder" / "x.lock"]).take()
    assert not Turn([]).take()


def tell(notice: Notice) -> None:
    """Compile a kernel that calls another."""
    notice.begin()
    notice.begin()
    notice.end()
    notice.end()


def test_a_terminal_gets_a_line_that_counts_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    notice = Notice(quiet_s=0)
    tell(notice)
    lines = terminal.text.split("\r")
    assert lines[1].startswith("compiling kernels, on the first run only: 0 ready, 0:00")
    assert lines[3].startswith("compiling kernels, on the first run only: 1 ready, 0:00")
    assert lines[4].strip() == lines[5] == ""
    assert len(lines[4]) == len(lines[3])


def test_a_log_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    notice = Notice(quiet_s=0)
    tell(notice)
    tell(notice)
    assert capsys.readouterr().err == (
        "servegym: compiling kernels, on the first run only, for a minute or two\n"
    )
    notice = Notice(quiet_s=0)
    notice.silent = True
    tell(notice)
    tell(Notice(quiet_s=60))
    assert capsys.readouterr().err == ""
