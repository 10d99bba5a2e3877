"""Settings of one router process. Unknown or out of range: it does not start and says which."""

from pathlib import Path
from typing import Self

from kvasir_kvstore.peers import parse_spec
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

WILDCARDS = ("0.0.0.0", "::")
"""Hosts to listen on that nobody can be sent to."""


class RouterSettings(BaseModel):
    """One router replica. Replicas with the same workers decide alike, whatever else differs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """Hugging Face folder: the router needs its tokenizer, chat template and context length."""

    model_name: str = Field(min_length=1)
    """The name that clients use; workers that serve another are left out."""

    host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=0, le=65535)
    """OpenAI API, /metrics, /healthz, /readyz. 0: any free port."""

    grpc_port: int = Field(default=8001, ge=0, le=65535)
    """kvasir.v1.Inference, health, reflection. 0: any free port."""

    tls_dir: Path | None = None
    """Folder with tls.crt, tls.key and ca.crt: workers, KV nodes and other replicas must show a
    certificate, and so does this router. Without it links are plain. Clients are not concerned."""

    peer_port: int = Field(default=0, ge=0, le=65535)
    """With a tls_dir: what is for other replicas and the operator, over TLS. 0: any free port.
    Without one it is on grpc_port."""

    picker_port: int | None = Field(default=None, ge=0, le=65535)
    """Envoy's external processing, for gateways that ask which endpoint is to serve a request.
    0: any free port; without it nobody can ask."""

    picker_tls: bool = False
    """With a tls_dir: the picker shows its certificate. Gateways need not show one."""

    advertise_host: str | None = None
    """Where gateways reach this replica; none: the host it listens on."""

    workers: tuple[str, ...] = ()
    """gRPC addresses: HOST:PORT, or dns:HOST:PORT for every address behind a name."""

    peers: tuple[str, ...] = ()
    """gRPC addresses of the other router replicas, or a dns: name of all of them, this one too.
    They tell one another which keys are extended; without them each decides by what it sees."""

    kv_nodes: tuple[str, ...] = ()
    """gRPC addresses of KV nodes, like `workers`: estimates then count what workers can fetch from
    them. The router serves without them."""

    ttft_slo_ms: int = Field(default=5_000, ge=1)
    """Target for the time to first token; a candidate above half of it loses its cache bonus."""

    tpot_slo_ms: int = Field(default=100, ge=1)
    """Target for the time per output token; requests within both targets count as attained.
    A request may ask for its own."""

    api_key_file: Path | None = None
    """Lines `KEY TENANT [WEIGHT]`; without it every client is the one default tenant."""

    body_bytes_max: int = Field(default=8 << 20, ge=1024)
    """Larger request bodies are refused: 8 MiB is ten times the text of a 128k-token context."""

    requests_in_flight_max: int = Field(default=4_096, ge=1)
    """Above it requests are refused at once: each holds a connection here and one at a worker."""

    request_timeout_ms: int = Field(default=600_000, ge=1)
    """From arrival to the last token."""

    first_token_timeout_ms: int = Field(default=120_000, ge=1)
    """A worker silent for this long before the first token is given up for another."""

    stall_timeout_ms: int = Field(default=30_000, ge=1)
    """Likewise between two tokens."""

    lost_timeout_ms: int = Field(default=5_000, ge=1)
    """Likewise, before or after the first token, once a worker has left the rings."""

    connect_timeout_ms: int = Field(default=1_000, ge=1)
    """Workers are near: whoever takes longer to accept a connection is down."""

    worker_wait_ms: int = Field(default=2_000, ge=0)
    """When all workers are away, new requests wait this long for one: restarts and hiccups pass."""

    attempts_max: int = Field(default=4, ge=1)
    """Workers tried for one request, continuations included."""

    unready_after_ms: int = Field(default=30_000, ge=0)
    """A router that could serve stays ready for this long while no worker can be reached."""

    silence_timeout_ms: int = Field(default=1_500, ge=100)
    """A worker without an event for this long leaves the rings; they come every 200 ms."""

    resolve_interval_ms: int = Field(default=1_000, ge=50)
    """How often dns: names are looked up."""

    blocks_known_max: int = Field(default=1_000_000, ge=1)
    """Block names remembered over all workers and KV nodes, about 54 bytes each."""

    local_prefill_tokens_max: int = Field(default=64, ge=0)
    """Uncached suffixes up to this length are prefilled by the decode worker itself."""

    shutdown_linger_ms: int = Field(default=0, ge=0)
    """After SIGTERM, new requests are served for this long although /readyz says 503: clients and
    proxies learn only after a while that they should go elsewhere."""

    drain_timeout_ms: int = Field(default=30_000, ge=0)
    """Then, streams may finish for this long."""

    @model_validator(mode="after")
    def _check_peer_port(self) -> Self:
        if self.peer_port and self.tls_dir is None:
            raise ValueError("peer_port needs tls_dir: plain peers use grpc_port")
        return self

    @model_validator(mode="after")
    def _check_picker(self) -> Self:
        if self.picker_port is not None and self.reached_at in WILDCARDS:
            raise ValueError(f"host {self.host} needs advertise_host: gateways are told of it")
        if self.picker_tls and self.tls_dir is None:
            raise ValueError("picker_tls needs tls_dir: that is where its certificate is")
        return self

    @property
    def reached_at(self) -> str:
        """The host that gateways are told."""
        return self.advertise_host or self.host

    @field_validator("workers", "peers", "kv_nodes")
    @classmethod
    def _check_specs(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        for spec in specs:
            parse_spec(spec)
        return specs
