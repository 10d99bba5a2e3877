"""Payloads that clients receive, and checks of what routers send."""

import json

import pytest
from kvasir_engine.worker import requests
from kvasir_engine.worker.requests import Limits
from kvasir_engine.worker.stream import chunk_format
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, worker_pb2

LIMITS = Limits(vocab_size=512, context_length=1024, has_tokenizer=True, moves_kv=True)
NASTY = 'a"b\\\n\r\t\u2028 \x00 é 漢 😀'


def make_request(**changes: object) -> worker_pb2.GenerateRequest:
    request = worker_pb2.GenerateRequest(
        request_id="r",
        token_ids=[1, 2, 3],
        sampling=common_pb2.SamplingParams(top_p=1, max_tokens=8),
        format=worker_pb2.STREAM_FORMAT_OPENAI_CHAT,
        stream_id="chatcmpl-1",
        created_s=7,
        model='m"1',
    )
    request.MergeFrom(worker_pb2.GenerateRequest(**changes))
    return request


def events(payload: bytes) -> list[dict]:
    parts = payload.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_chat_begins_with_the_role_then_sends_deltas() -> None:
    chunks = chunk_format(make_request())
    role, delta = events(chunks.delta(NASTY, (5,), first=True))
    assert role == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": 'm"1',
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }
    assert delta["choices"][0]["delta"] == {"content": NASTY}
    (later,) = events(chunks.delta("x", (6,), first=False))
    assert later["choices"][0]["delta"] == {"content": "x"}


def test_chat_sends_nothing_for_a_token_without_text() -> None:
    assert chunk_format(make_request()).delta("", (5,), first=False) == b""


@pytest.mark.parametrize(
    ("reason", "name"),
    [(common_pb2.FINISH_REASON_STOP, "stop"), (common_pb2.FINISH_REASON_LENGTH, "length")],
)
def test_chat_ends_with_the_finish_reason(reason: int, name: str) -> None:
    (event,) = events(chunk_format(make_request()).finish(reason))
    assert event["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": name,
    }


def test_completion_events_carry_text() -> None:
    request = make_request(format=worker_pb2.STREAM_FORMAT_OPENAI_COMPLETION)
    chunks = chunk_format(request)
    (event,) = events(chunks.delta(NASTY, (5,), first=True))
    assert event["object"] == "text_completion"
    assert event["choices"] == [
        {"index": 0, "text": NASTY, "logprobs": None, "finish_reason": None}
    ]
    (last,) = events(chunks.finish(common_pb2.FINISH_REASON_STOP))
    assert last["choices"][0]["finish_reason"] == "stop"


def test_text_is_plain_utf8() -> None:
    chunks = chunk_format(make_request(format=worker_pb2.STREAM_FORMAT_TEXT))
    assert chunks.delta(NASTY, (5,), first=True).decode() == NASTY
    assert chunks.finish(common_pb2.FINISH_REASON_STOP) == b""


def test_grpc_payload_is_one_chunk() -> None:
    chunks = chunk_format(make_request(format=worker_pb2.STREAM_FORMAT_GRPC))
    chunk = worker_pb2.GenerateChunk.FromString(chunks.delta("x", (5, 6), first=True))
    assert (chunk.text, list(chunk.token_ids)) == ("x", [5, 6])


def test_good_request_passes() -> None:
    requests.check_generate(make_request(), LIMITS)


def sampling(**changes: object) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(**{"top_p": 1, "max_tokens": 8, **changes})


PEER = common_pb2.PeerAddress(host="h", grpc_port=1, data_port=2, uid=b"u" * 16, epoch=3)


