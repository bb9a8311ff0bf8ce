"""Measure what a layer of a large model costs on a GPU, and write a cost model of all its layers.

A model that fits no single device is measured by a few of its layers: decode rounds and prefills run at
several depths, a line through them gives the whole model, and a deeper one, which no line is fitted to,
checks it. What several devices say to each other is not in it. On a CPU, a tiny shape tries it out.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from tqdm import tqdm

from servegym.engines.calibration import KINDS, LEAST, cost_section, fit_costs
from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.studies.cli import check_folder, check_number, command_line, parse, split_names
from servegym.studies.engines.depths import Cell, cells, depth_table, extrapolated, log_of, timed
from servegym.studies.engines.held_out import costs_line, quality_table
from servegym.studies.speed import commit, machine


@dataclass(frozen=True)
class Args:
    """Time layers of a LLaMA; writes cells.csv, iterations.csv, cost.toml and profile.md."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cuda: bfloat16 and CUDA events; cpu: float32 and CPU time, to try it out at a small shape."""
    width: int = 8192
    """Width of the model; the default shape is LLaMA-65B's."""
    heads: int = 64
    """Heads of attention."""
    inner: int = 22016
    """Width of the feed-forward part."""
    vocabulary: int = 32000
    """Token ids."""
    layers: int = 80
    """Layers of the whole model."""
    depths: str = "2,4,8"
    """Depths that the lines are fitted to."""
    held_out_depth: int = 16
    """The depth that checks them."""
    batches: str = "1,2,4,8,16,32,64,128,200,256"
    """Requests of a decode round."""
    cached: str = "64,128,256,512,1024,2048"
    """Cached tokens of each of them."""
    prompts: str = "16,64,128,256,512,1024,2048,4096,8192"
    """Tokens of a prefill; as one prompt, and as prompts of 128 and of 512."""
    kv_tokens: int = 100_000
    """Stages that hold more tokens are left out; of LLaMA-65B at depth 16 these take 52 GB."""
    repeats: int = 30
    """Times that each stage is measured."""
    warm_ups: int = 5
    """Times that it runs before."""
    clients: int = 200
    """Of the task that the cost model is for."""
    seed: int = 0
    """Of weights and tokens."""
    output: Path = Path("results/profiled")
    """Folder for the results."""

    def __post_init__(self) -> None:
        for name in (
            "width",
            "heads",
            "inner",
            "vocabulary",
            "layers",
            "held_out_depth",
            "kv_tokens",
        ):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, 10**7)
        check_number("--repeats", self.repeats, 1, 10_000)
        check_number("--warm-ups", self.warm_ups, 0, 10_000)
        check_number("--clients", self.clients, 1, 4096)
        check_number("--seed", self.seed, 0, 2**32)
        if self.width % (2 * self.heads):
            raise ServegymError(
                f"--width must be an even multiple of the {self.heads} heads, got {self.width}"
            )
        depths = self.numbers("depths", self.layers)
        if len(depths) < 2:
            raise ServegymError(f"--depths must name at least two depths, got {self.depths!r}")
        if self.held_out_depth in depths:
            raise ServegymError(
                f"--held-out-depth must not be one of --depths, got {self.held_out_depth}"
            )
        for name in ("batches", "cached", "prompts"):
            self.numbers(name, 10**6)
        for kind in KINDS:
            count = sum(cell.kind == kind for cell in self.cells())
            if count < LEAST:
                raise ServegymError(
                    f"a cost model needs {LEAST} cells of kind {kind}, these options give {count} within "
                    f"--kv-tokens {self.kv_tokens}"
                )

    def cells(self) -> list[Cell]:
        """Return what is to be timed."""
        batches, cached, prompts = (
            self.numbers(name, 10**6) for name in ("batches", "cached", "prompts")
        )
        return cells(batches, cached, prompts, self.kv_tokens)

    def numbers(self, name: str, most: int) -> list[int]:
        """Return the whole numbers of an option, ascending; refuse others."""
        found = []
        for word in split_names(getattr(self, name)):
            if not word.isdecimal() or not 1 <= int(word) <= most:
                raise ServegymError(
                    f"--{name} must be whole numbers in 1 … {most}, as in 1,2,4, got {word!r}"
                )
            found.append(int(word))
        if not found:
            raise ServegymError(f"--{name} names no number")
        return sorted(found)


def measure(args: Args) -> tuple[pd.DataFrame, str]:
    """Time all cells at all depths; return them, and device and attention in words."""
    from servegym.engines.huggingface.layers import Layers, Shape

    depths = [*args.numbers("depths", args.layers), args.held_out_depth]
    todo = args.cells()
    shape = Shape(args.width, args.heads, args.inner, args.vocabulary)
    most = max(cell.tokens for cell in todo)
    layers = Layers(shape, max(depths), most, args.device, args.seed)
    modes = ("eager", "graph") if args.device == "cuda" else ("eager",)
    kernels: dict[str, set[str]] = {}
    for kind in KINDS:
        own = [cell for cell in todo if cell.kind == kind]
        ends = min(own, key=lambda cell: cell.tokens), max(own, key=lambda cell: cell.tokens)
        kernels[kind] = {layers.attention(layers.stage(*cell[1:])) for cell in ends}

    def seconds(cell: Cell, depth: int, mode: str) -> Sequence[float]:
        run = layers.stage(*cell[1:])
        return layers.seconds(run, depth, args.warm_ups, args.repeats, graph=mode == "graph")

    gc.collect()
    gc.freeze()
    try:
        rows = list(timed(tqdm(todo, unit="stage", mininterval=1), depths, modes, seconds))
    finally:
        gc.unfreeze()
    attended = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in kernels.items())
    return pd.DataFrame(rows), f"{layers.described}. Attention by torch's kernels: {attended}."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, extrapolate, fit, print and write."""
    args = parse(Args, argv)
    from servegym.engines.huggingface import check_installed, use_threads
    from servegym.engines.huggingface.layers import check_device

    version = check_installed()
    check_device(args.device)
    check_folder(args.output)
    use_threads(1)
    options = {key: value for key, value in vars(args).items() if value != getattr(Args, key)}
    command = command_line("profile_gpu", **options)
    with locked(args.output):
        table, device = measure(args)
        found = extrapolated(table, args.held_out_depth, args.layers)
        log = log_of(found)
        fit = fit_costs(log, rounds="table")
        where = f"{device} transformers {version}; {machine()}; commit {commit()}."
        text = (
            f"{where}\n\nA LLaMA of width {args.width} with {args.heads} heads and random weights. Depths "
            f"{args.depths} give the lines, depth {args.held_out_depth} checks them; the cost model has "
            f"{args.layers} layers: a single device's equivalent, without communication.\n\n"
            f"{depth_table(found, args.held_out_depth)}\n\nThe cost model of {args.layers} layers:\n\n"
            f"{quality_table(log)}\n\n{costs_line(fit)}"
        )
        write_file(args.output / "cells.csv", table.to_csv(index=False))
        write_file(args.output / "iterations.csv", log.to_csv(index=False))
        head = f"# {command}\n# {device}\n[cluster]\nclients = {args.clients}\n\n"
        write_file(args.output / "cost.toml", head + cost_section(fit.costs))
        page = f"# What a layer costs\n\n`{command}`\n\n{text}\n"
        write_file(args.output / "profile.md", page)
    print(text)
    print(f"wrote {args.output / 'cost.toml'}, which --task takes, and profile.md beside it")
    return 0
