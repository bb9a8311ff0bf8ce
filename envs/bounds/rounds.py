"""A proven lower bound on the largest client load, whatever the plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError


def rounds_lower_bound(rounds: NDArray[np.int64], clients: int) -> int:
    """Bound from below the decode rounds of the busiest client, over all plans.

    The larger of two bounds holds for every assignment of the requests to the clients:

    * *area*: the loads add up to the sum of ``rounds``, so the largest is no less than their mean,
      and being whole, no less than the mean rounded up;
    * *pigeonhole*: take the ``k·clients + 1`` longest requests. Some client holds at least
      ``k + 1`` of them, and whichever those are, they add up to no less than the ``k + 1``
      shortest of these. For ``k = 0`` this is the longest request.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0.
    clients
        Number of clients, ≥ 1.

    Returns
    -------
    int
        The bound, in decode rounds; 0 without requests.

    Raises
    ------
    ServegymError
        If ``clients`` is below 1 or a request has a negative number of rounds.
    """
    if clients < 1:
        raise ServegymError(f"clients must be ≥ 1, got {clients}")
    if len(rounds) == 0:
        return 0
    ascending = np.sort(rounds)
    if ascending[0] < 0:
        raise ServegymError(f"rounds must be ≥ 0, got {ascending[0]}")
    summed = np.concatenate(([0], np.cumsum(ascending[::-1])))  # summed[n]: the n longest
    area = -(-int(summed[-1]) // clients)
    last = np.arange(0, len(rounds), clients)  # k·clients, the place of the last of each set
    shortest = summed[last + 1] - summed[last - last // clients]
    return max(area, int(shortest.max()))
