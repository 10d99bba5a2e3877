"""Around every request: an id, the tenant, errors in OpenAI's shape, the count of answers."""

import logging
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Middleware
from kvasir_proto.errors import KvasirError, Reason

from kvasir_router.intake import Caller
from kvasir_router.leaving import Leaving
from kvasir_router.membership.fleet import now_ms
from kvasir_router.metrics import RouterMetrics
from kvasir_router.openai.errors import error_response, refusal_of_server
from kvasir_router.openai.handlers import CALLER
from kvasir_router.tenants import DEFAULT_TENANT, Tenants

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
API_PREFIX = "/v1/"
CLIENT_GONE = 499


def api_middleware(tenants: Tenants, metrics: RouterMetrics, leaving: Leaving) -> Middleware:
    """The middleware of the router's application."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_api = request.path.startswith(API_PREFIX)
        caller = Caller(secrets.token_hex(16), DEFAULT_TENANT, now_ms())
        try:
            with leaving.request():
                response, reason = await _guarded(
                    request, handler, caller, tenants if is_api else None
                )
        except BaseException:  # cancelled: the client has gone
            metrics.answered("http", status=CLIENT_GONE, reason=Reason.CANCELLED)
            raise
        if not response.prepared:
            response.headers["x-request-id"] = caller.request_id
        if is_api:
            metrics.answered("http", status=response.status, reason=reason)
        return response

    return middleware


async def _guarded(
    request: web.Request, handler: Handler, caller: Caller, tenants: Tenants | None
) -> tuple[web.StreamResponse, str]:
    """The answer, and "ok" or the reason that it is an error."""
    try:
        if tenants is not None:
            tenant = tenants.authenticate(request.headers.get("Authorization"))
            caller = Caller(caller.request_id, tenant, caller.arrived_ms)
        request[CALLER] = caller
        return await handler(request), "ok"
    except KvasirError as error:
        return error_response(error), error.reason.value
    except web.HTTPException as error:
        return refusal_of_server(error), HTTPStatus(error.status).name.lower()
    except ConnectionError:
        return web.Response(status=CLIENT_GONE), Reason.CANCELLED.value
    except Exception:
        log.exception("request %s failed", caller.request_id)
        return error_response(KvasirError(Reason.INTERNAL, "the router failed")), "internal"
