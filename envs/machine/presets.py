"""Cost models of public kernel profiles, with how well each fits.

All affine presets are fits by relative-error least squares; they hold the model's kernels only: no
CPU overhead, embedding or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from servegym.envs.errors import unknown
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    LevelledPrefill,
    StageCosts,
    TableDecode,
    geometric_levels,
)

_FIT = "relative-error least squares on public kernel profiles"


@dataclass(frozen=True)
class CostPreset:
    """A named cost model and its provenance."""

    costs: StageCosts
    source: str
    decode_r_squared: float | None = None  # of the fit; None: nothing was fitted to measurements
    decode_worst_error: float | None = None  # largest relative error of the decode fit
    prefill_worst_error: float | None = None  # … of the prefill fit


def _affine(
    decode: tuple[float, float, float],
    fit: tuple[float, float],
    prefill: tuple[float, float, float, float],
    prefill_error: float,
) -> CostPreset:
    costs = StageCosts(AffineDecode(*decode), AffinePrefill(*prefill))
    return CostPreset(costs, _FIT, fit[0], fit[1], prefill_error)


_A100X4_PREFILL = (0.02787, 1.704e-4, 4.826e-9, 0.0374)

PAPER_ROUND_S: Final = 0.072291
"""Decode round of Paper-v0, from ``scripts/calibrate.py``."""

PAPER_LEVELS: Final = 64
"""Prefill levels of Paper-v0, 16 … 16,384 tokens; each costs what its top costs."""

COST_PRESETS: Final[dict[str, CostPreset]] = {
    "llama2-70b-a100x4": _affine(
        (0.03756, 1.050e-4, 5.940e-8), (0.920, 0.17), _A100X4_PREFILL, 0.09
    ),
    "llama2-70b-a100x4-table": CostPreset(
        StageCosts(
            TableDecode(
                batch=(1, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160, 176, 200),
                seconds=(
                    *(0.0401, 0.0405, 0.0414, 0.0362, 0.0351, 0.0400, 0.0428),
                    *(0.0473, 0.0479, 0.0552, 0.0578, 0.0594, 0.0641),
                ),
                per_kv_token=5.973e-8,
            ),
            AffinePrefill(*_A100X4_PREFILL),
        ),
        "median decode time by batch of public kernel profiles; "
        "mean error 0.8 %, the worst is not recorded",
        decode_r_squared=0.994,
        prefill_worst_error=0.09,
    ),
    "llama2-70b-a100x8": _affine(
        (0.02432, 9.336e-5, 3.419e-8), (0.965, 0.12), (0.02109, 1.137e-4, 2.0e-10, 0.0253), 0.07
    ),
    "llama2-70b-h100x4": _affine(
        (0.02577, 1.880e-5, 2.601e-8), (0.880, 0.08), (0.01617, 6.108e-5, 2.100e-9, 0.0268), 0.06
    ),
    "llama2-70b-h100x8": _affine(
        (0.01708, 3.855e-5, 1.609e-8), (0.900, 0.12), (0.01515, 4.247e-5, 0.0, 0.0198), 0.07
    ),
    "llama3-8b-a100x1": _affine(
        (0.01066, 4.676e-5, 6.547e-8), (0.939, 0.37), (0.00611, 6.079e-5, 3.809e-9, 0.0113), 0.09
    ),
    "llama2-7b-a100x1": _affine(
        (0.00929, 4.587e-5, 3.143e-7), (0.990, 0.18), (0.00718, 5.478e-5, 5.060e-9, 0.0111), 0.09
    ),
    "llama2-7b-h100x1": _affine(
        (0.00601, 2.596e-5, 1.549e-7), (0.998, 0.16), (0.00663, 1.706e-5, 1.699e-9, 0.0074), 0.09
    ),
    "paper": CostPreset(
        StageCosts(
            AffineDecode(PAPER_ROUND_S),
            geometric_levels(AffinePrefill(0.0, _A100X4_PREFILL[1]), PAPER_LEVELS, 16, 16384),
        ),
        "calibrated so that the paper's baseline takes its published 201.00 s "
        "(scripts/calibrate.py, results/calibration/)",
    ),
    "tiny": CostPreset(
        StageCosts(AffineDecode(1.0), LevelledPrefill((16, 64), (2.0, 3.0))),
        "made up so that Tiny-v0 can be solved by hand: a round is 1 s, a stage 2 or 3 s",
    ),
}
"""Presets by name, as ``[cost] preset = …`` takes them."""


def cost_preset(name: str) -> CostPreset:
    """Return a preset by name; an unknown name raises, with the nearest one.

    Examples
    --------
    >>> cost_preset("tiny").costs.decode
    AffineDecode(base=1.0, per_client=0.0, per_kv_token=0.0, per_client_kv_token=0.0)
    """
    if name not in COST_PRESETS:
        raise unknown("cost preset", name, COST_PRESETS)
    return COST_PRESETS[name]
