"""Makes the golden file of Vidur: how many passes its schedulers need for 1,319 requests at t = 0.

A development tool. In an environment of its own, with Vidur's sources (github.com/microsoft/vidur, at
``COMMIT``) in a folder::

    python -m venv oracle
    oracle/bin/pip install numpy pandas scikit-learn wandb ddsketch plotly_express fasteners
    PYTHONPATH=VIDUR oracle/bin/python tests/golden/make_vidur.py

Counts do not depend on seconds, as all requests are present at the start and each replica has its share:
a constant stands for Vidur's predictor of execution times. Its metrics are off.

``--times 3`` prints CPU seconds instead (``tests.compare_with_simulators`` reads them).
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import logging
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

COMMIT = "7d47513363ec447a741ac5e47241580b47724fbf"
SEED = 1319
PROMPTS = Path(__file__).parents[2] / "envs" / "data" / "gsm8k_prompts.json"
MOST_OUTPUT = 1024
PLENTY = 1_000_000  # blocks that never run out
BLOCK = 16

Case = dict[str, Any]

SCARCE = 2500  # blocks that many requests are preempted for

CASES: list[Case] = [
    {
        "scheduler": scheduler,
        "replicas": replicas,
        "budget": budget,
        "clients": clients,
        "blocks": blocks,
    }
    for scheduler, budgets in (("sarathi", (128, 512, 2048)), ("vllm", (2048, 4096)))
    for budget in budgets
    for clients in (128, 200)
    for replicas in (1, 4)
    for blocks in (PLENTY, SCARCE)
    if blocks == PLENTY or (budget in (512, 4096) and clients == 200)
]
"""``clients`` is Vidur's batch_size_cap, ``budget`` its chunk_size or max_tokens_in_batch."""


def requests_of(seed: int) -> list[list[int]]:
    """GSM8K's 1,319 prompt lengths in random order, each with a lognormal output."""
    rng = random.Random(seed)
    histogram = json.loads(PROMPTS.read_text("utf-8"))["histogram"]
    prompts = [int(length) for length, count in histogram.items() for _ in range(count)]
    rng.shuffle(prompts)
    outputs = [round(rng.lognormvariate(5.71294, 0.51011)) for _ in prompts]
    return [[p, min(max(o, 1), MOST_OUTPUT)] for p, o in zip(prompts, outputs, strict=True)]


def configuration(case: Case, folder: str, metrics: bool) -> Any:
    """The case as Vidur's SimulationConfig."""
    config = importlib.import_module("vidur.config")
    numbers = {
        "batch_size_cap": case["clients"],
        "block_size": BLOCK,
        "watermark_blocks_fraction": 0.0,
        "num_blocks": case["blocks"],
    }
    if case["scheduler"] == "sarathi":
        scheduler = config.SarathiSchedulerConfig(chunk_size=case["budget"], **numbers)
    else:
        scheduler = config.VllmSchedulerConfig(max_tokens_in_batch=case["budget"], **numbers)
    return config.SimulationConfig(
        log_level="error",
        cluster_config=config.ClusterConfig(
            num_replicas=case["replicas"],
            replica_scheduler_config=scheduler,
            global_scheduler_config=config.RoundRobinGlobalSchedulerConfig(),
        ),
        metrics_config=config.MetricsConfig(
            write_metrics=metrics,
            enable_chrome_trace=False,
            store_plots=False,
            output_dir=folder,
            cache_dir=folder,
        ),
    )


def replay(case: Case, requests: list[list[int]], metrics: bool = False) -> dict[str, Any]:
    """Run Vidur's event loop and count its passes."""
    entities = importlib.import_module("vidur.entities")
    simulator = importlib.import_module("vidur.simulator")
    schedulers = importlib.import_module("vidur.scheduler.global_scheduler.base_global_scheduler")
    counted: dict[str, Any] = {
        "passes": [0] * case["replicas"],
        "with_prompts": 0,
        "preemptions": 0,
    }
    second = entities.ExecutionTime(1, 1000.0, *[0.0] * 18)  # one layer, in milliseconds

    class Constant:
        """Every pass takes a second; it counts them."""

        def __init__(self, **_: Any) -> None: ...

        def get_execution_time(self, batch: Any, stage: int) -> Any:
            assert stage == 0
            counted["passes"][batch.replica_id] += 1
            counted["with_prompts"] += batch.num_prefill_tokens > 0
            return second

    class Listed:
        """The requests as they are."""

        @staticmethod
        def generate() -> list[Any]:
            return [entities.Request(0.0, prompt, output) for prompt, output in requests]

    schedulers.ExecutionTimePredictorRegistry.get = lambda _kind, **_: Constant()
    simulator.RequestGeneratorRegistry.get = lambda _kind, _config: Listed()
    simulator.atexit.register = lambda _function: None
    entities.Replica.generate_id = iter(range(case["replicas"])).__next__
    restart = entities.Request.restart

    def counting(request: Any) -> None:
        counted["preemptions"] += 1
        restart(request)

    entities.Request.restart = counting
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        simulator.Simulator(configuration(case, folder, metrics)).run()
        seconds = time.process_time() - began
    return {**counted, "cpu_s": seconds}


def measured(case: Case, requests: list[list[int]], metrics: bool = False) -> dict[str, Any]:
    """``replay`` in a process of its own: Vidur numbers its objects from the start of a process."""
    with multiprocessing.Pool(1) as pool:
        return pool.apply(replay, (case, requests, metrics))


def write_golden(path: Path) -> None:
    """Count the passes of every case; the same file on every machine."""
    requests, rows = requests_of(SEED), list[Case]()
    for case in CASES:
        counts = measured(case, requests)
        del counts["cpu_s"]
        rows.append({**case, **counts})
        print(json.dumps(rows[-1]), flush=True)
    header = {
        "simulator": "microsoft/vidur",
        "commit": COMMIT,
        "command": "PYTHONPATH=VIDUR python tests/golden/make_vidur.py",
        "seed": SEED,
        "block": BLOCK,
        "watermark": 0.0,
        "requests": ["prompt", "output"],
        "passes": "of each replica",
    }
    body = ",\n".join(json.dumps(row) for row in rows)
    lengths = json.dumps(requests, separators=(",", ":"))
    text = f'{{"header": {json.dumps(header)},\n"requests": {lengths},\n"cases": [\n{body}\n]}}\n'
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def print_times(times: int) -> None:
    """The least CPU seconds of so many runs of each case that memory does not limit."""
    requests = requests_of(SEED)
    for case in CASES:
        if case["clients"] != 200 or case["blocks"] != PLENTY:
            continue
        for metrics in (False, True):
            runs = [measured(case, requests, metrics) for _ in range(times)]
            least = min(run["cpu_s"] for run in runs)
            row = {**case, "metrics": metrics, "passes": runs[0]["passes"], "cpu_s": least}
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "vidur.json.gz")
    parser.add_argument("--times", type=int, help="only print CPU seconds, the least of so many")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.times:
        print_times(arguments.times)
    else:
        write_golden(arguments.output)


if __name__ == "__main__":
    main()
