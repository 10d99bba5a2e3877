"""vLLM as the engine: prompts go to its OpenAI server as token ids, and token ids come back.

Decides how a request looks to vLLM and what its answers mean. Needs vLLM 0.10.2 or newer
(`return_token_ids`). Stop strings are not passed on: they are found in the text that is made here,
and vLLM drops a request whose connection closes. Prompts are in bodies only, never in a log.
"""

import json
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvasir_engine.core.types import FinishReason, TokenEvent

CHECK_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
CHECK_CONNECTIONS = 8
"""Beside those of requests, so that a full server can still be asked how it is."""
ANSWER_BYTES_MAX = 4 << 20
LINE_BYTES_MAX = 16 << 20
"""One event: the first one repeats the prompt's token ids."""
ERROR_CHARS_MAX = 300
SEED_MASK = 2**63 - 1
REASON_OF_STATUS = {
    400: Reason.INVALID_REQUEST,
    422: Reason.INVALID_REQUEST,
    429: Reason.OVERLOADED,
    503: Reason.OVERLOADED,
}
FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # the second until 0.10


@dataclass(frozen=True, slots=True)
class VllmLoad:
    """What vLLM's metrics say of it."""

    num_running: int
    num_waiting: int
    blocks_total: int
    """Of BLOCK_TOKENS tokens."""
    blocks_free: int


@dataclass(slots=True)
class VllmUsage:
    """Filled in before the last event."""

    cached_tokens: int = 0


class Vllm:
    """One vLLM server, at `url`."""

    def __init__(self, url: str, *, model_name: str, connections_max: int) -> None:
        self._url = url.rstrip("/")
        self._model_name = model_name
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections_max + CHECK_CONNECTIONS),
            read_bufsize=LINE_BYTES_MAX // 2,  # aiohttp takes lines of twice this
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def context_length(self) -> int:
        """Tokens, prompt and output together, that vLLM serves of the model.

        Raises:
            KvasirError: it does not answer, or serves another model.
        """
        answer = await self._get("/v1/models")
        try:
            models = {m["id"]: m.get("max_model_len") for m in json.loads(answer)["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise _lost(f"/v1/models is not a list of models: {error!r}") from error
        length = models.get(self._model_name)
        if not isinstance(length, int):
            raise _lost(f"vLLM serves {', '.join(models) or 'nothing'}, not {self._model_name}")
        return length

    async def load(self) -> VllmLoad:
        """How busy it is.

        Raises:
            KvasirError: it does not answer, or its metrics are not vLLM's.
        """
        text = await self._get("/metrics")
        try:
            return _load_of(text)
        except (KeyError, ValueError) as error:
            raise _lost(f"its metrics cannot be read: {error!r}") from error

    async def events(
        self, message: worker_pb2.GenerateRequest, usage: VllmUsage
    ) -> AsyncGenerator[TokenEvent, None]:
        """The request's tokens; leaving early makes vLLM drop it.

        Raises:
            KvasirError: INVALID_REQUEST or OVERLOADED as vLLM says; NO_WORKER: it is gone.
        """
        try:
            async with self._session.post(
                f"{self._url}/v1/completions",
                json=completion_body(message, self._model_name),
                headers={"X-Request-Id": message.request_id},
            ) as response:
                if response.status != 200:
                    raise _refusal(response.status, await _text(response))
                async for line in response.content:
                    event = _event(line, usage)
                    if event is not None and event.finish_reason is not None:
                        async for rest in response.content:  # the usage comes last
                            _event(rest, usage)
                        yield event
                        return
                    if event is not None:
                        yield event
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _lost(f"{type(error).__name__}: {error}") from error
        raise _lost("its stream was cut off")

    async def _get(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
        try:
            async with self._session.get(self._url + path, timeout=timeout) as response:
                text = await _text(response)
                if response.status != 200:
                    raise _lost(f"GET {path}: status {response.status}")
                return text
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _lost(f"GET {path}: {error or type(error).__name__}") from error


def _load_of(text: str) -> VllmLoad:
    """What vLLM's metrics say. ValueError or KeyError: they are none of vLLM's."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    # vLLM has one sample for each of its engines
    caches = [sample.labels for sample in found.get("vllm:cache_config_info", ())]
    num_tokens = sum(int(c["num_gpu_blocks"]) * int(c["block_size"]) for c in caches)
    if not num_tokens:
        raise ValueError("there is no vllm:cache_config_info")
    usages = next((found[name] for name in KV_USAGE if name in found), [])
    used = sum(sample.value for sample in usages) / max(len(usages), 1)
    blocks_total = num_tokens // BLOCK_TOKENS
    return VllmLoad(
        num_running=_sum(found.get("vllm:num_requests_running", ())),
        num_waiting=_sum(found.get("vllm:num_requests_waiting", ())),
        blocks_total=blocks_total,
        blocks_free=int(blocks_total * (1 - min(max(used, 0.0), 1.0))),
    )


def _sum(samples: Iterable[Sample]) -> int:
    return int(sum(sample.value for sample in samples))


def completion_body(message: worker_pb2.GenerateRequest, model_name: str) -> dict[str, Any]:
    """The body of POST /v1/completions for a request, or for what is left of it."""
    sampling = message.sampling
    body: dict[str, Any] = {
        "model": model_name,
        "prompt": [*message.token_ids, *message.resume_token_ids],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": sampling.max_tokens - len(message.resume_token_ids),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "seed": sampling.seed & SEED_MASK,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
    }
    if message.tenant_salt:  # tenants share no blocks
        body["cache_salt"] = message.tenant_salt.hex()
    return body


def _event(line: bytes, usage: VllmUsage) -> TokenEvent | None:
    """The event in one line of server-sent events, if there is one.

    Raises:
        KvasirError: UNSUPPORTED: the server says no token ids; what it says went wrong.
        ValueError: it is not JSON.
    """
    data = line.strip().removeprefix(b"data:").strip()
    if not data or data == b"[DONE]" or not line.startswith(b"data:"):
        return None
    chunk = json.loads(data)
    if "error" in chunk:
        raise _lost(_message_of(chunk))
    if details := (chunk.get("usage") or {}).get("prompt_tokens_details"):
        usage.cached_tokens = details.get("cached_tokens") or 0
    if not chunk.get("choices"):
        return None
    choice = chunk["choices"][0]
    token_ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    if token_ids is None and choice.get("text"):
        raise KvasirError(
            Reason.UNSUPPORTED, "the server returns no token ids: vLLM 0.10.2 or newer is needed"
        )
    if finish is not None and finish not in FINISH_REASONS:
        raise _lost(f"vLLM ended the request: {finish}")
    return TokenEvent(tuple(token_ids or ()), FINISH_REASONS[finish] if finish else None)


def _refusal(status: int, text: str) -> KvasirError:
    try:
        message = _message_of(json.loads(text))
    except ValueError:
        message = text[:ERROR_CHARS_MAX]
    reason = REASON_OF_STATUS.get(status, Reason.NO_WORKER)
    retry_after_ms = 1000 if reason is Reason.OVERLOADED else 0
    return KvasirError(reason, f"vLLM: {message or status}", retry_after_ms=retry_after_ms)


def _message_of(answer: Any) -> str:
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error", answer)
    message = error.get("message", "") if isinstance(error, dict) else error
    return str(message)[:ERROR_CHARS_MAX]


def _lost(problem: str) -> KvasirError:
    return KvasirError(Reason.NO_WORKER, f"vLLM cannot be used: {problem}", retry_after_ms=1000)


async def _text(response: aiohttp.ClientResponse) -> str:
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise _lost(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    return b"".join(parts).decode(errors="replace")
