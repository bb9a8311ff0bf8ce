"""The kernel cache: files are used only if they are whole, fresh and in a trusted folder."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from servegym.envs import kernel_cache
from servegym.envs.jit import kernel
from servegym.envs.kernel_cache import cache_folders, is_trusted, make_private_folder

# A kernel and its callee in another file, as small as can be.
CALLEE = """
from servegym.envs.jit import {kind}

@{kind}
def double(x):
    return {factor} * x
"""
CALLER = """
from servegym.envs.jit import allocating_kernel
from callee import double

@allocating_kernel
def triple(x):
    return double(x) + x
"""


class Sources:
    """Two source files in a folder of their own, loaded as often as a test likes."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind  # of the callee: its code is inlined, or shared
        self.folder = folder / "sources"
        self.users = folder / "cache"
        self.folder.mkdir()
        self.write(2)
        (self.folder / "caller.py").write_text(CALLER)

    def write(self, factor: int) -> None:
        (self.folder / "callee.py").write_text(CALLEE.format(kind=self.kind, factor=factor))

    def run(self) -> tuple[int, int]:
        """Load the files as a new process would; return triple(7) and how much came from the cache."""
        kernel_cache._digest.cache_clear()
        kernel_cache._direct_imports.cache_clear()
        kernel_cache._warn_of_no_folder.cache_clear()
        sys.modules.pop("callee", None)
        sys.dont_write_bytecode = True  # a source that changes within a second has no new .pyc
        try:
            triple = runpy.run_path(str(self.folder / "caller.py"))["triple"]
        finally:
            sys.dont_write_bytecode = False
        return triple(7), sum(triple.stats.cache_hits.values())

    def files(self, folder: Path | None = None) -> list[Path]:
        return sorted((folder or self.folder).rglob("*.nb?"))


@pytest.fixture(params=["kernel", "shared_kernel"])
def sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Sources:
    folders = Sources(tmp_path, request.param)
    monkeypatch.syspath_prepend(folders.folder)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders.users))
    return folders


def test_what_was_compiled_once_is_read(sources: Sources) -> None:
    assert sources.run() == (21, 0)
    assert sources.run() == (21, 1)
    assert not sources.users.exists()  # beside the sources is enough


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: b"cos\nsystem\n(S'echo somebody was here'\ntR.",
    ],
    ids=["empty", "half", "one byte short", "one bit flipped", "another program's"],
)
def test_a_damaged_file_counts_as_missing(sources: Sources, ending: str, damage) -> None:
    sources.run()
    damaged = [path for path in sources.files() if path.suffix == ending]
    assert damaged
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    assert sources.run() == (21, 0)
    assert sources.run() == (21, 1)  # and was written anew


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_a_pipe_counts_as_missing(sources: Sources, ending: str) -> None:
    sources.run()
    for path in [path for path in sources.files() if path.suffix == ending]:
        path.unlink()
        os.mkfifo(path)
    assert sources.run() == (21, 0)  # reading a pipe would wait for ever
    assert sources.run() == (21, 1)


def test_a_cached_caller_does_not_keep_an_old_callee(sources: Sources) -> None:
    sources.run()
    sources.write(5)
    assert sources.run() == (42, 0)
    sources.write(2)
    assert sources.run() == (21, 1)


@pytest.mark.parametrize("sources", ["kernel"], indirect=True)
def test_linked_code_is_read_where_a_caller_is_compiled(sources: Sources) -> None:
    sources.run()
    linked = {path: path.stat().st_mtime_ns for path in sources.files() if "-linked" in path.name}
    assert {path.name.split("-")[0] for path in linked} == {"callee.double"}
    for path in set(sources.files()) - set(linked):
        path.unlink()
    assert sources.run() == (21, 0)
    assert {path: path.stat().st_mtime_ns for path in linked} == linked  # not compiled anew
    assert sources.run() == (21, 1)


def test_the_users_folder_where_the_sources_cannot_be_written(sources: Sources) -> None:
    (sources.folder / "__pycache__").write_text("no folder, so nothing can be written in it")
    assert sources.run() == (21, 0)
    assert sources.run() == (21, 1)
    kept = sources.files(sources.users)
    assert kept
    made = {parent for path in kept for parent in path.parents if parent != sources.users}
    inside = [path for path in made if path.is_relative_to(sources.users)]
    assert {path.stat().st_mode & 0o777 for path in inside} == {0o700}


def test_no_other_cache_where_no_folder_can_be_written(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("no folder")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "blocked"))
    with pytest.warns(
        RuntimeWarning, match="set NUMBA_CACHE_DIR to a folder of your own"
    ) as warned:
        assert sources.run() == (21, 0)
    assert len(warned) == 1
    assert not sources.files(tmp_path)


