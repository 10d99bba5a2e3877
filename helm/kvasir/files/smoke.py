"""`helm test`: the operator is ready, and the API server knows and checks Kvasir's resources."""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
OPERATOR_URL, NAMESPACE = sys.argv[1:]
LIMIT_S = 20


def operator_is_ready() -> None:
    """Its readiness names what keeps it from working."""
    with urllib.request.urlopen(f"{OPERATOR_URL}/readyz", timeout=LIMIT_S) as answer:
        print("the operator:", answer.read().decode())


def create_dry(spec: dict) -> tuple[int, str]:
    """Status and message of a ModelService that the API server checks and does not keep."""
    body = {
        "apiVersion": "kvasir.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": "helm-test"},
        "spec": spec,
    }
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    path = f"/apis/kvasir.dev/v1alpha1/namespaces/{NAMESPACE}/modelservices?dryRun=All"
    with open(f"{ACCOUNT}/token") as token:
        headers = {"Authorization": f"Bearer {token.read()}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"https://{host}:{port}{path}", json.dumps(body).encode(), headers
    )
    trust = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S, context=trust) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def resources_are_checked() -> None:
    """A good ModelService passes; one that contradicts itself is refused with the reason."""
    model = {"name": "test", "source": {"image": {"reference": "test"}}}
    status, message = create_dry({"model": model})
    assert status == 201, f"a good ModelService: {status} {message}"
    status, message = create_dry({"model": {"name": "test", "source": {}}})
    assert status == 422, f"a ModelService without a model source: {status}"
    assert "exactly one of" in message, message
    print("the API server checks ModelServices")


operator_is_ready()
resources_are_checked()
