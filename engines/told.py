"""What a twin is told: refused in one line, or turned into the numbers that its state takes."""

from __future__ import annotations

import numpy as np

from servegym.envs.arguments import as_annotated, whole_number
from servegym.envs.errors import ServegymError
from servegym.envs.machine.layout import Layout
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.comparison import compared_tokens, expected_at_end
from servegym.envs.workload.requests import MAX_SPREAD, MAX_TOKENS, Requests

Told = tuple[float, int, int, float]
"""Arrival in seconds, prompt tokens, expected output tokens, spread."""


def check_task(task: TaskConfig, layout: Layout) -> None:
    """Refuse a task that has what a twin has not."""
    if len(layout.clients) > 1 or layout.moves:
        raise ServegymError(f"a twin has one replica, {task.name} has {len(layout.clients)}")
    if layout.kv_capacity_tokens[0] > 0:
        raise ServegymError(
            "a twin has no limit of KV memory, as it preempts nobody; set "
            f"cluster.kv_capacity_tokens to 0, {task.name} has {layout.kv_capacity_tokens[0]}"
        )
    if layout.chunk_tokens > 0:
        raise ServegymError(
            "a twin has no mixed stages; set cluster.chunk_tokens to 0, "
            f"{task.name} has {layout.chunk_tokens}"
        )
    if layout.shed_at > 0 or layout.class_limits:
        key = "cluster.shed_at to 0" if layout.shed_at > 0 else "slo.classes to []"
        raise ServegymError(f"a twin turns nobody away and knows no classes of requests; set {key}")


def checked_request(
    task: TaskConfig,
    prompt_tokens: int,
    expected_output_tokens: int,
    spread: float,
    most_tokens: int,
) -> tuple[int, int, float, int]:
    """Return what ``Twin.submit`` takes of a request, as Python's own numbers; refuse what it would not."""
    prompt = whole_number("prompt_tokens", prompt_tokens, 1, MAX_TOKENS)
    expected = whole_number("expected_output_tokens", expected_output_tokens, 1, MAX_TOKENS)
    most = whole_number("most_tokens", most_tokens, 1, MAX_TOKENS)
    spread = number("spread", spread, MAX_SPREAD)
    if spread > 0 and task.information.output_lengths == "known":
        raise ServegymError(
            f"spread must be 0, got {spread:g}: lengths are known in {task.name}; a task "
            "with information.output_lengths 'predicted' has uncertain ones"
        )
    return prompt, expected, spread, most


def number(name: str, value: float, most: float) -> float:
    """Return a number that lies in 0 … ``most``."""
    found = float(as_annotated(name, value, float))
    if not 0 <= found <= most:
        raise ServegymError(f"{name} must lie in 0 … {most:g}, got {found:g}")
    return found


def requests_of(rows: list[Told], task: TaskConfig) -> Requests:
    """Return what has been told as requests, as the scheduler of a task knows them."""
    arrivals, prompts, outputs, spreads = (np.array(column) for column in zip(*rows, strict=True))
    known = task.information.output_lengths == "known"
    return Requests(arrivals, prompts, outputs, outputs, None if known else spreads)


def believed(task: TaskConfig, prompt: int, expected: int, spread: float) -> tuple[int, float, int]:
    """Return the output that is expected, its spread, and the tokens by which it is the longer one."""
    information = task.information
    by, expect = information.compare_by, information.expect
    if information.output_lengths == "known" or (by, expect) == ("mean", "mean"):
        return expected, spread, expected
    requests = requests_of([(0.0, prompt, expected, spread)], task)
    if expect != "mean":
        told = expected_at_end(requests, expect, information.interval)
        expected, spread = int(told.predicted_output_tokens[0]), 0.0
    if by == "mean":
        return expected, spread, expected
    quantile, deviations = information.quantile, information.deviations
    return expected, spread, int(compared_tokens(requests, by, quantile, deviations)[0])
