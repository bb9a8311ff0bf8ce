"""Makes the golden files of AISimulate, an independent replay of the schedulers of real engines.

A development tool. In an environment of its own (Python 3.11 – 3.13; nothing but the wheel is needed)::

    python -m venv oracle
    oracle/bin/pip install --no-deps --pre aisimulate==0.13.0.dev202610270000000085
    oracle/bin/python tests/golden/make_aisimulate.py

``--times 3`` prints CPU seconds of the 1,319 requests of Vidur's golden file instead
(``tests.compare_with_simulators`` reads them). Times are in milliseconds. A pass has a fixed time for its
prefill part and one for its decode part.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

VERSION = "0.13.0.dev202610270000000085"
FIELDS = "workers blocks block clients budget prefill_ms decode_ms".split()
CASES = {"vllm": 400, "trtllm": 160, "sglang": 160}
SEEDS = {"vllm": 1, "trtllm": 2, "sglang": 3}
USERS = 128
LIMIT_S = 2  # a case takes milliseconds, or never ends

TIMED: list[dict[str, Any]] = [
    {
        "workers": workers,
        "blocks": blocks,
        "block": 16,
        "clients": 200,
        "budget": 2048,
        "prefill_ms": 40,
        "decode_ms": 40,
    }
    for workers in (1, 4)
    for blocks in (6000, 2500)
]
"""Cases without their requests."""

Case = dict[str, Any]


def random_case(rng: random.Random, backend: str) -> Case:
    """A small cluster, its memory between one largest request and plenty, requests in any order."""
    block = rng.choice([1, 16]) if backend == "sglang" else 16
    longest = rng.choice([24, 80, 240])
    until_ms = rng.choice([0, 20, 200, 600])
    requests = [
        [
            rng.randint(0, 4 * until_ms) / 4,
            rng.randint(1, longest),
            rng.randint(1, max(longest // 2, 2)),
        ]
        for _ in range(rng.randint(2, 16))
    ]
    largest = max(-(-(prompt + output) // block) for _, prompt, output in requests)
    extra = rng.choice([0, 1, 2, largest // 2, largest, 2 * largest, 10 * largest])
    return {
        "workers": rng.randint(1, 4),
        "blocks": largest + extra,
        "block": block,
        "clients": rng.choice([1, 2, 3, 4, 8, 16]),
        "budget": rng.choice([16, 32, 64, 96, 128, 512, 2048]),
        "prefill_ms": rng.choice([1, 4, 10, 16.5, 40]),
        "decode_ms": rng.choice([1, 2.25, 7, 40]),
        "requests": requests,
    }


def replay_spec(case: Case, backend: str) -> dict[str, Any]:
    """The case as AISimulate's ReplaySpec, version 1."""
    rank = {
        "backend": backend,
        "num_gpu_blocks": case["blocks"],
        "block_size": case["block"],
        "max_num_seqs": case["clients"],
        "max_num_batched_tokens": case["budget"],
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "preemption_mode": "lifo",
        "worker_type": "aggregated",
        "timing_model": {
            "type": "fixed",
            "prefill_ms": float(case["prefill_ms"]),
            "decode_ms": float(case["decode_ms"]),
        },
    }
    if backend == "sglang":  # it reads its budget here
        rank["sglang"] = {"chunked_prefill_size": case["budget"]}
    workers = {"initial_workers": case["workers"], "startup_delay_ms": 0.0}
    return {
        "version": 1,
        "topology": {"kind": "aggregated", "workers": workers},
        "engine": {"rank": rank},
        "adapters": {
            "placement": {"provider": "round_robin", "config": None},
            "scaling": {"provider": "none", "config": None},
        },
        "record_per_request": True,
        "requests": [
            {
                "id": str(row),
                "arrival_time_ms": float(arrival),
                "input_tokens": prompt,
                "output_tokens": output,
            }
            for row, (arrival, prompt, output) in enumerate(case["requests"])
        ],
    }


def answers(report: dict[str, Any]) -> list[list[Any]]:
    """Of each request, in order of row: worker, first and last token, times of its admissions."""
    rows = sorted(report["per_request"], key=lambda request: int(request["request_id"]))
    for row in rows:
        if row["terminal_status"] != "completed":
            raise SystemExit(f"request {row['request_id']} is {row['terminal_status']}")
    return [
        [
            row["decode_worker_idx"],
            row["first_token_ms"],
            row["last_token_ms"],
            [admission["at_ms"] for admission in row["admission_history"]],
        ]
        for row in rows
    ]


