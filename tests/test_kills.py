"""The robustness trial by kills reports each fault; stubs replace the scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from servegym.envs.errors import ServegymError
from servegym.studies.robustness import kills
from servegym.studies.robustness.kills import Outcome, Scenario, run_kills

COUNTS = """
import os, subprocess, sys, time
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir(exist_ok=True)
path = output / "rows.csv"
rows = path.read_text().split() if path.exists() else ["row,search_s"]
{begin}
while len(rows) < 11:
    rows.append(f"{{len(rows)}},{{time.monotonic()}}")
    (output / "new").write_text("\\n".join(rows))
    (output / "new").replace(path)
    time.sleep(0.02)
"""


def kill(begin: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Kill a stub four times; ``begin`` is what it does at its start."""
    folder.mkdir(exist_ok=True)
    (folder / "stub.py").write_text(COUNTS.format(begin=begin))
    monkeypatch.setattr(kills, "SCRIPTS", folder)
    monkeypatch.setattr(kills, "PATIENCE_S", 0.25)
    monkeypatch.setattr(kills, "scenarios", lambda: [Scenario("stub", "stub", [])])
    lines: list[str] = []
    [outcome] = run_kills(4, 0, folder / "runs", say=lines.append)
    assert lines[0].startswith(f"stub: {outcome.kills} kills")
    return outcome


def test_what_goes_on_where_it_was_killed_has_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = kill("", tmp_path, monkeypatch)
    assert outcome.faults == []
    assert outcome.kills == 4


@pytest.mark.parametrize(
    ("begin", "fault"),
    [
        ("rows = rows[:1] + rows[2:]", "rows.csv is not that of the undisturbed run"),
        ("(output / f'.rows.{len(rows)}.tmp').touch()", "left behind"),
        ("if len(rows) > 1: sys.exit(3)", "resumed: status 3"),
        ("subprocess.Popen(['sleep', '60'])", "processes are still there"),
        ("sys.exit(4)", "undisturbed: status 4"),
    ],
)
def test_every_fault_is_seen(
    begin: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = kill(begin, tmp_path, monkeypatch).faults
    assert any(fault in line for line in reported), reported


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    for options, message in (
        (["--output", new, "--count", "0"], "--count must be"),
        (["--output", new, "--only", "tran"], "did you mean 'train'"),
        (["--output", str(tmp_path)], "is there already"),
    ):
        with pytest.raises(ServegymError, match=message):
            kills.main(options)
