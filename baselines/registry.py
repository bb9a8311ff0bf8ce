"""The explicit list of baseline policies."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.planning.sampled import MAX_SCENARIOS
from servegym.baselines.rules import triggers
from servegym.baselines.rules.plans import deal_in_turn, plan_at_risk, plan_expected, plan_sampled
from servegym.baselines.rules.policies import RandomPolicy, TriggerPolicy
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.play.policy import Policy

MAX_NUMBER: Final = 1_000_000


@dataclass(frozen=True)
class Number:
    """What a number after a trigger policy's name does."""

    rule: str
    """Which are valid, after "must"."""
    fits: Callable[[float], bool]
    give: Callable[[TriggerPolicy, float], TriggerPolicy]
    """Returns the policy with the number."""


def by_quantile(q: float) -> dict[str, str | float]:
    """Return the keys of ``[information]`` that compare waiting requests by a quantile."""
    return {"compare_by": "quantile", "quantile": q}


def by_deviations(k: float) -> dict[str, str | float]:
    """Return the keys of ``[information]`` that compare by mean plus ``k`` standard deviations."""
    return {"compare_by": "mean-sd", "deviations": k}


def _with_deviations(policy: TriggerPolicy, k: float) -> TriggerPolicy:
    if policy.planner is None:
        return replace(policy, comparison=by_deviations(k))
    return replace(policy, planner=partial(plan_at_risk, deviations=k))


NUMBERS: Final[dict[str, Number]] = {
    "λ": Number(
        f"lie in 0 … {MAX_NUMBER}",
        lambda number: number <= MAX_NUMBER,
        lambda policy, number: replace(policy, parameter=number),
    ),
    "q": Number(
        "lie between 0 and 1, as in quantile-0.99",
        lambda q: 0 < q < 1,
        lambda policy, q: replace(policy, comparison=by_quantile(q)),
    ),
    "k": Number("lie in 0 … 100", lambda k: k <= 100, _with_deviations),
    "S": Number(
        f"be a whole number in 1 … {MAX_SCENARIOS}",
        lambda number: number.is_integer() and 1 <= number <= MAX_SCENARIOS,
        lambda policy, number: replace(
            policy, planner=partial(plan_sampled, scenarios=int(number))
        ),
    ),
}
"""By the symbol that descriptions use: the trigger's multiplier λ (or its threshold K), a quantile q,
standard deviations k, scenarios S."""


@dataclass(frozen=True)
class Entry:
    """A policy's one-line description and a prototype, copied for every use."""

    description: str
    prototype: Policy
    number: str = ""
    """What a number after the name stands for, of ``NUMBERS``, K or N; empty: the name takes none."""


