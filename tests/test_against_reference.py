"""The compiled simulator against the slow references, decision by decision.

A few hundred episodes of each kind of information; `python -m tests.compare_with_reference` plays as many
as wanted.
"""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs.vocabulary import ADMISSION_RULES
from tests.against_reference import INFORMATION, Information, play_one
from tests.reference_simulator import ALL_RULES

GROUPS = 16
CASES_PER_GROUP = 25


@pytest.mark.parametrize("group", range(GROUPS))
def test_same_episode_as_the_reference(group: int) -> None:
    rng = np.random.default_rng([2502, 15763, group])
    for _ in range(CASES_PER_GROUP):
        play_one(rng, "known")


@pytest.mark.parametrize("information", [kind for kind in INFORMATION if kind != "known"])
@pytest.mark.parametrize("group", range(4))
def test_same_episode_where_lengths_are_not_known(information: Information, group: int) -> None:
    rng = np.random.default_rng([2502, 15763, group, INFORMATION.index(information)])
    for _ in range(15):
        play_one(rng, information)


def test_rules_are_those_of_the_reference() -> None:
    assert ALL_RULES == ADMISSION_RULES
