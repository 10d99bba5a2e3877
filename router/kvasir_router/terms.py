"""What a client may ask of time and order, one request at a time: fields, headers, ranges.

    body field (OpenAI's extra_body)   header                    gRPC
    ttft_slo_ms                        x-kvasir-ttft-slo-ms      ttft_slo_ms
    tpot_slo_ms                        x-kvasir-tpot-slo-ms      tpot_slo_ms
    timeout_ms                         x-kvasir-timeout-ms       timeout_ms
    priority                           x-kvasir-priority         priority
    session_id                         x-kvasir-session-id       session_id
    deadline_ms                        x-kvasir-deadline-ms      deadline_ms
    chunk_separator                    x-kvasir-chunk-separator  chunk_separator
    chunk_recompute                    x-kvasir-chunk-recompute  chunk_recompute

A field wins over its header, so that a gateway can set defaults by headers.
"""

from collections.abc import Mapping

from kvasir_proto.errors import KvasirError, Reason
from pydantic import BaseModel, ConfigDict, Field, ValidationError

PRIORITY_MAX = 10
SESSION_ID_CHARS_MAX = 128
SEPARATOR_CHARS_MAX = 64
DEADLINE_MS_MAX = 24 * 3_600_000
HEADER_PREFIX = "x-kvasir-"


class Terms(BaseModel):
    """A client's wishes; None: the router's default."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ttft_slo_ms: int | None = Field(default=None, ge=1, le=DEADLINE_MS_MAX)
    """Extension: the first token is due this long after the request came."""

    tpot_slo_ms: int | None = Field(default=None, ge=1, le=DEADLINE_MS_MAX)
    """Extension: no output token should take longer; its decode worker is chosen by it."""

    timeout_ms: int | None = Field(default=None, ge=1, le=DEADLINE_MS_MAX)
    """Extension: after it the request ends; at most the router's own bound."""

    priority: int | None = Field(default=None, ge=-PRIORITY_MAX, le=PRIORITY_MAX)
    """Extension: the higher one goes first; 0 is usual."""

    session_id: str | None = Field(default=None, min_length=1, max_length=SESSION_ID_CHARS_MAX)
    """Extension: the steps of one agent share it; later ones gain urgency."""

    deadline_ms: int | None = Field(default=None, ge=1, le=DEADLINE_MS_MAX)
    """Extension: the whole session should be done this long after this request came."""

    chunk_separator: str | None = Field(default=None, min_length=1, max_length=SEPARATOR_CHARS_MAX)
    """Extension: stands around and between reusable chunks of the prompt, and is taken out."""

    chunk_recompute: float | None = Field(default=None, ge=0.001, le=1)
    """Extension: the share of a chunk's tokens that is computed again in this prompt."""


class _HeaderTerms(Terms):
    """The same as text."""

    model_config = ConfigDict(strict=False)


def with_headers(terms: Terms, headers: Mapping[str, str]) -> Terms:
    """The terms, completed by a request's headers.

    Raises:
        KvasirError: INVALID_REQUEST, naming the header.
    """
    named = {field: HEADER_PREFIX + field.replace("_", "-") for field in Terms.model_fields}
    texts = {field: headers[name] for field, name in named.items() if name in headers}
    if not texts:
        return terms
    try:
        given = _HeaderTerms.model_validate(texts)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = named[str(fault["loc"][0])]
        message = f"{name}: {fault['msg']}"
        raise KvasirError(Reason.INVALID_REQUEST, message, param=name) from None
    values = {field: getattr(terms, field) for field in Terms.model_fields}
    return given.model_copy(update={f: value for f, value in values.items() if value is not None})
