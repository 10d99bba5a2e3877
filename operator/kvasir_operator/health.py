"""/metrics, /healthz and /readyz of the operator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvasir_operator import metrics


@dataclass(frozen=True, slots=True)
class Health:
    """How the process is at present."""

    problems: Sequence[str]  # what keeps it from being ready
    fatal: Sequence[str]  # what only a restart can help
    is_leading: bool


async def start_http(*, host: str, port: int, health: Callable[[], Health]) -> web.AppRunner:
    """Serve until the runner is cleaned up."""

    async def serve_metrics(_: web.Request) -> web.Response:
        body = generate_latest(metrics.REGISTRY)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        fatal = list(health().fatal)
        status = 503 if fatal else 200
        return web.json_response({"alive": not fatal, "problems": fatal}, status=status)

    async def readyz(_: web.Request) -> web.Response:
        now = health()
        found = [*now.problems, *now.fatal]
        status = 503 if found else 200
        body = {"ready": not found, "leading": now.is_leading, "problems": found}
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_get("/metrics", serve_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
