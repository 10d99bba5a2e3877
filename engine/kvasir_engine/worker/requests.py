"""Checks of what routers and peers send: a request that passes can be computed as it is.

The router has already turned the client's words into numbers; what is checked here is what would
otherwise break, hang or mislead the engine. Messages name the field of the GenerateRequest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, worker_pb2

STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 1024
STOP_TOKENS_MAX = 256
CHUNKS_MAX = 256
TENANT_SALT_BYTES_MAX = 64
REQUEST_ID_CHARS_MAX = 256
PRIORITY_MAX = 100
TENANT_WEIGHT_MAX = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded model can take."""

    vocab_size: int
    context_length: int
    has_tokenizer: bool
    moves_kv: bool
    """Whether KV can be moved to other positions: chunks can be reused."""


def _invalid(param: str, message: str) -> KvasirError:
    return KvasirError(Reason.INVALID_REQUEST, f"{param} {message}", param=param)


def check_generate(request: worker_pb2.GenerateRequest, limits: Limits) -> None:
    """Checks all fields of a request for tokens.

    Raises:
        KvasirError: INVALID_REQUEST, UNSUPPORTED or CONTEXT_LENGTH.
    """
    _check_id(request.request_id)
    if not worker_pb2.STREAM_FORMAT_UNSPECIFIED <= request.format <= worker_pb2.STREAM_FORMAT_GRPC:
        raise KvasirError(
            Reason.UNSUPPORTED, f"format {request.format} is not known", param="format"
        )
    _check_tokens(request.token_ids, param="token_ids", limits=limits)
    if request.resume_token_ids:
        _check_tokens(request.resume_token_ids, param="resume_token_ids", limits=limits)
    elif request.resume_text_chars:
        raise _invalid("resume_text_chars", "needs resume_token_ids")
    _check_salt(request.tenant_salt)
    check_terms(request.terms)
    check_sampling(request.sampling)
    if request.HasField("chunks"):
        _check_chunks(request.chunks, len(request.token_ids), limits)
    _check_text(request, limits)
    total = len(request.token_ids) + request.sampling.max_tokens
    if total > limits.context_length:
        raise KvasirError(
            Reason.CONTEXT_LENGTH,
            f"{len(request.token_ids)} prompt tokens and {request.sampling.max_tokens} output"
            f" tokens exceed the context of {limits.context_length}",
            param="sampling.max_tokens",
        )
    if len(request.resume_token_ids) > request.sampling.max_tokens:
        raise _invalid("resume_token_ids", "are more than max_tokens")
    if request.HasField("prefill_peer"):
        check_peer(request.prefill_peer, param="prefill_peer")


def check_prefill(request: worker_pb2.PrefillRequest, limits: Limits) -> None:
    """Checks all fields of a request for KV.

    Raises:
        KvasirError: INVALID_REQUEST or CONTEXT_LENGTH.
    """
    _check_id(request.request_id)
    _check_tokens(request.token_ids, param="token_ids", limits=limits)
    _check_salt(request.tenant_salt)
    check_sampling(request.sampling)
    if request.session_id == 0:
        raise _invalid("session_id", "must not be 0")
    check_terms(request.terms)
    if request.HasField("chunks"):
        _check_chunks(request.chunks, len(request.token_ids), limits)
    if len(request.token_ids) >= limits.context_length:
        raise KvasirError(
            Reason.CONTEXT_LENGTH,
            f"{len(request.token_ids)} tokens fill the context of {limits.context_length}",
            param="token_ids",
        )


def check_start(skip_blocks: int, *, num_tokens: int) -> None:
    """Checks that there is something left to compute for a decode worker.

    Raises:
        KvasirError: INVALID_REQUEST.
    """
    if skip_blocks * BLOCK_TOKENS > num_tokens:
        raise _invalid("skip_blocks", "covers more than the tokens")


def check_terms(terms: common_pb2.QueueTerms) -> None:
    """Checks how a request wants to be queued.

    Raises:
        KvasirError: INVALID_REQUEST.
    """
    if not abs(terms.priority) <= PRIORITY_MAX:
        raise _invalid("terms.priority", f"must be from -{PRIORITY_MAX} to {PRIORITY_MAX}")
    if not 0 <= terms.tenant_weight <= TENANT_WEIGHT_MAX:
        raise _invalid("terms.tenant_weight", f"must be from 0 to {TENANT_WEIGHT_MAX}")


