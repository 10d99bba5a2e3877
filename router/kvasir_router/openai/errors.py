"""Errors in OpenAI's shape, whatever raised them: {"error": {message, type, param, code}}."""

import json
from typing import Any

from aiohttp import web
from kvasir_proto.errors import KvasirError, Reason
from pydantic import ValidationError

HTTP_REASONS = {404: "unknown_url", 405: "method_not_allowed", 413: Reason.TOO_LARGE.value}
"""Codes for what the HTTP server itself refuses."""


def error_body(error: KvasirError) -> dict[str, Any]:
    """The body of an error."""
    return _body(
        error.message, kind=error.status.openai_type, param=error.param, code=error.reason.value
    )


def _body(message: str, *, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_headers(error: KvasirError) -> dict[str, str]:
    """What an error says by headers: Retry-After if it is worth trying again."""
    extra = {}
    if error.retry_after_ms:
        extra["Retry-After"] = str(-(-error.retry_after_ms // 1_000))
    if error.reason is Reason.UNAUTHENTICATED:
        extra["WWW-Authenticate"] = "Bearer"
    return extra


def error_response(error: KvasirError) -> web.Response:
    """The whole answer."""
    return web.json_response(
        error_body(error), status=error.status.http, headers=error_headers(error)
    )


def error_event(error: KvasirError) -> bytes:
    """An error after a stream has begun."""
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"


def refusal_of_server(error: web.HTTPException) -> web.Response:
    """What aiohttp refuses: no such route, wrong method, body too large."""
    message = f"{error.status} {error.reason}"
    code = HTTP_REASONS.get(error.status)
    body = _body(message, kind="invalid_request_error", param=None, code=code)
    kept = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return web.json_response(body, status=error.status, headers=kept)


def from_validation(error: ValidationError) -> KvasirError:
    """The first fault of a body, named as the client wrote it: `messages[0].content`."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ""
    for part in fault["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    if fault["type"] == "extra_forbidden":
        return KvasirError(Reason.UNSUPPORTED, f"unknown parameter: {param!r}", param=param)
    reason = Reason.UNSUPPORTED if fault["type"] == "content_part" else Reason.INVALID_REQUEST
    return KvasirError(reason, f"{param}: {fault['msg']}", param=param or None)
