"""Studies that start anew when asked again, and go on where they were interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from servegym.envs.files import write_file

UNFINISHED: Final = ".unfinished"
"""Stands in the output folder while a run is under way."""


def begin(output: Path, depends: Any, files: Iterable[str]) -> None:
    """Remove earlier results, unless the last run was interrupted and of the same: then go on with it.

    Parameters
    ----------
    output
        The folder.
    depends
        What the results depend on and the command's options do not say, for JSON.
    files
        Names in the folder of what an interrupted run leaves.
    """
    note = json.dumps({"an interrupted run goes on where it stopped": depends}) + "\n"
    unfinished = output / UNFINISHED
    if not unfinished.is_file() or unfinished.read_text(encoding="utf-8") != note:
        for name in files:
            (output / name).unlink(missing_ok=True)
    write_file(unfinished, note)


def end(output: Path) -> None:
    """Note that the run is through."""
    (output / UNFINISHED).unlink()
