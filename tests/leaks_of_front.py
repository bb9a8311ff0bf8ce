"""Whether a server keeps anything of requests that it has answered: short ones by the thousand, on loopback.

    python tests/leaks_of_front.py [REQUESTS]

The model is tiny; all else is as in service: uvicorn, front, transformers' threaded engine, scheduler,
and a twin that holds 40 requests. Prints what a request leaves behind, in Python objects and in kB of memory.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import uvicorn

from servegym.baselines.registry import make_policy
from servegym.engines.front import Front, Letters
from servegym.engines.huggingface import Service, tiny_llama, use_threads
from servegym.engines.twin import Twin
from servegym.envs import load_task
from servegym.envs.task.config import with_overrides

CAPACITY = 40


class Held(NamedTuple):
    """What a process holds."""

    objects: int
    """That the garbage collector knows."""
    memory_kb: float
    kept: int
    """Entries of the service's and the scheduler's own tables."""


@contextmanager
def served() -> Iterator[tuple[Service, str]]:
    """Yield a service and its address."""
    use_threads(1)
    task = with_overrides(load_task("GSM8KPredicted-v0"), {"cluster": {"clients": 4}})
    twin = Twin(task, make_policy("hybrid"), capacity=CAPACITY)
    with Service(tiny_llama(), twin, kv_tokens=512, batch_tokens=64, lasting=True) as service:
        front = Front(service, "tiny", Letters(1000), (), most_tokens=16, room_tokens=32)
        server = uvicorn.Server(
            uvicorn.Config(front.app(), port=0, log_level="error", ws="none", lifespan="on")
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield service, f"http://127.0.0.1:{port}/v1/completions"
        finally:
            server.should_exit = True
            thread.join()


def ask(url: str, count: int) -> None:
    """Have so many requests answered, every third streamed."""
    for number in range(count):
        body: dict[str, Any] = {"prompt": [1 + number % 60, 5], "max_tokens": 1 + number % 2}
        body["stream"] = number % 3 == 0
        asked = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(asked, timeout=60) as answer:
            answer.read()


def held(service: Service) -> Held:
    """Return what this process holds."""
    time.sleep(0.3)  # until the front has collected what was answered
    gc.collect()
    scheduler = service.scheduler
    tables = (service.asked, service.answers, service.cancelled, scheduler.ids, scheduler.states)
    kept = (
        sum(len(table) for table in tables) + len(scheduler.iterations) + len(scheduler._arrivals)
    )
    return Held(len(gc.get_objects()), psutil.Process().memory_info().rss / 1024, kept)


def measured(count: int, parts: int = 2) -> list[Held]:
    """Return what is held before and after each of so many parts of ``count`` requests, warm before."""
    with served() as (service, url):
        ask(url, 3 * CAPACITY)
        found = [held(service)]
        for _ in range(parts):
            ask(url, count)
            found.append(held(service))
    return found


if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    before, *after = measured(asked // 5, 5)
    print(f"after {3 * CAPACITY} requests: {before}")
    for part, now in enumerate(after, 1):
        print(f"{part * (asked // 5)} more: {now}")
    last = after[-1]
    print(
        f"A request leaves {(last.objects - before.objects) / asked:+.3f} objects and "
        f"{(last.memory_kb - before.memory_kb) / asked:+.3f} kB."
    )
