"""Chunks that a separator sets apart reach the worker as spans of tokens."""

from pathlib import Path
from typing import Any

import grpc.aio
import openai
import pytest
import tokenizers
from fake_worker import FakeWorker
from kvasir_kvstore.core import block
from kvasir_proto.errors import Reason
from kvasir_proto.rpc_errors import error_from_rpc
from kvasir_proto.v1 import common_pb2, inference_pb2
from kvasir_router.chunks import CHUNKS_MAX, split_prompt
from router_fixtures import RouterUnderTest, running_router

TEXT = "Read:##one##two two##three##Now answer."
PLAIN = TEXT.replace("##", "")
SEPARATED = {"chunk_separator": "##"}
PIECES = ["one", "two two", "three"]


@pytest.fixture
async def router(tmp_path: Path):
    async with running_router(tmp_path, FakeWorker("w", "both")) as running:
        yield running


def pieces(request: Any) -> list[str]:
    """The chunks' texts: a token is a byte here."""
    text = bytes_of(request)
    return [text[span.start : span.end] for span in request.chunks.spans]


def bytes_of(request: Any) -> str:
    return "".join(map(chr, map(_byte, request.token_ids)))


def _byte(token_id: int) -> int:
    return _BYTES[token_id]


def _alphabet() -> list[int]:
    """Bytes by token id of the fixture's vocabulary."""
    known = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    decoder = tokenizers.decoders.ByteLevel()
    return [ord(decoder.decode([letter])[:1] or "?") for letter in known]


_BYTES = _alphabet()


async def complete(router: RouterUnderTest, **kwargs: Any) -> Any:
    """What the worker was sent for one completion."""
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": 2} | kwargs
    await router.openai.completions.create(**asked)
    return router.requests()[-1]


async def test_separators_go_and_chunks_are_marked(router: RouterUnderTest) -> None:
    request = await complete(router, extra_body={"chunk_separator": "##"})
    assert bytes_of(request) == PLAIN
    assert pieces(request) == PIECES
    assert request.chunks.recompute_permille == 150


async def test_chat_has_chunks_within_its_template(router: RouterUnderTest) -> None:
    await router.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=2,
        extra_body={"chunk_separator": "##", "chunk_recompute": 0.3},
    )
    (request,) = router.requests()
    assert bytes_of(request) == f"<|user|>{PLAIN}<|assistant|>"
    assert pieces(request) == PIECES
    assert request.chunks.recompute_permille == 300


async def test_headers_and_grpc_set_chunks_too(router: RouterUnderTest) -> None:
    headers = {"x-kvasir-chunk-separator": "##", "x-kvasir-chunk-recompute": "1"}
    request = await complete(router, extra_headers=headers)
    assert (pieces(request), request.chunks.recompute_permille) == (PIECES, 1000)
    message = inference_pb2.InferenceRequest(
        model="tiny",
        prompt=TEXT,
        sampling=common_pb2.SamplingParams(max_tokens=2),
        chunk_separator="##",
        chunk_recompute=0.2,
    )
    async for _ in router.stub.Generate(message, timeout=10):
        pass
    request = router.requests()[-1]
    assert (pieces(request), request.chunks.recompute_permille) == (PIECES, 200)


async def test_the_worker_that_holds_the_chunks_is_chosen(tmp_path: Path) -> None:
    prompt = "##".join(["", "a" * 70, "b" * 70, "c" * 70, ""])
    async with running_router(tmp_path, FakeWorker("w1"), FakeWorker("w2")) as router:
        fleet = router.server.fleet
        sent = await complete(router, prompt=prompt, extra_body=SEPARATED)
        root = block.root(fleet.fingerprint or b"", sent.tenant_salt)
        spans = [(span.start, span.end) for span in sent.chunks.spans]
        names = [name for a, b in spans for name in block.chain(root, sent.token_ids[a:b])]
        assert len(names) == 6
        for holder in router.workers.values():
            holder.tell(stored=names)
            known = fleet.view().prefix.num_blocks
            await router.until(lambda w=holder.name, known=known: known.get(w) == 6)
            before = len(holder.requests)
            for number in range(4):
                await complete(router, prompt=f"{prompt}{number}", extra_body=SEPARATED)
            assert len(holder.requests) == before + 4
            holder.tell(removed=names)
            await router.until(lambda w=holder.name, known=known: not known.get(w))


async def test_without_separator_nothing_is_reused(router: RouterUnderTest) -> None:
    request = await complete(router, extra_body={"chunk_recompute": 0.5})
    assert bytes_of(request) == TEXT
    assert not request.HasField("chunks")


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"extra_body": {"chunk_separator": "@@"}}, "chunk_separator"),
        ({"prompt": "a##b", "extra_body": {"chunk_separator": "##"}}, "chunk_separator"),
        ({"prompt": [1, 2], "extra_body": {"chunk_separator": "##"}}, "chunk_separator"),
        ({"extra_body": {"chunk_separator": ""}}, "chunk_separator"),
        ({"extra_body": {"chunk_separator": "#" * 65}}, "chunk_separator"),
        ({"extra_body": {"chunk_separator": "##", "chunk_recompute": 0}}, "chunk_recompute"),
        ({"extra_body": {"chunk_separator": "##", "chunk_recompute": 1.1}}, "chunk_recompute"),
        ({"prompt": "##a" * (CHUNKS_MAX + 2), "extra_body": SEPARATED}, "chunk_separator"),
    ],
)
async def test_bad_chunks_are_refused_by_name(
    router: RouterUnderTest, kwargs: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(router, **kwargs)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


async def test_grpc_token_ids_with_a_separator_are_refused(router: RouterUnderTest) -> None:
    message = inference_pb2.InferenceRequest(
        model="tiny", tokens=inference_pb2.TokenIds(ids=[1, 2]), chunk_separator="##"
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in router.stub.Generate(message, timeout=10):
            pass
    error = error_from_rpc(caught.value)
    assert (error.reason, error.param) == (Reason.INVALID_REQUEST, "chunk_separator")


def test_parts_are_tokenised_apart_and_only_the_first_gets_special_tokens() -> None:
    def encode(text: str, is_first: bool) -> list[int]:
        return [999] * is_first + list(text.encode())

    prompt = split_prompt("|ab||c|", "|", encode)
    assert prompt.token_ids == (999, *b"abc")
    assert prompt.spans == ((1, 3), (3, 4))
