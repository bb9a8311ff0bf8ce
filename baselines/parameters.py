"""The numbers that policies' names may carry: ``hybrid(multiplier=0.5)``, short ``hybrid-0.5``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from servegym.baselines.planning.sampled import MAX_SCENARIOS
from servegym.baselines.rules.plans import plan_at_risk, plan_sampled
from servegym.envs.playing.policy import Policy

MAX_NUMBER: Final = 1_000_000

MAX_PATIENCE_S: Final = 10**9


@dataclass(frozen=True)
class Parameter:
    """A number that a policy's name may carry."""

    symbol: str
    """What descriptions write for it in the short form: ``hybrid[-λ]``."""
    fits: Callable[[float], bool]
    rule: str
    """Which numbers fit, after "must"."""
    give: Callable[[Any, float], Policy]
    """Returns the policy with the number."""


def by_quantile(q: float) -> dict[str, str | float]:
    """Return the keys of ``[information]`` that compare waiting requests by a quantile."""
    return {"compare_by": "quantile", "quantile": q}


def by_deviations(k: float) -> dict[str, str | float]:
    """Return the keys of ``[information]`` that compare by mean plus ``k`` standard deviations."""
    return {"compare_by": "mean-sd", "deviations": k}


def _attribute(name: str, kind: type[int] | type[float] = float) -> Callable[[Any, float], Policy]:
    """Return ``give`` of a number that is an attribute of the policy."""
    return lambda policy, number: replace(policy, **{name: kind(number)})


def _planning(
    planner: Callable[..., Any], key: str, kind: type[int] | type[float]
) -> Callable[[Any, float], Policy]:
    """Return ``give`` of a number that an offline planner takes."""
    return lambda policy, number: replace(policy, planner=partial(planner, **{key: kind(number)}))


def _in_cluster(key: str, kind: type[int] | type[float] = float) -> Callable[[Any, float], Policy]:
    """Return ``give`` of a number that stands under a key of ``[cluster]``."""
    return lambda policy, number: replace(policy, cluster={**policy.cluster, key: kind(number)})


def _chance(example: str) -> tuple[Callable[[float], bool], str]:
    """Return ``fits`` and ``rule`` of a probability."""
    return lambda q: 0 < q < 1, f"lie between 0 and 1, as in {example}"


def _above(most: int) -> tuple[Callable[[float], bool], str]:
    """Return ``fits`` and ``rule`` of a number above 0."""
    return lambda number: 0 < number <= most, f"be > 0 and at most {most}"


def _within(least: int, most: int) -> tuple[Callable[[float], bool], str]:
    """Return ``fits`` and ``rule`` of a number in a range."""
    return lambda number: least <= number <= most, f"lie in {least} … {most}"


def _whole(least: int, most: int) -> tuple[Callable[[float], bool], str]:
    """Return ``fits`` and ``rule`` of a whole number in a range."""
    return (
        lambda number: number.is_integer() and least <= number <= most,
        f"be a whole number in {least} … {most}",
    )


PARAMETERS: Final[dict[str, Parameter]] = {
    # The trigger's factor on the cost of a stage.
    "multiplier": Parameter("λ", *_within(0, MAX_NUMBER), _attribute("parameter")),
    # Idle clients at which a stage begins.
    "idle": Parameter("K", *_whole(1, MAX_NUMBER), _attribute("parameter")),
    # By which lengths are compared.
    "quantile": Parameter(
        "q", *_chance("quantile-0.99"), lambda policy, q: replace(policy, comparison=by_quantile(q))
    ),
    # Standard deviations above the mean by which lengths are compared.
    "deviations": Parameter(
        "k", *_within(0, 100), lambda policy, k: replace(policy, comparison=by_deviations(k))
    ),
    # Standard deviations above the mean by which the plan counts lengths.
    "risk": Parameter("k", *_within(0, 100), _planning(plan_at_risk, "deviations", float)),
    # Of SGLang's admission: how much of the outputs to come it provides for.
    "conservativeness": Parameter("c", *_within(0, 100), _in_cluster("conservativeness")),
    # Seconds that a request waits before those it should wait for.
    "patience": Parameter("N", *_above(MAX_PATIENCE_S), _in_cluster("patience_s")),
    # With what chance a length lies in its interval.
    "interval": Parameter(
        "q",
        *_chance("a-min-0.9"),
        lambda policy, q: replace(policy, comparison={**policy.comparison, "interval": q}),
    ),
    # Seconds that may pass between two tokens.
    "gap": Parameter("G", *_above(MAX_PATIENCE_S), _attribute("gap_s")),
    # Tokens of the first level of feedback.
    "level": Parameter("Q", *_whole(1, MAX_NUMBER), _in_cluster("level_tokens", int)),
    # Seconds between two thefts of running requests by one replica.
    "period": Parameter("N", *_within(0, MAX_PATIENCE_S), _in_cluster("steal_period_s")),
    # Free blocks a request below which memory is short.
    "steps": Parameter("S", *_within(0, MAX_PATIENCE_S), _in_cluster("freeness_steps")),
    # Of the limit of the first token, by which it must come.
    "share": Parameter("x", *_above(MAX_NUMBER), _in_cluster("shed_at")),
    # Prices of the Lagrangian rule.
    "memory": Parameter("m", *_within(0, MAX_NUMBER), _attribute("memory")),
    "slo": Parameter("s", *_within(0, MAX_NUMBER), _attribute("slo")),
    # With what chance memory suffices.
    "chance": Parameter("q", *_chance("reserve-0.99"), _attribute("quantile")),
    # Sampled scenarios of the plan.
    "scenarios": Parameter(
        "S", *_whole(1, MAX_SCENARIOS), _planning(plan_sampled, "scenarios", int)
    ),
    # Calendars that are played in imagination before an episode.
    "calendars": Parameter(
        "N",
        *_whole(1, 100_000),
        lambda policy, number: replace(
            policy, planner=replace(policy.planner, variations=int(number))
        ),
    ),
    # Changes of the best schedule that are tried at each decision.
    "variations": Parameter("N", *_whole(0, MAX_NUMBER), _attribute("variations", int)),
    # Sampled futures of each decision.
    "samples": Parameter("S", *_whole(0, MAX_SCENARIOS), _attribute("samples", int)),
    # Standard errors by which a sampled gain must exceed 0.
    "errors": Parameter("E", *_within(0, 100), _attribute("errors")),
}
"""Every number that a name may carry, by its key."""
