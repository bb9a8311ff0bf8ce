r"""CPU seconds of Vidur and AISimulate for 1,319 requests at t = 0, beside those of servegym.

    python -m tests.compare_with_simulators --vidur VIDUR --vidur-python ORACLE/bin/python \
        --aisimulate-python ORACLE/bin/python

from the project's root folder. `tests/golden/make_vidur.py` and `make_aisimulate.py` say how to set up
their environments; both replays are timed there, by `--times`.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: the imports below take seconds
    from servegym.studies.terminal import begin

    begin()

import gzip
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.process.metrics import episode_metrics
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.cli import check_number, parse, run
from servegym.studies.serving import Service, serve, service
from tests.test_vidur import POLICIES, golden, task_of

GOLDEN = Path(__file__).parent / "golden"
OUR_TIMES = 200  # repeats of what takes a few milliseconds

WHAT = """Serving 1,319 GSM8K-like requests that are all present at t = 0, 200 clients a replica (the
requests of `tests/golden/vidur.json.gz`). CPU seconds, the least of {times} runs, of servegym the least
of {ours}.

- **Vidur** at its commit, its event loop with a constant in place of its predictor of execution times,
  which takes time of its own. Metrics off, and on as it is used.
- **AISimulate**, vLLM V1's scheduler in Rust, its JSON read and written.
- **servegym**: the episode under the same rule in compiled code, and with all that a user's episode has
  beside it: requests checked, state and lower bound made, metrics computed."""


@dataclass(frozen=True)
class Args:
    """Time two other simulators and servegym on the same requests."""

    vidur: Path
    """Folder of Vidur's sources."""
    vidur_python: Path
    """Interpreter of an environment with Vidur's requirements."""
    aisimulate_python: Path
    """Interpreter of an environment with AISimulate."""
    times: int = 3
    """Runs of each case; the quickest counts."""
    output: Path = Path("results/checks")
    """Folder for simulators.md."""

    def __post_init__(self) -> None:
        check_number("--times", self.times, 1, 1000)


def their_times(python: Path, script: str, times: int, **environment: str) -> list[dict[str, Any]]:
    """The lines that a golden file's script prints about its seconds."""
    command = [str(python), str(GOLDEN / script), "--times", str(times)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServegymError(f"{script} under {python} ended with {done.returncode}: {last}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def our_times(episode: Service, task: TaskConfig, policy: str) -> tuple[float, float]:
    """CPU seconds of the compiled episode, and of everything around it, too."""
    prompts, outputs = np.array(golden()["requests"]).T
    bare, whole = list[float](), list[float]()
    for _ in range(OUR_TIMES):
        episode.load()
        began = time.process_time()
        episode.play()
        bare.append(time.process_time() - began)
        began = time.process_time()
        again = service(task, policy, prompts, outputs)
        again.load()
        again.play()
        episode_metrics(again.state, 0)
        whole.append(time.process_time() - began)
    return min(bare), min(whole)


def vidur_rows(args: Args) -> list[str]:
    """One line a case: theirs without and with metrics, ours, ratios."""
    found = their_times(args.vidur_python, "make_vidur.py", args.times, PYTHONPATH=str(args.vidur))
    prompts, outputs = np.array(golden()["requests"]).T
    lines = []
    for off, on in zip(found[::2], found[1::2], strict=True):
        policy, task = POLICIES[off["scheduler"]], task_of(off)
        episode = service(task, policy, prompts, outputs)
        bare, whole = our_times(episode, task, policy)
        served = serve(task, policy, prompts, outputs)
        lines.append(
            f"| `{policy}` | {off['budget']} | {off['replicas']} | {sum(off['passes'])} | "
            f"{sum(served.passes)} | {off['cpu_s']:.2f} | {on['cpu_s']:.2f} | {1e3 * bare:.2f} | "
            f"{1e3 * whole:.2f} | {off['cpu_s'] / bare:.0f} | {on['cpu_s'] / whole:.0f} |"
        )
    return lines


def replayed_task(case: dict[str, Any]) -> TaskConfig:
    """AISimulate's numbers as a task, in milliseconds."""
    cluster = ClusterConfig(
        replicas=case["workers"],
        clients=case["clients"],
        kv_capacity_tokens=case["blocks"] * case["block"],
        kv_block_tokens=case["block"],
        chunk_tokens=case["budget"],
        mixed="sum",
    )
    decode, prefill = AffineDecode(case["decode_ms"]), AffinePrefill(case["prefill_ms"], 0.0)
    return TaskConfig("aisimulate", cluster, StageCosts(decode, prefill))


def aisimulate_rows(args: Args) -> list[str]:
    """One line a case: last tokens, preemptions and seconds, theirs and ours."""
    prompts, outputs = np.array(golden()["requests"]).T
    lines = []
    for case in their_times(args.aisimulate_python, "make_aisimulate.py", args.times):
        task = replayed_task(case)
        episode = service(task, "vllm", prompts, outputs)
        bare, whole = our_times(episode, task, "vllm")
        served = serve(task, "vllm", prompts, outputs)
        lines.append(
            f"| {case['workers']} | {case['block'] * case['blocks']} | {case['last_ms'] / 1e3:.2f} | "
            f"{served.seconds / 1e3:.2f} | {case['preemptions']} | {served.preemptions} | "
            f"{case['cpu_s']:.3f} | {1e3 * bare:.2f} | {1e3 * whole:.2f} | "
            f"{case['cpu_s'] / bare:.0f} | {case['cpu_s'] / whole:.0f} |"
        )
    return lines


def version(script: str) -> str:
    """The commit or version that a golden file notes."""
    name = "vidur" if script == "make_vidur.py" else "aisimulate_vllm"
    header = json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))["header"]
    return str(header.get("commit") or header["version"])


def report(args: Args) -> str:
    """Return simulators.md."""
    first = (
        "| policy | budget | replicas | passes, Vidur | ours | Vidur (s) | with metrics (s) | "
        "ours (ms) | whole (ms) | ratio | whole |"
    )
    second = (
        "| replicas | KV tokens | last token, AISimulate (s) | ours | preemptions, AISimulate | ours | "
        "AISimulate (s) | ours (ms) | whole (ms) | ratio | whole |"
    )
    command = (
        "`python -m tests.compare_with_simulators --vidur VIDUR --vidur-python ORACLE/bin/python "
        "--aisimulate-python ORACLE/bin/python`"
    )
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    numbers = (
        f"Version {version('make_aisimulate.py')}, 40 ms for the prefill part of a pass and 40 ms for "
        "its decode part,\nblocks of 16, `vllm` with a budget of 2048."
    )
    parts = [
        "# The time that other simulators take",
        command,
        WHAT.format(times=args.times, ours=OUR_TIMES),
        f"Machine: {machine}.",
        f"## Vidur\n\nCommit {version('make_vidur.py')}. A pass is a stage or a decode round.",
        "\n".join([first, "|:--|" + "--:|" * 10, *vidur_rows(args)]),
        f"## AISimulate\n\n{numbers}",
        "\n".join([second, "|" + "--:|" * 11, *aisimulate_rows(args)]),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Time and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    text = report(args)
    write_file(args.output / "simulators.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    run(main)
