"""What users of a service feel and what is lost on the way: figures over the requests of an episode.

Pure functions of arrays, a number a request: what ``[slo]`` asks for, and fairness.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
NAN = float("nan")


def has_met(
    ttft_s: Seconds,
    decode_s: Seconds,
    decode_rounds: NDArray[np.integer],
    limits: tuple[float | Seconds, float | Seconds],
) -> NDArray[np.bool_]:
    """Return who has finished within both limits of ``[slo]``: seconds to the first token, per token after.

    Parameters
    ----------
    ttft_s, decode_s
        Seconds from arrival to first token, and from there to the last; NaN where it has not come.
    decode_rounds
        Tokens after the first; without any there is no time per token, and that limit is met.
    limits
        Most seconds of each, of all or of each request; inf: any.
    """
    per_token_s = np.zeros(len(decode_s))
    np.divide(decode_s, decode_rounds, out=per_token_s, where=decode_rounds > 0)
    return (ttft_s <= limits[0]) & (per_token_s <= limits[1]) & np.isfinite(decode_s)


def jain_index(rates: Seconds) -> float:
    """Return (Σx)² / (n · Σx²): 1 where all get the same, 1/n where one gets all; NaN of nothing.

    R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination", DEC-TR-301, 1984.
    """
    squares = float(rates @ rates)
    return float(rates.sum()) ** 2 / (len(rates) * squares) if squares > 0 else NAN
