"""The shipped workloads: exact prompts, and outputs within stated tolerances."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from servegym.envs import ServegymError
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.envs.workload.sources import check_source, make_workload

GSM8K = 1319
SEEDS = 200
GSM8K_PRESETS = ["gsm8k-lognormal", "gsm8k-cap512"]


@cache
def episodes(preset: str) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Prompts and outputs of many seeds."""
    sample = WORKLOAD_PRESETS[preset].sample
    return [sample(GSM8K, np.random.default_rng(seed))[:2] for seed in range(SEEDS)]


def histogram() -> dict[int, int]:
    """How many GSM8K test questions have how many tokens."""
    text = files("servegym.envs.data").joinpath("gsm8k_prompts.json").read_text(encoding="utf-8")
    return {int(length): count for length, count in json.loads(text)["histogram"].items()}


# ---- prompts --------------------------------------------------------------------------------


def test_histogram_is_the_measured_one() -> None:
    lengths = np.repeat(list(histogram()), list(histogram().values()))
    assert len(lengths) == GSM8K
    assert lengths.mean() == pytest.approx(68.43, abs=0.005)
    assert lengths.std(ddof=1) == pytest.approx(25.05, abs=0.005)


@pytest.mark.parametrize("preset", GSM8K_PRESETS)
def test_1319_prompts_are_exactly_the_histogram(preset: str) -> None:
    for prompts, _ in episodes(preset)[:5]:
        assert Counter(prompts.tolist()) == histogram()


def test_twice_as_many_prompts_are_two_copies(rng: np.random.Generator) -> None:
    prompts = WORKLOAD_PRESETS["gsm8k-lognormal"].sample(2 * GSM8K, rng).prompt_tokens
    assert Counter(prompts.tolist()) == {p: 2 * count for p, count in histogram().items()}


