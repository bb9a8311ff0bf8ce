"""Which part of a trace an episode plays: windows, scales, limits, and starts that a seed draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs import ServingEnv, ServingVectorEnv
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.identity import claim_task
from servegym.envs.task.cases import room_for
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import load_task
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.workload import sources
from servegym.envs.workload.arrivals import Arrivals
from servegym.envs.workload.requests import Requests
from servegym.envs.workload.sources import (
    describe_file,
    make_workload,
    output_lengths,
    workload_sha256,
)
from servegym.envs.workload.windows import TraceWindow
from servegym.studies.commands import evaluate, plan
from tests.helpers import refused

Write = Callable[[str, str], Path]

# Arrivals at 0, 1, … 9 s and then at 100, 101, … 104 s; prompts say which. Requests 3 and 12 are long.
TIMES = [*range(10), *range(100, 105)]
ROWS = "".join(f"{t},{k + 1},{5 + 20 * (k in (3, 12))}\n" for k, t in enumerate(TIMES))
HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


@pytest.fixture
def trace(write: Write) -> str:
    return str(write("trace.csv", HEADER + ROWS))


@pytest.fixture
def lengths(write: Write) -> str:
    """The same requests without times."""
    rows = [line.split(",", 1)[1] for line in (HEADER + ROWS).splitlines()]
    return str(write("lengths.csv", "\n".join(rows)))


def play(source: str, seed: int = 0, process: Arrivals | None = None, **window: Any) -> Requests:
    """The requests of one episode."""
    rng = np.random.default_rng(seed)
    return make_workload(source, 1, 0.0, rng, process, TraceWindow(**window))


# Keys of the window; prompts, arrivals and rows of the episode.
WINDOWS: list[tuple[dict[str, Any], list[int], list[float]]] = [
    ({"window_s": 3.0}, [1, 2, 3], [0, 1, 2]),  # the end does not belong to it
    ({"window_s": 3.001}, [1, 2, 3, 4], [0, 1, 2, 3]),
    ({"start_s": 7.0, "window_s": 4.0}, [8, 9, 10], [0, 1, 2]),
    ({"start_s": 7.5, "window_s": 4.0}, [9, 10], [0.5, 1.5]),
    ({"start_s": 101.5}, [13, 14, 15], [0.5, 1.5, 2.5]),
    ({"start_s": 104.0}, [15], [0]),
    ({"start_s": 100.0, "rate_scale": 4.0}, [11, 12, 13, 14, 15], [0, 0.25, 0.5, 0.75, 1]),
    ({"window_s": 2.0, "rate_scale": 0.5}, [1, 2], [0, 2]),
    ({"max_requests": 2}, [1, 2], [0, 1]),
    ({"start_s": 9.0, "max_requests": 2}, [10, 11], [0, 91]),
    ({"start_s": 2.0, "max_tokens": 20, "max_requests": 2}, [3, 5], [0, 2]),
    ({"start_s": 102.0, "max_tokens": 37}, [14, 15], [1, 2]),
]


@pytest.mark.parametrize(("window", "prompts", "arrivals_s"), WINDOWS)
def test_window(trace: str, window: dict[str, Any], prompts: list[int], arrivals_s: list) -> None:
    requests = play(trace, **window)
    assert requests.prompt_tokens.tolist() == prompts
    assert requests.arrival_s.tolist() == arrivals_s
    assert requests.rows is not None  # of the file, as the records have them
    assert requests.rows.tolist() == [prompt - 1 for prompt in prompts]
    task = TaskConfig("t", workload=WorkloadConfig(trace, trace=TraceWindow(**window)))
    assert room_for(task) == len(prompts)


def test_the_whole_file_is_the_file(trace: str) -> None:
    assert play(trace).rows is None
    assert play(trace).arrival_s.tolist() == TIMES
    assert play(trace, rate_scale=2.0).rows is None
    assert play(trace, rate_scale=2.0).arrival_s[-1] == 52


def test_predictions_go_along(write: Write) -> None:
    header = "prompt_tokens,output_tokens,arrival_s,predicted_output_tokens,predicted_spread\n"
    path = str(write("own.csv", header + "1,10,0,11,0.1\n2,20,5,22,0.2\n3,30,6,33,0.3\n"))
    requests = play(path, start_s=5.0, process=Arrivals(rate_per_s=1.0))
    assert requests.predicted_output_tokens.tolist() == [22, 33]
    assert requests.predicted_spread is not None
    assert requests.predicted_spread.tolist() == [0.2, 0.3]


# ---- arrivals of a file -----------------------------------------------------------------------


def test_a_process_takes_the_place_of_the_files_arrivals(trace: str, lengths: str) -> None:
    for source in (trace, lengths):
        drawn = play(source, process=Arrivals(rate_per_s=2.0), seed=3)
        short = make_workload(source, 1, 2.0, np.random.default_rng(3))
        assert np.array_equal(drawn.arrival_s, short.arrival_s)
        assert drawn.prompt_tokens.tolist() == list(range(1, 16))
        assert not np.array_equal(
            drawn.arrival_s, play(source, process=Arrivals(rate_per_s=2.0)).arrival_s
        )
    assert play(lengths).arrival_s.tolist() == [0] * 15


def test_a_process_takes_its_rate_from_the_file(trace: str, lengths: str) -> None:
    """14 gaps in 104 s, of which 13 are of 1 s and one of 91 s."""
    gaps_s = np.diff(TIMES)
    drawn, cv = play(trace, process=Arrivals("gamma")), float(gaps_s.std() / gaps_s.mean())
    again = play(trace, process=Arrivals("gamma", rate_per_s=14 / 104, cv=cv))
    assert drawn.arrival_s == pytest.approx(again.arrival_s, rel=1e-6)
    scaled = play(trace, process=Arrivals("gamma"), rate_scale=2.0)
    assert scaled.arrival_s == pytest.approx(drawn.arrival_s / 2.0, rel=1e-6)
    for arrivals in ({"arrivals": Arrivals(rate_per_s=1.0)}, {"arrival_rate_per_s": 1.0}):
        refused(
            lambda a=arrivals: WorkloadConfig(trace, trace=TraceWindow(rate_scale=2.0), **a),  # type: ignore[misc]
            "rate_scale 2.0 has nothing to scale",
        )
    words = f"workload.arrivals.rate_per_s is missing: {lengths} brings no rate of its own"
    refused(lambda: play(lengths, process=Arrivals("gamma")), words)
    refused(lambda: play(trace, process=Arrivals(rate_per_s=1e-8)), "15 requests at 1e-08 a second")
    refused(
        lambda: make_workload(trace, 1, 1e-8, np.random.default_rng(0)), "arrival_rate_per_s must"
    )


# ---- refusals ---------------------------------------------------------------------------------

BAD_WINDOWS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"start_s": -1.0}, "start_s must lie in 0 … 1e+09, got -1.0", {"start_s": 0.0}),
    ({"start_s": 104.5}, "start_s must be at most 104.0, when the last", {"start_s": 104.0}),
    ({"window_s": float("nan")}, "window_s must lie in 0 … 1e+09, got nan", {"window_s": 1e9}),
    ({"start_s": 50.0, "window_s": 50.0}, "in the 50.0 s from 50.0 s; the next comes at 100.0",
     {"start_s": 50.0, "window_s": 50.5}),
    ({"rate_scale": 0.0}, "rate_scale must lie in 1e-06 … 1e+06, got 0.0", {"rate_scale": 1e6}),
    ({"rate_scale": 1e-7}, "rate_scale must lie in", {"rate_scale": 1e-6}),
    ({"max_requests": -1}, "max_requests must lie in 0 …", {"max_requests": 1}),
    ({"max_requests": 1.5}, "max_requests must be a whole number", {"max_requests": 1}),
    ({"max_tokens": 5}, "none of 15 requests has at most 5 tokens", {"max_tokens": 6}),
    ({"start": "anywhere"}, "unknown value of workload.trace.start: 'anywhere'",
     {"start": "random", "window_s": 5}),
    ({"start": "random"}, "start 'random' needs window_s", {"start": "random", "window_s": 5}),
    ({"start": "random", "max_requests": 3}, "needs window_s, as", {"start": "random", "window_s": 5}),
    ({"start": "random", "window_s": 5, "start_s": 1}, "both start 'random' and start_s", {"start_s": 1}),
    ({"window": 5}, "unknown key 'workload.trace.window'", {"window_s": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "words", "good"), BAD_WINDOWS)
def test_bad_window(trace: str, bad: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    def make(window: dict[str, Any]) -> ServingEnv:
        workload = {"source": trace, "trace": window}
        return ServingEnv("Tiny-v0", overrides={"workload": workload})

    refused(lambda: make(bad), words)
    make(good).reset(seed=0)


def test_a_file_without_times_has_no_window(lengths: str) -> None:
    for window in ({"window_s": 5.0}, {"start_s": 1.0}, {"rate_scale": 2.0}):
        (key,) = window
        words = f"workload.trace.{key}: {lengths} has no arrival times; name workload.arrivals"
        refused(lambda w=window: play(lengths, **w), words)  # type: ignore[misc]
    assert len(play(lengths, max_requests=4)) == 4


def test_a_preset_has_no_window() -> None:
    words = "workload.trace is for files; workload.source 'azure-conv' is a preset"
    refused(lambda: WorkloadConfig("azure-conv", trace=TraceWindow(max_requests=5)), words)
    assert WorkloadConfig("azure-conv", requests=5).trace == TraceWindow()


def test_a_task_file_names_keys_in_any_order(write: Write, trace: str) -> None:
    text = (
        f'[workload]\ntrace = {{window_s = 3.0}}\narrivals = {{}}\nsource = "{Path(trace).name}"\n'
    )
    path = write("task.toml", text)
    task = load_task(str(path))
    assert task.workload.trace == TraceWindow(window_s=3.0)
    assert task.workload.source == trace  # beside the task file
    path = write("bad.toml", text.replace("3.0", "-3.0"))
    refused(lambda: load_task(str(path)), f"{path}: line 2: workload.trace.window_s must lie in")


# ---- random starts ----------------------------------------------------------------------------


def test_random_starts_are_uniform_where_there_are_requests(trace: str) -> None:
    """A window of 5 s may begin in 0 … 9 s and in 95 … 99 s, where it holds a request: (9 + 4) s."""
    starts, seeds = [], 2000
    for seed in range(seeds):
        requests = play(trace, seed, start="random", window_s=5.0)
        assert 1 <= len(requests) <= 5
        assert requests.arrival_s[0] >= 0
        assert requests.arrival_s[-1] < 5
        assert requests.rows is not None
        starts.append(TIMES[requests.rows[0]] - requests.arrival_s[0])
    late = np.array(starts) > 50
    assert late.mean() == pytest.approx(4 / 13, abs=4 * 0.0103)
    early = np.array(starts)[~late]
    assert early.mean() == pytest.approx(4.5, abs=4 * 9 / np.sqrt(12 * len(early)))
    assert early.max() <= 9
    assert 95 <= np.array(starts)[late].min() <= max(starts) <= 99


def test_random_windows_are_never_empty(write: Write) -> None:
    for times in ([0.0], [0.0, 1e6], [5.0, 5.0], [0.0, 0.0, 3.0]):
        rows = "".join(f"{7},{3},{t}\n" for t in times)
        path = str(write("own.csv", "prompt_tokens,output_tokens,arrival_s\n" + rows))
        for window_s in (0.5, 3.0, 1e9):
            for seed in range(20):
                assert len(play(path, seed, start="random", window_s=window_s)) >= 1


def test_random_rows_of_a_file_without_times(lengths: str) -> None:
    first = {
        play(lengths, seed, start="random", max_requests=12).prompt_tokens[0] for seed in range(60)
    }
    assert first == {1, 2, 3, 4}
    assert len(play(lengths, start="random", max_requests=99)) == 15


def test_episodes_of_different_sizes_in_all_environments(trace: str) -> None:
    """The vector environment has room for the largest; a row plays what the single one plays."""
    window = {"start": "random", "window_s": 6.0}
    overrides: dict[str, Any] = {
        "workload": {"source": trace, "trace": window},
        "cluster": {"clients": 2},
    }
    task = with_overrides(load_task("Tiny-v0"), overrides)
    assert room_for(task) == 6
    vector = ServingVectorEnv(3, task)
    observations, infos = vector.reset(seed=7)
    singles = [ServingEnv(task) for _ in range(3)]
    for e, env in enumerate(singles):
        observation, info = env.reset(seed=7 + e)
        assert np.array_equal(observations[e], observation)
        assert info["lower_bound_s"] == infos["lower_bound_s"][e]
    sizes = {e: [len(env.records().arrival_s)] for e, env in enumerate(singles)}
    for _ in range(60):
        actions = np.array([env.action_masks().argmax() for env in singles])
        observations, rewards, terminated, _, _ = vector.step(actions)
        for e, env in enumerate(singles):
            observation, reward, over, _, _ = env.step(actions[e])
            assert (reward, over) == (rewards[e], terminated[e])
            if over:  # both go on with their generators
                observation, _ = env.reset()
                sizes[e].append(len(env.records().arrival_s))
            assert np.array_equal(observations[e], observation)
    assert len({size for row in sizes.values() for size in row}) > 2


def test_a_case_by_its_seed_is_the_episode_of_its_seed(trace: str) -> None:
    workload = {"source": trace, "trace": {"start": "random", "window_s": 6.0}}
    task = with_overrides(load_task("Tiny-v0"), {"workload": workload})
    env = ServingEnv(task)
    for seed in range(5):
        env.reset(seed=seed)
        assert np.array_equal(env.records().arrival_s, make_case(task, seed).requests.arrival_s)


# ---- what results depend on -------------------------------------------------------------------


def test_hashes(trace: str) -> None:
    found = workload_sha256(trace)
    Path(trace).write_text(HEADER + ROWS + "200,7,1\n")
    assert workload_sha256(trace) != found
    figures = workload_sha256("azure-conv")
    assert figures is not None
    assert figures != workload_sha256("azure-code")
    assert workload_sha256("gsm8k-lognormal") is None


def test_lengths_are_known_of_the_whole_file(trace: str) -> None:
    assert len(output_lengths(trace, TraceWindow(window_s=2.0))) == 15
    assert output_lengths(trace, TraceWindow(max_tokens=20)).max() == 5


def test_what_is_said_of_a_file(trace: str) -> None:
    text = f"{trace}: 15 requests of 15 rows (vidur) over 104 s"
    assert describe_file(trace) == text
    assert describe_file(trace, TraceWindow(window_s=3.0)) == text + "; an episode plays 3"
    drawn = replace(TraceWindow(start="random", window_s=5.0), max_tokens=20)
    assert describe_file(trace, drawn) == (
        f"{trace}: 13 requests of 15 rows (vidur) over 104 s; dropped: 2 of more than 20 tokens; an "
        "episode plays at most 5, from a start drawn by its seed"
    )
    assert describe_file("azure-conv") == ""


# ---- command lines ----------------------------------------------------------------------------


def test_evaluate_and_plan_say_what_was_dropped(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "other" / "same.csv"
    elsewhere.parent.mkdir()
    text = Path(trace).read_text("utf-8") + "104,9,0\n"
    said = "15 requests of 16 rows (vidur) over 104 s; dropped: 1 of zero tokens"
    out = tmp_path / "out"
    for path in (Path(trace), elsewhere):  # by its content it is the same workload
        path.write_text(text, "utf-8")
        options = ["--task", "Tiny-v0", "--policies", "fcfs", "--seeds", "0", "--jobs", "1"]
        paths = ["--workload", str(path), "--output", str(out), "--optimum-limit", "0", "--records"]
        assert evaluate.main(options + paths) == 0
        assert f"{path}: {said}\n" in capsys.readouterr().out
    records = (out / "records" / "fcfs-0.csv").read_text("utf-8").splitlines()
    assert [line.split(",")[0] for line in records[1:]] == [str(k) for k in range(15)]
    plan_to = ["--clients", "2", "--output", str(tmp_path / "plan.json")]
    assert plan.main(["--workload", trace, *plan_to]) == 0
    assert capsys.readouterr().out.startswith(said)
    refused(
        lambda: evaluate.main(["--workload", "trace.txt"]),
        "trace.txt: a workload file ends in .csv, .jsonl, .json, .csv.gz",
    )


def test_a_preset_whose_figures_have_changed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TaskConfig("t", workload=WorkloadConfig("azure-conv", 5))
    claim_task(task, tmp_path)
    claim_task(task, tmp_path)
    monkeypatch.setattr(sources, "figures_text", lambda name: name)
    refused(lambda: claim_task(task, tmp_path), "the figures of the preset azure-conv have changed")
