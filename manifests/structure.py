"""Plain values against the schema's types: every problem at once, where msgspec stops at the first."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence

import msgspec.inspect as types

from llmserve.manifests.errors import FieldPath, Problem, shown

_SECRET_FIELDS = {("spec", "bus", "token"), ("spec", "bus", "url"), ("spec", "kv_cache", "encryption")}
_KEYS = ("spec", "security", "api_keys")
_INT64_MAX = 2**63 - 1


def problems(value: object, schema: types.Type, path: FieldPath = ()) -> Iterator[Problem]:
    """Everything in ``value`` that msgspec would not convert to ``schema``, and numbers without an end."""
    schema = _chosen(value, schema)
    match schema:
        case types.StructType() if isinstance(value, dict):
            yield from _struct_problems(value, schema, path)
        case types.DictType() if isinstance(value, dict):
            for key, item in value.items():
                if _fits(key, schema.key_type):
                    yield from problems(item, schema.value_type, (*path, key))
                else:
                    yield Problem(path, f"key {shown(key)} must be {described(schema.key_type)}{_quote_hint(key)}")
        case types.VarTupleType() if isinstance(value, list):
            for index, item in enumerate(value):
                yield from problems(item, schema.item_type, (*path, index))
        case _ if not _fits(value, schema):
            yield Problem(path, _mismatch(value, schema, path))


def _struct_problems(value: dict[object, object], schema: types.StructType, path: FieldPath) -> Iterator[Problem]:
    fields = {field.encode_name: field for field in schema.fields}
    for key, item in value.items():
        if isinstance(key, str) and key in fields:
            yield from problems(item, fields[key].type, (*path, key))
        elif isinstance(key, str):
            hint = _nearest(key, list(fields))
            yield Problem((*path, key), f"unknown field{hint}; allowed here: {', '.join(fields)}")
        else:
            yield Problem(path, f"unknown field {shown(key)}; allowed here: {', '.join(fields)}")
    for name, field in fields.items():
        if field.required and name not in value:
            yield Problem((*path, name), f"missing; it must be {described(field.type)}")


def _chosen(value: object, schema: types.Type) -> types.Type:
    """Of a union the member that the value was meant for, so that the message is about that one."""
    if not isinstance(schema, types.UnionType):
        return schema
    for member in schema.types:
        is_struct = isinstance(member, types.StructType)
        if is_struct == isinstance(value, dict) and (is_struct or _fits(value, member)):
            return member
    alternatives = [member for member in schema.types if not isinstance(member, types.NoneType)]
    return alternatives[0] if len(alternatives) == 1 else schema


def _fits(value: object, schema: types.Type) -> bool:
    match schema:
        case types.NoneType():
            return value is None
        case types.BoolType():
            return isinstance(value, bool)
        case types.IntType():
            return isinstance(value, int) and not isinstance(value, bool) and _in_bounds(value, schema)
        case types.FloatType():
            return isinstance(value, int | float) and not isinstance(value, bool) and _in_bounds(value, schema)
        case types.StrType():
            return isinstance(value, str) and (schema.pattern is None or bool(re.search(schema.pattern, value)))
        case types.LiteralType():
            return isinstance(value, str) and value in schema.values
    return False


def _in_bounds(value: float, schema: types.IntType | types.FloatType) -> bool:
    largest = _INT64_MAX if isinstance(schema, types.IntType) else sys.float_info.max
    # Written so that "not a number" fails: every comparison with it is false.
    return (
        abs(value) <= largest
        and (schema.gt is None or value > schema.gt)
        and (schema.ge is None or value >= schema.ge)
        and (schema.lt is None or value < schema.lt)
        and (schema.le is None or value <= schema.le)
    )


def _mismatch(value: object, schema: types.Type, path: FieldPath) -> str:
    secret = path in _SECRET_FIELDS or (path[:3] == _KEYS and path[3:] and path[-1] != "tenant")
    what = "this value" if secret and value is not None else shown(value)
    text = f"{what} is not allowed; it must be {described(schema)}"
    if isinstance(schema, types.LiteralType) and isinstance(value, str):
        text += _nearest(value, [str(literal) for literal in schema.values])
    if isinstance(schema, types.StrType):
        text += _quote_hint(value)
    return text


def _quote_hint(value: object) -> str:
    return " (put it in quotes)" if isinstance(value, bool | int | float) else ""


def _nearest(wrong: str, known: Sequence[str]) -> str:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong.lower(), list(lower), n=1)
    return f" (did you mean {lower[near[0]]}?)" if near else ""


def described(schema: types.Type) -> str:
    """What a value of this type must be, in words."""
    match schema:
        case types.BoolType():
            return "true or false"
        case types.IntType():
            return f"a whole number{_bounds(schema)}"
        case types.FloatType():
            return f"a number{_bounds(schema)}"
        case types.StrType():
            # The schema has one pattern, that of names on the bus.
            return "text" if schema.pattern is None else "a name of 1 to 64 letters, digits, '-' and '_'"
        case types.LiteralType():
            return f"one of {', '.join(str(value) for value in schema.values)}"
        case types.StructType():
            return f"a mapping of {', '.join(field.encode_name for field in schema.fields)}"
        case types.DictType():
            return "a mapping"
        case types.VarTupleType():
            return "a list"
        case types.UnionType():
            members = [member for member in schema.types if not isinstance(member, types.NoneType)]
            return " or ".join(described(member) for member in members)
    return "something else"


def _bounds(schema: types.IntType | types.FloatType) -> str:
    texts = [
        f"{words} {bound:g}"
        for words, bound in (
            ("above", schema.gt),
            ("of at least", schema.ge),
            ("below", schema.lt),
            ("of at most", schema.le),
        )
        if bound is not None
    ]
    return f" {' and '.join(texts)}" if texts else ""
