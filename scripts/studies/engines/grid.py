"""A designed grid of iterations: batches of equal prompts, then some rounds of decoding."""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.baselines.registry import make_policy
from servegym.engines.iterations import Iteration
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.workload.requests import make_requests
from servegym.studies.engines.loads import random_prompts

ROUNDS = 8  # of decoding in a cell, where they are fitted


def spaced(least: int, most: int, count: int) -> list[int]:
    """Return whole numbers from ``least`` to ``most``, each about as many times the one before it.

    Examples
    --------
    >>> spaced(1, 16, 5)
    [1, 2, 4, 8, 16]
    """
    points = np.geomspace(least, max(least, most), count).round().astype(int)
    return [int(point) for point in np.unique(points)]


class Grid:
    """Runs the cells of a grid one after the other, an iteration at a time, in random order.

    Every cell is an engine of its own: as many requests as it has clients, with prompts of one length. Of
    the first cell, which warms up, nothing counts.

    Parameters
    ----------
    model, task
        The model, and a task for its vocabulary of settings; its costs and clients do not matter.
    clients, prompt_tokens
        The most of each.
    repeats, seed
        How often each cell is run, and of the order and the prompts.
    rounds
        Decode rounds of a cell; 1 where prefills alone are fitted, with which nobody is to end.
    """

    def __init__(
        self,
        model: Any,
        task: TaskConfig,
        clients: int,
        prompt_tokens: int,
        *,
        repeats: int = 2,
        seed: int = 0,
        rounds: int = ROUNDS,
    ) -> None:
        self.iterations: list[Iteration] = []
        self._model, self._task, self._seed, self._outputs = model, task, seed, 1 + rounds
        cells = [
            (count, tokens)
            for count in spaced(1, clients, 5)
            for tokens in spaced(4, prompt_tokens, 6)
        ] * repeats
        order = np.random.default_rng(seed).permutation(len(cells))
        # All cells have the memory of the largest, as its size costs time, too.
        largest = make_requests([prompt_tokens] * clients, [self._outputs] * clients)
        widest = with_overrides(task, {"cluster": {"clients": clients}})
        self._memory = random_prompts(largest, 2, 0).memory(widest)
        self._cells = [cells[0], *(cells[place] for place in order)]
        self._place = 0
        self._engine = self._next_engine()

    def _next_engine(self) -> Any:
        count, tokens = self._cells[self._place]
        task = with_overrides(self._task, {"cluster": {"clients": count}})
        requests = make_requests([tokens] * count, [self._outputs] * count)
        load = random_prompts(
            requests, int(self._model.config.vocab_size), self._seed + self._place
        )
        return load.engine(self._model, task, make_policy("fcfs"), memory=self._memory)

    @property
    def share_done(self) -> float:
        """How much of the grid has been run."""
        inner = self._engine.share_done if self._engine is not None else 0.0
        return (self._place + inner) / len(self._cells)

    def step(self) -> Iteration | None:
        """Run one iteration; None: the grid is done."""
        while self._engine is not None:
            iteration: Iteration | None = self._engine.step()
            if iteration is not None:
                if self._place > 0:
                    self.iterations.append(iteration)
                return iteration
            self._place += 1
            done = self._place == len(self._cells)
            self._engine = None if done else self._next_engine()
        return None
