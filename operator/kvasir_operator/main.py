"""The operator process: it waits to lead, then watches feed a queue that a few tasks reconcile."""

import asyncio
import logging
import math
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

import kopf
from aiohttp import web

from kvasir_operator import metrics
from kvasir_operator.api import KINDS
from kvasir_operator.audit import WATCHED_KINDS, WatchAudit
from kvasir_operator.cluster import KubeCluster
from kvasir_operator.core.manifests import Ref
from kvasir_operator.drain import Drainer
from kvasir_operator.errors import ClusterError, LeaseLostError
from kvasir_operator.health import Health, start_http
from kvasir_operator.leader import Elector
from kvasir_operator.reconcile import Reconciler
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers
from kvasir_operator.settings import OperatorSettings
from kvasir_operator.telemetry import Collector
from kvasir_operator.watch import make_registry, make_settings
from kvasir_operator.workqueue import WorkQueue

if TYPE_CHECKING:
    from kvasir_operator.webhook import Webhook

logger = logging.getLogger(__name__)

CRD_POLL_INTERVAL_S = 1.0


def run(settings: OperatorSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # a line per event otherwise
    try:
        asyncio.run(Operator(settings).run())
    except LeaseLostError as error:
        logger.error("%s", error)
        raise SystemExit(1) from None


class Operator:
    """Owns every task of the process."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._problems: list[str] = ["starting"]
        self._stop = asyncio.Event()
        self._queue = WorkQueue(on_depth=metrics.QUEUE_DEPTH.set)
        self._elector: Elector | None = None
        self._is_leading = False
        self._is_lease_lost = False
        self._cluster = KubeCluster(
            timeout_s=settings.api_timeout_s, write_left_s=self._write_left_s
        )
        if settings.lease_namespace:
            identity = settings.identity or f"{socket.gethostname()}-{os.getpid()}"
            self._elector = Elector(
                self._cluster, namespace=settings.lease_namespace, identity=identity
            )
        self._drainer = Drainer(on_progress=self._queue.add)
        self._audit = WatchAudit()
        self._roles = RoleSetter(on_progress=self._queue.add)
        self._webhook = self._make_webhook()
        self._reconciler = Reconciler(
            self._cluster,
            self._drainer,
            self._audit,
            self._roles,
            Routers(),
            Collector(),
            default_image=settings.image,
        )

    def stop(self) -> None:
        """End the run; drains go on at the workers."""
        self._stop.set()

    async def run(self) -> None:
        """Serve health, wait for the CRDs and to lead, then reconcile until told to stop."""
        self._handle_signals()
        settings = self._settings
        http = await start_http(host=settings.host, port=settings.http_port, health=self._health)
        answering = self._answer_webhook()
        try:
            if await self._wait_for_crds() and await self._lead():
                await self._serve(http)
        finally:
            if answering is not None:
                answering.cancel()
            await self._drainer.close()
            await self._roles.close()
            if self._elector is not None:
                await self._elector.give_back()
            await self._cluster.close()
            await http.cleanup()
        if self._is_lease_lost:
            raise LeaseLostError("another process may lead by now: this one starts again")

    def _make_webhook(self) -> "Webhook | None":
        settings = self._settings
        if not settings.webhook_port:
            return None
        from kvasir_operator.webhook import Webhook  # loads cryptography, 10 MB of memory

        return Webhook(
            self._cluster, namespace=settings.lease_namespace, service=settings.webhook_service
        )

    def _write_left_s(self) -> float:
        return self._elector.left_s() if self._elector is not None else math.inf

    def _health(self) -> Health:
        silent = self._audit.silent()
        for kind in WATCHED_KINDS:
            metrics.WATCH_LAG_SECONDS.labels(kind).set(silent.get(kind, 0.0))
        fatal = [
            f"the watch of {kind} is silent: it lags {lag_s:.0f} s behind"
            for kind, lag_s in silent.items()
        ]
        return Health(self._problems, fatal, self._is_leading)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)

    async def _wait_for_crds(self) -> bool:
        """kopf looks at the served resources once, so they must all be there; False: stopped.

        A new CRD is discovered a moment before its objects can be listed.
        """
        wanted = {kind.kind for kind in KINDS}
        namespace = (*self._settings.namespaces, "default")[0]
        while not self._stop.is_set():
            try:
                missing = wanted - await self._cluster.served_kinds()
                text = f"CRDs are not installed: {', '.join(sorted(missing))}"
                for kind in wanted - missing:
                    await self._cluster.list(kind, namespace)
            except ClusterError as error:
                missing, text = wanted, f"the API server cannot be used: {error}"
            if not missing:
                return True
            if self._problems != [text]:
                logger.warning("%s", text)
            self._problems = [text]
            await self._sleep(CRD_POLL_INTERVAL_S)
        return False

    async def _lead(self) -> bool:
        """Wait until this process leads; False: stopped. A standby is ready to take over."""
        if self._elector is not None:
            self._problems = []
            campaign = asyncio.create_task(self._elector.campaign(), name="election")
            stopped = asyncio.create_task(self._stop.wait(), name="stop")
            done, waiting = await asyncio.wait(
                {campaign, stopped}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in waiting:
                task.cancel()
            if campaign not in done:
                return False
            campaign.result()
        self._is_leading = True
        metrics.LEADING.set(1)
        return True

    def _answer_webhook(self) -> "asyncio.Task[None] | None":
        """Every replica answers the API server, whether it leads or not."""
        if self._webhook is None:
            return None
        settings = self._settings
        serving = self._webhook.serve_forever(host=settings.host, port=settings.webhook_port)
        return asyncio.create_task(serving, name="webhook")

    async def _keep_certificates(self) -> None:
        if self._webhook is not None:
            await self._webhook.keep_certificates()

    async def _keep_lease(self) -> None:
        """Renew the lease; once it is lost, the process stops."""
        if self._elector is not None:
            await self._elector.keep()
            self._is_lease_lost = True
            self._stop.set()

    async def _sleep(self, delay_s: float) -> None:
        """Wait, but no longer than until the stop."""
        try:
            await asyncio.wait_for(self._stop.wait(), delay_s)
        except TimeoutError:
            return

    async def _serve(self, http: web.AppRunner) -> None:
        """Until the stop; then kopf is the last to end, for it waits for tasks that it sees."""
        ready = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(ready), name="watches")
            reconcilers = [
                tasks.create_task(self._reconcile_forever(), name=f"reconciler {n}")
                for n in range(self._settings.num_reconcilers)
            ]
            others = [
                tasks.create_task(self._announce(ready), name="readiness"),
                tasks.create_task(self._keep_lease(), name="lease"),
                tasks.create_task(self._audit_forever(), name="audit"),
                tasks.create_task(self._keep_certificates(), name="certificates"),
            ]
            await self._stop.wait()
            logger.info("stopping")
            self._problems = ["stopping"]
            for task in (*reconcilers, *others):
                task.cancel()
            await self._drainer.close()
            await self._roles.close()
            await http.cleanup()
            await watching

    async def _watch(self, ready: asyncio.Event) -> None:
        """kopf ends when `_stop` is set; if it ends by itself, the process must not stay."""
        namespaces = self._settings.namespaces
        await kopf.operator(
            registry=make_registry(self._queue.add, self._audit),
            settings=make_settings(),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=self._stop,
            ready_flag=ready,
        )
        self._stop.set()

    async def _announce(self, ready: asyncio.Event) -> None:
        await ready.wait()
        self._handle_signals()  # kopf has put its own handlers in their place
        self._problems = []
        logger.info("watching %s", ", ".join(self._settings.namespaces) or "all namespaces")

    async def _audit_forever(self) -> None:
        """Look for objects that the watches did not bring; they are reconciled all the same."""
        namespaces = self._settings.namespaces or ("",)
        while True:
            await asyncio.sleep(self._settings.resync_interval_s)
            for kind in KINDS:
                for namespace in namespaces:
                    await self._audit_kind(kind.kind, namespace)

    async def _audit_kind(self, kind: str, namespace: str) -> None:
        try:
            found = await self._cluster.list_metadata(kind, namespace)
        except ClusterError as error:
            logger.info("listing %s: %s", kind, error)
            return
        for obj in found:
            if not self._audit.observed(obj, kind=kind):
                metadata = obj["metadata"]
                self._queue.add(Ref(kind, metadata["namespace"], metadata["name"]))

    async def _reconcile_forever(self) -> None:
        while True:
            ref = await self._queue.get()
            try:
                await self._reconcile(ref)
            finally:
                self._queue.done(ref)

    async def _reconcile(self, ref: Ref) -> None:
        started_s = time.perf_counter()
        result = "error"
        try:
            outcome = await self._reconciler.reconcile(ref)
            result = "gone" if outcome.is_gone else "ok"
        except ClusterError as error:
            result = "conflict" if error.is_conflict else "error"
            delay_ms = self._queue.failed(ref)
            logger.info("%s %s/%s: %s; again in %d ms", *ref, error, delay_ms)
            return
        except Exception:
            delay_ms = self._queue.failed(ref)
            logger.exception("%s %s/%s: reconcile failed; again in %d ms", *ref, delay_ms)
            return
        finally:
            metrics.RECONCILES.labels(ref.kind, result).inc()
            metrics.RECONCILE_SECONDS.labels(ref.kind).observe(time.perf_counter() - started_s)
        self._queue.succeeded(ref)
        if outcome.is_gone:
            self._queue.forget(ref)
            return
        resync_ms = int(self._settings.resync_interval_s * 1000)
        self._queue.add_after(ref, outcome.requeue_after_ms or resync_ms)
