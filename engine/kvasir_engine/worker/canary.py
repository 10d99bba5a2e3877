"""The canary: one KV block that this worker pulls from itself, the way peers pull from it.

Decides whether the data plane works: a tiny request warms the engine up and leaves a block, which
is then pulled by name over a real connection to the advertised address and compared: by TCP, also
where peers of this node would read its memory, since others come to that port. A worker whose
canary dies says so in its readiness. The same check, and one of the peer that failed last, bring it
back.
"""

import asyncio
import logging
import secrets
import time

from kvasir_kvstore.core.block import BLOCK_TOKENS, NAME_BYTES
from kvasir_proto.errors import KvasirError
from kvasir_proto.v1 import common_pb2

from kvasir_engine.core.types import EngineRequest, Sampling
from kvasir_engine.worker.crossing import reserved_block
from kvasir_engine.worker.host import Host, Serving
from kvasir_engine.worker.transfer import Pulled

log = logging.getLogger(__name__)

PULL_TIMEOUT_MS = 5000
ENGINE_TIMEOUT_MS = 60_000
PROBATION_S = 60.0
"""A peer that cannot be asked any more must not keep a worker unhealthy longer than this."""
_SALT = b"kvasir-canary"


async def check(host: Host) -> str:
    """Warms the engine up and pulls the block this leaves; what is wrong, or ""."""
    serving = host.served()
    tokens = tuple(i % serving.limits.vocab_size for i in range(BLOCK_TOKENS + 1))
    name = serving.names(tokens, tenant_salt=_SALT)[0]
    try:
        await _compute(serving, tokens)
        pulled, data = await _pull(serving, host.address, name, local=False)
    except KvasirError as error:
        return f"the engine refuses the canary: {error.message}"
    source = serving.pool.lookup(name)
    if pulled.error or not pulled.num_leading or source is None:
        where = f"{host.address.host}:{host.address.data_port}"
        return f"the canary block cannot be pulled from {where}: {pulled.error or 'not there'}"
    return "" if serving.pool.data[source].tobytes() == data else "the canary block differs"


async def watch(host: Host) -> None:
    """Brings a worker whose transfers fail back once they work again; runs until cancelled."""
    unhealthy_since_s: float | None = None
    while True:
        await asyncio.sleep(host.settings.transfer_recheck_ms / 1000)
        if host.health.healthy:
            unhealthy_since_s = None
            continue
        unhealthy_since_s = unhealthy_since_s or time.monotonic()
        problem = await check(host) or await _probe_failed_peer(host)
        if not problem:
            host.health.succeeded()
        elif time.monotonic() - unhealthy_since_s > PROBATION_S:
            host.health.on_probation()
        else:
            continue
        unhealthy_since_s = None
        log.info("KV transfers are tried again%s", f" though: {problem}" if problem else "")
        host.hub.description_changed()


async def _compute(serving: Serving, tokens: tuple[int, ...]) -> None:
    request = EngineRequest(
        request_id=f"canary-{secrets.token_hex(8)}",
        prompt=tokens,
        sampling=Sampling(max_tokens=2, ignore_eos=True),
        tenant_salt=_SALT,
        deadline_ms=time.monotonic() * 1000 + ENGINE_TIMEOUT_MS,
    )
    async for _ in serving.engine.generate(request):
        pass


async def _probe_failed_peer(host: Host) -> str:
    """Asks the peer that failed last for a block that nobody has: an answer is a working path."""
    serving = host.served()
    peer = serving.puller.failed_peer
    if peer is None:
        return ""
    try:
        pulled, _ = await _pull(serving, peer, secrets.token_bytes(NAME_BYTES))
    except KvasirError as error:
        return f"the engine refuses the probe: {error.message}"
    # a peer that has restarted answers so: the path works, and nobody asks for its old self again
    return "" if pulled.error in ("", "stale_peer") else f"{peer.name}: {pulled.error}"


async def _pull(
    serving: Serving, source: common_pb2.PeerAddress, name: bytes, *, local: bool = True
) -> tuple[Pulled, bytes]:
    """Pulls one block into one that is reserved for it; the result, and what is in it then."""
    async with reserved_block(serving) as block:
        pull = serving.puller.named(
            source, names=[name], blocks=[block], timeout_ms=PULL_TIMEOUT_MS, local=local
        )
        try:
            pulled = await pull.finish(timeout_s=2 * PULL_TIMEOUT_MS / 1000)
        finally:
            await pull.stop()
        return pulled, serving.pool.data[block].tobytes()