REGISTRY: Final[dict[str, Entry]] = {
    "random": Entry("a legal action, uniformly", RandomPolicy()),
    "fcfs": Entry(
        "prefill as soon as a client is idle, in order of arrival (the paper's baseline, vLLM's "
        "classic rule)",
        TriggerPolicy("fcfs", triggers.EAGER),
    ),
    "static": Entry(
        "decode until all clients are idle, then refill them in order of arrival",
        TriggerPolicy("fcfs", triggers.DRAINED),
    ),
    "offline": Entry(
        "offline plan, each client its own queue, prefill as soon as one is idle",
        TriggerPolicy("plan", triggers.EAGER, planner=plan_expected),
    ),
    "offline-steal": Entry(
        "offline plan, an idle client steals the longest request of the busiest one",
        TriggerPolicy("steal", triggers.EAGER, planner=plan_expected),
    ),
    "hybrid": Entry(
        "plan, steal and the Lagrangian prefill-or-decode rule: the paper's method",
        TriggerPolicy("steal", triggers.LAGRANGIAN, 1.0, planner=plan_expected),
        number="λ",
    ),
    "hybrid-plan": Entry(
        "the hybrid without stealing: each client its own queue",
        TriggerPolicy("plan", triggers.LAGRANGIAN, 1.0, planner=plan_expected),
        number="λ",
    ),
    "hybrid-myopic": Entry(
        "the hybrid with a rule that looks at one decode round only",
        TriggerPolicy("steal", triggers.MYOPIC, 1.0, planner=plan_expected),
        number="λ",
    ),
    "lpt": Entry(
        "one queue, longest first, Lagrangian rule",
        TriggerPolicy("longest", triggers.LAGRANGIAN, 1.0),
        number="λ",
    ),
    "threshold": Entry(
        "longest first, prefill when at least K clients are idle",
        TriggerPolicy("longest", triggers.THRESHOLD, 1.0),
        number="K",
    ),
    "lookahead": Entry(
        "longest first, prefill once idling until the next finish costs a stage's fixed part",
        TriggerPolicy("longest", triggers.LOOKAHEAD, 1.0),
        number="λ",
    ),
    "aligned": Entry(
        "requests that finish together, prefill once the idle time waited reaches a stage's fixed "
        "part (asked at every round)",
        TriggerPolicy("aligned", triggers.WAITED, 1.0, every_round=True),
        number="λ",
    ),
    "aligned-lookahead": Entry(
        "requests that finish together, prefill when lookahead does",
        TriggerPolicy("aligned", triggers.LOOKAHEAD, 1.0),
        number="λ",
    ),
    "round-robin": Entry(
        "requests dealt to the clients in turn, each client its own queue, prefill as soon as one is "
        "idle (predicts nothing)",
        TriggerPolicy("plan", triggers.EAGER, planner=deal_in_turn),
    ),
    "feedback": Entry(
        "in order of arrival, prefill when lookahead does if requests go on finishing as often as "
        "they have so far (predicts nothing)",
        TriggerPolicy("fcfs", triggers.FEEDBACK, 1.0),
        number="λ",
    ),
    "offline-risk": Entry(
        "offline plan by the mean length plus k standard deviations (1), prefill as soon as one is idle",
        TriggerPolicy("plan", triggers.EAGER, planner=partial(plan_at_risk, deviations=1.0)),
        number="k",
    ),
    "offline-saa": Entry(
        "offline plan of the least mean makespan over S sampled scenarios (256), prefill as soon as "
        "one is idle",
        TriggerPolicy("plan", triggers.EAGER, planner=partial(plan_sampled, scenarios=256)),
        number="S",
    ),
    # λ from seeds 0 … 29 of GSM8KMixed-v0.
    "quantile": Entry(
        "one queue, the longest by its q-quantile first (0.99), prefill when feedback-0.5 does",
        TriggerPolicy("longest", triggers.FEEDBACK, 0.5, comparison=by_quantile(0.99)),
        number="q",
    ),
    "mean-sd": Entry(
        "one queue, the longest by its mean plus k standard deviations first (1), prefill when "
        "feedback-0.5 does",
        TriggerPolicy("longest", triggers.FEEDBACK, 0.5, comparison=by_deviations(1.0)),
        number="k",
    ),
    # λ from 30 cases of GSM8K-v0, N for 5 ms a decision there; both on training seeds.
    "rollout": Entry(
        "finish the episode in imagination once per action and for N changes of the best schedule "
        "so far (6), BASE deciding (aligned-lookahead-0.7), and take the best",
        RolloutPolicy(TriggerPolicy("aligned", triggers.LOOKAHEAD, 0.7), variations=6),
        number="N",
    ),
}
"""Policies by name. ``threshold`` always takes its K, as ``threshold-15``; a λ may follow the names
that have one, as ``hybrid-0.5``, and is 1 without; so may the other numbers of ``NUMBERS``. ``rollout``
may take its N and then, behind a colon, the policy it improves on: ``rollout-0:threshold-15``."""

_WITH_NUMBER: Final = re.compile(r"(.+)-(\d+(?:\.\d+)?)")


def policy_descriptions() -> dict[str, str]:
    """Return every name, with what may follow it, as ``-K`` or ``[-λ]``, and its description."""
    suffix = {"": "", "K": "-K", "N": "[-N][:BASE]"} | {key: f"[-{key}]" for key in NUMBERS}
    return {name + suffix[entry.number]: entry.description for name, entry in REGISTRY.items()}


def make_policy(name: str) -> Policy:
    """Return a new policy by name.

    Raises
    ------
    ServegymError
        If there is no such policy, with the nearest name, or its number is missing or out of range.
    """
    head, colon, base = name.partition(":")
    match = _WITH_NUMBER.fullmatch(head)
    family, number = match.groups() if match else (head, "")
    entry = REGISTRY.get(family)
    if entry is None or (number and not entry.number) or (colon and entry.number != "N"):
        raise unknown("policy", name, [*REGISTRY, "threshold-K"])
    if entry.number == "K" and not (number.isdigit() and 1 <= int(number) <= MAX_NUMBER):
        raise ServegymError(
            f"policy {name!r} needs a whole K in 1 … {MAX_NUMBER} after its name, as {family}-15"
        )
    if isinstance(entry.prototype, RolloutPolicy):
        return _make_rollout(name, entry.prototype, number, base if colon else None)
    if number and isinstance(entry.prototype, TriggerPolicy):
        kind = NUMBERS["λ" if entry.number == "K" else entry.number]
        if not kind.fits(float(number)):
            raise ServegymError(f"policy {name!r}: {entry.number} must {kind.rule}")
        return kind.give(entry.prototype, float(number))
    return copy(entry.prototype)


def _make_rollout(
    name: str, prototype: RolloutPolicy, number: str, base: str | None
) -> RolloutPolicy:
    if number and not (number.isdigit() and int(number) <= MAX_NUMBER):
        raise ServegymError(f"policy {name!r}: N must be a whole number in 0 … {MAX_NUMBER}")
    variations = int(number) if number else prototype.variations
    policy = copy(prototype.base) if base is None else make_trigger_policy(base)
    return replace(prototype, base=policy, variations=variations)


def make_trigger_policy(name: str) -> TriggerPolicy:
    """Return a new policy that compiled code can play; any other name is refused."""
    policy = make_policy(name)
    if not isinstance(policy, TriggerPolicy):
        raise ServegymError(f"policy {name!r} has no trigger, so compiled code cannot play it")
    return policy
