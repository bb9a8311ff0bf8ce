"""Who does a command's work: the processes of ``--jobs``, or the workers of ``--cluster``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from servegym.envs.playing.parallel import Workers

WARM_UP: Final = "servegym.baselines.warmup"
"""Module that compiles every kernel; run once on each node."""


@contextmanager
def open_workers(jobs: int, cluster: str | None) -> Iterator[Workers]:
    """Give so many processes of this machine, or the workers at an address, for a while.

    Connect before anything is written: an address where nobody answers then leaves nothing behind.

    Raises
    ------
    ServegymError
        As of :func:`servegym.envs.playing.nodes.addresses.connect`.
    """
    if cluster is None:
        yield jobs
        return
    from servegym.envs.playing.nodes.addresses import connect

    with connect(cluster, WARM_UP) as nodes:
        yield nodes
