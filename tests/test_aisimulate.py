"""The reference equals AISimulate: an independent replay of vLLM V1, of TensorRT-LLM and of SGLang.

`tests/golden/make_aisimulate.py` made the files. Times are milliseconds here as there.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.serving import serve
from tests.against_cluster import play_fast, serve_case
from tests.golden.make_aisimulate import users_requests
from tests.random_clusters import ClusterCase
from tests.reference_cluster import ClusterSpec, ReplicaSpec

GOLDEN = Path(__file__).parent / "golden"


def golden_cases(backend: str) -> list[dict[str, Any]]:
    packed = (GOLDEN / f"aisimulate_{backend}.json.gz").read_bytes()
    golden = json.loads(gzip.decompress(packed))
    return [dict(zip(golden["header"]["fields"], row, strict=True)) for row in golden["cases"]]


SETTINGS: dict[str, dict[str, Any]] = {
    "vllm": {},
    "trtllm": {"admission_guard": "full"},
    "sglang": {
        "admission_guard": "sglang",
        "preempt": "fewest-output",
        "max_prefill_tokens": 16_384,
    },
}
"""What each scheduler needs besides the numbers of its cases."""


def cluster_case(case: dict[str, Any], backend: str) -> ClusterCase:
    capacity = case["blocks"] * case["block"]
    decode = AffineDecode(float(case["decode_ms"]))
    prefill = AffinePrefill(float(case["prefill_ms"]), 0.0)
    spec = ClusterSpec(
        (ReplicaSpec(case["clients"], capacity),) * case["workers"],
        StageCosts(decode, prefill),
        kv_block_tokens=case["block"],
        chunk_tokens=case["budget"],
        mixed="sum",
        **SETTINGS[backend],
    )
    rows = [(float(arrival), prompt, output) for arrival, prompt, output in case["requests"]]
    return ClusterCase(rows, spec)


@pytest.mark.parametrize(("backend", "least"), [("vllm", 300), ("trtllm", 100), ("sglang", 100)])
def test_every_token_time_and_every_admission_is_the_same(backend: str, least: int) -> None:
    cases = golden_cases(backend)
    assert len(cases) >= least
    for case in cases:
        outcome = serve_case(cluster_case(case, backend))
        for ours, theirs in zip(outcome.records, case["answers"], strict=True):
            worker, first_ms, last_ms, admissions_ms = theirs
            assert ours.replica == worker
            assert ours.first_token_s == pytest.approx(first_ms, rel=1e-9)
            assert ours.finished_s == pytest.approx(last_ms, rel=1e-9)
            assert ours.admitted_s == pytest.approx(admissions_ms[0], rel=1e-9)
            assert ours.preemptions + 1 == len(admissions_ms)


@pytest.mark.parametrize("backend", list(SETTINGS))
def test_the_compiled_core_gives_the_same(backend: str) -> None:
    for case in golden_cases(backend):
        log, _, rows, _ = play_fast(cluster_case(case, backend))
        for i, row in enumerate(rows):
            worker, first_ms, last_ms, admissions_ms = case["answers"][row]
            assert log.replica[i] == worker
            assert log.first_token_s[i] == pytest.approx(first_ms, rel=1e-9)
            assert log.finished_s[i] == pytest.approx(last_ms, rel=1e-9)
            assert log.admitted_s[i] == pytest.approx(admissions_ms[0], rel=1e-9)
            assert log.preemptions[i] + 1 == len(admissions_ms)


def test_the_cases_hold_what_they_are_for() -> None:
    """Preemption of many, prompts longer than a pass, several workers, arrivals that coincide."""
    cases = golden_cases("vllm")
    preempted = [case for case in cases if any(len(times) > 1 for *_, times in case["answers"])]
    chunked = [case for case in cases if any(p > case["budget"] for _, p, _ in case["requests"])]
    together = [case for case in cases if len({a for a, _, _ in case["requests"]}) == 1]
    assert len(preempted) >= 80
    assert len(chunked) >= 80
    assert len(together) >= 50
    assert {case["workers"] for case in cases} == {1, 2, 3, 4}


def test_no_case_without_eviction_readmits() -> None:
    admissions = [times for case in golden_cases("trtllm") for *_, times in case["answers"]]
    assert all(len(times) == 1 for times in admissions)


def test_the_cases_of_sglang_hold_what_they_are_for() -> None:
    """Requests that are retracted, prompts in pieces, and ends of pieces beside other prompts."""
    cases = golden_cases("sglang")
    retracted = [case for case in cases if any(len(times) > 1 for *_, times in case["answers"])]
    chunked = [case for case in cases if any(p > case["budget"] for _, p, _ in case["requests"])]
    assert len(retracted) >= 10
    assert len(chunked) >= 50
    assert {case["block"] for case in cases} == {1, 16}


def test_as_many_clients_as_users_are_users_who_ask_again() -> None:
    """A closed loop is the same schedule as all its requests at the start, and a client for each user."""
    golden = json.loads((GOLDEN / "aisimulate_users.json").read_text("utf-8"))
    case = golden["header"]
    cluster = ClusterConfig(
        clients=case["users"],
        kv_capacity_tokens=case["blocks"] * case["block"],
        kv_block_tokens=case["block"],
        chunk_tokens=case["budget"],
        mixed="sum",
    )
    costs = StageCosts(AffineDecode(case["decode_ms"]), AffinePrefill(case["prefill_ms"], 0.0))
    for seed, preemptions, last_ms in golden["rows"]:
        _, prompts, outputs = zip(*users_requests(seed), strict=True)
        served = serve(TaskConfig("users", cluster, costs), "vllm", prompts, outputs)
        assert served.preemptions == preemptions
        assert served.seconds == pytest.approx(last_ms, rel=1e-12)
