"""Payloads of the token stream: the bytes that a client receives, by stream format.

Decides how one step's text looks to the client; which text it is, is `output`'s part. OpenAI
events follow https://platform.openai.com/docs/api-reference (chat-streaming, completions).
"""

import json
from typing import Protocol

from kvasir_proto.v1 import common_pb2, worker_pb2

FINISH_NAMES = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
    common_pb2.FINISH_REASON_ERROR: "error",
}


class ChunkFormat(Protocol):
    """Turns steps into payloads."""

    def delta(self, text: str, token_ids: tuple[int, ...], *, first: bool) -> bytes:
        """Payload of one step; `first`: the client has received nothing yet. May be empty."""

    def finish(self, reason: common_pb2.FinishReason.ValueType) -> bytes:
        """Payload that ends the output. May be empty."""


class TextFormat:
    """Plain UTF-8 text."""

    def delta(self, text: str, token_ids: tuple[int, ...], *, first: bool) -> bytes:
        """The text."""
        return text.encode()

    def finish(self, reason: common_pb2.FinishReason.ValueType) -> bytes:
        """Nothing."""
        return b""


class GrpcFormat:
    """One serialised GenerateChunk a step; the DONE frame holds the last one."""

    def delta(self, text: str, token_ids: tuple[int, ...], *, first: bool) -> bytes:
        """A chunk with text and token ids."""
        return worker_pb2.GenerateChunk(text=text, token_ids=token_ids).SerializeToString()

    def finish(self, reason: common_pb2.FinishReason.ValueType) -> bytes:
        """Nothing."""
        return b""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _EventFormat:
    """Server-sent events whose JSON differs only in the middle: head and tail are made once."""

    def __init__(self, request: worker_pb2.GenerateRequest, kind: str) -> None:
        start = _json(
            {
                "id": request.stream_id,
                "object": kind,
                "created": request.created_s,
                "model": request.model,
            }
        )
        self.head = f"data: {start[:-1]},"

    def event(self, choice: str) -> bytes:
        """One event with one choice, given as JSON."""
        return f'{self.head}"choices":[{choice}]}}\n\n'.encode()


class ChatFormat(_EventFormat):
    """chat.completion.chunk: a chunk with the role, deltas, a chunk with the finish reason."""

    def __init__(self, request: worker_pb2.GenerateRequest) -> None:
        super().__init__(request, "chat.completion.chunk")

    def delta(self, text: str, token_ids: tuple[int, ...], *, first: bool) -> bytes:
        """The role chunk if it is due, and the text if there is any."""
        events = b""
        if first:
            events += self._chunk('{"role":"assistant","content":""}', "null")
        if text:
            events += self._chunk(f'{{"content":{_json(text)}}}', "null")
        return events

    def finish(self, reason: common_pb2.FinishReason.ValueType) -> bytes:
        """The chunk with finish_reason."""
        return self._chunk("{}", _json(FINISH_NAMES[reason]))

    def _chunk(self, delta: str, finish_reason: str) -> bytes:
        return self.event(
            f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish_reason}}}'
        )


class CompletionFormat(_EventFormat):
    """text_completion: chunks with text, a chunk with the finish reason."""

    def __init__(self, request: worker_pb2.GenerateRequest) -> None:
        super().__init__(request, "text_completion")

    def delta(self, text: str, token_ids: tuple[int, ...], *, first: bool) -> bytes:
        """A chunk with the text, if there is any."""
        return self._chunk(text, "null") if text else b""

    def finish(self, reason: common_pb2.FinishReason.ValueType) -> bytes:
        """The chunk with finish_reason."""
        return self._chunk("", _json(FINISH_NAMES[reason]))

    def _chunk(self, text: str, finish_reason: str) -> bytes:
        return self.event(
            f'{{"index":0,"text":{_json(text)},"logprobs":null,"finish_reason":{finish_reason}}}'
        )


def chunk_format(request: worker_pb2.GenerateRequest) -> ChunkFormat:
    """The format a request asks for; checked to be known by `requests.check`."""
    match request.format:
        case worker_pb2.STREAM_FORMAT_OPENAI_CHAT:
            return ChatFormat(request)
        case worker_pb2.STREAM_FORMAT_OPENAI_COMPLETION:
            return CompletionFormat(request)
        case worker_pb2.STREAM_FORMAT_TEXT:
            return TextFormat()
        case _:
            return GrpcFormat()
