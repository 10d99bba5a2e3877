"""One router process put together: fleet, dispatcher, HTTP and gRPC servers, and their order.

Started from the bottom up, stopped from the top down: clients are sent elsewhere, then no new
connection is accepted, the streams finish within a bound, the connections to the workers close.
"""

import asyncio
import contextlib
import logging
import secrets

from aiohttp import web
from kvasir_kvstore.peers import join_target
from kvasir_proto.links import Links

from kvasir_router.app import Probes, Readiness, make_app
from kvasir_router.intake import Intake, TextModel
from kvasir_router.leaving import Leaving
from kvasir_router.membership.canary import CanaryRun
from kvasir_router.membership.fleet import Fleet
from kvasir_router.metrics import RouterMetrics
from kvasir_router.openai.calls import OpenAiCalls
from kvasir_router.openai.handlers import OpenAiApi
from kvasir_router.peering.follow import Peers
from kvasir_router.peering.service import RouterPeerService
from kvasir_router.peering.wire import REPLICA_BYTES
from kvasir_router.picker.endpoints import EndpointPicker
from kvasir_router.picker.replicas import Replicas
from kvasir_router.picker.service import PickerServer, PickerService
from kvasir_router.rpc.server import RpcServer
from kvasir_router.rpc.service import InferenceService
from kvasir_router.settings import WILDCARDS, RouterSettings
from kvasir_router.tenants import Tenants
from kvasir_router.upstream.client import WorkerClient
from kvasir_router.upstream.dispatch import Dispatcher

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 2.0
"""After the drain timeout, for cancelled handlers to close their connections to workers."""

BACKLOG = 1_024
READY_CHECK_MS = 500
"""How often grpc.health.v1 is brought up to date even when no member changes."""


class RouterServer:
    """A running router."""

    def __init__(self, settings: RouterSettings, text: TextModel) -> None:
        self._settings = settings
        replica = secrets.token_bytes(REPLICA_BYTES)
        links = Links(settings.tls_dir)
        self.fleet = Fleet(settings, links, replica=replica)
        keys = self.fleet.view().keys
        self.peers = Peers(
            settings.peers, keys, links, replica=replica, interval_ms=settings.resolve_interval_ms
        )
        self.metrics = RouterMetrics()
        self.leaving = Leaving()
        self.canaries = CanaryRun(self.fleet)
        self.readiness = Readiness(
            self.fleet, self.leaving, self.canaries, patience_ms=settings.unready_after_ms
        )
        tenants = Tenants.load(settings.api_key_file)
        self._client = WorkerClient(
            links,
            connections_max=2 * settings.requests_in_flight_max,
            connect_timeout_ms=settings.connect_timeout_ms,
        )
        self.dispatcher = Dispatcher(settings, self.fleet, self._client, self.metrics)
        self._intake = Intake(settings, text, self.fleet)
        calls = OpenAiCalls(self._intake)
        self._app = make_app(
            settings,
            api=OpenAiApi(settings, self._intake, calls, self.dispatcher),
            probes=Probes(self.readiness, self.peers, self.metrics),
            tenants=tenants,
            metrics=self.metrics,
            leaving=self.leaving,
        )
        service = InferenceService(
            intake=self._intake,
            dispatcher=self.dispatcher,
            fleet=self.fleet,
            canaries=self.canaries,
            tenants=tenants,
            metrics=self.metrics,
        )
        peering = RouterPeerService(keys, replica=replica, endpoint=self._told_endpoint)
        self._rpc = RpcServer(settings, service, peering, links)
        self.replicas = Replicas(self._endpoint, self.peers, self.leaving)
        self._picker = self._make_picker(calls, tenants, links)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=CANCEL_GRACE_S,
        )
        self._site: web.TCPSite | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.http_port = self.grpc_port = self.peer_port = self.picker_port = 0

    def _make_picker(
        self, calls: OpenAiCalls, tenants: Tenants, links: Links
    ) -> PickerServer | None:
        settings = self._settings
        if settings.picker_port is None:
            return None
        picker = EndpointPicker(
            calls=calls,
            dispatcher=self.dispatcher,
            fleet=self.fleet,
            replicas=self.replicas,
            tenants=tenants,
            metrics=self.metrics,
        )
        return PickerServer(settings, PickerService(settings, picker, self.metrics), links)

    def _endpoint(self) -> str:
        """Where gateways reach this replica."""
        return join_target(self._settings.reached_at, self.http_port)

    def _told_endpoint(self) -> str:
        """What other replicas may tell gateways; "": nothing, as it would not serve."""
        is_open = not self.readiness.problems() and self._settings.reached_at not in WILDCARDS
        return self._endpoint() if is_open else ""

    async def start(self) -> None:
        """Listens on both ports and follows the fleet.

        Raises:
            OSError: a port is taken.
        """
        self._tasks = [
            asyncio.create_task(self.fleet.run(), name="fleet"),
            asyncio.create_task(self.canaries.run(), name="canaries"),
            asyncio.create_task(self.peers.run(), name="peers"),
            asyncio.create_task(self.dispatcher.moves.run(), name="moves"),
            asyncio.create_task(self._keep_health(), name="health"),
        ]
        await self._runner.setup()
        self._site = web.TCPSite(
            self._runner, self._settings.host, self._settings.http_port, backlog=BACKLOG
        )
        await self._site.start()
        self.http_port = self._runner.addresses[0][1]
        self.grpc_port, self.peer_port = await self._rpc.start()
        if self._picker is not None:
            self.picker_port = await self._picker.start()
            log.info("listening: for gateways %d", self.picker_port)
        log.info(
            "listening: HTTP %d, gRPC %d, for peers %d",
            self.http_port,
            self.grpc_port,
            self.peer_port,
        )

    async def serve(self, stopped: asyncio.Event) -> None:
        """Returns once `stopped` is set; what the router cannot live without fails it."""
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait({stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in self._tasks:
            if task.done():
                task.result()

    async def _keep_health(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READY_CHECK_MS / 1_000):
                    await self.fleet.changed()
            await self._set_ready(not self.readiness.problems())

    async def _set_ready(self, is_ready: bool) -> None:
        await self._rpc.set_ready(is_ready)
        if self._picker is not None:
            await self._picker.set_ready(is_ready)

    async def linger(self, hurried: asyncio.Event) -> None:
        """Not ready any more, but serving: until nobody sends new requests here, or `hurried`."""
        self.leaving.begin()
        await self._set_ready(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_linger_ms / 1_000):
                await hurried.wait()

    async def stop(self) -> None:
        """Finishes what runs, within drain_timeout_ms, and closes everything."""
        self.leaving.begin()
        if self._site is not None:
            await self._site.stop()
            self._site = None
            await self._drain()
        await self._runner.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()
        self._intake.close()

    async def _drain(self) -> None:
        drain_ms = self._settings.drain_timeout_ms
        stops = [asyncio.create_task(self._rpc.stop(drain_ms))]  # tells its clients to go away
        if self._picker is not None:
            stops.append(asyncio.create_task(self._picker.stop(drain_ms)))
        if self._runner.server is not None:
            await asyncio.sleep(0)  # what has just come in is begun before idle connections close
            self._runner.server.pre_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_ms / 1_000):
                await self.leaving.idle()
        await asyncio.gather(*stops)