def test_kernels_that_cannot_be_written_are_read(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only checkout that holds compiled kernels; what it lacks goes to the user's folder."""
    sources.run()
    before = {path: path.read_bytes() for path in sources.files()}
    write = kernel_cache._CheckedFiles._write_checked

    def refuse_beside_sources(self, path: str, content: object) -> None:
        if Path(path).is_relative_to(sources.folder):
            raise PermissionError
        write(self, path, content)

    monkeypatch.setattr(kernel_cache._CheckedFiles, "_write_checked", refuse_beside_sources)
    assert sources.run() == (21, 1)
    assert {path: path.read_bytes() for path in sources.files()} == before
    assert not sources.files(sources.users)
    for path in sources.files():
        path.unlink()  # now there is nothing to read, and what is compiled goes elsewhere
    assert sources.run() == (21, 0)
    assert not sources.files()
    assert sources.run() == (21, 1)


@pytest.mark.parametrize(
    ("mode", "trusted"), [(0o700, True), (0o755, True), (0o775, False), (0o777, False)]
)
def test_a_folder_that_others_may_write_to_is_not_trusted(
    tmp_path: Path, mode: int, trusted: bool
) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(mode)
    assert is_trusted(folder, Path(__file__)) == trusted
    assert not is_trusted(folder / "missing", Path(__file__))


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files away")
def test_another_users_folder_is_not_trusted(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "given"))
    sources.run()
    for kernels in (tmp_path / "given").glob("kernels-*"):
        os.chown(kernels, 12345, -1)
    with pytest.warns(RuntimeWarning, match="another user may write there"):
        assert sources.run() == (21, 0)  # what lies there is not unpickled


@pytest.mark.skipif(os.name != "posix", reason="there are no owners")
def test_the_temporary_folder_is_never_used() -> None:
    source = Path(kernel_cache.__file__)
    folders = [
        folder for folder in cache_folders(source) if not folder.is_relative_to(source.parent)
    ]
    assert (
        all(folder.parent.name == "servegym" for folder in folders)
        or "NUMBA_CACHE_DIR" in os.environ
    )


def test_new_folders_have_their_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_folder(tmp_path / "a" / "b", 0o700)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]


def test_the_hash_covers_every_module_that_is_imported() -> None:
    """Otherwise machine code could outlive a change of a module compiled into it."""
    script = (
        "import sys, servegym.baselines.lookahead.rollout\n"
        "for name, found in sys.modules.items():\n"
        "    if name.startswith('servegym.') and getattr(found, '__file__', None):\n"
        "        print(found.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {Path(line).resolve() for line in done.stdout.splitlines()}
    root = Path(kernel_cache.__file__).resolve().parents[1]
    covered = kernel_cache._imported_by(root / "baselines" / "lookahead" / "rollout.py")
    # Its kernels are compiled into rollout's.
    assert root / "envs" / "process" / "steps.py" in covered
    assert {path for path in loaded if path.name != "__init__.py"} <= covered


FORK = """
import multiprocessing, sys
import numpy as np
from servegym.envs.errors import ServegymError
from servegym.envs.vector_env import ServingVectorEnv

def play(threads):
    env = ServingVectorEnv(2, "Tiny-v0", threads=threads)
    env.reset(seed=0)
    return float(env.step(env.action_masks().argmax(axis=1))[1].sum())

def report(queue, threads):
    try:
        queue.put(play(threads))
    except ServegymError as error:
        queue.put(str(error))

play(2)
fork = multiprocessing.get_context("fork")
for threads in (2, 1):
    queue = fork.Queue()
    child = fork.Process(target=report, args=(queue, threads))
    child.start()
    print(queue.get(timeout=60), child.join() or child.exitcode)
print(play(2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread only")
def test_threads_after_a_fork_are_refused() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    threaded, single, parent = lines
    assert threaded == f"{parent} 0" or (
        "'spawn' or 'forkserver'" in threaded and threaded[-1] == "0"
    )
    assert single == f"{parent} 0"


@kernel
def _twice(number: int) -> int:
    return 2 * number


@kernel
def _of_constants(number: int) -> int:
    return _twice(1) + _twice(2) + _twice(number)


def test_a_constant_argument_is_compiled_as_any_number() -> None:
    """Numba would compile `_twice` three times: for 1, for 2 and for a number."""
    if numba.config.DISABLE_JIT:
        pytest.skip("nothing is compiled")
    assert _of_constants(3) == 12
    called: Any = _twice
    assert len(called._linked.signatures) <= 1  # none where the cache had the caller
    assert not called.signatures  # nobody called it from Python: it has no machine code
