"""The Kubernetes API as the operator uses it: get, list, watch, server-side apply, status, delete.

A thin asynchronous client over aiohttp: no discovery, no generated models, one connection pool.
Credentials come from kopf's readers of service accounts and kubeconfigs; they are read again when
the server answers 401 and every CREDENTIALS_TTL_S, because service account tokens rotate.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import aiohttp
import kopf

from kvasir_operator import metrics
from kvasir_operator.api import GROUP, KINDS, VERSION
from kvasir_operator.core.manifests import (
    API_OF_GATEWAY_KIND,
    FIELD_MANAGER,
    Manifest,
    Ref,
    ref_of,
    selector_text,
)
from kvasir_operator.errors import ClusterError
from kvasir_operator.watch import OPENED, Event

Manifests = list[Manifest]
Labels = Mapping[str, str]
NO_LABELS: Labels = MappingProxyType({})
CREDENTIALS_TTL_S = 300.0
LIST_PAGE_MAX = 500
WATCH_S = 300  # a watch ends after this to twice this time, and is made again
WATCH_SILENCE_MAX_S = 100.0  # bookmarks come every minute (of events: none): look for a dead link
WATCH_EVENT_BYTES_MAX = 16 << 20
JSON = "application/json"
HEADERS = {"Accept": JSON, "Accept-Encoding": "identity"}  # packing costs more than it saves
APPLY_PATCH = "application/apply-patch+yaml"  # JSON is YAML
MERGE_PATCH = "application/merge-patch+json"


class Cluster(Protocol):
    """What a reconcile needs of a cluster. Calls raise ClusterError."""

    async def get(self, ref: Ref) -> Manifest | None:
        """The object, or None if there is none."""
        ...

    async def fetch(self, ref: Ref) -> Manifest | None:
        """The object as the API server has it now, also if it is not ours."""
        ...

    async def is_served(self, kind: str) -> bool:
        """Whether the API server knows a kind that is not Kubernetes' own."""
        ...

    async def warning(self, uid: str, namespace: str) -> str:
        """What the latest warning event about an object says; empty: there is none."""
        ...

    async def list(self, kind: str, namespace: str, *, labels: Labels = NO_LABELS) -> Manifests:
        """The objects of a namespace with these labels."""
        ...

    async def apply(self, manifest: Manifest) -> Manifest:
        """Apply by server-side apply; the object as it is afterwards."""
        ...

    async def apply_status(self, ref: Ref, status: Manifest) -> Manifest:
        """Apply the status subresource of a custom resource; the resource afterwards."""
        ...

    async def annotate(self, ref: Ref, uid: str, annotations: Mapping[str, str]) -> Manifest:
        """Set annotations of exactly the object with this UID; the object afterwards."""
        ...

    async def delete(self, ref: Ref, *, uid: str = "") -> Manifest | None:
        """Delete the object (if it is the one with this UID); None: it was gone already.

        What is left of it bears a deletionTimestamp; any other answer means that it is gone.
        """
        ...

    async def create_event(self, namespace: str, event: Manifest) -> None:
        """Record an Event."""
        ...


