"""One training run in a process of its own: on this machine, or slice by slice on others.

A worker elsewhere shares no folder with the driver. It gets the files of the run, trains for a while in a
folder of its own and gives the files back; whoever gets them next goes on from the last checkpoint. That is
exact: a run in slices ends in the weights of one that was never stopped. A worker that dies costs a slice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Final

import servegym
from servegym.envs.files import make_folder, read_bytes, write_file
from servegym.envs.playing.locks import LOCK_FILE
from servegym.envs.playing.parallel import PARENT

SLICE_S: Final = 600.0
"""Seconds after which a slice ends with the next checkpoint: what is lost with a worker, at most."""

LIBRARIES: Final = ("torch", "stable-baselines3", "sb3-contrib", "tensorboard")
"""What a worker must have to train, in the driver's versions."""

_LOOK_EVERY_S: Final = 0.25
_CHECKPOINTS: Final = "checkpoints"
_FINAL: Final = "final"


def train_here(
    number: int, command: Sequence[str], words: Sequence[str], log: Path
) -> tuple[int, int]:
    """Train one agent in a new process, which ends with this one; return the number and its status.

    Parameters
    ----------
    number
        Names the run to the caller.
    command, words
        What Python runs, and its arguments.
    log
        What the run prints is added to it.
    """
    make_folder(log.parent)
    with log.open("ab") as output, _training([*command, *words], output, Path.cwd()) as process:
        return number, process.wait()


@dataclass(frozen=True)
class Slice:
    """A part of a training run, for a worker that has nothing of it."""

    number: int
    """Names the run to the caller."""
    command: Sequence[str]
    words: Sequence[str]
    """Arguments; paths in them are those of ``files``."""
    folder: str
    """Of the run."""
    files: Mapping[str, bytes]
    """What stands in the folder, and what the run reads, by relative path."""
    versions: Mapping[str, str]
    """Of ``LIBRARIES`` at the driver."""
    seconds: float = SLICE_S


@dataclass(frozen=True)
class Trained:
    """What came of a slice."""

    number: int
    status: int | None
    """The process's exit status; None: the run is to go on."""
    files: Mapping[str, bytes]
    """What stands in the run's folder, by path within it."""
    log: bytes
    """What the run has printed."""


def train_slice(part: Slice) -> Trained:
    """Train in a folder of this machine until the run or the slice ends.

    Raises
    ------
    ServegymError
        If this worker lacks one of ``LIBRARIES`` or has another version of it.
    """
    from servegym.envs.playing.nodes.identity import check_same, versions
    from servegym.envs.playing.nodes.worker import worker_name

    check_same(worker_name(), versions(LIBRARIES), part.versions)
    with TemporaryDirectory(prefix="servegym-") as place:
        root = Path(place)
        for name, content in part.files.items():
            make_folder((root / name).parent)
            write_file(root / name, content)
        folder, log = root / part.folder, root / "log"
        begun_with = _checkpoints(folder)
        with (
            log.open("wb") as output,
            _training([*part.command, *part.words], output, root) as process,
        ):
            status = _wait(process, folder, begun_with, part.seconds)
        return Trained(part.number, status, files_in(folder), read_bytes(log))


def _checkpoints(folder: Path) -> set[Path]:
    return set((folder / _CHECKPOINTS).glob("[0-9]*.safetensors"))


def _wait(
    process: subprocess.Popen[bytes], folder: Path, known: set[Path], seconds: float
) -> int | None:
    """Wait for the end of a run; None if its time is over and it has just kept a checkpoint."""
    from servegym.envs.playing.nodes.worker import is_wanted

    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if not is_wanted():
            return None
        saved = _checkpoints(folder)
        if time.monotonic() < deadline:
            known = saved
        elif saved - known:
            return None
        time.sleep(_LOOK_EVERY_S)
    return process.returncode


@contextmanager
def _training(
    words: Sequence[str], output: IO[bytes], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python with these words in a folder; at the end of the block the process is ended, too."""
    # As many runs as cores share the machine; a log needs no bar ten times a second.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}
    environment[PARENT] = str(os.getpid())  # it ends when this process does, even by a kill
    places = [str(Path(path).parent) for path in servegym.__path__]  # it stands in another folder
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*places, os.getenv("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=folder,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files of a run's folder by their path in it, those being written left out."""
    return {
        path.relative_to(folder).as_posix(): read_bytes(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE and not path.name.endswith(".tmp")
    }


def keep_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a run's folder hold these files and no others.

    Checkpoints are written after what they stand for, and the last agent, which says that the run is
    finished, at the end: a driver that is killed in between leaves a folder that a resume goes on with.
    """

    def turn(name: str) -> tuple[bool, bool, str]:
        return name.startswith(_FINAL), name.startswith(_CHECKPOINTS), name

    for name in sorted(files, key=turn):
        path = folder / name
        make_folder(path.parent)
        write_file(path, files[name])
    for name in files_in(folder).keys() - files.keys():
        (folder / name).unlink()


def without_root(path: Path) -> Path:
    """Return a path as it is called within another folder, which it cannot leave."""
    return Path(*(part for part in path.parts if part not in (path.anchor, "..")))