@pytest.mark.parametrize("requests", [1, 2, 700, GSM8K - 1, GSM8K + 1])
def test_other_numbers_draw_without_replacement(requests: int, rng: np.random.Generator) -> None:
    prompts, outputs, *_ = WORKLOAD_PRESETS["gsm8k-cap512"].sample(requests, rng)
    assert len(prompts) == len(outputs) == requests
    copies = -(-requests // GSM8K)
    counts = Counter(prompts.tolist())
    assert all(count <= copies * histogram()[p] for p, count in counts.items())


def test_prompts_are_shuffled() -> None:
    """Neither sorted nor the same for two seeds; a run of 1319 has no trend (3 standard errors)."""
    (first, _), (second, _) = episodes("gsm8k-lognormal")[:2]
    assert not np.array_equal(first, second)
    trend = stats.spearmanr(np.arange(GSM8K), first).statistic
    assert abs(trend) < 3 / np.sqrt(GSM8K)


# ---- outputs --------------------------------------------------------------------------------
# The paper: mean 344.83, std 187.99. One episode's mean has a standard deviation of about 4 tokens
# (the prompts are the same in every episode and explain part of the variance of 188²/1319), so the
# mean of 200 episodes has a standard error of about 0.3; its std varies by 4.6 (lognormal) or 1.0
# (cap512), so that of 200 has a standard error of 0.3 or 0.07.

OUTPUTS = [
    # The cap of 1024 cuts the lognormal's tail: 2 tokens of the mean, 9 of the standard deviation.
    ("gsm8k-lognormal", 342.9, 1.5, 179.2, 1.5),
    ("gsm8k-cap512", 344.83, 1.5, 187.99, 0.5),
]


@pytest.mark.parametrize(("preset", "mean", "mean_off", "std", "std_off"), OUTPUTS)
def test_output_lengths(
    preset: str, mean: float, mean_off: float, std: float, std_off: float
) -> None:
    means = [outputs.mean() for _, outputs in episodes(preset)]
    stds = [outputs.std() for _, outputs in episodes(preset)]
    assert np.mean(means) == pytest.approx(mean, abs=mean_off)
    assert np.mean(stds) == pytest.approx(std, abs=std_off)
    assert np.std(means) < 6


def test_lognormal_is_the_paper_but_for_its_cap() -> None:
    """exp(μ + σ²/2) = 344.83 and its std is 187.99; 0.8 % of the lengths reach the cap."""
    length = stats.lognorm(0.51011, scale=np.exp(5.71294))
    assert length.mean() == pytest.approx(344.83, abs=0.01)
    assert length.std() == pytest.approx(187.99, abs=0.01)
    shares = [(outputs == 1024).mean() for _, outputs in episodes("gsm8k-lognormal")]
    assert np.mean(shares) == pytest.approx(length.sf(1023.5), abs=0.0005)
    assert max(outputs.max() for _, outputs in episodes("gsm8k-lognormal")) == 1024


def test_cap512_share_at_the_cap() -> None:
    """54.72 % by construction; the standard error of 200 episodes of 1319 is 0.1 %."""
    shares = [(outputs == 512).mean() for _, outputs in episodes("gsm8k-cap512")]
    assert np.mean(shares) == pytest.approx(0.5472, abs=0.003)
    assert max(outputs.max() for _, outputs in episodes("gsm8k-cap512")) == 512


RANK_CORRELATIONS = [
    ("gsm8k-lognormal", 0.55),
    ("gsm8k-cap512", 0.496),  # the same copula; half of the outputs are tied at the cap
]


@pytest.mark.parametrize(("preset", "expected"), RANK_CORRELATIONS)
def test_rank_correlation_of_prompts_and_outputs(preset: str, expected: float) -> None:
    """One episode varies by 0.02, so the mean of 200 by 0.0014; four of these are 0.006."""
    ranks = [stats.spearmanr(prompts, outputs).statistic for prompts, outputs in episodes(preset)]
    assert np.mean(ranks) == pytest.approx(expected, abs=0.006)
    assert np.ptp(ranks) < 8 * 0.02


def test_tiny_is_small_enough_to_solve() -> None:
    sampled = [WORKLOAD_PRESETS["tiny"].sample(8, np.random.default_rng(s))[:2] for s in range(100)]
    prompts = np.concatenate([p for p, _ in sampled])
    outputs = np.concatenate([o for _, o in sampled])
    assert set(prompts) == set(range(4, 13))
    assert set(outputs) == set(range(1, 10))


# ---- episodes -------------------------------------------------------------------------------

# Changing any of these changes what a task is: raise the version in its id.
FIRST_FIVE = [
    ("gsm8k-lognormal", [56, 37, 65, 105, 56], [262, 106, 304, 797, 407]),
    ("gsm8k-cap512", [56, 37, 65, 105, 56], [202, 67, 512, 512, 512]),
    ("gsm8k-mixed", [56, 37, 65, 105, 56], [181, 52, 340, 442, 437]),
    ("tiny", [11, 9, 8, 6, 6], [4, 4, 9, 9, 1]),
]


@pytest.mark.parametrize(("preset", "prompts", "outputs"), FIRST_FIVE)
def test_seed_0_is_pinned(
    preset: str, prompts: list[int], outputs: list[int], rng: np.random.Generator
) -> None:
    requests = make_workload(preset, GSM8K, 0.0, rng)
    assert requests.prompt_tokens[:5].tolist() == prompts
    assert requests.output_tokens[:5].tolist() == outputs


@pytest.mark.parametrize("preset", WORKLOAD_PRESETS)
@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_same_seed_same_episode(preset: str, rate: float) -> None:
    first, again, other = (
        make_workload(preset, 50, rate, np.random.default_rng(seed)) for seed in (7, 7, 8)
    )
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "predicted_output_tokens"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.output_tokens, other.output_tokens)
    assert (first.arrival_s > 0).all() == (rate > 0)


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_poisson_arrivals(rate: float, rng: np.random.Generator) -> None:
    """20,000 gaps: their mean and std are 1/rate, each with a standard error of 0.7 % or 1 %."""
    requests = make_workload("tiny", 20_000, rate, rng)
    gaps = np.diff(requests.arrival_s, prepend=0.0)
    assert gaps.mean() * rate == pytest.approx(1.0, abs=0.03)
    assert gaps.std() * rate == pytest.approx(1.0, abs=0.04)


def test_csv_file_is_the_same_for_every_seed(write: Callable[[str, str], Path]) -> None:
    """It brings its own number of requests and its own arrivals."""
    text = "arrival_s,prompt_tokens,output_tokens\n0.5,5,6\n1.5,7,8\n"
    path = write("two.csv", text)
    for seed in (1, 2):
        requests = make_workload(str(path), 1319, 0.0, np.random.default_rng(seed))
        assert requests.arrival_s.tolist() == [0.5, 1.5]
        assert requests.output_tokens.tolist() == [6, 8]


def test_unknown_source() -> None:
    with pytest.raises(ServegymError) as error:
        check_source("gsm8k-lognorml")
    assert str(error.value) == (
        "workload.source 'gsm8k-lognorml' is neither a preset nor a .csv, .json or .jsonl file; "
        "did you mean 'gsm8k-lognormal'?"
    )
    check_source("gsm8k-lognormal")
    check_source("anything.csv")  # whether it exists is seen when it is read


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "work.csv"
    for stamp, output in ((1, 3), (2, 5)):
        path.write_text(f"prompt_tokens,output_tokens\n7,{output}\n")
        os.utime(path, ns=(stamp, stamp))
        read = make_workload(str(path), 0, 0.0, np.random.default_rng(0))
        assert read.output_tokens.tolist() == [output]
