"""Checked fields of config.json, and the two errors that a model folder can cause."""

import math
from collections.abc import Mapping
from typing import Any

from kvasir_proto.errors import KvasirError, Reason

SIZE_MAX = (1 << 31) - 1


def unsupported(text: str) -> KvasirError:
    """The error for a model that is well-formed but beyond this engine."""
    return KvasirError(Reason.UNSUPPORTED, text, param="model")


def malformed(text: str) -> KvasirError:
    """The error for a model folder that is broken."""
    return KvasirError(Reason.INVALID_REQUEST, text, param="model")


def integer(
    raw: Mapping[str, Any], name: str, *, default: int | None = None, most: int = SIZE_MAX
) -> int:
    """A positive integer field; an absent or null one takes the default."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise malformed(f"config.json: {name} must be a positive integer, not {value!r}")
    if value > most:
        raise malformed(f"config.json: {name} must be at most {most}, not {value}")
    return value


def boolean(raw: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A true or false field; an absent or null one takes the default."""
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise malformed(f"config.json: {name} must be true or false, not {value!r}")
    return value


def number(raw: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    """A positive finite number field; an absent or null one takes the default."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise malformed(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)
