"""Parts of a task's configuration from tables of keys, as TOML has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Final

from servegym.envs.arguments import as_annotated, field_types
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    CostModel,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.machine.presets import cost_preset
from servegym.envs.vocabulary import MIXED_COSTS

_COST_MODELS: Final = {
    "affine": (AffineDecode, AffinePrefill),
    "table": (TableDecode, AffinePrefill),
    "levelled": (AffineDecode, LevelledPrefill),
}
"""``[cost] model``: the classes of its ``decode`` and ``prefill`` tables."""


def build(section: str, base: Any, values: Any) -> Any:
    """Make a dataclass from a table of keys; ``base`` is the class, or an instance to change.

    Raises
    ------
    ServegymError
        If ``values`` is no table, or a key or value is none that the class may have. Its ``key`` names the
        key to blame.
    """
    cls = base if isinstance(base, type) else type(base)
    if not isinstance(values, Mapping):
        raise ServegymError(f"{section} must be a table of keys, got {shown(values)}")
    hints = field_types(cls)
    names = [item.name for item in fields(cls)]
    checked: dict[str, Any] = {}
    above = section.split(".")[1:]
    for key, value in values.items():
        with _blaming(*above, key):
            if key not in names:
                raise unknown("key", f"{section}.{key}", [f"{section}.{name}" for name in names])
            checked[key] = as_annotated(f"{section}.{key}", value, hints[key])
    try:
        with _blaming(*above, *(values if len(values) == 1 else ())):
            return replace(base, **checked) if not isinstance(base, type) else cls(**checked)
    except TypeError as error:
        missing = str(error).split("argument")[-1].lstrip("s: ")
        raise ServegymError(f"{section} lacks {missing}") from None


def cost_model(values: Mapping[str, Any], base: CostModel) -> CostModel:
    """Build ``[cost]``: a preset and what replaces parts of it, or a model given in full.

    Raises
    ------
    ServegymError
        As ``build``, or if a part of the model is missing.
    """
    known = ("preset", "model", "decode", "prefill", "engine_overhead")
    for key in values:
        if key not in known:
            options = [f"cost.{name}" for name in (*known, "mixed")]
            raise ServegymError(str(unknown("key", f"cost.{key}", options)), (key,))
    costs = base
    if "preset" in values:
        with _blaming("preset"):
            costs = cost_preset(as_annotated("cost.preset", values["preset"], str)).costs
    if not values:
        return base
    if not isinstance(costs, StageCosts):
        raise ServegymError(
            f"the parts of a {type(costs).__name__} are not servegym's to change; name a cost.preset"
        )
    if "model" in values:
        with _blaming("model"):
            costs = _replace_parts(values, costs)
    elif "decode" in values or "prefill" in values:
        raise ServegymError(f"cost.model is missing; choose from {', '.join(_COST_MODELS)}")
    if "engine_overhead" in values:
        with _blaming("engine_overhead"):
            table = values["engine_overhead"]
            overhead = build("cost.engine_overhead", costs.engine_overhead, table)
            costs = replace(costs, engine_overhead=overhead)
    return costs


def mixed_cost(value: Any) -> str:
    """Check ``cost.mixed``, another name of ``cluster.mixed``.

    Raises
    ------
    ServegymError
        If it is none of ``MIXED_COSTS``.
    """
    with _blaming("mixed"):
        name = as_annotated("cost.mixed", value, str)
        if name not in MIXED_COSTS:
            raise unknown("value of cost.mixed:", name, MIXED_COSTS)
    return str(name)


def _replace_parts(values: Mapping[str, Any], costs: StageCosts) -> StageCosts:
    """Replace ``decode`` and ``prefill`` by those of the model that ``values`` names."""
    model = as_annotated("cost.model", values["model"], str)
    if model not in _COST_MODELS:
        raise unknown("cost model", model, _COST_MODELS)
    for part, cls in zip(("decode", "prefill"), _COST_MODELS[model], strict=True):
        if part in values:
            with _blaming(part):
                costs = replace(costs, **{part: build(f"cost.{part}", cls, values[part])})
        elif not isinstance(getattr(costs, part), cls):
            raise ServegymError(f"cost.{part} is missing for model {model!r}")
    return costs


@contextmanager
def _blaming(*key: str) -> Iterator[None]:
    """Name the key to blame in errors that do not name one themselves."""
    try:
        yield
    except ServegymError as error:
        error.key = error.key or key
        raise