API_PATHS = {
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Pod": ("/api/v1", "pods"),
    "Secret": ("/api/v1", "secrets"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "ValidatingWebhookConfiguration": (
        "/apis/admissionregistration.k8s.io/v1",
        "validatingwebhookconfigurations",
    ),
    "Event": ("/api/v1", "events"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "ReplicaSet": ("/apis/apps/v1", "replicasets"),
    "StatefulSet": ("/apis/apps/v1", "statefulsets"),
    "HorizontalPodAutoscaler": ("/apis/autoscaling/v2", "horizontalpodautoscalers"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    **{
        kind: (f"/apis/{version}", f"{kind.lower()}s")
        for kind, version in API_OF_GATEWAY_KIND.items()
    },
    **{kind.kind: (f"/apis/{GROUP}/{VERSION}", kind.plural) for kind in KINDS},
}


class _Request(NamedTuple):
    verb: str
    kind: str
    method: str
    path: str
    params: Mapping[str, str] = {}
    body: Any = None
    content_type: str = JSON

    @property
    def is_fenced(self) -> bool:
        """Whether only a leader may send it."""
        return self.method != "GET" and self.kind != "Lease"


def _path(kind: str, namespace: str, name: str = "", subresource: str = "") -> str:
    prefix, plural = API_PATHS[kind]
    parts = [prefix, "namespaces" if namespace else "", namespace, plural, name, subresource]
    return "/".join(part for part in parts if part)


class KubeCluster:
    """The API server named by the pod's service account or by KUBECONFIG."""

    def __init__(
        self, *, timeout_s: float, write_left_s: Callable[[], float] = lambda: math.inf
    ) -> None:
        """`write_left_s` says how long this process may still write: see leader.py."""
        self._timeout_s = timeout_s
        self._write_left_s = write_left_s
        self._session: aiohttp.ClientSession | None = None
        self._info: kopf.ConnectionInfo | None = None
        self._server = ""
        self._login_at_s = 0.0
        self._login_lock = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, ref: Ref) -> Manifest | None:
        """See Cluster."""
        try:
            return await self._call(
                _Request("get", ref.kind, "GET", _path(ref.kind, ref.namespace, ref.name))
            )
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    async def pages(
        self, kind: str, namespace: str, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[Manifests, int]]:
        """See watch.Source: pages of LIST_PAGE_MAX objects."""
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(LIST_PAGE_MAX)}
        while True:
            params = {key: value for key, value in query.items() if value}
            page = await self._call(_Request("list", kind, "GET", _path(kind, namespace), params))
            named = {"apiVersion": page.get("apiVersion", ""), "kind": kind}  # items lack both
            items = [{**item, **named} for item in page["items"] or ()]  # null: none
            yield items, int(page["metadata"].get("resourceVersion") or 0)
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return

    async def list(self, kind: str, namespace: str, *, labels: Labels = NO_LABELS) -> Manifests:
        """See Cluster."""
        found: Manifests = []
        async for page, _ in self.pages(kind, namespace, labels=selector_text(dict(labels))):
            found += page
        return found

    async def watch(
        self, kind: str, namespace: str, *, labels: str, fields: str, version: int
    ) -> AsyncIterator[Event]:
        """See watch.Source."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": str(version),
            "timeoutSeconds": str(random.randint(WATCH_S, 2 * WATCH_S)),
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        session = await self._logged_in()
        status = 0
        try:
            async with session.get(
                self._server + _path(kind, namespace),
                params={key: value for key, value in query.items() if value},
                timeout=aiohttp.ClientTimeout(
                    sock_connect=self._timeout_s, sock_read=WATCH_SILENCE_MAX_S
                ),
            ) as response:
                status = response.status
                if status != 200:
                    _read_answer(status, await response.text())
                yield OPENED
                async for line in _lines(response.content):
                    yield _read_event(line)
        except aiohttp.SocketTimeoutError:
            return  # silence: whether the connection is dead, the next one shows
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClusterError(0, type(error).__name__, str(error)) from error
        finally:
            metrics.API_REQUESTS.labels("watch", kind, str(status)).inc()
            if status == 401:
                self._login_at_s = 0.0

    async def apply(self, manifest: Manifest) -> Manifest:
        """See Cluster."""
        ref = ref_of(manifest)
        return await self._apply(ref, _path(*ref), manifest)

    async def apply_status(self, ref: Ref, status: Manifest) -> Manifest:
        """See Cluster."""
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": ref.kind,
            "metadata": {"name": ref.name, "namespace": ref.namespace},
            "status": status,
        }
        return await self._apply(ref, _path(*ref, "status"), body)

    async def _apply(self, ref: Ref, path: str, body: Manifest) -> Manifest:
        metrics.API_WRITES.labels("apply", ref.kind).inc()
        params = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        return await self._call(
            _Request("apply", ref.kind, "PATCH", path, params, body, APPLY_PATCH)
        )

    async def annotate(self, ref: Ref, uid: str, annotations: Mapping[str, str]) -> Manifest:
        """See Cluster."""
        metrics.API_WRITES.labels("annotate", ref.kind).inc()
        body = {"metadata": {"uid": uid, "annotations": dict(annotations)}}
        params = {"fieldManager": FIELD_MANAGER}
        return await self._call(
            _Request("annotate", ref.kind, "PATCH", _path(*ref), params, body, MERGE_PATCH)
        )

    async def delete(self, ref: Ref, *, uid: str = "") -> Manifest | None:
        """See Cluster."""
        metrics.API_WRITES.labels("delete", ref.kind).inc()
        body: Manifest = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            return await self._call(_Request("delete", ref.kind, "DELETE", _path(*ref), body=body))
        except ClusterError as error:
            if error.status not in (404, 409):
                raise
            return None

    async def put(self, manifest: Manifest) -> Manifest:
        """Create the object, or replace it if it still has the resourceVersion it was read with."""
        ref, is_new = ref_of(manifest), "resourceVersion" not in manifest["metadata"]
        metrics.API_WRITES.labels("create" if is_new else "update", ref.kind).inc()
        params = {"fieldManager": FIELD_MANAGER}
        if is_new:
            path = _path(ref.kind, ref.namespace)
            return await self._call(_Request("create", ref.kind, "POST", path, params, manifest))
        return await self._call(_Request("update", ref.kind, "PUT", _path(*ref), params, manifest))

    async def create_event(self, namespace: str, event: Manifest) -> None:
        """See Cluster."""
        metrics.API_WRITES.labels("create", "Event").inc()
        await self._call(_Request("create", "Event", "POST", _path("Event", namespace), body=event))

    async def is_served(self, kind: str) -> bool:
        """See Cluster."""
        return kind in await self.served_kinds(API_PATHS[kind][0])

    async def served_kinds(self, path: str = f"/apis/{GROUP}/{VERSION}") -> set[str]:
        """The kinds of a group, Kvasir's own, that the API server serves at present."""
        try:
            answer = await self._call(_Request("discover", "APIGroup", "GET", path))
        except ClusterError as error:
            if error.status == 404:
                return set()
            raise
        return {entry["kind"] for entry in answer.get("resources", ())}

    async def _call(self, request: _Request) -> Manifest:
        try:
            session = await self._logged_in()
            return await self._send(session, request)
        except ClusterError as error:
            if error.status != 401:
                raise
        self._login_at_s = 0.0
        return await self._send(await self._logged_in(), request)

    async def _send(self, session: aiohttp.ClientSession, request: _Request) -> Manifest:
        data = None if request.body is None else json.dumps(request.body)
        headers = {"Content-Type": request.content_type}
        limit_s = self._timeout_s
        if request.is_fenced:
            limit_s = min(limit_s, self._write_left_s())
            if limit_s <= 0:
                raise ClusterError(0, "NotLeading", "another process may lead by now")
        status = 0
        try:
            async with session.request(
                request.method,
                self._server + request.path,
                params=request.params,
                data=data,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=limit_s),
            ) as response:
                status = response.status
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClusterError(0, type(error).__name__, str(error)) from error
        finally:
            metrics.API_REQUESTS.labels(request.verb, request.kind, str(status)).inc()
        return _read_answer(status, text)

    async def _logged_in(self) -> aiohttp.ClientSession:
        async with self._login_lock:
            now_s = time.monotonic()
            if self._session is None or now_s - self._login_at_s > CREDENTIALS_TTL_S:
                info = login(settings=kopf.OperatorSettings())
                self._login_at_s = now_s
                if self._session is None or info != self._info:
                    await self.close()
                    self._info = info
                    self._server = info.server.rstrip("/")
                    self._session = _session(info)
            return self._session


