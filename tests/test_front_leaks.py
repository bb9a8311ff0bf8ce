"""A server keeps nothing of requests that it has answered; leaks_of_front.py does the same for thousands."""

from __future__ import annotations

import pytest

for name in ("transformers", "starlette", "uvicorn", "psutil"):
    pytest.importorskip(name)

from tests.leaks_of_front import CAPACITY, measured  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_requests_that_were_answered_leave_nothing_behind() -> None:
    count = 3 * CAPACITY
    _, before, after = measured(count)
    assert after.kept - before.kept < count / 4  # how far the last forgetting lies back
    assert after.objects - before.objects < count  # one kept object a request would be as many