@pytest.mark.parametrize(
    ("field", "value", "reason", "param"),
    [
        ("request_id", "", Reason.INVALID_REQUEST, "request_id"),
        ("token_ids", [], Reason.INVALID_REQUEST, "token_ids"),
        ("token_ids", [512], Reason.INVALID_REQUEST, "token_ids"),
        ("token_ids", [1] * 1025, Reason.CONTEXT_LENGTH, "token_ids"),
        ("token_ids", [1] * 1017, Reason.CONTEXT_LENGTH, "sampling.max_tokens"),
        ("resume_token_ids", [512], Reason.INVALID_REQUEST, "resume_token_ids"),
        ("resume_token_ids", [1] * 9, Reason.INVALID_REQUEST, "resume_token_ids"),
        ("resume_text_chars", 4, Reason.INVALID_REQUEST, "resume_text_chars"),
        ("tenant_salt", b"x" * 65, Reason.INVALID_REQUEST, "tenant_salt"),
        ("format", 9, Reason.UNSUPPORTED, "format"),
        ("sampling", sampling(temperature=-1), Reason.INVALID_REQUEST, "sampling.temperature"),
        (
            "sampling",
            sampling(temperature=float("nan")),
            Reason.INVALID_REQUEST,
            "sampling.temperature",
        ),
        ("sampling", sampling(top_p=0), Reason.INVALID_REQUEST, "sampling.top_p"),
        ("sampling", sampling(top_p=1.5), Reason.INVALID_REQUEST, "sampling.top_p"),
        ("sampling", sampling(max_tokens=0), Reason.INVALID_REQUEST, "sampling.max_tokens"),
        ("sampling", sampling(stop=[""]), Reason.INVALID_REQUEST, "sampling.stop"),
        ("sampling", sampling(stop=["x"] * 17), Reason.INVALID_REQUEST, "sampling.stop"),
        ("prefill_peer", common_pb2.PeerAddress(), Reason.INVALID_REQUEST, "prefill_peer"),
    ],
)
def test_bad_request_names_its_field(field: str, value: object, reason: Reason, param: str) -> None:
    request = make_request()
    request.ClearField(field)
    request.MergeFrom(worker_pb2.GenerateRequest(**{field: value}))
    with pytest.raises(KvasirError) as caught:
        requests.check_generate(request, LIMITS)
    assert (caught.value.reason, caught.value.param) == (reason, param)


@pytest.mark.parametrize(
    ("format_", "stop", "param"),
    [
        (worker_pb2.STREAM_FORMAT_OPENAI_CHAT, [], "format"),
        (worker_pb2.STREAM_FORMAT_GRPC, ["x"], "sampling.stop"),
    ],
)
def test_text_needs_a_tokenizer(format_: int, stop: list[str], param: str) -> None:
    request = make_request(format=format_, sampling=sampling(stop=stop))
    limits = Limits(vocab_size=512, context_length=1024, has_tokenizer=False, moves_kv=True)
    with pytest.raises(KvasirError) as caught:
        requests.check_generate(request, limits)
    assert (caught.value.reason, caught.value.param) == (Reason.UNSUPPORTED, param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"session_id": 0}, "session_id"),
        ({"terms": {"priority": 101}}, "terms.priority"),
        ({"terms": {"tenant_weight": -1.0}}, "terms.tenant_weight"),
        ({"token_ids": [1] * 1024}, "token_ids"),
    ],
)
def test_bad_prefill_names_its_field(changes: dict, param: str) -> None:
    fields = {"request_id": "r", "token_ids": [1] * 100, "session_id": 5, "sampling": sampling()}
    requests.check_prefill(worker_pb2.PrefillRequest(**fields), LIMITS)
    with pytest.raises(KvasirError) as caught:
        requests.check_prefill(worker_pb2.PrefillRequest(**{**fields, **changes}), LIMITS)
    assert caught.value.param == param


def test_prefill_peer_is_checked_field_by_field() -> None:
    requests.check_peer(PEER, param="prefill_peer")
    for field in ("host", "grpc_port", "data_port", "uid", "epoch"):
        peer = common_pb2.PeerAddress()
        peer.CopyFrom(PEER)
        peer.ClearField(field)
        with pytest.raises(KvasirError):
            requests.check_peer(peer, param="prefill_peer")
