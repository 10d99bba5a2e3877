"""Settings of one worker process: what it serves, where it listens and what bounds it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from kvasir_kvstore.codecs import KvCodec
from kvasir_kvstore.peers import DataPeerSettings, parse_spec
from pydantic import Field, field_validator, model_validator

from kvasir_engine.formats import KvFormat, WeightFormat


class WorkerSettings(DataPeerSettings):
    """One worker."""

    model: Path
    """Hugging Face folder."""
    model_name: str = Field(min_length=1)
    """The name that clients use."""
    role: Literal["prefill", "decode", "both"] = "both"
    """What it serves: prompts for decode workers, whole requests, or both."""
    vllm_url: str | None = None
    """vLLM's OpenAI server computes, not the engine of this process: http://127.0.0.1:8000."""
    vllm_events: str | None = None
    """Where vLLM publishes KV events (ZeroMQ: ipc:///tmp/kv-events); none: routers go by what they
    sent it. Needs the extra: pip install 'kvasir[vllm]'."""
    vllm_replay: str | None = None
    """Where vLLM repeats KV events; without it a missing one makes all blocks unknown."""

    stream_port: int = Field(default=0, ge=0, le=65535)
    """Token streams for routers, where there is a tls_dir; without one they are on http_port."""
    kv_cache_mb: int = Field(default=1024, ge=1)
    """Memory for KV blocks."""
    threads: int = Field(default=0, ge=0)
    """Of the engine; 0: one per core."""
    weights: WeightFormat = "bf16"
    """How weights are computed with: quantised at load."""
    keep_packed: bool = True
    """Keeps packed weights in MODEL/.kvasir, where the next load, and other workers, map them."""
    kv: KvFormat = "bf16"
    """How KV is kept; workers of one fleet must agree, since formats share no block."""
    kv_codec: KvCodec = "raw"
    """How KV that comes over TCP may be encoded: auto takes the fastest for each link of those that
    `kvasir kv probe` allowed for the model. Workers of one fleet must agree on raw or not, since
    blocks that may have lost something share no name with exact ones."""
    isa: str | None = None
    """CPU path of the kernels; None: the best that runs here."""
    kv_nodes: tuple[str, ...] = ()
    """HOST:PORT or dns:HOST:PORT of their gRPC; none: no KV tier."""
    kv_replicas: int = Field(default=1, ge=1, le=8)
    """KV nodes that each block is offered to."""
    redis: str | None = None
    """URL of the block index, if it is Redis."""

    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens of one engine step: bounds how long a step, and so a decode token, may take."""
    max_running: int = Field(default=64, ge=1)
    """Requests that hold KV memory."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests in the engine's queue; more are refused with `busy`."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests in any state, hand-offs included; more are refused with `overloaded`."""

    local_prefill_tokens_max: int = Field(default=64, ge=0)
    """A decode worker computes an uncached suffix up to this length itself."""
    accept_timeout_ms: int = Field(default=3000, ge=1)
    """A prefill worker that has not accepted by then is taken for dead."""
    pull_grace_ms: int = Field(default=5000, ge=1)
    """KV must be whole this long after the prefill worker has finished."""
    handoff_hold_ms: int = Field(default=30_000, ge=1)
    """A prefill worker keeps finished KV that nobody pulls this long."""
    transfer_failures_max: int = Field(default=3, ge=1)
    """Consecutive failed transfers after which the worker says so in its readiness."""
    transfer_recheck_ms: int = Field(default=5000, ge=1)
    """How often a broken transfer path is tried again."""
    fetch_timeout_ms: int = Field(default=2000, ge=1)
    """Upper bound of a fetch from the KV tier."""
    offer_blocks_max: int = Field(default=8192, ge=1)
    """Blocks waiting to be offered to the KV tier; more are dropped."""
    request_timeout_ms: int = Field(default=600_000, ge=1)
    """Deadline of a request that names none, and the longest that one may name."""
    drain_timeout_ms: int = Field(default=60_000, ge=1)
    """How long running requests may take to end after SIGTERM."""
    block_events: bool = True
    """Tells routers which blocks it holds; without, they go by what they sent it."""
    watch_queue_max: int = Field(default=1024, ge=1)
    """Events waiting for one watcher; it must reconnect if it falls further behind."""

    @field_validator("vllm_url")
    @classmethod
    def _check_vllm_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is not a URL (http://HOST:PORT)")
        return value

    @model_validator(mode="after")
    def _check_vllm(self) -> Self:
        if self.vllm_url is not None and (self.role != "both" or self.kv_nodes):
            raise ValueError(
                "vllm_url needs role both and no kv_nodes: vLLM keeps its KV to itself"
            )
        return self

    @field_validator("vllm_events", "vllm_replay")
    @classmethod
    def _check_zmq(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("ipc://", "tcp://")):
            raise ValueError(f"{value!r} is no address of ZeroMQ (ipc://PATH or tcp://HOST:PORT)")
        return value

    @model_validator(mode="after")
    def _check_events(self) -> Self:
        if self.vllm_events and not (self.vllm_url and self.block_events):
            raise ValueError("vllm_events needs vllm_url and block_events")
        if self.vllm_replay and not self.vllm_events:
            raise ValueError("vllm_replay needs vllm_events")
        if self.vllm_events and not all(map(find_spec, ("zmq", "msgspec"))):
            raise ValueError("vllm_events needs an extra: pip install 'kvasir[vllm]'")
        return self

    @model_validator(mode="after")
    def _check_stream_port(self) -> Self:
        if self.stream_port and self.tls_dir is None:
            raise ValueError("stream_port needs tls_dir: plain streams are on http_port")
        if self.stream_port and self.stream_port in (
            self.grpc_port,
            self.http_port,
            self.data_port,
        ):
            raise ValueError("stream_port and the other ports must differ")
        return self

    @field_validator("kv_nodes")
    @classmethod
    def _check_kv_nodes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for node in value:
            parse_spec(node)
        return value
