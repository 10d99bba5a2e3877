"""The HTTP application: the OpenAI API, /metrics, /healthz and /readyz."""

from dataclasses import dataclass

from aiohttp import web

from kvasir_router.leaving import Leaving
from kvasir_router.membership.canary import CanaryRun
from kvasir_router.membership.fleet import Fleet, now_ms
from kvasir_router.metrics import CONTENT_TYPE, RouterMetrics
from kvasir_router.openai.handlers import OpenAiApi
from kvasir_router.openai.middleware import api_middleware
from kvasir_router.peering.follow import Peers
from kvasir_router.settings import RouterSettings
from kvasir_router.tenants import Tenants


@dataclass(slots=True)
class Readiness:
    """Whether new requests should come here.

    All routers lose a worker at the same moment. They do not leave the Service for that at once:
    clients would be refused connections where they can be told to come again.
    """

    fleet: Fleet
    leaving: Leaving
    canaries: CanaryRun
    patience_ms: int
    _served_ms: int | None = None

    def problems(self) -> list[str]:
        """What keeps the router from serving; empty: it can, or could shortly before."""
        if self.leaving.has_begun:
            return ["the router is stopping"]
        missing, at_ms = self.fleet.problems(), now_ms()
        if not missing:
            self._served_ms = at_ms
        elif self._served_ms is not None and at_ms - self._served_ms < self.patience_ms:
            return []
        return missing

    def degraded(self) -> list[str]:
        """What is wrong and does not keep it from being ready."""
        borne = [] if self.problems() else self.fleet.problems()
        return [*borne, *self.fleet.degraded(), *self.canaries.degraded()]


class Probes:
    """What Kubernetes and Prometheus ask."""

    def __init__(self, readiness: Readiness, peers: Peers, metrics: RouterMetrics) -> None:
        self._readiness, self._peers, self._metrics = readiness, peers, metrics

    def routes(self) -> list[web.AbstractRouteDef]:
        """What to add to the application."""
        return [
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics),
        ]

    async def healthz(self, request: web.Request) -> web.Response:
        """Alive: the event loop answers."""
        return web.json_response({"alive": True})

    async def readyz(self, request: web.Request) -> web.Response:
        """Ready, or why not; `degraded` lists faults of single workers and KV nodes."""
        problems = self._readiness.problems()
        body = {
            "ready": not problems,
            "problems": problems,
            "degraded": self._readiness.degraded(),
        }
        return web.json_response(body, status=503 if problems else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        fleet = self._readiness.fleet
        self._metrics.canaries(self._readiness.canaries.standings().values())
        text = self._metrics.text(
            fleet.view(), num_members=len(fleet.members()), num_peers=self._peers.num_connected
        )
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


def make_app(
    settings: RouterSettings,
    *,
    api: OpenAiApi,
    probes: Probes,
    tenants: Tenants,
    metrics: RouterMetrics,
    leaving: Leaving,
) -> web.Application:
    """All routes and the middleware."""
    app = web.Application(
        middlewares=[api_middleware(tenants, metrics, leaving)],
        client_max_size=settings.body_bytes_max,
    )
    app.on_response_prepare.append(leaving.mark)
    app.add_routes([*api.routes(), *probes.routes()])
    return app
