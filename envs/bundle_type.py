"""A ``Bundle`` as numba sees it: a pointer, whose fields are read from the bundle's table."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)
from numba.np.arrayobj import populate_array

from servegym.envs.bundle import Bundle

_WORD: Final = ir.IntType(64)


class BundleType(types.Type):
    """The type of a bundle in kernels. Its name is short, as names of compiled functions hold it."""

    def __init__(self, name: str, kinds: tuple[tuple[str, types.Type], ...]) -> None:
        self.kinds = kinds
        digest = hashlib.sha256(repr(kinds).encode()).hexdigest()[:8]
        super().__init__(name=f"{name}-{digest}")

    def place(self, field: str) -> tuple[int, types.Type]:
        """Return the word of the table at which a field begins, and the field's type."""
        word = 0
        for name, kind in self.kinds:
            if name == field:
                return word, kind
            word += 1 + (kind.ndim if isinstance(kind, types.Array) else 0)
        raise KeyError(field)


_ARRAY_KINDS: Final[dict[tuple[Any, ...], types.Type]] = {}


def _kind_of(value: Any) -> types.Type:
    """Return the type that a field has in kernels."""
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise TypeError("a bundle's arrays must be contiguous")
        key = value.dtype, value.ndim, value.flags.writeable
        if key not in _ARRAY_KINDS:
            _ARRAY_KINDS[key] = numba.typeof(value).copy(layout="C")
        return _ARRAY_KINDS[key]
    return numba.typeof(value)


@register_model(BundleType)
class _BundleModel(models.OpaqueModel):  # type: ignore[misc]
    """An address."""


@typeof_impl.register(Bundle)
def _type_of(bundle: Bundle, context: Any = None) -> BundleType:
    kinds = tuple((name, _kind_of(value)) for name, value in bundle.by_name().items())
    kind = BundleType(type(bundle).__name__, kinds)
    bundle.__dict__["_numba_type_"] = kind  # where numba looks first: 0.1 in place of 1 µs a call
    return kind


@unbox(BundleType)
def _unbox(kind: BundleType, bundle: Any, c: Any) -> NativeValue:
    address = c.pyapi.object_getattr_string(bundle, "_address")
    pointer = c.pyapi.long_as_voidptr(address)
    c.pyapi.decref(address)
    return NativeValue(pointer)


@infer_getattr
class _BundleAttributes(AttributeTemplate):  # type: ignore[misc]
    key = BundleType

    def generic_resolve(self, kind: BundleType, name: str) -> types.Type | None:
        """Return the type of a field."""
        return dict(kind.kinds).get(name)


@lower_getattr_generic(BundleType)
def _read_field(context: Any, builder: Any, kind: BundleType, pointer: Any, name: str) -> Any:
    """Return a field's value; arrays are made of their address and shape."""
    first, field = kind.place(name)
    constant = builder.module.add_metadata([])

    def word(place: int, of: Any = _WORD) -> Any:
        address = builder.gep(
            builder.bitcast(pointer, _WORD.as_pointer()), [ir.Constant(_WORD, place)]
        )
        value = builder.load(builder.bitcast(address, of.as_pointer()))
        value.set_metadata("invariant.load", constant)
        return value

    if isinstance(field, BundleType):
        return word(first, pointer.type)
    if isinstance(field, types.Float):
        return word(first, ir.DoubleType())
    if isinstance(field, types.Boolean):
        return builder.trunc(word(first), ir.IntType(1))
    if not isinstance(field, types.Array):
        return word(first)
    array = context.make_array(field)(context, builder)
    itemsize = context.get_constant(
        types.intp, context.get_abi_sizeof(context.get_data_type(field.dtype))
    )
    shape = [word(first + 1 + axis) for axis in range(field.ndim)]
    strides = [itemsize]
    for extent in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], extent))
    populate_array(
        array,
        data=word(first, array.data.type),
        shape=cgutils.pack_array(builder, shape),
        strides=cgutils.pack_array(builder, strides),
        itemsize=itemsize,
        meminfo=None,
    )
    return array._getvalue()
