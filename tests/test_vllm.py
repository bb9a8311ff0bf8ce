"""vLLM beside the simulator; skipped where vLLM is not installed (results/engine/vllm.md says how)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("transformers")

from servegym.engines.huggingface import tiny_llama
from servegym.studies.engines.equality import SETTINGS, Setting, run_setting
from tests.against_vllm import by_vllm

pytestmark = pytest.mark.filterwarnings("ignore")

PRESENT = [setting for setting in SETTINGS if setting.rate == 0]


@pytest.mark.parametrize("setting", PRESENT, ids=[setting.name for setting in PRESENT])
def test_vllm_runs_the_simulators_iterations(tmp_path: Path, setting: Setting) -> None:
    model = tiny_llama()
    fewer = replace(setting, policies=("hybrid", "ppo"))
    for row in run_setting(model, fewer, 10, 4, 0, by_vllm(model, tmp_path)):
        assert row.difference is None
        assert row.unequal == ()
        assert row.tokens_equal == row.requests
