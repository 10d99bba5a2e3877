"""Turns the pydantic models into structural OpenAPI v3 schemas and CRD objects.

Invariant: every property of every schema has a description; `undescribed` lists those without.
"""

from typing import Any

from kvasir_operator.api import GROUP, VERSION, Column, Kind
from kvasir_operator.api_base import NAME_PATTERN, ApiModel

Schema = dict[str, Any]

DROPPED = ("title", "$defs", "additionalProperties")


def structural(model: type[ApiModel]) -> Schema:
    """The schema of one model with references resolved, as a CRD wants it."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    schema = _resolve(raw, raw.get("$defs", {}))
    _default_objects(model, schema)
    return schema


def _resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """`node` with references inlined, optional types flattened and unsupported keys dropped."""
    node = _flatten_optional(node)
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[-1]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    resolved = {key: value for key, value in node.items() if key not in DROPPED}
    if isinstance(node.get("additionalProperties"), dict):
        resolved["additionalProperties"] = _resolve_map_value(node["additionalProperties"])
    if "const" in resolved:
        resolved["enum"] = [resolved.pop("const")]
    if resolved.get("default", ...) is None:
        del resolved["default"]
    if "properties" in resolved:
        resolved["properties"] = {
            name: _resolve(child, definitions) for name, child in node["properties"].items()
        }
    if "items" in resolved:
        resolved["items"] = _resolve(resolved["items"], definitions)
    return resolved


def _resolve_map_value(value: Schema) -> Schema:
    return {key: entry for key, entry in value.items() if key != "title"}


def _flatten_optional(node: Schema) -> Schema:
    """`X | None` becomes X: an absent field is how None is said in a CRD."""
    choices = [choice for choice in node.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) != 1:
        return node
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return {**choices[0], **rest}


def _default_objects(model: type[ApiModel], schema: Schema) -> None:
    """An object field that may be left out defaults to the defaults of its fields.

    They are written out: the API server checks rules on a default before it fills it up.
    """
    for name, field in model.model_fields.items():
        child = schema["properties"][field.alias or name]
        if isinstance(field.default_factory, type) and issubclass(field.default_factory, ApiModel):
            child["default"] = field.default_factory().model_dump(
                mode="json", by_alias=True, exclude_none=True
            )
        inner = _model_of(field.annotation)
        if inner is not None and "properties" in child:
            _default_objects(inner, child)


def _model_of(annotation: Any) -> type[ApiModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, ApiModel):
            return candidate
    return None


def undescribed(schema: Schema, path: str = "") -> list[str]:
    """Paths of the properties that lack a description."""
    missing = []
    for name, child in schema.get("properties", {}).items():
        here = f"{path}.{name}"
        if not child.get("description", "").strip():
            missing.append(here)
        missing += undescribed(child, here)
    if "items" in schema:
        missing += undescribed(schema["items"], f"{path}[]")
    return missing


def root_schema(kind: Kind) -> Schema:
    """The schema of a whole object of this kind."""
    return {
        "type": "object",
        "description": kind.description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of the API."},
            "kind": {"type": "string", "description": "Kind of the object."},
            "metadata": {"type": "object"},  # the API server forbids to say more
            "spec": {**structural(kind.spec), "description": "What is wanted."},
            "status": {**structural(kind.status), "description": "What is."},
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {kind.name_max} && "
                f"self.metadata.name.matches('{NAME_PATTERN}')",
                "message": f"the name must have at most {kind.name_max} characters, begin with a "
                "letter and consist of lower case letters, digits and '-': choose another",
            }
        ],
    }


def _column(column: Column) -> Schema:
    entry: Schema = {"name": column.name, "type": column.type, "jsonPath": column.path}
    if column.description:
        entry["description"] = column.description
    if column.priority:
        entry["priority"] = column.priority
    return entry


def crd(kind: Kind) -> Schema:
    """The CustomResourceDefinition of one kind."""
    subresources: Schema = {"status": {}}
    if kind.is_scalable:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": [kind.short_name],
                "categories": ["kvasir"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": root_schema(kind)},
                    "subresources": subresources,
                    "additionalPrinterColumns": [_column(column) for column in kind.columns],
                }
            ],
        },
    }
