"""Decides whether a live object already is as desired, so that an unchanged plan writes nothing.

An object is as desired when it contains every desired value, and when the operator owns no field
that it no longer desires. Fields of others are left alone.
"""

import json
import re
from fractions import Fraction
from typing import Any

from kvasir_operator.core.manifests import FIELD_MANAGER, Manifest

MERGE_KEYS = ("mountPath", "uid", "name", "containerPort", "port", "type")
QUANTITY_PARENTS = ("requests", "limits")
QUANTITY_FIELDS = ("sizeLimit",)
SUFFIXES = {
    "": Fraction(1),
    "m": Fraction(1, 1000),
    **{s: Fraction(1000) ** n for n, s in enumerate(("k", "M", "G", "T", "P"), 1)},
    **{s: Fraction(1024) ** n for n, s in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)},
}
SERVER_FIELDS = ("apiVersion", "kind")


def is_as_desired(desired: Manifest, live: Manifest | None) -> bool:
    """Whether applying `desired` to `live` would change nothing."""
    if live is None:
        return False
    owned = owned_fields(live)
    return owned is not None and contains(live, desired) and not owns_beyond(owned, desired)


def owned_fields(live: Manifest) -> Manifest | None:
    """What the operator owns of the object (fieldsV1); None: it has never applied it."""
    for entry in live["metadata"].get("managedFields", ()):
        is_ours = entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply"
        if is_ours and not entry.get("subresource"):
            fields: Manifest = entry.get("fieldsV1", {})
            return fields
    return None


def contains(live: Any, desired: Any, *, field: str = "", parent: str = "") -> bool:
    """Whether `live` has every value of `desired`; lists of objects are matched by their key."""
    if isinstance(desired, dict):
        return isinstance(live, dict) and all(
            key in live and contains(live[key], value, field=key, parent=field)
            for key, value in desired.items()
            if not (field == "metadata" and key == "resourceVersion")
        )
    if isinstance(desired, list):
        return isinstance(live, list) and _contains_items(live, desired, field)
    if parent in QUANTITY_PARENTS or field in QUANTITY_PARENTS or field in QUANTITY_FIELDS:
        return bool(quantity(live) == quantity(desired))
    return bool(live == desired)


def _contains_items(live: list[Any], desired: list[Any], field: str) -> bool:
    key = next((k for k in MERGE_KEYS if desired and all(_has(i, k) for i in desired)), None)
    if key is None:
        return len(live) == len(desired) and all(
            contains(a, b, field=field) for a, b in zip(live, desired, strict=True)
        )
    by_key = {item[key]: item for item in live if _has(item, key)}
    return all(
        item[key] in by_key and contains(by_key[item[key]], item, field=field) for item in desired
    )


def _has(item: Any, key: str) -> bool:
    return isinstance(item, dict) and key in item


def owns_beyond(owned: Manifest, desired: Any) -> bool:
    """Whether `owned` (fieldsV1) names a field, item or value that `desired` does not have."""
    return any(key != "." and _is_surplus(key, inner, desired) for key, inner in owned.items())


def _is_surplus(key: str, inner: Manifest, desired: Any) -> bool:
    sort, _, name = key.partition(":")
    if sort == "f":
        if not isinstance(desired, dict) or name not in desired:
            return True
        return owns_beyond(inner, desired[name])
    if not isinstance(desired, list):
        return True
    if sort == "k":
        keys = json.loads(name)
        match = [i for i in desired if all(i.get(k, v) == v for k, v in keys.items())]
        return not match or owns_beyond(inner, match[0])
    return json.loads(name) not in desired


def quantity(value: Any) -> Any:
    """A Kubernetes quantity as a number ("500m" and 0.5 are one); what is none stays as it is."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", str(value))
    if match is None or match[2] not in SUFFIXES:
        return value
    return Fraction(match[1]) * SUFFIXES[match[2]]
