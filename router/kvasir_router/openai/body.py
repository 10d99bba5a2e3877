"""Reads a request's body: size, JSON, then the types of its fields."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from aiohttp import web
from kvasir_proto.errors import KvasirError, Reason
from pydantic import ValidationError

from kvasir_router.openai.errors import from_validation
from kvasir_router.openai.schema import Body
from kvasir_router.openai.unsupported import strip_neutral

BODY_TIMEOUT_S = 60.0
"""For the whole body: a client that sends 8 MiB more slowly than 1 Mbit/s is given up."""

B = TypeVar("B", bound=Body)


async def read_body(request: web.Request, kind: type[B], *, bytes_max: int) -> B:
    """The body as a model.

    Raises:
        KvasirError: TOO_LARGE, INVALID_REQUEST or UNSUPPORTED, naming the field.
    """
    return parse_body(await _read(request, bytes_max), kind)


def parse_body(data: bytes, kind: type[B]) -> B:
    """The same for a body that was read elsewhere."""
    values = strip_neutral(parse_object(data))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from None


async def _read(request: web.Request, bytes_max: int) -> bytes:
    too_large = KvasirError(Reason.TOO_LARGE, f"the body exceeds {bytes_max} bytes")
    if (request.content_length or 0) > bytes_max:
        raise too_large
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError:
        message = "the body is not encoded as its headers say"
        raise KvasirError(Reason.INVALID_REQUEST, message) from None
    except TimeoutError:
        raise KvasirError(Reason.TIMEOUT, "the body did not arrive in time") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object, strictly: no NaN, no other encoding than UTF-8.

    Raises:
        KvasirError: INVALID_REQUEST.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        message = f"the body is not valid JSON: {_first_line(error)}"
        raise KvasirError(Reason.INVALID_REQUEST, message) from None
    if not isinstance(value, dict):
        raise KvasirError(Reason.INVALID_REQUEST, "the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: Exception) -> str:
    """What is wrong, without the text itself."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
