"""What the parts of one worker process share: identity, state and, once loaded, the model.

Sockets open before the model is loaded, so that a worker can say why it is not ready; until then
`serving` is None and every request is refused by `WorkerState`.
"""

import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.client import KvTier
from kvasir_kvstore.core import block
from kvasir_kvstore.events import EventHub
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_engine.core.types import EngineLoad
from kvasir_engine.engine import Engine
from kvasir_engine.model import LoadedModel
from kvasir_engine.text import Tokenizer
from kvasir_engine.worker.admission import Admission, Asked, asked_of
from kvasir_engine.worker.chunks import names_salt
from kvasir_engine.worker.inflight import InFlight
from kvasir_engine.worker.metrics import Gauges, WorkerMetrics
from kvasir_engine.worker.peers import Peers
from kvasir_engine.worker.rates import FetchRates
from kvasir_engine.worker.requests import Limits
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_engine.worker.state import Role, TransferHealth, WorkerState
from kvasir_engine.worker.transfer import Puller

log = logging.getLogger(__name__)

_VERSION = importlib.metadata.version("kvasir")

LINKS_TOLD_MAX = 16
PROTO_ROLE = {
    Role.PREFILL: common_pb2.ROLE_PREFILL,
    Role.DECODE: common_pb2.ROLE_DECODE,
    Role.BOTH: common_pb2.ROLE_BOTH,
}


@dataclass(frozen=True, slots=True)
class Serving:
    """The loaded model and all that serves it."""

    engine: Engine
    model: LoadedModel
    pool: BlockPool
    block_server: BlockServer
    puller: Puller
    tier: KvTier | None
    tokenizer: Tokenizer | None
    layout: block.KvLayout
    fingerprint: bytes
    limits: Limits
    eos_token_ids: frozenset[int]
    isa: str
    num_threads: int

    def names(self, token_ids: Sequence[int], *, tenant_salt: bytes) -> list[bytes]:
        """Names of the full blocks of these tokens."""
        return block.chain(block.root(self.fingerprint, tenant_salt), token_ids)


@dataclass(frozen=True, slots=True)
class Outside:
    """What is known of an engine in another process (remote.py)."""

    fingerprint: bytes
    context_length: int
    load: EngineLoad


