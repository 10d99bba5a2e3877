"""/metrics, /healthz and /readyz of the operator."""

from collections.abc import Callable, Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvasir_operator import metrics


async def start_http(
    *, host: str, port: int, problems: Callable[[], Sequence[str]]
) -> web.AppRunner:
    """Serve until the runner is cleaned up; `problems` says what keeps it from being ready."""

    async def serve_metrics(_: web.Request) -> web.Response:
        body = generate_latest(metrics.REGISTRY)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def readyz(_: web.Request) -> web.Response:
        found = list(problems())
        status = 503 if found else 200
        return web.json_response({"ready": not found, "problems": found}, status=status)

    app = web.Application()
    app.router.add_get("/metrics", serve_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
