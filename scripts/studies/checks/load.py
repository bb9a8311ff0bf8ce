"""What the registered tasks' machines bear, beside what is offered to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from servegym.envs.task.cases import sample_requests
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import InformationConfig
from servegym.studies.checks.published import area
from servegym.studies.serving import serve


@dataclass(frozen=True)
class Load:
    """A task whose requests are all present: its memory is always full where it can be."""

    tokens: int
    """Memory of all replicas that decode."""
    area: float
    """E[g]: mean token-passes of a request."""
    pass_s: float
    """Mean seconds of a pass of a replica that decodes."""
    known: float
    """μ, requests a second by the formula."""
    served: float
    """Requests a second, of the middle 60 % of finishes."""


def load_of(task: TaskConfig, policy: str, n: int, seed: int) -> Load:
    """Serve ``n`` requests of a preset at once, or all those of a file.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> 0 < load_of(TASKS["servegym/Chat-v0"], "vllm", 20, 0).served < 20
    True
    """
    workload = replace(task.workload, requests=n, arrivals=None, arrival_rate_per_s=0.0)
    at_once = replace(task, workload=workload, information=InformationConfig())
    requests = sample_requests(at_once, np.random.default_rng(seed))
    served = serve(at_once, policy, requests.prompt_tokens, requests.output_tokens)
    finished = np.sort(served.log.finished_s)
    first, last = int(0.2 * len(finished)), int(0.8 * len(finished))
    tables = task.cluster.replica_tables()
    decoding = [k for k, table in enumerate(tables) if table.role != "prefill"]
    held = area(requests.prompt_tokens, requests.output_tokens, task.cluster.chunk_tokens).mean()
    passes = [served.passes[k] for k in decoding]
    tokens = [tables[k].kv_capacity_tokens for k in decoding]
    known = sum(
        memory * count / (served.seconds * held)
        for memory, count in zip(tokens, passes, strict=True)
    )
    return Load(
        tokens=sum(tokens),
        area=float(held),
        pass_s=served.seconds * len(passes) / sum(passes),
        known=float(known),
        served=float((last - first) / (finished[last] - finished[first])),
    )
