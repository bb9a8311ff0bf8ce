"""Damaged copies of all files that scripts read, and the commands that read them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from servegym.agents.card import CARD_FILE, WEIGHTS_FILE
from servegym.envs.errors import ServegymError
from servegym.studies.policies import AGENTS
from servegym.studies.robustness.outcomes import STATUS, Ended, Outcome, call, fresh_folder

LIMIT_S: Final = 60
"""Seconds after which a command counts as a hang; most take one."""

Generator = np.random.Generator

_PLAY: Final = "evaluate --jobs 1 --task Tiny-v0 --output out"
_TRAIN: Final = (
    "train --task Tiny-v0 --output run --timesteps 256 --environments 2 --steps 64 --batch-size 64"
)


@dataclass(frozen=True)
class Bench:
    """A folder of good files, how it comes to be, and the commands that read it."""

    files: tuple[str, ...]
    """Patterns of what is damaged."""
    commands: tuple[str, ...]
    """Each reads all of these files; one is drawn."""
    made_by: tuple[str, ...] = ()
    """Commands that make the files, after those of ``_furnish``."""


BENCHES: Final = {
    "workload": Bench(
        ("work.csv",),
        (
            "plan --workload work.csv --clients 2 --output plan.json --time-limit 1",
            f"{_PLAY} --workload work.csv --policies fcfs --seeds 0 --optimum-limit 0",
        ),
    ),
    "task": Bench(
        ("task.toml", "work.csv"),
        (
            "evaluate --task task.toml --policies fcfs --seeds 0 --jobs 1 --optimum-limit 0 --output out",
        ),
    ),
    "agent": Bench(("agent/*",), (f"{_PLAY} --policies ./agent --seeds 0 --optimum-limit 0",)),
    "evaluation": Bench(
        ("out/*.json", "out/*.csv"),
        (f"{_PLAY} --policies fcfs,./agent --seeds 0:3 --optimum-limit 1",),
        (
            "best_known --task Tiny-v0 --policies fcfs --seeds 0:2 --time-limit 0.05 --output best",
            f"{_PLAY} --policies fcfs,./agent --seeds 0:2 --optimum-limit 1",
        ),
    ),
    "best known": Bench(
        ("best/search.json", "best/best_known.csv"),
        ("best_known --task Tiny-v0 --policies fcfs --seeds 0:3 --time-limit 0.05 --output best",),
        ("best_known --task Tiny-v0 --policies fcfs --seeds 0:2 --time-limit 0.05 --output best",),
    ),
    "check": Bench(
        ("checks/*.csv", "checks/*.json"),
        ("check_stealing --tasks Tiny-v0 --jobs 1 --cases 3 --output checks",),
        ("check_stealing --tasks Tiny-v0 --jobs 1 --cases 2 --output checks",),
    ),
    "study": Bench(
        ("agents/Tiny-v0/*.csv", "agents/Tiny-v0/*.json", "agents/Tiny-v0/validation/*"),
        ("study_agents --parts report --tasks Tiny-v0 --output agents",),
    ),
    "training": Bench(
        ("run/run.json", "run/checkpoints/*", "run/evaluations.csv", "run/tensorboard/events*"),
        (f"{_TRAIN} --resume", "dashboard --run run --output picture.png"),
        (f"{_TRAIN} --validation-cases 2 --evaluate-every 128",),
    ),
    "readme": Bench(("README.md", "table.md"), ("readme",)),
}


@dataclass(frozen=True)
class Trial:
    """One file of a bench, how it is damaged, and the command that reads it."""

    bench: str
    file: str
    damage: str
    command: str
    seed: int
    root: Path = field(compare=False)
    """The good files; made by the process that draws, for the workers, too."""

    @property
    def tried(self) -> str:
        """The damage and the command, as a reader sees them."""
        return f"{self.file} {self.damage} ({self.seed}): {self.command}"


def trials(count: int, seed: int, benches: Sequence[str] = tuple(BENCHES)) -> list[Trial]:
    """Return so many damages of the benches in turn, the same for the same seed."""
    rng = np.random.default_rng(seed)
    stacks = []
    for name in benches:
        bench, root = BENCHES[name], pristine(name)
        files = [path.relative_to(root) for glob in bench.files for path in sorted(root.glob(glob))]
        files = [path for path in files if not (root / path).is_dir()]
        pairs = [(path, way) for path in files for way in _damages(path.suffix)]
        stacks.append([(name, *pairs[k]) for k in rng.permutation(len(pairs))])
    drawn = []
    for k in range(count):
        stack = stacks[k % len(stacks)]
        name, path, way = stack[k // len(stacks) % len(stack)]
        commands = BENCHES[name].commands
        command = commands[int(rng.integers(len(commands)))]
        luck = int(rng.integers(2**31))
        drawn.append(Trial(name, str(path), way, command, luck, pristine(name)))
    return drawn


def try_one(trial: Trial) -> Outcome:
    """Damage the file in a copy of its bench and run the command: it is done or refuses in one line."""
    with fresh_folder() as folder:
        shutil.copytree(trial.root, folder, dirs_exist_ok=True)
        damage(folder / trial.file, trial.damage, np.random.default_rng(trial.seed))
        script, *words = trial.command.split()
        ended = call(script, words, LIMIT_S)
        verdict, detail = ended.verdict([0, 2])
        half_written = [str(path) for path in folder.rglob(".*.tmp")]
    if half_written:
        verdict, detail = STATUS, f"half-written: {', '.join(half_written)}"
    return Outcome("files", trial.tried, verdict, detail)


@cache
def pristine(name: str) -> Path:
    """Return the folder of a bench; made once a process, removed with it."""
    folder = _scratch() / name
    folder.mkdir()
    with fresh_folder() as work:
        _furnish(work)
        for command in BENCHES[name].made_by:
            script, *words = command.split()
            ended = call(script, words, 300)
            if ended.status != 0:
                raise ServegymError(f"{command}: failed before any damage: {_why(ended)}")
            if script == "best_known" and (work / "best").is_dir():
                (work / "out").mkdir(exist_ok=True)
                shutil.copy(work / "best" / "best_known.csv", work / "out")
        shutil.copytree(work, folder, dirs_exist_ok=True)
    return folder


def _why(ended: Ended) -> str:
    return ended.fault or ended.err.strip()


@cache
def _scratch() -> Path:
    keeper = tempfile.TemporaryDirectory(prefix="servegym-benches-")
    _KEEPERS.append(keeper)
    return Path(keeper.name)


_KEEPERS: Final[list[tempfile.TemporaryDirectory[str]]] = []


def _furnish(work: Path) -> None:
    """Write the files that no script makes."""
    rows = "".join(f"{9 + k},{5 + k % 7},{k / 10}\n" for k in range(12))
    (work / "work.csv").write_text(f"prompt_tokens,output_tokens,arrival_s\n{rows}", "utf-8")
    (work / "task.toml").write_text(
        "# A task.\n[cluster]\nclients = 3\n\n[workload]\nsource = 'work.csv'\n\n[cost]\n"
        "model = 'affine'\ndecode = {base = 0.02, per_client = 1e-4}\n[cost.prefill]\nbase = 0.1\n"
        "per_token = 1e-5\n\n[process]\nrules = [\n  'fcfs', # first\n  'longest',\n]\n",
        "utf-8",
    )
    (work / "agent").mkdir()
    for file in (CARD_FILE, WEIGHTS_FILE):
        shutil.copy(AGENTS / "Tiny-v0" / file, work / "agent")
    shutil.copytree(AGENTS / "Tiny-v0", work / "agents" / "Tiny-v0")
    (work / "README.md").write_text(
        "# A\n\n<!-- table: table.md -->\n\nold\n\n<!-- end -->\n", "utf-8"
    )
    (work / "table.md").write_text("# T\n\n| a |\n|---|\n| ü |\n", "utf-8")


def _damages(suffix: str) -> list[str]:
    kinds = {".json": _JSON, ".csv": _CSV, ".safetensors": TENSORS}
    return [*PLACES, *BYTES, *_TEXT, *kinds.get(suffix, {})]


def damage(path: Path, way: str, rng: Generator) -> None:
    """Damage a file in one of the ways of ``_damages``; an agent's card then fits its weights again."""
    data = path.read_bytes()
    if way in PLACES:
        path.unlink()
        PLACES[way](path)
        return
    changes: dict[str, Callable[[bytes, Generator], bytes]] = {
        **BYTES,
        **_TEXT,
        **_JSON,
        **_CSV,
        **TENSORS,
    }
    path.write_bytes(changes[way](data, rng))
    card = path.with_name(CARD_FILE)
    if path.name == WEIGHTS_FILE and way in TENSORS and card.is_file():
        values = json.loads(card.read_bytes())
        values["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        card.write_text(json.dumps(values), "utf-8")


PLACES: Final[dict[str, Callable[[Path], object]]] = {
    "is gone": lambda path: None,
    "is a folder": Path.mkdir,
    "is a pipe": os.mkfifo,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "leads to itself": lambda path: path.symlink_to(path.name),
    "leads nowhere": lambda path: path.symlink_to("nowhere"),
}


def _flipped(data: bytes, rng: Generator) -> bytes:
    changed = np.frombuffer(data or b"\0", np.uint8).copy()
    places = rng.integers(0, len(changed), rng.integers(1, 9))
    changed[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return changed.tobytes()


def _cut(data: bytes, rng: Generator) -> bytes:
    return data[: int(rng.integers(0, max(1, len(data))))]


def _mixed_in(data: bytes, rng: Generator) -> bytes:
    place = int(rng.integers(0, len(data) + 1))
    return data[:place] + rng.bytes(int(rng.integers(1, 64))) + data[place:]


BYTES: Final[dict[str, Callable[[bytes, Generator], bytes]]] = {
    "with flipped bits": _flipped,
    "with more flipped bits": lambda data, rng: _flipped(_flipped(data, rng), rng),
    "cut off": _cut,
    "cut at the head": lambda data, rng: data[len(_cut(data, rng)) :],
    "empty": lambda data, rng: b"",
    "twice": lambda data, rng: data + data,
    "with noise inside": _mixed_in,
    "all noise": lambda data, rng: rng.bytes(max(16, min(len(data), 4096))),
    "all zeros": lambda data, rng: bytes(len(data)),
    "with a mark": lambda data, rng: b"\xef\xbb\xbf" + data,
    "in UTF-16": lambda data, rng: data.decode("utf-8", "replace").encode("utf-16"),
}


def _line_changed(data: bytes, rng: Generator, change: Callable[[bytes], bytes]) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    place = int(rng.integers(len(lines)))
    lines[place] = change(lines[place])
    return b"".join(lines)


def _number_changed(data: bytes, rng: Generator) -> bytes:
    """Put something else in the place of one number."""
    pieces = np.array([k for k in range(len(data)) if data[k : k + 1].isdigit()])
    if len(pieces) == 0:
        return data
    place = int(rng.choice(pieces))
    texts = [
        b"-1",
        b"nan",
        b"1e999",
        b"9" * 5000,
        b"",
        b"null",
        b"0x" + b"f" * 5000,
        b"1e308",
        b"[]",
        b'"x"',
    ]
    return data[:place] + texts[int(rng.integers(len(texts)))] + data[place + 1 :]


_TEXT: Final[dict[str, Callable[[bytes, Generator], bytes]]] = {
    "without a line": lambda data, rng: _line_changed(data, rng, lambda line: b""),
    "with a line twice": lambda data, rng: _line_changed(data, rng, lambda line: line * 2),
    "with a blank line": lambda data, rng: _line_changed(data, rng, lambda line: b"\n" + line),
    "with a long line": lambda data, rng: _line_changed(data, rng, lambda line: line[:-1] * 9999),
    "with line ends of Windows": lambda data, rng: data.replace(b"\n", b"\r\n"),
    "with line ends of old": lambda data, rng: data.replace(b"\n", b"\r"),
    "with another number": _number_changed,
    "with yet another number": _number_changed,
}


def _json_changed(data: bytes, rng: Generator, change: Callable[[Any], Any]) -> bytes:
    """Change one value somewhere in the tree of a JSON text."""
    root = {"": json.loads(data)}
    table: Any = root
    key: Any = ""
    while (
        isinstance(table[key], dict | list) and table[key] and (table is root or rng.random() < 0.6)
    ):
        table = table[key]
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        key = keys[int(rng.integers(len(keys)))]
    if change is _remove:
        del table[key]
    else:
        table[key] = change(table[key])
    return json.dumps(root.get("")).encode()


def _remove(value: Any) -> Any:
    raise AssertionError("removed, not changed")


def _json_damage(change: Callable[[Any], Any]) -> Callable[[bytes, Generator], bytes]:
    return lambda data, rng: _json_changed(data, rng, change)


_JSON: Final[dict[str, Callable[[bytes, Generator], bytes]]] = {
    "a list": lambda data, rng: b"[" + data + b"]",
    "an empty table": lambda data, rng: b"{}",
    "null": lambda data, rng: b"null",
    "a number": lambda data, rng: b"7",
    "too deep": lambda data, rng: b"[" * 100_000 + b"]" * 100_000,
    "with endless digits": lambda data, rng: b'{"format": ' + b"9" * 100_000 + b"}",
    "with a value null": _json_damage(lambda value: None),
    "with a value as list": _json_damage(lambda value: [value]),
    "with a value as table": _json_damage(lambda value: {"x": value}),
    "with a value as text": _json_damage(str),
    "with a value -1": _json_damage(lambda value: -1),
    "with a value NaN": _json_damage(lambda value: float("nan")),
    "with a value 1e30": _json_damage(lambda value: 10**30),
    "without a value": _json_damage(_remove),
}


def _cells(data: bytes) -> list[list[bytes]]:
    return [line.split(b",") for line in data.splitlines()] or [[b""]]


def _csv(rows: list[list[bytes]]) -> bytes:
    return b"".join(b",".join(row) + b"\n" for row in rows)


def _cell_damage(text: bytes) -> Callable[[bytes, Generator], bytes]:
    def change(data: bytes, rng: Generator) -> bytes:
        rows = _cells(data)
        row = rows[int(rng.integers(min(1, len(rows) - 1), len(rows)))]
        row[int(rng.integers(len(row)))] = text
        return _csv(rows)

    return change


_CSV: Final[dict[str, Callable[[bytes, Generator], bytes]]] = {
    "with a header alone": lambda data, rng: _csv(_cells(data)[:1]),
    "without its header": lambda data, rng: _csv(_cells(data)[1:]),
    "with a column less": lambda data, rng: _csv([row[:-1] for row in _cells(data)]),
    "with a column more": lambda data, rng: _csv([[*row, b"1"] for row in _cells(data)]),
    "with semicolons": lambda data, rng: data.replace(b",", b";"),
    "with a cell of words": _cell_damage(b"words"),
    "with an empty cell": _cell_damage(b""),
    "with a cell NaN": _cell_damage(b"nan"),
    "with a cell inf": _cell_damage(b"-inf"),
    "with a cell -1": _cell_damage(b"-1"),
    "with a cell 1e30": _cell_damage(b"1e30"),
    "with a cell True": _cell_damage(b"True"),
    "with an open quote": _cell_damage(b'"'),
}


def _header_changed(
    change: Callable[[dict[str, Any], Generator], None],
) -> Callable[[bytes, Generator], bytes]:
    """Change the JSON header of a safetensors file and leave its data as they are."""

    def changed(data: bytes, rng: Generator) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header, rng)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return changed


def _entry(header: dict[str, Any], rng: Generator) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    entry: dict[str, Any] = header[names[int(rng.integers(len(names)))]]
    return entry


def _rename(header: dict[str, Any], rng: Generator) -> None:
    names = [name for name in header if name != "__metadata__"]
    header["other"] = header.pop(names[int(rng.integers(len(names)))])


def _change_note(header: dict[str, Any], rng: Generator) -> None:
    notes = header.setdefault("__metadata__", {"format": ""})
    name = sorted(notes)[int(rng.integers(len(notes)))]
    texts = ("", "[]", "{}", "null", "[" * 100_000, "9" * 5000)
    notes[name] = texts[int(rng.integers(len(texts)))]


def _change_note_inside(header: dict[str, Any], rng: Generator) -> None:
    notes = header.get("__metadata__", {})
    if "values" in notes:
        name = ("identity", "values")[int(rng.integers(2))]
        change = list(_JSON.values())[int(rng.integers(6, len(_JSON)))]
        notes[name] = change(notes[name].encode(), rng).decode()


TENSORS: Final[dict[str, Callable[[bytes, Generator], bytes]]] = {
    "with an endless header": lambda data, rng: (2**60).to_bytes(8, "little") + data[8:],
    "of other dtypes": _header_changed(lambda header, rng: _entry(header, rng).update(dtype="I32")),
    "of other shapes": _header_changed(lambda header, rng: _entry(header, rng)["shape"].append(1)),
    "with a name changed": _header_changed(_rename),
    "with a note changed": _header_changed(_change_note),
    "with another note changed": _header_changed(_change_note),
    "with a note's value changed": _header_changed(_change_note_inside),
    "with a note's other value changed": _header_changed(_change_note_inside),
}
