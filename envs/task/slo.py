"""``[slo]`` of a task: what a request must meet to count for goodput."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import check_fields
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.workload.requests import EVERYBODY, Requests

_LIMITS: Final = ("ttft_s", "tpot_s")


@dataclass(frozen=True)
class ClassSlo:
    """``[[slo.classes]]``: limits of one class of requests in the place of those of all.

    Examples
    --------
    >>> ClassSlo("batch", ttft_s=60.0).tpot_s is None
    True
    """

    name: str = ""
    """As the workload's column ``class`` has it."""
    ttft_s: float | None = None
    """None: as ``slo.ttft_s``; inf: any."""
    tpot_s: float | None = None
    """None: as ``slo.tpot_s``; inf: any."""

    def __post_init__(self) -> None:
        check_fields("slo.classes", self)
        if not self.name or self.name == EVERYBODY:
            raise ServegymError(f"slo.classes.name must name a class, got {shown(self.name)}")
        _check_limits("slo.classes", self, "inf")


@dataclass(frozen=True)
class SloConfig:
    """``[slo]``: what a request must meet to count for goodput (service level objectives).

    Examples
    --------
    >>> SloConfig(ttft_s=1.0).tpot_s is None
    True
    """

    ttft_s: float | None = None
    """Most seconds from its arrival to its first token, > 0; None or inf: any."""
    tpot_s: float | None = None
    """Most seconds per token after the first, on average, > 0; None or inf: any. A request of one token
    meets it."""
    classes: tuple[ClassSlo, ...] = ()
    """``[[slo.classes]]``: classes with limits of their own, each once."""

    def __post_init__(self) -> None:
        check_fields("slo", self)
        names = [own.name for own in self.classes]
        for name in names:
            if names.count(name) > 1:
                raise ServegymError(f"slo.classes must name each class once, got {name!r} twice")
        _check_limits("slo", self, "leave it out")
        for name in _LIMITS:
            if getattr(self, name) == np.inf:
                object.__setattr__(self, name, None)

    @property
    def limits(self) -> tuple[float, float]:
        """Most seconds to the first token and per token after it; inf: any."""
        ttft_s, tpot_s = (
            np.inf if limit is None else limit for limit in (self.ttft_s, self.tpot_s)
        )
        return ttft_s, tpot_s

    def __bool__(self) -> bool:
        """Whether there is anything to meet."""
        own = any(each.ttft_s is not None or each.tpot_s is not None for each in self.classes)
        return self.ttft_s is not None or self.tpot_s is not None or own

    def limits_of(self, requests: Requests) -> NDArray[np.float64]:
        """Return the limits of each request, shape (requests, 2): its class's own, else those of all.

        Raises
        ------
        ServegymError
            If a class that has limits is none of the requests' classes, used or not.
        """
        limits = np.tile(self.limits, (len(requests), 1))
        for own in self.classes:
            if requests.class_of is None:
                raise ServegymError(
                    f"slo.classes has limits for {own.name!r}, but the workload has no classes; give it a "
                    "column 'class'"
                )
            if own.name not in requests.class_names:
                raise unknown("class in slo.classes:", own.name, requests.class_names)
            members = requests.class_of == requests.class_names.index(own.name)
            for place, limit in enumerate((own.ttft_s, own.tpot_s)):
                if limit is not None:
                    limits[members, place] = limit
        return limits


def _check_limits(where: str, limits: ClassSlo | SloConfig, remedy: str) -> None:
    for name in _LIMITS:
        limit = getattr(limits, name)
        if limit is not None and not limit > 0:
            raise ServegymError(
                f"{where}.{name} must be > 0 seconds, got {limit}; {remedy} for no limit"
            )
