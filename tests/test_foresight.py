"""The study of what knowing the next finish is worth: the rate of finishing, the three rules, the reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import lognorm

from servegym.envs.playing.evaluation import make_case
from servegym.studies import foresight
from tests.information_helpers import KNOWN, SMALL
from tests.test_sampled_rollout import middle

RESULTS = Path(__file__).parents[1] / "results" / "uncertainty"


def test_the_rate_is_the_sum_of_hazards() -> None:
    """Against scipy: of each running request, the density of its length over the chance to be longer."""
    env = middle()
    state = env.state
    assert state is not None
    replica = state.replicas[0, 0]
    running = state.finishes[0, 0, : replica["active"]]
    assert len(running) > 2
    begun = running["due"] - state.requests[0]["decode_rounds"][running["request"]]
    emitted = replica["rounds"] - begun + 1
    beliefs = state.beliefs[0][running["request"]]
    lengths = lognorm(s=beliefs["spread"], scale=np.exp(beliefs["log_median"]))
    expected = (lengths.pdf(emitted) / lengths.sf(emitted)).sum()
    assert foresight.finish_rate(state, 0, 0) == pytest.approx(expected, rel=1e-9)


def test_with_known_lengths_the_expected_finish_is_the_true_one() -> None:
    case = make_case(KNOWN, 1)
    gaps = [foresight.foresight_gap(KNOWN, case, known, 2.0) for known in ("expected", "true")]
    assert gaps[0] == gaps[1] > 0
    case = make_case(SMALL, 1)
    believed = [foresight.foresight_gap(SMALL, case, known, 2.0) for known in foresight.KNOWN]
    assert len(set(believed)) == 3


def test_the_report_follows_from_its_rows() -> None:
    rows = pd.read_csv(RESULTS / "foresight/GSM8KPredicted-v0.csv")
    noted = json.loads((RESULTS / "foresight/GSM8KPredicted-v0.json").read_text())
    body = foresight.report_foresight(rows, noted["multipliers"])
    assert (RESULTS / "foresight.md").read_text().endswith(body)
    assert rows["seed"].min() == 1_000_000
    assert set(noted["multipliers"].values()) <= set(foresight.MULTIPLIERS)
