"""Copy the result tables into README.md, between their markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.errors import ServegymError
from servegym.envs.files import read_text, write_file
from servegym.studies.cli import parse

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
        if not source.exists():
            raise ServegymError(f"{source}: no such result; run the script that makes it")
        body = re.sub(r"^#.*\n+", "", read_text(source)).strip()
        return f"<!-- table: {block[1]} -->\n\n{body}\n\n<!-- end -->"

    return _BLOCK.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the tables."""
    args = parse(Args, argv)
    text = read_text(args.readme)
    if not _BLOCK.search(text):
        raise ServegymError(
            f"{args.readme}: has no place for a table, from <!-- table: FILE --> to <!-- end -->"
        )
    write_file(args.readme, with_tables(text, args.readme.parent))
    return 0
