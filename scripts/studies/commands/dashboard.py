"""Draw a training run as one picture, from its event files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.pictures import to_png
from servegym.studies.cli import parse


@dataclass(frozen=True)
class Args:
    """Draw a training run as one picture, from its event files."""

    run: Path = Path("runs/agent")
    """Folder of the run, as train was given it; it may still be training."""
    output: Path = Path("dashboard.png")
    """The picture, a PNG file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw."""
    args = parse(Args, argv)
    if args.output.suffix.lower() != ".png":
        raise ServegymError(f"--output must end in .png, got {args.output}")
    # TensorBoard reports on stderr what a resumed run has overwritten.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from servegym.agents.dashboard import draw_training_dashboard  # takes seconds to import

    picture = to_png(draw_training_dashboard(args.run))
    make_folder(args.output.parent)
    write_file(args.output, picture)
    print(f"wrote {args.output}")
    return 0
