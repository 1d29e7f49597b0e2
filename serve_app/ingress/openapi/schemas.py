"""The schemas in /openapi.json: made of the structs that decode and make bodies, then narrowed to what is served.

A schema may be wider than the server, which has rules that no schema can say. It is never narrower: what it forbids
the server refuses.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import msgspec

from serve_app.ingress.door import ModelInfo

Schema = dict[str, Any]

_NUMBERS = frozenset({"integer", "number"})
_APPLIES_TO = {
    "minimum": _NUMBERS,
    "exclusiveMinimum": _NUMBERS,
    "maximum": _NUMBERS,
    "minLength": {"string"},
    "maxLength": {"string"},
    "minItems": {"array"},
    "maxItems": {"array"},
    "propertyNames": {"object"},
    "maxProperties": {"object"},
}
_COMPONENTS: dict[str, Schema] = {}
_BY_MODEL: list[Schema] = []  # fields that name the model
_BY_VOCABULARY: list[Schema] = []  # fields that hold its token ids


def schemas_of(types: Sequence[type]) -> list[Schema]:
    """References to the schemas of these structs, which are in the document from now on."""
    references, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for name, component in components.items():
        _COMPONENTS.setdefault(name, component)  # one that was narrowed stays so
    return list(references)


def schema_of(struct: type) -> Schema:
    """A reference to the schema of one struct."""
    return schemas_of([struct])[0]


def narrow(struct: type, fields: Mapping[str, Schema]) -> None:
    """Put keywords on fields of a struct, wherever in a field's schema their type is: in each choice, each item."""
    for name, keywords in fields.items():
        _put(_field(struct, name), keywords)


def narrow_to_neutral(struct: type, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Fields that this server knows and does not have: null, or one of the values that ask for nothing."""
    for name, values in neutral.items():
        field = _field(struct, name)
        field.clear()
        field.update({"enum": [None, *values], "default": None, "description": "Not supported: only what is neutral"})


def ignored(struct: type, fields: Iterable[str]) -> None:
    """Fields that are accepted and do nothing."""
    for name in fields:
        _field(struct, name)["description"] = "Accepted and ignored"


def one_of_them(struct: type, fields: Iterable[str]) -> None:
    """At least one of these fields is there."""
    schema_of(struct)
    _COMPONENTS[struct.__name__]["anyOf"] = [{"required": [field]} for field in fields]


def names_model(*structs: type) -> None:
    """Their field `model` is the name of the model that is served."""
    _BY_MODEL.extend(_field(struct, "model") for struct in structs)


def holds_tokens(struct: type, *fields: str) -> None:
    """These fields hold ids of the model's tokens."""
    _BY_VOCABULARY.extend(_field(struct, field) for field in fields)


def components(model: ModelInfo) -> dict[str, Schema]:
    """All schemas, as they are for this model."""
    for field in _BY_MODEL:
        field["anyOf"] = [{"const": model.name, "type": "string"}, {"type": "null"}]
    for field in _BY_VOCABULARY:
        _put(field, {"minimum": 0, "maximum": model.vocab_size - 1})
    return deepcopy(_COMPONENTS)


def list_of(item: Schema, name: str) -> Schema:
    """The schema of an object that holds one list."""
    return {"type": "object", "properties": {name: {"type": "array", "items": item}}, "required": [name]}


def any_of(schemas: Iterable[Schema]) -> Schema:
    """One of these, each named once."""
    distinct: list[Schema] = []
    for schema in schemas:
        distinct += [each for each in schema.get("anyOf", [schema]) if each not in distinct]
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def _field(struct: type, name: str) -> Schema:
    schema_of(struct)
    field: Schema = _COMPONENTS[struct.__name__]["properties"][name]
    return field


def _put(schema: Schema, keywords: Schema) -> None:
    fitting = {key: value for key, value in keywords.items() if schema.get("type") in _APPLIES_TO[key]}
    schema.update(fitting)
    for choice in schema.get("anyOf", ()):
        _put(choice, keywords)
    if isinstance(schema.get("items"), dict):
        _put(schema["items"], keywords)
