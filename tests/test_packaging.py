"""The promises of the packaging: names, contents, and who may import whom."""

import ast
import importlib
import multiprocessing
import subprocess
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "agents": "agents",
    "baselines": "baselines",
    "engines": "engines",
    "envs": "envs",
    "studies": "scripts/studies",
}
NAMES_GIVEN = {
    f"servegym.{room}.{alias.name}": f"servegym.{room}.{node.module}.{alias.name}"
    for room, folder in ROOMS.items()
    for stub in (ROOT / folder).glob("__init__.pyi")
    for node in ast.parse(stub.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
"""Where the names that packages give lie: servegym.envs.play in servegym.envs.playing.evaluation."""
HEAVY = {"torch", "stable_baselines3", "sb3_contrib", "tensorboard"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache  # a file is asked about by several tests
def imported_names(path: Path) -> tuple[str, ...]:
    """Every dotted name that a file imports, also inside functions; `from a import b` gives a.b.

    A name that a package gives (`from servegym.envs import play`) is followed to its module, and
    `import_module(f"a.b.{name}")` gives a.b.
    """
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names += (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in vars(node.func).values():
            text = node.args[0]
            text = text.values[0] if isinstance(text, ast.JoinedStr) else text
            if isinstance(text, ast.Constant):
                names.append(str(text.value).rstrip("."))
    return tuple(NAMES_GIVEN.get(name, name) for name in names)


def offences(paths: list[Path], forbidden: set[str]) -> list[str]:
    """The imports of the files that are, or lie below, a forbidden name."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imported_names(path)
        if any(f"{name}.".startswith(f"{banned}.") for banned in forbidden)
    ]


def run_outside(code: str, folder: Path) -> str:
    """The output of a fresh interpreter that runs `code` outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def file_of(name: str) -> str:
    """Where a module lies; runs in a spawned worker."""
    return str(importlib.import_module(name).__file__)


def test_packages_listed_are_the_folders() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join(("servegym", room, *path.parent.relative_to(ROOT / folder).parts))
        for room, folder in ROOMS.items()
        for path in python_files(folder)
    }
    # Beside them the namespace itself, for its __main__.py, and a folder of files.
    assert set(config["tool"]["setuptools"]["packages"]) == found | {"servegym", "servegym.shipped"}


@pytest.mark.parametrize("room", ROOMS)
def test_name_resolves_to_the_checkout(room: str) -> None:
    assert Path(file_of(f"servegym.{room}")).resolve() == ROOT / ROOMS[room] / "__init__.py"


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_marked_as_typed(room: str) -> None:
    assert files(f"servegym.{room}").joinpath("py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_type_checker_symlink_leads_to_the_room(room: str) -> None:
    assert (ROOT / ".typing" / "servegym" / room).resolve() == ROOT / ROOMS[room]


def test_name_resolves_in_spawned_worker() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        found = pool.submit(file_of, "servegym.envs").result(timeout=120)
    assert Path(found).resolve() == ROOT / "envs" / "__init__.py"


def test_package_data_is_readable() -> None:
    data = files("servegym.envs.data").joinpath("gsm8k_prompts.json")
    assert data.read_text(encoding="utf-8").startswith("{")


def test_nothing_generic_is_installed(tmp_path: Path) -> None:
    code = f"""
from importlib.util import find_spec
assert find_spec("servegym.envs") is not None
print([name for name in {list(ROOMS)!r} if find_spec(name) is not None])
"""
    assert run_outside(code, tmp_path).strip() == "[]"


def test_importing_envs_and_reading_a_task_loads_neither_heavy_libraries_nor_kernels(
    tmp_path: Path,
) -> None:
    code = f"""
import sys, servegym.envs
print(sorted({HEAVY | {"matplotlib"}!r} & set(sys.modules)))
servegym.envs.read_task
print(sorted({{"numba", "llvmlite"}} & set(sys.modules)))
"""
    assert run_outside(code, tmp_path).split() == ["[]", "[]"]


@pytest.mark.parametrize("package", ["envs", "baselines", "agents", "engines"])
def test_a_package_gives_the_names_of_its_stub(package: str) -> None:
    """lazy_loader reads the stub when a name is asked for, the type checker when it checks."""
    module = importlib.import_module(f"servegym.{package}")
    assert set(module.__all__) <= set(dir(module))
    assert {name for name in module.__all__ if not hasattr(module, name)} == set()
    with pytest.raises(AttributeError, match=f"servegym.{package} .*Serve"):
        module.Serve  # noqa: B018
    with pytest.raises(ImportError, match="'Serve'"):
        exec(f"from servegym.{package} import Serve")


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        (
            "envs",
            {"servegym.baselines", "servegym.agents", "servegym.engines", "servegym.studies"},
        ),
        ("baselines", {"servegym.agents", "servegym.engines", "servegym.studies"}),
        ("agents", {"servegym.baselines", "servegym.engines", "servegym.studies"}),
        ("engines", {"servegym.baselines", "servegym.agents", "servegym.studies"}),
    ],
)
def test_room_imports_only_what_it_may(room: str, forbidden: set[str]) -> None:
    assert offences(python_files(room), forbidden) == []


FLOORS = {
    "envs": [
        "errors vocabulary",
        "arguments bundle compilation files linked_code",
        "bundle_type kernel_cache",
        "jit",
        "machine workload",
        "bounds simulator",
        "process",
        "pictures task",
        "serving_env",
        "vector_env",
        "mask_in_observation playing",
    ],
    "baselines": [
        "planning schedules",
        "rules",
        "calendar exact lookahead",
        "parameters",
        "catalogue",
        "registry",
        "expert",
        "warmup",
    ],
    "agents": [
        "actions activation early_stopping masked_policy progress",
        "card hyperparameters sb3_vec_env validation",
        "network",
        "policy",
        "evaluations export hyperparameter_files imitation record",
        "charts checkpoints dashboard evolution outcome",
        "callbacks search_charts",
        "clock",
        "training",
        "speed",
    ],
    "engines": ["told", "twin", "iterations", "calibration huggingface vllm", "front"],
    "studies": [
        "terminal",
        "cli own_policies",
        "policies start workers",
        "anew cases quick robustness serving speed",
        "capacity known_schedulers nodes tuned",
        "agents answers checks engines nodes_measured",
        "foresight uncertainty",
        "commands",
    ],
}
"""Rooms from the ground floor up: a room imports only rooms of its package that lie below it."""

BY_NAME = {"start.py imports commands", "robustness/outcomes.py imports commands"}
"""Exceptions that CONTRIBUTING names: commands are loaded by their scripts' names."""


def floors_of(room: str) -> dict[str, int]:
    return {name: k for k, names in enumerate(FLOORS[room]) for name in names.split()}


def rooms_imported(path: Path, package: str) -> set[str]:
    """The rooms of `package` that a file imports; the package itself is none, and may hide any."""
    names = (f"{name}.".split(".") for name in imported_names(path))
    return {name[2] for name in names if name[:2] == ["servegym", package]}


def upward_imports(package: str, paths: list[Path], folder: Path) -> set[str]:
    """The imports of rooms that do not lie below, or are unknown, by the files of a package."""
    floors = floors_of(package)
    rooms = {path: path.relative_to(folder).parts[0].removesuffix(".py") for path in paths}
    return {
        f"{path.relative_to(folder).as_posix()} imports {other}"
        for path, room in rooms.items()
        if room != "__init__"
        for other in rooms_imported(path, package) - {room, "data"}
        if floors.get(other, 99) >= floors[room]
    }


def modules_imported(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Which of these modules each of them imports."""
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        parts = [name.split(".") for name in imported_names(path)]
        found = {".".join(name[:k]) for name in parts for k in range(len(name), 2, -1)}
        graph[module] = (found & set(modules)) - {module}
    return graph


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_a_floor(package: str) -> None:
    folder = ROOT / ROOMS[package]
    rooms = {
        path.relative_to(folder).parts[0].removesuffix(".py")
        for path in python_files(folder.relative_to(ROOT).as_posix())
    }
    assert set(floors_of(package)) == rooms - {"__init__", "data"}


@pytest.mark.parametrize("package", ROOMS)
def test_no_room_imports_one_that_is_not_below_it(package: str) -> None:
    found = upward_imports(package, python_files(ROOMS[package]), ROOT / ROOMS[package])
    assert found == (BY_NAME if package == "studies" else set())


def test_no_modules_import_each_other() -> None:
    modules = {
        ".".join(("servegym", room, *path.relative_to(ROOT / folder).with_suffix("").parts)): path
        for room, folder in ROOMS.items()
        for path in python_files(folder)
        if path.name != "__init__.py"
    }
    TopologicalSorter(modules_imported(modules)).prepare()


def test_an_arrow_upwards_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("from servegym.envs.playing.tables import Schema\nimport servegym.envs.jit\n")
    assert rooms_imported(module, "envs") == {"playing", "jit"}
    assert rooms_imported(module, "agents") == set()


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("from servegym.envs import make_case", {"playing"}),  # a name that the package gives
        ("from servegym.envs.playing.evaluation import make_case", {"playing"}),
        ("import servegym.envs", {""}),  # and any name by an attribute
        ("from servegym import envs", {""}),
        ("from servegym.envs import new", {"new"}),  # unknown
        ("importlib.import_module(f'servegym.envs.playing.{name}')", {"playing"}),
        ("import_module('servegym.envs.playing')", {"playing"}),
        ("from servegym.envs import load_task", {"task"}),
        ("from servegym.envs import ServegymError", set()),  # below
        ("importlib.import_module(name)", set()),  # a user's own
        ("import servegym.agents", set()),  # another package
    ],
)
def test_an_arrow_upwards_in_any_form_is_seen(tmp_path: Path, line: str, seen: set[str]) -> None:
    module = tmp_path / "simulator" / "module.py"
    module.parent.mkdir()
    module.write_text(line)
    found = upward_imports("envs", [module], tmp_path)
    assert found == {f"simulator/module.py imports {room}" for room in seen}


def test_a_cycle_within_a_room_is_seen(tmp_path: Path) -> None:
    modules = {f"servegym.envs.task.{name}": tmp_path / f"{name}.py" for name in "abc"}
    for path, other in zip(modules.values(), "bca", strict=True):
        path.write_text(f"def late():\n    from servegym.envs.task.{other} import x\n")
    graph = modules_imported(modules)
    assert graph["servegym.envs.task.a"] == {"servegym.envs.task.b"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_rooms_never_import_scripts_or_tests() -> None:
    assert offences(python_files(*ROOMS.values()), {"scripts", "tests"}) == []


def test_only_agents_and_one_room_of_engines_import_torch() -> None:
    files = python_files("envs", "baselines", "engines", "scripts")
    apart = (ROOT / "engines" / "huggingface", ROOT / "scripts" / "examples")
    files = [path for path in files if path.parent not in apart]
    assert offences([*files, *python_files("tests")], {"transformers"}) == [
        "tests/test_engine.py imports transformers.generation.continuous_batching.scheduler"
    ]
    assert offences(files, HEAVY) == []


def test_bare_room_names_are_never_imported() -> None:
    assert offences(python_files(*ROOMS.values(), "scripts", "tests"), set(ROOMS)) == []


def test_an_offence_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule tests above are worth nothing if `offences` is blind."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(
        "import torchmetrics\n"
        "from servegym import agents\n"
        "def late():\n    import torch.nn as nn\n",
        encoding="utf-8",
    )
    assert offences([module], {"torch", "servegym.agents"}) == [
        "module.py imports servegym.agents",
        "module.py imports torch.nn",
    ]
