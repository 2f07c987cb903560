"""The manifest's fields as the structs have them, to hold the documentation to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import msgspec.inspect as types

from llmserve.manifests.errors import shown
from llmserve.manifests.schema import Manifest
from llmserve.manifests.structure import described


class DocumentedField(NamedTuple):
    path: str
    type: str
    default: str


def manifest_fields() -> list[DocumentedField]:
    """Every field that holds a value rather than other fields."""
    return list(_fields(types.type_info(Manifest), ""))


def _fields(schema: types.Type, path: str) -> Iterator[DocumentedField]:
    for field in schema.fields if isinstance(schema, types.StructType) else ():
        place = f"{path}.{field.encode_name}" if path else field.encode_name
        yield from _field(field, _without_none(field.type), place)


def _field(field: types.Field, schema: types.Type, path: str) -> Iterator[DocumentedField]:
    match schema:
        case types.StructType():
            yield from _fields(schema, path)
        case types.DictType(value_type=types.StructType()):
            yield from _fields(schema.value_type, f"{path}.<name>")
        case types.VarTupleType(item_type=types.StructType()):
            yield from _fields(schema.item_type, f"{path}[]")
        case types.DictType():
            text = f"a mapping of a name to {_items(schema.value_type)}"
            yield DocumentedField(path, text, _default(field))
        case types.VarTupleType():
            yield DocumentedField(path, _items(schema), _default(field))
        case _:
            yield DocumentedField(path, described(schema), _default(field))


def _items(schema: types.Type) -> str:
    return f"a list of {described(schema.item_type)}" if isinstance(schema, types.VarTupleType) else described(schema)


def _without_none(schema: types.Type) -> types.Type:
    if not isinstance(schema, types.UnionType):
        return schema
    members = [member for member in schema.types if not isinstance(member, types.NoneType)]
    return members[0] if len(members) == 1 else schema


def _default(field: types.Field) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if value == {} or value == "":
        return "empty"
    return value if isinstance(value, str) else shown(value)
