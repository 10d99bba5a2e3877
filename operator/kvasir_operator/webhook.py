"""The validating webhook: every replica answers it, the leader keeps its certificates.

The certificates live in a Secret. A check that cannot be made in time lets the resource pass with
a warning: the status tells later, and the API server goes on without the webhook, too
(failurePolicy Ignore).
"""

import asyncio
import base64
import logging
import ssl
import tempfile
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from kvasir_operator.certificates import Bundle, is_good_for, make_bundle, utc_now
from kvasir_operator.core.admission import Verdict, references_of, review
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.errors import ClusterError

logger = logging.getLogger(__name__)

PATH = "/validate"
CONFIGURATION_KIND = "ValidatingWebhookConfiguration"
REVIEW_TIMEOUT_S = 3.0
RELOAD_INTERVAL_S = 10.0  # how soon a replica serves a certificate that the leader has made
CHECK_INTERVAL_S = 3600.0
REVIEW_BYTES_MAX = 4 << 20
CERTIFICATE, KEY, AUTHORITIES = "tls.crt", "tls.key", "ca.crt"


class Objects(Protocol):
    """What the webhook needs of a cluster. Calls raise ClusterError."""

    async def get(self, ref: Ref) -> Manifest | None:
        """The object, or None."""
        ...

    async def put(self, manifest: Manifest) -> Manifest:
        """Create or replace the object."""
        ...


class Webhook:
    """One replica's server; `dns_name` is the Service's."""

    def __init__(self, objects: Objects, *, namespace: str, service: str) -> None:
        self._objects = objects
        self._secret = Ref("Secret", namespace, service)
        self._service = Ref("Service", namespace, service)
        self._configuration = Ref(CONFIGURATION_KIND, "", f"{namespace}-{service}")
        self._dns_name = f"{service}.{namespace}.svc"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._loaded = b""

    async def serve_forever(self, *, host: str, port: int) -> None:
        """Wait for a certificate, then answer; newer certificates are taken up."""
        app = web.Application(client_max_size=REVIEW_BYTES_MAX)
        app.router.add_post(PATH, self._handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        is_listening = False
        try:
            while True:
                if await self._load() and not is_listening:
                    await web.TCPSite(runner, host, port, ssl_context=self._context).start()
                    is_listening = True
                    logger.info("the webhook listens on port %d", port)
                await asyncio.sleep(RELOAD_INTERVAL_S if is_listening else 1.0)
        finally:
            await runner.cleanup()

    async def keep_certificates(self) -> None:
        """Make certificates, renew them in time, and tell the API server whom to trust."""
        while True:
            try:
                delay_s = CHECK_INTERVAL_S if await self._renew() else RELOAD_INTERVAL_S
            except ClusterError as error:
                logger.warning("certificates of the webhook: %s", error)
                delay_s = RELOAD_INTERVAL_S
            await asyncio.sleep(delay_s)

    async def _renew(self) -> bool:
        """False: nobody is to be told whom to trust, as while the chart is being uninstalled."""
        configuration = await self._objects.get(self._configuration)
        if configuration is None:
            logger.warning("%s %s is not there", CONFIGURATION_KIND, self._configuration.name)
            return False
        secret = await self._objects.get(self._secret)
        data = {k: base64.b64decode(v) for k, v in (secret or {}).get("data", {}).items()}
        if not is_good_for(data.get(CERTIFICATE, b""), self._dns_name, now=utc_now()):
            made = make_bundle(self._dns_name, "localhost", now=utc_now())
            before = data.get(AUTHORITIES, b"").partition(END)
            data = _secret_data(made, authority_before=b"".join(before[:2]))
            owner = await self._objects.get(self._service)
            await self._objects.put(_secret_manifest(self._secret, secret, data, owner=owner))
            logger.info("made a certificate for %s", self._dns_name)
        await self._trust(configuration, base64.b64encode(data[AUTHORITIES]).decode())
        return True

    async def _trust(self, configuration: Manifest, authorities: str) -> None:
        configs = [hook["clientConfig"] for hook in configuration["webhooks"]]
        if any(config.get("caBundle") != authorities for config in configs):
            for config in configs:
                config["caBundle"] = authorities
            await self._objects.put(configuration)

    async def _load(self) -> bool:
        """Take up the Secret's certificate; False: there is none yet."""
        try:
            secret = await self._objects.get(self._secret)
        except ClusterError as error:
            logger.info("certificate of the webhook: %s", error)
            return bool(self._loaded)
        data = (secret or {}).get("data", {})
        if CERTIFICATE not in data or KEY not in data:
            return bool(self._loaded)
        pem = base64.b64decode(data[KEY]) + base64.b64decode(data[CERTIFICATE])
        if pem != self._loaded:
            with tempfile.TemporaryDirectory() as folder:  # ssl reads files only
                path = Path(folder) / "pair.pem"
                path.touch(mode=0o600)
                path.write_bytes(pem)
                self._context.load_cert_chain(path)
            self._loaded = pem
        return True

    async def _handle(self, request: web.Request) -> web.Response:
        asked = (await request.json())["request"]
        verdict = await self._judge(asked["object"])
        response: dict[str, Any] = {"uid": asked["uid"], "allowed": not verdict.refusal}
        if verdict.refusal:
            response["status"] = {"code": 422, "message": verdict.refusal}
        if verdict.warnings:
            response["warnings"] = list(verdict.warnings)
        kind = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
        return web.json_response({**kind, "response": response})

    async def _judge(self, obj: Manifest) -> Verdict:
        try:
            async with asyncio.timeout(REVIEW_TIMEOUT_S):
                refs = references_of(obj)
                found = await asyncio.gather(*map(self._objects.get, refs))
        except (ClusterError, TimeoutError) as error:
            logger.info("references of %s: %s", obj["metadata"].get("name"), error)
            return Verdict(warnings=("Kvasir could not check what it refers to",))
        live = {ref: other for ref, other in zip(refs, found, strict=True) if other is not None}
        return review(obj, live)


END = b"-----END CERTIFICATE-----\n"


def _secret_data(made: Bundle, *, authority_before: bytes) -> dict[str, bytes]:
    return {
        CERTIFICATE: made.certificate,
        KEY: made.key,
        AUTHORITIES: made.ca + authority_before,
    }


def _secret_manifest(
    ref: Ref, live: Manifest | None, data: dict[str, bytes], *, owner: Manifest | None
) -> Manifest:
    """The Secret; it goes with the Service, which the chart makes and removes."""
    metadata = live["metadata"] if live else {"name": ref.name, "namespace": ref.namespace}
    if owner is not None:
        service = {"apiVersion": "v1", "kind": "Service", "name": owner["metadata"]["name"]}
        service["uid"] = owner["metadata"]["uid"]
        metadata = {**metadata, "ownerReferences": [service]}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": metadata,
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }
