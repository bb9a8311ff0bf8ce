"""The command ``servegym``: what it lists, what it runs, and how it is called in what is said."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from servegym.studies import cli, policies, start
from servegym.studies.cli import SCRIPTS, command_line, options_of, run
from servegym.studies.start import names, overview, run_servegym


def called(*words: str) -> int | str | None:
    """Run the command in this process as a shell would; return its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/somewhere/bin/servegym", *words])
        patch.setattr(start, "begin", lambda: None)
        with pytest.raises(SystemExit) as stop:
            run_servegym()
        return stop.value.code or 0


def test_every_script_is_a_command_and_each_is_listed_with_a_line() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    assert set(names()) == scripts
    lines = overview("servegym").splitlines()
    for name in names():
        words = (
            importlib.import_module(f"servegym.studies.commands.{name}").__doc__ or ""
        ).splitlines()
        assert [
            line for line in lines if line.split() == [name.replace("_", "-"), *words[0].split()]
        ]


def test_the_list_is_quick() -> None:
    """It imports nothing that takes time: no library of the project's, and no room beside the studies."""
    code = (
        "import sys\nfrom servegym.studies.start import overview\noverview('servegym')\n"
        "print({'numpy', 'gymnasium', 'tyro', 'numba', 'servegym.envs'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_command_it_says_what_there_is(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*words) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{overview('servegym')}\n"
    assert shown.err == ""


def test_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--version") == 0
    assert capsys.readouterr().out == f"servegym {version('servegym')}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("evalute",), "servegym: unknown command 'evalute'; did you mean 'evaluate'?"),
        (("bestknown",), "servegym: unknown command 'bestknown'; did you mean 'best-known'?"),
        (("evaluate.py",), "servegym: unknown command 'evaluate.py'; did you mean 'evaluate'?"),
        (
            ("--task", "x", "evaluate"),
            "servegym: unexpected '--task': a command comes first; see servegym --help",
        ),
        (("--completion",), "servegym: --completion needs one of bash, zsh, tcsh"),
        (("--completion", "fish"), "servegym: --completion needs one of bash, zsh, tcsh"),
        (
            ("evaluate", "--task", "Papr-v0"),
            "servegym evaluate: unknown task 'Papr-v0'; did you mean 'Paper-v0'? (a task file ends in .toml)",
        ),
        (
            ("best_known", "--sede", "1"),
            "servegym best-known: unknown option '--sede'; did you mean '--seeds'?",
        ),
    ],
)
def test_wrong_words_are_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*words) == 2
    shown = capsys.readouterr()
    assert shown.err == f"{line}\n"
    assert shown.out == ""


@pytest.mark.parametrize("name", ["best-known", "best_known"])
def test_a_command_s_help_names_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(name, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: servegym best-known [-h]")


def test_a_module_runs_like_the_command() -> None:
    """As ``python -m servegym`` does, from its file."""
    path = SCRIPTS / "command" / "__main__.py"
    words = [sys.executable, str(path), "pln"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "python -m servegym: unknown command 'pln'; did you mean 'plan'?\n"


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("servegym evaluate", "servegym best-known --time-limit 0.5"),
        ("python -m servegym evaluate", "python -m servegym best-known --time-limit 0.5"),
        ("scripts/evaluate.py", "python scripts/best_known.py --time-limit 0.5"),
        ("/a folder/x servegym evaluate", "python scripts/best_known.py --time-limit 0.5"),
    ],
)
def test_what_is_noted_is_how_it_was_called(
    program: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert command_line("best_known", time_limit=0.5) == line
    assert options_of(line) == ["--time-limit", "0.5"]


def test_completion_knows_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--completion", "bash") == 0
    shown = capsys.readouterr().out
    assert "complete -F" in shown or "compdef" in shown
    for word in ("best-known", "evaluate", "--list-policies", "--learning-rate"):
        assert word in shown


def test_a_missing_extra_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def needs(module: str) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(SystemExit) as stop:
        run(lambda _: needs("torch.utils"))
    assert stop.value.code == 2
    line = "torch is not installed; get it by `pip install 'servegym[train]'`, in a checkout by `make setup`"
    assert line in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a fault, not an extra
        run(lambda _: needs("servegym.envs.nothing"))
    assert set(cli.EXTRAS.values()) == {"train"}


def test_shipped_agents_lie_in_the_results_of_a_checkout(tmp_path: Path) -> None:
    assert SCRIPTS.parent / "results" / "agents" == policies.AGENTS
    assert policies.shipped() == ["GSM8K-v0", "GSM8KPredicted-v0", "Paper-v0", "Tiny-v0"]
