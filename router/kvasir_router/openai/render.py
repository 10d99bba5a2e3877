"""What the router itself writes: usage, the last chunk of a stream, bodies without a stream."""

import json
from typing import Any

from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.upstream.call import Call, Progress

DONE_EVENT = b"data: [DONE]\n\n"
FINISH_NAMES = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


def usage_of(done: worker_pb2.GenerateChunk) -> dict[str, Any]:
    """OpenAI's usage object."""
    usage = done.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def stats_of(call: Call, done: worker_pb2.GenerateChunk, progress: Progress) -> dict[str, Any]:
    """The extension object `kvasir`: what the request cost and who served it."""
    stats = done.stats
    values = {field.name: getattr(stats, field.name) for field in stats.DESCRIPTOR.fields}
    if progress.route is not None:
        values["route_reason"] = progress.route.reason.value
    if progress.first_token_ms is not None:
        values["router_ttft_ms"] = progress.first_token_ms - call.arrived_ms
    values["attempts"] = progress.num_attempts
    values["continuations"] = progress.num_continued
    return values


def _frame_of(call: Call, kind: str) -> dict[str, Any]:
    return {
        "id": call.stream_id,
        "object": kind,
        "created": call.created_s,
        "model": call.model,
    }


def usage_event(
    call: Call, done: worker_pb2.GenerateChunk, progress: Progress, *, is_chat: bool
) -> bytes:
    """The chunk that stream_options.include_usage asks for."""
    body = {
        **_frame_of(call, "chat.completion.chunk" if is_chat else "text_completion"),
        "choices": [],
        "usage": usage_of(done),
        "kvasir": stats_of(call, done, progress),
    }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def completion_body(
    call: Call,
    done: worker_pb2.GenerateChunk,
    progress: Progress,
    *,
    text: str,
    is_chat: bool,
) -> dict[str, Any]:
    """The answer without a stream."""
    content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    choice = {
        "index": 0,
        **content,
        "logprobs": None,
        "finish_reason": FINISH_NAMES.get(done.finish_reason, "stop"),
    }
    return {
        **_frame_of(call, "chat.completion" if is_chat else "text_completion"),
        "choices": [choice],
        "usage": usage_of(done),
        "kvasir": stats_of(call, done, progress),
    }
