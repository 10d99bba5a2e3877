"""HTTP of a KV node: metrics, liveness, readiness."""

from aiohttp import web

from kvasir_kvstore.metrics import CONTENT_TYPE
from kvasir_kvstore.node.store import NodeStore


def make_app(store: NodeStore) -> web.Application:
    """The application with /metrics, /healthz and /readyz."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=store.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def readyz(_: web.Request) -> web.Response:
        problems = ["draining"] if store.is_draining else []
        body = {"ready": not problems, "problems": problems, "degraded": store.degraded}
        return web.json_response(body, status=503 if problems else 200)

    app = web.Application(client_max_size=1 << 16)
    app.add_routes(
        [web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)]
    )
    return app