def check_sampling(sampling: common_pb2.SamplingParams) -> None:
    """Checks the ranges of sampling.

    Raises:
        KvasirError: INVALID_REQUEST.
    """
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise _invalid("sampling.temperature", "must be a number from 0")
    if not 0 < sampling.top_p <= 1:
        raise _invalid("sampling.top_p", "must be above 0 and at most 1")
    if sampling.max_tokens < 1:
        raise _invalid("sampling.max_tokens", "must be at least 1")
    if sampling.top_k > 2**31 - 1:
        raise _invalid("sampling.top_k", "is too large")
    if len(sampling.stop) > STOP_STRINGS_MAX:
        raise _invalid("sampling.stop", f"may hold {STOP_STRINGS_MAX} strings")
    if any(not 0 < len(stop) <= STOP_STRING_CHARS_MAX for stop in sampling.stop):
        raise _invalid(
            "sampling.stop", f"strings must have 1 to {STOP_STRING_CHARS_MAX} characters"
        )
    if len(sampling.stop_token_ids) > STOP_TOKENS_MAX:
        raise _invalid("sampling.stop_token_ids", f"may hold {STOP_TOKENS_MAX} ids")


def check_peer(peer: common_pb2.PeerAddress, *, param: str) -> None:
    """Checks that a peer can be called and told from its earlier lives.

    Raises:
        KvasirError: INVALID_REQUEST.
    """
    if not peer.host or not 0 < peer.grpc_port < 65536 or not 0 < peer.data_port < 65536:
        raise _invalid(param, "needs host, grpc_port and data_port")
    if len(peer.uid) != 16 or peer.epoch == 0:
        raise _invalid(param, "needs a uid of 16 bytes and an epoch")


def _check_id(request_id: str) -> None:
    if not 0 < len(request_id) <= REQUEST_ID_CHARS_MAX:
        raise _invalid("request_id", f"must have 1 to {REQUEST_ID_CHARS_MAX} characters")


def _check_salt(salt: bytes) -> None:
    if len(salt) > TENANT_SALT_BYTES_MAX:
        raise _invalid("tenant_salt", f"may have {TENANT_SALT_BYTES_MAX} bytes")


def _check_tokens(token_ids: Sequence[int], *, param: str, limits: Limits) -> None:
    if not token_ids:
        raise _invalid(param, "must not be empty")
    if len(token_ids) > limits.context_length:
        raise KvasirError(
            Reason.CONTEXT_LENGTH,
            f"{len(token_ids)} tokens exceed the context of {limits.context_length}",
            param=param,
        )
    if max(token_ids) >= limits.vocab_size:
        raise _invalid(param, f"holds an id outside the vocabulary of {limits.vocab_size}")


def _check_chunks(chunks: common_pb2.Chunks, num_tokens: int, limits: Limits) -> None:
    if not limits.moves_kv:
        message = "this worker cannot move KV: it reuses no chunks"
        raise KvasirError(Reason.UNSUPPORTED, message, param="chunks")
    if not 0 < len(chunks.spans) <= CHUNKS_MAX:
        raise _invalid("chunks.spans", f"must hold 1 to {CHUNKS_MAX}")
    if not 0 < chunks.recompute_permille <= 1000:
        raise _invalid("chunks.recompute_permille", "must be from 1 to 1000")
    bounds = [bound for span in chunks.spans for bound in (span.start, span.end)]
    is_empty = any(span.start == span.end for span in chunks.spans)
    if is_empty or bounds != sorted(bounds) or bounds[-1] > num_tokens:
        raise _invalid("chunks.spans", "must be in order, disjoint and within the prompt")


def _check_text(request: worker_pb2.GenerateRequest, limits: Limits) -> None:
    if limits.has_tokenizer:
        return
    if request.format not in (
        worker_pb2.STREAM_FORMAT_UNSPECIFIED,
        worker_pb2.STREAM_FORMAT_GRPC,
    ):
        raise KvasirError(
            Reason.UNSUPPORTED,
            "the model folder has no tokenizer: no text can be sent",
            param="format",
        )
    if request.sampling.stop:
        raise KvasirError(
            Reason.UNSUPPORTED,
            "the model folder has no tokenizer: stop strings cannot be found",
            param="sampling.stop",
        )
