"""Published figures of real engines, on fewer draws than results/checks/published.md; both commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servegym.envs.errors import ServegymError
from servegym.studies.checks.published import (
    MEMORY_CASES,
    PUBLISHED_WATERMARKS,
    TAX_BLOCKS,
    TAX_CASES,
    area,
    recompute_tax,
    service_rate,
    users_ask,
    watermark_requests,
    watermark_row,
    watermark_task,
)
from servegym.studies.checks.recomputing import EACH, try_workload
from servegym.studies.commands import check_published, check_queueing
from servegym.studies.serving import serve

DRAWS = range(100, 105)
SPREAD = {0.0: 74, 0.02: 23, 0.05: 20, 0.10: 16}  # of preemptions between draws


def test_preemptions_by_watermark() -> None:
    """Within two standard deviations of a real engine's single run, and in its order."""
    found = list[float]()
    for theirs in PUBLISHED_WATERMARKS:
        rows = [watermark_row(theirs.watermark, seed) for seed in DRAWS]
        found.append(float(np.mean([row.preemptions for row in rows])))
        assert abs(found[-1] - theirs.preemptions) < 2 * SPREAD[theirs.watermark]
        speed = np.mean([row.tokens_per_s for row in rows])
        assert speed == pytest.approx(theirs.tokens_per_s, rel=0.03)
        assert np.mean([row.e2e_p50_s for row in rows]) == pytest.approx(theirs.e2e_p50_s, rel=0.05)
    assert found == sorted(found, reverse=True)
    assert found[0] > 5 * found[-1]


def test_a_watermark_more_than_halves_the_gaps_between_tokens() -> None:
    gaps = [watermark_row(watermark, 100).gap_p99_ms for watermark in (0.0, 0.05)]
    assert gaps[1] < gaps[0] / 2


def test_a_request_of_a_user_is_never_served_before_it_was_asked() -> None:
    """So all requests at the start, and a client for each user, is a schedule that users could have."""
    served = serve(watermark_task(0.0), "vllm", *watermark_requests(100))
    assert (served.log.admitted_s >= users_ask(served)).all()


def test_area_by_hand() -> None:
    """A prompt of 5 in pieces of 2 holds 2, 4, 5 tokens; two rounds more hold 5 + 1 and 5 + 2."""
    assert area(np.array([5]), np.array([3]), 2).tolist() == [2 + 4 + 5 + 6 + 7]
    assert area(np.array([5]), np.array([1]), 8).tolist() == [5]


@pytest.mark.parametrize("place", range(len(MEMORY_CASES)))
def test_what_a_memory_serves(place: int) -> None:
    known, rate, _ = service_rate(MEMORY_CASES[place], 1500, np.random.default_rng(place))
    assert 0.9 * known < rate < known


def test_what_preemption_computes_again() -> None:
    """More with less memory; less where the least computed gives way and prompts are long."""
    long = TAX_CASES[1]
    newest = [recompute_tax(long, blocks, "newest", 0) for blocks in TAX_BLOCKS]
    assert [tax.of_all for tax in newest] == sorted(tax.of_all for tax in newest)
    least = [recompute_tax(long, blocks, "least-computed", 0) for blocks in TAX_BLOCKS[1:]]
    for before, after in zip(newest[1:], least, strict=True):
        assert 0.4 * before.again < after.again < 0.7 * before.again


def test_what_the_issue_tells_is_of_one_size() -> None:
    """623,948 recomputed of 78.8 %: 167,860 computed once by 300 requests. No memory limit: no tax."""
    assert EACH == 560
    found = try_workload((392, 168, (0.9, 0.9), 64, 8192), 0)
    assert found.tax[0] == 0.0 < found.tax[1] < found.tax[2] < found.tax[3] < 0.25
    assert found.again[1] / found.again[0] == pytest.approx(1 - found.saving[-1])
    assert found.off_saving < 0.1 < 0.5 < found.off


# ---- the commands ----------------------------------------------------------------------------


def test_published_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    arguments = ["--seeds", "2", "--requests", "10000", "--output", str(folder)]
    assert check_published.main(arguments) == 0
    page = (folder / "published.md").read_text("utf-8")
    assert page in capsys.readouterr().out
    assert "--seeds 2 --requests 10000" in page
    assert page.count("| published |") == 4


def test_queueing_page(tmp_path: Path) -> None:
    arguments = ["--requests", "10000", "--seed", "1", "--output", str(tmp_path)]
    assert check_queueing.main(arguments) == 0
    page = (tmp_path / "queueing.md").read_text("utf-8")
    assert "of 30 intervals hold" in page
    assert page.count("| `vllm-classic` |") == 2


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--seeds", "1"], "--seeds"),  # no spread of one; 2 is legal
        (["--requests", "9999"], "--requests"),  # 10000 is legal
        (["--seeds", "10001"], "--seeds"),
    ],
)
def test_published_refuses(arguments: list[str], option: str, tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match=option):
        check_published.main([*arguments, "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--requests", "9999"], "--requests"),  # 10000 is legal
        (["--requests", "10000001"], "--requests"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_queueing_refuses(arguments: list[str], option: str, tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match=option):
        check_queueing.main([*arguments, "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
