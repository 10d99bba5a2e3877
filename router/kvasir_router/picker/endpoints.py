"""From an HTTP request to the endpoint that is to serve it.

    1. the tenant and the body are checked as the HTTP API checks them
    2. the core decides; what it refuses is answered by the gateway, and goes nowhere
    3. the endpoint is the router replica of the request's key: it takes the tokens from whichever
       worker has them, and goes on elsewhere when one is lost (docs/adr/0009-endpoint-picker.md)

A request without a body that says what it wants (GET /v1/models) may go to any replica.
"""

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError, Reason

from kvasir_router.core.choose import Rejected
from kvasir_router.core.ring import KEY_BYTES
from kvasir_router.intake import Caller
from kvasir_router.membership.fleet import Fleet, now_ms
from kvasir_router.metrics import RouterMetrics
from kvasir_router.openai.body import parse_body
from kvasir_router.openai.calls import OpenAiCalls
from kvasir_router.openai.middleware import API_PREFIX
from kvasir_router.openai.schema import Body, ChatBody, CompletionBody
from kvasir_router.picker.replicas import Replicas
from kvasir_router.tenants import DEFAULT_TENANT, Tenants
from kvasir_router.upstream.dispatch import Dispatcher, error_of

KINDS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}
PLAIN = ("", "identity")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a gateway tells of a request."""

    headers: Mapping[str, str]
    """In lower case, pseudo-headers among them."""

    body: bytes | None
    """None: the gateway does not show it."""

    among: frozenset[str] | None = None
    """The endpoints that it may go to; None: all."""

    @property
    def kind(self) -> type[Body] | None:
        """The kind of its body; None: the choice does not depend on it."""
        path = self.headers.get(":path", "").partition("?")[0]
        return KINDS.get(path) if self.headers.get(":method") == "POST" else None


class Pick:
    """A chosen endpoint; until `close`, a request is under way there."""

    def __init__(self, endpoint: str, account: contextlib.ExitStack) -> None:
        self.endpoint = endpoint
        self._account = account

    def close(self) -> None:
        """The request has ended, one way or another. Any number of times."""
        self._account.close()


class EndpointPicker:
    """The decision."""

    def __init__(
        self,
        *,
        calls: OpenAiCalls,
        dispatcher: Dispatcher,
        fleet: Fleet,
        replicas: Replicas,
        tenants: Tenants,
        metrics: RouterMetrics,
    ) -> None:
        self._calls, self._dispatcher, self._fleet = calls, dispatcher, fleet
        self._replicas, self._tenants, self._metrics = replicas, tenants, metrics

    def check(self, asked: Asked) -> None:
        """Whoever has no key shows no body either: it would take memory.

        Raises:
            KvasirError: what the client is to be told.
        """
        self._caller(asked)

    async def pick(self, asked: Asked) -> Pick:
        """An endpoint.

        Raises:
            KvasirError: what the client is to be told instead.
        """
        key = await self._key(asked)
        endpoint = self._replicas.choose(key, among=asked.among)
        account = contextlib.ExitStack()
        account.enter_context(self._replicas.opened(endpoint))
        account.enter_context(self._metrics.picked())
        return Pick(endpoint, account)

    async def _key(self, asked: Asked) -> bytes:
        """What decides which replica."""
        caller = self._caller(asked)
        if asked.kind is None or asked.body is None:
            return secrets.token_bytes(KEY_BYTES)
        if asked.headers.get("content-encoding", "").lower() not in PLAIN:
            message = "the body must not be compressed here"
            raise KvasirError(Reason.UNSUPPORTED, message, param="content-encoding")
        body = parse_body(asked.body, asked.kind)
        call = await self._calls.call_of(body, asked.headers, caller)
        request = self._dispatcher.describe(call)
        decision = await self._dispatcher.decide(request)
        if isinstance(decision, Rejected):
            self._metrics.rejected(decision)
            raise error_of(decision)
        return request.key(self._fleet.view().keys)

    def _caller(self, asked: Asked) -> Caller:
        caller = Caller(secrets.token_hex(16), DEFAULT_TENANT, now_ms())
        if not asked.headers.get(":path", "").startswith(API_PREFIX):
            return caller
        tenant = self._tenants.authenticate(asked.headers.get("authorization"))
        return Caller(caller.request_id, tenant, caller.arrived_ms)