def write_golden(path: Path, backend: str, cases: list[Case]) -> None:
    """One line a case, packed without a time, so that equal cases make equal files."""
    example = replay_spec({**cases[0], "requests": cases[0]["requests"][:1]}, backend)
    fields = [*FIELDS, "requests", "answers"]
    header = {
        "simulator": "aisimulate",
        "version": VERSION,
        "command": f"python tests/golden/make_aisimulate.py --backends {backend}",
        "seed": SEEDS[backend],
        "spec": example,
        "fields": fields,
        "requests": ["arrival_ms", "prompt", "output"],
        "answers": ["worker", "first_token_ms", "last_token_ms", "admissions_ms"],
    }
    rows = [json.dumps([case[field] for field in fields], separators=(",", ":")) for case in cases]
    body = ",\n".join(rows)
    text = f'{{"header": {json.dumps(header)},\n"cases": [\n{body}\n]}}\n'.encode()
    path.write_bytes(gzip.compress(text, compresslevel=9, mtime=0))
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes")


def runtime() -> Callable[[str], str]:
    """AISimulate's entry, or one line that says how to get it."""
    try:
        module = importlib.import_module("aisimulate._runtime")
    except ImportError:
        sys.exit(f"aisimulate is missing: pip install --no-deps --pre aisimulate=={VERSION}")
    found = metadata.version("aisimulate")
    if found != VERSION:
        sys.exit(f"the golden files are of aisimulate {VERSION}, this is {found}")
    return module.run_replay_json


def replay(case: Case, backend: str) -> list[list[Any]] | None:
    """The answers in a process of their own; None if AISimulate refuses the case or never ends it.

    It refuses a pass that takes no time, and some cases of SGLang with little memory never end.
    """
    with multiprocessing.Pool(1) as pool:
        report = pool.apply_async(runtime(), [json.dumps(replay_spec(case, backend))])
        try:
            return answers(json.loads(report.get(timeout=LIMIT_S)))
        except multiprocessing.TimeoutError:
            print(f"{backend}: drawn again, no end after {LIMIT_S} s")
        except RuntimeError as error:
            if "effect-free zero-duration pass" not in str(error):
                raise
            print(f"{backend}: drawn again, {error}")
    return None


def print_times(times: int) -> None:
    """CPU seconds of each case of ``TIMED``, the least of so many runs, its JSON read and written.

    With them the last token and the admissions beyond each request's first.
    """
    packed = (Path(__file__).parent / "vidur.json.gz").read_bytes()
    requests = [[0, *lengths] for lengths in json.loads(gzip.decompress(packed))["requests"]]
    play = runtime()
    for case in TIMED:
        runs = []
        for _ in range(times):
            began = time.process_time()
            report = json.loads(
                play(json.dumps(replay_spec({**case, "requests": requests}, "vllm")))
            )
            runs.append(time.process_time() - began)
        found = answers(report)
        last_ms = max(last for _, _, last, _ in found)
        again = sum(len(admissions) - 1 for *_, admissions in found)
        row = {**case, "last_ms": last_ms, "preemptions": again, "cpu_s": min(runs)}
        print(json.dumps(row), flush=True)


def users_requests(seed: int) -> list[list[int]]:
    """Prompts of about 1000 and outputs of about 5000 tokens, as in vLLM's pull request 44594."""
    rng = random.Random(seed)
    return [[0, rng.randint(800, 1200), rng.randint(4000, 6000)] for _ in range(450)]


def write_users(path: Path) -> None:
    """128 users who ask again once they are answered: preemptions and last token of some seeds."""
    case = {
        "workers": 1,
        "blocks": 18_724,
        "block": 16,
        "clients": 256,
        "budget": 8192,
        "prefill_ms": 20,
        "decode_ms": 7,
    }
    rows = []
    for seed in range(5):
        spec = replay_spec({**case, "requests": users_requests(seed)}, "vllm")
        found = answers(json.loads(runtime()(json.dumps({**spec, "max_in_flight": USERS}))))
        again = sum(len(admissions) - 1 for *_, admissions in found)
        rows.append([seed, again, max(last for _, _, last, _ in found)])
    header = {
        "simulator": "aisimulate",
        "version": VERSION,
        "command": "python tests/golden/make_aisimulate.py",
        **case,
        "users": USERS,
        "rows": ["seed", "preemptions", "last_ms"],
    }
    path.write_text(json.dumps({"header": header, "rows": rows}) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", nargs="+", default=sorted(CASES), choices=sorted(CASES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--times", type=int, help="only print CPU seconds, the least of so many")
    arguments = parser.parse_args()
    runtime()
    if arguments.times:
        print_times(arguments.times)
        return
    for backend in arguments.backends:
        rng = random.Random(SEEDS[backend])
        cases: list[Case] = []
        while len(cases) < CASES[backend]:
            case = random_case(rng, backend)
            found = replay(case, backend)
            if found is not None:
                cases.append({**case, "answers": found})
        write_golden(arguments.output / f"aisimulate_{backend}.json.gz", backend, cases)
    write_users(arguments.output / "aisimulate_users.json")


if __name__ == "__main__":
    main()
