"""Copy the result tables into README.md, between their markers."""

from __future__ import annotations

if __name__ == "__main__":  # first of all: see _start.py
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] or ".")
    from _start import begin

    begin()

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _cli import parse, run

from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file

_BLOCK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Args:
    """Copy the result tables into README.md; run it from the checkout's root."""

    readme: Path = Path("README.md")
    """The file to change."""


def with_tables(text: str, root: Path) -> str:
    """Return ``text`` with each marked block filled from the file it names, headings left out."""

    def fill(block: re.Match[str]) -> str:
        source = root / block[1]
        if not source.is_file():
            raise ServegymError(f"{source}: no such result; run the script that makes it")
        body = re.sub(r"^#.*\n+", "", source.read_text(encoding="utf-8")).strip()
        return f"<!-- table: {block[1]} -->\n\n{body}\n\n<!-- end -->"

    return _BLOCK.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the tables."""
    args = parse(Args, argv)
    if not args.readme.is_file():
        raise ServegymError(f"{args.readme}: no such file")
    text = args.readme.read_text(encoding="utf-8")
    write_file(args.readme, with_tables(text, args.readme.parent))
    return 0


if __name__ == "__main__":
    run(main)