def _session(info: kopf.ConnectionInfo) -> aiohttp.ClientSession:
    """Every watch holds a connection; of calls there are only as many as tasks that make them."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=info.as_ssl_context(), limit=0),
        headers={**info.as_http_headers(), **HEADERS},
        trust_env=info.trust_env,
    )


def login(*, settings: kopf.OperatorSettings) -> kopf.ConnectionInfo:
    """Credentials of the pod's service account, else of KUBECONFIG."""
    found = kopf.login_with_service_account(settings=settings)
    found = found or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise ClusterError(
            0, "NoCredentials", "not in a pod, and neither KUBECONFIG nor ~/.kube/config is there"
        )
    return found


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > WATCH_EVENT_BYTES_MAX:
            raise ClusterError(0, "TooLarge", f"an event of more than {len(rest)} bytes")


def _read_event(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise ClusterError(0, "NotJson", str(error)) from error
    obj = event["object"]
    if event["type"] == "ERROR":
        raise ClusterError(obj.get("code", 0), obj.get("reason", ""), obj.get("message", ""))
    return Event(event["type"], obj)


def _read_answer(status: int, text: str) -> Manifest:
    try:
        answer: Manifest = json.loads(text)
    except ValueError:
        answer = {}
    if 200 <= status < 300:
        return answer
    reason = answer.get("reason", "Unknown")
    raise ClusterError(status, reason, answer.get("message", text[:200]))
