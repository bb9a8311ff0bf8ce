"""Policies by name: what a name means, and the policy it stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, Final

from servegym.baselines.catalogue import BASED, REGISTRY
from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.parameters import MAX_NUMBER, PARAMETERS
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import CompilablePolicy
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.playing.policy import Policy

BASE: Final = "base"
"""Key of the policy that ``rollout`` improves on: ``rollout(base=threshold(idle=15))``."""

SAMPLED_BASE: Final = TriggerPolicy("longest", triggers.THRESHOLD, 12.0)
"""The base of a rollout by samples that names none: the best rule of GSM8KPredicted-v0."""

_SHORT: Final = re.compile(r"(.+)-(\d+(?:\.\d+)?)")
_LONG: Final = re.compile(r"([^()]*)\((.*)\)")
_BASED: Final = re.compile(r"([^(:]*):(.*)")


def policy_descriptions() -> dict[str, str]:
    """Return every name with the number that it may carry, in both forms, and its description.

    Examples
    --------
    >>> policy_descriptions()["fcfs"][:40]
    'prefill as soon as a client is idle, in '
    """
    lines = {}
    for name, entry in REGISTRY.items():
        if not entry.parameter:
            lines[name] = entry.description
            continue
        symbol = PARAMETERS[entry.parameter].symbol
        based = isinstance(entry.prototype, RolloutPolicy)
        short = f"{name}-{symbol}" if entry.required else f"{name}[-{symbol}]"
        keys = ", ".join(f"{key}={PARAMETERS[key].symbol}" for key in entry.keys)
        keys += f", {BASE}=POLICY" if based else ""
        lines[short + ("[:BASE]" if based else "")] = f"{entry.description}; {name}({keys})"
    return lines


def split_policies(text: str) -> list[str]:
    """Return the names of a comma-separated list, each once; commas within brackets separate none.

    Raises
    ------
    ServegymError
        If a bracket, or a quote within brackets, has no partner.

    Examples
    --------
    >>> split_policies("fcfs, rollout(variations=6, base=hybrid), fcfs")
    ['fcfs', 'rollout(variations=6, base=hybrid)']
    """
    return list(dict.fromkeys(_split(text)))


def _split(text: str) -> list[str]:
    """Return the parts between commas outside brackets, without blank ones."""
    parts, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if quote:
            ends = letter == quote and not escaped
            quote, escaped = "" if ends else quote, letter == "\\" and not escaped
        elif depth > 0 and letter in "'\"":
            quote = letter
        else:
            depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0 or quote:
        what = f"quote {quote}" if quote else "bracket"
        raise ServegymError(f"{shown(text)}: a {what} has no partner; close or remove it")
    return [part.strip() for part in parts if part.strip()]


def make_policy(name: str, make_base: Callable[[str], CompilablePolicy] | None = None) -> Policy:
    """Return a new policy by name.

    Parameters
    ----------
    name
        ``NAME`` or ``NAME(key=value, …)`` with the keys of ``PARAMETERS``, or the short form
        ``NAME-NUMBER``. ``rollout`` takes a policy as ``base``, too, short behind a colon, in either
        form.
    make_base
        Makes the base by its name; None: :func:`make_trigger_policy`, which knows no agents.

    Raises
    ------
    ServegymError
        If there is no such policy, with the nearest name, or a key or number that it cannot have.

    Examples
    --------
    >>> make_policy("threshold(idle=12)") == make_policy("threshold-12")
    True
    >>> make_policy("rollout(variations=2, base=threshold(idle=9))") == make_policy("rollout-2:threshold-9")
    True
    """
    family, values = _read_name(name)
    entry = REGISTRY[family]
    policy: Any = copy(entry.prototype)  # of a class that takes the parameter
    if isinstance(policy, RolloutPolicy):
        policy.base = copy(policy.base)
    if entry.required and entry.parameter not in values:
        parameter = PARAMETERS[entry.parameter]
        raise ServegymError(
            f"policy {name!r} needs a whole {parameter.symbol} in 1 … {MAX_NUMBER} after its name, "
            f"as {family}-15 or {family}({entry.parameter}=15)"
        )
    for key, text in values.items():
        if key == BASE:
            policy = replace(policy, base=(make_base or make_trigger_policy)(text))
        else:
            policy = PARAMETERS[key].give(policy, _number(name, key, text))
    if isinstance(policy, RolloutPolicy) and policy.samples > 0 and BASE not in values:
        policy = replace(policy, base=copy(SAMPLED_BASE))
    return policy


def base_of(name: str) -> str | None:
    """Return the name of the base that a policy's name gives; None where it gives none.

    Examples
    --------
    >>> base_of("rollout-6:ppo"), base_of("rollout(base=hybrid)"), base_of("rollout"), base_of("runs/1")
    ('ppo', 'hybrid', None, None)
    """
    head = re.split("[(:]", name, maxsplit=1)[0].strip()
    short = _SHORT.fullmatch(head)
    if head == name.strip() or (short[1] if short else head) not in BASED:
        return None
    base = _read_name(name)[1].get(BASE)
    return None if base is None else base.strip()


def _read_name(name: str) -> tuple[str, dict[str, str]]:
    """Return which entry of the registry is meant, and what the name gives by key."""
    based = _BASED.fullmatch(name)
    if not based and (match := _LONG.fullmatch(name.strip())):
        family = match[1].strip()
        if family not in REGISTRY:
            raise unknown("policy", family, REGISTRY)
        return family, _read_keys(name, family, match[2])
    head = (based[1] if based else name).strip()
    match = None if head in REGISTRY else _SHORT.fullmatch(head)
    family, number = match.groups() if match else (head, "")
    entry = REGISTRY.get(family)
    if entry is None or (number and not entry.parameter):
        raise unknown("policy", name, [*REGISTRY, "threshold-K"])
    if based and not isinstance(entry.prototype, RolloutPolicy):
        raise unknown("policy", name, [*REGISTRY, "threshold-K"])
    if based and not based[2].strip():
        raise ServegymError(f"policy {name!r} needs a policy after the colon, as {head}:hybrid")
    values = {entry.parameter: number} if number else {}
    return family, values | ({BASE: based[2]} if based else {})


def _read_keys(name: str, family: str, text: str) -> dict[str, str]:
    entry = REGISTRY[family]
    keys = list(entry.keys)
    if isinstance(entry.prototype, RolloutPolicy):
        keys.append(BASE)
    values: dict[str, str] = {}
    for part in _split(text):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not keys:
            raise ServegymError(f"policy {name!r}: {family} takes no parameters")
        if not (equals and value):
            wanted = key if key in keys else keys[0]
            raise ServegymError(f"policy {name!r}: write {wanted}=VALUE, not {part!r}")
        if key not in keys:
            raise unknown(f"parameter of {family}:", key, keys)
        if key in values:
            raise ServegymError(f"policy {name!r}: {key} is given twice")
        values[key] = value
    return values


def _number(name: str, key: str, text: str) -> float:
    parameter = PARAMETERS[key]
    try:
        number = math.nan if "_" in text else float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and parameter.fits(number)):
        what = parameter.symbol if "(" not in name else key
        if what == "K":
            raise ServegymError(
                f"policy {name!r} needs a whole K in 1 … {MAX_NUMBER} after its name, as threshold-15"
            )
        raise ServegymError(f"policy {name!r}: {what} must {parameter.rule}")
    return number


def make_trigger_policy(name: str) -> TriggerPolicy:
    """Return a new policy that compiled code can play; any other name is refused.

    Examples
    --------
    >>> make_trigger_policy("threshold(idle=12)").parameter
    12.0
    """
    policy = make_policy(name)
    if not isinstance(policy, TriggerPolicy):
        raise ServegymError(f"policy {name!r} has no trigger, so compiled code cannot play it")
    return policy
