"""Writes docs/api.md: every field of every kind, from the same schemas as the CRDs."""

from typing import Any

from kvasir_operator.api import API_VERSION, KINDS, Kind
from kvasir_operator.crd_schema import Schema, root_schema

INTRO = f"""# The API `{API_VERSION}`

Generated from `operator/kvasir_operator/api.py` by `make gen`; do not edit. `kubectl explain` shows
the same text. The kinds are in the category `kvasir`: `kubectl get kvasir` lists them all.

Rules are checked by the API server when an object is created or changed, by `kubectl scale` too.
A field that is not listed here is refused by `kubectl apply` and `kubectl create` (their
`--validate=strict` is the default); a client that asks for no field validation has it dropped by
the API server with a warning. It never reaches the operator.
"""


def render() -> str:
    """The whole page."""
    return INTRO + "".join(_render_kind(kind) for kind in KINDS)


def _render_kind(kind: Kind) -> str:
    schema = root_schema(kind)
    scale = " It has the `scale` subresource." if kind.is_scalable else ""
    lines = [
        "",
        f"## {kind.kind} (`{kind.short_name}`)",
        "",
        f"{kind.description}{scale}",
        "",
        "Rules:",
        "",
        *_rule_lines(schema, kind.kind),
    ]
    for part in ("spec", "status"):
        lines += [
            "",
            f"### {kind.kind} {part}",
            "",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
            *_field_lines(schema["properties"][part], ""),
        ]
    return "\n".join(lines) + "\n"


def _rule_lines(schema: Schema, path: str) -> list[str]:
    rules = schema.get("x-kubernetes-validations", [])
    lines = [f"- `{path}`: {rule['message']}." for rule in rules]
    for name, child in schema.get("properties", {}).items():
        lines += _rule_lines(child, f"{path}.{name}")
    return lines + (_rule_lines(schema["items"], f"{path}[]") if "items" in schema else [])


def _field_lines(schema: Schema, prefix: str) -> list[str]:
    lines = []
    required = schema.get("required", [])
    for name, child in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        meaning = child["description"] + _limits(child)
        default = "**required**" if name in required else _default(child)
        lines.append(f"| `{path}` | {_type(child)} | {default} | {meaning} |")
        inner = child.get("items", child)
        mark = "[]" if "items" in child else ""
        lines += _field_lines(inner, f"{path}{mark}.")
    return lines


def _default(schema: Schema) -> str:
    value: Any = schema.get("default")
    if value is None or value in ({}, [], ""):
        return ""
    return f"`{value}`"


def _type(schema: Schema) -> str:
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return "map"
    return str(schema.get("type", "any"))


def _limits(schema: Schema) -> str:
    parts = []
    if "enum" in schema:
        parts.append("one of " + ", ".join(f"`{value}`" for value in schema["enum"]))
    if "minimum" in schema and "maximum" in schema:
        parts.append(f"{schema['minimum']} to {schema['maximum']}")
    return f" ({'; '.join(parts)})" if parts else ""