class Host:
    """One worker process."""

    def __init__(self, settings: WorkerSettings, *, uid: bytes, epoch: int) -> None:
        self.settings = settings
        self.address = common_pb2.PeerAddress(
            name=settings.name, uid=uid, epoch=epoch, host=settings.peer_host
        )
        """Its ports are filled in as they are bound, before anyone can ask for them."""
        self.state = WorkerState(Role(settings.role), max_requests=settings.max_requests)
        self.health = TransferHealth(failures_max=settings.transfer_failures_max)
        self.metrics = WorkerMetrics(self.gauges)
        self.hub = EventHub(
            worker_pb2.WorkerEvent,
            lambda: worker_pb2.WorkerEvent(description=self.describe()),
            queue_max=settings.watch_queue_max,
            on_started=lambda start: self.metrics.watches.labels(start).inc(),
            on_dropped=self.metrics.watchers_dropped.inc,
            announces=settings.block_events,
        )
        self.in_flight = InFlight(
            self.state, self.metrics, timeout_ms_max=settings.request_timeout_ms
        )
        self.admission = Admission(
            self.engine_load,
            lookahead_tokens=2 * settings.max_batch_tokens,
            num_leading_held=lambda names: self.hub.num_leading_held(names),
            on_given_up=lambda why: self.metrics.given_up.labels(why).inc(),
        )
        self.fetch_rates = FetchRates()
        self.links = Links(settings.tls_dir)
        self.peers = Peers(self.links, close_grace_s=settings.request_timeout_ms / 1000)
        self.tells_blocks = settings.block_events and settings.vllm_url is None
        """Whether events say which blocks it holds; vLLM's are yet to be followed."""
        self.serving: Serving | None = None
        self.outside: Outside | None = None

    def served(self) -> Serving:
        """The loaded model, for a request that `WorkerState` has admitted."""
        assert self.serving is not None, "requests are admitted only once the model is loaded"
        return self.serving

    @property
    def fatal(self) -> str:
        """Why only a restart can help; empty: the worker is sound."""
        return self.state.failed or (self.serving.engine.problem if self.serving else "")

    def problems(self) -> list[str]:
        """Why this worker should get no requests now; empty: it is ready."""
        state, health = self.state, self.health
        found = [problem for problem in (self.fatal, state.loading) if problem]
        if state.draining:
            found.append("draining")
        if not health.healthy:
            found.append(f"KV transfers fail: {health.error}")
        return found

    def set_role(self, role: Role) -> None:
        """Serves another role from now on; running requests and the cache stay.

        Raises:
            KvasirError: UNSUPPORTED: vLLM hands no KV off.
        """
        if self.settings.vllm_url and role is not Role.BOTH:
            raise KvasirError(Reason.UNSUPPORTED, "a worker with vLLM has role both", param="role")
        if role is not self.state.role:
            log.info("role changes from %s to %s", self.state.role, role)
            self.state.role = role
            self.hub.description_changed()

    def engine_load(self) -> EngineLoad:
        """The engine's load, without what waits in front of it."""
        return self.served().engine.load()

    def load(self) -> EngineLoad | None:
        """The engine's load and what waits in front of it; None before it runs."""
        if self.serving is None:
            return self.outside.load if self.outside else None
        load = self.engine_load()
        return replace(
            load,
            num_waiting=load.num_waiting + self.admission.num_waiting,
            prefill_tokens_queued=load.prefill_tokens_queued + self.admission.tokens_waiting,
        )

    def asked(self, message: worker_pb2.GenerateRequest | worker_pb2.PrefillRequest) -> Asked:
        """A request for the KV of a prompt, as the queue sees it."""
        token_ids = list(message.token_ids)
        if isinstance(message, worker_pb2.GenerateRequest):
            token_ids += message.resume_token_ids
        names = self.served().names(token_ids[:-1], tenant_salt=names_salt(message))
        return asked_of(message, num_tokens=len(token_ids), names=names)

    def describe(self) -> worker_pb2.WorkerDescription:
        """What peers, routers and the operator are told."""
        description = worker_pb2.WorkerDescription(
            address=self.address,
            role=PROTO_ROLE[self.state.role],
            model=self.settings.model_name,
            draining=self.state.draining,
            kv_transfer_healthy=self.health.healthy,
            kv_transfer_error=self.health.error,
            version=_VERSION,
            blocks_unannounced=not self.tells_blocks,
            kv_crossed=self.health.has_crossed,
        )
        description.kv_reuse.CopyFrom(_kv_reuse(self.serving, self.metrics))
        if self.outside is not None:
            description.fingerprint = self.outside.fingerprint
            description.context_length = self.outside.context_length
            description.isa = "vllm"
            _add_load(description, self.outside.load)
        if self.serving is not None:
            _add_model(description, self.serving)
            _add_load(description, self.load())
            description.load.store_us_per_token = self.fetch_rates.us_per_token
        return description

    def gauges(self) -> Gauges:
        """What a scrape of the metrics reads."""
        load = self.load()
        return Gauges(
            running=load.num_running if load else 0,
            waiting=load.num_waiting if load else 0,
            in_flight=self.state.num_in_flight,
            prefill_tokens_queued=load.prefill_tokens_queued if load else 0,
            blocks_total=load.blocks_total if load else 0,
            blocks_free=load.blocks_free if load else 0,
            ready=not self.problems(),
            kv_transfer_healthy=self.health.healthy,
            kv_crossed=self.health.has_crossed,
        )


def proto_layout(layout: block.KvLayout) -> common_pb2.KvLayout:
    """The layout as a message."""
    return common_pb2.KvLayout(
        digest=layout.digest,
        num_layers=layout.num_layers,
        block_bytes=layout.block_bytes,
        block_tokens=layout.block_tokens,
    )


def _kv_reuse(serving: Serving | None, metrics: WorkerMetrics) -> worker_pb2.KvReuse:
    tier = serving.tier if serving else None
    links = [*(serving.puller.links if serving else ()), *(tier.links if tier else ())]
    return worker_pb2.KvReuse(
        prompt_tokens=metrics.prompt_tokens.counts,
        tier_blocks=tier.counts if tier else {},
        links=[
            worker_pb2.KvLink(
                peer=link.peer,
                codec=link.codec,
                bytes_per_s=link.bytes_per_s,
                transport=link.transport,
            )
            for link in links[-LINKS_TOLD_MAX:]
        ],
    )


def _add_model(description: worker_pb2.WorkerDescription, serving: Serving) -> None:
    description.fingerprint = serving.fingerprint
    description.layout.CopyFrom(proto_layout(serving.layout))
    description.context_length = serving.engine.limits.request_tokens_max
    description.isa = serving.isa
    description.num_threads = serving.num_threads


def _add_load(description: worker_pb2.WorkerDescription, load: EngineLoad | None) -> None:
    assert load is not None, "a loaded model has a load"
    description.load.CopyFrom(
        worker_pb2.WorkerLoad(
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            prefill_tokens_queued=load.prefill_tokens_queued,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            prefill_us_per_token=load.prefill_us_per_token,
            decode_ms_per_step=load.decode_ms_per_step,
        )
    )
