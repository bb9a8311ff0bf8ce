"""Result folders of clusters: keys that are tables, and policies that a task cannot have."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from servegym.envs import ServegymError
from servegym.envs.playing.identity import compare, notes_of
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import evaluate as command

TINY = TASKS["servegym/Tiny-v0"]
TEXT = '[cluster]\nreplicas = 2\nclients = 2\n{keys}[cost]\npreset = "tiny"\n[workload]\nsource = "tiny"\n'


def run(tmp_path: Path, keys: str, policies: str = "fcfs", seeds: str = "0") -> pd.DataFrame:
    path, out = tmp_path / "t.toml", tmp_path / "out"
    path.write_text(TEXT.format(keys=keys))
    options = ["--task", str(path), "--policies", policies, "--seeds", seeds, "--jobs", "1"]
    assert command.main([*options, "--optimum-limit", "0", "--output", str(out)]) == 0
    return pd.read_csv(out / "episodes.csv")


@pytest.mark.parametrize("key", ["link", "host_link"])
def test_a_link_of_numbers_is_noted_and_compared(key: str, tmp_path: Path) -> None:
    link = key + " = {{latency_s = {}, bytes_per_s = 1e9}}\n"
    assert len(run(tmp_path, link.format(0.5))) == 1
    assert len(run(tmp_path, link.format(0.5), seeds="0:2")) == 2  # goes on in the same folder
    with pytest.raises(ServegymError, match=r"\(latency_s 0\.5, now 0\.25\)"):
        run(tmp_path, link.format(0.25))
    with pytest.raises(ServegymError, match=rf"\({key} {{'latency_s': 0\.5, .*, now 'rdma1'\)"):
        run(tmp_path, f'{key} = "rdma1"\n')


def test_a_link_by_name_is_not_one_of_numbers() -> None:
    named, numbers = (
        json.loads(json.dumps(notes_of(with_overrides(TINY, {"cluster": {"link": link}}))))
        for link in ("rdma1", {"latency_s": 1e-3, "bytes_per_s": 40e9})
    )
    compare("out", "{name} {old} {new}", named, named, "")
    for old, new in ((named, numbers), (numbers, named)):
        with pytest.raises(ServegymError, match="link"):
            compare("out", "{name} {old} {new}", old, new, "")


def test_a_policy_that_declares_what_the_task_cannot_have_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match=r"policy sglang: .* 'host'"):
        run(tmp_path, 'evict = "host"\n', "sglang")
    assert not (tmp_path / "out").exists()


def test_after_a_refusal_the_mended_task_may_use_the_same_folder(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match=r"policy vllm: .* cluster.chunk_tokens is 0"):
        run(tmp_path, "", "vllm")
    assert set(run(tmp_path, "chunk_tokens = 8\n", "vllm")["policy"]) == {"vllm"}
    with pytest.raises(ServegymError, match=r"\(chunk_tokens 8, now 0\)"):
        run(tmp_path, "")  # now it holds an episode
