"""The operator process: it waits to lead, then watches feed a queue that a few tasks reconcile."""

import asyncio
import logging
import math
import os
import random
import signal
import socket
import time
from typing import TYPE_CHECKING

from kvasir_operator import metrics
from kvasir_operator.api import KINDS
from kvasir_operator.cache import WATCH_LAG_MAX_S, CachedCluster
from kvasir_operator.channels import Channels
from kvasir_operator.cluster import KubeCluster
from kvasir_operator.core.manifests import Ref
from kvasir_operator.drain import Drainer
from kvasir_operator.errors import ClusterError, LeaseLostError
from kvasir_operator.health import Health, start_http
from kvasir_operator.leader import Elector
from kvasir_operator.reconcile import Reconciler
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers
from kvasir_operator.secrets import SecretKeeper
from kvasir_operator.settings import OperatorSettings
from kvasir_operator.telemetry import Collector
from kvasir_operator.workqueue import WorkQueue

if TYPE_CHECKING:
    from kvasir_operator.webhook import Webhook

logger = logging.getLogger(__name__)

CRD_POLL_INTERVAL_S = 1.0
RESYNC_JITTER = 0.2  # of the interval, so that not all objects come at once


def run(settings: OperatorSettings) -> None:
    """Run until SIGTERM or SIGINT."""
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
        self._queue = WorkQueue(
            on_depth=metrics.QUEUE_DEPTH.set, on_wait=metrics.QUEUE_SECONDS.observe
        )
        self._elector: Elector | None = None
        self._is_leading = False
        self._is_watching = False
        self._is_lease_lost = False
        self._kube = KubeCluster(timeout_s=settings.api_timeout_s, write_left_s=self._write_left_s)
        self._cluster = CachedCluster(
            self._kube, namespaces=settings.namespaces, on_news=self._queue.add
        )
        if settings.lease_namespace:
            identity = settings.identity or f"{socket.gethostname()}-{os.getpid()}"
            self._elector = Elector(
                self._kube, namespace=settings.lease_namespace, identity=identity
            )
        channels = Channels(self._cluster)
        self._drainer = Drainer(channels, on_progress=self._queue.add)
        self._roles = RoleSetter(channels, on_progress=self._queue.add)
        self._webhook = self._make_webhook()
        self._reconciler = Reconciler(
            self._cluster,
            self._drainer,
            self._roles,
            Routers(channels),
            Collector(channels),
            SecretKeeper(self._cluster),
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
                await self._serve()
        finally:
            await self._drainer.close()
            await self._roles.close()
            if self._elector is not None:
                await self._elector.give_back()
            if answering is not None:
                self._problems = ["stopping"]
                await asyncio.wait([answering], timeout=self._settings.shutdown_linger_s)
                answering.cancel()
            await self._kube.close()
            await http.cleanup()
        if self._is_lease_lost:
            raise LeaseLostError("another process may lead by now: this one starts again")

    def _make_webhook(self) -> "Webhook | None":
        settings = self._settings
        if not settings.webhook_port:
            return None
        from kvasir_operator.webhook import Webhook  # loads cryptography, 10 MB of memory

        return Webhook(
            self._kube, namespace=settings.lease_namespace, service=settings.webhook_service
        )

    def _write_left_s(self) -> float:
        return self._elector.left_s() if self._elector is not None else math.inf

    def _health(self) -> Health:
        problems, fatal = list(self._problems), []
        if self._is_watching:
            problems += self._cluster.problems()
            for kind, lag_s in self._cluster.lags_s().items():
                metrics.WATCH_LAG_SECONDS.labels(kind).set(lag_s)
                if lag_s > WATCH_LAG_MAX_S:
                    fatal.append(f"the watch of {kind} is silent for {lag_s:.0f} s")
            for kind, size in self._cluster.sizes().items():
                metrics.CACHED_OBJECTS.labels(kind).set(size)
        return Health(problems, fatal, self._is_leading)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)

    async def _wait_for_crds(self) -> bool:
        """Wait until the API server serves all of Kvasir's kinds; False: stopped."""
        wanted = {kind.kind for kind in KINDS}
        while not self._stop.is_set():
            try:
                missing = wanted - await self._kube.served_kinds()
                text = f"CRDs are not installed: {', '.join(sorted(missing))}"
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

    async def _serve(self) -> None:
        """Watch and reconcile until the stop."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._cluster.run(), name="watches"),
                group.create_task(self._keep_lease(), name="lease"),
                group.create_task(self._keep_certificates(), name="certificates"),
                group.create_task(self._reconcile_when_synced(), name="reconcilers"),
            ]
            self._is_watching = True
            await self._stop.wait()
            logger.info("stopping")
            self._problems = ["stopping"]
            for task in tasks:
                task.cancel()

    async def _reconcile_when_synced(self) -> None:
        """What the caches do not show yet must not be taken for gone."""
        self._problems = []
        await self._cluster.wait_until_synced()
        namespaces = ", ".join(self._settings.namespaces) or "all namespaces"
        logger.info("watching %s; %d objects", namespaces, sum(self._cluster.sizes().values()))
        async with asyncio.TaskGroup() as group:
            for n in range(self._settings.num_reconcilers):
                group.create_task(self._reconcile_forever(), name=f"reconciler {n}")

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
        jitter = random.uniform(1 - RESYNC_JITTER, 1 + RESYNC_JITTER)
        resync_ms = int(1000 * self._settings.resync_interval_s * jitter)
        self._queue.add_after(ref, outcome.requeue_after_ms or resync_ms)
